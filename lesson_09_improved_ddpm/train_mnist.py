"""Train Improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672) on digits: `python train_mnist.py`, see output/.

Changes from lesson 5:
- the variance of a step back is learned, by a second loss;
- the noise schedule is a cosine;
- t can be chosen by importance sampling, for the objective vlb;
- t scales and shifts the norms of the network.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import bound_term, hybrid_loss, noise_prediction_loss
from sample import LESSON, SAMPLERS, draw, make_network, noise_levels, number_of_calls, schedule
from timestep_sampler import LossAwareTimesteps, UniformTimesteps

from common.config import RunConfig
from common.errors import usable
from common.noise import noise_like
from common.optimizer import Optimizer
from common.ranks import average_gradients, gather, share
from common.run import Run, start


@dataclass(frozen=True)
class Config(RunConfig):
    """The lesson run's numbers, with sources. `python train_mnist.py --help` lists them, and RunConfig's, as flags."""

    steps: int = 4400  # ours: ten minutes on two CPU cores with bf16; the paper trains 500 000 (--paper)
    batch_size: int = 128  # paper: images in a step
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay; paper, App. A: 1e-4
    clip: float = 1.0  # ours: longer gradients are shortened, as in lesson 5; the paper's are not
    width: Annotated[int, 8, 4096] = 32  # ours: channels at full size; --paper: 128
    levels: Annotated[int, 2, 6] = 2  # ours: resolutions, here 14 and 7; paper: 4 on CIFAR-10, 32 to 4
    blocks: int = 1  # ours: as in lesson 5; paper, App. A: 3 residual blocks at each resolution on the way down
    patch: Literal[1, 2] = 2  # ours: runs on blocks of 2x2 pixels, four times cheaper; the paper's network has 1
    dropout: Annotated[float, 0, 0.9] = 0.0  # ours: digits need none; paper, App. A: 0.3 on CIFAR-10
    T: Annotated[int, 2, 100_000] = 1000  # ours: as in lesson 5; paper, App. A: 4000
    schedule: Literal["cosine", "linear"] = "cosine"  # paper, Sec. 3.2; linear is lesson 5's, scaled to T
    objective: Literal["hybrid", "simple", "vlb"] = "hybrid"  # paper, Sec. 3.4: L_hybrid; simple leaves v unlearned
    lambda_vlb: float = 0.001  # paper, Eq. 16: the weight of the bound in L_hybrid
    timesteps: Literal["uniform", "importance"] = "uniform"  # paper, Sec. 3.3: importance sampling helps vlb only
    scale_shift: bool = True  # paper, App. A: t scales and shifts the second norm of a block
    variance: Literal["learned", "small", "large"] = "learned"  # paper, Sec. 3.1: of the sampler's fresh noise
    clip_x_0: bool = True  # authors' code: the sampler's guess of the clean image is cut to [-1, 1]; not in the paper
    ema_decay: Annotated[float, 0, 1] = 0.995  # ours: a shorter memory for a shorter run; paper: 0.9999


PRESETS = {
    "paper": dict(
        steps=500_000, learning_rate=1e-4, warmup=0, decay="constant", clip=math.inf, width=128,
        levels=3, blocks=3, patch=1, optimizer="adam", preview_every=5000, ema_decay=0.9999, T=4000,
    ),
    "paper on cifar10": dict(levels=4, dropout=0.3),  # what --paper changes besides, with --dataset cifar10
    "smoke": dict(
        steps=20, batch_size=16, width=8, warmup=0, decay="constant", T=30, preview_every=20
    ),
}  # fmt: skip


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
        timesteps = {"uniform": UniformTimesteps, "importance": LossAwareTimesteps}[config.timesteps](config.T)
    network = make_network(config, run.image_shape[0], {})
    network.to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    optimizer = Optimizer(network, config.optimizer)
    calls = [number_of_calls(network, config, SAMPLERS[0]), number_of_calls(network, config, SAMPLERS[-1], quick=False)]
    parts = {"network": network, "ema": ema, "optimizer": optimizer, "timesteps": timesteps}
    run.begin(noise_levels(network, config), calls, zero_loss=math.nan if config.objective == "vlb" else 1.0, **parts)

    for _ in run.steps():  # Algorithm 1
        x_0 = run.batch() / 127.5 - 1  # (B, C, H, W), in [-1, 1]
        t, weight = timesteps.draw(len(x_0), run.generator)  # (B,), (B,)
        eps = noise_like(x_0, run.generator)  # (B, C, H, W)
        x_0, t, weight, eps = share(x_0, t, weight, eps)  # of several processes, each has its part of the batch
        with run.autocast():
            if config.objective == "simple":
                loss = noise_prediction_loss(network, x_0, alpha_bars, t, eps)  # (B,)
            elif config.objective == "hybrid":
                loss = hybrid_loss(network, x_0, betas, t, eps, config.lambda_vlb)
            else:
                loss = bound_term(network, x_0, betas, t, eps)
        (weight * loss).mean().backward()
        timesteps.update(gather(t), gather(loss.detach()))
        average_gradients(network)  # over the processes
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step(run.learning_rate)
        update_ema(ema, network, run.step, config.ema_decay)

        run.record(loss, 1 - (t + 0.5) / config.T, weight)
        if run.preview_due:
            run.show(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[0], calls[0]))

    run.last_pictures(draw(run.to_sample(ema), config, *run.pictures, SAMPLERS[-1], calls[1]))


if __name__ == "__main__":
    start(train, Config, PRESETS, LESSON)
