"""A first score network, before RefineNet: `python first_network.py`, and look at output/first_network.png.

Six convolutions that are told the noise scale as one more channel. Everything else is the lesson's own: the noise
scales, the loss and the sampler. It trains for about a minute and a half on one CPU core.

Shapes: B images of C = 1 channel and H x W = 28 x 28 pixels.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import denoising_score_matching_loss
from noise_scales import geometric_noise_scales
from sampler import annealed_langevin_dynamics

from common.cli import run
from common.config import check_range
from common.data import load_images
from common.images import check_finite, save_grid


class FirstScoreNetwork(nn.Module):
    """Estimates the score of images with noise of scale sigma_i from what lies within six pixels (cf. NCSN, Sec. 4.2).

    sigmas (L,) is the ladder; `width` channels between the convolutions.
    """

    def __init__(self, sigmas: Tensor, width: int = 32):
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        """x (B, 1, H, W), i (B,) long; returns the score (B, 1, H, W)."""
        sigma = self.sigmas[i][:, None, None, None]  # (B, 1, 1, 1)
        h = torch.cat([x, sigma.log().expand_as(x)], dim=1)  # (B, 2, H, W)
        h = self.first(h).relu()  # (B, width, H, W)
        for conv in self.middle:
            h = h + conv(h).relu()
        return self.last(h) / sigma  # a score has the size of 1 / sigma


def main() -> None:
    """Trains, draws 64 images and writes them as one picture."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=600, help="training steps of 32 images (default: 600)")
    parser.add_argument("--T", type=int, default=20, help="Langevin steps at each of ten noise scales (default: 20)")
    parser.add_argument("--output", default="output/first_network.png", help="(default: output/first_network.png)")
    options = parser.parse_args()
    for name in ("steps", "T"):
        check_range(f"--{name}", getattr(options, name))

    torch.manual_seed(0)
    images, sigmas = load_images("mnist"), geometric_noise_scales(1.0, 0.01, 10)
    network = FirstScoreNetwork(sigmas)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    with tqdm(range(options.steps), unit=" steps") as bar:
        for _ in bar:
            x = images[torch.randint(len(images), (32,))] / 255  # (B, 1, 28, 28)
            i = torch.randint(len(sigmas), (32,))  # (B,)
            loss = denoising_score_matching_loss(network, x, sigmas, i, torch.randn_like(x)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.1f}")

    *_, x = annealed_langevin_dynamics(network, torch.rand(64, 1, 28, 28), sigmas, options.T, 2e-5)
    check_finite(x)
    save_grid(x, options.output)
    print(f"look at {options.output}")


if __name__ == "__main__":
    run(main)
