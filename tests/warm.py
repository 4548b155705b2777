"""Python programs that start at once: forks of a process that has imported the libraries, which takes three seconds.

A program finds what it finds when a person types `python`: its own folder, arguments, variables, and nothing of ours.
Where a system cannot fork, it starts as any other process.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = "forkserver" in multiprocessing.get_all_start_methods()
processes = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    processes.set_forkserver_preload(["torch", "einops", "matplotlib.figure", "PIL.Image", "tqdm"])


def _become(arguments, cwd, env, stdout, stderr, session):
    """What the new process does."""
    for number, name in ((1, stdout), (2, stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in env:
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    ours = lambda path: Path(path).is_relative_to(ROOT) and "site-packages" not in path  # pytest has put it there
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if path and not ours(path))]
    first, *sys.argv = arguments
    if first == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


class Popen:
    """subprocess.Popen of `python *arguments`, with a script or -m MODULE; what it prints is added to named files."""

    def __init__(self, arguments, cwd, env, stdout=os.devnull, stderr=os.devnull, start_new_session=False):
        how = [str(word) for word in arguments], str(cwd), env, str(stdout), str(stderr), start_new_session
        self.process = processes.Process(target=_become, args=how)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=120):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str


def run(*arguments, cwd, env):
    """Runs `python *arguments` in a folder to its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "stdout", Path(folder) / "stderr"
        process = Popen(arguments, cwd, env, *files)
        try:
            process.wait()
        finally:
            process.kill()
        return Result(process.returncode, *(file.read_text() for file in files))
