"""Scores and Langevin dynamics in two dimensions: `python toy_2d.py`, and look at output/toy_*.png.

The data is the mixture of Fig. 2 and 3 of the NCSN paper, 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), whose score is known.
Shapes: B points are "images" (B, 2, 1, 1), so that loss.py and sampler.py can be used as they are.
"""

import sys
from argparse import ArgumentParser
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import denoising_score_matching_loss
from matplotlib.figure import Figure
from noise_scales import geometric_noise_scales
from sampler import annealed_langevin_dynamics

from common.cli import run
from common.config import check_range
from common.files import atomic_write

WEIGHTS = torch.tensor([0.2, 0.8])
MEANS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])


def draw_data(n: int) -> Tensor:
    """n points of the mixture: (n, 2, 1, 1)."""
    which = torch.multinomial(WEIGHTS, n, replacement=True)
    return (MEANS[which] + torch.randn(n, 2))[:, :, None, None]


def true_score(x: Tensor, variance: float = 1.0) -> Tensor:
    """The score at x (B, 2, 1, 1) of the mixture whose two parts have this variance, 1 + sigma^2 under noise sigma."""
    away = MEANS - x.flatten(1)[:, None]  # (B, 2 parts, 2): from x to each mean
    log_p = WEIGHTS.log() - away.square().sum(2) / (2 * variance)  # (B, 2 parts), but for a constant
    return (log_p.softmax(1)[:, :, None] * away).sum(1)[:, :, None, None] / variance


def learn_score(sigma: float, steps: int) -> nn.Module:
    """A network x (B, 2, 1, 1) -> score, trained by denoising score matching at the one scale sigma."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(),
                            nn.Linear(128, 2), nn.Unflatten(1, (2, 1, 1)))  # fmt: skip
    optimizer, sigmas, i = torch.optim.Adam(network.parameters(), 1e-3), torch.tensor([sigma]), torch.zeros(512).long()
    for _ in range(steps):
        x = draw_data(512)
        loss = denoising_score_matching_loss(lambda x, i: network(x), x, sigmas, i, torch.randn_like(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@contextmanager
def square(title: str, path: Path):
    """A panel that shows [-8.8, 8.8]^2, to draw in; then it is written as a PNG."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    panel = figure.subplots()
    panel.set(title=title, xlim=(-8.8, 8.8), ylim=(-8.8, 8.8), aspect="equal")
    yield panel
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


@torch.no_grad()
def show_field(score, title: str, path: Path) -> Tensor:
    """Draws the directions of a score on a grid over [-8, 8]^2, above the density; returns it there (441, 2)."""
    axis = torch.linspace(-8, 8, 21)
    x = torch.cartesian_prod(axis, axis)[:, :, None, None]  # (441, 2, 1, 1)
    s = score(x).flatten(1)
    s_arrow = s / (1 + s.norm(dim=1, keepdim=True))  # long ones shortened, to see the directions of all
    with square(title, path) as panel:
        panel.scatter(*draw_data(3000).flatten(1).T, s=2, color="#E69F00", alpha=0.4, linewidths=0)
        panel.quiver(*x.flatten(1).T, *s_arrow.T, angles="xy", color="#0072B2", width=0.004)
    return s


def show_samples(x: Tensor, title: str, path: Path) -> float:
    """Draws points (B, 2, 1, 1); returns the share of them that belongs to the smaller part, which should be 0.2."""
    share = float((x.flatten(1).sum(1) < 0).float().mean())
    with square(title, path) as panel:
        panel.scatter(*x[:3000].flatten(1).T, s=2, color="#0072B2", alpha=0.4, linewidths=0)
        panel.text(-5, -8.4, f"{share:.1%}", ha="center", fontsize=16)
        panel.text(5, -8.4, f"{1 - share:.1%}", ha="center", fontsize=16)
    return share


def main() -> None:
    """Makes four figures (NCSN, Sec. 3.2, Fig. 2, Fig. 3) and prints what can be measured in them."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the learned score (default: 3000)")
    parser.add_argument("--num", type=int, default=10_000, help="points to draw by each sampler (default: 10000)")
    parser.add_argument("--T", type=int, default=100, help="steps at each of ten noise scales (default: 100)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder (default: output)")
    options = parser.parse_args()
    for name in ("steps", "num", "T"):
        check_range(f"--{name}", getattr(options, name))
    torch.manual_seed(0)

    true = show_field(true_score, "the score of the data", options.output / "toy_true_score.png")
    network = learn_score(0.1, options.steps)
    learned = show_field(network, "the learned score", options.output / "toy_learned_score.png")
    axis = torch.linspace(-8, 8, 21)
    near = torch.cdist(torch.cartesian_prod(axis, axis), MEANS).amin(1) < 2.5  # where most of the data is
    error = (learned - true).norm(dim=1)
    print(f"mean error of the learned score: {error[near].mean():.2f} near data, {error[~near].mean():.2f} elsewhere")

    start = 16 * torch.rand(options.num, 2, 1, 1) - 8  # uniform in [-8, 8]^2
    one = torch.tensor([1.0])  # one "noise scale" makes annealed Langevin dynamics the plain one
    *_, x = annealed_langevin_dynamics(lambda x, i: true_score(x), start, one, 10 * options.T, 0.1)
    share = show_samples(x, "Langevin dynamics", options.output / "toy_langevin.png")
    print(f"Langevin dynamics: {share:.1%} in the smaller part; in the data, 20%")

    sigmas = geometric_noise_scales(20, 1, 10)
    *_, x = annealed_langevin_dynamics(lambda x, i: true_score(x, 1 + float(sigmas[i[0]]) ** 2), start, sigmas,
                                       options.T, 0.1)  # fmt: skip
    share = show_samples(x, "annealed Langevin dynamics", options.output / "toy_annealed.png")
    print(f"annealed Langevin dynamics: {share:.1%} in the smaller part")


if __name__ == "__main__":
    run(main)
