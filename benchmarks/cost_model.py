"""What one whole training step costs, counted from what it really launches, and the time that this
predicts on a GPU: `python -m benchmarks.cost_model`. Nothing is measured here, and no GPU is used;
`--measured FOLDER` puts beside it what `python -m benchmarks.gpu` measured.

The steps are ours in each of the implementations that a plan can choose, and the PyTorch example's
loop in float32 and under AMP. How launches and operations are counted is in counting.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import page
from fastdcgan.errors import InputError
from fastdcgan_kernels.choice.devices import DEVICES, REPLAYED, Device

if TYPE_CHECKING:
    import torch

    from benchmarks.counting import Work
    from fastdcgan_kernels.choice.types import Question, Target

COMMAND = "python -m benchmarks.cost_model"
DTYPES = ("bf16", "fp16", "fp32")
MEGA, GIGA = 1e6, 1e9

# Seconds that eager PyTorch takes on the host to dispatch an operation, while the device works on
# earlier ones. ASSUMED, not measured.
DISPATCHED = 5e-6


def device_of(run: page.Summary, base: Device | None = None) -> Device:
    """The card of a run, with the peaks that the run measured; `base`, by default a known card of
    its architecture, has those that it did not."""
    machine = page.items(run, "machine")
    card = machine.get("card", {})
    target = "sm_" + "".join(map(str, card.get("capability", [])))
    known = [device for device in DEVICES.values() if device.target == target]
    base = base or (known or [DEVICES["h100"]])[0]
    found = {
        "flops16": machine.get("product", {}).get("flops_per_second"),
        "bytes": machine.get("copy", {}).get("bytes_per_second"),
        "l2": machine.get("l2", {}).get("bytes_per_second"),
    }
    peaks = {name: value for name, value in found.items() if value}
    how = [
        f"{words}: {'measured' if name in peaks else base.source}"
        for name, words in (("flops16", "16 bit"), ("flops32", "TF32"), ("bytes", "memory"))
    ]
    return replace(
        base,
        **{
            "l2": 0.0,
            "name": page.card_of(run),
            "multiprocessors": card.get("multiprocessors", base.multiprocessors),
            "source": "; ".join(how),
            "l2_source": "measured" if "l2" in peaks else base.l2_source,
            **peaks,
        },
    )


OURS = {
    "default": "ours, the plan's own choices",
    "hybrid": "ours, hybrid",
    "prologue": "ours, prologue",
    "materialised": "ours, materialised",
    "vendor": "ours, vendor convolutions",
    "reference": "ours, reference",
}
EAGER = {"eager-amp": "PyTorch example, eager, AMP", "eager": "PyTorch example, eager, fp32"}


@dataclass(frozen=True)
class Cost:
    """One step, added up. `replayed`: as one CUDA graph; else launched one by one."""

    name: str
    work: list[Work]
    batch: int
    replayed: bool

    @property
    def launches(self) -> int:
        """Kernel launches of a step."""
        return sum(w.launches for w in self.work)

    @property
    def bytes(self) -> int:
        """Bytes read and written in a step."""
        return sum(w.bytes for w in self.work)

    @property
    def l2(self) -> int:
        """Bytes through the L2 in a step."""
        return sum(w.l2 for w in self.work)

    @property
    def flops(self) -> int:
        """FLOPs of a step as the kernels make them, padding included."""
        return sum(w.flops for w in self.work)

    @property
    def useful(self) -> int:
        """FLOPs of a step's convolutions themselves."""
        return sum(w.useful for w in self.work)

    def roofline(self, device: Device, dtype: str) -> float:
        """Seconds: for each launch the longer of its products and its bytes at the peaks, added."""
        return sum(floor for floor, _ in self._seconds(device, dtype))

    def through_l2(self, device: Device, dtype: str) -> float:
        """Seconds: the same with the L2, `seconds_of`."""
        return sum(predicted for _, predicted in self._seconds(device, dtype))

    def predicted(self, device: Device, dtype: str) -> float:
        """Seconds: those with the L2 and, replayed, REPLAYED for each launch; eagerly, what the
        host takes for all of them where that is longer."""
        device_time = self.through_l2(device, dtype)
        if self.replayed:
            return device_time + self.launches * REPLAYED
        return max(device_time, self.launches * DISPATCHED)

    def _seconds(self, device: Device, dtype: str) -> list[tuple[float, float]]:
        return [seconds_on(device, w, dtype) for w in self.work]


def seconds_of(
    work: Work, *, flops: float, bytes: float, l2: float, multiprocessors: int = 0
) -> tuple[float, float]:
    """(floor, predicted): seconds on a device with these peaks a second. Floor: the longer of FLOPs
    and bytes of memory. Predicted: the longest of these and of the bytes through the L2, where a
    launch of fewer programs than there are multiprocessors has only its share of FLOPs and L2.

    Args:
        multiprocessors: 0 if programs are not to be counted.
    """
    share = min(1.0, work.programs / multiprocessors) if work.programs and multiprocessors else 1.0
    floor = max(work.flops / flops, work.bytes / bytes)
    return floor, max(floor, work.flops / flops / share, work.l2 / l2 / share)


def seconds_on(device: Device, work: Work, dtype: str) -> tuple[float, float]:
    """`seconds_of` one of the devices."""
    return seconds_of(
        work,
        flops=device.flops32 if dtype == "fp32" else device.flops16,
        bytes=device.bytes,
        l2=device.l2,
        multiprocessors=device.multiprocessors,
    )


# --- The steps ------------------------------------------------------------------------------------


def torch_dtype(dtype: str) -> torch.dtype:
    """bf16, fp16 or fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]


def our_step(
    how: str,
    device: Device,
    batch: int,
    size: int,
    dtype: str,
    *,
    classes: Sequence[str] = (),
    target: Target | None = None,
) -> list[Work]:
    """A whole step of ours: data, noise, both updates, average; with the plan's own choices where
    `how` is "default"; by class where there are some. `target`: what kernels are made for; None:
    the device's."""
    from contextlib import ExitStack

    import torch

    from benchmarks.counting import counting
    from fastdcgan.training import TrainConfig
    from fastdcgan.training.plan import Engine
    from fastdcgan.training.readings import Readings
    from fastdcgan.training.state import TrainState
    from fastdcgan.training.whole_step import WholeStep

    meta, compute = torch.device("meta"), torch_dtype(dtype)
    options = {"channels": 3, "batch_size": batch, "image_size": size, "classes": bool(classes)}
    state = TrainState(TrainConfig(**options, impl="triton"), meta, classes=classes or None)
    # The meta device has no autocast: what that does to the input of a fused net is done by hand.
    state.netG.register_forward_pre_hook(lambda net, given: (given[0].to(compute), *given[1:]))
    autocast = None if dtype == "fp32" else compute
    step = WholeStep(
        state,
        _feed(batch, size, meta, compute, len(classes)),
        engine=Engine(meta, autocast, compile=False, impl="triton", cuda_graph="off", notes=()),
        readings=Readings(8, meta),
    )
    with ExitStack() as stack:
        stack.enter_context(_on(device, how, target))
        step()  # what is made once is there
        work = stack.enter_context(counting())
        step()
    return work


@contextmanager
def _on(device: Device, how: str, target: Target | None = None) -> Iterator[None]:
    """Inside, tensors on the meta device are taken to be on this one, and blocks run like that."""
    from contextlib import nullcontext

    from fastdcgan_kernels.choice import choose, targets

    if target is None:
        target = replace(targets.TARGETS[device.target], multiprocessors=device.multiprocessors)
    choice: Any = nullcontext() if how == "default" else choose.override(how)  # type: ignore[arg-type]
    with targets.assume(target), choice:
        yield


def _adam_state(optimiser: torch.optim.Adam) -> None:
    """That of a step that is not the first; Adam counts on the host unless it is fused."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    for group in optimiser.param_groups:
        for p in group["params"]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            with unset_fake_temporarily():
                optimiser.state[p] = {"step": torch.ones(()), **moments}


def _feed(batch: int, size: int, device: torch.device, dtype: torch.dtype, classes: int = 0) -> Any:
    """Images as the built-in data's: random crops of larger windows, flipped."""
    import numpy as np

    from fastdcgan.data import Order, Packed, make_feed
    from fastdcgan.data.sources.blue_marble import MARGIN

    n, window = 8 * batch, size + 2 * MARGIN
    packed = Packed(
        path=Path(), images=np.empty((n, window, window, 3), np.uint8), source="", location="",
        name="", split="train", size=size, window=window, channels=3, rule="", n=n, epoch_images=n,
        hflip=True, fingerprint="", sha256="", skipped=0,
    )  # fmt: skip
    order = Order(n, n, batch, 0)
    labels = np.arange(n) % classes if classes else None
    return make_feed(
        packed, order=order, device=device, hflip=True, dtype=dtype, resident=True, labels=labels
    )


def eager_step(amp: bool, batch: int, size: int) -> list[Work]:
    """The PyTorch example's loop as a GPU's user runs it: eager, NCHW, Adam by lists of tensors
    (PyTorch's default on a GPU); under AMP in bf16, with the loss on logits, which autocast asks
    for.

    It runs on fake tensors on the CPU, whose autocast has these operations in the same lists.
    """
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.counting import counting
    from fastdcgan.models import Discriminator, Generator

    with FakeTensorMode(allow_non_fake_inputs=True):
        netG, netD = Generator(size), Discriminator(size)
        adam: Callable[..., Any] = torch.optim.Adam
        optD, optG = (
            adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=True)
            for net in (netD, netG)
        )
        _adam_state(optD)
        _adam_state(optG)
        loader = torch.empty(batch, 3, size, size)
        criterion = nn.BCEWithLogitsLoss() if amp else nn.BCELoss()

        def autocast() -> Any:
            return torch.autocast("cpu", torch.bfloat16, enabled=amp)

        def loss_and_output(images: torch.Tensor, label: torch.Tensor) -> Any:
            with autocast():
                out = netD(images)
                if not amp:
                    out = out.sigmoid()
            return criterion(out.float(), label), out

        def step() -> None:
            netD.zero_grad()
            images = loader.clone()  # to the device
            label = torch.full((batch,), 1.0)
            loss_real, output = loss_and_output(images, label)
            loss_real.backward()
            output.mean().item()
            noise = torch.randn(batch, 100, 1, 1)
            with autocast():
                fake = netG(noise)
            label.fill_(0.0)
            loss_fake, output = loss_and_output(fake.detach(), label)
            loss_fake.backward()
            output.mean().item()
            (loss_real + loss_fake).item()
            optD.step()
            netG.zero_grad()
            label.fill_(1.0)
            loss, output = loss_and_output(fake, label)
            loss.backward()
            output.mean().item()
            optG.step()
            loss.item()

        with counting() as work:
            step()
    return work


def cost(name: str, *, device: Device, batch: int, size: int, dtype: str) -> Cost:
    """The cost of one of `OURS` or `EAGER`."""
    if name in OURS:
        return Cost(OURS[name], our_step(name, device, batch, size, dtype), batch, True)
    return Cost(EAGER[name], eager_step(name == "eager-amp", batch, size), batch, False)


def measured(run: page.Summary, batch: int) -> dict[str, float]:
    """Seconds of a step of this batch, as a run measured them, by the names of `OURS` and `EAGER`;
    only of those that it has."""
    found = {
        facts["way"]: facts["median"]
        for facts in page.items(run, "ways").values()
        if facts.get("batch") == batch and facts.get("median") and facts.get("way") in OURS
    }
    if batch in page.rates(run):
        found["default"] = batch / page.rates(run)[batch]
    example = page.steps(run, in_turn=True).get(batch, {}).get(page.EXAMPLE)
    return found | ({"eager": example["median"]} if example else {})


def tiles(asked: Iterable[Question], device: Device) -> list[dict[str, Any]]:
    """The default tile of each product among these questions, and what the model by which it was
    chosen predicts with this device's peaks; `best`: the tile that it would choose by them, where
    that is another. (A default is chosen by the peaks that the package knows.)"""
    from fastdcgan_kernels.choice import heuristics, model, targets
    from fastdcgan_kernels.choice.types import Task
    from fastdcgan_kernels.tuner.tuning import name_of, words_of

    known = replace(targets.TARGETS[device.target], multiprocessors=device.multiprocessors)
    own, found = replace(known, peaks=device), []
    for task in asked:
        if not isinstance(task, Task):
            continue
        tile, best = (heuristics.default_tile(task, target) for target in (known, own))
        seconds, fastest = (model.predicted_seconds(task, each, own) for each in (tile, best))
        row = {
            "product": name_of(task), "tile": words_of(tile),
            "programs": model.work_of(task).programs(tile), "predicted_seconds": seconds,
        }  # fmt: skip
        other = {} if best == tile else {"best": words_of(best), "best_seconds": fastest}
        found.append(row | other)
    return found


# --- The report -----------------------------------------------------------------------------------


def summary(
    one: Cost, device: Device, dtype: str, measured_seconds: float | None = None
) -> dict[str, Any]:
    """The figures of a row, and the launches by kernel."""
    kernels: dict[str, dict[str, float]] = {}
    for w in one.work:
        figures = ("launches", "bytes", "l2_bytes", "flops", "predicted_seconds")
        kernel = kernels.setdefault(w.name, dict.fromkeys(figures, 0))
        values = (w.launches, w.bytes, w.l2, w.flops, seconds_on(device, w, dtype)[1])
        for figure, value in zip(figures, values, strict=True):
            kernel[figure] += value
    seconds = one.predicted(device, dtype)
    return {
        "step": one.name,
        "launches": one.launches,
        "bytes": one.bytes,
        "l2_bytes": one.l2,
        "flops": one.flops,
        "useful_flops": one.useful,
        "roofline_seconds": one.roofline(device, dtype),
        "l2_seconds": one.through_l2(device, dtype),
        "predicted_seconds": seconds,
        "predicted_images_per_second": one.batch / seconds,
        "measured_seconds": measured_seconds,
        "kernels": kernels,
    }


def document(
    rows: list[dict[str, Any]], products: list[dict[str, Any]], device: Device,
    given: argparse.Namespace,
) -> str:  # fmt: skip
    """The report in Markdown."""
    beside = given.measured is not None
    eager = next((row for row in rows if row["step"] == EAGER["eager-amp"]), None)
    lines = [
        f"# What a training step costs: batch {given.batch}, {given.image_size} pixels, "
        f"{given.dtype}",
        "",
        "Counted from the launches that the engine makes and the operations that eager PyTorch "
        f"dispatches, on tensors without data. {_claim(given)}",
        "",
        f"Made by `{given.command}`.",
        "",
        f"Predicted for {device.name}: {device.flops16 / 1e12:g} TFLOP/s in 16 bit, "
        f"{device.flops32 / 1e12:g} in TF32, {device.bytes / 1e12:g} TB/s ({device.source}); "
        f"{device.l2 / 1e12:.3g} TB/s from the L2 ({device.l2_source}).",
        "",
        "| step | launches | GB moved | of eager AMP | GB through the L2 | MFLOP an image: made "
        "| useful | roofline, predicted ms | with the L2, predicted ms | step, predicted ms "
        "| images/s, predicted |" + " step, measured ms | images/s, measured |" * beside,
        "|" + "---|" * (13 if beside else 11),
    ]
    for row in rows:
        share = f"1/{eager['bytes'] / row['bytes']:.2f}" if eager else "-"
        cells = (
            row["step"], row["launches"], f"{row['bytes'] / GIGA:.3f}", share,
            f"{row['l2_bytes'] / GIGA:.1f}",
            f"{row['flops'] / given.batch / MEGA:.1f}",
            f"{row['useful_flops'] / given.batch / MEGA:.1f}",
            f"{row['roofline_seconds'] * 1e3:.3f}", f"{row['l2_seconds'] * 1e3:.3f}",
            f"{row['predicted_seconds'] * 1e3:.3f}",
            f"{row['predicted_images_per_second']:,.0f}",
        )  # fmt: skip
        if beside:
            seconds = row["measured_seconds"]
            own = (f"{seconds * 1e3:.3f}", f"{given.batch / seconds:,.0f}") if seconds else "--"
            cells = (*cells, *own)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "- A step is everything between two batches: indexing, cropping, flipping, noise, both "
        "updates with Adam, the moving average, the readings. Eager PyTorch is the loop of its "
        "example, whose images come from the host.",
        "- Bytes moved: what each launch reads and writes, every tensor once; nothing is taken to "
        "stay in a cache from one launch to the next. What libraries move inside an operation "
        "(cuDNN's changes of layout) is not counted.",
        "- Bytes through the L2: the same, but operands of products as often as tiles load them. "
        "A tile of 128 x 128 makes 64 FLOPs of each byte in 16 bit, one of 64 x 64 makes 32. "
        "Tiles of a library's convolutions are not known: 128 x 128 is assumed.",
        "- FLOPs: of convolutions alone. Made: with the padding of tiles; useful: without.",
        "- Roofline: for each launch the longer of FLOPs and bytes moved at the device's peaks, "
        "added up. No kernel runs at its roofline: these are bounds to tune towards.",
        "- With the L2: the longest of FLOPs, bytes moved and bytes through the L2, likewise; a "
        "launch of ours with fewer programs than the device has multiprocessors has only their "
        "share of FLOPs and L2. Instructions that are no products (a prologue's, an epilogue's) "
        "are not counted.",
        f"- Step: with the L2, and {REPLAYED * 1e6:g} us a launch for ours, which is replayed as "
        f"one CUDA graph; for eager PyTorch at least {DISPATCHED * 1e6:g} us a launch on the host. "
        "Both are assumed.",
        "- Of the losses nothing is compiled here: launches are those of the engine without "
        "`--compile`.",
    ]
    for row in rows:
        lines += ["", f"## {row['step']}", "",
                  "| kernel or operation | launches | MB moved | MB through the L2 "
                  "| with the L2, predicted us |", "|---|---|---|---|---|"]  # fmt: skip
        by_time = sorted(row["kernels"].items(), key=lambda item: -item[1]["predicted_seconds"])
        lines += [
            f"| {n} | {k['launches']} | {k['bytes'] / MEGA:.1f} | {k['l2_bytes'] / MEGA:.1f} "
            f"| {k['predicted_seconds'] * 1e6:.1f} |"
            for n, k in by_time
        ]
    lines += [
        "", f"## Tiles of the products: {OURS['default']}", "",
        "By the model that chooses them (`fastdcgan_kernels/choice/model.py`), by the peaks above. "
        "Best: what it would choose by them, where that by the peaks that the package knows is "
        "another.",
        "", "| product | tile | programs | predicted us | best | predicted us |", "|" + "---|" * 6,
    ]  # fmt: skip
    for one in products:
        best, seconds = one.get("best", "-"), one.get("best_seconds")
        cells = (
            one["product"], one["tile"], one["programs"], f"{one['predicted_seconds'] * 1e6:.1f}",
            best, "-" if seconds is None else f"{seconds * 1e6:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _claim(given: argparse.Namespace) -> str:
    if given.measured is None:
        return "**Nothing here was measured on a GPU: every time is a prediction.**"
    return (
        "**Every time is a prediction but those called measured**, which are of "
        f"`{given.measured}` ({given.run.get('when', 'date unknown')})."
    )


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> page.Summary:
    """The run that --measured names."""
    if (given.image_size, given.dtype) != (64, "bf16"):
        parser.error("--measured goes with --image-size 64 and --dtype bf16, which were measured")
    try:
        run = page.load(given.measured)
    except InputError as error:
        parser.error(f"--measured {given.measured} was given: {error}")
    if run["rehearsal"]:
        parser.error(f"--measured {given.measured} is a rehearsal: no GPU was measured")
    return run


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Count launches, bytes and FLOPs of one whole training step, ours and eager "
        "PyTorch's, and predict its time on a GPU. Needs no GPU; measures nothing.",
        epilog=f"Example: {COMMAND} --batch 256 --device a100 --json",
    )
    parser.add_argument("--batch", type=int, default=128, help="images; default 128")
    parser.add_argument("--image-size", type=int, default=64, help="32, 64, 128 or 256; default 64")
    parser.add_argument(
        "--device", help=f"default h100, or the measured card; {', '.join(DEVICES)}"
    )  # fmt: skip
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of ours; default bf16")
    parser.add_argument(
        "--l2", type=float, metavar="BYTES",
        help="a second from the L2; default: assumed, by the multiprocessors and their clock",
    )  # fmt: skip
    parser.add_argument(
        "--measured", metavar="FOLDER", type=Path,
        help="of python -m benchmarks.gpu: predict with its peaks, for its card, beside its times",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="objects, not Markdown")
    parser.add_argument("--markdown", metavar="FILE", help="write it there, not to the screen")
    given = parser.parse_args(arguments)
    if given.device not in (None, *DEVICES):
        parser.error(f"--device {given.device} was given; give one of {', '.join(DEVICES)}")
    if given.image_size not in (32, 64, 128, 256):
        parser.error(f"--image-size {given.image_size} was given; give 32, 64, 128 or 256")
    if given.batch < 2:
        parser.error(f"--batch {given.batch} was given; BatchNorm wants 2 images or more")
    if given.l2 is not None and not 0 < given.l2 < math.inf:
        parser.error(f"--l2 {given.l2:g} was given; give bytes a second, as 5.5e12")
    given.command = " ".join([COMMAND, *(sys.argv[1:] if arguments is None else arguments)])
    device = DEVICES[given.device or "h100"]
    times: dict[str, float] = {}
    if given.measured is not None:
        given.run = _run(given, parser)
        device = device_of(given.run, DEVICES.get(given.device))
        times = measured(given.run, given.batch)
    if given.l2 is not None:
        device = replace(device, l2=given.l2, l2_source="as given")
    from fastdcgan_kernels.choice import choose

    rows, products = [], []
    for name in (*OURS, *EAGER):
        with choose.recording() as asked:
            one = cost(name, device=device, batch=given.batch, size=given.image_size,
                       dtype=given.dtype)  # fmt: skip
        dtype = "fp32" if name == "eager" else given.dtype
        rows.append(summary(one, device, dtype, times.get(name)))
        if name == "default":
            products = tiles(asked, device)
    text = document(rows, products, device, given)
    if given.json:
        about = {"device": device.name, "prediction": True, "batch": given.batch}
        text = json.dumps({**about, "steps": rows, "tiles": products}, indent=1)
    if not given.markdown:
        print(text)
        return 0
    from fastdcgan.data.picture import atomic_write

    try:
        atomic_write(given.markdown, lambda file: file.write(text.encode()))
    except OSError as error:
        parser.error(f"--markdown {given.markdown} cannot be written: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
