"""Digit FID against network calls, for both samplers of lesson 4: `python docs/sampling_calls.py`.

Draws with pretrained.pt, adds a line to docs/sampling_calls.csv after each measurement, and leaves out those that are
there already. `python docs/figures.py sampling_calls` makes a picture of them.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import origin

from common.checkpoint import load_lesson, load_network
from common.cli import run
from common.config import check_range
from common.digit_metrics import digit_report
from common.machine import choose_device, sampling_precision
from common.play import sample_all

CALLS = {"consistent": (13, 25, 49, 97), "langevin": (289, 961)}
COLUMNS = ("sampler", "calls", "n", "seed", "fid", "precision", "recall", *origin.COLUMNS)


def main() -> None:
    """Measures what is missing in the file, the quickest first."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", default=ROOT / "lesson_04_ncsnv2" / "pretrained.pt")
    parser.add_argument("--num", type=int, default=500, help="images for each measurement (default: 500)")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "sampling_calls.csv")
    options = parser.parse_args()
    check_range("--num", options.num, 4, 10_000)
    origin.check_place(options.csv, options.checkpoint != parser.get_default("checkpoint"))
    lesson, device = load_lesson("lesson_04_ncsnv2"), choose_device()
    network, config, checkpoint = load_network(lesson, options.checkpoint, device)
    origin.check_gray_digits(options.checkpoint, checkpoint)
    precision = sampling_precision("auto", config.precision, device)
    shape = (options.num, *checkpoint["image_shape"])
    lines = origin.read(options.csv, COLUMNS)
    there = {tuple(line[:3]) for line in lines}
    for sampler, calls in ((sampler, calls) for sampler, several in CALLS.items() for calls in several):
        if (sampler, str(calls), str(options.num)) in there:
            continue
        x, _ = sample_all(lesson, network, config, shape, 1, sampler, calls, precision)
        found = digit_report(x.clamp(0, 1))["samples"]
        numbers = [f"{found[name]:.3f}" for name in ("fid", "precision", "recall")]
        lines.append([sampler, calls, options.num, 1, *numbers, *origin.origin()])
        origin.write(options.csv, lines)


if __name__ == "__main__":
    run(main)
