"""Sample from a trained network, inpaint, interpolate: `python sample.py`, and look at output/drawn.png."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from loss import noisy_image
from noise_network import NoiseNetwork
from noise_schedule import alpha_bars, linear_betas
from sampler import ancestral_sampling, clean_image, ddim_sampling, inpaint

from common.errors import LessonError
from common.noise import Noise, SeededNoise, noise_like
from common.play import evenly, main

LESSON, WEIGHTS = "lesson_05_ddpm", "ema"  # its name, and which weights of a checkpoint samples come from
SAMPLERS, FILLS_IN = ("ddim", "ancestral"), "ancestral"  # common/play.py says what it takes from here
OPTIONS = {"variance": ("small", "large"), "clip_x_0": (True, False)}  # of Config, for samplers only
ONLY_FOR = {"variance": ("ancestral",)}


def make_network(config, channels: int, weights: dict) -> NoiseNetwork:
    """The network of a configuration, without its weights."""
    options = {name: getattr(config, name) for name in ("width", "levels", "blocks", "patch", "dropout")}
    return NoiseNetwork(channels, **options)


def schedule(config) -> tuple[Tensor, Tensor]:
    """betas and alpha bars, (T,) float64 each."""
    betas = linear_betas(config.T, config.beta_1, config.beta_T)
    return betas, alpha_bars(betas)


def number_of_calls(network, config, sampler: str, quick: bool = True) -> int:
    """How often the network is called for each image: T times, or less for a quick look."""
    return min(config.T, {"ddim": 50, "ancestral": 100}[sampler]) if quick else config.T


def some_timesteps(config, calls: int) -> Tensor:
    """As many timesteps (K,) long as there are calls, evenly chosen, ascending. LessonError if that cannot be."""
    if not 2 <= calls <= config.T:
        raise LessonError(f"--calls {calls}: with T = {config.T}, a chain takes 2 to {config.T} steps, one call each")
    return evenly(config.T, calls)


def to_pictures(x: Tensor) -> Tensor:
    """Images from the lesson's [-1, 1] in [0, 1], where pictures are made."""
    return (x + 1) / 2


@torch.no_grad()
def draw(network, config, shape: tuple, generator: Noise, sampler: str, calls: int) -> Iterator[Tensor]:
    """Yields images of `shape` (N, C, H, W) after each step, with so many network calls.

    Algorithm 2 has T of them. With fewer, its step with the small variance is taken on some t only, evenly chosen.
    """
    betas, abars = schedule(config)
    kept = some_timesteps(config, calls)
    x = noise_like(torch.empty(shape, device=next(network.parameters()).device), generator)
    if sampler == "ancestral" and calls == config.T:
        steps = ancestral_sampling(network, x, betas, config.variance, config.clip_x_0, generator)
    elif sampler == "ancestral" and config.variance == "large":
        raise LessonError(f"--calls {calls}: the large variance is for all {config.T} steps; add --variance small")
    else:
        eta = float(sampler == "ancestral")
        steps = ddim_sampling(network, x, abars, kept, eta, config.clip_x_0, generator)
    for x in steps:
        yield to_pictures(x)


@torch.no_grad()
def fill_in(network, config, y: Tensor, known: Tensor, generator: Noise, calls: int) -> Tensor:
    """Images y (N, C, H, W) with other pixels where known (1, 1, H, W) is 0."""
    _, abars = schedule(config)
    start = noise_like(y, generator)
    *_, x = inpaint(network, 2 * y - 1, known, start, abars, some_timesteps(config, calls), config.clip_x_0, generator)
    return to_pictures(x)


def noise_levels(network, config) -> list[str]:
    """The names of the noise levels, from the noisiest on."""
    return [f"t {t}" for t in range(config.T, 0, -1)]


@torch.no_grad()
def noise_and_guess(network, config, x: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Images x (N, C, H, W) with noise z of level k, and the clean images that the network sees in them."""
    _, abars = schedule(config)
    n = config.T - 1 - k
    t = torch.full((len(x),), n, device=x.device)
    x_t = noisy_image(2 * x - 1, abars, t, z)
    return to_pictures(x_t), to_pictures(clean_image(x_t, abars[n], network(x_t, t), config.clip_x_0))


# DDPM's own pictures, which flags of these names ask for. Each gets the network, the configuration, how many rows
# or samples, a seed, the number of network calls, and as many pairs of test images x (N, 2, C, H, W) in [0, 1]. Each
# returns images in [0, 1], and how many of them are a row.


def chain(network, config, x: Tensor, steps: Tensor, generator: Noise) -> Iterator[Tensor]:
    """Algorithm 2's step from each of the `steps` (K,) to the one before, and from the first to the image."""
    return ddim_sampling(network, x, schedule(config)[1], steps, 1.0, config.clip_x_0, generator)


@torch.no_grad()
def progress(network, config, n: int, seed: int, calls: int, x: Tensor) -> tuple[Tensor, int]:
    """show the network's guesses of the clean image, x_0-hat, along the chain (DDPM's Fig. 6)"""
    generator, guesses = SeededNoise(range(seed, seed + n)), []
    _, abars = schedule(config)

    def watched(x_t, t):
        eps = network(x_t, t)
        guesses.append(clean_image(x_t, abars[t[0]], eps, config.clip_x_0))
        return eps

    for _ in chain(watched, config, generator.like(x[:, 0]), some_timesteps(config, calls), generator):
        pass
    chosen = [guesses[k] for k in evenly(len(guesses), COLUMNS)]
    return to_pictures(torch.stack(chosen, dim=1).flatten(0, 1)), len(chosen)


@torch.no_grad()
def share_latent(network, config, n: int, seed: int, calls: int, x: Tensor) -> tuple[Tensor, int]:
    """show samples that share the x_t at the left, of about t = T, 3/4 T, T/2 and T/4 (DDPM's Fig. 7)"""
    steps, rows = some_timesteps(config, calls), []
    for part in (1, 0.75, 0.5, 0.25):
        shared = SeededNoise([seed])  # the same chain in each row
        left = max(1, round(part * len(steps)))  # steps to go from where the samples part
        x_T = shared.like(x[:1, 0])
        *_, x_t = x_T, *islice(chain(network, config, x_T, steps, shared), len(steps) - left)
        own = SeededNoise(range(seed + 1, seed + 1 + n))
        *_, images = chain(network, config, x_t.expand(n, -1, -1, -1), steps[:left], own)
        rows += [x_t, images]
    return to_pictures(torch.cat(rows)), 1 + n


@torch.no_grad()
def interpolate_images(network, config, n: int, seed: int, calls: int, x: Tensor) -> tuple[Tensor, int]:
    """go from one test image to another: same noise of t = T/2, which is then taken away (DDPM's Fig. 8)"""
    steps, middle = some_timesteps(config, calls), config.T // 2 - 1  # the paper's t = T/2
    steps = torch.cat([steps[steps < middle], torch.tensor([middle])])
    share = torch.linspace(0, 1, COLUMNS - 2, device=x.device)[None, :, None, None, None]
    mixed = ((1 - share) * x[:, :1] + share * x[:, 1:]).flatten(0, 1)  # x_t is linear in x_0, and so is its mixture
    seeds = [seed + k for k in range(n) for _ in range(COLUMNS - 2)]  # the noise of a row is the same, in every step
    generator = SeededNoise(seeds)
    t = steps[-1].to(x.device).expand(len(mixed))
    x_t = noisy_image(2 * mixed - 1, schedule(config)[1], t, generator.like(mixed))
    *_, images = chain(network, config, x_t, steps, generator)
    images = to_pictures(images).unflatten(0, (n, COLUMNS - 2))
    return torch.cat([x[:, :1], images, x[:, 1:]], dim=1).flatten(0, 1), COLUMNS


PICTURES, COLUMNS = {"progress": progress, "share_latent": share_latent, "interpolate_images": interpolate_images}, 10


if __name__ == "__main__":
    main(sys.modules[__name__])
