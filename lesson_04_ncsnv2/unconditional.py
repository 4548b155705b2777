"""What Technique 3 costs, in one recursion: a network that is not conditioned on the noise level cannot correct it.

The network is not conditioned on the noise level: it sees that there is noise, and returns its direction with the size
that noise of level sigma_i should have. If x has a times that much noise, the score of such a network is a times too
short (or too long), and a step removes the same amount as ever. A network that is conditioned on sigma_i, or the exact
score, removes a share of what is there, so that an excess dies out.

Take data at one point, noise a sigma_i z in many dimensions, and the step x + r sigma_i^2 s(x, i) + f sigma_i z with
fresh z. In high dimension two noises are at right angles, and their squares add:

    a^2 <- (a - r)^2 + f^2          not conditioned
    a^2 <- (1 - r)^2 a^2 + f^2      conditioned

and a <- gamma a where the next level begins. The functions below repeat this over all noise levels.
"""

import torch
from torch import Tensor


def step(a: Tensor, r: Tensor, f_squared: Tensor, conditional: bool) -> Tensor:
    """One step of the recursion: a, the noise over sigma_i, after it. r, f_squared: how far, and how much is fresh."""
    left = (1 - r) * a if conditional else a - r  # of the noise that was there
    return (left**2 + f_squared).sqrt()


def noise_after_langevin(sigmas: Tensor, T: int, epsilon: Tensor, conditional: bool = False) -> Tensor:
    """The noise that Algorithm 1 leaves at the end, over sigma_L: 1 is right.

    sigmas (L,) the noise levels, T steps at each of them; epsilon > 0, the step size at sigma_L, of any shape, which is
    also that of the result. The start has the noise that belongs to sigma_1.
    """
    ratios = (sigmas[:-1] / sigmas[1:]).cpu().double()
    r = torch.as_tensor(epsilon, dtype=torch.float64) / float(sigmas[-1]) ** 2
    a = torch.ones_like(r)
    for gamma in [1.0, *ratios.tolist()]:
        a = gamma * a
        for _ in range(T):
            a = step(a, r, 2 * r, conditional)
    return a


def noise_after_consistent(sigmas: Tensor, eta: float, a: float = 1.0, conditional: bool = False) -> float:
    """The noise with which consistent annealed sampling comes to sigma_L, over sigma_L, from a times the right noise.

    Its fresh noise makes a = 1 stay 1. A small excess a - 1 is multiplied at each level by gamma^2 (1 - eta), or by
    gamma^2 (1 - eta)^2 if the network is conditioned: it dies out for eta > 1 - 1 / gamma^2, DDPM's ancestral step
    (small variance), and grows below, as at eta = 1 - 1 / gamma, which is DDIM.
    """
    a = torch.tensor(a, dtype=torch.float64)
    for gamma in (sigmas[:-1] / sigmas[1:]).cpu().double():
        fresh = (gamma**-2 - (1 - eta) ** 2).clamp(min=0)  # in units of sigma_i^2
        a = gamma * step(a, eta, fresh, conditional)
    return float(a)


def step_size_for_all_scales(sigmas: Tensor, T: int) -> float:
    """The epsilon > 0 with which T steps of Algorithm 1 at each level leave the least noise after all of them (ours).

    Technique 4 looks at one level, and assumes an exact score and the right noise at its start. With few steps neither
    holds, and this step is longer. sigmas (L,), L >= 2; T >= 1; ValueError otherwise.
    """
    if T < 1 or len(sigmas) < 2:
        raise ValueError(f"the step size needs T >= 1 and L >= 2, not {T} and {len(sigmas)}")
    r = torch.logspace(-4, 0, 4001, dtype=torch.float64)
    epsilon = r * float(sigmas[-1]) ** 2
    return float(epsilon[noise_after_langevin(sigmas, T, epsilon).argmin()])
