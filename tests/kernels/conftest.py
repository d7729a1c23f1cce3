"""What Triton's interpreter lacks for bfloat16, which it stores as uint16: products of the bit
patterns instead of the values, and rounding towards zero. test_interpreter.py proves the patch."""

import os

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def bfloat16_in_the_interpreter():
    """Patch the interpreter before any kernel runs in it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_interpreter()


def patch_interpreter():
    """Products of bfloat16 in float32, and PyTorch's rounding (to nearest, ties to even)."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, wide(a), wide(b), d, *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            return handle(values.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst_type: cast_impl(self, src, dst_type))
