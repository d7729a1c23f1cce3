"""The step as devices with kernels make it (here in Triton's interpreter) against the same step in
plain PyTorch: readings, weights, running statistics and average."""

import pytest
import torch

from fastdcgan.training import TrainConfig
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step
from fastdcgan_kernels.choice import choose

CPU = torch.device("cpu")
BATCH, STEPS = 2, 2


def made(impl, autocast, ndf=4):
    """Readings and tensors after a few steps; a loaded checkpoint in between is taken notice of."""
    config = TrainConfig(
        image_size=32, channels=3, nz=6, ngf=4, ndf=ndf, batch_size=BATCH, impl=impl, lr=1e-3
    )
    state = TrainState(config, CPU)
    step = Step(state, batch_size=BATCH, autocast=autocast)
    draw, rows = torch.Generator().manual_seed(1), []
    fresh = {name: value.clone() for name, value in state.netD.state_dict().items()}
    for at in range(STEPS):
        if at:
            state.load_state_dict(state.state_dict() | {"netD": fresh})
        images, z = (torch.randn(BATCH, *s, generator=draw) for s in ((3, 32, 32), (6, 1, 1)))
        rows.append(step(images.contiguous(memory_format=torch.channels_last), z, share=0.5))
    assert len(step._copies) == (2 if impl == "triton" and autocast else 0)
    # Where one backward makes a weight's gradient, it is left in the dtype of the products.
    narrow = {p.grad.dtype for p in state.netG.parameters() if p.dim() == 4}
    assert narrow == {autocast if impl == "triton" and autocast else torch.float32}
    for copies in step._copies:
        assert all(map(torch.equal, copies._copies, (w.to(autocast) for w in copies._weights)))
    return torch.stack(rows), state


def test_gradients_of_a_loss_and_a_penalty_are_added_in_float32():
    config = TrainConfig(
        image_size=32, channels=3, nz=6, ngf=4, ndf=4, batch_size=BATCH, impl="triton", r1=1.0
    )
    state = TrainState(config, CPU)
    step = Step(state, batch_size=BATCH, autocast=torch.bfloat16)
    step(torch.randn(BATCH, 3, 32, 32), torch.randn(BATCH, 6, 1, 1))
    of = [{p.grad.dtype for p in net.parameters() if p.dim() == 4}
          for net in (state.netD, state.netG)]  # fmt: skip
    assert of == [{torch.float32}, {torch.bfloat16}]


def test_a_step_after_kernels_were_left_is_plain():
    """As where they turn out wrong on a GPU: PyTorch's Adam takes gradients in float32."""
    config = TrainConfig(image_size=32, channels=3, nz=6, ngf=4, ndf=4, batch_size=BATCH)
    state = TrainState(config, CPU)
    step = Step(state, batch_size=BATCH, autocast=torch.bfloat16)
    images, z = torch.randn(BATCH, 3, 32, 32), torch.randn(BATCH, 6, 1, 1)
    for step.impl in ("triton", "reference", "reference"):
        assert step(images, z).isfinite().all()
    assert {p.grad.dtype for _, p in state.trained()} == {torch.float32}
    assert {int(state.optG.state[p]["step"]) for p in state.netG.parameters()} == {3}
    assert state.ema.updates == 3


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_steps_in_kernels_are_the_plain_steps(autocast):
    ours, state = made("triton", autocast)
    plain, twin = made("reference", autocast)
    if autocast is not None:  # G's first loss is of the updated D; rounding parts the nets then
        torch.testing.assert_close(ours[0], plain[0], rtol=0.03, atol=0.01)
        return
    check(ours, plain, state, twin)


@pytest.mark.parametrize("how", ["materialised", "prologue", "vendor"])
def test_steps_in_any_other_way_are_the_plain_steps(how):
    with choose.override(how):
        ours, state = made("triton", None, ndf=8)
    plain, twin = made("reference", None, ndf=8)
    check(ours, plain, state, twin)


def check(ours, plain, state, twin):
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert state.step == twin.step == STEPS
    for mine, theirs in zip(state.tensors(), twin.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
