"""The launches of a step as numbers, on the meta device: which layer and which pass each is of."""

from collections import Counter

import pytest
import torch

from benchmarks import cost_model
from benchmarks.counting import counting
from benchmarks.gpu.launches import seeing, task_facts, task_of
from fastdcgan.training import TrainConfig
from fastdcgan.training.plan import Engine
from fastdcgan.training.state import TrainState
from fastdcgan.training.whole_step import WholeStep

META, BATCH = torch.device("meta"), 128


def seen_of(how):
    """As test_trace.py asks for a step."""
    state = TrainState(TrainConfig(channels=3, batch_size=BATCH, impl="triton"), META)
    state.netG.register_forward_pre_hook(lambda net, given: (given[0].bfloat16(),))
    engine = Engine(META, torch.bfloat16, impl="triton")
    step = WholeStep(state, cost_model._feed(BATCH, 64, META, torch.bfloat16), engine=engine)
    with cost_model._on(cost_model.DEVICES["h100"], how):
        step()
        with seeing(state) as seen, counting():
            step()
    return seen


HOWS = ("hybrid", "materialised", "prologue")


@pytest.fixture(scope="module")
def seen():
    return {how: seen_of(how) for how in HOWS}


def products(seen, images):
    """(layer, pass) of the GEMMs of a batch of so many images."""
    return Counter(
        (one.layer, one.of)
        for one in seen
        if one.kernel.startswith(("gather", "weight_gradient", "image")) and one.images == images
    )


D, G = [f"D{i}" for i in range(1, 6)], [f"G{i}" for i in range(1, 6)]


@pytest.mark.parametrize("how", HOWS)
def test_every_product_has_its_layer_and_pass(seen, how):
    """D on both batches: forward, every weight's gradient, and the gradients of its layers' inputs
    but the first. G's step: G and D forward, D's input gradients down to the image, G's weight
    gradients, and G's input gradients but the first."""
    of_d = products(seen[how], 2 * BATCH)
    assert of_d == Counter(
        [(d, "forward") for d in D] + [(d, "weight gradient") for d in D]
        + [(d, "data gradient") for d in D[1:]]
    )  # fmt: skip
    of_g = products(seen[how], BATCH)
    assert of_g == Counter(
        [(one, "forward") for one in G + D] + [(one, "data gradient") for one in D + G[1:]]
        + [(g, "weight gradient") for g in G]
    )  # fmt: skip


@pytest.mark.parametrize("how", ["hybrid", "materialised"])
def test_every_other_launch_has_its_layer(seen, how):
    """Norms and activations: on the way forward those of the layer before, on the way back those
    of the layer whose products follow."""
    norms = Counter(
        (one.layer, one.kernel) for one in seen[how] if one.of in ("norm", "activation")
    )
    with_norm = [*G[:4], *D[1:4]]
    for layer in with_norm:
        times = 1 if layer in G else 2  # D: in its own step and in G's
        assert norms[layer, "activation_gradient"] == times * (how == "materialised")
        # Forward, unless the last layer activates as it loads; and the norm's gradient.
        passes = 1 if how == "hybrid" and layer in ("G4", "D4") else 2
        assert norms[layer, "apply_prologue"] == passes * times
    assert norms["G5", "apply_prologue"] == 1  # the gradient of the generated images' tanh
    others = {"G5", "D1"} if how == "materialised" else {"G5"}
    assert {layer for (layer, _), times in norms.items() if times} == {*with_norm} | others


def test_the_step_has_the_rest(seen):
    rest = [one.of for one in seen["materialised"] if one.layer == "step"]
    assert rest == ["data", "loss", "update", "loss", "update"]


def test_a_launch_whose_layer_is_unknown_is_not_the_steps():
    """By PyTorch's convolutions no launch of ours reads a weight."""
    for one in seen_of("vendor"):
        assert (one.layer == "step") == (one.of in ("data", "loss", "update"))


def test_each_product_has_the_task_that_its_tile_was_asked_for(seen):
    for one in seen["materialised"]:
        kind = one.kernel.removesuffix("_descriptors").removesuffix("_pointers")
        if one.kernel.startswith("reduce") or kind in ("crop", "adam", "bce_rows"):
            assert one.task is None
        elif kind == "gather":
            assert one.task.op in ("conv", "conv_transposed")
        elif one.of in ("forward", "data gradient", "weight gradient"):
            ops = {"image_down": "image_conv", "image_up": "image_conv_transposed"}
            assert one.task.op == ops.get(kind, kind)
    tasks = [one.task for one in seen["materialised"] if one.task is not None]
    assert len(tasks) == sum(products(seen["materialised"], 2 * BATCH).values()) + sum(
        products(seen["materialised"], BATCH).values()
    )
    assert [task_of(task_facts(task)) for task in tasks] == tasks


def test_no_tensor_is_held(seen):
    """Autograd copies a gradient that somebody holds, and the step would be another one."""
    for one in seen["materialised"]:
        assert not any(isinstance(value, torch.Tensor) for value in vars(one).values())
