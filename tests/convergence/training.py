"""Trains a net of nets.py plain and fused, and compares the two: loss curves, and outputs in
evaluation. Not here: the nets, and which differences pass (test_convergence.py)."""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan_kernels import findings, fuse, unfuse
from fastdcgan_kernels.modules import block
from fastdcgan_kernels.ops import NAMESPACE

SEEDS = (0, 1, 2)  # of the plain runs; the fused run has the first
STEPS, WINDOW, BATCH = 200, 20, 16
START = 5  # steps in which rounding has not grown yet
CLASSES, SIDE = 4, 32
IMAGES = 256


def blobs(count=IMAGES, side=SIDE, seed=0):
    """(images [count, 3, side, side] in [-1, 1], classes [count]): a soft round blob on a gradient;
    the class is its colour and its size, everything else is drawn."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % CLASSES
    colours = torch.tensor([[1.0, -0.6, -0.6], [-0.6, 1.0, -0.6], [-0.6, -0.6, 1.0], [1, 1, -0.6]])
    x, y, shade = torch.rand(3, count, 1, 1, generator=draw) - 0.5
    across = torch.linspace(-1, 1, side)
    distance = (across - x) ** 2 + (across[:, None] - y) ** 2
    radius = 0.3 + 0.1 * classes[:, None, None]
    blob = torch.sigmoid(8 * (1 - distance / radius**2))[:, None]
    ground = (0.5 * shade * across - 0.5)[:, None]
    return blob * colours[classes][:, :, None, None] + (1 - blob) * ground, classes


class Run:
    """What a training script is given in place of its command line: where and how precisely it
    runs, its data, a list for its losses, and whether its models are fused."""

    def __init__(self, device, dtype, fused):
        self.device, self.dtype, self.fused = torch.device(device), dtype, fused
        self.curves = {}
        self.found = []
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def fuse(self, model):
        """`fuse(model)`, the line that the user adds; in a plain run nothing."""
        if self.fused:
            self.found += findings(fuse(model))

    def batches(self):
        """STEPS times (images, classes), drawn at random."""
        images, classes = (part.to(self.device) for part in blobs())
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,)).to(self.device)
            yield images[chosen], classes[chosen]

    def held_out(self):
        """(images, classes) that no batch has, the same in all runs."""
        return (part.to(self.device) for part in blobs(64, seed=1))

    def autocast(self):
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def backward(self, loss):
        self._scaler.scale(loss).backward()

    def step(self, optimiser):
        self._scaler.step(optimiser)
        self._scaler.update()

    def log(self, **losses):
        for name, loss in losses.items():
            self.curves.setdefault(name, []).append(loss.detach().float())

    def windows(self):
        """{loss: its means over WINDOW steps}; what was logged once, as it is."""
        curves = {name: torch.stack(curve).cpu() for name, curve in self.curves.items()}
        return {name: torch.stack([part.mean() for part in curve.split(WINDOW)])
                for name, curve in curves.items()}  # fmt: skip


class KernelsRun(TorchDispatchMode):
    """Inside, `names` collects the operators of fastdcgan_kernels that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            self.names.append(func.name())
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def counted_blocks():
    """A list that gets an entry for every block that is run as one."""
    calls, whole = [], block.run_block

    def run_block(*given, **options):
        calls.append(whole)
        return whole(*given, **options)

    block.run_block = run_block
    try:
        yield calls
    finally:
        block.run_block = whole


def excess(plain, one):
    """{loss: how far a run leaves the range of the plain runs' windows at most}, as a share of that
    range; of its mean over the windows, because three seeds may meet in one of them. Infinite for
    what is not a number."""
    found = {}
    for name, own in one.items():
        windows = torch.stack([run[name] for run in plain])
        low, high = windows.amin(0), windows.amax(0)
        outside = torch.maximum(low - own, own - high).amax() / (high - low).mean()
        found[name] = max(0.0, outside.item()) if outside.isfinite() else float("inf")
    return found


def relative_error(mine, theirs):
    """Root mean square of the difference, relative to the expected values'; infinite for NaN."""
    mine, theirs = mine.double(), theirs.double()
    error = ((mine - theirs).norm() / theirs.norm()).item()
    return float("inf") if error != error else error


def evaluation_error(models, run):
    """(the largest relative error of an output in evaluation, beside the unfused model with the
    same weights; names of the kernels that ran for it)."""
    errors, kernels = [], KernelsRun()
    for model, inputs in models.values():
        plain = unfuse(copy.deepcopy(model))
        with torch.no_grad(), run.autocast():
            with kernels:
                mine = model(*inputs)
            pairs = zip(_tuple(mine), _tuple(plain(*inputs)), strict=True)
            errors += [relative_error(a, b) for a, b in pairs]
    return max(errors), kernels.names


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


@dataclass
class Comparison:
    """A net trained plain with every seed, and fused with the first."""

    net: str
    dtype: torch.dtype
    plain: list[Run]
    fused: Run
    blocks_run: int
    kernels: list[str]
    evaluation_error: float

    @property
    def excess(self):
        """How far the fused run leaves the plain runs: `excess`."""
        return excess([run.windows() for run in self.plain], self.fused.windows())

    @property
    def start_error(self):
        """{loss: its largest relative error in the first START steps, beside the same seed}."""
        pairs = {name: (curve[:START], self.plain[0].curves[name][:START])
                 for name, curve in self.fused.curves.items() if len(curve) == STEPS}  # fmt: skip
        return {name: max(map(relative_error, *pair)) for name, pair in pairs.items()}

    @property
    def blocks(self):
        """(blocks that `fuse` found, convolutions of the models)."""
        found = self.fused.found
        return sum(one.fused for one in found), len(found)


def trained(net, device, dtype, seed, fused=False):
    """(the run, its models with inputs for evaluation)."""
    torch.manual_seed(seed)
    run = Run(device, dtype, fused)
    return run, net(run)


def compare(net, device, dtype):
    """Trains a script of nets.py 4 times."""
    plain = [trained(net, device, dtype, seed)[0] for seed in SEEDS]
    with counted_blocks() as calls:
        fused, models = trained(net, device, dtype, SEEDS[0], fused=True)
    error, kernels = evaluation_error(models, fused)
    return Comparison(net.__name__, dtype, plain, fused, len(calls), kernels, error)


HEAD = """\
| net | dtype | loss | plain, by seed | fused | leaves the plain runs by | blocks of convolutions |
|---|---|---|---|---|---|---|"""


def rows(comparison):
    """Lines of a Markdown table with HEAD: losses are those of the last window."""
    fused, excess = comparison.fused.windows(), comparison.excess
    plain = [run.windows() for run in comparison.plain]
    dtype = str(comparison.dtype).removeprefix("torch.")
    blocks = "{} of {}".format(*comparison.blocks)
    for name in fused:
        seeds = ", ".join(f"{run[name][-1]:.4g}" for run in plain)
        yield (
            f"| {comparison.net} | {dtype} | {name} | {seeds} | {fused[name][-1]:.4g} "
            f"| {excess[name]:.2f} | {blocks} |"
        )
