"""Train NCSNv2 (Song & Ermon 2020, arXiv 2006.09011) on digits: `python train_mnist.py`, and look into output/.

Changes from lesson 3:
- Techniques 1 and 2: the noise ladder is computed from the data, and Technique 4: so is the sampler's step size;
- Technique 5: samples come from an exponential moving average (EMA) of the weights;
- after the last Langevin step, one more step takes away the noise that is left;
- pictures are not dequantised.
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/

from loss import denoising_score_matching_loss
from noise_scales import geometric_noise_scales, largest_pairwise_distance, noise_scale_ratio, number_of_noise_scales
from sample import LESSON, NETWORK_OPTIONS, draw
from score_network import ScoreNetwork

from common.cli import StopRequest, check_choice, check_positive, check_range, parse_config, run
from common.data import DATASETS, load_pictures
from common.images import save_gif, save_grid
from common.layers import ACTIVATIONS
from common.machine import PRECISIONS, autocast, choose_device, choose_precision, steps_in
from common.noise import SeededNoise
from common.optimizer import OPTIMIZERS, Optimizer
from common.output import open_output, restore_run, resume_run, save_run, start_output
from common.training_log import TrainingLog

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Config:
    """Every number of a run. `python train_mnist.py --help` lists them as flags."""

    dataset: str = "mnist"  # paper: CIFAR-10, CelebA, LSUN, FFHQ; ours: mnist, color_mnist, fashion_mnist or cifar10
    images: str = ""  # ours: a folder of pictures to train on in place of the data set
    image_size: int = 32  # ours: pictures of a folder are cut square and resized to so many pixels: 16 to 64, even
    channels: int = 3  # ours: pictures of a folder become gray (1) or RGB (3)
    steps: int = 4500  # ours: what two CPU cores do in nine minutes; the paper trains 300 000 (--paper)
    minutes: float = 0.0  # ours: if not 0, the number of steps is what fits into so many minutes on this machine
    batch_size: int = 64  # ours: more, noisier steps in the same time; the paper has 128
    optimizer: str = "muon"  # ours: learns as much from two thirds of the images; the paper has "adam"
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay; paper, App. B.2: 1e-4
    warmup: int = 100  # ours: steps over which the learning rate rises from 0; the paper has none
    decay: str = "cosine"  # ours: how the learning rate falls to 0 at the last step; the paper has "constant"
    clip: float = 0.1  # ours: longer gradients of the loss per pixel are shortened; the paper does not (inf)
    focus: float = 1.5  # ours: noise scales near this one, where digits take shape, come more often; paper: none (0)
    width: int = 32  # ours: channels at full size; the paper has 128 on CIFAR-10
    blocks: int = 1  # ours: residual blocks in each stage, and units that adapt each input; the paper has 2
    patch: int = 2  # ours: runs on blocks of 2x2 pixels, four times cheaper; the paper's network has 1
    activation: str = "relu"  # ours: relu is cheaper than the paper's elu
    skip: bool = True  # ours: the input, scaled to one size, is added to the output; the paper has no such skip
    sigma_L: float = 0.01  # paper, Sec. 3.1: the smallest noise scale, which the eye does not see
    overlap: float = 0.5  # paper, Technique 2: how much neighbouring noise scales have in common
    T: int = 10  # ours: Langevin steps at each noise scale, as large as affordable; the paper has 5 for 32x32 pixels
    ema_decay: float = 0.995  # ours: a shorter memory for a shorter run; paper, Technique 5: 0.999
    preview_every: int = 500  # ours: steps between pictures of what the network has learned
    seed: int = 0  # ours: the same seed gives the same run on the same machine
    device: str = "auto"  # ours: auto, cpu, cuda or mps
    precision: str = "auto"  # ours: bfloat16 where it is faster than float32; auto, float32 or bfloat16
    output: str = "output"  # ours: the folder for everything that a run writes


PRESETS = {
    "paper": dict(
        steps=300_000, batch_size=128, learning_rate=1e-4, warmup=0, decay="constant", clip=math.inf,
        width=64, blocks=2, patch=1, activation="elu", skip=False, optimizer="adam", focus=0.0, ema_decay=0.999, T=5,
        preview_every=5000,
    ),
    "paper on cifar10": dict(width=128),  # what --paper changes besides, with --dataset cifar10
    "smoke": dict(
        steps=20, batch_size=16, width=8, warmup=0, decay="constant", sigma_L=1.0, T=1, preview_every=10
    ),
}  # fmt: skip


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of step 1, ..., config.steps: a linear warm-up, then constant or half a cosine down to 0."""
    rise = min(1.0, step / max(1, config.warmup))
    fall = 1.0 if config.decay == "constant" else 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
    return config.learning_rate * rise * fall


def draw_noise_scales(batch_size: int, sigmas: Tensor, focus: float, generator: torch.Generator) -> Tensor:
    """Indices (B,) long of noise scales, spread evenly over the batch. Scales near sigma = focus come more often.

    The density over i is 0.15 + exp(-1/2 ln^2(sigma_i / focus)), or constant if focus is 0.
    """
    density = 0.15 + torch.exp(-0.5 * (sigmas / focus).log().square()) if focus else torch.ones_like(sigmas)  # (L,)
    u = torch.rand(1, generator=generator, device=sigmas.device)
    u = (
        torch.arange(batch_size, device=sigmas.device) + u
    ) / batch_size  # (B,), one in each of B equal parts of [0, 1]
    return torch.searchsorted(density.cumsum(0) / density.sum(), u).clamp(max=len(sigmas) - 1)


@torch.no_grad()
def update_ema(ema: ScoreNetwork, network: ScoreNetwork, step: int, decay: float) -> None:
    """Technique 5: ema <- d ema + (1 - d) network; d starts small, so that the first weights are soon forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - d)


def check(config: Config) -> None:
    """Raises LessonError, one line that says what to do, for the first number that no run can use."""
    choose_device(config.device)
    check_choice(config, "precision", PRECISIONS)
    check_choice(config, "dataset", DATASETS)
    check_choice(config, "activation", ACTIVATIONS)
    check_choice(config, "optimizer", OPTIMIZERS)
    check_choice(config, "decay", ("cosine", "constant"))
    check_choice(config, "patch", (1, 2))
    check_choice(config, "channels", (1, 3))
    check_choice(config, "image_size", range(16, 65, 2))
    check_positive(config, "steps", "batch_size", "learning_rate", "clip", "blocks")
    check_positive(config, "sigma_L", "T", "preview_every")
    check_range(config, "seed", 0, 2**63 - 1)
    check_range(config, "width", 2, 4096)
    check_range(config, "focus", 0, 10**6)
    check_range(config, "minutes", 0, 10**6)
    check_range(config, "warmup", 0, 10**9)
    check_range(config, "sigma_L", 0, 1)
    check_range(config, "overlap", 0.01, 0.98)
    check_range(config, "ema_decay", 0, 1)


def training_step(network, optimizer, x, i, z, precision: str, config: Config, rate: float = 0.0) -> Tensor:
    """One step with learning rate `rate` on images x, noise z (B, C, H, W) and scales i (B,); the loss of each (B,)."""
    with autocast(x.device, precision):
        loss = denoising_score_matching_loss(network, x, network.sigmas, i, z)
    loss.mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip * x[0].numel())
    optimizer.step(rate)
    return loss.detach()


def train(config: Config, images: Tensor, checkpoint: dict | None) -> int:
    """One run, from data to pictures. Returns the exit status: 0, or 128 + the signal that ended it early."""
    stop, device, folder, B = StopRequest(), choose_device(config.device), Path(config.output), config.batch_size
    images = images.to(device)  # (N, C, H, W) uint8
    C, H, W = images.shape[1:]

    if checkpoint:
        sigmas = checkpoint["network"]["sigmas"].to(device)  # (L,)
    else:
        sigma_1 = largest_pairwise_distance(images / 255)  # Technique 1
        gamma = noise_scale_ratio(C * H * W, config.overlap)  # Technique 2
        L = number_of_noise_scales(sigma_1, config.sigma_L, gamma)
        sigmas = geometric_noise_scales(sigma_1, config.sigma_L, L).to(device)

    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    options = {name: getattr(config, name) for name in NETWORK_OPTIONS}
    network = ScoreNetwork(sigmas, C, **options)
    network.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False)  # Technique 5
    optimizer = Optimizer(network, config.optimizer, fused=device.type != "mps")
    log = TrainingLog(sigmas)
    parts = {"network": network, "ema": ema, "optimizer": optimizer, "log": log}
    start = restore_run(checkpoint, parts, generator) if checkpoint else 0

    # What this machine does faster, and how long the run will take: a few steps of a copy of the network
    trial = copy.deepcopy(network)
    trial_optimizer, b = Optimizer(trial, config.optimizer, fused=device.type != "mps"), min(B, 64)
    x, i = images[:b] / 255, torch.zeros(b, dtype=torch.long, device=device)
    precision, seconds = choose_precision(
        config.precision, device, lambda name: training_step(trial, trial_optimizer, x, i, x, name, config)
    )
    if config.minutes:
        config = replace(config, steps=steps_in(config.minutes, seconds * B / b), minutes=0.0)
    config = replace(config, precision=precision)
    start_output(config, network, device, seconds * B / b * (config.steps - start))

    shape = (64, C, H, W)  # of the pictures on the way and at the end
    with tqdm(total=config.steps * B, initial=start * B, unit=" images", unit_scale=True) as bar:
        for step in range(start + 1, config.steps + 1):
            x = images[torch.randint(len(images), (B,), generator=generator, device=device)] / 255  # (B, C, H, W)
            i = draw_noise_scales(B, sigmas, config.focus, generator)  # (B,)
            z = torch.randn(x.shape, generator=generator, device=device)  # (B, C, H, W)
            loss = training_step(network, optimizer, x, i, z, precision, config, learning_rate(step, config))  # (B,)
            update_ema(ema, network, step, config.ema_decay)  # Technique 5

            bar.update(B)
            log.add(step, loss, i)
            if step % LOG_EVERY == 0:
                bar.set_postfix(loss=f"{log.close_row():.2f}")
            if stop or step % config.preview_every == 0 or step == config.steps:
                save_run(config, LESSON, step, (C, H, W), parts, generator)
                log.write(folder, D=C * H * W)
            if stop:
                bar.close()
                return stop.exit_status(f"stopped and saved after step {step}")
            if step % config.preview_every == 0:
                frames = draw(ema, shape, SeededNoise(config.seed, 64), "consistent", len(sigmas) + 1, precision, stop)
                if not stop:
                    save_grid(frames[-1], folder / f"samples_step_{step:06d}.png")

    frames = draw(ema, shape, SeededNoise(config.seed, 64), "langevin", config.T * len(sigmas) + 1, precision, stop)
    if stop:
        return stop.exit_status("the checkpoint is saved, the last pictures are not made")
    save_grid(frames[-2], folder / "samples_before_denoising.png")
    save_grid(frames[-1], folder / "samples.png")
    save_gif(frames, folder / "trajectory.gif")
    print(f"done: look at {folder / 'samples.png'}")
    return 0


def main() -> int:
    """Reads the flags, and starts a run or goes on with one."""
    config, named, resume, overwrite = parse_config(Config, PRESETS)
    checkpoint = None
    if resume:
        config, checkpoint = resume_run(config, named, LESSON)
    check(config)
    images = load_pictures(config)
    if not resume:
        open_output(config.output, overwrite)  # only now, when all that was given has proved usable
    return train(config, images, checkpoint)


if __name__ == "__main__":
    run(main)
