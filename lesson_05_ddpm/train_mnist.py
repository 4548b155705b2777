"""Train DDPM (Ho et al. 2020, arXiv 2006.11239) on digits: `python train_mnist.py`, and look into output/.

Changes from lesson 4:
- the noise levels are T steps of a chain that is fixed beforehand, not scales computed from the data;
- the network predicts the noise, is a U-Net, and is conditioned on t;
- pixels lie in [-1, 1].
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import noise_prediction_loss
from sample import LESSON, SAMPLERS, draw, make_network, noise_levels, number_of_calls, schedule

from common.config import RunConfig
from common.errors import usable
from common.noise import noise_like
from common.optimizer import Optimizer
from common.ranks import average_gradients, share
from common.run import Run, start


@dataclass(frozen=True)
class Config(RunConfig):
    """The lesson run's numbers, with sources. `python train_mnist.py --help` lists them, and RunConfig's, as flags."""

    steps: int = 4400  # ours: ten minutes on two CPU cores with bf16; the paper trains 800 000 (--paper)
    batch_size: int = 128  # paper: images in a step
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay; paper, App. B: 2e-4
    clip: float = 1.0  # authors' code: longer gradients are shortened; not in the paper
    width: Annotated[int, 8, 4096] = 32  # ours: channels at full size; --paper: 128
    levels: Annotated[int, 2, 6] = 2  # ours: resolutions, here 14 and 7; paper: 4 on CIFAR-10, 32 to 4
    blocks: int = 1  # ours: residual blocks at each resolution on the way down, one more on the way up; paper: 2
    patch: Literal[1, 2] = 2  # ours: runs on blocks of 2x2 pixels, four times cheaper; the paper's network has 1
    dropout: Annotated[float, 0, 0.9] = 0.0  # paper, App. B: 0.1 on CIFAR-10, 0 on all other data
    T: Annotated[int, 2, 100_000] = 1000  # paper, Sec. 4: steps of the forward process
    beta_1: float = 1e-4  # paper, Sec. 4: the variance of the noise that the first step adds
    beta_T: float = 0.02  # paper, Sec. 4: and the last; linear in between
    variance: Literal["small", "large"] = "small"  # paper, Sec. 3.2: of the sampler's fresh noise, either will do
    clip_x_0: bool = True  # authors' code: the sampler's guess of the clean image is cut to [-1, 1]; not in the paper
    ema_decay: Annotated[float, 0, 1] = 0.995  # ours: a shorter memory for a shorter run; paper: 0.9999


PRESETS = {
    "paper": dict(
        steps=800_000, learning_rate=2e-4, warmup=5000, decay="constant", width=128, levels=3, blocks=2,
        patch=1, optimizer="adam", preview_every=5000, ema_decay=0.9999, variance="large",
    ),
    "paper on cifar10": dict(levels=4, dropout=0.1),  # what --paper changes besides, with --dataset cifar10
    "smoke": dict(
        steps=20, batch_size=16, width=8, warmup=0, decay="constant", T=30, beta_T=0.5, preview_every=20
    ),
}  # fmt: skip


def draw_timesteps(batch_size: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (B,) long, uniform on 0, ..., T - 1, and spread evenly over the batch: one in each B-th part."""
    u = torch.rand(1, generator=generator, device=generator.device)
    u = (torch.arange(batch_size, device=generator.device) + u) / batch_size  # (B,)
    return (u * T).long().clamp(max=T - 1)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, network: torch.nn.Module, step: int, decay: float) -> None:
    """DDPM, App. B: ema <- d ema + (1 - d) network; ours: d starts small, to forget the first weights soon."""
    d = min(decay, (1 + step) / (10 + step))
    for average, weights in zip(ema.parameters(), network.parameters(), strict=True):
        average.lerp_(weights, 1 - d)


def train(config: Config, run: Run) -> None:
    """One run, from data to pictures."""
    with usable("noise schedule"):
        betas, alpha_bars = schedule(config)  # (T,)
    network = make_network(config, run.image_shape[0], {})
    network.to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    optimizer = Optimizer(network, config.optimizer)
    calls = [number_of_calls(network, config, SAMPLERS[0]), number_of_calls(network, config, SAMPLERS[-1], quick=False)]
    parts = {"network": network, "ema": ema, "optimizer": optimizer}
    run.begin(noise_levels(network, config), calls, zero_loss=1.0, **parts)

    for _ in run.steps():  # Algorithm 1
        x_0 = run.batch() / 127.5 - 1  # (B, C, H, W), in [-1, 1]
        t = draw_timesteps(len(x_0), config.T, run.generator)  # (B,)
        eps = noise_like(x_0, run.generator)  # (B, C, H, W)
        x_0, t, eps = share(x_0, t, eps)  # of several processes, each has its part of the batch
        with run.autocast():
            loss = noise_prediction_loss(network, x_0, alpha_bars, t, eps)  # (B,)
        loss.mean().backward()
        average_gradients(network)  # over the processes
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step(run.learning_rate)
        update_ema(ema, network, run.step, config.ema_decay)

        run.record(loss, 1 - (t + 0.5) / config.T)
        if run.preview_due:
            run.show(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[0], calls[0]))

    run.last_pictures(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[-1], calls[1]))


if __name__ == "__main__":
    start(train, Config, PRESETS, LESSON)
