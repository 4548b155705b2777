"""A first score network, before RefineNet: `python first_network.py`, and look at output/first_network.png.

Three linear layers and four convolutions that are told the noise scale. Everything else is the lesson's own: the noise
scales, the loss and the sampler. It trains for about a minute on one CPU core.

Shapes: B images of C = 1 channel and H x W = 28 x 28 pixels.
"""

import sys
from argparse import ArgumentParser
from functools import partial
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
from common.files import check_writable
from common.images import check_finite, save_grid


class FirstScoreNetwork(nn.Module):
    """Estimates the score of images of 28 x 28 pixels with noise of scale sigma_i, in two parts (cf. NCSN, Sec. 4.1).

    Three linear layers see the whole image, which a digit needs. Their result and the image go through convolutions,
    which see four pixels far, and sharpen the strokes. sigmas (L,) are the noise scales; `width` is of the hidden
    linear layers, `channels` of the convolutions.
    """

    def __init__(self, sigmas: Tensor, width: int = 1024, channels: int = 16):
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        pixels, act = 28 * 28, nn.SiLU()
        layers = nn.Linear(pixels + 1, width), act, nn.Linear(width, width), act, nn.Linear(width, pixels)
        self.whole = nn.Sequential(*layers)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.first, self.last = conv(3, channels), conv(channels, 1)
        self.middle = nn.ModuleList([conv(channels, channels), conv(channels, channels)])

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        """x (B, 1, 28, 28), i (B,) long; returns the score (B, 1, 28, 28)."""
        sigma = self.sigmas[i][:, None, None, None]  # (B, 1, 1, 1)
        v = 0.1 + sigma**2  # the mean square of a pixel of x, noise included
        h, log_sigma = x / v.sqrt(), sigma.log()  # numbers of about one
        whole = self.whole(torch.cat([h.flatten(1), log_sigma.flatten(1)], dim=1)).view_as(x)  # (B, 1, 28, 28)
        h = self.first(torch.cat([h, whole, log_sigma.expand_as(x)], dim=1)).relu()  # (B, channels, 28, 28)
        for conv in self.middle:
            h = h + conv(h).relu()
        # -x / v is the score if pixels are Gaussian; what is missing has this size
        return -x / v + (whole + self.last(h)) * (0.1 / v).sqrt() / sigma


def main() -> None:
    """Trains, draws 64 images and writes them as one picture."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 64 images (default: 1500)")
    parser.add_argument("--T", type=int, default=20, help="Langevin steps at each of ten noise scales (default: 20)")
    parser.add_argument("--output", default="output/first_network.png", help="(default: output/first_network.png)")
    options = parser.parse_args()
    for name in ("steps", "T"):
        check_range(f"--{name}", getattr(options, name))
    check_writable(options.output)  # now, not after the work

    torch.manual_seed(0)
    images, sigmas = load_images("mnist"), geometric_noise_scales(1.0, 0.01, 10)
    network = FirstScoreNetwork(sigmas)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, n / 50) * (1 - n / options.steps))
    with tqdm(range(options.steps), unit=" steps") as bar:
        for _ in bar:
            x = images[torch.randint(len(images), (64,))] / 255  # (B, 1, 28, 28)
            i = torch.randint(len(sigmas), (64,))  # (B,)
            loss = denoising_score_matching_loss(network, x, sigmas, i, torch.randn_like(x)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.1f}")

    *_, x = annealed_langevin_dynamics(network, torch.rand(64, 1, 28, 28), sigmas, options.T, 2e-5)
    check_finite(x)
    save_grid(x, options.output)
    print(f"look at {options.output}")


if __name__ == "__main__":
    run(main)
