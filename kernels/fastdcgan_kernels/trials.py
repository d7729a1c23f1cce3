"""The tuner's experiments: a block, a pair of them or a kernel on random data, what is right, and
how long it takes. Not here: which candidate wins, and where that is kept (tuner.py).

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
from torch.nn.grad import conv2d_weight

from fastdcgan_kernels import blocks, convolution, functional, image, plan, reference
from fastdcgan_kernels.convolution import Epilogue, Operand, Result
from fastdcgan_kernels.functional import Deferred
from fastdcgan_kernels.geometry import Tile

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
        self.truth = plain(torch.float64)
        self.allowed = []
        for own, truth in zip(plain(dtype), self.truth, strict=True):
            rms, most = _errors(own, truth)
            self.allowed.append((max(2 * rms, FLOOR[dtype]), max(2 * most, PEAK * FLOOR[dtype])))

    def wrong(self, raw: Any) -> str:
        """Why a run's result is not right; "" if it is."""
        found = self.outputs(raw)
        for place, (ours, truth, allowed) in enumerate(
            zip(found, self.truth, self.allowed, strict=True)
        ):
            errors = _errors(ours, truth)
            for error, most, kind in zip(errors, allowed, ("RMS", "largest"), strict=True):
                if not error <= most:
                    return f"wrong, {kind} error {error:.2g} of result {place}, {most:.2g} allowed"
        return ""

    def outputs(self, raw: Any) -> list[Tensor]:
        """The tensors to compare: as they are."""
        found: list[Tensor] = raw
        return found


def _outcome(
    forward: Callable[..., Tensor], given: Sequence[Tensor | None], gradient: Tensor,
    dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """The result and all gradients; in float64 everything is."""
    leaves = [
        None if t is None
        else (t.double() if dtype == torch.float64 else t).detach().requires_grad_()
        for t in given
    ]  # fmt: skip
    with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
        out = forward(*leaves)
        wanted = [t for t in leaves if t is not None]
        return [out, *torch.autograd.grad(out, wanted, gradient.to(out.dtype))]


class BlockTrial(_Trial):
    """A block forward and backward; its input is the raw output of a block with a norm, where the
    layer is one that has such an input in a DCGAN."""

    def __init__(self, block: plan.Block, device: torch.device) -> None:
        self.block, g = block, block.geometry
        self.up = block.kind == "up"
        draw = _Draw(device, block.dtype)
        ci, co = (g.CS, g.CL) if self.up else (g.CL, g.CS)
        deferred = ci > 4 and not (self.up and g.stride == 1)
        taps = (1 if g.stride == 1 else 4) if self.up else 16
        scale = (taps * ci * (19 if deferred else 1)) ** -0.5  # results near 1; 19: mean of x**2
        self.activation = ACTIVATION if block.norm or not self.up else "tanh"
        self.x = draw.image(g.N, ci, *((g.P, g.Q) if self.up else (g.H, g.W)))
        self.coef = draw.coef(block.groups, ci) if deferred else None
        self.weight = draw.normal(g.CS, g.CL, 4, 4, scale=scale)
        self.gamma = 1 + draw.normal(co, scale=0.1) if block.norm else None
        tanh = self.activation == "tanh"  # has no kink, and no gradient far from 0
        self.shift = draw.normal(co, scale=0.1) if tanh else draw.shift(co)
        self.gradient = draw.image(g.N, co, *((g.H, g.W) if self.up else (g.P, g.Q)))
        self._expect(block.dtype, lambda dtype: self._run(self._plain, dtype))

    def _run(self, forward: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        given = (self.x, self.coef, self.weight, self.gamma, self.shift)
        return _outcome(forward, given, self.gradient, dtype)

    def _plain(
        self, x: Tensor, coef: Tensor | None, weight: Tensor, gamma: Tensor | None, shift: Tensor
    ) -> Tensor:
        """In plain PyTorch, statistics of each group on its own."""
        if coef is not None:
            x = reference.activate(x, coef, ACTIVATION, SLOPE)
        weight, options = weight.to(x.dtype), self._options()
        if not self.block.norm:
            plain = reference.conv_transpose_act if self.up else reference.conv_act
            return plain(x, weight, shift.to(x.dtype), **options)
        op = reference.conv_transpose_bn_act if self.up else reference.conv_bn_act
        options |= {"training": True, "momentum": 0.0, "eps": EPS}
        parts = x.chunk(self.block.groups)
        return torch.cat([op(part, weight, None, gamma, shift, None, None, **options)
                          for part in parts])  # fmt: skip

    def _fused(
        self, how: plan.How, x: Tensor, coef: Tensor | None, weight: Tensor, gamma: Tensor | None,
        shift: Tensor,
    ) -> Tensor:  # fmt: skip
        """By the public functions, which run kernels here."""
        given: functional.Input = x
        if coef is not None:
            given = Deferred(x, coef, ACTIVATION, SLOPE)
            given = given if how == "prologue" else functional.materialise(given)
        options = self._options()
        if not self.block.norm:
            plain = functional.conv_transpose_act if self.up else functional.conv_act
            return plain(given, weight, shift, **options)
        op = functional.conv_transpose_bn_act if self.up else functional.conv_bn_act
        options |= {"training": True, "momentum": 0.0, "eps": EPS}
        options["stat_groups"] = self.block.groups
        out: Tensor = op(given, weight, None, gamma, shift, None, None, **options)
        return out

    def _options(self) -> dict[str, Any]:
        g = self.block.geometry
        return {
            "stride": g.stride, "padding": g.pad, "activation": self.activation, "slope": SLOPE,
        }  # fmt: skip

    def prepare(self, how: plan.How) -> Callable[[], list[Tensor]]:
        """What to run for this candidate."""
        if how == "reference":
            return lambda: self._run(self._plain, None)

        def run() -> list[Tensor]:
            with plan.override(how):
                return self._run(lambda *given: self._fused(how, *given), None)

        return run


class PairTrial(_Trial):
    """Two layers of a discriminator forward and backward, as in a step of its own: nobody asks for
    the picture's gradient."""

    def __init__(self, pair: plan.Pair, device: torch.device) -> None:
        self.pair, self.blocks = pair, (pair.first, pair.second)
        (g, h), draw = (b.geometry for b in self.blocks), _Draw(device, pair.first.dtype)
        self.x = draw.image(g.N, g.CL, g.H, g.W)
        self.weights = [draw.normal(k.CS, k.CL, 4, 4, scale=(16 * k.CL) ** -0.5) for k in (g, h)]
        channels = g.CS if pair.first.norm else h.CS
        self.gamma, self.shift = 1 + draw.normal(channels, scale=0.1), draw.shift(channels)
        if not pair.first.norm:  # no shift: the picture's mean and the filters' takes its place
            self.x = self.x / 2 + 1
            self.weights[0] += (draw.shift(g.CS) / (8 * g.CL))[:, None, None, None]
        self.gradient = draw.image(h.N, h.CS, h.P, h.Q)
        self._expect(pair.first.dtype, lambda dtype: self._run(self._plain, dtype))

    def _run(self, layer: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        """The result, and the gradients of weights, gamma, shift, and of a first norm's input."""
        picture = self.x.double() if dtype == torch.float64 else self.x

        def forward(first: Tensor, second: Tensor, *rest: Tensor) -> Tensor:
            gamma, shift, x = (*rest, picture)[:3]
            h = layer(self.pair.first, x, first, gamma, shift)
            out: Tensor = functional.materialise(layer(self.pair.second, h, second, gamma, shift))
            return out

        given = [*self.weights, self.gamma, self.shift]
        given += [self.x] if self.pair.first.norm else []
        return _outcome(forward, given, self.gradient, dtype)

    def _plain(
        self, block: plan.Block, x: Tensor, weight: Tensor, gamma: Tensor, shift: Tensor
    ) -> Tensor:
        """A layer in plain PyTorch, statistics of each group on its own."""
        weight, options = weight.to(x.dtype), self._options(block)
        if not block.norm:
            return reference.conv_act(x, weight, None, **options)
        given = weight, None, gamma, shift, None, None
        parts = x.chunk(block.groups)
        return torch.cat([reference.conv_bn_act(part, *given, **options) for part in parts])

    def _fused(
        self, block: plan.Block, x: functional.Input, weight: Tensor, gamma: Tensor, shift: Tensor
    ) -> functional.Input:
        """A layer by the public functions, in the way that fused nets call them (fusion.py)."""
        options = self._options(block) | {"defer": True}
        if isinstance(x, Deferred) and not functional.defers(
            x, weight, block.geometry.stride, block.geometry.pad, False, block.norm, block.groups
        ):
            x = functional.materialise(x)
        if not block.norm:
            plain: functional.Input = functional.conv_act(x, weight, None, **options)
            return plain
        options["stat_groups"] = block.groups
        out: functional.Input = functional.conv_bn_act(
            x, weight, None, gamma, shift, None, None, **options
        )
        return out

    def _options(self, block: plan.Block) -> dict[str, Any]:
        g = block.geometry
        kink = block.norm or g.CL <= 4
        options: dict[str, Any] = {"stride": g.stride, "padding": g.pad, "slope": SLOPE}
        options["activation"] = ACTIVATION if kink else "none"
        return options | ({"training": True, "momentum": 0.0, "eps": EPS} if block.norm else {})

    def prepare(self, hows: tuple[plan.How, plan.How]) -> Callable[[], list[Tensor]]:
        """What to run for this candidate."""

        def run() -> list[Tensor]:
            with plan.override(dict(zip(self.blocks, hows, strict=True))):
                return self._run(self._fused)

        return run


class TileTrial(_Trial):
    """One kernel with its prologue and epilogue; and the sum of its parts, where it is split."""

    def __init__(self, task: plan.Task, device: torch.device) -> None:
        self.task, g = task, task.geometry
        self.sums, self.up = task.op.endswith("weight_gradient"), task.op.endswith("up")
        draw = _Draw(device, task.dtype)
        small, large = (g.N, g.CS, g.P, g.Q), (g.N, g.CL, g.H, g.W)
        first, second = (small, large) if self.sums or self.up else (large, small)
        both = task.prologue != "none"
        prologue = "normgrad" if self.sums and both else task.prologue
        self.source = self._operand(draw, first, prologue)
        if self.sums:
            self.other = self._operand(draw, second, "activate" if both else "none")
        else:
            weight = draw.normal(g.CS, g.CL, 4, 4, scale=0.1)
            self.weight = weight.to(task.dtype, memory_format=torch.channels_last)
            self.epilogue = Epilogue(task.epilogue, slope=SLOPE)
            if task.epilogue == "gradient":
                aux, coef = draw.image(*second), draw.coef(task.groups, second[1])
                self.epilogue = Epilogue("gradient", None, aux, coef, ACTIVATION, SLOPE)
        self._expect(task.dtype, self._plain)

    def _operand(self, draw: _Draw, shape: Sequence[int], prologue: str) -> Operand:
        aux = draw.image(*shape) if prologue in ("normgrad", "actgrad") else None
        coef = None
        if prologue in ("activate", "normgrad"):
            coef = draw.coef(self.task.groups, shape[1])
        return Operand(draw.image(*shape), prologue, aux, coef, ACTIVATION, SLOPE)

    def prepare(self, tile: Tile) -> Callable[[], Result | Tensor]:
        """What to run for this candidate."""
        task, of_image = self.task, self.task.op.startswith("image_")
        precision = blocks._precision(self.source.value)
        if self.sums:
            sums = image.image_weight_gradient if of_image else convolution.weight_gradient
            return lambda: sums(
                self.source, self.other, task.geometry, tile=tile, dtype=torch.float32,
                groups=task.groups, precision=precision,
            )  # fmt: skip
        options: dict[str, Any] = {
            "tile": tile, "epilogue": self.epilogue, "groups": task.groups, "precision": precision,
        }  # fmt: skip
        if of_image:
            run = image.image_up if self.up else image.image_down
            return lambda: run(self.source, self.weight, task.geometry, **options)
        return lambda: convolution.gather(
            self.source, self.weight, task.geometry, up=self.up, **options
        )

    def _plain(self, dtype: torch.dtype) -> list[Tensor]:
        """In plain PyTorch; operands in this dtype, the epilogue in float32 or more."""
        g, wide = self.task.geometry, torch.promote_types(dtype, torch.float32)
        x = _transformed(self.source, wide).to(dtype)
        if self.sums:
            large = _transformed(self.other, wide).to(dtype)
            return [conv2d_weight(large, (g.CS, g.CL, 4, 4), x, g.stride, g.pad)]
        convolve = torch.conv_transpose2d if self.up else torch.conv2d
        y = convolve(x, self.weight.to(dtype), None, g.stride, g.pad).to(wide)
        if self.task.epilogue == "store":
            return [y]
        if self.task.epilogue == "statistics":
            return [y, reference.statistics(y, self.task.groups)[:2]]
        aux, coef = self.epilogue.aux, self.epilogue.coef
        assert aux is not None
        assert coef is not None
        z = reference.activate(aux.to(wide), coef.to(wide), "none", 0.0)
        mean, scale = (_planes(row, aux, wide) for row in coef[:2])
        dz = y * torch.where(z > 0, 1.0, SLOPE)
        sums = torch.stack([dz, dz * (aux.to(wide) - mean)])
        return [scale * dz, sums.unflatten(1, (self.task.groups, -1)).sum((2, 4, 5))]

    def outputs(self, raw: Result | Tensor) -> list[Tensor]:
        """Partials summed over the tiles; those of statistics as mean and variance."""
        if isinstance(raw, Tensor):
            return [raw]
        if raw.partials is None:
            return [raw.value]
        if raw.counts is None:
            return [raw.value, raw.partials.double().sum(2)]
        (mean, m2), count = raw.partials.double(), raw.counts.double()[..., None]
        whole = (count * mean).sum(1) / count.sum(1)
        m2 = m2 + count * (mean - whole[:, None]).square()
        return [raw.value, torch.stack([whole, m2.sum(1) / count.sum(1)])]


def trial_of(asked: plan.Block | plan.Task | plan.Pair, device: torch.device) -> _Trial:
    """The experiment for a question."""
    if isinstance(asked, plan.Pair):
        return PairTrial(asked, device)
    if isinstance(asked, plan.Block):
        return BlockTrial(asked, device)
    return TileTrial(asked, device)


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
        say(f"timed without a CUDA graph, launches included: {_line(error)}")
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


def _line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _errors(ours: Tensor, truth: Tensor) -> tuple[float, float]:
    """RMS and largest difference, relative to the RMS of the truth."""
    ours, truth = ours.detach().double(), truth.detach()
    apart, size = ours - truth, truth.square().mean().sqrt() + 1e-30
    return float(apart.square().mean().sqrt() / size), float(apart.abs().max() / size)


def _planes(row: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[groups, C] as [N, C, 1, 1]: each image has its group's."""
    each = row.to(dtype).repeat_interleave(like.shape[0] // row.shape[0], 0)
    return each[:, :, None, None]


def _transformed(operand: Operand, dtype: torch.dtype) -> Tensor:
    """The operand with its prologue applied (jit/tile.py: transform)."""
    value = operand.value.to(dtype)
    coef = None if operand.coef is None else operand.coef.to(dtype)
    if operand.prologue == "activate" and coef is not None:
        return reference.activate(value, coef, ACTIVATION, SLOPE)
    if operand.aux is None:
        return value
    aux = operand.aux.to(dtype)
    if coef is not None:
        return value + reference.activate(aux, coef, "none", 0.0)
    return value * torch.where(aux > 0, 1.0, SLOPE)
