"""Annealed Langevin dynamics: climb the log-density of the noisy data, kept random by fresh noise."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.noise import Noise, noise_like

Score = Callable[[Tensor, Tensor], Tensor]  # (x, i) -> the score, shaped like x


@torch.no_grad()
def annealed_langevin_dynamics(
    score: Score, x: Tensor, sigmas: Tensor, T: int, epsilon: float, generator: Noise = None
) -> Iterator[Tensor]:
    """Algorithm 1 of the NCSN paper. x (B, C, H, W) is the start; yields x after each of the L noise scales.

    T steps at each scale; epsilon > 0 is the step size at sigma_L. Costs T L network calls.
    """
    for n, sigma_i in enumerate(sigmas):
        i = torch.full((len(x),), n, device=x.device)
        alpha_i = epsilon * sigma_i**2 / sigmas[-1] ** 2
        for _ in range(T):
            z = noise_like(x, generator)
            x = x + alpha_i / 2 * score(x, i) + alpha_i.sqrt() * z
        yield x


@torch.no_grad()
def inpaint(
    score: Score, y: Tensor, known: Tensor, x: Tensor, sigmas: Tensor, T: int, epsilon: float, generator: Noise = None
) -> Iterator[Tensor]:
    """Algorithm 2 of the NCSN paper: Algorithm 1 that holds the known pixels of y at the noise of each scale.

    y, x (B, C, H, W); x is the start; known (1, 1, H, W), or any shape that fits y's, is 1 where a pixel of y is known
    and 0 where it is to be filled in. Yields x after each scale, with noise of that scale on the known pixels, too.
    """
    for n, sigma_i in enumerate(sigmas):
        i = torch.full((len(x),), n, device=x.device)
        alpha_i = epsilon * sigma_i**2 / sigmas[-1] ** 2
        noisy_y = y + sigma_i * noise_like(y, generator)  # sampled once for all T steps
        for _ in range(T):
            z = noise_like(x, generator)
            x = x + alpha_i / 2 * score(x, i) + alpha_i.sqrt() * z
            x = noisy_y * known + x * (1 - known)
        yield x


@torch.no_grad()
def tweedie(score: Score, x: Tensor, sigmas: Tensor, i: Tensor) -> Tensor:
    """The mean of the clean image given x (B, C, H, W) with noise sigma_i, i (B,) long: x + sigma_i^2 s(x, i).

    Tweedie's formula. If the score is the true one, no guess of the clean image has a smaller mean squared error.
    """
    return x + sigmas[i][:, None, None, None] ** 2 * score(x, i)


def langevin_step_size(sigmas: Tensor, T: int, known_T: int, known_epsilon: float) -> float:
    """The epsilon > 0 for T steps at each scale, from the known one for known_T steps (ours).

    sigmas (L,). Fewer steps are as much longer, so that they get as far, but not longer than sigma_L^2, with which the
    drift of one step goes half the way to the clean image. More steps are as long as the known ones.
    """
    longer = min(known_epsilon * known_T / T, float(sigmas[-1]) ** 2)
    return max(known_epsilon, longer)
