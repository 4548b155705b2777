"""Train NCSN (Song & Ermon 2019, arXiv 1907.05600) on digits: `python train_mnist.py`, and look into output/."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import denoising_score_matching_loss
from noise_scales import geometric_noise_scales
from sample import LESSON, SAMPLERS, draw, make_network, noise_levels, number_of_calls

from common.config import RunConfig
from common.errors import usable
from common.noise import noise_like
from common.optimizer import Optimizer
from common.ranks import average_gradients, share
from common.run import Run, start


@dataclass(frozen=True)
class Config(RunConfig):
    """The lesson run's numbers, with sources. `python train_mnist.py --help` lists them, and RunConfig's, as flags."""

    steps: int = 5000  # ours: eight to eleven minutes on two CPU cores with bf16; the paper trains 200 000 (--paper)
    batch_size: int = 64  # ours: more, noisier steps in the same time; the paper has 128
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay; paper, App. B.2: 1e-3
    focus: Annotated[float, 0, 10**6] = 0.7  # ours: noise scales near it come more often; paper: none do (0)
    width: Annotated[int, 2, 4096] = 32  # ours: channels at full size; the paper has 64 on MNIST, 128 on CIFAR-10
    blocks: int = 1  # ours: residual blocks in each stage, and units that adapt each input; NCSN has 2
    patch: Literal[1, 2] = 2  # ours: runs on blocks of 2x2 pixels, four times cheaper; the paper's network has 1
    activation: Literal["elu", "relu", "silu"] = "silu"  # ours: half the time of NCSN's elu; relu's units die
    skip: bool = True  # ours: at strong noise the layers predict the clean image; the paper has no such skip
    sigma_1: Annotated[float, 1e-6, 1000] = 1.0  # paper, Sec. 5: the largest noise scale
    sigma_L: Annotated[float, 1e-6, 1000] = 0.01  # paper, Sec. 5: the smallest noise scale, which the eye does not see
    L: Annotated[int, 2, 10_000] = 10  # paper, Sec. 5: the number of noise scales
    T: int = 100  # paper, Sec. 5: Langevin steps at each noise scale
    epsilon: float = 2e-5  # paper, Sec. 5: the step size of Langevin dynamics at sigma_L


PRESETS = {
    "paper": dict(
        steps=200_000, batch_size=128, learning_rate=1e-3, warmup=0, decay="constant", clip=math.inf,
        width=64, blocks=2, patch=1, activation="elu", skip=False, optimizer="adam", focus=0.0,
        preview_every=5000,
    ),
    "paper on cifar10": dict(width=128),  # what --paper changes besides, with --dataset cifar10
    "smoke": dict(
        steps=20, batch_size=16, width=8, warmup=0, decay="constant", T=2, preview_every=20
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


def train(config: Config, run: Run) -> None:
    """One run, from data to pictures."""
    with usable("noise scales"):
        sigmas = geometric_noise_scales(config.sigma_1, config.sigma_L, config.L)  # (L,)
    sigmas = sigmas.to(run.device)
    network = make_network(config, run.image_shape[0], {"sigmas": sigmas})
    network.to(run.device, memory_format=torch.channels_last)
    optimizer = Optimizer(network, config.optimizer)
    calls = [number_of_calls(network, config, SAMPLERS[0]), number_of_calls(network, config, SAMPLERS[-1], quick=False)]
    zero_loss = run.images[0].numel() / 2
    run.begin(noise_levels(network, config), calls, zero_loss, network=network, optimizer=optimizer)

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

        run.record(loss, (i + 0.5) / len(sigmas))
        if run.preview_due:
            run.show(draw(run.to_sample(network), config, *run.pictures, SAMPLERS[0], calls[0]))

    run.last_pictures(draw(run.to_sample(network), config, *run.pictures, SAMPLERS[-1], calls[1]))


if __name__ == "__main__":
    start(train, Config, PRESETS, LESSON)
