"""Scores and Langevin dynamics in two dimensions: `python toy_2d.py`, and look at output/toy_*.

The data is the mixture of Fig. 2 and 3 of the NCSN paper, 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), whose score is known.
Shapes: B points are "images" (B, 2, 1, 1), so that loss.py and sampler.py can be used as they are.
"""

import math
import sys
from argparse import ArgumentParser
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import denoising_score_matching_loss
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from noise_scales import geometric_noise_scales
from PIL import Image
from sampler import annealed_langevin_dynamics

from common.cli import run
from common.config import check_range
from common.files import atomic_write, check_writable
from common.images import save_gif

WEIGHTS = torch.tensor([0.2, 0.8])
MEANS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
SIGMA = 0.3  # the noise under which the score is learned
BLUE, ORANGE = "#0072B2", "#E69F00"  # for the colour-blind too (Okabe and Ito)


def draw_data(n: int) -> Tensor:
    """n points of the mixture: (n, 2, 1, 1)."""
    which = torch.multinomial(WEIGHTS, n, replacement=True)
    return (MEANS[which] + torch.randn(n, 2))[:, :, None, None]


def log_parts(x: Tensor, variance: float) -> Tensor:
    """Log of weight times density of each part at x (B, 2, 1, 1), but for a constant: (B, 2 parts)."""
    return WEIGHTS.log() - (x.flatten(1)[:, None] - MEANS).square().sum(2) / (2 * variance)


def true_score(x: Tensor, variance: float = 1.0) -> Tensor:
    """The score at x (B, 2, 1, 1) of the mixture whose two parts have this variance, 1 + sigma^2 under noise sigma."""
    p = log_parts(x, variance).softmax(1)  # (B, 2 parts)
    return (p @ MEANS - x.flatten(1))[:, :, None, None] / variance


def learn_score(sigma: float, steps: int) -> nn.Module:
    """A network x (B, 2, 1, 1) -> score, trained by denoising score matching at the one scale sigma."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(),
                            nn.Linear(128, 2), nn.Unflatten(1, (2, 1, 1)))  # fmt: skip
    optimizer, sigmas, i = torch.optim.Adam(network.parameters(), 2e-3), torch.tensor([sigma]), torch.zeros(512).long()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # else the last steps' noise would show
    for _ in range(steps):
        x = draw_data(512)
        loss = denoising_score_matching_loss(lambda x, i: network(x), x, sigmas, i, torch.randn_like(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    return network


def grid(n: int, half_width: float = 8.0) -> Tensor:
    """n x n points that fill a square: (n^2, 2, 1, 1)."""
    axis = torch.linspace(-half_width, half_width, n)
    return torch.cartesian_prod(axis, axis)[:, :, None, None]


def share_in_small_mode(x: Tensor) -> float:
    """The share of the points x (B, 2, 1, 1) that are on the side of the small mode; 0.2 in the data."""
    return float((x.flatten(1).sum(1) < 0).float().mean())


def draw_density(panel, half_width: float) -> None:
    """Lets a panel show a square, with contours of the density of the data: at each it is a tenth of the next one's."""
    x = grid(80, half_width)
    log_p = log_parts(x, 1.0).logsumexp(1) / math.log(10)  # (6400,)
    panel.tricontour(*x.flatten(1).T, log_p, levels=range(-7, 0), colors="0.75", linewidths=0.7, linestyles="-")
    panel.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width), aspect="equal")


def picture(figure: Figure) -> Image.Image:
    """The pixels of a figure, in 64 colours."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB").quantize(64)


@contextmanager
def square(title: str, path: Path):
    """A panel that shows [-8.8, 8.8]^2, to draw in; then it is written as a PNG."""
    figure = Figure(figsize=(5, 5), dpi=90, layout="constrained")
    panel = figure.subplots()
    panel.set_title(title, fontsize=16)
    draw_density(panel, 8.8)
    yield panel
    with atomic_write(path) as temporary:
        picture(figure).save(temporary, format="PNG", optimize=True)


@torch.no_grad()
def show_field(score, title: str, path: Path) -> None:
    """Draws arrows for a score, x (B, 2, 1, 1) -> the same shape, on a grid. All are shortened, to below length 1."""
    x = grid(21)
    s = score(x).flatten(1)  # (441, 2)
    s = s / (1 + s.norm(dim=1, keepdim=True))  # only the direction is left of a long one
    with square(title, path) as panel:
        panel.scatter(*draw_data(2000).flatten(1).T, s=3, color=ORANGE, linewidths=0)
        panel.quiver(*x.flatten(1).T, *s.T, angles="xy", color=BLUE, width=0.004)


@torch.no_grad()
def show_error(learned, true, path: Path) -> tuple[float, float]:
    """Draws a map of |learned - true| / |true| for two scores, and data; returns its median near data and elsewhere."""
    x = grid(121, 8.8)
    s = true(x)
    error = (learned(x) - s).flatten(1).norm(dim=1) / s.flatten(1).norm(dim=1)  # (14641,)
    with square("relative error of the learned score", path) as panel:
        colors = panel.tripcolor(*x.flatten(1).T, error, norm=LogNorm(0.01, 1), cmap="Blues", shading="gouraud")
        panel.scatter(*draw_data(1000).flatten(1).T, s=3, color=ORANGE, linewidths=0)
        panel.figure.colorbar(colors, location="bottom", format="{x:g}", extend="both")
    near = torch.cdist(x.flatten(1), MEANS).amin(1) < 2.5  # where most of the data is
    return float(error[near].median()), float(error[~near].median())


def show_chains(names: list[tuple[str, str]], plain: list[Tensor], annealed: list[Tensor], path: Path) -> None:
    """Writes a moving picture of two samplers side by side: 400 chains, and the share of all in the small mode.

    Each frame has two names and two sets of points (B, 2, 1, 1).
    """
    frames = []
    for titles, *points in zip(names, plain, annealed, strict=True):
        figure = Figure(figsize=(7.2, 4), dpi=100, layout="constrained")
        for panel, title, x in zip(figure.subplots(1, 2), titles, points, strict=True):
            draw_density(panel, 14)
            panel.scatter(*x[:400].flatten(1).T, s=6, color=BLUE, linewidths=0)
            panel.set(xticks=[], yticks=[])
            panel.set_title(title, fontsize=16)
            panel.set_xlabel(f"{share_in_small_mode(x):.0%} in the small mode; data: 20%", fontsize=13)
        pixels = torch.from_numpy(np.array(picture(figure).convert("RGB")))  # (H, W, 3) uint8
        frames.append(pixels.permute(2, 0, 1)[None] / 255)  # (1, 3, H, W)
    save_gif(frames, path, milliseconds=80, max_frames=len(frames))


def main() -> None:
    """Makes the pictures of two dimensions (NCSN, Sec. 3.2, Fig. 2, Fig. 3) and prints what can be measured in them."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the learned score (default: 2000)")
    parser.add_argument("--num", type=int, default=10_000, help="chains of each sampler (default: 10000)")
    parser.add_argument("--T", type=int, default=100, help="steps at each of ten noise scales (default: 100)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder (default: output)")
    options = parser.parse_args()
    for name in ("steps", "num", "T"):
        check_range(f"--{name}", getattr(options, name))
    check_writable(options.output / "toy_langevin.gif")  # now, not after the work
    torch.manual_seed(0)

    def score(x, sigma=SIGMA):
        return true_score(x, 1 + float(sigma) ** 2)  # of the data with noise

    network = learn_score(SIGMA, options.steps)
    show_field(score, "the true score", options.output / "toy_true_score.png")
    show_field(network, "the learned score", options.output / "toy_learned_score.png")
    near, elsewhere = show_error(network, score, options.output / "toy_error.png")
    print(f"relative error of the learned score: {near:.1%} near data, {elsewhere:.1%} elsewhere (medians)")

    start = 16 * torch.rand(options.num, 2, 1, 1) - 8  # uniform in [-8, 8]^2
    parts = math.gcd(options.T, 5)  # to see chains on the way, each scale comes so many times, with fewer steps
    sigmas, steps = geometric_noise_scales(20, 1, 10).repeat_interleave(parts), options.T // parts
    ones = torch.ones_like(sigmas)  # with one and the same scale, annealed Langevin dynamics is the plain one
    *plain, x = annealed_langevin_dynamics(lambda x, i: true_score(x), start, ones, steps, 0.1)
    *annealed, y = annealed_langevin_dynamics(lambda x, i: score(x, sigmas[i[0]]), start, sigmas, steps, 0.1)
    for name, points, file in (("Langevin dynamics", x, "langevin"), ("annealed Langevin dynamics", y, "annealed")):
        share = f"{share_in_small_mode(points):.1%} in the small mode; in the data, 20%"
        print(f"{name}: {share}")
        with square(name, options.output / f"toy_{file}.png") as panel:
            panel.scatter(*points[:3000].flatten(1).T, s=3, color=BLUE, linewidths=0)
            panel.set_xlabel(share, fontsize=14)
    names = [(f"Langevin, step {n * steps}", f"annealed, $\\sigma$ = {sigma:.2g}") for n, sigma in enumerate(sigmas, 1)]
    show_chains(names, [*plain, x], [*annealed, y], options.output / "toy_langevin.gif")


if __name__ == "__main__":
    run(main)
