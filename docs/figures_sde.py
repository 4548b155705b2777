"""Pictures for lesson 7: `python docs/figures_sde.py`, or with the names of some.

lesson_07_sdes and lesson_07_paths need no trained network. lesson_07_calls reads docs/score_sde.csv, which
`python docs/score_sde.py` writes; lesson_07_likely and lesson_07_guidance take the weights that come with the lesson.
"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # the folder that holds common/ and the lessons

from figures import BLUE, GREEN, ORANGE, PINK, SIGMA_1, log_ticks, make, panels, read_experiment, save, show_grid
from score_sde import LESSON, load

from common.cli import run
from common.data import load_images
from common.machine import choose_device
from common.noise import SeededNoise
from lesson_07_score_sde.likelihood import bits_per_dim, dequantise, log_likelihood
from lesson_07_score_sde.sampler import predict, probability_flow
from lesson_07_score_sde.sde import VE, VP, SubVP

MEASURED = DOCS / "score_sde.csv"
SDES = (("VE", VE(0.01, SIGMA_1), BLUE), ("VP", VP(), ORANGE), ("sub-VP", SubVP(), GREEN))


def sdes(path: Path) -> None:
    """One digit at eleven times of each SDE, and the scale of the noise on it over time."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    *above, below = figure.subplots(4, 1, height_ratios=(1, 1, 1, 5))
    x = load_images("mnist")[7:8] / 255
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    for panel, (name, sde, color) in zip(above, SDES):
        eleven = torch.linspace(1e-3, 1, 11)[:, None, None, None]
        show_grid(panel, (sde.mean_factor(eleven) * x + sde.std(eleven) * z)[None].float().clamp(0, 1))
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
        below.plot(t[1:], sde.noise_scale(t)[1:], color=color, linewidth=2, label=name)
    below.axhline(SIGMA_1, color="black", linestyle="--", linewidth=1, label="largest trained")
    below.grid(alpha=0.3)
    below.set(yscale="log", ylim=(0.008, 200))
    log_ticks(below.yaxis, (0.01, 0.1, 1, 10, 100))
    below.set_xlabel("t", fontsize=12)
    below.set_ylabel("noise over image, $\\sigma$", fontsize=12)
    below.legend(fontsize=11)
    save(figure, path)


def two_points(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact score of data at -1 and 1, half of them each, with noise of scale sigma."""
    variance = sigma[:, None, None, None] ** 2
    return (torch.tanh(x / variance) - x) / variance


def paths(path: Path) -> None:
    """Ways from noise to two points, with the exact score: by the reverse SDE, and by the ODE from the same starts."""
    sigmas = torch.logspace(math.log10(4), -2, 400, dtype=torch.float64)
    start = torch.linspace(-7, 7, 14, dtype=torch.float64)[:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    x, stochastic = start, [start]
    for n in range(1, len(sigmas)):
        ones = torch.ones(2, dtype=torch.float64)  # VE
        x = predict("ancestral", two_points, x, sigmas[n - 1 : n + 1], ones, generator)
        stochastic.append(x)
    smooth = [start, *probability_flow(two_points, start, sigmas)]
    figure, both = panels(2, 3.6)
    for panel, frames, title in ((both[0], stochastic, "reverse SDE"), (both[1], smooth, "probability flow ODE")):
        for line, color in zip(torch.stack(frames).flatten(1).T, (BLUE, ORANGE, GREEN, PINK) * 4):
            panel.plot(sigmas, line, color=color, linewidth=1)
        panel.set(xscale="log", title=title)
        panel.invert_xaxis()
        log_ticks(panel.xaxis, (0.01, 0.1, 1))
        panel.set_xlabel("$\\sigma$", fontsize=12)
        panel.set_ylabel("x", fontsize=12)
    save(figure, path)


SHOWN = {
    "Heun": (BLUE, "o-"),
    "Euler": (GREEN, "s-"),
    "consistent": (PINK, "^-"),
    "consistent, eta of lesson 4": (PINK, "^:"),
    "reverse diffusion": (ORANGE, "D:"),
    "reverse diffusion, corrector": (ORANGE, "D-"),
}


def calls(path: Path, source: Path = MEASURED) -> None:
    """Digit FID over network calls, for six samplers of one network."""
    points, n = read_experiment(source, "calls", "fid")
    figure, (panel,) = panels(1)
    for name, (color, style) in SHOWN.items():
        panel.plot(*zip(*points.get(name, [(97, math.nan)])), style, color=color, linewidth=2, label=name)
    panel.set(xscale="log", yscale="log")
    log_ticks(panel.xaxis, (13, 25, 49, 97, 193))
    log_ticks(panel.yaxis, (3, 5, 7, 10, 20, 50, 100, 200, 400))
    panel.set_xlabel("network calls", fontsize=12)
    panel.set_ylabel(f"digit FID ({n})", fontsize=12)
    panel.legend(fontsize=10)
    save(figure, path)


def guidance(path: Path) -> None:
    """The digits 0 to 9, asked for with guidance 0, 1, 2 and 4; a column has the same noise."""
    seven = load(LESSON, str(DOCS.parent / LESSON / "pretrained.pt"))
    rows, scales = [], (0.0, 1.0, 2.0, 4.0)
    for scale in scales:
        seven.config.digit, seven.config.guidance = torch.arange(10, device=choose_device()), scale
        *_, x = seven.lesson.draw(seven.network, seven.config, (10, 1, 28, 28), SeededNoise(range(1, 11)), "heun", 35)
        rows.append(x.cpu().clamp(0, 1))
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    for panel, row, scale in zip(figure.subplots(len(scales), 1), rows, scales):
        show_grid(panel, row[None])
        panel.set_ylabel(f"{scale:g}", rotation=0, ha="right", va="center", fontsize=12)
    save(figure, path)


def likely(path: Path, n: int = 200) -> None:
    """Of n test digits, the ten that take the fewest bits and the ten that take the most."""
    seven = load(LESSON, str(DOCS.parent / LESSON / "pretrained.pt"))
    digits = load_images("mnist", "test")[:n].to(choose_device()) / 255
    x = dequantise(digits, SeededNoise(range(n)))
    probes = [SeededNoise(range(n + k, n + k + 50)) for k in range(0, n, 50)]  # other numbers than the levels have
    log_p = [log_likelihood(seven.float32, part, 0.001, seven.sigma_max, generator=probe)
             for part, probe in zip(x.split(50), probes)]  # fmt: skip
    bits = bits_per_dim(torch.cat(log_p), digits[0].numel()).cpu()
    order = bits.argsort()
    figure = Figure(figsize=(6, 1.5), layout="constrained")
    for panel, some in zip(figure.subplots(2, 1), (order[:10], order[-10:])):
        show_grid(panel, digits.cpu()[some][None])
        low, high = bits[some].min(), bits[some].max()
        panel.set_ylabel(f"{low:.2f} to {high:.2f}", rotation=0, ha="right", va="center", fontsize=12)
    save(figure, path)


FIGURES = {
    "lesson_07_sdes": sdes,
    "lesson_07_paths": paths,
    "lesson_07_calls": calls,
    "lesson_07_likely": likely,
    "lesson_07_guidance": guidance,
}


if __name__ == "__main__":
    run(lambda: make(__doc__, FIGURES))
