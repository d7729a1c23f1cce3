"""`python -m MODULE ARGS...` without the 5 s of CPU that the import of PyTorch takes: this file, as
a process of its own, imports it once, and each command is a fork of that process. What a command is
told comes after the fork (arguments, folder, where to print), and it ends as any Python does."""

import contextlib
import functools
import gc
import os
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection


class Forks:
    """The process to fork from, in `environment`, with which its commands begin, too. What they
    print goes through files in the folder `outputs`."""

    def __init__(self, environment, outputs):
        self.environment, self.outputs = environment, outputs
        self.commands = []  # all that were started; the process knows them by their place here

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
        self.forks, self.args = forks, argv
        self.pid = self.returncode = None
        number = len(forks.commands)
        self.files = [forks.outputs / f"{number}-{name}" for name in ("stdout", "stderr")]
        forks.commands.append(self)
        forks.connection.send((number, argv, cwd, self.files))
        self._hear("pid", None)

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        self._hear("returncode", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(file.read_text() for file in self.files)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _hear(self, name, timeout):
        """Returns when this attribute is known; what is said of other commands is kept for them.

        Raises:
            subprocess.TimeoutExpired: it is not, after `timeout` seconds (None: it will be).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while getattr(self, name) is None:
            left = None if timeout is None else max(0, deadline - time.monotonic())
            if not self.forks.connection.poll(left):
                raise subprocess.TimeoutExpired(self.args, timeout)
            number, said, value = self.forks.connection.recv()
            setattr(self.forks.commands[number], said, value)


def request(connection):
    """What a fork of this process is to do; in this one None, when the tests have ended."""
    running = {}
    while True:
        if connection.poll(0.01 if running else None):
            try:
                number, *asked = connection.recv()
            except EOFError:
                for child in running:
                    os.kill(child, signal.SIGKILL)
                return None
            child = os.fork()
            if child == 0:
                connection.close()
                return asked
            running[child] = number
            connection.send((number, "pid", child))
        for child in [*running]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(status)
                connection.send((running.pop(child), "returncode", status))


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
