"""Annealed Langevin dynamics: climb the log-density of the noisy data, kept random by fresh noise.

Changes from lesson 3:
- the update is written x + alpha s + sqrt(2 alpha) z, where lesson 3 has x + alpha/2 s + sqrt(alpha) z;
- Technique 4, `langevin_step_size`: epsilon is computed from the noise scales and T;
- `denoise`: one last step;
- `consistent_annealed_sampling`: a later sampler that needs fewer network calls (not in the paper).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.noise import Noise, noise_like

Score = Callable[[Tensor, Tensor], Tensor]  # (x, i) -> the score, shaped like x


@torch.no_grad()
def annealed_langevin_dynamics(
    score: Score, x: Tensor, sigmas: Tensor, T: int, epsilon: float, generator: Noise = None
) -> Iterator[Tensor]:
    """Algorithm 1 of the NCSNv2 paper. x (B, C, H, W) is the start; yields x after each of the L noise scales.

    T steps at each scale; epsilon > 0 is the step size at sigma_L. Costs T L network calls.
    """
    for n, sigma_i in enumerate(sigmas):
        i = torch.full((len(x),), n, device=x.device)
        alpha_i = epsilon * sigma_i**2 / sigmas[-1] ** 2
        for _ in range(T):
            z = noise_like(x, generator)
            x = x + alpha_i * score(x, i) + (2 * alpha_i).sqrt() * z
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
            x = x + alpha_i * score(x, i) + (2 * alpha_i).sqrt() * z
            x = noisy_y * known + x * (1 - known)
        yield x


@torch.no_grad()
def tweedie(score: Score, x: Tensor, sigmas: Tensor, i: Tensor) -> Tensor:
    """The mean of the clean image given x (B, C, H, W) with noise sigma_i, i (B,) long: x + sigma_i^2 s(x, i).

    Tweedie's formula. If the score is the true one, no guess of the clean image has a smaller mean squared error.
    """
    return x + sigmas[i][:, None, None, None] ** 2 * score(x, i)


def langevin_step_size(sigmas: Tensor, T: int) -> float:
    """Technique 4: the epsilon > 0 with which T steps at each scale best carry the noise of one scale to the next.

    sigmas (L,) geometric with ratio gamma, L >= 2; T >= 1. Take data at a single point and noise of scale
    sigma_{i-1} = gamma sigma_i around it. Each of T steps at sigma_i shrinks what is there by 1 - r, with
    r = epsilon / sigma_L^2, and adds noise; Prop. 3 and Eq. 5 of NCSNv2 sum that up as
    s_T^2 / sigma_i^2 = (1-r)^(2T) (gamma^2 - b) + b with b = 2r / (1 - (1-r)^2) = 2 / (2 - r).
    It should be 1; both gamma^2 and b are larger, so it never is, and nearest to 1 is where it is smallest.
    """
    if T < 1 or len(sigmas) < 2:
        raise ValueError(f"the step size needs T >= 1 and L >= 2, not {T} and {len(sigmas)}")
    gamma = float(sigmas[0] / sigmas[1])
    r = torch.logspace(-8, 0, 1_000_001, dtype=torch.float64)  # neighbours differ by 2e-5 of themselves
    b = 2 / (2 - r)
    variance_ratio = (1 - r) ** (2 * T) * (gamma**2 - b) + b
    return float(r[int(variance_ratio.argmin())]) * float(sigmas[-1]) ** 2


@torch.no_grad()
def denoise(score: Score, x: Tensor, sigmas: Tensor) -> Tensor:
    """The mean of the clean image given x with noise sigma_L: x + sigma_L^2 s(x, L), the last denoising step."""
    return tweedie(score, x, sigmas, torch.full((len(x),), len(sigmas) - 1, device=x.device))


def smallest_eta(sigmas: Tensor) -> float:
    """1 - 1 / gamma, for the largest ratio gamma of neighbours in sigmas (L,): the smallest eta of consistent sampling.

    With it, no noise is drawn afresh: it is DDIM's step.
    """
    return 1 - float((sigmas[1:] / sigmas[:-1]).min())


def ancestral_eta(sigmas: Tensor) -> float:
    """1 - 1 / gamma^2: with it, consistent annealed sampling takes DDPM's ancestral step, of the small variance.

    It is also the smallest eta at which a network that is not conditioned on the noise level lets no excess of noise
    grow (unconditional.py).
    """
    return 1 - (1 - smallest_eta(sigmas)) ** 2


@torch.no_grad()
def consistent_annealed_sampling(
    score: Score, x: Tensor, sigmas: Tensor, T: int, epsilon: float, generator: Noise = None
) -> Iterator[Tensor]:
    """Algorithm 1 with as much fresh noise as the next step expects x to lack.

    Jolicoeur-Martineau et al. 2020, arXiv 2009.05475, Sec. 3; T > 1 is ours, they take more noise scales instead.
    Arguments, result and cost are those of `annealed_langevin_dynamics`. A step with eta = epsilon / sigma_L^2 leaves
    1 - eta of the noise if the network's guess of the clean image is right. What is missing to the noise of the next
    step is drawn afresh: to sigma_i for all but the last of T steps, which moves on to sigma_{i+1}. Noise can be added
    but not taken back, so |1 - eta| <= 1 / gamma; ValueError otherwise.
    """
    eta = epsilon / float(sigmas[-1]) ** 2
    lowest = smallest_eta(sigmas)
    if not abs(eta - 1) <= 1 - lowest + 1e-6:
        raise ValueError(f"epsilon / sigma_L^2 must lie between {lowest:.4f} and {2 - lowest:.4f} here, not {eta:.4f}")
    for n, sigma_i in enumerate(sigmas):
        i = torch.full((len(x),), n, device=x.device)
        for t in range(T):
            goal = sigmas[min(n + 1, len(sigmas) - 1)] if t == T - 1 else sigma_i
            missing = (goal**2 - ((1 - eta) * sigma_i) ** 2).clamp(min=0).sqrt()
            x = x + eta * sigma_i**2 * score(x, i) + missing * noise_like(x, generator)
        yield x
