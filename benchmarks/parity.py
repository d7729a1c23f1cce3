"""Whether the fast engine trains as the PyTorch example does: the same images and noise through
both, losses side by side, and how far their parameters are apart. `python -m benchmarks.parity`.

Rounding alone sends two runs of a GAN apart: Adam makes a whole step of a gradient's sign. So next
to the engine runs a twin of the example that differs from it in the memory format only, that is in
rounding: how far it goes is the measure of how far the engine may. Not for: speed.
"""

import argparse
import copy
import sys
from pathlib import Path

COMMAND = "python -m benchmarks.parity"
WINDOW = 20  # steps in a mean of losses


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 where the engine is further off than rounding explains."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Train by the fast engine and by the PyTorch example's loop on the same "
        "batches, and compare losses and parameters.",
        epilog=f"Example: {COMMAND} --steps 200 --out benchmarks/results",
    )
    parser.add_argument("--steps", type=int, default=200, help="steps; default 200")
    parser.add_argument("--batch", type=int, default=16, help="images a step; default 16")
    parser.add_argument("--compile", action="store_true", help="the engine's --compile")
    parser.add_argument("--out", type=Path, help="folder for parity.md and parity.png")
    given = parser.parse_args(arguments)
    if min(given.steps, given.batch) < 1:
        parser.error("--steps and --batch must be at least 1")
    lines, wrong, losses = compare(given.steps, given.batch, given.compile)
    text = "\n".join(lines)
    print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        command = f"{COMMAND} --steps {given.steps} --batch {given.batch}" + (
            " --compile" if given.compile else ""
        )
        head = f"# The engine beside the PyTorch example\n\nBy `{command}`. {machine()}.\n\n"
        (given.out / "parity.md").write_text(
            head + text + "\n\n![losses](parity.png)\n", encoding="utf-8"
        )
        plot(losses, given.out / "parity.png")
    for line in wrong:
        print(f"further off than rounding explains: {line}", file=sys.stderr)
    return 1 if wrong else 0


def machine() -> str:
    """Date, processor and versions, for the page."""
    import datetime
    import platform

    import torch
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    brand = get_cpu_info().get("brand_raw", platform.machine())
    return (
        f"{datetime.date.today()}, {brand}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, float32"
    )


def compare(steps, batch, compile):
    """(lines for people, what is too far off, losses by name)."""
    import torch
    from torch import nn

    from fastdcgan.data import Order, make_feed, prepare
    from fastdcgan.training.config import TrainConfig
    from fastdcgan.training.state import TrainState
    from fastdcgan.training.step import Step

    cpu = torch.device("cpu")
    packed = prepare("blue-marble", size=64, channels=3)
    feed = make_feed(
        packed, order=Order(packed.n, packed.epoch_images, batch, 0), device=cpu, hflip=True
    )
    draws = torch.Generator().manual_seed(1)
    data = []
    for step in range(steps):
        images = feed.batch(step % feed.order.steps_per_epoch, draws)
        data.append((images, torch.randn(len(images), 100, 1, 1, generator=draws)))

    state = TrainState(TrainConfig(channels=3, batch_size=batch, compile=compile), cpu)
    plain = TrainState(TrainConfig(channels=3, batch_size=batch, impl="reference"), cpu)
    start = flat(plain)

    def example(memory_format):
        """The example's loop body on nets with the same weights."""
        netG, netD = (
            copy.deepcopy(net).to(memory_format=memory_format) for net in (plain.netG, plain.netD)
        )
        adam = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in (netD, netG)]
        loss = nn.BCELoss()

        def step(images, z):
            images = images.contiguous(memory_format=memory_format)
            ones = torch.ones(len(images))
            netD.zero_grad()
            real = loss(netD(images).sigmoid(), ones)
            real.backward()
            fake = netG(z)
            fakes = loss(netD(fake.detach()).sigmoid(), 0 * ones)
            fakes.backward()
            adam[0].step()
            netG.zero_grad()
            g = loss(netD(fake).sigmoid(), ones)
            g.backward()
            adam[1].step()
            return float((real + fakes).detach()), float(g.detach())

        return step, lambda: torch.cat(
            [p.detach().double().flatten() for n in (netG, netD) for p in n.parameters()]
        )

    engine = Step(state, batch_size=batch, compile=compile)
    runs = {
        "engine": (lambda x, z: tuple(engine(x, z)[:2].tolist()), lambda: flat(state)),
        "example": example(torch.contiguous_format),
        "twin": example(torch.channels_last),
    }
    losses, parameters = {}, {}
    marks = [mark for mark in (1, 2, 5, 10, 20) if mark <= steps]
    for name, (step, values) in runs.items():
        losses[name] = []
        for index, (images, z) in enumerate(data, 1):
            losses[name].append(step(images, z))
            if index in marks:
                parameters[name, index] = values()

    def off(name, mark):
        expected = parameters["example", mark]
        return float((parameters[name, mark] - expected).norm() / (expected - start).norm())

    curves = {n: torch.tensor(rows) for n, rows in losses.items()}
    others = ("engine", "twin")
    gaps = {n: float((means(curves[n]) - means(curves["example"])).abs().max()) for n in others}
    lines = [
        "How far all parameters are from the example's, as a share of how far these have moved "
        f"(RMS, batch {batch}). The twin is the example in channels_last: only its "
        "rounding is another.",
        "",
        "| after step | " + " | ".join(map(str, marks)) + " |",
        "|---|" + "---|" * len(marks),
        *(f"| {n} | " + " | ".join(f"{off(n, m):.2e}" for m in marks) + " |" for n in others),
        "",
        f"Over {steps} steps, the largest distance of the losses from the example's (means of "
        f"{WINDOW} steps, the larger of D's and G's): engine {gaps['engine']:.3f}, twin "
        f"{gaps['twin']:.3f}.",
        "",
        "| mean of the last 50 steps | loss D | loss G |",
        "|---|---|---|",
        *(
            f"| {n} | {c[-50:, 0].mean():.3f} | {c[-50:, 1].mean():.3f} |"
            for n, c in curves.items()
        ),
    ]
    wrong = []
    for mark in marks:
        if off("engine", mark) > 3 * off("twin", mark) + 0.01:
            wrong.append(f"parameters after step {mark}, {off('engine', mark):.2e}")
    if gaps["engine"] > 3 * gaps["twin"] + 0.05:
        wrong.append(f"losses, {gaps['engine']:.3f}")
    return lines, wrong, losses


def flat(state):
    """All parameters of both nets in float64, one after the other."""
    import torch

    nets = (state.netG, state.netD)
    return torch.cat([p.detach().double().flatten() for n in nets for p in n.parameters()])


def means(curve):
    """Means of WINDOW rows; of all where there are fewer."""
    size = min(WINDOW, len(curve))
    return curve.unfold(0, size, 1).mean(-1)


def plot(losses, path):
    """Both losses of every run over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    styles = {"example": "-", "twin": ":", "engine": "--"}
    for side, (axis, title) in enumerate(zip(axes, ("loss of D", "loss of G"), strict=True)):
        for name, style in styles.items():
            axis.plot([row[side] for row in losses[name]], style, label=name, linewidth=1.1)
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
