"""Which room of fastdcgan_kernels imports which, read from the files: docs/adding-a-kernel.md."""

import ast
from pathlib import Path

import pytest

import fastdcgan_kernels

NAME = "fastdcgan_kernels"
ROOT = Path(fastdcgan_kernels.__file__).parent
# From the top: a room imports what is below it, and its own files.
FLOORS = [
    ("tuner", "inspect"),
    ("adam",),
    ("modules",),
    ("functional",),
    ("cpu", "compared"),
    ("autograd",),
    ("ops",),
    ("gpu.blocks",),
    ("gpu.family",),
    ("gpu.descriptors",),
    ("gpu.tile",),
    ("gpu.partials",),
    ("gpu.launch",),
    ("reference", "dcgan", "aside", "placing"),
    ("convolution",),
    ("choice",),
]
SHARED = {"gpu.tile", "gpu.partials", "gpu.launch", "gpu.descriptors"}  # by all families of kernels
PUBLIC = [
    "Activated",
    "ConvBlock",
    "Deferred",
    "Dropout",
    "Finding",
    "KerasBatchNorm2d",
    "conv_act",
    "conv_bn_act",
    "conv_transpose_act",
    "conv_transpose_bn_act",
    "findings",
    "fuse",
    "materialise",
    "share",
    "tune",
    "unfuse",
    "unfused",
]


def module_of(path):
    """gpu/tile.py as "gpu.tile", gpu/__init__.py as "gpu", the package's own as ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module):
    """The entry of FLOORS that a module is of."""
    if module.startswith("gpu.") and module not in SHARED and module != "gpu.blocks":
        return "gpu.family"
    return module if module.startswith("gpu.") else module.split(".")[0]


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(node, inside=False):
    """(import, whether in a function) of all that run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif not is_for_types(child):
            yield from statements(child, inside or isinstance(child, ast.FunctionDef))


def names_in(module, node):
    """The modules of the package that a relative import names."""
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    base = package[: len(package) - (node.level - 1)] + (node.module or "").split(".")
    base = ".".join(part for part in base if part)
    for alias in node.names:
        whole = f"{base}.{alias.name}".lstrip(".")
        yield whole if whole in FILES else base


def imports(module, functions=True):
    """Modules of the package that this one imports, its parents aside."""
    tree = ast.parse(FILES[module].read_text())
    return {
        name
        for node, inside in statements(tree)
        if isinstance(node, ast.ImportFrom) and node.level and (functions or not inside)
        for name in names_in(module, node)
    } - {module}


def others(module, functions=False):
    """Packages other than this one that a module imports."""
    tree = ast.parse(FILES[module].read_text())
    for node, inside in statements(tree):
        if functions or not inside:
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif not node.level:
                yield node.module.split(".")[0]


def test_inside_the_package_imports_are_relative():
    assert not [module for module in FILES if NAME in others(module, functions=True)]


def test_imports_are_of_files_that_are_there():
    assert not {
        module: imports(module) - {*FILES} for module in FILES if imports(module) - {*FILES}
    }


def test_imports_go_down():
    """Those in functions, too. What is imported for types alone does not count."""
    height = {room: at for at, rooms in enumerate(FLOORS) for room in rooms}
    for module in FILES:
        for name in imports(module):
            own, other = room_of(module), room_of(name)
            assert own == other or height[own] < height[other], f"{module} imports {name}"


def test_choices_know_no_kernels():
    """And import Triton in functions alone, which ask whether it is there and which it is."""
    for module in FILES:
        if room_of(module) == "choice":
            assert "triton" not in others(module), module
            assert all(room_of(name) == "choice" for name in imports(module)), module


def test_families_of_kernels_do_not_know_each_other():
    for module in FILES:
        if room_of(module) in ("gpu.family", *SHARED):
            for name in imports(module):
                assert name in SHARED or room_of(name) in ("choice", "reference", "placing"), (
                    module,
                    name,
                )


def test_no_room_needs_the_tools():
    """Only the package itself, when its `tune` is asked for by name."""
    tools = {"tuner", "inspect"}
    for module in FILES:
        used = {room_of(name) for name in imports(module)} & tools
        assert used <= {room_of(module)}, f"{module} imports {used}"


def test_there_is_no_circle():
    """Also none that an import in a function would close."""
    below = {module: imports(module) for module in FILES}
    while ends := [module for module, names in below.items() if not names]:
        for module in ends:
            del below[module]
        below = {module: names - {*ends} for module, names in below.items()}
    assert not below


@pytest.mark.parametrize("module", ["", "dcgan", "tuner", "tuner.__main__", "inspect.__main__"])
def test_what_help_needs_is_light(module):
    """Neither torch nor Triton, and of the package only what is light, too."""
    assert not {*others(module)} & {"torch", "triton"}
    light = {"", "dcgan", "tuner", "inspect"}
    assert imports(module, functions=False) <= light


def test_public_names_are_these():
    assert fastdcgan_kernels.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(fastdcgan_kernels, name).__name__ == name


def test_no_test_imports_another():
    """What two need is in a file that is no test."""
    tests = Path(__file__).parents[1]
    found = [
        f"{path.relative_to(tests)}: {ast.unparse(node)}"
        for path in tests.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if name.split(".")[-1].startswith("test_")
    ]
    assert found == []
