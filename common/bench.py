"""How fast is this machine? `python -m common.bench` (or `make bench`) times a lesson's own training loop and sampler.

The lesson run and the paper's network, in both precisions, run in turn, round after round, in one process; the median
of the rounds is printed. A step is all that train_mnist.py does in it: data, loss, gradients, clipping, optimiser, EMA.
Images are those of training; a call is the network's, for an image that it samples.
"""

import argparse
import importlib
import itertools
import statistics
import tempfile
import time
from contextlib import closing, suppress

from common.checkpoint import load_lesson
from common.cli import Stopped, run
from common.config import check_range
from common.machine import InBatches, choose_device, describe, synchronize, training_precision
from common.run import Run

WARM = 1  # steps of a round that do not count
TIMED, SECONDS = 4, 1.0  # then so many that do, and again until so much time has passed


class TimedRun(Run):
    """A run that times some steps, and some frames of the last pictures; it writes nothing."""

    preview_due = False

    def steps(self):
        """Yields the steps of a round; `training` is then how many images one second took."""
        for self.step in itertools.count(1):
            yield self.step
            if self.step % TIMED == WARM:
                synchronize(self.device)
                if self.step == WARM:
                    begin = time.perf_counter()
                elif (seconds := time.perf_counter() - begin) >= SECONDS:
                    break
        self.training = (self.step - WARM) * self.config.batch_size / seconds

    def record(self, loss, where, weight=None):
        """Forgets the losses."""

    def to_sample(self, network):
        """The network, which counts the images that it is called with."""
        self.images_seen = 0
        return InBatches(network, self.precision, bar=self)

    def update(self, n):
        """What a progress bar is told."""
        self.images_seen += n

    def last_pictures(self, frames):
        """Makes some frames; `sampling` is then how many network calls for an image one second took."""
        begin = time.perf_counter()
        for _ in frames:
            synchronize(self.device)
            if (seconds := time.perf_counter() - begin) >= SECONDS:
                break
        self.sampling = self.images_seen / seconds
        raise Stopped


def time_round(name: str, preset: str | None, precision: str) -> TimedRun:
    """Trains a lesson for some steps, with a preset of its train_mnist.py or as it is, and times it."""
    lesson, train_mnist = load_lesson(name), importlib.import_module("train_mnist")
    with tempfile.TemporaryDirectory() as folder:
        config = train_mnist.Config(**train_mnist.PRESETS.get(preset, {}), precision=precision, output=folder)
        with closing(TimedRun(config, lesson.LESSON)) as timed, suppress(Stopped):
            timed.images, timed.leads = timed.images[:2000], False  # few, for Technique 1; and say nothing
            train_mnist.train(timed.config, timed)
    return timed


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m common.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("lesson", nargs="?", default="lesson_04_ncsnv2", help="its folder (default: lesson_04_ncsnv2)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is printed (default: 3)")
    parser.add_argument("--smoke", action="store_true", help="only a tiny network: tests the bench")
    options = parser.parse_args()
    check_range("--rounds", options.rounds)
    presets = {"smoke": "smoke"} if options.smoke else {"lesson run": None, "paper's network": "paper"}
    rates = {}
    for _ in range(options.rounds):
        for name, preset in presets.items():
            for precision in ("float32", "bfloat16"):
                timed = time_round(options.lesson, preset, precision)
                rates.setdefault(f"{name}, {precision}", []).append((timed.training, timed.sampling))
    device = choose_device()
    print(f"{options.lesson}, {describe(device)}")
    print(f"{'median, a second':30}{'images':>10}{'calls':>10}")
    for name, values in rates.items():
        print(f"{name:30}" + "".join(f"{statistics.median(each):10.1f}" for each in zip(*values)))
    print(f"train_mnist.py chooses {training_precision('auto', device)}")


if __name__ == "__main__":
    run(main)
