"""SyncBatchNorm through the kernels (in the interpreter): two gloo processes with batches of
different sizes, against one that sees both, in float64."""

import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastdcgan_kernels as fk
from fastdcgan_kernels.choice import choose
from tests.kernels.exact import SLOPE, Draw, close

SHARES = (3, 5)  # images of each process, in each of the batches
CI, CO, SIDE = 6, 5, 4
# (up, batches with statistics of their own, how)
CASES = {
    "down": (False, 1, "materialised"),
    "up": (True, 1, "prologue"),
    "two batches": (False, 2, "hybrid"),
    "vendor": (True, 1, "vendor"),
}
NAMES = ("weight", "bias", "gamma", "beta")


def drawn(up, groups):
    """x, parameters by name, and the gradient of the output: of all processes, float32."""
    draw, n = Draw(torch.float32), groups * sum(SHARES)
    x = draw.normal(n, CI, SIDE, SIDE, offset=1.0)
    weight = draw.normal(*((CI, CO) if up else (CO, CI)), 4, 4, spread=0.2)
    side = SIDE * 2 if up else SIDE // 2
    g = draw.normal(n, CO, side, side)
    return x, dict(zip(NAMES, (weight, *(draw.normal(CO) for _ in range(3))), strict=True)), g


def share(batch, rank, groups):
    """This process's images, batch by batch."""
    return torch.cat([part.split(SHARES)[rank] for part in batch.chunk(groups)])


def whole(parts, groups):
    """All images, from the processes' shares."""
    chunks = [part.chunk(groups) for part in parts]
    return torch.cat([chunk[group] for group in range(groups) for chunk in chunks])


def by_function(up, groups, rank):
    """What a process finds: output, gradients and buffers."""
    x, parameters, g = drawn(up, groups)
    x = share(x, rank, groups).requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    buffers = torch.zeros(CO), torch.ones(CO)
    op = fk.conv_transpose_bn_act if up else fk.conv_bn_act
    out = op(
        x, *leaves.values(), *buffers, stride=2, padding=1, training=True, momentum=0.3, eps=1e-4,
        activation="leaky_relu", slope=SLOPE, stat_groups=groups,
        sync=dist.group.WORLD.group_name,
    )  # fmt: skip
    out.backward(share(g, rank, groups))
    return {
        "out": out.detach(), "dx": x.grad, "buffers": buffers,
        **{name: leaf.grad for name, leaf in leaves.items()},
    }  # fmt: skip


def block(up, parameters, norm):
    """conv, norm and LeakyReLU of these parameters."""
    conv = (nn.ConvTranspose2d if up else nn.Conv2d)(CI, CO, 4, 2, 1)
    with torch.no_grad():
        for name, parameter in zip(
            NAMES, (conv.weight, conv.bias, norm.weight, norm.bias), strict=True
        ):
            parameter.copy_(parameters[name])
    return conv, norm, nn.LeakyReLU(SLOPE)


def by_module(up, groups, rank):
    x, parameters, g = drawn(up, groups)
    x = share(x, rank, groups).requires_grad_()
    conv, norm, activation = block(up, parameters, nn.SyncBatchNorm(CO, 1e-4, 0.3))
    out = fk.ConvBlock(conv, norm, activation)(x)
    out.backward(share(g, rank, groups))
    return {
        "out": out.detach(), "dx": x.grad, "buffers": (norm.running_mean, norm.running_var),
        "weight": conv.weight.grad, "bias": conv.bias.grad,
        "gamma": norm.weight.grad, "beta": norm.bias.grad,
    }  # fmt: skip


BY = {"function": by_function, "module": by_module}
RUNS = [
    (case, run)
    for case, run in product(CASES, BY)
    if (case, run) != ("two batches", "module")  # modules see one batch at a time
]


def worker(rank, folder):
    os.environ["FASTDCGAN_IMPL"] = "triton"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES)
    )
    found = {}
    for case, run in RUNS:
        up, groups, how = CASES[case]
        with choose.override(how):
            found[case, run] = BY[run](up, groups, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found in each run."""
    folder = tmp_path_factory.mktemp("sync")
    mp.spawn(worker, (str(folder),), nprocs=len(SHARES))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SHARES))]


@pytest.mark.parametrize(("case", "run"), RUNS)
def test_two_processes_are_one(found, case, run):
    up, groups, _ = CASES[case]
    first, second = (results[case, run] for results in found)
    x, parameters, g = drawn(up, groups)
    norm = nn.BatchNorm2d(CO, 1e-4, 0.3)
    conv, norm, activation = (module.double() for module in block(up, parameters, norm))
    x = x.double().requires_grad_()
    out = torch.cat([activation(norm(conv(part))) for part in x.chunk(groups)])
    out.backward(g.double())

    close(whole([first["out"], second["out"]], groups), out.detach())
    close(whole([first["dx"], second["dx"]], groups), x.grad)
    for name, exact in (("weight", conv.weight), ("gamma", norm.weight), ("beta", norm.bias)):
        close(first[name] + second[name], exact.grad)
    # The norm takes out what the bias adds: the sum of dy is 0 but for roundings.
    assert conv.bias.grad.abs().max() < 1e-12
    assert (first["bias"] + second["bias"]).abs().max() < 1e-4
    for mine, other, exact in zip(
        first["buffers"], second["buffers"], (norm.running_mean, norm.running_var), strict=True
    ):
        assert torch.equal(mine, other)
        close(mine, exact)
