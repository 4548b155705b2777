"""What digit FID sees: real digits, damaged in known ways, are measured. `python docs/measure.py`, or names of damages.

Adds a line to docs/measure.csv after each measurement, leaves out those that are there already, and prints a table.
All damages and three seeds take two minutes on one core. `python docs/figures.py measure` makes a picture of some.
"""

import functools
import math
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import origin

from common.cli import run
from common.config import check_choice, check_range
from common.data import load_images, load_labels
from common.digit_metrics import digit_features, frechet_distance, precision_recall

GAP = 5  # pixels: a little more than the width of a stroke
COLUMNS = ("damage", "strength", "n", "seed", "fid", "precision", "recall", *origin.COLUMNS)


@functools.cache
def training_digits() -> tuple[Tensor, Tensor]:
    """All training digits, uint8 (60000, 1, 28, 28), and which digit each is, long (60000,); unpacked once."""
    return load_images("mnist"), load_labels("mnist")


def some_digits(num: int, missing: int, generator: torch.Generator) -> Tensor:
    """num training digits, without `missing` of the ten classes: float (num, 1, 28, 28) in [0, 1].

    Without missing classes they are the floor of `digit_report` with the generator's seed. Digits of the other classes
    take the place of the missing ones.
    """
    images, labels = training_digits()
    order = torch.randperm(len(images), generator=generator)
    kept_classes = torch.randperm(10, generator=generator)[missing:]
    return images[order[torch.isin(labels[order], kept_classes)][:num]] / 255


def noise(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Images x (N, 1, 28, 28) in [0, 1] plus Gaussian noise, clamped to [0, 1]."""
    return (x + std * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def broken_strokes(x: Tensor, gaps: float, generator: torch.Generator) -> Tensor:
    """Each image loses `gaps` squares of 5x5 pixels, whose centres lie on ink (above 0.5). x (N, 1, 28, 28) in [0, 1].

    0.25: the first quarter of the images loses one square each. 1.25: all lose one, the first quarter two.
    """
    K = math.ceil(gaps)
    centres = torch.multinomial((x > 0.5).flatten(1).float(), K, generator=generator)  # (N, K), all different
    wanted = torch.arange(K) + torch.arange(len(x))[:, None] / len(x) < gaps  # (N, K)
    holes = torch.zeros_like(x).flatten(1).scatter_(1, centres, wanted.float()).view_as(x)  # (N, 1, 28, 28)
    return x * (1 - F.max_pool2d(holes, GAP, stride=1, padding=GAP // 2))


def thicker(x: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    """x (N, 1, 28, 28) in [0, 1], by `weight` on the way to its grey-scale dilation: the brightest of 3x3 pixels."""
    return x.lerp(F.max_pool2d(x, 3, stride=1, padding=1), weight)


def thinner(x: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    """x (N, 1, 28, 28) in [0, 1], by `weight` on the way to its grey-scale erosion: the darkest of 3x3 pixels."""
    return x.lerp(-F.max_pool2d(-x, 3, stride=1, padding=1), weight)


def blur(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Images x (N, 1, 28, 28) in [0, 1], convolved with a Gaussian of `std` pixels; black around the image."""
    kernel = torch.exp(-(torch.arange(-4.0, 5) ** 2) / (2 * std**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 9)
    return F.conv2d(F.conv2d(x, kernel, padding=(0, 4)), kernel.mT, padding=(4, 0)).clamp(0, 1)


def non_digits(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The first `share` of the images x (N, 1, 28, 28) in [0, 1] become two digits at once: the brighter of each pixel.

    Each is laid over the image before it.
    """
    number = round(share * len(x))
    return torch.cat([torch.maximum(x, x.roll(1, dims=0))[:number], x[number:]])


DAMAGES = {  # name: what it is, the function (None: other digits are taken), the strengths
    "noise": ("noise, std {:g}", noise, (0, 0.015, 0.02, 0.03, 0.05, 0.06, 0.1, 0.15)),
    "blur": ("blur, std {:g} pixels", blur, (0.5, 0.75, 1)),
    "thinner": ("thinner, fainter: {:g}", thinner, (0.12, 0.28, 0.55, 1)),
    "thicker": ("thicker, bolder: {:g}", thicker, (0.12, 0.28, 0.55, 1)),
    "broken": ("gaps per digit: {:g}", broken_strokes, (0.25, 0.6, 1, 1.2, 2, 4)),
    "non-digits": ("two digits at once: {:.0%}", non_digits, (0.05, 0.1, 0.15, 0.2, 0.3, 0.65)),
    "missing": ("missing classes: {:g} of 10", None, (1, 2, 5)),
}


def damaged(damage: str, strength: float, num: int, seed: int) -> Tensor:
    """num training digits with a damage of DAMAGES: float (num, 1, 28, 28) in [0, 1]. A seed has its own digits."""
    generator = torch.Generator().manual_seed(seed)
    x = some_digits(num, strength if damage == "missing" else 0, generator)
    function = DAMAGES[damage][1]
    return function(x, strength, generator) if function else x


def write_table(lines: list[list[str]], n: int) -> str:
    """A Markdown table of the measurements of n images: means over the seeds, and the range of digit FID."""
    table = ["| damage | digit FID | precision | recall |", "| --- | --- | --- | --- |"]
    for damage, (text, _, strengths) in DAMAGES.items():
        for strength in strengths:
            found = [line[4:7] for line in lines if line[:3] == [damage, f"{strength:g}", str(n)]]
            if found:
                fid, precision, recall = ([float(number) for number in column] for column in zip(*found))
                spread = f"{mean(fid):.1f} ({min(fid):.1f} to {max(fid):.1f})"
                table.append(f"| {text.format(strength)} | {spread} | {mean(precision):.2f} | {mean(recall):.2f} |")
    return "\n".join(table)


def main() -> None:
    """Measures what is missing in the file, and prints all of it."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(DAMAGES)} (default: all)")
    parser.add_argument("--num", type=int, default=1000, help="images for each measurement (default: 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="measure with seeds 0, 1, ...: how many (default: 3)")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "measure.csv")
    options = parser.parse_args()
    check_range("--num", options.num, 4, 10_000)
    check_range("--seeds", options.seeds, 1, 1000)
    for name in options.names:
        check_choice("damage", name, DAMAGES)
    lines = origin.read(options.csv, COLUMNS)
    test_features = digit_features(load_images("mnist", split="test") / 255)  # (10000, F)
    for damage in options.names or DAMAGES:
        for strength, seed in ((strength, seed) for strength in DAMAGES[damage][2] for seed in range(options.seeds)):
            key = [damage, f"{strength:g}", str(options.num), str(seed)]
            if key in (line[:4] for line in lines):
                continue
            features = digit_features(damaged(damage, strength, options.num, seed))
            numbers = (frechet_distance(features, test_features), *precision_recall(test_features, features))
            lines.append([*key, *(f"{number:.3f}" for number in numbers), *origin.origin(damage)])
            origin.write(options.csv, lines)
    print(write_table(lines, options.num))


if __name__ == "__main__":
    run(main)
