"""What a memory format costs a fused model on this machine, in milliseconds and images a second:
the PyTorch example's nets as its users write them (NCHW) and in channels_last, plain and fused, in
one nn.Sequential and as modules of their own, one a block.

    python -m benchmarks.memory_formats [batch]

A fused model returns what its plain twin would: a model in NCHW gives NCHW. Inside it blocks are
channels_last, so the boundary is two conversions a net, or two a block where each block is a module
whose callers may look at what it returns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import peers
from fastdcgan_kernels import fuse

ROUNDS = 9
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Block(nn.Module):
    """Layers in a module of their own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Through the layers."""
        found: Tensor = self.layers(x)
        return found


def nets(modules: bool) -> list[nn.Module]:
    """The example's G and D."""
    made = []
    for blocks in (peers.generator_layers(), peers.discriminator_layers()):
        net = peers.net(blocks)
        made.append(nn.Sequential(*map(Block, blocks)) if modules else net)
    return made


def workloads(
    batch: int, fused: bool, modules: bool, form: torch.memory_format
) -> list[Callable[[], object]]:
    """Sampling a batch, and one step of training on one."""
    torch.manual_seed(0)
    netG, netD = (net.to(memory_format=form) for net in nets(modules))
    if fused:
        fuse(netG)
        fuse(netD)
    adams = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (netG, netD)]
    z = torch.randn(batch, peers.NZ, 1, 1)
    real = (torch.rand(batch, 3, peers.SIZE, peers.SIZE) * 2 - 1).to(memory_format=form)
    ones, zeros = torch.ones(batch), torch.zeros(batch)
    bce = nn.BCEWithLogitsLoss()

    def sample() -> None:
        netG.eval()
        with torch.no_grad():
            netG(z)
        netG.train()

    def step() -> None:
        netD.zero_grad()
        bce(netD(real).view(-1), ones).backward()
        fake = netG(z)
        bce(netD(fake.detach()).view(-1), zeros).backward()
        adams[1].step()
        netG.zero_grad()
        bce(netD(fake).view(-1), ones).backward()
        adams[0].step()

    return [sample, step]


def main() -> None:
    """Prints the table."""
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    rows = [("plain", "NCHW", False), ("plain", "channels_last", False),
            ("fused", "NCHW", False), ("fused", "channels_last", False),
            ("fused", "NCHW", True), ("fused", "channels_last", True)]  # fmt: skip
    works = [workloads(batch, kind == "fused", m, FORMATS[form]) for kind, form, m in rows]
    times: list[list[list[float]]] = [[[], []] for _ in rows]
    for round_ in range(ROUNDS + 1):
        for own, pair in zip(times, works, strict=True):
            for seconds, run in zip(own, pair, strict=True):
                start = time.perf_counter()
                run()
                if round_:
                    seconds.append(time.perf_counter() - start)
    middle = [[statistics.median(seconds) for seconds in own] for own in times]
    print(f"batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"medians of {ROUNDS} rounds in turn\n")  # fmt: skip
    print("| nets | memory format | sampling, ms | images/s | step, ms | images/s |")
    print("|---|---|---|---|---|---|")
    for (kind, form, modules), (sampling, step) in zip(rows, middle, strict=True):
        name = f"{kind}, a module each block" if modules else kind
        cells = (f"{1e3 * t:.1f} | {batch / t:,.0f}" for t in (sampling, step))
        print(f"| {name} | {form} | {' | '.join(cells)} |")
    for at, where in ((2, "one nn.Sequential"), (4, "a module each block")):
        costs = [100 * (a / b - 1) for a, b in zip(middle[at], middle[at + 1], strict=True)]
        print(f"\nNCHW costs a fused model, {where}: {costs[0]:+.1f}% of sampling, "
              f"{costs[1]:+.1f}% of the step.")  # fmt: skip


if __name__ == "__main__":
    main()
