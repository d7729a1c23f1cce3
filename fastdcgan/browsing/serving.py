"""Serves the page of a run until somebody ends it, and leaves nothing behind. Not here: the
page."""

import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdcgan.browsing.studio import LIMITS, Studio
from fastdcgan.errors import InputError
from fastdcgan.training.interrupts import Interrupts

HOST, PORT = "127.0.0.1", 7860
"""This machine alone, and Gradio's own port."""


def show(
    source: Path,
    *,
    host: str = HOST,
    port: int = PORT,
    images: str | None = None,
    seed: int = 0,
    amp: bool = False,
    ema: bool = True,
    device: str = "auto",
    cache: Path | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Serves the page of a run until SIGINT (Ctrl-C) or SIGTERM.

    Args:
        source, images, amp, ema, device, cache: see `Studio`.
        host, port, seed: see `serve`.
        say: is called with a line for people when the page can be opened, and at the end.

    Raises:
        InputError: something of this is not there or cannot be.
    """
    if not LIMITS["seed"][0] <= seed <= LIMITS["seed"][1]:
        raise InputError(f"--seed {seed} was given; it must be from 0 to {LIMITS['seed'][1]:,}")
    port = _free(host, port)  # before the nets are loaded
    studio = Studio(source, images=images, amp=amp, ema=ema, device=device, cache=cache)
    with Interrupts() as interrupts:
        with serve(studio, host=host, port=port, seed=seed) as url:
            say(f"{studio.name}: {url} (Ctrl-C ends)")
            while not interrupts.seen:
                time.sleep(0.1)
        say("ended")


@contextmanager
def serve(studio: Studio, *, host: str = HOST, port: int = 0, seed: int = 0) -> Iterator[str]:
    """The page of a studio, for as long as the `with` lasts. Nothing is reported to Gradio's
    makers, no public link is made, and what visitors upload is removed at the end.

    Args:
        host: the address to listen at; every other than this machine's own lets in whoever reaches
            it, without a password.
        port: 0: any that is free.
        seed: that every tab begins with.

    Yields:
        The page's address.

    Raises:
        InputError: the host is not this machine's, or the port is taken.
    """
    port = _free(host, port)
    local = ",".join(filter(None, [os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), host]))
    with (
        tempfile.TemporaryDirectory(prefix="fastdcgan-gallery-") as folder,
        _environment(GRADIO_ANALYTICS_ENABLED="0", GRADIO_TEMP_DIR=folder, no_proxy=local),
    ):
        from fastdcgan.browsing import page

        built = page.build(studio, seed=seed)
        logging.getLogger("uvicorn.error").addFilter(_matters)
        try:
            built.launch(
                server_name=f"[{host}]" if ":" in host else host, server_port=port, quiet=True,
                share=False, prevent_thread_lock=True, inline=False, ssr_mode=False, pwa=False,
                mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[],
                theme=page.THEME, css=page.CSS,
            )  # fmt: skip
        except OSError as error:  # somebody took the port in between
            raise InputError(f"cannot listen at {host}:{port}: {error}") from None
        try:
            yield str(built.local_url)
        finally:
            built.close(verbose=False)


def _matters(record: logging.LogRecord) -> bool:
    """Not that a visitor closed the page while it was sending: uvicorn reports that as an error."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "ClientDisconnect"


def _free(host: str, port: int) -> int:
    """The port, or for 0 any that nobody listens at."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} was given; it must be from 0 (any) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            if sys.platform != "win32":  # there it would let two listen at one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            found: int = listener.getsockname()[1]
            return found
    except socket.gaierror:
        raise InputError(f"--host {host} was given; there is no such address") from None
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror}): give another --port, or 0 for any "
            "that is free"
        ) from None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """These variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
