"""`python -m fastdcgan.train` as users run it: a subprocess, and the files that it leaves."""

import contextlib
import json
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdcgan.train import main
from fastdcgan.training import checkpoints
from fastdcgan.training.journal import read_metrics

SMALL = [
    *("--image-size", "32", "--nz", "6", "--ngf", "4", "--ndf", "4", "--batch-size", "8"),
    "--no-tensorboard",
]


@pytest.fixture
def train(command, tiny_data, tmp_path):
    """Runs the command on the tiny data in a folder of its own."""

    def run(*args, **options):
        return command(
            "fastdcgan.train", "--data", tiny_data, *SMALL, *args, cwd=tmp_path, **options
        )

    return run


def one_line_error(done):
    """Bad input: one line on stderr, a status that is not 0, no traceback."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_answers_at_once_and_without_torch(environment, command):
    start = time.perf_counter()
    done = command("fastdcgan.train", "--help")
    assert time.perf_counter() - start < 1.5
    assert done.returncode == 0
    for text in (
        "--batch-size",
        "--resume",
        "python -m fastdcgan.train --amp --compile",
        "--preset",
    ):
        assert text in done.stdout
    script = (
        "import sys, fastdcgan, fastdcgan.training, fastdcgan.data\n"
        "from fastdcgan import train, generate\n"
        "assert train.main(['--dry-run', '--batch-size', '0']) == 1\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_a_run_from_the_command_line(train, tmp_path):
    done = train("--steps", "6")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "000-tiny-dcgan32"
    for name in (
        "config.json",
        "metrics.jsonl",
        "netG.safetensors",
        "netD.safetensors",
        "plot.png",
    ):
        assert (out / name).is_file()
    assert re.search(r"\[1/2\]\[1/5\] Loss_D: \d", done.stdout), "the example's line"
    assert "ETA" in done.stdout


def test_the_built_in_data_needs_no_arguments(command, tmp_path):
    """But for --steps: two steps of the full-size nets on the map that the package ships."""
    done = command("fastdcgan.train", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "000-blue-marble-dcgan64"
    assert "data       blue-marble: 1,125 images an epoch" in done.stdout
    with Image.open(out / "samples" / "step-00000002.png") as sheet:
        assert sheet.size == (530, 530), "8 x 8 samples of 64 pixels, 2 between them"
    config = json.loads((out / "config.json").read_text())
    assert (config["batch_size"], config["lr_d"], config["init"]) == (16, 1e-4, "resize")
    assert config["max_minutes"] is None, "steps are given"


def test_a_terminal_gets_a_progress_bar(environment, tiny_data, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fastdcgan.train", "--data", str(tiny_data), *SMALL),
            *("--steps", "20", "--out", "run"),
        ],
        env={**environment, "TERM": "xterm"},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while part := os.read(ours, 4096):
            seen += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "20/20" in text
    assert "Loss_D" in text
    assert "img/s" in text
    assert "Traceback" not in text


def test_amp_and_compile_train_or_say_why_not(train, tmp_path):
    done = train("--steps", "6", "--amp", "--compile", "--out", "run")
    assert done.returncode == 0, done.stderr
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert ("no native bf16 arithmetic" in done.stdout) != capable
    assert "torch.compile does not work" not in done.stdout
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6


def test_without_a_compiler_it_says_so_and_goes_on(train, tmp_path):
    env = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = train("--steps", "6", "--compile", "--out", "run", env=env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "torch.compile does not work" in line]
    assert len(said) == 1
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6


def test_a_line_written_for_the_example_runs(command, tmp_path):
    folder = tmp_path / "photos" / "someone"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 48, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    flags = (
        "--dataset folder --dataroot photos --workers 2 --batchSize 8 --imageSize 32 --nz 6 "
        "--ngf 4 --ndf 4 --niter 2 --lr 0.0002 --beta1 0.5 --ngpu 1 --outf out --manualSeed 7"
    )
    done = command("fastdcgan.train", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["data"], config["seed"], config["epochs"]) == ("photos", 7, 2)
    assert read_metrics(tmp_path / "out")[-1]["step"] == 6
    torch.save(load_file(tmp_path / "out" / "netG.safetensors"), tmp_path / "netG_epoch_1.pth")
    again = command(
        "fastdcgan.train",
        *flags.replace("--outf out", "--outf more --netG=netG_epoch_1.pth --cuda").split(),
        cwd=tmp_path,
    )
    if torch.cuda.is_available():
        assert again.returncode == 0, again.stderr
    else:
        assert "--device cuda was given" in one_line_error(again)


def test_resume_takes_the_run_as_it_was(train, command, tmp_path):
    assert train("--steps", "3", "--out", "run", "--seed", "5").returncode == 0
    more = command("fastdcgan.train", "--resume", "run", "--steps", "5", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "resuming" in more.stdout
    assert read_metrics(tmp_path / "run")[-1]["step"] == 5
    bare = command("fastdcgan.train", "--steps", "6", "--out", "run", "--resume", cwd=tmp_path)
    assert bare.returncode == 0, bare.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6
    longer = command("fastdcgan.train", "--resume", "run", "--epochs", "2", cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] == 10
    refused = command("fastdcgan.train", "--resume", "run", "--nz", "7", cwd=tmp_path)
    assert "--nz: 6 -> 7" in one_line_error(refused)


def test_a_dry_run_prints_the_plan(train, tmp_path):
    done = train("--dry-run", "--amp", "--compile")
    assert done.returncode == 0, done.stderr
    for word in ("device", "precision", "compile", "nets", "data", "125 steps", "memory"):
        assert word in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "empty"], "empty"),
        (["--data", "notes.txt"], "notes.txt"),
        (["--image-size", "50"], "--image-size 50 was given; the DCGAN nets make"),
        (["--batch-size", "64"], "a batch of 64 was asked for"),
        (["--device", "abacus"], "--device abacus was given"),
        (["--device", "cuda:99"], "--device cuda:99 was given"),
        (["--out", "notes.txt/run"], "cannot write"),
        (["--out", "/proc/run"], "cannot write"),
        (["--cache", "/proc/cache"], "/proc/cache"),
        (["--resume", "nowhere"], "there is no such run"),
        (["--resume", "notes.txt"], "damaged"),
        (["--init-g", "other.pth"], "expected"),
        (["--init-g", "notes.txt"], "notes.txt"),
        (["--lr", "0"], "--lr 0.0 was given"),
        (["--preset", "best"], "unknown preset"),
        (["--dataset", "celeba"], "--dataset celeba was given"),
        (["--impl", "triton"], "--impl triton was given; there are no Triton kernels for cpu"),
        (["--cuda-graph", "on"], "--cuda-graph on was given; CUDA graphs are for CUDA devices"),
    ],
)
def test_bad_input_is_one_clear_line(tiny_data, tmp_path, monkeypatch, capsys, args, message):
    """In this process, for there are many; the next test does the same in one of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image\n")
    torch.save({"main.0.weight": torch.zeros(6, 8, 4, 4)}, tmp_path / "other.pth")
    status = main(["--data", str(tiny_data), *SMALL, "--steps", "1", *args])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1
    assert len(errors) == 1
    assert message in errors[0]


def test_an_unknown_implementation_in_the_environment(tiny_data, monkeypatch, capsys):
    monkeypatch.setenv("FASTDCGAN_IMPL", "fast")
    assert main(["--data", str(tiny_data), *SMALL, "--dry-run"]) == 1
    assert "FASTDCGAN_IMPL='fast' was given" in capsys.readouterr().err


def test_a_missing_folder_in_a_process_of_its_own(train):
    assert "nowhere" in one_line_error(train("--data", "nowhere"))


@pytest.fixture
def training(start, tiny_data, tmp_path):
    """A training that runs: training("--steps", "9")."""
    return lambda *args: start("fastdcgan.train", "--data", tiny_data, *SMALL, *args, cwd=tmp_path)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_0(training, tmp_path, number):
    process = training("--steps", "1000000", "--out", "run")
    wait_for(tmp_path / "run" / "samples" / "step-00000005.png", process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "go on with: python -m fastdcgan.train --resume run" in stdout
    assert checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").newest() is not None


def test_a_second_signal_leaves_at_once(training, tmp_path):
    """One step of a batch of 36 at 256 pixels takes seconds: the first signal waits for it."""
    args = ["--image-size", "256", "--batch-size", "36", "--ngf", "16", "--ndf", "16"]
    process = training(*args, "--out", "run", "--steps", "50")
    wait_for(tmp_path / "run" / "samples" / "step-00000001.png", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None, "the first one lets the step finish"
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - sent < 2


def test_killed_at_random_it_always_resumes(training, train, tmp_path):
    """And at the end it is, to the last bit, the run that was never killed."""
    moments = random.Random(0)
    every = 5
    folder = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints")
    args = ["--resume", "auto", "--out", "run", "--checkpoint-every", str(every)]
    reached = 0
    for kill in range(8):
        process = training(*args, "--steps", "1000000")
        # Half of them right after a step is known to have been made, half at any time at all.
        if kill % 2:
            rows = tmp_path / "run" / "metrics.jsonl"
            wait_for(rows, process)
            before = rows.stat().st_size
            while rows.stat().st_size <= before:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.3))
        else:
            time.sleep(moments.uniform(0.2, 2.5))
        process.kill()
        process.communicate()
        for path in folder.paths():
            checkpoints.load(path)  # nothing that looks finished is damaged
        steps = [checkpoints.step_of(p) for p in folder.paths()]
        made = (
            max((row["step"] for row in read_metrics(tmp_path / "run")), default=0)
            if (tmp_path / "run" / "metrics.jsonl").exists()
            else 0
        )
        assert max(steps, default=0) >= reached, "no checkpoint is ever lost"
        assert made - max(steps, default=0) <= every, "at most the steps since the last one"
        reached = max(steps, default=0)
    assert reached > 0
    whole, files = folder.paths(), list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(whole) <= 3 + 1 + 1, "the last, the watch's, and an older one on its way out"
    assert len(files) - len(whole) <= 1, "what the last kill cut off"
    total = str(reached + 7)
    done = train(*args, "--steps", total)
    assert done.returncode == 0, done.stderr
    assert f"at step {reached}\n" in done.stdout
    leftovers = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert leftovers == {p.name for p in folder.paths()}, "half-written files are cleared away"
    assert train("--out", "whole", "--steps", total).returncode == 0
    for name in ("netG", "netG_ema", "netD"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("run", "whole"))
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_full_disk_is_said_and_damages_nothing(start, train, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle as there."""
    assert train("--steps", "3", "--out", "run").returncode == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}
    limit = len(next(iter(before.values()))) // 2
    process = start(
        *("fastdcgan.train", "--resume", "run", "--steps", "9", "--checkpoint-every", "4"),
        cwd=tmp_path,
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    printed = process.communicate(60)
    done = subprocess.CompletedProcess(process.args, process.returncode, *printed)
    line = one_line_error(done)
    assert "File too large (run/checkpoints/step-00000004.pt)" in line
    assert "the last good checkpoint is run/checkpoints/step-00000003.pt" in line
    after = {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert after == before
    assert train("--resume", "auto", "--out", "run", "--steps", "4").returncode == 0


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastdcgan.train")


def test_two_ranks_equal_one_with_twice_the_batch(command, tiny_data, train, tmp_path):
    """With BatchNorm over both ranks, and a ragged batch of 5 that gives them 3 and 2 images. A
    large epsilon keeps Adam from magnifying the last bits."""
    images = np.load(tiny_data)
    np.save(tmp_path / "odd.npy", np.concatenate([images, images[:1]]))
    args = [*("--data", "odd.npy", *SMALL, "--adam-eps", "1e-3", "--lr", "2e-3", "--steps")]
    two = ["5", "--batch-size", "4", "--sync-bn", "--out", "two"]
    done = command(*TORCHRUN, *args, *two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writing to two") == 1, "one writer"
    assert "2 processes" in done.stdout
    assert train(*args, "5", "--out", "one").returncode == 0
    assert train(*args, "1", "--out", "start").returncode == 0
    for name in ("netG", "netD"):
        one, two, start = (
            load_file(tmp_path / run / f"{name}.safetensors") for run in ("one", "two", "start")
        )
        assert one.keys() == two.keys()
        apart, moved = (
            max(
                float((a[k].double() - one[k].double()).abs().max()) for k in one if "num_" not in k
            )
            for a in (two, start)
        )
        assert apart < moved / 100, "apart by rounding, against four steps of training"
    a, b = (read_metrics(tmp_path / run)[-1] for run in ("one", "two"))
    assert (a["step"], a["epoch"]) == (b["step"], b["epoch"]) == (5, 1)
    for name in ("loss_d", "loss_g", "d_real"):
        assert a[name] == pytest.approx(b[name], abs=2e-3)
    # One process goes on with what two began: the global batch is the same.
    more = train(*args, "6", "--resume", "auto", "--out", "two", "--sync-bn")
    assert more.returncode == 0, more.stderr


def test_two_ranks_without_sync_bn_train_on_different_images(command, tmp_path, tiny_data):
    done = command(
        *TORCHRUN, *("--data", tiny_data, *SMALL, "--steps", "12", "--out", "run"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12
    assert "3 an epoch" in done.stdout, "36 images in global batches of 16"


def test_a_signal_to_torchrun_stops_all_ranks_at_the_same_step(start, tmp_path, tiny_data):
    process = start(
        *TORCHRUN,
        *("--data", tiny_data, *SMALL, "--steps", "1000000", "--out", "run"),
        cwd=tmp_path,
    )
    wait_for(tmp_path / "run" / "samples" / "step-00000003.png", process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert "go on with: python -m fastdcgan.train --resume run" in stdout, stderr
    saved = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert saved is not None
    assert saved[1]["step"] % 10 == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(train, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write" in one_line_error(train("--out", "locked/run"))
