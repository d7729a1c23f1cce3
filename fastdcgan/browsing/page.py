"""The page: Gradio's components around what a `Studio` gives. Not here: nets (studio.py), what a
run has written (written.py), the server (serving.py)."""

import os
import tempfile
from collections.abc import Callable
from functools import wraps
from math import ceil
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from fastdcgan.browsing import written
from fastdcgan.browsing.studio import LIMITS, Sample, Studio
from fastdcgan.data.picture import Pixels, grid
from fastdcgan.data.video import save_video
from fastdcgan.errors import InputError
from fastdcgan.latent.sheets import numbered_grid

WIDTH = 720
"""About the pixels that a picture is enlarged to: browsers would blur it."""
CANVAS = 512
"""The same for the one that is painted on."""
BRUSH = 40
"""Its width in these pixels."""
SECONDS = 3.0
"""Between two looks at a run's folder."""
BESIDE = 18
"""Pixels between the images of a numbered grid."""
FPS = 12.0
"""Of an animation."""
REACH = 4.0
"""Standard deviations on either side of a direction's slider."""

THEME = gr.themes.Default(
    primary_hue="blue",
    # Fonts of the reader's own system: none is asked for.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { max-width: 76rem !important; margin: 0 auto; }
.fillable { width: 100%; padding: 1rem !important; }
.note { font-size: .85rem; opacity: .7; }
#title h1 { margin-bottom: 0; }
#title p { margin-top: .25rem; opacity: .7; }
"""

PLAIN: dict[str, Any] = {
    **{"format": "png", "interactive": False, "show_label": False},
    "buttons": ["fullscreen", "download"],
}
"""A picture that loses nothing, with no words over it."""


def build(studio: Studio, *, seed: int = 0) -> Any:
    """The page of a studio's run, a `gr.Blocks`. Every tab is an endpoint of its API as well:
    /draw, /move, /walk, /fill and /watch.

    Args:
        studio: is asked by several threads.
        seed: that every tab begins with.
    """
    title = f"{studio.name} · fastdcgan"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        header = gr.Markdown(elem_id="title")

        def head() -> str:
            studio.refresh()
            return f"# {studio.name}\n{studio.facts()}"

        # What draws when the page is loaded waits for the newest generator.
        loaded = page.load(head, None, header, api_visibility="private")
        with gr.Tab("Draw"):
            _draw(loaded, studio, seed)
        with gr.Tab("Directions"):
            _directions(loaded, studio, seed)
        with gr.Tab("Walk"):
            _walk(loaded, studio, seed)
        with gr.Tab("Inpaint") as tab:
            _inpaint(tab, studio, seed)
        if studio.folder is not None:
            with gr.Tab("Training"):
                _watch(loaded, studio.folder)
    return page


def _draw(loaded: Any, studio: Studio, seed: int) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            seeds = _integer("Seed", seed, "seed")
            n = gr.Slider(1, LIMITS["n"][1], 64, step=1, label="Images")
            truncation = gr.Slider(0.1, 1, 1, step=0.05, label="Truncation")
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3):
            sheet = gr.Image(elem_id="samples", **PLAIN)

    @_told
    def draw(seed: int, n: int, truncation: float) -> Pixels:
        images = studio.draw(int(seed), int(n), truncation)
        return numbered_grid(enlarged(images, WIDTH // ceil(n**0.5) - BESIDE))

    inputs = [seeds, n, truncation]
    gr.on(
        [button.click, seeds.submit, n.release, truncation.release],
        draw, inputs, sheet, api_name="draw",
    )  # fmt: skip
    loaded.then(draw, inputs, sheet, api_visibility="private")


def _directions(loaded: Any, studio: Studio, seed: int) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            seeds, number = _sample("", seed)
            sliders = [
                gr.Slider(-REACH, REACH, 0, step=0.1, label=f"{k}: {share:.0%}")
                for k, share in enumerate(studio.directions.shares.tolist(), start=1)
            ]
            gr.Markdown(
                "Along the principal directions of the first layer, in standard deviations of z; "
                "beside each its share of that layer's variance.", elem_classes="note",
            )  # fmt: skip
            reset = gr.Button("Back to 0")
        with gr.Column(scale=3), gr.Row():
            before = gr.Image(elem_id="before", **PLAIN)
            after = gr.Image(elem_id="after", **PLAIN)

    @_told
    def move(seed: int, number: int, *amounts: float) -> list[Pixels]:
        images = studio.move(Sample(int(seed), int(number)), amounts)
        return [shown(image) for image in enlarged(images, WIDTH // 2)]

    inputs, outputs = [seeds, number, *sliders], [before, after]
    gr.on(
        [seeds.submit, number.submit, *(slider.input for slider in sliders)],
        move, inputs, outputs, api_name="move", trigger_mode="always_last",
        show_progress="hidden",
    )  # fmt: skip
    loaded.then(move, inputs, outputs, api_visibility="private")
    zeros = [0.0] * len(sliders)
    reset.click(lambda: zeros, None, sliders, api_visibility="private", queue=False).then(
        move, inputs, outputs, api_visibility="private"
    )


def _walk(loaded: Any, studio: Studio, seed: int) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            start = _sample("From ", seed)
            end = _sample("To ", seed, number=1)
            steps = gr.Slider(*LIMITS["steps"], 15, step=1, label="Steps")
            kind = gr.Radio(["Strip", "Animation"], value="Strip", show_label=False)
            button = gr.Button("Walk", variant="primary")
        with gr.Column(scale=3):
            picture = gr.Image(elem_id="walk", **PLAIN)

    os.makedirs(get_upload_folder(), exist_ok=True)  # it is removed with what visitors upload
    folder = tempfile.mkdtemp(dir=get_upload_folder())

    @_told
    def walk(
        seed_a: int, number_a: int, seed_b: int, number_b: int, steps: int, kind: str
    ) -> str | Pixels:
        a, b = Sample(int(seed_a), int(number_a)), Sample(int(seed_b), int(number_b))
        images = studio.walk(a, b, int(steps))
        if kind == "Strip":
            columns = min(len(images), 8)
            return shown(grid(enlarged(images, WIDTH // columns), columns))
        path = Path(folder) / f"{a.seed}-{a.number}-{b.seed}-{b.number}-{steps}.gif"
        there_and_back = np.concatenate([images, images[-2:0:-1]])
        save_video(path, enlarged(there_and_back, WIDTH // 2), FPS)
        return str(path)

    inputs = [*start, *end, steps, kind]
    gr.on(
        [button.click, kind.input, steps.release, *(n.submit for n in (*start, *end))],
        walk, inputs, picture, api_name="walk",
    )  # fmt: skip
    loaded.then(walk, inputs, picture, api_visibility="private")


def _inpaint(tab: gr.Tab, studio: Studio, seed: int) -> None:
    with gr.Row():
        with gr.Column(min_width=360):
            editor = gr.ImageEditor(
                label="Paint over a part", elem_id="editor", format="png", image_mode="RGBA",
                sources=["upload", "clipboard"], layers=False, transforms=(), buttons=[],
                brush=gr.Brush(default_size=BRUSH, colors=["#ff3b6b"], color_mode="fixed"),
                eraser=gr.Eraser(default_size=BRUSH), canvas_size=(CANVAS, CANVAS),
                height=CANVAS,
            )  # fmt: skip
            with gr.Row():
                another = gr.Button("Another image")
                button = gr.Button("Fill", variant="primary")
        with gr.Column(min_width=360):
            filled = gr.Image(elem_id="filled", height=CANVAS, **PLAIN)
            with gr.Row():
                steps = gr.Slider(0, 500, 150, step=10, label="Steps", scale=2)
                seeds = _integer("Seed", seed, "seed")
    current = gr.State(-1)

    @_told
    def picture(number: int) -> tuple[Any, int, None]:
        image = shown(enlarged(studio.picture(number + 1)[None], CANVAS)[0])
        return {"background": image, "layers": [], "composite": None}, number + 1, None

    # Not when the page loads: packing the data may take a while, and a canvas that is hidden has no
    # size.
    outputs = [editor, current, filled]
    tab.select(
        lambda number: picture(number) if number < 0 else (gr.skip(),) * 3,
        current, outputs, api_visibility="private",
    )  # fmt: skip
    another.click(picture, current, outputs, api_visibility="private")

    @_told
    def fill(
        painted: Any,
        steps: int,
        seed: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Pixels:
        if painted is None or painted["background"] is None:
            raise InputError("there is no image yet: take another, or drop one on the canvas")
        image, hole = studio.prepare(painted["background"], painted["layers"])
        total, done = studio.rounds(int(steps)), 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            progress((done, total), desc="filling", unit="steps")

        result = studio.fill(image, hole, steps=int(steps), seed=int(seed), advance=advance)
        return shown(enlarged(result.images, CANVAS)[0])

    button.click(fill, [editor, steps, seeds], filled, api_name="fill")


def _watch(loaded: Any, folder: Path) -> None:
    with gr.Row():
        with gr.Column():
            sheet = gr.Image(elem_id="newest", **PLAIN)
            caption = gr.Markdown("no samples yet", elem_classes="note")
        with gr.Column():
            plot = gr.Image(elem_id="curves", **PLAIN | {"buttons": []})
    seen = gr.State(())

    def watch(seen: tuple[int, ...]) -> Any:
        now = written.stamp(folder)
        if now == tuple(seen):
            return (gr.skip(),) * 4
        newest = written.newest_samples(folder)
        if newest is None:
            return gr.skip(), gr.skip(), written.curves(folder), now
        step, samples = newest
        line = f"The newest samples, of step {step:,}; this page looks every {SECONDS:g} seconds."
        return shown(enlarged(samples[None], WIDTH)[0]), line, written.curves(folder), now

    outputs = [sheet, caption, plot, seen]
    gr.Timer(SECONDS).tick(watch, seen, outputs, api_name="watch", show_progress="hidden")
    loaded.then(watch, seen, outputs, api_visibility="private")


def _integer(label: str, value: int, limits: str) -> gr.Number:
    least, most = LIMITS[limits]
    return gr.Number(value, label=label, precision=0, minimum=least, maximum=most, min_width=80)


def _sample(which: str, seed: int, number: int = 0) -> tuple[gr.Number, gr.Number]:
    """The two numbers by which an image is known."""
    with gr.Row():
        return (
            _integer(f"{which}seed".capitalize(), seed, "seed"),
            _integer("Image", number, "number"),
        )


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    """What the user can mend becomes a message on the page."""

    @wraps(call)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return told


def enlarged(images: Pixels, side: int) -> Pixels:
    """Each pixel of (N, H, W, C) as a square, so large that W comes near to `side`."""
    factor = max(1, round(side / images.shape[2]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def shown(image: Pixels) -> Pixels:
    """(H, W, C) as Gradio takes it: grey without a last dimension, grey with alpha as RGBA."""
    channels = image.shape[2]
    return image[..., 0] if channels == 1 else image[..., [0, 0, 0, 1]] if channels == 2 else image
