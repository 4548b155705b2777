"""Sample from a trained network, inpaint, interpolate: `python sample.py`, and look at output/drawn.png."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from sampler import (
    ancestral_eta,
    annealed_langevin_dynamics,
    consistent_annealed_sampling,
    denoise,
    inpaint,
    langevin_step_size,
    tweedie,
)
from score_network import ScoreNetwork
from unconditional import step_size_for_all_scales

from common.errors import LessonError
from common.noise import Noise, noise_like
from common.play import evenly, main

LESSON, WEIGHTS = "lesson_04_ncsnv2", "ema"  # its name, and which weights of a checkpoint samples come from
SAMPLERS, FILLS_IN = ("consistent", "langevin"), "langevin"  # common/play.py says what it takes from here
OPTIONS, PICTURES = {}, {}


def make_network(config, channels: int, weights: dict) -> ScoreNetwork:
    """The network of a configuration, with the noise scales of `weights` but not its weights."""
    options = {name: getattr(config, name) for name in ("width", "patch", "blocks", "activation", "skip")}
    return ScoreNetwork(weights["sigmas"], channels, **options)


def number_of_calls(network, config, sampler: str, quick: bool = True) -> int:
    """How often the network is called for each image: T at each noise scale, and once to denoise."""
    return (config.T if sampler == "langevin" else 1) * len(network.sigmas) + 1


def langevin_steps(calls: int, L: int) -> int:
    """T, the steps at each of L noise scales, of so many network calls in all. LessonError if that is less than one."""
    T = (calls - 1) // L  # one is to denoise
    if T < 1:
        raise LessonError(f"--calls {calls}: Langevin dynamics needs at least {L + 1}, with {L} noise scales")
    return T


def step_size(sigmas: Tensor, T: int) -> float:
    """Technique 4's; for T < 4, with which that leaves noise, the longer one that looks at all scales sigmas (L,)."""
    return langevin_step_size(sigmas, T) if T >= 4 else step_size_for_all_scales(sigmas, T)


def measured_eta(sigmas: Tensor) -> float:
    """The eta of consistent annealed sampling on sigmas (L,), half-way from DDPM's to 1: near the best, as measured."""
    return (1 + ancestral_eta(sigmas)) / 2


@torch.no_grad()
def draw(network, config, shape: tuple, generator: Noise, sampler: str, calls: int) -> Iterator[Tensor]:
    """Yields images of `shape` (N, C, H, W) after each noise scale and, last, denoised, with at most so many calls.

    With fewer calls than noise scales, consistent sampling takes some of the scales only, evenly chosen.
    """
    sigmas = network.sigmas
    x = sigmas[0] * noise_like(torch.empty(shape, device=sigmas.device), generator)
    if sampler == "langevin":
        T = langevin_steps(calls, len(sigmas))
        steps = annealed_langevin_dynamics(network, x, sigmas, T, step_size(sigmas, T), generator)
    elif calls < 3:
        raise LessonError(f"--calls {calls}: consistent sampling needs at least 3, two noise scales and one to denoise")
    else:
        some = evenly(len(sigmas), calls - 1).to(sigmas.device)
        epsilon = measured_eta(sigmas[some]) * float(sigmas[-1]) ** 2
        T = (calls - 1) // len(some)
        score = lambda x, i: network(x, some[i])
        steps = consistent_annealed_sampling(score, x, sigmas[some], T, epsilon, generator)
    for x in steps:
        yield x
    yield denoise(network, x, sigmas)


@torch.no_grad()
def fill_in(network, config, y: Tensor, known: Tensor, generator: Noise, calls: int) -> Tensor:
    """Images y (N, C, H, W) with other pixels where known (1, 1, H, W) is 0."""
    sigmas, T = network.sigmas, langevin_steps(calls, len(network.sigmas))
    start = sigmas[0] * noise_like(y, generator)
    *_, x = inpaint(network, y, known, start, sigmas, T, step_size(sigmas, T), generator)
    return denoise(network, x, sigmas) * (1 - known) + y * known


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
