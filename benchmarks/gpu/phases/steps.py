"""Images a second of the whole training step, as training runs it: ours by itself at each batch,
then in turn with PyTorch tuned and, at the first, with PyTorch's example and with ours where a
switch is turned."""

import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.gpu.page import EXAMPLE, IN_ONE_STREAM, OURS, TUNED
from benchmarks.gpu.phase import Items, Setting, line_of, raise_if_poisoned
from benchmarks.gpu.step import whole_step
from benchmarks.timing import Measured, Workload
from benchmarks.timing import measure as timed
from fastdcgan.hardware import amp_dtype


def measure(to: Items, setting: Setting) -> None:
    """As the module says."""
    torch.backends.cudnn.benchmark = True  # as the example asks for; the baselines have it, too
    size = setting.size
    alone = [{OURS: partial(ours, setting, batch)} for batch in size.batches]
    main = len(size.main)
    for batch, makers in zip(size.main, alone, strict=False):  # whatever becomes of the others
        _variants(to, setting, batch, "alone", makers)
    for batch in size.main:
        makers: dict[str, Callable[[], Workload]] = {OURS: partial(ours, setting, batch)}
        if batch == size.main[0]:
            makers[IN_ONE_STREAM] = partial(ours, setting, batch, overlap="off")
            makers[EXAMPLE] = partial(peer, setting, peers.example_step, batch)
        tuned = partial(peers.tuned_step, amp=amp_dtype(setting.device))
        makers[TUNED] = partial(peer, setting, tuned, batch)
        _variants(to, setting, batch, "in turn", makers)
    for batch, makers in zip(size.batches[main:], alone[main:], strict=True):
        _variants(to, setting, batch, "alone", makers)


def _variants(
    to: Items, setting: Setting, batch: int, how: str, makers: Mapping[str, Callable[[], Workload]]
) -> None:
    items = {f"{batch} {how}: {name}": make for name, make in makers.items()}
    facts = {
        item: {"batch": batch, "variant": name, "ours": name == OURS, "in_turn": how == "in turn"}
        for item, name in zip(items, makers, strict=True)
    }
    rounds(to, setting, items, facts)


def ours(setting: Setting, batch: int, **options: Any) -> Workload:
    """Our step, which phase `proof` proves. What it says (it went on without its graph, say) is
    among the facts."""
    said: list[str] = []
    whole = whole_step(setting, batch, say=said.append, prove=False, **options)
    return Workload(whole, batch, repeat=setting.size.repeat, facts={"said": said})


def peer(setting: Setting, make: Callable[..., Workload], batch: int) -> Workload:
    """A baseline's."""
    workload = make(setting.device, batch)
    workload.repeat = setting.size.repeat
    return workload


def rounds(
    to: Items,
    setting: Setting,
    makers: Mapping[str, Callable[[], Workload]],
    facts: Mapping[str, dict[str, Any]],
) -> None:
    """Measures items in turn and hands them on, each with its facts; nothing where an earlier call
    measured them all."""
    if not any(map(to.wants, makers)):
        return
    size = setting.size
    measured = timed(makers, setting.device, rounds=size.rounds, warm_up=size.warm_up)
    for item in makers:
        to.put(item, **facts[item], **summary(measured[item]))
    measured.clear()
    gc.collect()
    raise_if_poisoned()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def summary(measured: Measured) -> dict[str, Any]:
    """What is kept of a variant's rounds."""
    if measured.error is not None:
        return {"error": line_of(measured.error)}
    median = statistics.median(measured.seconds)
    assert measured.images is not None
    return {
        "rounds": measured.seconds,
        "median": median,
        "images_per_second": measured.images / median,
        **measured.facts,
    }
