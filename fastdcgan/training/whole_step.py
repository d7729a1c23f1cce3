"""One whole training step behind one call: data, noise, both updates, average, readings. On CUDA
the first step proves the kernels: each operator is compared with plain PyTorch on its own
arguments, the nets' gradients with those by plain PyTorch, and an update with Adam's formulas. Then
the step is captured as a CUDA graph, compared with itself run eagerly, and from then on replayed.
The algorithm is in step.py; nothing is added to it here."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdcgan.data.feeds import Feed, cut
from fastdcgan.errors import RunError
from fastdcgan.training import distributed
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.memory import keep_freed_memory
from fastdcgan.training.plan import Engine
from fastdcgan.training.proof import (
    finite,
    furthest,
    mean_error,
    random_states,
    still,
    undone,
    wrong_update,
)
from fastdcgan.training.readings import Readings
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import Step
from fastdcgan_kernels.choice.targets import implementation
from fastdcgan_kernels.compared import ALLOWED, Compared
from fastdcgan_kernels.functional import runs_kernels
from fastdcgan_kernels.placing import placed

WARM_UPS = 3  # PyTorch's recipe: libraries make their workspaces and choices before the capture
ROUNDING = 0.02
"""How far (RMS) a replay's tensors may be from those of the same step run eagerly, as a share of
what the step moves them; three times as far as two eager steps are from each other where that is
more. Adam makes a whole step of a gradient's sign, so a library that adds in another order each
time moves some parameters the other way. Stale data or noise, or a number of the host's that is
frozen, is off by far more."""
GRADIENT_ERROR = {None: 0.1, torch.float16: 0.25, torch.bfloat16: 0.35}
"""How far the nets' gradients by fused blocks may be from those by plain PyTorch (RMS over the
tensors), by the dtype of the products. That is for how the blocks are put together; what each of
them computes is compared by itself (`compared.ALLOWED`). Measured by Triton's interpreter: right
1e-6, 0.09 and 0.17 in nets of 4 feature maps and 2 images (0.05 and 0.11 in 8 and 6); without the
gradient of generated images 0.66, with common statistics of both batches 0.73, with the batches
swapped 1.3. TF32 was not measured."""


class WholeStep:
    """Makes the step number `state.step` of a run at every call.

    Whole batches are replayed where the engine asks for a graph; the ragged last batch of an epoch
    runs eagerly, on the same tensors. Steps with a lazy penalty and those without have a graph
    each: a graph has no branches. Where fused blocks fail or are wrong on this GPU, steps run
    in plain PyTorch; where a graph does, it is tried again without what overlaps in it, and then
    steps run eagerly. Each time a line says so.

    Args:
        state: is changed in place.
        feed: of the run's images, on the state's device.
        engine: how steps run (`plan.choose_engine`).
        ranks: this process among all; None: it is alone.
        prove: whether the first step proves the kernels. Default: where `wants_proof` says so. On
            the CPU kernels are Triton's interpreter's, with FASTDCGAN_IMPL=triton.
        readings: where each step's row is written, inside the graph; None: nowhere.
        say: is called with one line where something did not work as asked.

    Raises:
        RunError: what fails or is wrong was asked for: a graph with "on", kernels with "triton".
    """

    def __init__(
        self,
        state: TrainState,
        feed: Feed,
        *,
        engine: Engine,
        ranks: Ranks | None = None,
        prove: bool | None = None,
        readings: Readings | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.figures: dict[str, Any] = {}
        """What the proofs measured, beside what they allow; ready for JSON, None for no number.
        "blocks": the largest error of an operator's result; "gradients": of the nets'; "update":
        what is not by Adam's formulas; "graph": of a replay. Filled as they are made, also where
        the verdict is wrong."""
        if state.device.type == "cpu":
            keep_freed_memory()
        self.state, self.feed, self.readings = state, feed, readings
        self.ranks = ranks or Ranks()
        self._say, self._wanted = say, engine.cuda_graph
        self._graphs: dict[bool, _StepGraph] = {}
        self._replayed: _StepGraph | None = None  # in the last step
        self._prove, self._proved = prove, False
        self._step = Step(
            state,
            batch_size=state.config.batch_size,
            autocast=engine.autocast,
            compile=engine.compile,
            overlap=engine.overlap,
            say=say,
        )

        self._cut = self._step.compiler(cut)

    @property
    def graphed(self) -> bool:
        """Whether whole batches are replayed."""
        return bool(self._graphs)

    @property
    def impl(self) -> str:
        """How fused blocks run, once the first step has looked: as Step's."""
        return self._step.impl

    def renew(self) -> None:
        """Takes notice of a checkpoint loaded into the state: the optimisers' tensors are others,
        and their rates may be, so the next whole batch is captured again."""
        self._graphs.clear()
        self._replayed = None

    def gradients(self) -> list[list[Tensor]]:
        """netG's and netD's, as the last step left them: summed over processes, unscaled."""
        return _gradients(self.state) if self._replayed is None else self._replayed.gradients

    def __call__(self) -> Tensor:
        """One step; returns step.READINGS, (5,) float32 on the device, times this process's share
        of the batch. The next replay overwrites it."""
        step = self.state.step
        images, rows = self.feed.rows(step)
        labels = self.feed.labels(step)
        given = (images, rows) if labels is None else (images, rows, labels)
        batch = self.feed.order.batch_size(step)
        if not self._proved:
            wanted = wants_proof(self.state.device) if self._prove is None else self._prove
            if wanted:
                self._prove_kernels(given, batch)
            self._proved = True
        if self._wanted == "off" or batch < self.feed.order.batch:
            return self._run(batch, *given)
        kind = self._step.penalty.due(step)
        if kind not in self._graphs:
            graph = self._capture(given, batch)
            if graph is None:
                self._graphs.clear()
                return self._run(batch, *given)
            self._graphs[kind] = graph
        row = self._replay(self._graphs[kind], given)
        self.state.step += 1
        return row

    def _run(self, batch: int, images: Tensor, rows: Tensor, *labels: Tensor) -> Tensor:
        """The step, eagerly. Noise is drawn for the batch of all processes, and each keeps its
        rows: so a run does not depend on how many processes share it."""
        state, ranks = self.state, self.ranks
        self._replayed = None
        whole = batch == self.feed.order.batch
        first, behind = self._step.side_by_side(len(rows))
        with implementation(self._step.impl), placed(first):
            real = self.feed.assemble(
                images, rows, batch, state.generator,
                cut=self._cut if whole and not self._step.eagerly else cut,
            )  # fmt: skip
        z = torch.randn(
            batch, state.config.nz, 1, 1, generator=state.generator, device=state.device
        ).tensor_split(ranks.world)[ranks.rank]
        row = self._step(real, z, *labels, share=len(z) / batch, behind=behind)
        if self.readings is not None:
            self.readings.put(row)
        return row

    def _replay(self, graph: "_StepGraph", given: tuple[Tensor, ...]) -> Tensor:
        self._step.refresh()
        self._replayed = graph
        return graph.replay(*given)

    def _tensors(self) -> list[Tensor]:
        own = [] if self.readings is None else [self.readings.next]
        return [*self.state.tensors(), *own]

    def _prove_kernels(self, given: tuple[Tensor, ...], batch: int) -> None:
        """Leaves the kernels, after saying why, where a step by them is not right."""
        step, why = self._step, ""
        asked = step.impl
        if asked == "reference":
            return
        with undone(self.state, self._tensors()) as undo:
            try:
                step.eagerly = True
                step.impl = "reference"
                plain, scale = self._plain_gradients(given, batch, undo)
                step.impl = asked
                try:
                    if self.state.device.type == "cuda":
                        from fastdcgan_kernels.gpu.launch import compile_ahead

                        compile_ahead(lambda: self._gradients_at(scale, given, batch))
                        undo()
                    why = self._wrong_kernels(given, batch, plain, scale)
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    why = _first_line(error)
            finally:
                step.impl, step.eagerly = asked, False
        if not distributed.any_rank(bool(why)):
            return
        why = why or "another process says so"
        if asked == "triton":
            raise RunError(f"--impl triton was given, and fused blocks do not work here: {why}")
        self._say(f"--impl: fused blocks do not work here ({why}); plain PyTorch")
        step.leave_kernels()

    def _plain_gradients(
        self, given: tuple[Tensor, ...], batch: int, undo: Callable[[], None]
    ) -> tuple[list[Tensor], float]:
        """Those of the step by plain PyTorch, and the scale of its losses: where float16 overflows,
        as it may in the first steps of any run, one at which it does not."""
        scale = max(scaler.get_scale() for scaler in self.state.scalers)
        while True:
            gradients = self._gradients_at(scale, given, batch)
            undo()
            if finite(gradients) or scale <= 1:
                return gradients, scale
            scale /= 16

    def _gradients_at(self, scale: float, given: tuple[Tensor, ...], batch: int) -> list[Tensor]:
        """All gradients of a step in which no weight moves: so those of G are by the same D."""
        for scaler in self.state.scalers:
            if scaler.is_enabled():
                scaler.update(scale)
        with still((self.state.optD, self.state.optG)):
            self._run(batch, *given)
        return [g.clone() for gradients in self.gradients() for g in gradients]

    def _wrong_kernels(
        self, given: tuple[Tensor, ...], batch: int, plain: list[Tensor], scale: float
    ) -> str:
        """What is wrong with the step by kernels; "" if nothing is."""
        figures, dtype, nets = self.figures, self._step.autocast, (self.state.netG, self.state.netD)
        names = {
            p.data_ptr(): f"{net}.{name}"
            for net, module in zip(("netG", "netD"), nets, strict=True)
            for name, p in module.named_parameters()
        }
        compared = Compared(names)
        try:
            with compared:
                fused = self._gradients_at(scale, given, batch)
        finally:
            errors = compared.errors()
            off, where = errors[0] if errors else (0.0, "")
            allowed = ALLOWED[dtype or torch.float32]
            figures["blocks"] = {
                "largest": _number(off), "allowed": allowed, "where": where,
                "compared": len(errors), "unchecked": compared.unchecked,
            }  # fmt: skip
        if not off <= allowed:
            return f"{where} is {off:.2g} away from plain PyTorch's, {allowed:.2g} is rounding"
        off, allowed = mean_error(plain, fused), GRADIENT_ERROR[dtype]
        figures["gradients"] = {"error": _number(off), "allowed": allowed}
        if not finite(plain):  # no number is wrong beside none
            return ""
        if not off <= allowed:
            return f"gradients are {off:.2g} away from plain PyTorch's, {allowed:.2g} is rounding"
        optimisers = (self.state.optD, self.state.optG)
        wrong: list[str] = []
        with implementation(self._step.impl):
            for optimiser, scaler in zip(optimisers, self.state.scalers, strict=True):
                wrong = wrong or wrong_update(optimiser, scaler)
        figures["update"] = {"wrong": wrong}
        return f"an update's {', '.join(wrong)} are not by Adam's formulas" if wrong else ""

    def _capture(self, given: tuple[Tensor, ...], batch: int) -> "_StepGraph | None":
        """The graph of this step, proved; None, after saying why, where it cannot be had."""
        graph, why = self._captured(given, batch)
        if why and self._step.overlap:
            self._step.overlap = False
            self._say(
                f"--cuda-graph: the step does not work as a graph here ({why}); once more without "
                "--overlap"
            )
            graph, why = self._captured(given, batch)
        if not why:
            return graph
        if self._wanted == "on":
            raise RunError(f"--cuda-graph on was given, and the step's graph does not work: {why}")
        self._say(f"--cuda-graph: the whole step does not work as a graph here ({why}); eager")
        self._wanted = "off"
        return None

    def _captured(self, given: tuple[Tensor, ...], batch: int) -> "tuple[_StepGraph | None, str]":
        """The graph, and what is wrong with it; "": nothing."""
        tensors = self._tensors()
        with undone(self.state, tensors) as undo:
            try:
                graph = _StepGraph(self._run, self.feed, given, batch, self.state)
                undo()
                return graph, self._disagreement(graph, given, batch, tensors, undo)
            except (RuntimeError, NotImplementedError) as error:
                return None, _first_line(error)

    def _disagreement(
        self, graph: "_StepGraph", given: tuple[Tensor, ...], batch: int,
        tensors: list[Tensor], undo: Callable[[], None],
    ) -> str:  # fmt: skip
        """How a replay and an eager step from the same state differ; "" where they do not."""

        def clones() -> list[Tensor]:
            return [t.clone() for t in tensors]

        before = clones()
        row = self._replay(graph, given).clone()
        replayed, noise = clones(), random_states(self.state)
        undo()
        expected = self._run(batch, *given)
        if not all(map(torch.equal, noise, random_states(self.state))):
            return "a replay draws other random numbers than a step"
        after = clones()
        undo()
        self._run(batch, *given)
        allowed = max(ROUNDING, 3 * furthest(before, after, tensors))
        off = furthest(before, after, replayed)
        self.figures["graph"] = {"error": _number(off), "allowed": _number(allowed)}
        if not off <= allowed:
            return (
                f"a replay is {off:.2g} of a step from the step run eagerly, {allowed:.2g} is noise"
            )
        if not torch.allclose(row, expected, rtol=0.02, atol=0.02):
            return f"a replay measures {row.tolist()}, the step run eagerly {expected.tolist()}"
        return ""


def wants_proof(device: torch.device) -> bool:
    """Whether fused blocks run on this device by kernels that no test of ours could run."""
    return device.type == "cuda" and runs_kernels(device)


def _gradients(state: TrainState) -> list[list[Tensor]]:
    nets = (state.netG, state.netD)
    return [[p.grad for p in net.parameters() if p.grad is not None] for net in nets]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first_line(error: Exception) -> str:
    lines = (line for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)


class _StepGraph:
    """One step captured, after PyTorch's recipe for whole networks (CUDA semantics, "CUDA graphs"):
    warm-up on a side stream, gradients made anew inside, inputs at fixed addresses. Each time it is
    one step, the next of those with a penalty, or without, like the one that the state is at: so a
    number of the host's that is frozen inside is another than in the step that a replay is compared
    with."""

    def __init__(
        self,
        run: Callable[..., Tensor],
        feed: Feed,
        given: tuple[Tensor, ...],
        batch: int,
        state: TrainState,
    ) -> None:
        images, *numbers = given
        self._images = images if feed.resident else images.clone()
        self._numbers = [each.clone() for each in numbers]
        """Rows and, where there are classes, labels."""
        step = state.step + state.config.penalty_every

        def run_one() -> Tensor:
            state.step = step
            return run(batch, self._images, *self._numbers)

        with torch.cuda.device(state.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run_one()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            if state.generator is not None:
                self._graph.register_generator_state(state.generator)
            # In "global" mode the feed's thread, which pins memory meanwhile, breaks the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._row = run_one()
            self.gradients = _gradients(state)  # steps outside of the graph make others

    def replay(self, images: Tensor, *numbers: Tensor) -> Tensor:
        """The step on these images; waits for nothing."""
        if images is not self._images:
            self._images.copy_(images, non_blocking=True)
        for own, each in zip(self._numbers, numbers, strict=True):
            own.copy_(each, non_blocking=True)
        self._graph.replay()
        return self._row
