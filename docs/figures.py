"""Pictures of the problems that the five techniques solve: `python docs/figures.py`, or with the names of some.

lesson_04_modes, lesson_04_ladder and lesson_04_step_size need no trained network and take two minutes on one core.
sampling_calls reads docs/sampling_calls.csv; lesson_04_ema reads docs/ablation.csv, a copy of the results.csv that
`python docs/ablation.py --curve` writes.
"""

import csv
import io
import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # the folder that holds common/ and the lessons

import lesson_03_ncsn.sampler as sampler_3
from common.cli import run
from common.data import load_images, load_labels
from common.errors import LessonError
from common.files import atomic_write
from lesson_04_ncsnv2.noise_scales import geometric_noise_scales, noise_scale_ratio, number_of_noise_scales
from lesson_04_ncsnv2.sampler import langevin_step_size
from lesson_04_ncsnv2.unconditional import noise_after_langevin, step_size_for_all_levels

D, SIGMA_1, SIGMA_L = 28 * 28, 16.8758, 0.01  # SIGMA_1 is what Technique 1 computes for MNIST
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # for the colour-blind too (Okabe and Ito)


def exact_score(images: Tensor, sigmas: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The score, without a network, of pictures drawn from `images` (N, C, H, W) and blurred by noise of scale sigma_i.

    The density is the mean of N normal densities, one around each image x_k. Its score at x is the sum over k of
    w_k (x_k - x) / sigma_i^2, where w_k is the probability that x is x_k plus noise. The function returned takes
    (x, i) as a network does.
    """
    points = images.flatten(1)  # (N, D)
    half_squares = points.square().sum(1) / 2  # (N,)

    def score(x: Tensor, i: Tensor) -> Tensor:
        v, variance = x.flatten(1), sigmas[i][:, None] ** 2  # (B, D), (B, 1)
        w = torch.softmax((v @ points.T - half_squares) / variance, dim=1)  # (B, N): |v|^2 / 2 is the same for all k
        return ((w @ points - v) / variance).view_as(x)

    return score


def modes(path: Path, number: int = 1000, chains: int = 400, T: int = 100) -> None:
    """Technique 1: from one picture, and from uniform noise, what do 400 chains reach with a small and a large sigma_1?

    The sampler is lesson 3's with its 10 noise scales and 100 steps at each; the score is exact for `number` training
    digits, so that each chain ends at one of them and only the sampler can be at fault.
    """
    images, labels = load_images("mnist")[:number] / 255, load_labels("mnist")[:number]
    starts = {
        "the same picture": images[:1].expand(chains, -1, -1, -1),
        "uniform noise": torch.rand(chains, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
    }
    expected = number * (1 - (1 - 1 / number) ** chains)
    figure = Figure(figsize=(6, 7.4), layout="constrained")
    panels = figure.subplots(4, 2, height_ratios=(3, 2, 3, 2))
    ladders = {"$\\sigma_1$ = 1 (lesson 3)": (1.0, ORANGE), "$\\sigma_1$ = 16.9 (Technique 1)": (SIGMA_1, BLUE)}
    for row, (name, start) in enumerate(starts.items()):
        for column, (heading, (sigma_1, color)) in enumerate(ladders.items()):
            sigmas, generator = geometric_noise_scales(sigma_1, SIGMA_L, 10), torch.Generator().manual_seed(row)
            score = exact_score(images, sigmas)
            *_, x = sampler_3.annealed_langevin_dynamics(score, start, sigmas, T, 2e-5, generator)
            reached = torch.cdist(x.flatten(1), images.flatten(1)).argmin(dim=1)  # (chains,)
            counts, distinct = labels[reached].bincount(minlength=10), len(reached.unique())
            print(f"sigma_1 = {sigma_1:g}, start: {name}: {distinct} different digits, classes {counts.tolist()}")

            top, bottom = panels[2 * row, column], panels[2 * row + 1, column]
            grid = x[:32, 0].clamp(0, 1).view(4, 8, 28, 28).transpose(1, 2).reshape(112, 224).numpy()
            top.imshow(grid, cmap="gray", vmin=0, vmax=1)
            top.set_axis_off()
            top.set_title(f"{heading}\nstart: {name}" if row == 0 else f"start: {name}", fontsize=12)
            bottom.bar(range(10), counts.tolist(), color=color)
            bottom.plot(range(10), (labels.bincount(minlength=10) * chains / number).numpy(), "k_", markersize=12)
            bottom.set_xticks(range(10))
            bottom.set_xlabel(f"class; {distinct} different digits", fontsize=11)
            bottom.set_ylim(0, 1.1 * max(100, counts.max().item()))
    panels[1, 0].set_ylabel("chains", fontsize=11)
    panels[3, 0].set_ylabel("chains", fontsize=11)
    figure.suptitle(f"{chains} chains (bars); fair draws (black) reach {expected:.0f} different digits", fontsize=12)
    save(figure, path)


def overlap(gamma: float, dimension: int = D) -> float:
    """The left side of Eq. 4 of NCSNv2: how much noise of a scale is as long as the larger scale's, to 3 deviations."""

    def Phi(t):
        return 0.5 * math.erfc(-t / math.sqrt(2))

    middle = math.sqrt(2 * dimension) * (gamma - 1)
    return Phi(middle + 3 * gamma) - Phi(middle - 3 * gamma)


def noise_ladder(path: Path) -> None:
    """Technique 2: the density of the length of noise, for the scales of lesson 3 and those of Technique 2.

    The gray band holds the noise of the scale nearest to 0.6, give or take three deviations.
    """
    L = number_of_noise_scales(SIGMA_1, SIGMA_L, noise_scale_ratio(D))
    ladders = {
        "lesson 3": geometric_noise_scales(1.0, SIGMA_L, 10),
        "Technique 2": geometric_noise_scales(SIGMA_1, SIGMA_L, L),
    }
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    r = torch.linspace(0.34, 1.08, 2000) * math.sqrt(D)  # lengths
    for panel, (name, sigmas) in zip(figure.subplots(2, 1, sharex=True), ladders.items(), strict=True):
        gamma = float(sigmas[0] / sigmas[1])
        print(f"{name}: L = {len(sigmas)}, gamma = {gamma:.4f}, overlap = {overlap(gamma):.3g}")
        for k, sigma in enumerate(sigmas.tolist()):
            middle, deviation = math.sqrt(D) * sigma, sigma / math.sqrt(2)
            p = torch.exp(-0.5 * ((r - middle) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
            if p.max() > 0.01:
                color, style = ((BLUE, "-"), (ORANGE, "--"))[k % 2]
                panel.plot(r, p, color=color, linestyle=style, linewidth=2)
            if k == (sigmas - 0.6).abs().argmin():
                panel.axvspan(middle - 3 * deviation, middle + 3 * deviation, color="0.85")
        panel.set_title(f"{name}: L = {len(sigmas)}, ratio {gamma:.2f}, overlap {overlap(gamma):.2f}", fontsize=13)
        panel.set_ylabel("density", fontsize=12)
        panel.set(xlim=(r[0].item(), r[-1].item()), ylim=(0, 1.8))
    panel.set_xlabel("length of the noise; gray: one scale, to three deviations", fontsize=12)
    save(figure, path)


def step_size(path: Path) -> None:
    """Technique 4: the variance that T steps leave at a noise scale, over the variance that belongs there."""
    gamma = noise_scale_ratio(D)
    sigmas = geometric_noise_scales(SIGMA_1, SIGMA_L, number_of_noise_scales(SIGMA_1, SIGMA_L, gamma))
    gamma = float(sigmas[0] / sigmas[1])  # a little smaller, since L is a whole number

    def left(r, T):
        b = 2 / (2 - r)
        return (1 - r) ** (2 * T) * (gamma**2 - b) + b

    figure = Figure(figsize=(6, 4.4), layout="constrained")
    panel = figure.subplots()
    r = torch.logspace(-3, 0, 1000, dtype=torch.float64)
    styles = ((1, PINK, ":"), (3, ORANGE, "-."), (5, BLUE, "-"), (10, GREEN, "--"))
    for T, color, style in styles:
        best = langevin_step_size(sigmas, T) / SIGMA_L**2
        print(f"T = {T}: epsilon = {best * SIGMA_L**2:.3g}, ratio {left(best, T):.4f}; at 1e-5: {left(0.1, T):.4f}")
        label = f"T = {T}: $\\epsilon$ = {best * SIGMA_L**2:.3g}"
        panel.plot(r, left(r, T), color=color, linestyle=style, linewidth=2, label=label)
        panel.plot(best, left(best, T), "o", color=color, markersize=8)
    for T in (1, 2, 3, 5, 10):  # the table of "The price of Technique 3"
        cells = []
        for epsilon in (langevin_step_size(sigmas, T), step_size_for_all_levels(sigmas, T)):
            left_over = (SIGMA_L * float(noise_after_langevin(sigmas, T, epsilon, exact)) for exact in (True, False))
            cells += [f"{epsilon / SIGMA_L**2:.3f}", *(f"{noise:.3g}" for noise in left_over)]
        print(f"| {T} | " + " | ".join(cells[:4] + cells[5:]) + " |")
    panel.axvline(0.1, color="black", linewidth=1)  # 2e-5 / 2: lesson 3 has epsilon / 2 where lesson 4 has epsilon
    panel.text(0.093, 1.19, "lesson 3's step", ha="right", va="center", fontsize=11)
    panel.set(xscale="log", ylim=(1, 1.2), xlim=(1e-3, 1))
    panel.set_xlabel("step size $\\epsilon\\, /\\, \\sigma_L^2$", fontsize=12)
    panel.set_ylabel("variance after T steps / $\\sigma_i^2$", fontsize=12)
    panel.legend(fontsize=11, loc="lower left")
    panel.grid(alpha=0.3)
    save(figure, path)


def sampling_calls(path: Path, source: Path = DOCS / "sampling_calls.csv") -> None:
    """Digit FID against network calls for each picture: a line for each sampler, a dot for each seed."""
    lines = read_csv(source, ("sampler", "calls", "n", "seed", "fid"))
    series = {}
    for line in lines:
        series.setdefault(line["sampler"], []).append((int(line["calls"]), float(line["fid"])))
    n = ", ".join(sorted({line["n"] for line in lines}, key=int))
    plot_fid(path, series, "network calls for each picture", f"n = {n}", log_x=True)


def ema(path: Path, source: Path = DOCS / "ablation.csv") -> None:
    """Technique 5: digit FID of the raw and of the averaged weights (rows 4 and 5 of the ablation) over training."""
    lines = [line for line in read_csv(source, ("row", "step", "n", "seed", "fid")) if line["row"] in ("4", "5")]
    series = {}
    for line in lines:
        name = "raw weights" if line["row"] == "4" else "averaged weights (EMA)"
        series.setdefault(name, []).append((int(line["step"]), float(line["fid"])))
    n = ", ".join(sorted({line["n"] for line in lines}, key=int))
    plot_fid(path, series, "training steps", f"n = {n}", log_x=False)


def plot_fid(path: Path, series: dict[str, list[tuple[int, float]]], what: str, n: str, log_x: bool) -> None:
    """Write a plot of {name: [(x, digit FID), ...]}: all points, and a line through the geometric mean at each x."""
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    panel = figure.subplots()
    styles = zip((ORANGE, BLUE, GREEN, PINK), ("o", "s", "^", "D"), ("--", "-", "-.", ":"), strict=True)
    for (name, points), (color, marker, style) in zip(series.items(), styles):
        points = [(x, fid) for x, fid in points if fid > 0]  # leaves out "not a number"
        xs = sorted({x for x, _ in points})
        means = [geometric_mean(fid for x, fid in points if x == at) for at in xs]
        panel.plot(*zip(*points), marker, color=color, alpha=0.4, markersize=5)
        panel.plot(xs, means, color=color, marker=marker, linestyle=style, linewidth=2, label=name)
    panel.set(yscale="log", xscale="log" if log_x else "linear")
    ticks = sorted({x for points in series.values() for x, _ in points})
    panel.set_xticks(ticks, [str(x) for x in ticks], rotation=45 if len(ticks) > 5 else 0)
    panel.minorticks_off()
    low, high = panel.get_ylim()
    marks = [m * 10**e for e in range(4) for m in (1, 1.2, 1.5, 2, 3, 5, 7, 8.5) if low <= m * 10**e <= high]
    panel.set_yticks(marks, [f"{mark:g}" for mark in marks])
    panel.set_xlabel(what, fontsize=12)
    panel.set_ylabel(f"digit FID ({n})", fontsize=12)
    panel.legend(fontsize=11)
    panel.grid(alpha=0.3)
    save(figure, path)


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The lines of a CSV file. LessonError if the file, a column or every line is missing."""
    try:
        lines = list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise LessonError(f"cannot read {path}: {error.strerror}") from error
    if not lines or not set(columns) <= lines[0].keys():
        raise LessonError(f"{path} needs the columns {', '.join(columns)}, and at least one line")
    return lines


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG of 720 pixels' width and 64 colours. Raises LessonError if path cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    with atomic_write(path) as temporary:
        Image.open(buffer).convert("RGB").quantize(64).save(temporary, format="PNG", optimize=True)
    print(f"look at {path}")


FIGURES = {
    "lesson_04_modes": modes,
    "lesson_04_ladder": noise_ladder,
    "lesson_04_step_size": step_size,
    "lesson_04_ema": ema,
    "sampling_calls": sampling_calls,
}


def main() -> None:
    """Makes the figures that are named, or all."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--output", default=str(DOCS / "images"), help="folder (default: docs/images)")
    options = parser.parse_args()
    for name in options.names:
        if name not in FIGURES:
            raise LessonError(f"there is no figure {name}: choose from {', '.join(FIGURES)}")
    for name in options.names or FIGURES:
        FIGURES[name](Path(options.output) / f"{name}.png")


if __name__ == "__main__":
    run(main)
