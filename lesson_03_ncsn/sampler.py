"""Annealed Langevin dynamics: walk uphill on the log density of the noisy data, kept random by fresh noise."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]  # (x, i) -> the score, shaped like x


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of x's shape, from the generator if there is one (on the generator's device)."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device).to(x.device)


@torch.no_grad()
def annealed_langevin_dynamics(
    score: Score, x: Tensor, sigmas: Tensor, T: int, epsilon: float, generator: torch.Generator | None = None
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
