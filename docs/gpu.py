"""What a GPU does: `python docs/gpu.py`, or names of some of its experiments. It runs on a CPU too, but not in minutes.

Adds lines to docs/gpu.csv after each measurement, and leaves out those that are there. Checkpoints and pictures of the
experiments `paper` and `lesson` go to --output as well, a folder each.
"""

import gc
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import origin
from compare import SAMPLERS, bits, read_options, score
from techniques import Table

from common.bench import time_round
from common.checkpoint import load_lesson, load_network
from common.cli import run
from common.config import check_range
from common.errors import LessonError
from common.images import save_grid
from common.machine import choose_device
from common.play import sample_all


def speed(name: str, table: Table, options: Namespace) -> None:
    """Images a second in training, network calls for an image a second in sampling, and gigabytes of the GPU."""
    for preset in ("smoke",) if table.smoke else ("lesson run", "paper"):
        for _ in table.missing(f"{name}, {preset}", [0]):
            for _ in range(2):  # the first warms up
                timed = None  # which has the memory of its graph
                if torch.cuda.is_available():
                    gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
                timed = time_round(name, preset, "auto")
            found = {"training": timed.training, "sampling": timed.sampling}
            if torch.cuda.is_available():
                found["gigabytes"] = torch.cuda.max_memory_reserved() / 1e9
            table.add(f"{name}, {preset}", 0, **found)


def timed_training(name: str, folder: Path, flags: list[str], processes: int = 1, minutes: float = 600) -> float:
    """Seconds of `python train_mnist.py` with flags, in `processes` processes; it is told to stop after `minutes`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(torchrun if processes > 1 else [])]
    where = ["--output", str(folder), "--overwrite"]
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with (folder / "printed.txt").open("w") as file:
        training = subprocess.Popen(
            [*start, str(ROOT / name / "train_mnist.py"), *flags, *where], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            status = training.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            training.send_signal(signal.SIGINT)  # as Ctrl-C: it saves and stops
            status = training.wait() - (128 + signal.SIGINT)
    if status:
        raise LessonError(f"train_mnist.py failed: see {folder / 'printed.txt'}")
    return time.perf_counter() - begin


def processes(name: str, table: Table, options: Namespace) -> None:
    """Images a second of the paper's network, and the last loss, with one process and with two on the same GPU."""
    if name != "lesson_05_ddpm":  # all lessons share their processes
        return
    few, more = (2, 4) if table.smoke else (20, 120)
    for N in table.missing(f"{name}, processes", [1, 2]):
        folder, seconds = options.output / f"{name}_processes_{N}", {}
        for steps in (few, more):
            flags = ["--smoke"] if table.smoke else ["--paper", "--T", "30"]  # T: the last pictures are soon there
            seconds[steps] = timed_training(name, folder, [*flags, "--steps", str(steps)], N)
        loss = float((folder / "metrics.csv").read_text().splitlines()[-1].split(",")[1])
        table.add(f"{name}, processes", N, rate=(more - few) * 128 / (seconds[more] - seconds[few]), loss=loss)


def measured_run(name: str, table: Table, folder: Path, flags: list[str], minutes: float = 600) -> None:
    """Trains, and measures the digits after 100 network calls and, where the lesson has a bound, their bits/dim."""
    lesson, (sampler, K) = load_lesson(name), SAMPLERS[name][0 if table.smoke else 3]
    if not table.missing(f"{name}, {sampler}", [K]):
        return
    minutes = timed_training(name, folder, ["--smoke"] if table.smoke else flags, minutes=minutes) / 60
    network, config, found = load_network(lesson, folder / "checkpoint.pt", choose_device())
    if name == "lesson_05_ddpm":
        config.variance = "small"  # the large one is for all steps
    table.add(f"{name}, training", found["step"], minutes=minutes, images=found["step"] * config.batch_size)
    images, _ = sample_all(lesson, network, config, (64, *found["image_shape"]), 1, sampler, K, config.precision)
    save_grid(images, folder / "drawn.png")
    score(table, f"{name}, {sampler}", K, lesson, network, config, found["image_shape"], sampler)
    if "ddpm" in name:
        images = table.digits()[0][: 2 if table.smoke else 64]
        table.add(f"{name}, bound", 1000, bits=bits(name, folder / "checkpoint.pt", images, table.seed))


def lesson(name: str, table: Table, options: Namespace) -> None:
    """Minutes of the lesson run, and how good its digits are: `python train_mnist.py` on this machine."""
    measured_run(name, table, options.output / f"{name}_lesson", [])


def paper(name: str, table: Table, options: Namespace) -> None:
    """How far does the paper's own network get in a few minutes? `python train_mnist.py --paper`, and Ctrl-C."""
    measured_run(name, table, options.output / f"{name}_paper", ["--paper"], options.minutes)


EXPERIMENTS = {"speed": (speed, 64), "processes": (processes, 64), "paper": (paper, 1000), "lesson": (lesson, 1000)}


def main() -> None:
    """Measures what is missing in the file."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=1.0, help="of `paper`, for each lesson (default: 1)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "output_gpu", help="(default: docs/output_gpu)")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "gpu.csv", help="(default: docs/gpu.csv)")
    options = read_options(parser, EXPERIMENTS)
    check_range("--minutes", options.minutes)
    origin.check_place(options.csv, options.smoke)
    for each in options.names:
        function, n = EXPERIMENTS[each]
        print(f"{each}: {function.__doc__}", flush=True)
        for name in options.lessons:
            function(name, Table(options.csv, each, 8 if options.smoke else n, 0, False, options.smoke), options)


if __name__ == "__main__":
    run(main)
