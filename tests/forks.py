"""`python -m MODULE ARGS...` without the 5 s of CPU that the import of PyTorch takes: this file, as
a process of its own, imports it once, and each command is a fork of that process. What a command is
told comes after the fork (arguments, folder, where to print), and it ends as any Python does."""

import contextlib
import functools
import gc
import itertools
import os
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait


class Forks:
    """The process to fork from, in `environment`, with which its commands begin, too. What they
    print goes through files in the folder `outputs`."""

    def __init__(self, environment, outputs):
        self.environment, self.outputs = environment, outputs
        self.numbers = itertools.count()
        self.said = {}  # of each command, by its number: its process, then its exit status

    @functools.cached_property
    def connection(self):
        ours, other = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            env=self.environment, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()],
        )  # fmt: skip
        other.close()
        return ours

    def run(self, command, cwd, timeout):
        """As `subprocess.run` does with `capture_output` and `text`."""
        process = Command(self, command, cwd)
        try:
            printed = process.communicate(timeout)
        except BaseException as stopped:
            process.kill()
            if isinstance(stopped, subprocess.TimeoutExpired):
                stopped.output, stopped.stderr = process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, *printed)

    def end(self):
        """Ends what still runs."""
        if "connection" in vars(self):
            self.connection.close()
            self.process.wait()


class Command:
    """A command that runs, as `subprocess.Popen` has it with `text` and pipes."""

    def __init__(self, forks, argv, cwd):
        self.forks, self.args, self.returncode = forks, argv, None
        self.number = next(forks.numbers)
        self.files = [forks.outputs / f"{self.number}-{name}" for name in ("stdout", "stderr")]
        forks.said[self.number] = self.said = []
        forks.connection.send((self.number, argv, cwd, self.files))
        self._hear(1, None)
        self.pid = self.said[0]

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        self._hear(2, timeout)
        self.returncode = self.said[1]
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(file.read_text() for file in self.files)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _hear(self, words, timeout):
        """Returns when this command has said so much; what others say meanwhile is theirs.

        Raises:
            subprocess.TimeoutExpired: it has not, after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while len(self.said) < words:
            left = None if timeout is None else max(0, deadline - time.monotonic())
            if not self.forks.connection.poll(left):
                raise subprocess.TimeoutExpired(self.args, timeout)
            number, word = self.forks.connection.recv()
            self.forks.said[number].append(word)


def request(connection):
    """What a fork of this process is to do; in this one None, when the tests have ended."""
    running = {}
    while True:
        for ready in wait([connection, *running]):
            if ready is not connection:
                number, child = running.pop(ready)
                os.close(ready)
                connection.send((number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
                continue
            try:
                number, *asked = connection.recv()
            except EOFError:
                for _, child in running.values():
                    os.kill(child, signal.SIGKILL)
                return None
            child = os.fork()
            if child == 0:
                connection.close()
                return asked
            running[os.pidfd_open(child)] = number, child
            connection.send((number, child))


def main():
    import torch._dynamo  # noqa: F401  (the first operator and the first optimiser import it)

    gc.freeze()  # so that collections in the forks do not copy all that was imported
    asked = request(Connection(int(sys.argv[1])))
    if asked is None:
        return
    command, cwd, files = asked
    os.chdir(cwd)
    sys.path[0] = os.getcwd()  # in place of this file's folder
    for descriptor, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
