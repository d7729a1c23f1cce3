"""All tests of kernels run bfloat16 in Triton's interpreter as a GPU does."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _bfloat16(bfloat16_in_the_interpreter):
    pass
