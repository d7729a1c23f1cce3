"""Triton's interpreter as the tests have it: the bits that it would give anyway, much sooner."""

import subprocess
import sys

SCRIPT = """
import time
import torch, triton, triton.language as tl
from torch import nn
import fastdcgan_kernels as fk
from tests import interpreter

def blocks():
    torch.manual_seed(0)
    for dtype in torch.float32, torch.bfloat16:
        net = nn.Sequential(
            nn.Conv2d(6, 5, 4, 2, 1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(5, 3, 4, 2, 1),
        )
        net = fk.fuse(net.to(memory_format=torch.channels_last))
        x = torch.randn(2, 6, 8, 4).to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = net(x)
        yield y.detach()
        yield from torch.autograd.grad(y.float().square().sum(), (x, *net.parameters()))

@triton.jit
def ranks_dtypes_and_pointers(x, y, n, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    box = i[:, None] * SIDE + i
    wide = tl.load(x + box, box < n).to(tl.float16).to(tl.float32)[None]
    lines = tl.sum(tl.where(wide > 0, wide, 1), 0)
    result = lines % 3 + tl.max(box, 1)[:, None]
    tl.store(tl.broadcast_to(y, (SIDE, SIDE)) + box.to(tl.int64), result)

def all_results():
    x, y = torch.linspace(-9, 9, 256), torch.zeros(16, 16)
    ranks_dtypes_and_pointers[(1,)](x, y, 250, 16)
    return [y, *blocks()]

def seconds():
    begun = time.process_time()
    all_results()
    return time.process_time() - begun

before = all_results()
slow = min(seconds() for _ in range(2))
interpreter.quicken()
for again in range(2):
    for old, new in zip(before, all_results(), strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new)
assert len({float(x.float().sum()) for x in before}) == len(before) == 17

quick = min(seconds() for _ in range(2))
assert quick < 0.4 * slow, (quick, slow)  # 0.28 as measured

@triton.jit
def three(y):
    tl.store(y + tl.arange(0, 4), tl.full((3,), 1, tl.int32))

for again in range(2):
    try:
        three[(1,)](torch.zeros(4))
    except Exception as error:
        assert "power of 2" in str(error), error
    else:
        raise AssertionError("a block of three is refused")
"""


def test_the_same_bits_in_less_time(environment, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)  # Triton reads the kernels' source
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**environment, "TRITON_INTERPRET": "1", "FASTDCGAN_IMPL": "triton"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
