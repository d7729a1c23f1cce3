"""Every operator that the package registers with PyTorch, found by listing them: its schema, and
opcheck (schema, fakes, gradients, dynamic shapes), optional arguments absent and present. Not here:
whether what they compute is right (test_functional.py, test_cpu.py)."""

import pkgutil
from importlib import import_module

import pytest
import torch

import fastdcgan_kernels
from fastdcgan_kernels.choice.spec import BlockSpec, Buffers, Inputs
from fastdcgan_kernels.ops import NAMESPACE, SIGNATURES, ops

for _module in pkgutil.walk_packages(fastdcgan_kernels.__path__, "fastdcgan_kernels."):
    import_module(_module.name)

SCHEMAS = {
    schema.name.removeprefix(f"{NAMESPACE}::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith(f"{NAMESPACE}::")
}


def optional(argument):
    return argument.type.kind() == "OptionalType"


def normal(*shape):
    return torch.randn(shape)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


# What each case of each operator is given; optional arguments that are not named are None.
DOWN = {"transposed": False, "stride": 2, "padding": (1, 1, 1, 1)}
LAYER = {**DOWN, "x_activation": "none", "x_slope": 0.0}
DEFERRED = {**DOWN, "x_activation": "leaky_relu", "x_slope": 0.2}
CPU_LAYER = {**DOWN, "groups": 2, "eps": 1e-5, "slope": 0.2}
CASES = {
    "conv_bn": {
        "alone": lambda: {
            **LAYER, "x": leaf(2, 3, 8, 4), "weight": leaf(5, 3, 4, 4), "groups": 1, "eps": 1e-5,
            "sync": "", "momentum": 0.0, "correction": 1,
        },
        "with all of the norm's": lambda: {
            **DEFERRED, "x": leaf(4, 5, 4, 4), "x_coef": leaf(5, 2, 5), "weight": leaf(6, 5, 4, 4),
            "working": normal(6, 5, 4, 4), "bias": leaf(6), "gamma": leaf(6), "beta": leaf(6),
            "groups": 2, "eps": 1e-5, "sync": "", "running_mean": normal(6),
            "running_var": torch.rand(6), "batches": torch.tensor(3), "momentum": 0.3,
            "correction": 1,
        },
        "with a momentum for each group": lambda: {
            **LAYER, "x": leaf(4, 3, 8, 4), "weight": leaf(5, 3, 4, 4), "groups": 2, "eps": 1e-5,
            "sync": "", "running_mean": normal(5), "running_var": torch.rand(5), "momentum": 0.0,
            "correction": 1,
            "momenta": torch.rand(2),
        },
        "on what is activated already": lambda: {
            **DEFERRED, "x": leaf(4, 5, 4, 4), "x_coef": leaf(5, 2, 5),
            "x_activated": normal(4, 5, 4, 4), "weight": leaf(6, 5, 4, 4), "groups": 2, "eps": 1e-5,
            "sync": "", "momentum": 0.0, "correction": 1,
        },
        "whose activation it undoes": lambda: {
            **DEFERRED, "x": leaf(4, 5, 4, 4), "weight": leaf(6, 5, 4, 4), "groups": 2, "eps": 1e-5,
            "sync": "", "momentum": 0.0, "correction": 1,
        },
    },
    "conv_bn_backward": {
        "alone": lambda: {
            **LAYER, "gy": normal(2, 5, 4, 2), "x": normal(2, 3, 8, 4),
            "weight": normal(5, 3, 4, 4), "y": normal(2, 5, 4, 2), "groups": 1, "sync": "",
            "need_x": True, "need_weight": True, "need_bias": False,
        },
        "with all": lambda: {
            **DEFERRED, "gy": normal(4, 6, 2, 2), "gcoef": normal(5, 2, 6), "x": normal(4, 5, 4, 4),
            "x_coef": normal(5, 2, 5), "weight": normal(6, 5, 4, 4), "working": normal(6, 5, 4, 4),
            "bias": normal(6), "y": normal(4, 6, 2, 2), "groups": 2, "sync": "",
            "need_x": True, "need_weight": True, "need_bias": True,
        },
        "on what is activated already": lambda: {
            **DEFERRED, "gy": normal(4, 6, 2, 2), "x": normal(4, 5, 4, 4),
            "x_coef": normal(5, 2, 5), "x_activated": normal(4, 5, 4, 4),
            "weight": normal(6, 5, 4, 4), "gcoef": normal(5, 2, 6), "y": normal(4, 6, 2, 2),
            "groups": 2, "sync": "",
            "need_x": True, "need_weight": True, "need_bias": False,
        },
        "undoing an activation": lambda: {
            **DEFERRED, "gy": normal(4, 6, 2, 2), "x": normal(4, 5, 4, 4),
            "weight": normal(6, 5, 4, 4), "gcoef": normal(5, 2, 6), "y": normal(4, 6, 2, 2),
            "groups": 2, "sync": "",
            "need_x": True, "need_weight": False, "need_bias": False,
        },
        "with nothing asked for": lambda: {
            **DEFERRED, "gy": normal(4, 6, 2, 2), "gcoef": normal(5, 2, 6), "x": normal(4, 5, 4, 4),
            "x_coef": normal(5, 2, 5), "weight": normal(6, 5, 4, 4), "bias": normal(6),
            "y": normal(4, 6, 2, 2), "groups": 2, "sync": "",
            "need_x": False, "need_weight": False, "need_bias": False,
        },
    },
    "conv_act": {
        "alone": lambda: {
            "x": leaf(2, 5, 4, 4), "weight": leaf(5, 3, 4, 4), "transposed": True,
            "stride": 2, "padding": (1, 1, 1, 1),
            "x_activation": "none", "x_slope": 0.0, "activation": "tanh", "slope": 0.0,
            "undone": False,
        },
        "with bias and working": lambda: {
            **DEFERRED, "x": leaf(4, 5, 4, 4), "x_coef": leaf(5, 2, 5), "weight": leaf(6, 5, 4, 4),
            "working": normal(6, 5, 4, 4), "bias": leaf(6), "activation": "relu", "slope": 0.0,
            "undone": False,
        },
        "on what is activated already": lambda: {
            **DEFERRED, "x": leaf(4, 5, 4, 4), "x_coef": leaf(5, 2, 5),
            "x_activated": normal(4, 5, 4, 4), "weight": leaf(6, 5, 4, 4), "activation": "none",
            "slope": 0.0, "undone": False,
        },
        "whose activation is undone": lambda: {
            **LAYER, "x": leaf(2, 3, 8, 4), "weight": leaf(8, 3, 4, 4), "activation": "relu",
            "slope": 0.0, "undone": True,
        },
    },
    "conv_act_backward": {
        "alone": lambda: {
            **LAYER, "g": normal(2, 5, 4, 2), "x": normal(2, 3, 8, 4),
            "weight": normal(5, 3, 4, 4), "activation": "none", "slope": 0.0,
            "need_x": True, "need_weight": True, "need_bias": False,
        },
        "with all": lambda: {
            **DEFERRED, "g": normal(4, 6, 2, 2), "out": normal(4, 6, 2, 2), "x": normal(4, 5, 4, 4),
            "x_coef": normal(5, 2, 5), "weight": normal(6, 5, 4, 4), "working": normal(6, 5, 4, 4),
            "bias": normal(6), "activation": "tanh", "slope": 0.0,
            "need_x": True, "need_weight": True, "need_bias": True,
        },
        "on what is activated already": lambda: {
            **DEFERRED, "g": normal(4, 6, 2, 2), "x": normal(4, 5, 4, 4),
            "x_coef": normal(5, 2, 5), "x_activated": normal(4, 5, 4, 4),
            "weight": normal(6, 5, 4, 4), "activation": "none", "slope": 0.0,
            "need_x": True, "need_weight": True, "need_bias": False,
        },
        "undoing an activation": lambda: {
            **DEFERRED, "g": normal(4, 6, 2, 2), "x": normal(4, 5, 4, 4),
            "weight": normal(6, 5, 4, 4), "activation": "none", "slope": 0.0,
            "need_x": True, "need_weight": False, "need_bias": False,
        },
        "with nothing asked for": lambda: {
            **DEFERRED, "g": normal(4, 6, 2, 2), "out": normal(4, 6, 2, 2), "x": normal(4, 5, 4, 4),
            "x_coef": normal(5, 2, 5), "weight": normal(6, 5, 4, 4), "bias": normal(6),
            "activation": "tanh", "slope": 0.0,
            "need_x": False, "need_weight": False, "need_bias": False,
        },
    },
    "activate": {
        "alone": lambda: {
            "y": leaf(4, 5, 4, 4), "coef": leaf(5, 2, 5), "activation": "leaky_relu", "slope": 0.2,
        },
    },
    "activate_backward": {
        "alone": lambda: {
            "g": normal(4, 5, 4, 4), "y": normal(4, 5, 4, 4), "coef": normal(5, 2, 5),
            "activation": "leaky_relu", "slope": 0.2,
        },
    },
    "cpu_conv_norm": {
        "alone": lambda: {
            **CPU_LAYER, "x": leaf(16, 32, 8, 8), "weight": leaf(32, 32, 4, 4),
            "activation": "leaky_relu", "momentum": 0.1, "correction": 1,
        },
        "with all": lambda: {
            **CPU_LAYER, "x": leaf(16, 32, 8, 8), "weight": leaf(32, 32, 4, 4), "bias": leaf(32),
            "gamma": leaf(32), "beta": leaf(32), "activation": "tanh", "running_mean": normal(32),
            "running_var": torch.rand(32), "batches": torch.tensor(3), "momenta": torch.rand(2),
            "momentum": 0.0, "correction": 1,
        },
    },
    "cpu_conv_norm_backward": {
        "alone": lambda: {
            **CPU_LAYER, "g": normal(16, 32, 4, 4), "x": normal(16, 32, 8, 8),
            "weight": normal(32, 32, 4, 4), "y": normal(16, 32, 4, 4),
            "stats": torch.rand(3, 2, 32), "activation": "leaky_relu",
            "need_x": True, "need_weight": True, "need_bias": False,
        },
        "with all": lambda: {
            **CPU_LAYER, "g": normal(16, 32, 4, 4), "x": normal(16, 32, 8, 8),
            "weight": normal(32, 32, 4, 4), "bias": normal(32), "gamma": normal(32),
            "beta": normal(32), "out": torch.rand(16, 32, 4, 4), "y": normal(16, 32, 4, 4),
            "stats": torch.rand(3, 2, 32), "activation": "tanh",
            "need_x": True, "need_weight": True, "need_bias": True,
        },
    },
    "cpu_conv_act": {
        "alone": lambda: {
            "x": leaf(16, 32, 8, 8), "weight": leaf(32, 32, 4, 4), **DOWN,
            "activation": "tanh", "slope": 0.0,
        },
        "with bias": lambda: {
            "x": leaf(16, 32, 8, 8), "weight": leaf(32, 32, 4, 4), "bias": leaf(32),
            "transposed": True,
            "stride": 2, "padding": (1, 1, 1, 1), "activation": "leaky_relu", "slope": 0.2,
        },
    },
    "cpu_conv_act_backward": {
        "alone": lambda: {
            "g": normal(16, 32, 4, 4), "x": normal(16, 32, 8, 8), "weight": normal(32, 32, 4, 4),
            **DOWN, "activation": "none", "slope": 0.0,
            "need_x": True, "need_weight": True, "need_bias": False,
        },
        "with all": lambda: {
            "g": normal(16, 32, 4, 4), "out": torch.rand(16, 32, 4, 4), "x": normal(16, 32, 8, 8),
            "weight": normal(32, 32, 4, 4), "bias": normal(32), **DOWN,
            "activation": "leaky_relu", "slope": 0.2,
            "need_x": True, "need_weight": True, "need_bias": True,
        },
    },
    "cpu_dropout": {
        "float32": lambda: {"x": leaf(3, 50), "seed": torch.tensor(7), "p": 0.3},
        "bfloat16, channels_last": lambda: {
            "x": normal(2, 8, 5, 5).bfloat16().to(memory_format=torch.channels_last),
            "seed": torch.tensor(-7), "p": 0.5,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_argument_has_a_default(name):
    """PyTorch 2.11 drops trailing arguments that equal their defaults before a call, and then looks
    for the mutated ones among those left."""
    assert [a.name for a in SCHEMAS[name].arguments if a.has_default_value()] == []


def test_conv_bn_without_running_buffers_and_without_a_momentum():
    """The call that PyTorch 2.11 made an IndexError of."""
    x, weight = normal(2, 3, 8, 8), normal(5, 3, 4, 4)
    spec = BlockSpec(False, stride=2, padding=(1, 1, 1, 1), eps=1e-5)
    y, coef = ops.conv_bn(*SIGNATURES["conv_bn"].flatten(Inputs(x, weight), Buffers(), spec))
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, None, 2, 1))
    torch.testing.assert_close(coef[0, 0], y.mean((0, 2, 3)))


@pytest.mark.parametrize("name", SIGNATURES)
def test_flat_arguments_are_those_of_the_schema_and_are_restored(name):
    signature = SIGNATURES[name]
    assert [argument.name for argument in SCHEMAS[name].arguments] == list(signature.kinds)
    flat = list(range(len(signature.kinds)))
    assert signature.flatten(*signature.restore(flat)) == flat
    assert signature.named(flat) == dict(zip(signature.kinds, flat, strict=True))


@pytest.mark.parametrize("name", SCHEMAS)
def test_cases_have_every_optional_argument_absent_and_present(name):
    cases = [case() for case in CASES[name].values()]
    for argument in filter(optional, SCHEMAS[name].arguments):
        assert {argument.name in case for case in cases} == {True, False}, argument.name


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in SCHEMAS for case in CASES.get(name, ())]
)
def test_opcheck(name, case):
    torch.manual_seed(0)
    given = CASES[name][case]()
    values = [
        given.pop(a.name, None) if optional(a) else given.pop(a.name)
        for a in SCHEMAS[name].arguments
    ]
    assert not given, "arguments that the operator does not have"
    torch.library.opcheck(getattr(ops, name).default, values)
