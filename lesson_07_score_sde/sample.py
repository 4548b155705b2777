"""Sample from a trained network, inpaint, interpolate: `python sample.py`, and look at output/drawn.png."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from classifier import guided_score, load_classifier
from likelihood import dequantise
from sampler import (
    PREDICTORS,
    consistent_sampling,
    decode,
    denoise,
    encode,
    inpaint,
    predictor_corrector,
    probability_flow,
)
from score_network import ScoreNetwork
from sde import VE, VP, SubVP

from common.errors import LessonError
from common.noise import Noise, SeededNoise, noise_like
from common.play import main

LESSON, WEIGHTS = "lesson_07_score_sde", "ema"  # its name, and which weights of a checkpoint samples come from
SAMPLERS, FILLS_IN = ("consistent", "heun", "euler", "predictor_corrector"), "predictor_corrector"
OPTIONS = {"sde": ("ve", "vp", "sub_vp"), "predictor": PREDICTORS, "corrector": (True, False)}  # see common/play.py
OPTIONS |= {"digit": tuple(range(10)), "guidance": float}
ONLY_FOR = dict.fromkeys(("calls", "sde", "digit", "guidance"), (*SAMPLERS, "inpaint"))
ONLY_FOR |= dict.fromkeys(("predictor", "corrector"), ("predictor_corrector", "inpaint"))


def make_network(config, channels: int, weights: dict) -> ScoreNetwork:
    """The network of a configuration, with the largest noise scale of `weights` but not its weights."""
    options = {name: getattr(config, name) for name in ("width", "patch", "blocks", "activation", "skip")}
    return ScoreNetwork(channels, **options, conditional=config.conditional, sigma_max=weights["sigma_max"])


def calls_per_step(config, sampler: str) -> int:
    """How often the network is called on the way from one noise scale to the next."""
    return {"consistent": 1, "heun": 2, "euler": 1, "predictor_corrector": 1 + config.corrector}[sampler]


def number_of_calls(network, config, sampler: str, quick: bool = True) -> int:
    """How often the network is called for each image: on N noise scales, or less for a quick look; once to denoise."""
    N = min(config.N, 18 if sampler == "heun" else 50) if quick else config.N
    return calls_per_step(config, sampler) * (N - 1) + 1


def schedule(network, config, N: int) -> tuple[Tensor, Tensor]:
    """N noise scales from sigma_max to sigma_L, and the factor m of the SDE at each: (N,). Their times t are even."""
    sigma_max = float(network.sigma_max)
    sde = {"ve": lambda: VE(config.sigma_L, sigma_max), "vp": VP, "sub_vp": SubVP}[config.sde]()
    ends = sde.time(torch.tensor([sigma_max, config.sigma_L], dtype=torch.float64))
    t = torch.linspace(*ends.tolist(), N, dtype=torch.float64)
    return tuple(numbers.float().to(network.sigma_max.device) for numbers in (sde.noise_scale(t), sde.mean_factor(t)))


def schedule_for_calls(network, config, sampler: str, calls: int) -> tuple[Tensor, Tensor]:
    """The `schedule` that takes at most so many network calls. LessonError if there is none."""
    each = calls_per_step(config, sampler)
    if calls < each + 1:
        raise LessonError(f"--calls {calls}: {sampler} needs at least {each + 1}, one step and one call to denoise")
    return schedule(network, config, 1 + (calls - 1) // each)


def guided(network, config, shape: tuple):
    """The network's score, or if a digit is asked for, with the classifier's gradient added to it."""
    digit, guidance = getattr(config, "digit", None), getattr(config, "guidance", None)
    if guidance is not None and (digit is None or not -1000 < guidance < 1000):
        raise LessonError(f"--guidance {guidance}: a number below 1000, and only with --digit")
    if digit is None:
        return network
    if tuple(shape[1:]) != (1, 28, 28):
        raise LessonError("--digit: the classifier knows gray digits of 28x28 pixels only; leave it out")
    classifier = load_classifier().to(network.sigma_max.device)
    return guided_score(network, classifier, digit, 1.0 if guidance is None else guidance)


def predictor_corrector_options(config, generator: Noise) -> tuple:
    """The last arguments of `predictor_corrector` and `inpaint`: predictor, corrector steps, r, generator."""
    return config.predictor, int(config.corrector), config.r, generator


def follow(sampler: str, score, x: Tensor, sigmas: Tensor, ms: Tensor, config, generator: Noise) -> Iterator[Tensor]:
    """Images with noise of sigmas[1:], from x (B, C, H, W) with noise of sigmas[0]; ms are the mean factors m."""
    if sampler == "predictor_corrector":
        scaled = predictor_corrector(score, ms[0] * x, sigmas, *predictor_corrector_options(config, generator), ms)
        return (x / m for x, m in zip(scaled, ms[1:]))
    if sampler == "consistent":
        return consistent_sampling(score, x, sigmas, None, generator)
    return probability_flow(score, x, sigmas, sampler)


@torch.no_grad()
def draw(network, config, shape: tuple, generator: Noise, sampler: str, calls: int) -> Iterator[Tensor]:
    """Yields images of `shape` (N, C, H, W) after each noise scale and, last, denoised, with at most so many calls."""
    sigmas, ms = schedule_for_calls(network, config, sampler, calls)
    score = guided(network, config, shape)
    start = sigmas[0] * noise_like(torch.empty(shape, device=sigmas.device), generator)
    for x in follow(sampler, score, start, sigmas, ms, config, generator):
        yield x
    yield denoise(score, x, sigmas[-1])


@torch.no_grad()
def fill_in(network, config, y: Tensor, known: Tensor, generator: Noise, calls: int) -> Tensor:
    """Images y (N, C, H, W) with other pixels where known (1, 1, H, W) is 0."""
    sigmas, _ = schedule_for_calls(network, config, FILLS_IN, calls)
    start = sigmas[0] * noise_like(y, generator)
    score = guided(network, config, y.shape)
    *_, x = inpaint(score, y, known, start, sigmas, *predictor_corrector_options(config, generator))  # as for VE
    return denoise(score, x, sigmas[-1]) * (1 - known) + y * known


def noise_levels(network, config) -> list[str]:
    """The names of the noise levels, from the noisiest on."""
    return [f"sigma {sigma:.4g}" for sigma in trained_scales(network, config).tolist()]


def trained_scales(network, config) -> Tensor:
    """A hundred noise scales (100,) that the network is trained for, from sigma_max to sigma_min."""
    return VE(config.sigma_min, float(network.sigma_max)).std(torch.linspace(1, 0, 100))


@torch.no_grad()
def noise_and_guess(network, config, x: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Images x (N, C, H, W) with noise z of level k, and the clean images that the network sees in them."""
    sigma = trained_scales(network, config)[k].to(x.device)
    noisy = x + sigma * z
    return noisy, denoise(network, noisy, sigma)


def latents(network, config, x: Tensor, seed: int) -> Tensor:
    """Test images x (N, C, H, W), dequantised, and encoded along the ODE from the smallest trained noise scale."""
    x = dequantise(x, SeededNoise(range(seed, seed + len(x))))
    return encode(network, x, config.sigma_min, float(network.sigma_max))


def images_of(network, config, z: Tensor) -> Tensor:
    """Latents z (N, C, H, W) decoded, and denoised."""
    x = decode(network, z, config.sigma_min, float(network.sigma_max))
    return denoise(network, x, torch.tensor(config.sigma_min, device=x.device))


@torch.no_grad()
def encoded(network, config, n: int, seed: int, calls: int, x: Tensor) -> tuple[Tensor, int]:
    """show test images, their latents along the ODE, and what these are decoded to (App. D.5)"""
    x = x[:, 0]
    z = latents(network, config, x, seed)
    shown = 0.5 + z / float(network.sigma_max) / 6  # three standard deviations either way are black and white
    return torch.stack([x, shown, images_of(network, config, z)], dim=1).flatten(0, 1), 3


@torch.no_grad()
def interpolate_images(network, config, n: int, seed: int, calls: int, x: Tensor) -> tuple[Tensor, int]:
    """go from one test image to another, along an arc between their latents (App. D.4)"""
    z = latents(network, config, x.flatten(0, 1), seed).unflatten(0, (n, 2))
    flat = z.flatten(2) / z.flatten(2).norm(dim=2, keepdim=True)
    angle = (flat[:, 0] * flat[:, 1]).sum(1).arccos()[:, None, None, None, None]
    t = torch.linspace(0, 1, 8, device=x.device)[None, :, None, None, None]
    z = (((1 - t) * angle).sin() * z[:, :1] + (t * angle).sin() * z[:, 1:]) / angle.sin()  # slerp
    images = images_of(network, config, z.flatten(0, 1)).unflatten(0, (n, 8))
    return torch.cat([x[:, :1], images, x[:, 1:]], dim=1).flatten(0, 1), 10


# Flags of these names; common/play.py says what each function gets and returns
PICTURES = {"encoded": encoded, "interpolate_images": interpolate_images}


if __name__ == "__main__":
    main(sys.modules[__name__])
