"""What the kernels compile to, for every target, without a GPU: in processes of their own, since
this one has Triton's interpreter on."""

import json
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import triton

from fastdcgan_kernels.choice.targets import TARGETS
from fastdcgan_kernels.inspect.__main__ import ARCHS
from fastdcgan_kernels.inspect.launches import OTHERS
from fastdcgan_kernels.inspect.report import complaints

# Matrix instructions and ways to read memory without waiting for it, as the targets' manuals have
# them. gfx942 has none: its loads go into registers a step ahead.
MATRIX = {
    "sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA",
    "gfx942": "v_mfma", "gfx950": "v_mfma",
}  # fmt: skip
LIMIT = {  # bytes of shared memory a block may have
    "sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376,
    "gfx942": 65_536, "gfx950": 163_840,
}  # fmt: skip
# Before 3.9 Triton gives some kernels 8 bytes of stack, of layers with odd channels 16, and two of
# gfx942's loops no loads of their own; 3.6 does not use gfx950's copies into LDS either.
OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
STACK = 8 if OLD else 0
WITH_TMA = ("sm_90", "sm_100", "sm_120")


KINDS = {
    "Hopper": ("sm_90",),
    "other NVIDIA": ("sm_80", "sm_89", "sm_100", "sm_120"),
    "AMD": ("gfx942", "gfx950"),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_on_every_target(command, kind):
    archs = KINDS[kind]
    run = command("fastdcgan_kernels.inspect", "--json", "--arch", ",".join(archs), timeout=1500)
    assert OLD or run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    every_layer_is_there(rows, archs)
    nothing_spills_and_everything_fits(rows)
    every_gemm_has_its_matrix_instruction(rows)
    no_main_loop_waits_for_its_loads(rows, archs)


def gemms(rows):
    return [row for row in rows if re.match("gather|weight_gradient|image", row["kernel"])]


def every_layer_is_there(rows, archs):
    assert {row["arch"] for row in rows} == set(archs)
    names = [f"{net}{i}" for net in "GD" for i in range(1, 6)] + [one.name for one in OTHERS]
    layers = {f"{name} {when}" for name in names for when in ("forward", "backward")} | {"step"}
    for arch in archs:
        own = [row for row in rows if row["arch"] == arch]
        assert {row["layer"].split(",")[0] for row in own} == layers
        assert {row["layer"].split(", ")[1] for row in own} == {
            "hybrid", "materialised", "prologue", "vendor", "all",
        }  # fmt: skip
        kernels = {row["kernel"] for row in own}
        assert ("gather_descriptors" in kernels) == (arch in WITH_TMA)
        assert ("weight_gradient_descriptors" in kernels) == (arch in WITH_TMA)
        assert {
            "gather_pointers", "weight_gradient_pointers", "image_down", "image_up",
            "image_weight_gradient", "partial_statistics", "merge_rows", "apply_prologue",
            "prologue_sums", "activation_gradient", "reduce_splits", "bce_rows", "crop", "adam",
        } <= kernels  # fmt: skip
    needed = {
        "kernel", "layer", "arch", "dtype", "registers", "spill_bytes", "shared_bytes",
        "shared_limit", "matrix_instruction", "main_loop",
    }  # fmt: skip
    assert all(needed <= row.keys() for row in rows)


def nothing_spills_and_everything_fits(rows):
    for row in rows:
        assert row["spill_bytes"] <= (2 * STACK if row["narrow"] else STACK), row
        assert OLD or row["local_accesses"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"] == LIMIT[row["arch"]], row
        assert 0 < row["registers"] <= (512 if row["arch"].startswith("gfx") else 255), row
        assert row["resident_blocks"] >= 1, row


def every_gemm_has_its_matrix_instruction(rows):
    for row in gemms(rows):
        assert row["matrix_instruction"] == MATRIX[row["arch"]], row
        assert row["matrix_instructions"] > 0, row


def no_main_loop_waits_for_its_loads(rows, archs):
    seen = set()
    for row in gemms(rows):
        loop, arch = row["main_loop"], row["arch"]
        if loop is None or row["narrow"]:
            continue  # one step; or odd channels: no target copies 2 bytes asynchronously
        ways = {"cp.async"}
        if row["kernel"].endswith("descriptors"):
            ways = {"TMA"}
        elif arch == "gfx942" or (arch == "gfx950" and (row["prologue"] or OLD)):
            ways = {"to LDS", "registers"}
        elif arch == "gfx950":
            ways = {"to LDS"}
        if OLD and arch == "gfx942" and row["layer"].split(",")[0] in ("G1 backward", "D5 forward"):
            continue
        assert loop["copies"] in ways, row
        assert loop["copy_instructions"] > 0, row
        seen.add((arch, row["kernel"]))
    for arch in archs:
        assert (arch, "gather_pointers") in seen
        assert (arch, "weight_gradient_pointers") in seen
        if arch in WITH_TMA:
            assert (arch, "gather_descriptors") in seen
            assert (arch, "weight_gradient_descriptors") in seen


COMPILE_TILES = """
import json, torch
from fastdcgan_kernels.choice import targets
from fastdcgan_kernels.choice.geometry import Geometry, Tile
from fastdcgan_kernels.gpu import blocks, launch
from fastdcgan_kernels.gpu.tile import Epilogue, Operand
from fastdcgan_kernels.inspect import assembly, compiling
def compiled(arch, what, epilogue, tile, p, small_channels, large_channels):
    # Memory is by layer: small side p x p, batch 256.
    g = Geometry(256, p, p, small_channels, 2 * p, 2 * p, large_channels, 2, 1)
    def made(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    weight = made(g.CS, g.CL, 4, 4)
    small, large = made(g.N, g.CS, g.P, g.Q), made(g.N, g.CL, g.H, g.W)
    with targets.assume(targets.TARGETS[arch]), launch.recording() as found:
        if what == "weight":
            blocks.weight_gradient(
                Operand(large), Operand(small), g, tile=tile, dtype=torch.float32)
        else:
            up = what == "up"
            x, y = (small, large) if up else (large, small)
            coef = torch.empty((5, 1, y.shape[1]), device="meta")
            bias = torch.empty(y.shape[1], device="meta")
            ends = {
                "store": {"bias": bias}, "statistics": {"bias": bias},
                "gradient": {"aux": y, "coef": coef}, "actgrad": {"aux": y}}
            act = {"activation": "leaky_relu", "slope": 0.2}
            blocks.convolve(Operand(x), weight, g, transposed=up, tile=tile,
                            epilogue=Epilogue(epilogue, **ends[epilogue], **act))
    order = compiling.order_of(found[0])
    row = compiling.compile_order(order, arch)
    (more,) = assembly.describe_codes(row.pop("machine"), [row.pop("code")])
    return row | more | {"kernel": order.kernel}
TILES = {
    "64x128": (128, 64, 64, 1, 4, 3), "128x128": (128, 128, 64, 1, 8, 3),
    "128x256": (256, 128, 64, 1, 8, 4)}
rows = []
for arch in ("sm_90", "sm_100"):
    for what in ("down", "up"):
        for epilogue in ("store", "statistics", "gradient", "actgrad"):
            for name, tile in TILES.items():
                row = compiled(arch, what, epilogue, Tile(*tile, "descriptors"), 8, 256, 128)
                rows.append(row | {"arch": arch, "what": what, "tile": name, "end": epilogue,
                                   "stage": 128 * (tile[0] + tile[1]), "stages": tile[5]})
    for name, size, sides in (
        ("128x128", (128, 128), (8, 256, 128)), ("256x128", (256, 128), (4, 512, 256)),
        ("2 taps", (128, 128), (16, 128, 64))):
        row = compiled(arch, "weight", "", Tile(*size, 64, 4, 8, 4, "descriptors"), *sides)
        rows.append(row | {"arch": arch, "what": "weight", "tile": name, "end": "",
                           "stage": 128 * sum(size), "stages": 4})
print(json.dumps(rows))
"""
# Instructions of a step of 128 x 128 x 64 in the main loop of sm_90, at most. 88 to 100 the way up,
# whose four taps are no row of channels: as the compiler keeps the descriptors' addresses or not.
STEP = {
    ("down", "128x128"): 90, ("up", "128x128"): 100, ("weight", "128x128"): 90,
    ("weight", "2 taps"): 135,
}  # fmt: skip


@pytest.mark.timeout(900)
def test_matrix_instructions_read_both_operands_from_shared_memory(environment):
    """The large tiles of descriptors, on Hopper and Blackwell, with every epilogue: nothing goes
    through registers on its way to a product, all stages are there, nothing spills
    (but STACK), and Hopper starts and waits for its products once a step."""
    run = subprocess.run(
        [sys.executable, "-c", COMPILE_TILES], env=environment, capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) == 2 * (2 * 4 * 3 + 3)
    for row in rows:
        assert row["kernel"].endswith("descriptors")
        loop = row["main_loop"]
        assert row["spill_bytes"] <= STACK, row
        assert OLD or row["local_accesses"] == 0, row
        assert loop["through_registers"] == 0, row
        assert loop["copies"] == "TMA", row
        assert row["shared_bytes"] >= row["stages"] * row["stage"], row
        if row["arch"] == "sm_90":
            assert loop["fences"] <= (3 if row["tile"] == "2 taps" else 2), row
            limit = STEP.get((row["what"], row["tile"]), 110)
            assert loop["instructions"] <= limit, row


def test_what_is_wrong_is_said():
    loop = {"copies": "cp.async", "copy_instructions": 8}
    good = {
        "arch": "sm_80", "kernel": "gather_pointers", "tile": "", "layer": "G2 forward",
        "dtype": "bf16", "prologue": False, "spill_bytes": 0, "local_accesses": 0,
        "shared_bytes": 1024, "shared_limit": 166_912, "matrix_instruction": "HMMA",
        "main_loop": loop,
    }  # fmt: skip
    assert complaints([good]) == []
    for change, words in (
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"local_accesses": 1}, "spills"),
        ({"shared_bytes": 200_000}, "200000 bytes of shared memory"),
        ({"matrix_instruction": ""}, "no matrix instruction"),
        ({"main_loop": {**loop, "copies": ""}}, "no asynchronous copies"),
    ):
        (said,) = complaints([{**good, **change}])
        assert words in said


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes(command, dtype):
    run = command(
        "fastdcgan_kernels.inspect", "--json", "--dtype", dtype, "--arch", "sm_90", "--layer", "3",
        timeout=600,
    )  # fmt: skip
    assert OLD or run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {row["dtype"] for row in found} == {dtype}
    assert all(row["spill_bytes"] <= STACK for row in found)
    if dtype == "fp16":
        assert {row["matrix_instruction"] for row in gemms(found)} == {"HGMMA"}


COMPARE_DISASSEMBLIES = """
from fastdcgan_kernels.inspect import assembly, compiling
from fastdcgan_kernels.inspect.launches import launches
orders = {compiling.order_of(launch) for layer, launch in launches("sm_90", "bf16")
          if "G3 " in layer and "vendor" not in layer}
machine, codes, expected = "", [], []
for order in sorted(orders, key=str)[:4]:
    built = compiling.build(order, "sm_90")
    found = compiling.compile_order(order, "sm_90")
    machine, codes = found["machine"], [*codes, found["code"]]
    sass = assembly.run_tool("cuobjdump", "-sass", on=built.asm["cubin"])
    expected.append(assembly.describe_sass(assembly.instructions_of(sass), "HGMMA"))
assert len({str(one) for one in expected}) > 1, expected
assert assembly.describe_codes(machine, codes) == expected
print(len(expected))
"""


@pytest.mark.timeout(600)
def test_kernels_disassembled_together_are_as_each_alone(environment):
    """By the tool that reads a whole binary of one kernel."""
    run = subprocess.run(
        [sys.executable, "-c", COMPARE_DISASSEMBLIES], env=environment, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "4\n"), run.stderr


PRINT_TTIR = """
import json, torch
from fastdcgan_kernels.inspect.compiling import build, order_of
from fastdcgan_kernels.inspect.launches import launches
from fastdcgan_kernels.inspect.report import tile_of
BATCH = 40_000
def large(name, value):
    return isinstance(value, torch.Tensor) and (
        name in ("out", "parts") or (value.dim() > 0 and value.shape[0] == BATCH))
found = {}
for arch in ("sm_80", "sm_90"):
    for layer, launch in launches(arch, "bf16", batch=BATCH):
        order = order_of(launch)
        key = f"{order.kernel} {tile_of(launch)}"
        if ("2 " in layer or "5 " in layer or "D1 " in layer) and key not in found:
            found[key] = build(order, arch).asm["ttir"], {
                name: [large(name, one) for one in (value if isinstance(value, tuple) else [value])]
                for name, value in launch.arguments.items()}
print(json.dumps(found))
"""


def pointers_to_images(text, large):
    """Names in Triton's representation of the pointers to images and to parts of sums; of a tuple's
    elements they differ among versions, and the order is the same."""
    (head,) = re.findall(r"tt\.func public .*", text)
    names = defaultdict(list)
    for name, argument in re.findall(r'(%[\w.]+): [^%]*?loc\("(\w+)', head):
        names[argument].append(name)
    return {
        name
        for argument, own in names.items()
        for name, wanted in zip(own, large[argument], strict=False)
        if wanted
    }


@pytest.mark.timeout(600)
def test_offsets_are_64_bit_wherever_a_tensor_may_pass_2_to_the_31(environment):
    """Read in Triton's own representation: each address of an image is formed from a 64-bit offset,
    and that is made of 64-bit products, not widened once it has overflowed."""
    run = subprocess.run(
        [sys.executable, "-c", PRINT_TTIR], env=environment, capture_output=True, text=True,
        check=True, timeout=600,
    )  # fmt: skip
    found = json.loads(run.stdout)
    assert {name.split()[0] for name in found} >= {
        "gather_pointers", "gather_descriptors", "weight_gradient_pointers", "image_down",
        "image_up", "image_weight_gradient", "apply_prologue", "activation_gradient",
        "partial_statistics", "reduce_splits",
    }  # fmt: skip
    multiplied = set()
    for name, (text, large) in found.items():
        if name.split()[0] == "merge_rows":
            continue  # it sees a few values a channel
        images, checked = pointers_to_images(text, large), 0
        splats = dict(re.findall(r"(%\S+) = tt\.splat (%\S+) :", text))
        for base, kind in re.findall(r"tt\.addptr (%\S+), \S+ : \S+, tensor<\S*x(i\d+)>", text):
            if splats.get(base) in images:
                assert kind == "i64", (name, splats[base])
                checked += 1
        assert checked, name
        if re.search(r"arith\.muli .* : (tensor<\S*x)?i64", text):
            multiplied.add(name.split()[0])
        late = re.findall(r"arith\.extsi .* to tensor<(\d+)x(\d+)xi64>", text)
        assert not [shape for shape in late if "1" not in shape], name
    assert multiplied == {name.split()[0] for name in found} - {"merge_rows"}


def test_bad_arguments_get_one_line(command):
    for arguments, words in (
        (("--arch", "sm_42"), "--arch sm_42 was given; give some of sm_80"),
        (("--arch", ""), "give some of sm_80"),
        (("--layer", "G9", "--arch", "sm_80"), "--layer G9 was given; layers are G1 to G5"),
    ):
        run = command("fastdcgan_kernels.inspect", *arguments)
        assert run.returncode == 2
        assert words in run.stderr
        assert "Traceback" not in run.stderr


def test_help_does_not_wait_for_torch(command, environment):
    assert "--arch" in command("fastdcgan_kernels.inspect", "--help").stdout
    check = "import sys, fastdcgan_kernels.inspect.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)


def test_targets_are_all_that_kernels_are_made_for():
    assert tuple(TARGETS) == ARCHS == tuple(MATRIX)
