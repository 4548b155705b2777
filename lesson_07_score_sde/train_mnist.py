"""Train Score SDE (Song et al. 2021, arXiv 2011.13456) on digits: `python train_mnist.py`, and look into output/.

Changes from lesson 4:
- sigma is drawn from a continuous range, and the network is conditioned on its logarithm;
- the range begins at 0.001, and the gray levels of pixels are dequantised, so that densities of images mean something;
- N, the number of noise scales, belongs to the samplers only.
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

from likelihood import dequantise
from loss import denoising_score_matching_loss
from noise_scales import largest_pairwise_distance
from sample import LESSON, SAMPLERS, draw, make_network, noise_levels, number_of_calls
from sde import VE

from common.config import RunConfig
from common.errors import LessonError, usable
from common.images import save_grid
from common.noise import noise_like
from common.optimizer import Optimizer
from common.ranks import average_gradients, share
from common.run import Run, start


@dataclass(frozen=True)
class Config(RunConfig):
    """The lesson run's numbers, with sources. `python train_mnist.py --help` lists them, and RunConfig's, as flags."""

    steps: int = 5000  # ours: eight minutes on two CPU cores with bf16; --paper: 1.3 million, App. H.1; H.2 has 0.95
    batch_size: int = 64  # ours: more, noisier steps in the same time; the paper has 128
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay; authors' code: 2e-4
    focus: Annotated[float, 0, 10**6] = 0.7  # ours: noise scales near it come more often; paper: none do (0)
    width: Annotated[int, 2, 4096] = 32  # ours: channels at full size; the paper has 128 on CIFAR-10
    blocks: int = 1  # ours: residual blocks in each stage, and units that adapt each input; NCSN has 2
    patch: Literal[1, 2] = 2  # ours: runs on blocks of 2x2 pixels, four times cheaper; the paper's network has 1
    activation: Literal["elu", "relu", "silu"] = "silu"  # ours: half the time of NCSN's elu; relu's units die
    skip: bool = True  # ours: at strong noise the layers predict the clean image; the paper has no such skip
    conditional: bool = True  # paper, App. H: the network is conditioned on log sigma; lesson 4's is not
    sigma_min: Annotated[float, 1e-6, 0.5] = 0.001  # ours: the smallest noise scale of the training; the paper has 0.01
    sigma_L: Annotated[float, 1e-6, 1] = 0.01  # paper, App. C: the smallest of the samplers, which the eye does not see
    N: Annotated[int, 2, 10**6] = 96  # ours: noise scales of the samplers, as in lesson 4; paper, App. C: 1000
    sde: Literal["ve", "vp", "sub_vp"] = "ve"  # paper, Sec. 3.4: the one that samplers follow; the training is the same
    predictor: Literal["reverse_diffusion", "ancestral", "euler_maruyama", "ode"] = "reverse_diffusion"  # paper, Sec. 4
    corrector: bool = True  # paper, Sec. 4.2: a step of Langevin dynamics after each of the predictor
    r: Annotated[float, 1e-3, 10] = 0.16  # paper, App. G: the corrector's "signal-to-noise ratio"
    ema_decay: Annotated[float, 0, 1] = 0.995  # ours: a shorter memory for a shorter run; NCSNv2, Technique 5: 0.999

    def check(self) -> None:
        """As `RunConfig.check`; and samplers must not go where the network has not been trained."""
        super().check()
        if self.sigma_L < self.sigma_min:
            raise LessonError(f"--sigma-L {self.sigma_L} must not be below --sigma-min {self.sigma_min}")


PRESETS = {
    "paper": dict(
        steps=1_300_000, batch_size=128, learning_rate=2e-4, warmup=5000, decay="constant", clip=1 / 784,
        width=64, blocks=2, patch=1, activation="elu", skip=False, optimizer="adam", focus=0.0,
        preview_every=5000, ema_decay=0.999, N=1000,
    ),
    "paper on cifar10": dict(width=128, clip=1 / 3072), "paper on color_mnist": dict(clip=1 / 2352),  # --images: 1 / D
    "smoke": dict(
        steps=20, batch_size=16, width=8, warmup=0, decay="constant", sigma_L=1.0, N=4, preview_every=20
    ),
}  # fmt: skip


def draw_noise_scales(
    batch_size: int, sigma_min: float, sigma_max: float, focus: float, generator: torch.Generator
) -> Tensor:
    """Noise scales (B,) between the two, spread evenly over the batch. Those near sigma = focus come more often.

    The density over ln sigma is 0.15 + exp(-0.3 ln^2(sigma / focus)), or constant if focus is 0: then t is uniform.
    """
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), 1001, device=generator.device).exp()  # L = 1001
    density = 0.15 + torch.exp(-0.3 * (sigmas / focus).log().square()) if focus else torch.ones_like(sigmas)  # (L,)
    cdf = torch.nn.functional.pad(torch.cumulative_trapezoid(density), (1, 0))  # (L,), not yet over its last
    u = torch.rand(1, generator=generator, device=sigmas.device)
    u = (torch.arange(batch_size, device=sigmas.device) + u) / batch_size  # (B,), one in each B-th part of [0, 1]
    k = torch.searchsorted(cdf, u * cdf[-1]).clamp(1, 1000)
    return sigmas[k - 1] * (sigmas[k] / sigmas[k - 1]) ** ((u * cdf[-1] - cdf[k - 1]) / (cdf[k] - cdf[k - 1]))


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
        sigma_max = largest_pairwise_distance(run.images) / 255  # Technique 1
        VE(max(config.sigma_min, config.sigma_L), sigma_max)
    network = make_network(config, run.image_shape[0], {"sigma_max": sigma_max})
    network.to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False)  # Technique 5
    optimizer = Optimizer(network, config.optimizer)
    calls = [number_of_calls(network, config, SAMPLERS[0]), number_of_calls(network, config, SAMPLERS[-1], quick=False)]
    zero_loss = run.images[0].numel() / 2
    run.begin(noise_levels(network, config), calls, zero_loss, network=network, ema=ema, optimizer=optimizer)

    for _ in run.steps():
        x = dequantise(run.batch() / 255, run.generator)  # (B, C, H, W)
        sigma = draw_noise_scales(len(x), config.sigma_min, sigma_max, config.focus, run.generator)  # (B,)
        z = noise_like(x, run.generator)  # (B, C, H, W)
        x, sigma, z = share(x, sigma, z)  # of several processes, each has its part of the batch
        with run.autocast():
            loss = denoising_score_matching_loss(network, x, sigma, z)  # (B,)
        loss.mean().backward()
        average_gradients(network)  # over the processes
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip * x[0].numel())  # the loss sums over pixels
        optimizer.step(run.learning_rate)
        update_ema(ema, network, run.step, config.ema_decay)  # Technique 5

        run.record(loss, 1 - VE(config.sigma_min, sigma_max).time(sigma).clamp(1e-6, 1))
        if run.preview_due:
            run.show(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[0], calls[0]))

    frames = run.last_pictures(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[-1], calls[1]))
    save_grid(frames[-2], run.folder / "samples_before_denoising.png")


if __name__ == "__main__":
    start(train, Config, PRESETS, LESSON)
