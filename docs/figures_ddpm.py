"""Pictures for lessons 5 and 9: `python docs/figures_ddpm.py`, or with the names of some.

lesson_05_forward, lesson_05_variance, lesson_09_variance and lesson_09_schedules need no trained network. The others
read docs/ddpm.csv, which `python docs/ddpm.py` writes, and docs/improved_ddpm.csv, which `python docs/improved_ddpm.py`
writes.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # the folder that holds common/ and the lessons

from figures import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SIGMA_1,
    SIGMA_L,
    log_ticks,
    make,
    panels,
    read_experiment,
    save,
    show_grid,
)

from common.cli import run
from common.data import load_images
from lesson_05_ddpm.loss import noisy_image
from lesson_05_ddpm.noise_schedule import alpha_bars, linear_betas
from lesson_09_improved_ddpm.loss import posterior_variance
from lesson_09_improved_ddpm.noise_schedule import cosine_betas, respaced_betas, spaced_timesteps

MEASURED, MEASURED_9 = DOCS / "ddpm.csv", DOCS / "improved_ddpm.csv"
BETAS = linear_betas(1000)


def noisy_digit(abars: Tensor) -> Tensor:
    """One digit (11, 1, 28, 28) in [0, 1] at t = 1, 100, 200, ..., 1000, with the same noise."""
    t = torch.tensor([1, *range(100, 1001, 100)]) - 1
    x_0 = load_images("mnist")[7:8] / 127.5 - 1
    z = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    return (noisy_image(x_0.expand(len(t), -1, -1, -1), abars, t, z.expand(len(t), -1, -1, -1)) + 1) / 2


def forward_process(path: Path) -> None:
    """One digit at eleven t, and the noise at each t beside the noise levels of lesson 4."""
    abars = alpha_bars(BETAS)
    figure = Figure(figsize=(6, 3.7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 4))
    show_grid(above, noisy_digit(abars)[None])
    below.grid(alpha=0.3)
    above.set_title("$x_t$ for t = 1, 100, 200, ..., 1000", fontsize=12)
    sigma = ((1 - abars) / abars).sqrt() / 2  # in the unit of pixels in [0, 1]
    below.plot(range(1, 1001), sigma, color=BLUE, linewidth=2, label="lesson 5: 1000 steps")
    below.axhspan(SIGMA_L, SIGMA_1, color=ORANGE, alpha=0.15, label="lesson 4: 96 noise scales")
    below.set_yscale("log")
    log_ticks(below.yaxis, (0.01, 0.1, 1, 10))
    below.set_xlabel("t", fontsize=12)
    below.set_ylabel("noise over image, $\\sigma$", fontsize=12)
    below.legend(fontsize=11)
    save(figure, path)


def fresh_variances(K: int, mu: float = 0.3, s: float = 0.5) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of a chain with K of the 1000 steps, if the data are N(mu, s^2): its betas (K,), the variances v of x_t (K + 1,),
    and the variance (K,) of the fresh noise of each step by each rule.

    "true" is that of the step back, beta_t v_{t-1} / v_t. "learned" has its place between the two fixed variances, v,
    from the chain of all 1000 steps.
    """
    kept = spaced_timesteps(1000, K)
    found = {}
    for name, betas in (("fine", BETAS), ("coarse", respaced_betas(BETAS, kept))):
        abars = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        v = abars * s**2 + 1 - abars
        found[name] = betas, v, posterior_variance(betas), betas * v[:-1] / v[1:]
    betas, v, low, true = found["fine"]
    share = ((true / low).log() / (betas / low).log())[kept]  # v of Eq. 15
    betas, v, low, true = found["coarse"]
    return betas, v, {"small": low, "large": betas, "true": true,
                      "learned": (share * betas.log() + (1 - share) * low.log()).exp()}  # fmt: skip


def variance_left(K: int, rule: str, mu: float = 0.3, s: float = 0.5) -> float:
    """The variance of what K steps make of noise, with fresh noise by a rule of `fresh_variances`: exact.

    The network is the perfect one, and a step takes the distance d from the mean to A d, with A from v_t, the variance
    of x_t (tests/test_ddpm.py has the derivation).
    """
    betas, v, fresh = fresh_variances(K, mu, s)
    V = 1.0
    for k in reversed(range(K)):
        A = math.sqrt(1 - betas[k]) * v[k] / v[k + 1]
        V = A**2 * V + (fresh[rule][k] if k else 0.0)
    return float(V)


RULES = {
    "large": ("large: $\\beta_t$", ORANGE, "o-"),
    "true": ("true", GREEN, "^-"),
    "learned": ("$v$ of the 1000 steps", PINK, "D:"),
    "small": ("small: $\\tilde\\beta_t$", BLUE, "s-"),
}


def variance(path: Path, rules: tuple[str, ...] = ("large", "small")) -> None:
    """What the rules for the variance leave of data N(0.3, 0.5^2), over the number of steps: no network is needed."""
    Ks = (5, 10, 25, 50, 100, 250, 1000)
    figure, (panel,) = panels(1, 3.6)
    for rule in rules:
        label, color, style = RULES[rule]
        left = [variance_left(K, rule) for K in Ks]
        print(f"{rule}: " + ", ".join(f"{K} steps {V:.4f}" for K, V in zip(Ks, left)))
        panel.plot(Ks, left, style, color=color, linewidth=2, label=label)
    panel.axhline(0.25, color="black", linestyle="--", linewidth=1, label="the data's: 0.25")
    panel.set(xscale="log")
    log_ticks(panel.xaxis, Ks)
    panel.set_xlabel("steps", fontsize=12)
    panel.set_ylabel("variance of the samples", fontsize=12)
    panel.legend(fontsize=10)
    save(figure, path)


def calls(path: Path, source: Path = MEASURED) -> None:
    """Digit FID over network calls, for each sampler."""
    points, n = read_experiment(source, "calls", "fid")
    figure, (panel,) = panels(1)
    over_calls(panel, points, f"digit FID ({n})")
    save(figure, path)


def over_calls(panel, points: dict, label: str) -> None:
    """A line for each sampler or variance, as read_experiment has them."""
    for (name, line), color, marker in zip(points.items(), (BLUE, GREEN, ORANGE, PINK), "osD^"):
        panel.plot(*zip(*line), marker=marker, color=color, linewidth=2, label=name)
    panel.set(xscale="log", yscale="log")
    log_ticks(panel.xaxis, (5, 10, 25, 50, 100, 250, 1000))
    log_ticks(panel.yaxis, (2, 3, 5, 7, 10, 20, 50, 100, 200, 400))
    panel.set_xlabel("network calls", fontsize=12)
    panel.set_ylabel(label, fontsize=12)
    panel.legend(fontsize=10)


def rate(path: Path, source: Path = MEASURED) -> None:
    """Rate and distortion of the progressive code, beside Shannon's for a normal pixel of the digits' variance."""
    rates, n = read_experiment(source, "bits", "rate")
    errors, _ = read_experiment(source, "bits", "rmse")
    name = "large variance, clip: rate"
    bits, rmse = [value for _, value in rates[name]], [value for _, value in errors[name]]
    std = 127.5 * float((load_images("mnist", "test") / 127.5 - 1).std())
    curve = torch.linspace(0, max(bits), 100)
    figure, (panel,) = panels(1, 3.6)
    panel.plot(curve, std * 2**-curve, "--", color="black", label=f"normal pixels of std {std:.0f}")
    panel.plot(bits, rmse, "o-", color=BLUE, linewidth=2, label=f"digits ({n})")
    for t, x, y in zip((t for t, _ in rates[name]), bits, rmse):
        if t in (1, 20, 100, 200, 300, 500):
            panel.annotate(f"t = {t:g}", (x, y), xytext=(6, 5), textcoords="offset points", fontsize=10)
    panel.set_xlabel("bits per dimension until $x_t$ is known", fontsize=12)
    panel.set_ylabel("error of $\\hat{x}_0$, gray levels", fontsize=12)
    panel.legend(fontsize=11)
    save(figure, path)


def loss(path: Path, source: Path = MEASURED) -> None:
    """The loss at each t: the network, the best linear denoiser, and a network that returns zero."""
    points, n = read_experiment(source, "loss", "loss")
    figure, (panel,) = panels(1, 3.6)
    for (name, line), color, marker in zip(points.items(), (BLUE, ORANGE), "os"):
        panel.plot(*zip(*line), marker=marker, color=color, linewidth=2, label=name)
    panel.axhline(1, color="black", linestyle="--", label="zero")
    panel.set(xscale="log", yscale="log")
    log_ticks(panel.xaxis, (1, 10, 100, 1000))
    log_ticks(panel.yaxis, (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1))
    panel.set_xlabel("t", fontsize=12)
    panel.set_ylabel(f"squared error of the noise ({n})", fontsize=12)
    panel.legend(fontsize=11)
    save(figure, path)


def schedules(path: Path) -> None:
    """The share of the image's variance in x_t, and a digit at eleven t, on both schedules."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    above, middle, below = figure.subplots(3, 1, height_ratios=(1, 1, 4))
    for panel, name, betas, color in ((above, "linear", BETAS, ORANGE), (middle, "cosine", cosine_betas(1000), BLUE)):
        abars = alpha_bars(betas)
        show_grid(panel, noisy_digit(abars)[None])
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
        below.plot(range(1, 1001), abars, color=color, linewidth=2, label=name)
        print(f"{name}: half of the variance is gone at t = {int((abars > 0.5).sum()) + 1}")
    below.grid(alpha=0.3)
    below.set_xlabel("t", fontsize=12)
    below.set_ylabel("$\\bar\\alpha_t$", fontsize=12)
    below.legend(fontsize=11)
    save(figure, path)


def learned_v(path: Path, source: Path = MEASURED_9) -> None:
    """The learned v over t, on black pixels and on gray ones, beside that of a normal pixel of the digits' variance."""
    points, n = read_experiment(source, "v", "v")
    betas = cosine_betas(1000)
    abars = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars(betas)])
    s = float((load_images("mnist", "test") / 127.5 - 1).std())
    variances, low = abars * s**2 + 1 - abars, posterior_variance(betas)
    normal = (betas * variances[:-1] / variances[1:] / low).log() / (betas / low).log()
    figure, (panel,) = panels(1, 3.8)
    for name, label, color, marker in (("gray", "pixels between", GREEN, "o"), ("black", "black pixels", BLUE, "s")):
        panel.plot(*zip(*points[name]), marker=marker, color=color, linewidth=2, label=f"{label} ({n})")
    panel.plot(range(1, 1001), normal, "--", color="black", label=f"normal pixel of std {s:.2f}")
    panel.axhspan(0, 1, color="0.9")
    panel.set(xscale="log")
    log_ticks(panel.xaxis, (1, 10, 100, 1000))
    panel.set_xlabel("t", fontsize=12)
    panel.set_ylabel("v", fontsize=12)
    panel.legend(fontsize=10)
    save(figure, path)


def calls_9(path: Path, source: Path = MEASURED_9) -> None:
    """As `calls`, of lesson 9; below, the bits of a chain with so many steps."""
    figure, (above, below) = panels(2, 7.6)
    points, n = read_experiment(source, "calls", "fid")
    over_calls(above, points, f"digit FID ({n})")
    bits, n = read_experiment(source, "bits", "bits")
    over_calls(below, {name: line for name, line in bits.items() if name in points}, f"bits/dim ({n})")
    save(figure, path)


FIGURES = {
    "lesson_05_forward": forward_process,
    "lesson_05_variance": variance,
    "lesson_05_calls": calls,
    "lesson_05_rate": rate,
    "lesson_05_loss": loss,
    "lesson_09_variance": partial(variance, rules=tuple(RULES)),
    "lesson_09_schedules": schedules,
    "lesson_09_v": learned_v,
    "lesson_09_calls": calls_9,
}


if __name__ == "__main__":
    run(lambda: make(__doc__, FIGURES))
