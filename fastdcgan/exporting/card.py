"""The model card: what a README.md on the Hugging Face Hub says about a net, for people and, in its
head, for programs. It names no path of the machine that trained. Not here: the weights."""

import dataclasses
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastdcgan import models
from fastdcgan.errors import InputError
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.journal import read_evaluations

TASK = "unconditional-image-generation"
SCORES = ("fid", "kid", "inception_score", "precision", "recall", "density", "coverage")
NETS = (
    models.Generator,
    models.SNGANDiscriminator,
    models.Discriminator,
    models.TF28Generator,
    models.TF28Discriminator,
)

FILES = {
    "model.safetensors": "the weights, for `from_pretrained`",
    "model.onnx": "ONNX",
    "model.pt": "TorchScript",
    "model.pt2": "`torch.export`",
    "samples.png": "64 samples",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a net beside its weights."""

    license: str = "unknown"
    license_name: str | None = None
    license_link: str | None = None
    recipe: TrainConfig | None = None
    """How it was trained, if it comes out of a run."""
    steps: int | None = None
    scores: dict[str, Any] | None = None
    """A row of the run's evaluations.jsonl."""
    folded: bool = False


def class_of(net: nn.Module) -> type[nn.Module]:
    """Which of the nets of `fastdcgan.models` it is: of several, the first in `NETS`."""
    return next(kind for kind in NETS if isinstance(net, kind))


def is_generator(net: nn.Module) -> bool:
    """Whether it draws images."""
    return isinstance(net, models.Generator | models.TF28Generator)


def sizes_of(net: nn.Module) -> dict[str, Any]:
    """The arguments that built `net`, which keeps them as attributes: its config.json.

    Raises:
        InputError: the net takes labels.
    """
    given = {name: getattr(net, name) for name in inspect.signature(class_of(net)).parameters}
    if given.pop("classes") is not None:
        raise InputError(
            "this net is of a run with --classes; files and cards are made of nets with one input, "
            "and it takes labels, too: export a run without classes"
        )
    return given


def facts_of(run: Path | None, **given: Any) -> Facts:
    """What a run's folder tells; None: nothing. `given` are the other fields of `Facts`.

    The scores are those of the evaluation of the exported step, else the last before it.

    Raises:
        InputError: the run's config.json is damaged.
    """
    recipe = None
    if run is not None and (run / "config.json").is_file():
        recipe = TrainConfig.from_json((run / "config.json").read_text(encoding="utf-8"))
    steps = given.get("steps")
    rows = [] if run is None else read_evaluations(run)
    rows = [row for row in rows if steps is None or row["step"] <= steps]
    return Facts(recipe=recipe, scores=rows[-1] if rows else None, **given)


def card(net: nn.Module, facts: Facts, files: list[str]) -> str:
    """The text of a README.md.

    Args:
        net: one of `fastdcgan.models`.
        facts: what else is known.
        files: the names beside it.

    Raises:
        InputError: huggingface_hub, which knows the head's fields, is not installed.
    """
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        raise InputError(
            "the model card needs huggingface_hub: pip install 'fastdcgan[export]'"
        ) from None
    kind, generator = class_of(net).__name__, is_generator(net)
    data = _data(facts.recipe)
    name = " ".join(["DCGAN", kind.removeprefix("TF28").lower()] + ([f"of {data}"] if data else []))
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=data or "images",
            dataset_name=data or "images",
            metric_type=score,
            metric_value=value,
            metric_args={k: facts.scores[k] for k in ("features", "n") if k in facts.scores},
        )
        for score in SCORES
        if generator and facts.scores and (value := facts.scores.get(score)) is not None
    ]
    head = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="fastdcgan",
        pipeline_tag=TASK if generator else None,
        tags=["dcgan", "gan", "pytorch_model_hub_mixin", "model_hub_mixin"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(_body(net, name, facts, files)) + "\n"


def _body(net: nn.Module, name: str, facts: Facts, files: list[str]) -> list[str]:
    kind, generator = class_of(net).__name__, is_generator(net)
    sizes = sizes_of(net)
    count = sum(p.numel() for p in net.parameters())
    size, channels, nz = net.size, net.channels, getattr(net, "nz", 0)
    trained = "" if facts.steps is None else f", trained for {facts.steps:,} steps"
    lines = [f"# {name}", "", f"`{kind}` of fastdcgan, {count:,} parameters{trained}.", ""]
    if "samples.png" in files:
        lines += ["![64 samples](samples.png)", ""]
    shapes = (
        f"latent vectors `z` ~ N(0, 1), float32, batch x {nz}; out: images in [-1, 1], batch x "
        f"{channels} x {size} x {size}"
        if generator
        else f"images in [-1, 1], float32, batch x {channels} x {size} x {size}; out: the logit "
        "of being real, batch"
    )
    folded = " BatchNorm is folded into the weights before it." if facts.folded else ""
    lines += ["## Use", "", f"In: {shapes}.{folded}", ""]
    if "model.safetensors" in files:
        example = (
            f"torch.randn(1, {nz})" if generator else f"torch.zeros(1, {channels}, {size}, {size})"
        )
        lines += [
            "```python",
            "import torch",
            f"from fastdcgan.exporting.hub import Hub{kind}",
            "",
            f'net = Hub{kind}.from_pretrained("USER/NAME")  # or the path of this folder',
            f"out = net({example})",
            "```",
            "",
        ]
    if "model.onnx" in files:
        shape = f"(1, {nz})" if generator else f"(1, {channels}, {size}, {size})"
        feed = "z" if generator else "images"
        lines += [
            "```python",
            "import numpy as np",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("model.onnx")',
            f'x = np.random.default_rng(0).standard_normal({shape}, dtype="float32")',
            f'(out,) = session.run(None, {{"{feed}": x}})',
            "```",
            "",
        ]
    lines += ["| file | what it is |", "|---|---|"]
    lines += [f"| `{file}` | {FILES[file]} |" for file in files if file in FILES]
    lines += ["", "## Sizes", "", ", ".join(f"{k} {v}" for k, v in sizes.items()), ""]
    if facts.recipe is not None:
        text = json.dumps(_public(facts.recipe), indent=2, default=str)
        lines += ["## Training", "", "```json", text, "```", ""]
    if facts.scores and generator:
        row = {k: v for k, v in facts.scores.items() if k in (*SCORES, "step", "n", "features")}
        lines += ["## Scores", "", "| score | value |", "|---|---|"]
        lines += [
            f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |"
            for k, v in row.items()
        ]
        lines += ["", "FID and KID compare only at the same network and the same n.", ""]
    licence = facts.license_name or facts.license
    lines += ["## Licence", "", f"Of the weights: {licence}. Of fastdcgan: MIT."]
    if facts.license_link:
        lines.append(facts.license_link)
    return lines


def _data(recipe: TrainConfig | None) -> str:
    """The data's name without the folders around it."""
    if recipe is None:
        return ""
    kind, _, rest = recipe.data.partition(":")
    if kind == "torchvision":
        return rest.partition(":")[0]
    return kind if kind == "fashion-mnist" else Path(recipe.data).name


def _public(recipe: TrainConfig) -> dict[str, Any]:
    """The fields that make a run what it computes; the others are of one machine."""
    kept = {
        f.name: getattr(recipe, f.name)
        for f in dataclasses.fields(recipe)
        if not f.metadata["free"]
    }
    return {**kept, "data": _data(recipe)}
