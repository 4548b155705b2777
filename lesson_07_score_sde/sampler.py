"""Samplers of one network: the reverse SDE with and without Langevin corrector, and the probability flow ODE.

Changes from lesson 4: Langevin dynamics is left as the corrector of a predictor, which follows the reverse SDE from one
noise scale to the next; the ODE has no fresh noise at all, so that an image can be encoded, and decoded again.
Consistent sampling takes noise scales, not indices.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.noise import Noise, noise_like
from common.ode import runge_kutta_4

Score = Callable[[Tensor, Tensor], Tensor]  # (x, sigma (B,)) -> the score of VE, shaped like x
PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama", "ode")


def score_at(score: Score, x: Tensor, sigma: Tensor, m: float | Tensor = 1.0) -> Tensor:
    """The score of x (B, C, H, W), which is m times an image with noise of scale sigma: by change of variables."""
    return score(x / m, sigma.expand(len(x))) / m


@torch.no_grad()
def predictor_corrector(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    r: float = 0.16,
    generator: Noise = None,
    mean_factors: Tensor | None = None,
    hold: Callable[[Tensor, int], Tensor] = lambda x, n: x,
) -> Iterator[Tensor]:
    """Algorithm 1 (2 for VE, 3 for VP). x (B, C, H, W) has noise of sigmas[0]; yields x at each of sigmas[1:].

    sigmas (N,) descending. A predictor takes x from one to the next, then `corrector_steps` steps of Langevin dynamics
    correct it there. Costs (N - 1) (1 + corrector_steps) network calls; noise of sigmas[-1] is left, for `denoise`.
    mean_factors (N,): m of the SDE at these noise scales, None for VE, where it is 1; x is m times the noisy image.
    hold(x, n) is applied to x at sigmas[n] after each step: `inpaint` holds pixels with it.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor is one of {', '.join(PREDICTORS)}, not {predictor!r}")
    ms = torch.ones_like(sigmas) if mean_factors is None else mean_factors
    for n in range(1, len(sigmas)):
        x = predict(predictor, score, x, sigmas[n - 1 : n + 1], ms[n - 1 : n + 1], generator)
        x = hold(x, n)
        for _ in range(corrector_steps):
            x = hold(correct(score, x, sigmas[n], ms[n], r, generator), n)
        yield x


def predict(predictor: str, score: Score, x: Tensor, sigmas: Tensor, ms: Tensor, generator: Noise = None) -> Tensor:
    """One step of the reverse SDE from noise scale sigmas[0] to sigmas[1]; ms (2,) are m at both (1 for VE).

    Forwards, one step is x <- a x + b z, with a = m_0 / m_1, and b^2 the variance that then is missing.
    reverse_diffusion: the same step backwards (App. E). ancestral: the mean of x one step earlier, with the
    noise that is right for one point (App. F; for VP, DDPM's small variance, where Eq. 4 has beta_i). euler_maruyama: a
    plain step of the reverse SDE (Eq. 6), in ln m and ln sigma. ode: reverse diffusion with half of the score and no
    noise, the paper's "probability flow" (App. D.3).
    """
    (sigma, sigma_next), (m, m_next) = sigmas, ms
    s = score_at(score, x, sigma, m)
    a = m / m_next
    b = m * (sigma**2 - sigma_next**2).sqrt()  # = sqrt(std_0^2 - a^2 std_1^2)
    if predictor == "ode":
        return (2 - a) * x + b**2 / 2 * s
    z = noise_like(x, generator)
    if predictor == "reverse_diffusion":
        return (2 - a) * x + b**2 * s + b * z
    if predictor == "ancestral":
        return (x + b**2 * s) / a + m_next * sigma_next / sigma * (sigma**2 - sigma_next**2).sqrt() * z
    # f dt = x d ln m, and g^2 dt = m^2 d sigma^2 = 2 m^2 sigma^2 d ln sigma
    g_squared = 2 * (m * sigma) ** 2 * (sigma / sigma_next).log()
    return (1 - a.log()) * x + g_squared * s + g_squared.sqrt() * z


def correct(score: Score, x: Tensor, sigma: Tensor, m: Tensor, r: float, generator: Noise = None) -> Tensor:
    """One step of Langevin dynamics at noise scale sigma (Algorithms 4 and 5, without the latter's factor alpha_i).

    Its length epsilon makes the fresh noise 1 / r times as long as the step along the score. Each image has its own
    (the authors' code takes means over the batch), so that image k does not depend on the others. r > 0.
    """
    s, z = score_at(score, x, sigma, m), noise_like(x, generator)
    epsilon = 2 * r**2 * x[0].numel() / s.square().sum(dim=(1, 2, 3), keepdim=True)  # ||z||^2 is D, about
    return x + epsilon * s + (2 * epsilon).sqrt() * z


@torch.no_grad()
def probability_flow(score: Score, x: Tensor, sigmas: Tensor, method: str = "heun") -> Iterator[Tensor]:
    """The ODE dx = -sigma s d sigma (Eq. 13 for VE, with sigma as the time): no fresh noise. Yields x at sigmas[1:].

    x (B, C, H, W) has noise of sigmas[0]; sigmas (N,) descending. "euler" goes along the slope at the start of a step,
    N - 1 network calls, and is DDIM's step; "heun" along the mean of the slopes at both ends, twice as many. To a last
    scale of 0, where no score is, Heun's step is Euler's.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f'method is "euler" or "heun", not {method!r}')
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        slope = -sigma * score_at(score, x, sigma)
        there = x + (following - sigma) * slope
        if method == "heun":
            slope = (slope - following * score_at(score, there, following)) / 2
            there = torch.where(following > 0, x + (following - sigma) * slope, there)
        x = there
        yield x


def flow(score: Score) -> Callable[[Tensor, Tensor], Tensor]:
    """The slope of the same ODE with ln sigma as the time, in which its steps are even: dx = -sigma^2 s d ln sigma."""
    return lambda x, log_sigma: -(log_sigma.exp() ** 2) * score_at(score, x, log_sigma.exp())


def log_times(sigma_from: float, sigma_to: float, steps: int, x: Tensor) -> Tensor:
    """ln sigma (steps + 1,) from one noise scale to another, evenly, as x is: on its device, in its precision."""
    return torch.linspace(math.log(sigma_from), math.log(sigma_to), steps + 1, device=x.device, dtype=x.dtype)


@torch.no_grad()
def encode(score: Score, x: Tensor, sigma_min: float, sigma_max: float, steps: int = 24) -> Tensor:
    """Images x (B, C, H, W) to latents along the ODE, about N(0, sigma_max^2) (App. D.5): 4 steps calls."""
    return runge_kutta_4(flow(score), x, log_times(sigma_min, sigma_max, steps, x))


@torch.no_grad()
def decode(score: Score, z: Tensor, sigma_min: float, sigma_max: float, steps: int = 24) -> Tensor:
    """Latents z (B, C, H, W) back to images, with noise of sigma_min: the way of `encode`, backwards."""
    return runge_kutta_4(flow(score), z, log_times(sigma_max, sigma_min, steps, z))


def inpaint(
    score: Score,
    y: Tensor,
    known: Tensor,
    x: Tensor,
    sigmas: Tensor,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    r: float = 0.16,
    generator: Noise = None,
) -> Iterator[Tensor]:
    """`predictor_corrector` that holds the known pixels of y, with fresh noise after each step (App. I.2).

    y (B, C, H, W); known (1, 1, H, W) is 1 where a pixel of y is known and 0 where it is to be filled in.
    """

    def hold(x, n):
        return (y + sigmas[n] * noise_like(y, generator)) * known + x * (1 - known)

    return predictor_corrector(score, hold(x, 0), sigmas, predictor, corrector_steps, r, generator, hold=hold)


@torch.no_grad()
def denoise(score: Score, x: Tensor, sigma: Tensor) -> Tensor:
    """The mean of the clean image given x with noise of scale sigma, the last step of every sampler: x + sigma^2 s.

    Tweedie's formula. If the score is the true one, no guess of the clean image has a smaller mean squared error.
    """
    return x + sigma**2 * score_at(score, x, sigma)


@torch.no_grad()
def consistent_sampling(
    score: Score, x: Tensor, sigmas: Tensor, eta: float | None = None, generator: Noise = None
) -> Iterator[Tensor]:
    """Predictor and corrector in one step (Jolicoeur-Martineau et al. 2020, arXiv 2009.05475), as in lesson 4.

    x (B, C, H, W) has noise of sigmas[0]; sigmas (N,) descending; yields x at sigmas[1:], one network call each. A step
    goes the share eta of the way to the clean image, and draws afresh what is missing to the noise of the next scale.
    eta = 1 - 1 / gamma is Euler's step of the ODE, 1 - 1 / gamma^2 the ancestral one, and None a quarter of the way
    from that to 1 (ours; lesson 4 goes half-way).
    """
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        share = 1 - 0.75 * (following / sigma) ** 2 if eta is None else eta
        missing = (following**2 - ((1 - share) * sigma) ** 2).clamp(min=0).sqrt()
        x = x + share * sigma**2 * score_at(score, x, sigma) + missing * noise_like(x, generator)
        yield x
