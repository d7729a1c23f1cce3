"""The tuner's experiments: a block or a kernel on random data, what is right, and
how long it takes. Not here: which candidate wins, and where that is kept (tuning.py).

Right is what plain PyTorch computes in float64. A candidate may be twice as far from it as plain
PyTorch is in the candidate's own dtype, or FLOOR, whichever is more. An activation with a kink is
fed values about 6 standard deviations from it, some channels above and some below: no rounding then
decides a sign, and no sign decides the comparison.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional, reference
from ..choice.choose import override
from ..choice.geometry import Tile
from ..choice.types import Block, How, Question, Task
from ..convolution import convolve, gradients
from ..functional import Deferred
from ..gpu import blocks
from ..gpu.tile import Epilogue, Operand, Result

# Relative to the result's RMS: a few roundings of the storage dtype; in float32 more, because
# statistics of few values amplify them. A missing tap, mask or term is far above all of these.
FLOOR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
PEAK = 10  # how much of it the largest error may be
ACTIVATION, SLOPE, EPS = "leaky_relu", 0.2, 1e-5


class _Draw:
    """Random tensors on a device; images are channels_last, in the storage dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator, device=self.device)

    def image(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.dtype, memory_format=torch.channels_last)

    def shift(self, channels: int) -> Tensor:
        """+6 and -6 by turns."""
        return 6.0 - 12.0 * (torch.arange(channels, device=self.device) % 2)

    def coef(self, groups: int, channels: int) -> Tensor:
        """Mean near 0, scale near 1, shift far from 0: [3, groups, channels]."""
        mean, scale = self.normal(2, groups, channels, scale=0.1)
        return torch.stack([mean, 1 + scale, self.shift(channels).expand(groups, -1)])


class _Trial:
    """Data of one experiment, and what comes out where it is right."""

    truth: list[Tensor]
    allowed: list[tuple[float, float]]

    def _expect(self, dtype: torch.dtype, plain: Callable[[torch.dtype], list[Tensor]]) -> None:
        self.truth, self.allowed = plain(torch.float64), []
        for own, truth in zip(plain(dtype), self.truth, strict=True):
            rms, most = _errors(own, truth)
            self.allowed.append((max(2 * rms, FLOOR[dtype]), max(2 * most, PEAK * FLOOR[dtype])))

    def wrong(self, raw: Any) -> str:
        """Why a run's result is not right; "" if it is."""
        every = zip(self.outputs(raw), self.truth, self.allowed, strict=True)
        for place, (ours, truth, allowed) in enumerate(every):
            errors = _errors(ours, truth)
            for error, most, kind in zip(errors, allowed, ("RMS", "largest"), strict=True):
                if not error <= most:
                    return f"wrong, {kind} error {error:.2g} of result {place}, {most:.2g} allowed"
        return ""

    def outputs(self, raw: Any) -> list[Tensor]:
        """The tensors to compare: as they are."""
        found: list[Tensor] = raw
        return found


def _errors(ours: Tensor, truth: Tensor) -> tuple[float, float]:
    """RMS and largest difference, relative to the RMS of the truth."""
    ours, truth = ours.detach().double(), truth.detach()
    apart, size = ours - truth, truth.square().mean().sqrt() + 1e-30
    return float(apart.square().mean().sqrt() / size), float(apart.abs().max() / size)


def _differentiate(
    forward: Callable[..., Tensor], given: Sequence[Tensor | None], gradient: Tensor,
    dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """The result and all gradients; in float64 everything is."""
    given = [t.double() if t is not None and dtype == torch.float64 else t for t in given]
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
        out = forward(*leaves)
        wanted = [t for t in leaves if t is not None]
        return [out, *torch.autograd.grad(out, wanted, gradient.to(out.dtype))]


def _call(room: Any, block: Block, x: Any, *parameters: Any, **options: Any) -> Any:
    """A layer by the public function of a room, functional or reference. parameters: weight, gamma,
    shift (where there is no norm, the bias) and the activation's name."""
    g, (weight, gamma, shift, activation) = block.geometry, parameters
    name = f"conv{'_transpose' * block.transposed}{'_bn' * block.norm}_act"
    options |= {"stride": g.stride, "padding": g.sides(block.transposed)}
    options |= {"activation": activation, "slope": SLOPE}
    if not block.norm:
        return getattr(room, name)(x, weight, shift, **options)
    options |= {"training": True, "momentum": 0.0, "eps": EPS}
    return getattr(room, name)(x, weight, None, gamma, shift, None, None, **options)


def _plain(block: Block, x: Tensor, *parameters: Any) -> Tensor:
    """A layer in plain PyTorch, statistics of each group on its own."""
    weight, gamma, shift, activation = parameters
    if shift is not None and not block.norm:
        shift = shift.to(x.dtype)
    given = weight.to(x.dtype), gamma, shift, activation
    return torch.cat([_call(reference, block, part, *given) for part in x.chunk(block.groups)])


class BlockTrial(_Trial):
    """A block forward and backward; its input is the raw output of a block with a norm, where the
    layer is one that has such an input in a DCGAN."""

    def __init__(self, block: Block, device: torch.device) -> None:
        self.block, g, transposed = block, block.geometry, block.transposed
        draw = _Draw(device, block.dtype)
        ci, co = (g.CS, g.CL) if transposed else (g.CL, g.CS)
        deferred = ci > 4 and not (transposed and g.stride == 1)
        taps = g.shape(transposed).SIDE ** 2
        scale = (taps * ci * (19 if deferred else 1)) ** -0.5  # results near 1; 19: mean of x**2
        self.activation = "tanh" if transposed and not block.norm else ACTIVATION
        x = draw.image(g.N, ci, *((g.P, g.Q) if transposed else (g.H, g.W)))
        coef = draw.coef(block.groups, ci) if deferred else None
        weight = draw.normal(g.CS, g.CL, g.kernel, g.kernel, scale=scale)
        gamma = 1 + draw.normal(co, scale=0.1) if block.norm else None
        tanh = self.activation == "tanh"  # has no kink, and no gradient far from 0
        shift = draw.normal(co, scale=0.1) if tanh else draw.shift(co)
        self.given = x, coef, weight, gamma, shift
        self.gradient = draw.image(g.N, co, *((g.H, g.W) if transposed else (g.P, g.Q)))
        self._expect(block.dtype, lambda dtype: self.outcome(self.plain, dtype))

    def outcome(
        self, forward: Callable[..., Tensor], dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """The result, and the gradients of input, its coefficients, weight, gamma and shift."""
        return _differentiate(forward, self.given, self.gradient, dtype)

    def plain(self, x: Tensor, coef: Tensor | None, *parameters: Any) -> Tensor:
        """In plain PyTorch."""
        if coef is not None:
            x = reference.activate(x, coef, ACTIVATION, SLOPE)
        return _plain(self.block, x, *parameters, self.activation)

    def fused(self, how: How, x: Tensor, coef: Tensor | None, *parameters: Any) -> Tensor:
        """By the public functions, which run kernels here."""
        given: functional.Input = x if coef is None else Deferred(x, coef, ACTIVATION, SLOPE)
        given = given if how in ("hybrid", "prologue") else functional.materialise(given)
        more = {"stat_groups": self.block.groups} if self.block.norm else {}
        out: Tensor = _call(functional, self.block, given, *parameters, self.activation, **more)
        return out

    def prepare(self, how: How) -> Callable[[], list[Tensor]]:
        """What to run for this candidate."""
        if how == "reference":
            return lambda: self.outcome(self.plain)

        def run() -> list[Tensor]:
            with override(how):
                return self.outcome(lambda *given: self.fused(how, *given))

        return run


class TileTrial(_Trial):
    """One kernel with its prologue and epilogue; and the sum of its parts, where it is split."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, g, draw = task, task.geometry, _Draw(device, task.dtype)
        self.sums, self.transposed = task.op.endswith("gradient"), task.op.endswith("transposed")
        small, large = (g.N, g.CS, g.P, g.Q), (g.N, g.CL, g.H, g.W)
        first, second = (small, large) if self.sums or self.transposed else (large, small)
        both = task.prologue != "none"
        prologue = "normgrad" if self.sums and both else task.prologue
        self.source = self._operand(draw, first, prologue)
        if self.sums:
            self.other = self._operand(draw, second, "activate" if both else "none")
        else:
            weight = draw.normal(g.CS, g.CL, g.kernel, g.kernel, scale=0.1)
            self.weight = weight.to(task.dtype, memory_format=torch.channels_last)
            self.epilogue = Epilogue(task.epilogue, slope=SLOPE)
            if task.epilogue in ("gradient", "actgrad"):
                aux, coef = draw.image(*second), draw.coef(task.groups, second[1])
                self.epilogue = Epilogue(task.epilogue, None, aux, coef, ACTIVATION, SLOPE)
        self._expect(task.dtype, self._plain)

    def _operand(self, draw: _Draw, shape: Sequence[int], prologue: str) -> Operand:
        aux = draw.image(*shape) if prologue in ("normgrad", "actgrad") else None
        normed = prologue in ("activate", "normgrad")
        coef = draw.coef(self.task.groups, shape[1]) if normed else None
        return Operand(draw.image(*shape), prologue, aux, coef, ACTIVATION, SLOPE)

    def prepare(self, tile: Tile) -> Callable[[], Result | Tensor]:
        """What to run for this candidate."""
        g = self.task.geometry
        given: dict[str, Any] = {"groups": self.task.groups, "tile": tile}
        if self.sums:
            given |= {"transposed": True, "dtype": torch.float32}  # the small side is the input
            return lambda: blocks.weight_gradient(self.source, self.other, g, **given)
        given |= {"transposed": self.transposed, "epilogue": self.epilogue}
        return lambda: blocks.convolve(self.source, self.weight, g, **given)

    def _plain(self, dtype: torch.dtype) -> list[Tensor]:
        """In plain PyTorch; operands in this dtype, the epilogue in float32 or more."""
        g, wide = self.task.geometry, torch.promote_types(dtype, torch.float32)
        x = _transformed(self.source, wide).to(dtype)
        if self.sums:
            large = _transformed(self.other, wide).to(dtype)
            like = large.new_empty(g.CS, g.CL, g.kernel, g.kernel)
            _, gw = gradients(x, large, like, g.stride, g.sides(False), False, need_x=False)
            assert gw is not None
            return [gw]
        sides = g.sides(self.transposed)
        y = convolve(x, self.weight.to(dtype), None, g.stride, sides, self.transposed).to(wide)
        if self.task.epilogue == "store":
            return [y]
        if self.task.epilogue == "statistics":
            return [y, reference.statistics(y, self.task.groups)[:2]]
        given: Any = (self.epilogue.aux, self.epilogue.coef)
        aux, coef = (t.to(wide).detach().requires_grad_() for t in given)
        if self.task.epilogue == "actgrad":
            return [reference.act_backward(y, aux.detach(), ACTIVATION, SLOPE)]
        with torch.enable_grad():
            out = reference.activate(aux, coef, ACTIVATION, SLOPE)
        aux, coef = torch.autograd.grad(out, (aux, coef), y)
        return [aux, coef[[2, 1]]]  # sum dz is the gradient of shift, the other that of scale

    def outputs(self, raw: Result | Tensor) -> list[Tensor]:
        """Partials summed over the programs; those of statistics as mean and variance."""
        if isinstance(raw, Tensor):
            return [raw]
        if raw.partials is None:
            return [raw.value]
        if raw.counts is None:
            return [raw.value, raw.partials.double().sum(2)]
        (mean, m2), count = raw.partials.double(), raw.counts.double()[0, ..., None]
        whole = (count * mean).sum(1) / count.sum(1)
        m2 = m2 + count * (mean - whole[:, None]).square()
        return [raw.value, torch.stack([whole, m2.sum(1) / count.sum(1)])]


def _transformed(operand: Operand, dtype: torch.dtype) -> Tensor:
    """The operand with its prologue applied (gpu/tile.py: transform)."""
    given: Any = (operand.value, operand.aux, operand.coef)
    tensors: Any = (t if t is None else t.to(dtype) for t in given)
    value, aux, coef = tensors
    changed: dict[str, Callable[[], Tensor]] = {
        "none": lambda: value,
        "activate": lambda: reference.activate(value, coef, ACTIVATION, SLOPE),
        "normgrad": lambda: value + reference.activate(aux, coef, "none", 0.0),
        "actgrad": lambda: reference.act_backward(value, aux, ACTIVATION, SLOPE),
    }
    return changed[operand.prologue]()


def trial_of(asked: Question, device: torch.device) -> _Trial:
    """The experiment for a question."""
    return BlockTrial(asked, device) if isinstance(asked, Block) else TileTrial(asked, device)


def device_time(run: Callable[[], Any], say: Callable[[str], None], repeats: int = 20) -> float:
    """Median seconds of a run on the current GPU, replayed as a CUDA graph: without the time that
    Python takes to launch it. Recipe: PyTorch's "CUDA semantics", section CUDA Graphs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    replay: Callable[[], Any] = run
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        replay = graph.replay
    except RuntimeError as error:
        lines = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        say(f"timed without a CUDA graph, launches included: {': '.join(lines)}")
        torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: list[float] = []
    for _ in range(repeats):
        start.record()
        for _ in range(5):
            replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 5e3)
    return statistics.median(seconds)
