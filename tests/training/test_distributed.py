"""The collectives of training, in two gloo processes against one that sees everything."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from fastdcgan.training import distributed
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.distributed import Ranks, SyncBatchNorm2d, synchronise_batch_norm
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step


def batch():
    return torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def target():
    return torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def norm():
    net = nn.BatchNorm2d(3, momentum=0.2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        net.bias.copy_(torch.tensor([0.1, 0.0, 3.0]))
    return net


def worker(rank, port, folder):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    ranks = distributed.ranks_from_environment()
    assert ranks == Ranks(rank, 2, rank)
    distributed.join(ranks, torch.device("cpu"))
    net = nn.Sequential(norm())
    synchronise_batch_norm(net, torch.device("cpu"))
    assert type(net[0]) is SyncBatchNorm2d
    part = slice(0, 5) if rank == 0 else slice(5, 7)  # unequal shares
    x = batch()[part].requires_grad_()
    y = net(x)
    (y * target()[part]).sum().backward()
    distributed.sum_gradients(net.parameters())
    assert distributed.any_rank(rank == 1)
    assert not distributed.any_rank(False)
    assert distributed.from_first({"rank": rank}) == {"rank": 0}
    distributed.barrier()
    torch.save(
        {"y": y, "dx": x.grad, "state": net[0].state_dict(), "dw": net[0].weight.grad},
        f"{folder}/{rank}.pt",
    )
    distributed.leave()


def test_synchronised_batch_norm_equals_one_process_with_unequal_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    plain = norm()
    x = batch().requires_grad_()
    y = plain(x)
    (y * target()).sum().backward()
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([first["dx"], second["dx"]]), x.grad, rtol=0, atol=1e-12)
    for rank in (first, second):
        torch.testing.assert_close(rank["dw"], plain.weight.grad, rtol=0, atol=1e-12)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(rank["state"][key], value, rtol=0, atol=1e-12)


def step_worker(rank, port, folder):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    distributed.join(distributed.ranks_from_environment(), torch.device("cpu"))
    torch.save(steps_of(rank, 2), f"{folder}/step-{rank}.pt")
    distributed.leave()


def steps_of(rank, world):
    """Two steps of 2 x 4 images, two updates of D each, as one of so many processes."""
    config = TrainConfig(
        image_size=32, channels=3, nz=6, ngf=4, ndf=4, batch_size=4 // world, loss="hinge",
        r1=10.0, spectral_norm=True, n_critic=2, ema=False,
    )  # fmt: skip
    state = TrainState(config, torch.device("cpu"), dtype=torch.float64)
    for module in state.netG.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its batch would be the process's own
            module.train = lambda mode=True: None
    step = Step(state, batch_size=config.batch_size)
    draw = torch.Generator().manual_seed(4)
    for _ in range(2):
        images = torch.rand(8, 3, 32, 32, generator=draw, dtype=torch.float64)
        z = torch.randn(8, 6, 1, 1, generator=draw, dtype=torch.float64)
        # Which images meet in an update of D: halves of each process's rows.
        order = [0, 1, 4, 5, 2, 3, 6, 7] if world == 2 else range(8)
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        images, z = images[list(order)][mine], z[list(order)][mine]
        row = distributed.sum_over_ranks(step(images, z, share=1 / world))
    return {"row": row, "G": state.netG.state_dict(), "D": state.netD.state_dict()}


def test_penalties_and_several_updates_of_d_split_over_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(step_worker, (port, str(tmp_path)), nprocs=2)
    alone = steps_of(0, 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"step-{rank}.pt")
        torch.testing.assert_close(found["row"], alone["row"], rtol=0, atol=1e-9)
        for net in "GD":
            for key, value in alone[net].items():
                torch.testing.assert_close(found[net][key], value, rtol=0, atol=1e-9)


def test_one_process_needs_no_group():
    net = nn.Linear(2, 2)
    net(torch.ones(1, 2)).sum().backward()
    before = net.weight.grad.clone()
    distributed.sum_gradients(net.parameters())
    assert torch.equal(net.weight.grad, before)
    assert distributed.any_rank(True)
    assert distributed.from_first("x") == "x"


def test_broken_environment_is_said(monkeypatch):
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="whole numbers"):
        distributed.ranks_from_environment()
