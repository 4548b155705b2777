"""Pictures of the problems that the five techniques solve: `python docs/figures.py`, or with the names of some.

lesson_03_denoising, lesson_03_noise_scales, lesson_04_sigma_1, lesson_04_line, lesson_04_modes, lesson_04_ladder and
lesson_04_step_size need no trained network and take two minutes on one core.
sampling_calls, compare and measure read the .csv of their name; lesson_04_technique_1 to 5 and lesson_04_eta read
docs/techniques.csv, which `python docs/techniques.py` writes.
"""

import csv
import io
import math
import sys
import zlib
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, mean

import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # the folder that holds common/ and the lessons

from measure import DAMAGES, damaged

import lesson_03_ncsn.sampler as sampler_3
from common.cli import run
from common.data import load_images, load_labels
from common.errors import LessonError
from common.files import atomic_write
from lesson_04_ncsnv2.noise_scales import geometric_noise_scales, noise_scale_ratio, number_of_noise_scales
from lesson_04_ncsnv2.sampler import langevin_step_size
from lesson_04_ncsnv2.unconditional import noise_after_langevin, step_size_for_all_scales

D, SIGMA_1, SIGMA_L = 28 * 28, 16.8758, 0.01  # SIGMA_1 is what Technique 1 computes for MNIST
TECHNIQUES, TECHNIQUES_COLUMNS = DOCS / "techniques.csv", ("experiment", "setting", "x", "y", "value", "n", "seed")
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


def posterior(x: Tensor, points: Tensor, sigma: float) -> Tensor:
    """p(x_k | x~) of each clean point x_k that could lie behind the noisy x~ = x_k + sigma z.

    x (D,) is x~; points (N, D), equally frequent. Returns (N,), which sum to 1.
    """
    return torch.softmax(-(points - x).square().sum(1) / (2 * sigma**2), dim=0)


def denoising(path: Path, sigma: float = 0.45) -> None:
    """Denoising score matching in 2-D: arrows from a noisy point to the clean points, and their mean, sigma^2 s."""
    angle = torch.linspace(-0.2, math.pi + 0.2, 40)
    points = torch.stack([1.6 * angle.cos(), angle.sin()], 1)  # (40, 2): an arc
    x = torch.tensor([0.62, 0.3])
    p = posterior(x, points, sigma)  # (40,)
    mean = p @ (points - x)  # (2,)
    s = exact_score(points[:, :, None, None], torch.tensor([sigma]))(x.view(1, 2, 1, 1), torch.tensor([0])).flatten()
    print(f"mean arrow: {mean.tolist()}; sigma^2 times the score: {(sigma**2 * s).tolist()}")

    figure = Figure(figsize=(6, 3.7), layout="constrained")
    panel = figure.subplots()
    panel.plot(*points.T, "o", color="0.6", markersize=6)
    for point, weight in zip(points, (p / p.max()).tolist(), strict=True):
        if weight > 0.05:
            arrow(panel, x, point, color=BLUE, alpha=0.2 + 0.8 * weight, linewidth=0.5 + 2 * weight, mutation_scale=12)
    arrow(panel, x, x + mean, color=ORANGE, linewidth=5, mutation_scale=24)
    panel.plot(*x, "o", color="black", markersize=10)
    panel.text(x[0], x[1] - 0.08, "noisy $\\tilde{x}$", ha="center", va="top", fontsize=16)
    panel.text(x[0] - 0.08, x[1] + 0.02, "mean: $\\sigma^2$ score", ha="right", color=ORANGE, fontsize=16)
    panel.text(-1.45, 0.1, "clean $x$", color="0.4", fontsize=16)
    panel.set(aspect="equal")
    panel.set_axis_off()
    save(figure, path)


def arrow(panel, start: Tensor, end: Tensor, **how) -> None:
    """Draw an arrow between two points (2,)."""
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **how}
    panel.annotate("", xy=end.tolist(), xytext=start.tolist(), arrowprops=style)


def noise_levels(path: Path) -> None:
    """One digit at the ten noise levels of lesson 3, and at ten of lesson 4's: the same noise z, times sigma_i.

    Values outside [0, 1] are clamped, as in all pictures of the lessons; the network gets them as they are.
    """
    L = number_of_noise_scales(SIGMA_1, SIGMA_L, noise_scale_ratio(D))
    every = torch.linspace(0, L - 1, 10).round().long()
    levels = {
        "lesson 3: all 10 noise levels": geometric_noise_scales(1.0, SIGMA_L, 10),
        f"lesson 4: 10 of the {L} noise levels": geometric_noise_scales(SIGMA_1, SIGMA_L, L)[every],
    }
    x = load_images("mnist")[7, 0] / 255  # (28, 28)
    z = torch.randn(28, 28, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    for rows, (name, sigmas) in zip(figure.subfigures(2, 1), levels.items(), strict=True):
        rows.suptitle(name, fontsize=12)
        for panel, sigma in zip(rows.subplots(1, 10), sigmas.tolist(), strict=True):
            panel.imshow((x + sigma * z).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            panel.set_title(f"{sigma:.{3 if sigma > 10 else 2}g}", fontsize=12, pad=3)
            panel.set_axis_off()
        print(f"{name}: {', '.join(f'{sigma:.2g}' for sigma in sigmas.tolist())}")
    figure.supxlabel("same noise, times $\\sigma_i$; clamped to [0, 1] for display", fontsize=11)
    save(figure, path)


def sigma_1_in_2d(path: Path, chains: int = 20_000, T: int = 100) -> None:
    """Technique 1 in 2-D: the share of chains that end in the small mode, over sigma_1 / distance of the modes.

    The mixture and the start are those of lesson 3's toy_2d.py, and the score is exact: 20 % are right, and 50 % are
    on the small mode's side at the start. Neighbouring levels have the ratio 1.4, down to 0.5 or just above.
    Expected before it was run: 48 % up to sigma_1 = 2, since chains cannot cross, 30 % at 4, and 22 % from 8 on, where
    2 sigma_1 exceeds the distance, so that the noisy density has only one mode.
    """
    means, weights = torch.tensor([[-5.0, -5.0], [5.0, 5.0]]), torch.tensor([0.2, 0.8])
    distance, shares = float((means[0] - means[1]).norm()), {}
    for sigma_1 in (0.5, 1, 2, 4, 8, 14, 28):
        L = 1 + int(math.log(sigma_1 / 0.5) / math.log(1.4))
        sigmas = sigma_1 * 1.4 ** -torch.arange(L)

        def score(x, i, sigmas=sigmas):
            variance = 1 + sigmas[i][:, None] ** 2  # (B, 1)
            away = means - x.flatten(1)[:, None]  # (B, 2 modes, 2)
            p = (weights.log() - away.square().sum(2) / (2 * variance)).softmax(1)  # (B, 2 modes)
            return ((p[:, :, None] * away).sum(1) / variance).view_as(x)

        generator = torch.Generator().manual_seed(0)
        start = 16 * torch.rand(chains, 2, 1, 1, generator=generator) - 8
        epsilon = 0.1 * float(sigmas[-1]) ** 2  # alpha_i = 0.1 sigma_i^2
        *_, x = sampler_3.annealed_langevin_dynamics(score, start, sigmas, T, epsilon, generator)
        shares[sigma_1] = (x.sum(1) < 0).float().mean().item()
        print(f"sigma_1 = {sigma_1:g}, {sigma_1 / distance:.2f} of the distance, L = {L}: {shares[sigma_1]:.1%}")

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    panel = figure.subplots()
    ratios = [sigma_1 / distance for sigma_1 in shares]
    panel.plot(ratios, [100 * share for share in shares.values()], "-o", color=BLUE, linewidth=2, markersize=8)
    panel.axhline(20, color=ORANGE, linestyle="--", linewidth=2)
    panel.text(ratios[0], 18.8, "right: 20 %", color=ORANGE, va="top", fontsize=13)
    panel.axvline(1, color="black", linestyle=":", linewidth=2)
    panel.text(0.95, 53, "Technique 1", ha="right", va="center", fontsize=13)
    panel.set(xscale="log", ylim=(0, 56))
    log_ticks(panel.xaxis, (0.05, 0.1, 0.2, 0.5, 1, 2))
    panel.set_xlabel("$\\sigma_1$ / distance of the modes", fontsize=14)
    panel.set_ylabel("% of chains in the small mode", fontsize=14)
    panel.tick_params(labelsize=12)
    panel.grid(alpha=0.3)
    save(figure, path)


def line_between_digits(path: Path, number: int = 1000) -> None:
    """Technique 1: noise has the length sigma sqrt(D), but only sigma along the line from one digit to another.

    Each dot is a noisy digit: how far it is along that line, and how far from it.
    """
    a, b = (load_images("mnist")[[0, 1]] / 255).flatten(1)  # (D,): the first two digits, a 5 and a 0
    distance = (b - a).norm()
    along = (b - a) / distance  # (D,), of length 1
    generator = torch.Generator().manual_seed(0)
    figure = Figure(figsize=(6, 5), layout="constrained")
    for panel, sigma in zip(figure.subplots(2, 1), (1.0, float(distance)), strict=True):
        for name, digit, color, marker in (("5", a, ORANGE, "o"), ("0", b, BLUE, "^")):
            noisy = digit - a + sigma * torch.randn(number, D, generator=generator)  # (number, D)
            t = noisy @ along  # (number,)
            rest = (noisy - t[:, None] * along).norm(dim=1)  # (number,)
            style = {"color": color, "markersize": 3, "alpha": 0.5, "markeredgewidth": 0}
            panel.plot(t, rest, marker, label=f"{name} + noise", **style)
            print(f"sigma = {sigma:.2f}, digit {name}: along {t.mean():.2f} +- {t.std():.2f}, rest {rest.mean():.2f}")
        panel.set_title(f"$\\sigma$ = {sigma:.3g}; the digits are {distance:.3g} apart", fontsize=13)
        panel.set_ylabel("distance from the line", fontsize=12)
    panel.set_xlabel("position on the line from one digit to the other", fontsize=12)
    figure.axes[0].legend(fontsize=12, markerscale=3)
    save(figure, path)


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
    """The left side of Eq. 4 of NCSNv2: how much of a noise scale's shell lies within 3 deviations of the next."""

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
        for epsilon in (langevin_step_size(sigmas, T), step_size_for_all_scales(sigmas, T)):
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
    """Digit FID against network calls for each sample: all measurements, and a line through the mean of each number."""
    lines, series = read_csv(source, ("sampler", "calls", "n", "seed", "fid")), {}
    for line in lines:
        series.setdefault(line["sampler"], {}).setdefault(int(line["calls"]), []).append(float(line["fid"]))
    figure, (panel,) = panels(1)
    styles = zip((ORANGE, BLUE), ("o", "s"), ("--", "-"), strict=True)
    for (name, several), (color, marker, style) in zip(series.items(), styles):
        means = {calls: geometric_mean(fids) for calls, fids in sorted(several.items())}
        panel.plot(means.keys(), means.values(), style, color=color, linewidth=2, label=name)
        for calls, fids in several.items():
            panel.plot([calls] * len(fids), fids, marker, color=color, markersize=7)
    panel.set(xscale="log", yscale="log")
    log_ticks(panel.xaxis, sorted({calls for several in series.values() for calls in several}))
    log_ticks(panel.yaxis, (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000))
    panel.set_xlabel("network calls for each sample", fontsize=12)
    panel.set_ylabel(f"digit FID (n = {', '.join(sorted({line['n'] for line in lines}, key=int))})", fontsize=12)
    panel.legend(fontsize=11)
    save(figure, path)


def compare(path: Path, source: Path = DOCS / "compare.csv") -> None:
    """Digit FID against network calls of the five lessons: all seeds, and a line through their mean."""
    lines, series = read_csv(source, TECHNIQUES_COLUMNS), {}
    lines = [line for line in lines if line["experiment"] in ("calls", "many calls") and line["y"] == "fid"]
    for line in lines:
        fids = series.setdefault(line["setting"].split(",")[0], {}).setdefault(int(line["x"]), [])
        fids.append(float(line["value"]))
    figure, (panel,) = panels(1)
    labels = "3: NCSN", "4: NCSNv2", "5: DDPM", "7: Score SDE", "9: Improved DDPM"
    for name, label, color in zip(sorted(series), labels, ("gray", ORANGE, BLUE, PINK, GREEN), strict=True):
        several = series[name]
        means = {calls: geometric_mean(fids) for calls, fids in sorted(several.items())}
        panel.plot(means.keys(), means.values(), color=color, linewidth=2, label=label)
        for calls, fids in several.items():
            panel.plot([calls] * len(fids), fids, "o", color=color, markersize=5)
    panel.set(xscale="log", yscale="log", ylim=(2.5, 1000))
    log_ticks(panel.xaxis, (10, 25, 50, 100, 1000))
    log_ticks(panel.yaxis, (3, 5, 10, 20, 50, 100, 200, 500))
    panel.set_xlabel("network calls for each sample", fontsize=12)
    panel.set_ylabel(f"digit FID (n = {lines[0]['n']})", fontsize=12)
    panel.legend(fontsize=11)
    panel.grid(alpha=0.3)
    save(figure, path)


def technique_1(path: Path, source: Path = TECHNIQUES) -> None:
    """Technique 1: how many chains keep the class of the digit that they start at, over the noise at the start."""
    points, n = read_experiment(source, "technique_1", "kept")
    figure, (panel,) = panels(1)
    panel.plot(*zip(*points["lesson 4"]), "-o", color=BLUE, linewidth=2, label="lesson 4, from all levels")
    panel.plot(*zip(*points["lesson 3"]), "s", color=ORANGE, markersize=10, label="lesson 3, from $\\sigma_1$")
    panel.axhline(0.1, color="black", linestyle="--", linewidth=1)
    panel.text(max(points["lesson 4"])[0], 0.12, "chance", ha="right", fontsize=11)
    panel.set(xscale="log", ylim=(0, 1.02))
    log_ticks(panel.xaxis, (0.3, 0.5, 1, 2, 3, 5, 10, 17))
    panel.set_xlabel("noise level at which the chain starts", fontsize=12)
    panel.set_ylabel(f"share that keeps its class ({n})", fontsize=12)
    panel.legend(fontsize=11)
    save(figure, path)


def technique_2(path: Path, source: Path = TECHNIQUES) -> None:
    """Technique 2: the loss at noise that is not of the level; the bars reach from 1 / gamma to gamma."""
    points, n = read_experiment(source, "technique_2", "loss")
    figure, (above, below) = panels(2, 6.4)
    styles = ((0.03, ":", "^"), (0.1, "-", "o"), (0.3, "--", "s"))
    for name, color in (("lesson 3", ORANGE), ("lesson 4", BLUE)):
        for sigma, style, marker in styles:
            line = points[f"{name} at {sigma}"]
            at_1 = min(line, key=lambda point: abs(point[0] - 1))[1]
            k, loss = zip(*((k, loss / at_1) for k, loss in line))
            above.plot(k, loss, style, marker=marker, color=color, linewidth=2, label=f"{name}, $\\sigma$ = {sigma}")
    for gamma, gray in ((1.668, "0.92"), (1.082, "0.8")):
        above.axvspan(1 / gamma, gamma, color=gray, zorder=0)
    above.set(yscale="log", xlim=(0.48, 2.05))
    log_ticks(above.yaxis, (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100))
    above.set_xlabel("noise in the image / noise of the level", fontsize=12)
    above.set_ylabel("loss / loss at 1", fontsize=12)
    above.legend(fontsize=10, ncols=2)
    budget, n = read_experiment(source, "technique_2", "fid")
    below.plot(*zip(*budget["96 calls"]), "-o", color=BLUE, linewidth=2)
    below.set(xscale="log", ylim=(0, None))
    log_ticks(below.xaxis, (12, 24, 48, 96))
    below.set_xlabel("noise levels; 96 network calls in all", fontsize=12)
    below.set_ylabel(f"digit FID ({n})", fontsize=12)
    save(figure, path)


def technique_3(path: Path, source: Path = TECHNIQUES) -> None:
    """Technique 3: the loss by noise level early in training, and the size of the output over the noise in x."""
    points, _ = read_experiment(source, "technique_3", "loss")
    figure, (above, below) = panels(2, 6.8)
    names = {
        "lesson 3 as in the paper": ("lesson 3, the paper's start", ORANGE, ":", "^"),
        "lesson 3 from 1/sigma": ("lesson 3, started at 1 / $\\sigma$", GREEN, "--", "s"),
        "lesson 4": ("lesson 4: s(x) / $\\sigma$", BLUE, "-", "o"),
    }
    for name, (label, color, style, marker) in names.items():
        above.plot(*zip(*points[name]), style, marker=marker, color=color, linewidth=2, label=label)
    above.axhline(D / 2, color="black", linestyle="--", linewidth=1)
    above.set(xscale="log", yscale="log")
    log_ticks(above.xaxis, (0.01, 0.03, 0.1, 0.3, 1, 3, 10))
    log_ticks(above.yaxis, (1, 2, 5, 10, 20, 50, 100, 200, 400, 1000, 3000))
    above.set_xlabel("noise level $\\sigma_i$; dashed: a network that returns zero", fontsize=12)
    above.set_ylabel("loss after 300 steps", fontsize=12)
    above.legend(fontsize=11)
    points, _ = read_experiment(source, "technique_3", "size")
    for name, color in (("lesson 3", ORANGE), ("lesson 4", BLUE)):
        for sigma, style, marker in ((0.03, ":", "^"), (0.1, "-", "o"), (0.3, "--", "s")):
            label = f"{name}, $\\sigma$ = {sigma}"
            below.plot(*zip(*points[f"{name} at {sigma}"]), style, marker=marker, color=color, linewidth=2, label=label)
    below.plot((0.5, 2), (0.5, 2), color="black", linewidth=1)
    below.text(1.7, 1.75, "as large as the noise", ha="right", fontsize=11)
    below.set_ylim(0, 2.1)
    below.set_xlabel("noise in the image / noise of the level", fontsize=12)
    below.set_ylabel("size of $\\sigma_i s(x, i)$", fontsize=12)
    below.legend(fontsize=10, ncols=2)
    save(figure, path)


def technique_4(path: Path, source: Path = TECHNIQUES) -> None:
    """Technique 4: digit FID and the noise of the background over the step size, for T = 1, 2, 3 and 10."""
    figure, (above, below) = panels(2, 7.6)
    sigmas = geometric_noise_scales(SIGMA_1, SIGMA_L, number_of_noise_scales(SIGMA_1, SIGMA_L, noise_scale_ratio(D)))
    r = torch.logspace(-1.7, 0, 300, dtype=torch.float64)
    for T, color, style in ((1, PINK, ":"), (2, ORANGE, "-."), (3, BLUE, "-"), (10, "black", "--")):
        for panel, y in ((above, "fid"), (below, "noise")):
            points, n = read_experiment(source, "technique_4", y)
            special = [points[f"T = {T} by {name}"][0] for name in ("Technique 4", "the recursion")]
            line = sorted(points[f"T = {T}"] + special)
            between = style if panel is above else "none"  # below, the recursion's line is there
            panel.plot(*zip(*line), linestyle=between, marker=".", color=color, linewidth=2, label=f"T = {T}")
            for point, marker in zip(special, "o*"):
                panel.plot(*point, marker, color=color, markersize=9 if marker == "o" else 14)
        below.plot(r, SIGMA_L * noise_after_langevin(sigmas, T, r * SIGMA_L**2), style, color=color, linewidth=1)
    for marker, label in (("o", "r of Technique 4"), ("*", "r of the recursion")):
        above.plot([], [], marker, color="black", markersize=9, label=label)
    for panel in (above, below):
        panel.set(xscale="log", yscale="log", xlim=(0.05, 0.8))
        log_ticks(panel.xaxis, (0.06, 0.12, 0.25, 0.5))
    log_ticks(above.yaxis, (5, 10, 20, 50, 100, 200, 400))
    below.set_ylim(0.008, 20)
    log_ticks(below.yaxis, (0.01, 0.02, 0.05, 0.1, 0.3, 1, 3, 10))
    above.set_ylabel(f"digit FID ({n})", fontsize=12)
    above.legend(fontsize=11)
    below.set_ylabel("noise left; lines: predicted", fontsize=12)
    below.set_xlabel("step size r = $\\epsilon\\, /\\, \\sigma_L^2$", fontsize=12)
    save(figure, path)


def eta(path: Path, source: Path = TECHNIQUES) -> None:
    """Consistent sampling: digit FID over eta, and the noise left over gamma^2 (1 - eta), the growth of an excess."""
    figure, (above, below) = panels(2, 7.6)
    styles = {
        97: (BLUE, "-", "o"),
        49: (GREEN, "--", "s"),
        25: (ORANGE, "-.", "^"),
        13: (PINK, ":", "D"),
        7: ("0.4", "-", "v"),
    }
    for calls, (color, style, marker) in styles.items():
        gamma_squared = (SIGMA_1 / SIGMA_L) ** (2 / (calls - 2))
        for panel, y in ((above, "fid"), (below, "noise")):
            points, n = read_experiment(source, "eta", y)
            x, value = zip(*points[f"{calls} calls"])
            growth = [gamma_squared * (1 - e) for e in x]
            ddpm = min(range(len(x)), key=lambda k: abs(growth[k] - 1))
            x = x if panel is above else growth
            how = {"marker": marker, "color": color, "linewidth": 2, "markersize": 5}
            panel.plot(x, value, style, label=f"{calls} calls", **how)
            panel.plot(x[ddpm], value[ddpm], marker, color="black", markersize=8, zorder=3)
    above.plot([], [], "o", color="black", markersize=8, label="DDPM's step")
    below.axvline(1, color="black", linestyle="--", linewidth=1)
    for panel in (above, below):
        panel.set_yscale("log")
    log_ticks(above.yaxis, (5, 7, 10, 15, 20, 30, 50, 100, 200, 400))
    log_ticks(below.yaxis, (0.01, 0.012, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5))
    above.set_xlabel("$\\eta$; each line begins at DDIM's", fontsize=12)
    above.set_ylabel(f"digit FID ({n})", fontsize=12)
    above.legend(fontsize=10, ncols=2)
    below.set_xlabel("growth of excess noise at each level, $\\gamma^2 (1 - \\eta)$", fontsize=12)
    below.set_ylabel("noise before the last step", fontsize=12)
    save(figure, path)


def technique_5(path: Path, source: Path = TECHNIQUES) -> None:
    """Technique 5: ink and digit FID with raw and with averaged weights, late in a training at a constant rate."""
    figure, (above, below) = panels(2, 6.4)
    for panel, y in ((above, "ink"), (below, "fid")):
        points, n = read_experiment(source, "technique_5", y)
        for name, color, style, marker in (("raw weights", ORANGE, "--", "o"), ("averaged weights", BLUE, "-", "s")):
            panel.plot(*zip(*points[name]), style, marker=marker, color=color, linewidth=2, label=name)
    ink = load_images("mnist", "test").float().mean().item() / 255
    above.axhline(ink, color="black", linestyle=":", linewidth=2, label="test digits")
    above.set_ylabel("mean pixel", fontsize=12)
    above.legend(fontsize=11)
    below.set_ylim(0, None)
    below.set_xlabel("training steps", fontsize=12)
    below.set_ylabel(f"digit FID ({n})", fontsize=12)
    save(figure, path)


def raw_and_averaged(path: Path, frames: dict[str, list[Tensor]], steps: list[int]) -> None:
    """Technique 5: {weights: [(N, 1, 28, 28) for each of the steps]}, a row for a step and a column for a seed."""
    figure, both = panels(2, 9)
    for panel, (name, images) in zip(both, frames.items(), strict=True):
        show_grid(panel, torch.stack(images))
        panel.set_title(name, fontsize=13)
        panel.set_yticks([28 * k + 13.5 for k in range(len(steps))], [f"step {step}" for step in steps], fontsize=11)
    save(figure, path)


def before_and_after(path: Path, before: Tensor, after: Tensor) -> None:
    """The last denoising step: one image (1, 28, 28) before and after it, as it is, and with pixels times 20."""
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    for row, contrast in zip(figure.subplots(2, 2), (1, 20), strict=True):
        for panel, name, image in zip(row, ("before", "after"), (before, after), strict=True):
            show_grid(panel, contrast * image.cpu()[None, None])
            std = f"{name}: noise {image[:, :3].std().item():.4f}"
            panel.set_title(std if contrast == 1 else f"contrast x {contrast}", fontsize=13)
    save(figure, path)


def measure(path: Path, source: Path = DOCS / "measure.csv") -> None:
    """Real digits, damaged in four ways such that their digit FID rises by about 1, 5 and 20.

    Of the strengths in docs/measure.csv, those are shown whose mean over the seeds comes nearest.
    """
    lines, damages = read_csv(source, ("damage", "strength", "n", "fid")), ("noise", "thinner", "broken", "non-digits")
    n = max((line["n"] for line in lines), key=int)
    measured = {damage: {} for damage in damages}  # {damage: {strength: [fid of each seed]}}
    for line in lines:
        if line["n"] == n and line["damage"] in damages:
            measured[line["damage"]].setdefault(float(line["strength"]), []).append(float(line["fid"]))
    if not all(measured.values()):
        raise LessonError(f"{source} lacks some of {', '.join(damages)}: run python docs/measure.py")
    fids = {damage: {s: mean(several) for s, several in found.items()} for damage, found in measured.items()}
    floor = fids["noise"][0]
    figure = Figure(figsize=(6, 6.1), layout="constrained")
    grid = figure.add_gridspec(5, 3, height_ratios=(1, 2, 2, 2, 2))
    top = figure.add_subplot(grid[0, :])
    show_grid(top, damaged("noise", 0, 12, seed=0)[None])
    top.set_title(f"real digits: digit FID {floor:.1f} (n = {n})", fontsize=11)
    for row, damage in enumerate(damages, start=1):
        for column, rise in enumerate((1, 5, 20)):
            strength = min(fids[damage], key=lambda s: abs(fids[damage][s] - floor - rise))
            fid = fids[damage][strength]
            panel = figure.add_subplot(grid[row, column])
            show_grid(panel, damaged(damage, strength, 8, seed=0).view(2, 4, 1, 28, 28))
            text = DAMAGES[damage][0].format(strength)
            panel.set_title(f"{text}\n{fid:.1f} = {floor:.1f} + {fid - floor:.1f}", fontsize=10)
    save(figure, path)


def panels(rows: int, height: float = 4.4) -> tuple[Figure, list]:
    """A figure of `rows` panels, one above the other, with grid lines."""
    figure = Figure(figsize=(6, height), layout="constrained")
    several = figure.subplots(rows, 1, squeeze=False)[:, 0].tolist()
    for panel in several:
        panel.grid(alpha=0.3)
    return figure, several


def show_grid(panel, images: Tensor) -> None:
    """Images (rows, columns, 1, H, W), clamped to [0, 1], as one picture without ticks."""
    pixels = images[:, :, 0].clamp(0, 1).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (rows H, columns W)
    panel.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
    panel.grid(False)
    panel.set(xticks=[], yticks=[])


def log_ticks(axis, marks: tuple) -> None:
    """Ticks at those of the marks that the axis shows, with plain numbers, and none between."""
    low, high = sorted(axis.get_view_interval())
    shown = [mark for mark in marks if low <= mark <= high]
    axis.set_ticks(shown, [f"{mark:g}" for mark in shown])
    axis.set_ticks([], minor=True)


def read_experiment(source: Path, experiment: str, y: str) -> tuple[dict[str, list[tuple[float, float]]], str]:
    """What the script of the CSV file measured in an experiment: {setting: [(x, value of y), ...]}, and "n = ...".

    The first value at each x: those of other seeds, or of fewer images, come behind it in the file.
    """
    lines = read_csv(source, TECHNIQUES_COLUMNS)
    lines = [line for line in lines if (line["experiment"], line["y"]) == (experiment, y)]
    if not lines:
        raise LessonError(f"{source} has no {y} of {experiment}: run python docs/{source.stem}.py {experiment}")
    points = {}
    for line in lines:
        points.setdefault(line["setting"], {}).setdefault(float(line["x"]), float(line["value"]))
    return {setting: sorted(line.items()) for setting, line in points.items()}, f"n = {lines[0]['n']}"


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The lines of a CSV file. LessonError if the file, a column or every line is missing."""
    try:
        lines = list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise LessonError(f"cannot read {path}: {error.strerror}") from error
    if not lines or not set(columns) <= lines[0].keys():
        raise LessonError(f"{path} needs the columns {', '.join(columns)}, and at least one line")
    return lines


def drawn(figure: Figure) -> str:
    """A checksum of the points and titles in the figure. save() notes it in the PNG, to know one of older numbers."""
    shown = []
    for panel in figure.axes:
        points = [*(line.get_xydata() for line in panel.lines), *(dots.get_offsets() for dots in panel.collections)]
        shown += [panel.get_title(), *(f"{number:.3g}" for each in points for number in each.flatten())]
    return f"{zlib.crc32(' '.join(shown).encode()):08x}"


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG of 720 pixels' width and 64 colours. Raises LessonError if path cannot be written."""
    buffer, note = io.BytesIO(), PngInfo()
    figure.savefig(buffer, format="png", dpi=120)
    note.add_text("drawn", drawn(figure))
    with atomic_write(path) as temporary:
        Image.open(buffer).convert("RGB").quantize(64).save(temporary, format="PNG", optimize=True, pnginfo=note)
    print(f"look at {path}")


FIGURES = {
    "lesson_03_denoising": denoising,
    "lesson_03_noise_scales": noise_levels,
    "lesson_04_sigma_1": sigma_1_in_2d,
    "lesson_04_line": line_between_digits,
    "lesson_04_modes": modes,
    "lesson_04_ladder": noise_ladder,
    "lesson_04_step_size": step_size,
    "lesson_04_technique_1": technique_1,
    "lesson_04_technique_2": technique_2,
    "lesson_04_technique_3": technique_3,
    "lesson_04_technique_4": technique_4,
    "lesson_04_eta": eta,
    "lesson_04_technique_5": technique_5,
    "sampling_calls": sampling_calls,
    "compare": compare,
    "measure": measure,
}


def make(doc: str, figures: dict[str, Callable[[Path], None]]) -> None:
    """Makes the figures that are named on the command line, or all of docs/images; doc is the script's docstring."""
    parser = ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(figures)}; or all that are there")
    parser.add_argument("--output", default=str(DOCS / "images"), help="folder (default: docs/images)")
    options = parser.parse_args()
    for name in options.names:
        if name not in figures:
            raise LessonError(f"there is no figure {name}: choose from {', '.join(figures)}")
    for name in options.names or [name for name in figures if (DOCS / "images" / f"{name}.png").is_file()]:
        figures[name](Path(options.output) / f"{name}.png")


if __name__ == "__main__":
    run(lambda: make(__doc__, FIGURES))
