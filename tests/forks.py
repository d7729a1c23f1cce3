"""`python -m MODULE ARGS...` without the 5 s of CPU that the import of PyTorch takes: this file, as
a process of its own, imports it once, and each command is a fork of that process. What a command is
told comes after the fork (arguments, folder, where to print), and it ends as any Python does."""

import contextlib
import gc
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection


class Forks:
    """The process to fork from, in `environment`, with which its commands begin, too."""

    def __init__(self, environment):
        self.connection, other = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            env=environment, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()],
        )  # fmt: skip
        other.close()

    def run(self, command, cwd, outputs, timeout):
        """As `subprocess.run` does with `capture_output` and `text`; what the command prints goes
        through two files in the folder `outputs`."""
        files = outputs / "stdout", outputs / "stderr"
        self.connection.send((command, cwd, files))
        child = self.connection.recv()
        if late := not self.connection.poll(timeout):
            os.kill(child, signal.SIGKILL)
        status = self.connection.recv()
        printed = [file.read_text() for file in files]
        if late:
            raise subprocess.TimeoutExpired(command, timeout, *printed)
        return subprocess.CompletedProcess(command, status, *printed)

    def end(self):
        self.connection.close()
        self.process.wait()


def requests(connection):
    """The next request, in a fork of this process, which gives none and ends with the tests'."""
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            child = os.fork()
            if child == 0:
                connection.close()
                return [request]
            connection.send(child)
            connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return []


def main():
    import torch._dynamo  # noqa: F401  (the first operator and the first optimiser import it)

    gc.freeze()  # so that collections in the forks do not copy all that was imported
    for command, cwd, files in requests(Connection(int(sys.argv[1]))):
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
