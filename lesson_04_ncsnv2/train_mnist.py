"""Train NCSNv2 (Song & Ermon 2020, arXiv 2006.09011) on digits: `python train_mnist.py`, and look into output/.

Changes from lesson 3:
- Techniques 1 and 2: the noise scales are computed from the data, and Technique 4: so is the sampler's step size;
- Technique 5: samples come from an exponential moving average (EMA) of the weights;
- after the last Langevin step, one more step denoises.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import denoising_score_matching_loss
from noise_scales import geometric_noise_scales, largest_pairwise_distance, noise_scale_ratio, number_of_noise_scales
from sample import LESSON, SAMPLERS, draw, make_network, noise_levels, number_of_calls

from common.config import RunConfig
from common.errors import usable
from common.images import save_grid
from common.noise import noise_like
from common.optimizer import Optimizer
from common.ranks import average_gradients, share
from common.run import Run, start


@dataclass(frozen=True)
class Config(RunConfig):
    """The lesson run's numbers, with sources. `python train_mnist.py --help` lists them, and RunConfig's, as flags."""

    steps: int = 5000  # ours: eight to eleven minutes on two CPU cores with bf16; the paper trains 300 000 (--paper)
    batch_size: int = 64  # ours: more, noisier steps in the same time; the paper has 128
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay; paper, App. B.2: 1e-4
    focus: Annotated[float, 0, 10**6] = 0.7  # ours: noise scales near it come more often; paper: none do (0)
    width: Annotated[int, 2, 4096] = 32  # ours: channels at full size; the paper has 128 on CIFAR-10
    blocks: int = 1  # ours: residual blocks in each stage, and units that adapt each input; NCSN has 2
    patch: Literal[1, 2] = 2  # ours: runs on blocks of 2x2 pixels, four times cheaper; the paper's network has 1
    activation: Literal["elu", "relu", "silu"] = "silu"  # ours: half the time of NCSN's elu; relu's units die
    skip: bool = True  # ours: at strong noise the layers predict the clean image; the paper has no such skip
    sigma_L: Annotated[float, 1e-6, 1] = 0.01  # paper, Sec. 3.1: the smallest noise scale, which the eye does not see
    overlap: Annotated[float, 0.01, 0.98] = 0.5  # paper, Technique 2: how much neighbouring noise scales share
    T: int = 10  # ours: Langevin steps at each noise scale, as large as affordable; the paper has 5 for 32x32 pixels
    ema_decay: Annotated[float, 0, 1] = 0.995  # ours: a shorter memory for a shorter run; NCSNv2, Technique 5: 0.999


PRESETS = {
    "paper": dict(
        steps=300_000, batch_size=128, learning_rate=1e-4, warmup=0, decay="constant", clip=math.inf,
        width=64, blocks=2, patch=1, activation="elu", skip=False, optimizer="adam", focus=0.0,
        preview_every=5000, ema_decay=0.999, T=5,
    ),
    "paper on cifar10": dict(width=128),  # what --paper changes besides, with --dataset cifar10
    "smoke": dict(
        steps=20, batch_size=16, width=8, warmup=0, decay="constant", sigma_L=1.0, T=1, preview_every=20
    ),
}  # fmt: skip


def draw_noise_scales(batch_size: int, sigmas: Tensor, focus: float, generator: torch.Generator) -> Tensor:
    """Indices (B,) long of noise scales, spread evenly over the batch. Scales near sigma = focus come more often.

    The density over i is 0.15 + exp(-0.3 ln^2(sigma_i / focus)), or constant if focus is 0.
    """
    density = 0.15 + torch.exp(-0.3 * (sigmas / focus).log().square()) if focus else torch.ones_like(sigmas)  # (L,)
    u = torch.rand(1, generator=generator, device=sigmas.device)
    u = (torch.arange(batch_size, device=sigmas.device) + u) / batch_size  # (B,), one in each B-th part of [0, 1]
    return torch.searchsorted(density.cumsum(0) / density.sum(), u).clamp(max=len(sigmas) - 1)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, network: torch.nn.Module, step: int, decay: float) -> None:
    """Technique 5: ema <- d ema + (1 - d) network; d starts small, so that the first weights are soon forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    for average, weights in zip(ema.parameters(), network.parameters(), strict=True):
        average.lerp_(weights, 1 - d)


def train(config: Config, run: Run) -> None:
    """One run, from data to pictures."""
    with usable("noise scales"):
        run.say(f"looking for the largest distance between two of {len(run.images)} pictures")
        sigma_1 = largest_pairwise_distance(run.images) / 255  # Technique 1
        gamma = noise_scale_ratio(run.images[0].numel(), config.overlap)  # Technique 2
        L = number_of_noise_scales(sigma_1, config.sigma_L, gamma)
        sigmas = geometric_noise_scales(sigma_1, config.sigma_L, L)  # (L,)
    sigmas = sigmas.to(run.device)
    network = make_network(config, run.image_shape[0], {"sigmas": sigmas})
    network.to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False)  # Technique 5
    optimizer = Optimizer(network, config.optimizer)
    calls = [number_of_calls(network, config, SAMPLERS[0]), number_of_calls(network, config, SAMPLERS[-1], quick=False)]
    zero_loss = run.images[0].numel() / 2
    run.begin(noise_levels(network, config), calls, zero_loss, network=network, ema=ema, optimizer=optimizer)

    for _ in run.steps():
        x = run.batch() / 255  # (B, C, H, W)
        i = draw_noise_scales(len(x), sigmas, config.focus, run.generator)  # (B,)
        z = noise_like(x, run.generator)  # (B, C, H, W)
        x, i, z = share(x, i, z)  # of several processes, each has its part of the batch
        with run.autocast():
            loss = denoising_score_matching_loss(network, x, sigmas, i, z)  # (B,)
        loss.mean().backward()
        average_gradients(network)  # over the processes
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip * x[0].numel())  # the loss sums over pixels
        optimizer.step(run.learning_rate)
        update_ema(ema, network, run.step, config.ema_decay)  # Technique 5

        run.record(loss, (i + 0.5) / len(sigmas))
        if run.preview_due:
            run.show(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[0], calls[0]))

    frames = run.last_pictures(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[-1], calls[1]))
    save_grid(frames[-2], run.folder / "samples_before_denoising.png")


if __name__ == "__main__":
    start(train, Config, PRESETS, LESSON)
