"""Train NCSN (Song & Ermon 2019, arXiv 1907.05600) on digits: `python train_mnist.py`, and look into output/."""

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
from noise_scales import geometric_noise_scales
from sample import LESSON, NETWORK_OPTIONS, QUICK_T, draw
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

    dataset: str = "mnist"  # paper, Sec. 5: MNIST; one of mnist, color_mnist, fashion_mnist, cifar10
    images: str = ""  # ours: a folder of pictures to train on in place of the data set
    image_size: int = 32  # ours: pictures of a folder are cut square and resized to so many pixels: 16 to 64, even
    channels: int = 3  # ours: pictures of a folder become gray (1) or RGB (3)
    steps: int = 3400  # ours: what two CPU cores do in nine minutes; the paper trains 200 000 (--paper)
    minutes: float = 0.0  # ours: if not 0, the number of steps is what fits into so many minutes on this machine
    batch_size: int = 64  # ours: more, noisier steps in the same time; the paper has 128
    optimizer: str = "muon"  # ours: learns as much from two thirds of the images; the paper has "adam"
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay; paper, App. B.2: 1e-3
    warmup: int = 100  # ours: steps over which the learning rate rises from 0; the paper has none
    decay: str = "cosine"  # ours: how the learning rate falls to 0 at the last step; the paper has "constant"
    clip: float = 0.1  # ours: longer gradients of the loss per pixel are shortened; the paper does not (inf)
    focus: float = 0.0  # paper: every noise scale is drawn equally often
    width: int = 32  # ours: channels at full size; the paper has 64 on MNIST, 128 on CIFAR-10
    blocks: int = 1  # ours: residual blocks in each stage, and units that adapt each input; the paper has 2
    patch: int = 2  # ours: runs on blocks of 2x2 pixels, four times cheaper; the paper's network has 1
    activation: str = "relu"  # ours: relu is cheaper than the paper's elu
    skip: bool = True  # ours: the input, scaled to one size, is added to the output; the paper has no such skip
    sigma_1: float = 1.0  # paper, Sec. 5: the largest noise scale
    sigma_L: float = 0.01  # paper, Sec. 5: the smallest noise scale, which the eye does not see
    L: int = 10  # paper, Sec. 5: the number of noise scales
    T: int = 100  # paper, Sec. 5: Langevin steps at each noise scale
    epsilon: float = 2e-5  # paper, Sec. 5: the step size of Langevin dynamics at sigma_L
    preview_every: int = 500  # ours: steps between pictures of what the network has learned
    seed: int = 0  # ours: the same seed gives the same run on the same machine
    device: str = "auto"  # ours: auto, cpu, cuda or mps
    precision: str = "auto"  # ours: bfloat16 where it is faster than float32; auto, float32 or bfloat16
    output: str = "output"  # ours: the folder for everything that a run writes


PRESETS = {
    "paper": dict(
        steps=200_000, batch_size=128, learning_rate=1e-3, warmup=0, decay="constant", clip=math.inf,
        width=64, blocks=2, patch=1, activation="elu", skip=False, optimizer="adam", preview_every=5000,
    ),
    "paper on cifar10": dict(width=128),  # what --paper changes besides, with --dataset cifar10
    "smoke": dict(
        steps=20, batch_size=16, width=8, warmup=0, decay="constant", T=2, preview_every=10
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
    check_positive(config, "sigma_L", "T", "preview_every", "epsilon")
    check_range(config, "seed", 0, 2**63 - 1)
    check_range(config, "width", 2, 4096)
    check_range(config, "focus", 0, 10**6)
    check_range(config, "minutes", 0, 10**6)
    check_range(config, "warmup", 0, 10**9)
    check_range(config, "sigma_1", 0, 1000)
    check_range(config, "sigma_L", 0, 0.99 * config.sigma_1)
    check_range(config, "L", 2, 10_000)


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

    sigmas = geometric_noise_scales(config.sigma_1, config.sigma_L, config.L).to(device)  # (L,)
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    options = {name: getattr(config, name) for name in NETWORK_OPTIONS}
    network = ScoreNetwork(sigmas, C, **options)
    network.to(device, memory_format=torch.channels_last)
    optimizer = Optimizer(network, config.optimizer, fused=device.type != "mps")
    log = TrainingLog(sigmas)
    parts = {"network": network, "optimizer": optimizer, "log": log}
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
            x = images[torch.randint(len(images), (B,), generator=generator, device=device)]  # (B, C, H, W)
            x = (x + torch.rand(x.shape, generator=generator, device=device)) / 256  # uniform dequantisation
            i = draw_noise_scales(B, sigmas, config.focus, generator)  # (B,)
            z = torch.randn(x.shape, generator=generator, device=device)  # (B, C, H, W)
            loss = training_step(network, optimizer, x, i, z, precision, config, learning_rate(step, config))  # (B,)

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
                calls = min(QUICK_T, config.T) * config.L
                frames = draw(network, shape, SeededNoise(config.seed, 64), calls, vars(config), precision, stop)
                if not stop:
                    save_grid(frames[-1], folder / f"samples_step_{step:06d}.png")

    frames = draw(network, shape, SeededNoise(config.seed, 64), config.T * config.L, vars(config), precision, stop)
    if stop:
        return stop.exit_status("the checkpoint is saved, the last pictures are not made")
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
