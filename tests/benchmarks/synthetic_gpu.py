"""A made-up run of `python -m benchmarks.gpu` on a card that does not exist: round numbers, from
which tests know what to expect. Nothing here was measured."""

CARD = "Synthetic GPU 0000"
LAYERS = [(net, place) for net in "GD" for place in range(1, 6)]


def summary():
    """Complete. Ours takes 1 ms for 100 images, and at most 8 ms for 800; PyTorch tuned half."""
    return {
        "made_by": "python -m benchmarks.gpu --minutes 8",
        "when": "2000-01-01T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "rehearsal": False,
        "phases": {
            name: {"state": "done", "seconds": 10.0, "why": None, "log": None}
            for name in ("machine", "compile", "proof", "engines", "steps", "profile", "tests",
                         "ways", "tiles", "counters")
        },
        "items": {
            "machine": {
                "versions": {"python": "3.0", "torch": "2.0", "cuda": None},
                "card": {"name": CARD, "capability": [9, 0], "multiprocessors": 100,
                         "memory_bytes": 80 * 2**30, "l2_bytes": 50 * 2**20, "sm_mhz": 1000},
                "copy": {"bytes_per_second": 1e12},
                "l2": {"bytes_per_second": 4e12},
                "product": {"flops_per_second": 500e12, "size": 8192, "dtype": "bfloat16"},
            },
            "compile": {"default 100": {"kernels": 9, "compiled": 8, "seconds": 5.0,
                                        "failed": {"gather 8x8x8": "MadeUp: no"}}},
            "proof": {str(batch): proof(batch) for batch in (100, 800)},
            "engines": {
                "compiled": {"kernels": 3, "compiled": 3, "failed": {}},
                "D3 forward: 64x64": {**engine("gluon"), "seconds": 2e-5, "vendor_seconds": 3e-5,
                                      "ratio": 1.5},
                "D3 forward: 16x16": {**engine("descriptors"), "skipped": "gather_pointers ran"},
            },
            "tests": {"pytest": {"passed": 40, "failed": 1, "skipped": 2, "seconds": 60.0,
                                 "failures": [{"name": "test_made_up", "why": "MadeUp: 1"}]}},
            "steps": steps(),
            "profile": {str(batch): profile(batch) for batch in (100, 800)},
            "ways": {f"{batch} {way}": {"batch": batch, "way": way, **timed(batch, 1.5)}
                     for batch in (100, 800)
                     for way in ("hybrid", "materialised", "prologue", "vendor")},
            "tiles": {"a": {"task": {}, "name": "up of 100 4x4x4", "kept": "64x64x64", "gain": 1.25,
                            "candidates": [{"tile": "64x64x64", "seconds": 1e-5, "why": None},
                                           {"tile": "8x8x8", "seconds": None, "why": "wrong"}]}},
            "counters": {"ncu": {"missing": "ncu is not on the PATH"},
                         "memcheck": {"errors": 0, "log": ""}},
        },
    }  # fmt: skip


def timed(batch, factor, **facts):
    """`factor` times what ours takes."""
    seconds = batch * 1e-5 * factor
    return {
        "rounds": [0.9 * seconds, seconds, 1.1 * seconds], "median": seconds,
        "images_per_second": batch / seconds, "said": [], "sm_mhz": 1000.0, "celsius_max": 50,
        "throttled": False, "power_capped": False, "watts": 400.0, "images_per_joule": 250.0,
        "memory_peak_mib": 1000.0, **facts,
    }  # fmt: skip


def steps():
    found = {}
    for batch in (50, 100, 200, 800):
        groups = [("alone", "fastdcgan --amp", 1.0)]
        if batch in (100, 800):
            groups += [("in turn", "fastdcgan --amp", 1.1), ("in turn", "pytorch tuned", 0.55)]
        if batch == 100:
            groups.append(("in turn", "pytorch example", 3.3))
        for how, variant, factor in groups:
            found[f"{batch} {how}: {variant}"] = {
                "batch": batch, "variant": variant, "ours": variant.startswith("fast"),
                "in_turn": how == "in turn", **timed(batch, factor),
            }  # fmt: skip
    return found


def proof(batch):
    return {
        "batch": batch, "impl": "triton", "graphed": True, "said": [],
        "figures": {"blocks": {"largest": 0.01, "allowed": 0.1, "where": "G2"},
                    "gradients": {"error": 0.02, "allowed": 0.2}, "update": {"wrong": []},
                    "graph": {"error": 0.0, "allowed": 0.001}},
    }  # fmt: skip


def profile(batch):
    """Each layer's three passes take 10, 20 and 30 us and could take 5; three other kinds."""
    rows = []
    for net, place in LAYERS:
        for k, of in enumerate(("forward", "data gradient", "weight gradient"), 1):
            rows.append(row(f"{net}{place}", of, f"kernel_{k}", k * 1e-5, 5e-6))
        rows.append(row(f"{net}{place}", "norm", "partial_statistics", 3e-6, 1e-7))
    rows += [row("step", "update", "adam", 5e-5, 4e-5), row("step", "data", "crop", 2e-6, 1e-6)]
    seconds = sum(one["seconds"] for one in rows) + 1e-5
    return {
        "batch": batch, "source": "torch.profiler, one replay of the CUDA graph", "joined": True,
        "seconds": seconds, "span_seconds": seconds + 5e-5,
        "rows": [{"place": at, **one} for at, one in enumerate(rows)],
        "others": [{"name": "at::made_up<float>", "launches": 2, "seconds": 1e-5}],
        "peaks": {"flops_per_second": 500e12, "bytes_per_second": 1e12,
                  "l2_bytes_per_second": 4e12, "source": "measured"},
    }  # fmt: skip


def engine(name):
    return {"layer": "D3", "pass": "forward", "engine": name, "tile": "64x64", "images": 100}


def row(layer, of, kernel, seconds, floor):
    return {
        "layer": layer, "pass": of, "kernel": kernel, "tile": "64x64x64 4w3s", "seconds": seconds,
        "flops": 2_500_000_000, "bytes": 1_000_000, "l2_bytes": 4_000_000, "floor_seconds": floor,
        "predicted_seconds": 2 * floor,
    }  # fmt: skip
