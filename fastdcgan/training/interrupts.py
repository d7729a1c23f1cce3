"""SIGINT and SIGTERM while a run trains: the first asks it to stop, the second ends the process."""

import os
import signal
import socket
import threading
from typing import Any


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a flag, and lets a second end the process at once.

    Python runs its handlers between two lines of Python, and a backward pass is one line: two
    signals during it would be seen as one, and late. So the signals are counted by a thread of
    their own, woken through the file descriptor to which the interpreter writes each of them.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.seen = False
        self._previous: list[Any] = []

    def __enter__(self) -> "Interrupts":
        # Python lets only the main thread say what signals do.
        if threading.current_thread() is threading.main_thread():
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(
                self._writer.fileno(), warn_on_full_buffer=False
            )
            self._previous = [signal.signal(n, lambda number, frame: None) for n in self.NUMBERS]
            threading.Thread(target=self._count, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous:
            for number, handler in zip(self.NUMBERS, self._previous, strict=True):
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            self._writer.close()

    def _count(self, reader: socket.socket) -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] in self.NUMBERS:
                    if self.seen:
                        os._exit(128 + number[0])
                    self.seen = True
