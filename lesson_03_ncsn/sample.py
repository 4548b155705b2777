"""Sample from a trained network, inpaint, interpolate: `python sample.py`, and look at output/drawn.png."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from sampler import annealed_langevin_dynamics, inpaint, langevin_step_size, tweedie
from score_network import ScoreNetwork

from common.errors import LessonError
from common.noise import Noise, noise_like
from common.play import main

LESSON, WEIGHTS = "lesson_03_ncsn", "network"  # its name, and which weights of a checkpoint samples come from
SAMPLERS, FILLS_IN = ("langevin",), "langevin"  # common/play.py says what it takes from here
OPTIONS, PICTURES = {}, {}
QUICK_T = 15  # Langevin steps at each noise scale when a picture should not take long; the paper has 100


def make_network(config, channels: int, weights: dict) -> ScoreNetwork:
    """The network of a configuration, with the noise scales of `weights` but not its weights."""
    options = {name: getattr(config, name) for name in ("width", "patch", "blocks", "activation", "skip")}
    return ScoreNetwork(weights["sigmas"], channels, **options)


def number_of_calls(network, config, sampler: str, quick: bool = True) -> int:
    """How often the network is called for each image: T times at each noise scale."""
    return min(QUICK_T if quick else config.T, config.T) * len(network.sigmas)


def langevin_steps(calls: int, L: int) -> int:
    """T, the steps at each of L noise scales, of so many network calls in all. LessonError if that is less than one."""
    T = calls // L
    if T < 1:
        raise LessonError(f"--calls {calls}: Langevin dynamics needs at least {L}, with {L} noise scales")
    return T


@torch.no_grad()
def draw(network, config, shape: tuple, generator: Noise, sampler: str, calls: int) -> Iterator[Tensor]:
    """Yields images of `shape` (N, C, H, W) after each noise scale, with at most so many network calls."""
    sigmas, T = network.sigmas, langevin_steps(calls, len(network.sigmas))
    epsilon = langevin_step_size(sigmas, T, config.T, config.epsilon)
    x = torch.special.ndtr(noise_like(torch.empty(shape, device=sigmas.device), generator))  # uniform in [0, 1]
    yield from annealed_langevin_dynamics(network, x, sigmas, T, epsilon, generator)


@torch.no_grad()
def fill_in(network, config, y: Tensor, known: Tensor, generator: Noise, calls: int) -> Tensor:
    """Images y (N, C, H, W) with other pixels where known (1, 1, H, W) is 0."""
    sigmas, T = network.sigmas, langevin_steps(calls, len(network.sigmas))
    start = torch.special.ndtr(noise_like(y, generator))
    epsilon = langevin_step_size(sigmas, T, config.T, config.epsilon)
    *_, x = inpaint(network, y, known, start, sigmas, T, epsilon, generator)
    return x * (1 - known) + y * known


def noise_levels(network, config) -> list[str]:
    """The names of the noise levels, from the noisiest on."""
    return [f"sigma {sigma:.4g}" for sigma in network.sigmas.tolist()]


@torch.no_grad()
def noise_and_guess(network, config, x: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Images x (N, C, H, W) with noise z of level k, and the clean images that the network sees in them."""
    noisy = x + network.sigmas[k] * z
    return noisy, tweedie(network, noisy, network.sigmas, torch.full((len(x),), k, device=x.device))


if __name__ == "__main__":
    main(sys.modules[__name__])
