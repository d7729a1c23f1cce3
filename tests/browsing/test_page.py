"""The gallery as its users have it: the command serves a run, and a real browser without a screen
clicks through every tab."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gallery_picture import browser_page, chromium, paint, tab
from fastdcgan import models
from fastdcgan.data.picture import to_uint8
from fastdcgan.data.selection import select
from fastdcgan.latent.draw import latents_numbered, load_generator
from fastdcgan.training import TrainConfig, train
from fastdcgan.training.checkpoints import save_weights


@pytest.fixture
def run(tiny_data, tmp_path):
    sizes = {"image_size": 32, "nz": 12, "ngf": 8, "ndf": 8, "batch_size": 12, "steps": 60}
    quick = {"lr": 0.01, "ema": False, "tensorboard": False}  # images that differ, soon
    config = TrainConfig(data=str(tiny_data), out=tmp_path / "tiny", **sizes, **quick)
    return train(config).out


@pytest.fixture
def outside():
    """A proxy that nobody should ask for anything: its address, and who did."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []

        def listen():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    asked.append(client.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


@pytest.fixture
def gallery(run, environment, outside):
    """The address of the run's page."""
    if chromium() is None:
        if "CI" in os.environ:
            pytest.fail("no Chromium here: the gate installs Debian's")
        pytest.skip("needs Chromium, as Debian's package chromium")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), outside[0])
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdcgan.gallery", "--from", run, "--port", "0"],
        env={**environment, **proxies}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("tiny: http://127.0.0.1:"), process.stderr.read()
        yield line.split()[1]
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=30)
        assert (process.returncode, said, errors) == (0, "ended\n", "")
    finally:
        process.kill()
    assert outside[1] == []


def address(page, where):
    return page.locator(f"{where} img").get_attribute("src")


def pixels(page, where):
    """The picture in this place, as it left the server."""
    content = page.request.get(address(page, where)).body()
    with Image.open(BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def another(page, where, old):
    """Waits for another picture than that of this address."""
    page.wait_for_function(
        "([where, old]) => ![null, old].includes(document.querySelector(where)?.src ?? null)",
        arg=[f"{where} img", old],
    )  # fmt: skip


def drawn(run, seed, numbers, along=0.0):
    """Samples as plain PyTorch draws them: (N, 32, 32, 3)."""
    net = load_generator(run)
    z = latents_numbered(numbers, net.nz, seed=seed)
    return to_uint8(models.sample(net, z + along)).astype(int)


def small(picture, factor):
    """Undoes an enlargement, which must have been one."""
    found = picture[::factor, ::factor]
    assert np.array_equal(found.repeat(factor, 0).repeat(factor, 1), picture)
    return found


def test_a_user_clicks_through_every_tab(run, gallery, tiny_data):
    with browser_page() as page:
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text)
                if message.type == "error" else None)  # fmt: skip
        page.goto(gallery)
        page.get_by_text("step 60 · 32 × 32 pixels · colour").wait_for()
        assert page.title() == "tiny · fastdcgan"
        draw(page, run)
        directions(page, run)
        walk(page, run)
        inpaint(page, run, tiny_data)
        training(page, run)
        newer_nets(page, run)
    assert [url for url in asked if not url.removeprefix("blob:").startswith(gallery)] == []
    assert wrong == []


def draw(page, run):
    first = address(page, "#samples")
    sheet = pixels(page, "#samples")
    expected = drawn(run, 0, [0])[0].repeat(2, 0).repeat(2, 1)
    assert abs(sheet[18 : 18 + 64, 18 : 18 + 64] - expected).max() <= 1
    seed = page.get_by_label("Seed").first
    seed.fill("1")
    page.get_by_role("button", name="Draw").click()
    another(page, "#samples", first)
    second = address(page, "#samples")
    assert not np.array_equal(pixels(page, "#samples"), sheet)
    seed.fill("0")
    page.get_by_role("button", name="Draw").click()
    another(page, "#samples", second)
    assert np.array_equal(pixels(page, "#samples"), sheet)


def directions(page, run):
    tab(page, "Directions")
    before = small(pixels(page, "#before"), 11)
    assert abs(before - drawn(run, 0, [0])[0]).max() <= 1
    old = address(page, "#after")
    assert old == address(page, "#before")
    # The first principal direction, by another way: singular vectors of the folded first layer.
    net = load_generator(run).double()
    scale = net.main[1].weight / (net.main[1].running_var + net.main[1].eps).sqrt()
    matrix = (net.main[0].weight * scale[:, None, None]).flatten(1)
    first = torch.linalg.svd(matrix.detach(), full_matrices=False).U[:, 0].float()
    first *= first[first.abs().argmax()].sign()
    page.get_by_role("slider", name="1: ").first.fill("3")
    another(page, "#after", old)
    after = small(pixels(page, "#after"), 11)
    assert abs(after - drawn(run, 0, [0], along=3 * first)[0]).max() <= 1
    assert abs(after - before).max() > 20
    moved = address(page, "#after")
    page.get_by_role("button", name="Back to 0").click()
    another(page, "#after", moved)
    assert address(page, "#after") == old


def walk(page, run):
    tab(page, "Walk")
    strip = pixels(page, "#walk")
    ends = drawn(run, 0, [0, 1])
    side, gap = 96, 2
    assert strip.shape == (2 * (side + gap) + gap, 8 * (side + gap) + gap, 3)
    last = [slice(1 * (side + gap) + gap, -gap), slice(7 * (side + gap) + gap, -gap)]
    assert abs(small(strip[gap : gap + side, gap : gap + side], 3) - ends[0]).max() <= 1
    assert abs(small(strip[tuple(last)], 3) - ends[1]).max() <= 1
    old = address(page, "#walk")
    page.get_by_label("Animation").click()
    another(page, "#walk", old)
    with Image.open(BytesIO(page.request.get(address(page, "#walk")).body())) as film:
        assert (film.format, film.n_frames) == ("GIF", 30)


def inpaint(page, run, data):
    tab(page, "Inpaint")
    page.locator("#editor canvas").first.wait_for()
    page.wait_for_timeout(1000)  # no sign tells when the canvas takes the brush
    paint(page, [(0.3, 0.5, 0.7, 0.5)])
    page.get_by_role("button", name="Fill").click()
    page.get_by_text("filling").first.wait_for()
    filled = small(pixels(page, "#filled"), 16)
    truth = select(str(data), size=32, channels=3, n=1, progress=False).images[0]
    different = (filled != truth).any(-1)
    rows, columns = np.nonzero(different)
    assert different.sum() > 40
    assert (rows.min(), rows.max()) >= (12, 12)
    assert rows.max() <= 19
    assert columns.min() >= 6
    assert columns.max() <= 25


def training(page, run):
    tab(page, "Training")
    sheet = np.asarray(Image.open(run / "samples" / "step-00000060.png").convert("RGB"))
    page.get_by_text("of step 60").wait_for()
    assert np.array_equal(pixels(page, "#newest")[::3, ::3][: len(sheet)], sheet)
    curve, newest = address(page, "#curves"), address(page, "#newest")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[-1]) | {"step": 61, "loss_g": 20.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    Image.fromarray(255 - sheet).save(run / "samples" / "step-00000061.png")
    another(page, "#curves", curve)
    another(page, "#newest", newest)
    page.get_by_text("of step 61").wait_for()


def newer_nets(page, run):
    old = address(page, "#samples")
    torch.manual_seed(1)
    netG, _ = models.build("dcgan", size=32, nz=12, ngf=8, ndf=8, channels=3)
    save_weights(netG, run / "netG.safetensors", step=99)
    page.reload()
    page.get_by_text("step 99 · ").wait_for()
    another(page, "#samples", old)
