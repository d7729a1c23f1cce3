"""The whole step with fused blocks, traced on the meta device as an H100 would be asked for it: one
list of launches, derived here from the nets' layers, and among them nothing that makes the host
wait. So a CUDA graph can hold it."""

import pytest

from benchmarks import cost_model

DATA = ["randint", "randint", "randint", "crop", "randn", "_to_copy"]  # mirror, corner, noise
ADAM = ["adam"]  # with the average and the weights in 16 bits
READINGS = ["cat", "index_copy_", "add_", "remainder_"]

# The plan's default: norm and activation as passes on the way there; on the way back a layer's
# gradient undoes the activation before it, with the sums of the norm there.
HYBRID = {
    "up": ["gather", "apply_prologue"],
    "project": ["gather", "apply_prologue"],
    "down": ["gather", "apply_prologue"],
    # Their takers, G5 and D5, read each value once, and activate it as they do.
    "up, last": ["gather"],
    "down, last": ["gather"],
    "to input": ["apply_prologue", "gather"],
    "to input, before it no norm": ["apply_prologue", "gather"],
    "to both": ["apply_prologue", "gather", "weight_gradient"],
    "to both, before it no norm": ["apply_prologue", "gather", "weight_gradient"],
    "to weight": ["apply_prologue", "weight_gradient"],
    "last logit": ["gather"],
    "last logit to both": ["gather", "weight_gradient"],
    "last logit to input": ["gather"],
    "image to weight": ["image_weight_gradient"],
    "image to input": ["image_up"],
    "picture to both": ["apply_prologue", "image_down", "image_weight_gradient"],
}
# Norm and activation as passes of their own on both ways.
MATERIALISED = {
    "up": ["gather", "apply_prologue"],
    "project": ["gather", "apply_prologue"],
    "down": ["gather", "apply_prologue"],
    "to input": ["activation_gradient", "apply_prologue", "gather"],
    "to input, before it no norm": ["activation_gradient", "apply_prologue", "gather"],
    "to both": ["activation_gradient", "apply_prologue", "gather", "weight_gradient"],
    "to both, before it no norm": ["activation_gradient", "apply_prologue", "gather",
                                   "weight_gradient"],
    "to weight": ["activation_gradient", "apply_prologue", "weight_gradient"],
    "last logit": ["gather"],
    "last logit to both": ["gather", "weight_gradient"],
    "last logit to input": ["gather"],
    "image to weight": ["image_weight_gradient"],
    "image to input": ["apply_prologue", "image_up"],
    "picture to both": ["apply_prologue", "image_down", "image_weight_gradient"],
}  # fmt: skip
# All that is in the products' loads and stores.
PROLOGUE = {
    "up": ["gather"],
    "project": ["gather"],
    "down": ["gather"],
    "to input": ["gather"],
    "to input, before it no norm": ["gather"],
    "to both": ["gather", "weight_gradient"],
    "to both, before it no norm": ["gather", "weight_gradient"],
    "to weight": ["weight_gradient"],
    "last logit": ["gather"],
    "last logit to both": ["gather", "weight_gradient"],
    "last logit to input": ["gather"],
    "image to weight": ["image_weight_gradient"],
    "image to input": ["image_up"],
    "picture to both": ["image_down", "image_weight_gradient"],
}


def expected(of):
    """The launches of one step, in order."""
    up, down = (2 * of[name] + of.get(f"{name}, last", of[name]) for name in ("up", "down"))
    g_forward = of["project"] + up + ["image_up"]
    d_forward = ["image_down"] + down + of["last logit"]
    d_to_both = (
        of["last logit to both"]
        + 2 * of["to both"]
        + of["to both, before it no norm"]
        + of["image to weight"]
    )
    d_to_images = (
        of["last logit to input"]
        + 2 * of["to input"]
        + of["to input, before it no norm"]
        + of["image to input"]
    )
    g_to_both = of["picture to both"] + 3 * of["to both"] + of["to weight"]
    return [
        *DATA, *g_forward,
        *d_forward, "bce_rows", *d_to_both, *ADAM,
        *d_forward, "bce_rows", *d_to_images, *g_to_both, *ADAM,
        *READINGS,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "of"),
    [("default", HYBRID), ("materialised", MATERIALISED), ("prologue", PROLOGUE)],
)
def test_a_step_is_one_list_of_launches_without_a_sync(how, of):
    work = cost_model.our_step(how, cost_model.DEVICES["h100"], 128, 64, "bf16")
    assert all(w.launches == 1 for w in work)
    names = [w.name for w in work]
    assert "copy to the host" not in names
    assert kinds(names) == expected(of)


# What labels add: PyTorch's own operations on vectors.
OF_LABELS = {"index_select", "embedding", "embedding_dense_backward", "repeat", "mul", "pow", "sum",
             "rsqrt", "add", "select_backward", "slice_backward", "_to_copy"}  # fmt: skip


def test_labels_add_small_launches_and_no_sync():
    """The blocks are those of the step without classes, in the same order, and one product more:
    the gradient of G's input, for its embedding."""
    classes = ("a", "b", "c")
    work = cost_model.our_step(
        "default", cost_model.DEVICES["h100"], 128, 64, "bf16", classes=classes
    )
    names = kinds([w.name for w in work])
    assert "copy to the host" not in names
    assert set(names) - set(expected(HYBRID)) <= OF_LABELS
    assert names.count("embedding") == 3, "G's once, D's for both its batches and for G"
    assert names.count("embedding_dense_backward") == 2, "and no gradient of D's in G's step"
    to_both = [*HYBRID["to weight"][:-1], "gather", "weight_gradient"]
    more = {"to weight": to_both, "down, last": HYBRID["down"]}  # D5 gives an embedding, too
    blocks = expected({**HYBRID, **more})
    found, blocks = ([n for n in each if n not in OF_LABELS] for each in (names, blocks))
    assert found == blocks


def kinds(names):
    """By which loads, and into how many parts a sum is cut, is the tile's affair."""
    names = [name.removesuffix("_descriptors").removesuffix("_pointers") for name in names]
    return [name for name in names if name != "reduce_splits"]
