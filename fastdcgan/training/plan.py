"""What a configuration means on this machine, worked out before anything is trained: the answer of
--dry-run, and the first lines of every run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastdcgan.errors import InputError
from fastdcgan.hardware import amp_dtype
from fastdcgan.training.config import ENDLESS, PRESETS, TrainConfig
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.state import build_nets
from fastdcgan_kernels import fuse, share
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.cpu.build import library

LISTED = 12  # names of classes in the plan; others are counted
MINUTES = 15
GAIN = {"minutes": "0.34 to 0.47", "blue-marble": "0.24"}
"""Of one CPU core: how long the recipes for minutes were measured beside others; and their KID
after five as a share of that of the example's: on Fashion-MNIST, emojis and the map, and on the map
alone (`python -m benchmarks.recipes`)."""


@dataclass(frozen=True)
class Engine:
    """How steps run here, after asking the machine."""

    device: torch.device
    autocast: torch.dtype | None
    compile: bool = False
    impl: str = "auto"
    cuda_graph: str = "off"
    """"auto", "on" or "off", as TrainConfig's; "off" where no graph can be captured."""
    overlap: bool = False
    notes: tuple[str, ...] = ()
    """One line for each wish of the configuration that this machine cannot grant."""

    @property
    def precision(self) -> str:
        """For people: the dtypes in use."""
        if self.autocast is None:
            return "float32"
        name = str(self.autocast).removeprefix("torch.")
        return f"{name} products, float32 statistics, losses and weights"


def choose_engine(config: TrainConfig, ranks: Ranks, device: torch.device) -> Engine:
    """Grants --amp, --compile, --overlap and --cuda-graph where the machine can, and says where it
    cannot.

    Raises:
        InputError: `impl` is "triton", or `cuda_graph` "on", and that cannot be here; or
            FASTDCGAN_IMPL is none of its words.
    """
    notes = []
    try:
        targets.mode()
    except ValueError as error:
        raise InputError(str(error)) from None
    if config.impl == "triton" and targets.target_of(device) is None:
        raise InputError(
            f"--impl triton was given; there are no Triton kernels for {device} here: leave it out"
        )
    autocast = amp_dtype(device) if config.amp else None
    if config.amp and autocast is None:
        notes.append(
            f"--amp: this {device.type} has no native bf16 arithmetic (emulated, it is many times "
            "slower); training in float32"
        )
    compile = config.compile
    if compile and config.sync_bn and ranks.world > 1:
        compile = False
        notes.append("--compile: not together with --sync-bn (its sums cross processes); eager")
    why = _no_graph(config, ranks, device)
    if why and config.cuda_graph == "on":
        raise InputError(f"--cuda-graph on was given; {why}: leave it out")
    if why and config.cuda_graph == "auto" and device.type == "cuda":
        notes.append(f"--cuda-graph: off, because {why}")
    graph = "off" if why else config.cuda_graph
    if compile and graph != "off" and _blocks_are_kernels(config, device):
        # Of 1,215 us of a step on an H200, 14 are by kernels that torch.compile could fuse. It
        # would take a minute before the first step, and the second stream.
        compile = False
        notes.append("--compile: left out; fused blocks in a CUDA graph leave nothing to compile")
    why = _no_overlap(config, device, compile)
    if why and config.overlap == "on":
        notes.append(f"--overlap: off, because {why}")
    wanted = graph != "off" if config.overlap == "auto" else config.overlap == "on"
    overlap = wanted and not why
    return Engine(device, autocast, compile, config.impl, graph, overlap, tuple(notes))


def _no_overlap(config: TrainConfig, device: torch.device, compile: bool) -> str:
    """Why nothing of a step can run beside the rest; "" if it can."""
    if device.type != "cuda":
        return f"it takes a second CUDA stream, and this is {device}"
    if compile:
        return "passes that --compile compiles read the gradients on their way"
    if config.updates == "simultaneous":
        return "with --updates simultaneous two passes add their gradients"
    if not _blocks_are_kernels(config, device):
        return "it is for fused blocks, and these are plain PyTorch"
    return ""


def _blocks_are_kernels(config: TrainConfig, device: torch.device) -> bool:
    with targets.implementation(config.impl):
        return targets.mode() != "reference" and targets.target_of(device) is not None


def _no_graph(config: TrainConfig, ranks: Ranks, device: torch.device) -> str:
    """Why a whole step cannot be captured; "" if it can."""
    if device.type != "cuda":
        return f"CUDA graphs are for CUDA devices, and this is {device}"
    if ranks.world > 1:
        return "a step of several processes waits for its all-reduces, which are not captured"
    if config.keras_epsilon and not _blocks_are_kernels(config, device):
        return "Keras's epsilon is another number in every step of PyTorch's Adam"
    return ""


def total_steps(config: TrainConfig, epoch_images: int, ranks: Ranks) -> tuple[int, int]:
    """(steps of the run, steps of an epoch); the last batch of an epoch may be ragged."""
    per_epoch = -(-epoch_images // (config.batch_size * config.n_critic * ranks.world))
    return config.steps or config.epochs * per_epoch, per_epoch


def memory_bytes(
    config: TrainConfig, autocast: torch.dtype | None, classes: Sequence[str] | None = None
) -> tuple[int, int]:
    """(weights, gradients, Adam's moments and average; activations of one step), in bytes.

    The first is exact. The second is the sum of the outputs of all layers over G's pass and D's
    two, or with a penalty over G's and, in float32, one of D and its gradients, where that is more;
    found by running the nets on the meta device: a good guess of the peak, not a bound.
    """
    with torch.device("meta"):
        netG, netD = build_nets(config, classes)
        sizes = [sum(p.numel() for p in net.parameters()) for net in (netG, netD)]
        copies = 4 * sum(sizes) + (sizes[0] if config.ema else 0)
        seen = 0

        def count(module: nn.Module, inputs: object, output: Tensor) -> None:
            nonlocal seen
            if not list(module.children()) or is_parametrized(module):
                seen += output.numel()

        for net in (netG, netD):
            for module in net.modules():
                module.register_forward_hook(count)
        z = torch.empty(config.batch_size, config.nz, 1, 1)
        labels = () if classes is None else (torch.empty(len(z), dtype=torch.int64),)
        fake = netG(z, *labels)
        of_g = seen
        netD(fake, *labels)
        of_d = seen - of_g
    width = 4 if autocast is None else 2
    activations = (of_g + 2 * of_d) * width
    if config.zero_centred or config.slope_penalty:
        activations = max(activations, of_g * width + 2 * of_d * 4)
    return copies * 4, activations


def _loss(config: TrainConfig) -> str:
    """What is trained with, in words."""
    lazily = "" if config.penalty_every == 1 else f" every {config.penalty_every} steps"
    form = "" if config.penalty_form == "exact" else " by differences"
    noise = f"instance noise {config.instance_noise:g}"
    if config.instance_noise_steps:
        noise += f" over {config.instance_noise_steps} steps"
    parts = {
        config.loss: True,
        f"labels of real images {1 - config.label_smoothing:g}": config.label_smoothing,
        f"R1 {config.r1:g}{form}{lazily}": config.r1,
        f"R2 {config.r2:g}{form}{lazily}": config.r2,
        f"gradient penalty {config.slope_penalty:g}{lazily}": config.slope_penalty,
        "G begins as enlargements": config.init == "resize",
        "G without BatchNorm": config.norm_g == "none",
        "D without BatchNorm": config.norm == "none" and config.net == "dcgan",
        "spectral norm": config.spectral,
        "minibatch deviation": config.minibatch_std,
        f"DiffAugment {','.join(config.augmentations)}": config.augmentations,
        noise: config.instance_noise,
        f"{config.n_critic} updates of D per update of G": config.n_critic > 1,
        f"rates falling to 0 over the last {config.lr_decay:.0%}": config.lr_decay,
    }
    return ", ".join(part for part, on in parts.items() if on)


def _length(config: TrainConfig, epoch_images: int | None, ranks: Ranks) -> str:
    """How long the run is, in words."""
    minutes = config.max_minutes
    by_clock = minutes is not None and config.steps is None and config.epochs >= ENDLESS
    if epoch_images is None:
        steps, an_epoch = f"{config.steps} steps" if config.steps else f"{config.epochs} epochs", ""
    else:
        total, per_epoch = total_steps(config, epoch_images, ranks)
        steps, an_epoch = f"{total} steps", f" ({per_epoch} an epoch)"
    if minutes is None:
        return steps + an_epoch
    if by_clock:
        return f"{minutes:g} minutes" + an_epoch.replace(" an", " steps an")
    return f"{steps}{an_epoch}, at most {minutes:g} minutes"


def _listed(classes: Sequence[str]) -> str:
    shown, more = ", ".join(classes[:LISTED]), len(classes) - LISTED
    return f"{len(classes)}: {shown}" + (f" and {more:,} more" if more > 0 else "")


def _blocks(engine: Engine) -> str:
    """What runs the nets' blocks; "" for plain PyTorch."""
    if engine.impl == "reference":
        return ""
    with targets.implementation(engine.impl):
        mode = targets.mode()
    target, on_cpu = targets.target_of(engine.device), engine.device.type == "cpu"
    if on_cpu and mode == "auto" and target is None and engine.autocast is None and library():
        return "C++ kernels where they are faster, plain PyTorch elsewhere"
    if mode == "reference" or target is None or (mode == "auto" and engine.device.type != "cuda"):
        return ""
    return f"fused Triton kernels for {target.name}"


class _InTurn(nn.Module):
    """G, then D on its images."""

    def __init__(self, netG: nn.Module, netD: nn.Module) -> None:
        super().__init__()
        self.netG, self.netD = netG, netD

    def forward(self, z: Tensor, *labels: Tensor) -> Tensor:
        found: Tensor = self.netD(self.netG(z, *labels), *labels)
        return found


def fused_share(config: TrainConfig, engine: Engine, classes: Sequence[str] | None = None) -> float:
    """The part of the nets' convolutions that fused kernels run on this engine's device, from 0 to
    1: on a GPU by the shapes alone, on a CPU by two images."""
    on_cpu = engine.device.type == "cpu" and targets.target_of(engine.device) is None
    device = torch.device("cpu" if on_cpu else "meta")
    images = 2 if on_cpu else config.batch_size
    mode = targets.implementation(engine.impl if on_cpu else "triton")
    with torch.random.fork_rng([]), mode, device:
        nets = _InTurn(*build_nets(config, classes))
        z = torch.empty(images, config.nz, 1, 1).fill_(1)
        labels = () if classes is None else (torch.zeros(images, dtype=torch.int64),)
        return share(fuse(nets), z, *labels)


def describe(
    config: TrainConfig,
    engine: Engine,
    ranks: Ranks,
    *,
    source: str,
    epoch_images: int | None,
    images: str,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """The plan in lines for people.

    Args:
        source: the data's name.
        epoch_images: images of an epoch; None where only decoding can tell.
        images: how many there are, in words.
        classes: names of the data's, with the configuration's `classes`.
    """
    held, activations = memory_bytes(config, engine.autocast, classes)
    blocks = _blocks(engine)
    if blocks:
        part = fused_share(config, engine, classes)
        blocks += f"; {part:.1%} of the convolutions' multiplications are in fused blocks"
    length = _length(config, epoch_images, ranks)
    of_d = "" if config.net_d == "dcgan" else f" and {config.net_d}'s D"
    where = str(engine.device)
    if engine.device.type == "cuda":
        where += f" ({torch.cuda.get_device_name(engine.device)})"
    if engine.device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    return [
        f"device     {where}" + (f", {ranks.world} processes" if ranks.world > 1 else ""),
        f"precision  {engine.precision}",
        f"compile    {'torch.compile' if engine.compile else 'off (eager)'}"
        + ("" if engine.cuda_graph == "off" else ", whole steps as CUDA graph")
        + (", two streams" if engine.overlap else ""),
        f"blocks     {blocks or 'plain PyTorch'}",
        f"nets       {config.net}{of_d}, "
        f"{config.channels}x{config.image_size}x{config.image_size}, "
        f"nz {config.nz}, ngf {config.ngf}, ndf {config.ndf}",
        f"loss       {_loss(config)}",
        f"data       {source}: {images}",
        *([f"classes    {_listed(classes)}"] if classes else []),
        f"length     {length}, batch {config.batch_size}"
        + (f" x {config.n_critic}" if config.n_critic > 1 else "")
        + (f" x {ranks.world}" if ranks.world > 1 else ""),
        *(
            [f"evaluation every {config.eval_every} steps, features by {config.eval_features}"]
            if config.eval_every
            else []
        ),
        f"memory     {held / 2**20:.0f} MiB weights and optimisers, about "
        f"{activations / 2**20:.0f} MiB activations",
        *engine.notes,
        *_advice(config, engine.device, images),
    ]


def _advice(config: TrainConfig, device: torch.device, images: str) -> list[str]:
    """What is known of a choice before it is tried."""
    found = []
    if config.loss == "relativistic" and config.r1 and not config.r2:
        found.append(
            "--r1: with --loss relativistic it diverges without R2 (R3GAN's paper): add --r2, or "
            "take --preset r3"
        )
    if device.type == "cpu" and _is_the_examples(config) and (config.max_minutes or 0) <= MINUTES:
        minutes = config.max_minutes
        given = f"{images}, {minutes:g} minutes" if minutes else "for minutes of a CPU"
        name = "blue-marble" if config.data == "blue-marble" else "minutes"
        found.append(
            f"advice     {given}: --preset {name}, whose KID on a CPU was {GAIN[name]} of this "
            "recipe's after five (benchmarks/results/recipes)"
        )
    return found


def _is_the_examples(config: TrainConfig) -> bool:
    """Whether the recipe is that of --preset dcgan: the net, its width and how it learns."""
    example, recipe = TrainConfig(), PRESETS["minutes"].keys() - {"epochs", "max_minutes"}
    fields = {"net", "net_d", "loss", "lr", "nz", *recipe}
    return all(getattr(config, name) == getattr(example, name) for name in fields)
