"""The variational bound: how many bits a coder with this network needs for a picture (DDPM's Eq. 5, Sec. 3.3 and 4.3).

The sender encodes x_T, then x_{T-1} given x_T, ..., and last x_0 given x_1. Each step costs as many bits as what really
happened, q(x_{t-1} | x_t, x_0), differs from what the receiver expected, p(x_{t-1} | x_t): the KL divergence of two
normal distributions. The sum is at least -log2 p(x_0); over the number of pixels, it is in bits/dim.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.machine import log_ndtr
from common.noise import Noise, noise_like

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> eps, shaped like x_t


def discretised_log_likelihood(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 13: ln of the probability that N(mean, sigma^2) gives to the bin of each pixel, in nats; shaped like x.

    x in [-1, 1] has 256 levels, 2/255 apart, each in the middle of its bin; the first and last bin reach to infinity.
    """
    low = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / sigma)
    high = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / sigma)
    # The same probability by the other tail, where the logarithm is exact
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    ln_low, ln_high = log_ndtr(low), log_ndtr(high)
    return ln_high + torch.log(-torch.expm1(ln_low - ln_high))  # ln (Phi(high) - Phi(low))


def prior_term(x_0: Tensor, abar_T: Tensor) -> Tensor:
    """L_T: KL of q(x_T | x_0) from N(0, 1), in bits/dim (B,). It has nothing to learn."""
    kl = 0.5 * (abar_T * (x_0.square() - 1) - torch.log1p(-abar_T))
    return kl.mean(dim=(1, 2, 3)) / math.log(2)


@torch.no_grad()
def terms(
    network: Network, x_0: Tensor, betas: Tensor, variance: str = "small", clip: bool = True, generator: Noise = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields L_{T-1}, ..., L_1, L_0 in bits/dim (B,), each with the squared error (B,) of the x_0-hat it is made of.

    x_0 (B, C, H, W) in [-1, 1]; one noisy x_t for each term, from q(x_t | x_0); T network calls. betas (T,), variance
    and clip are those of the sampler. L_0 has the variance beta_tilde_2 in place of beta_tilde_1 = 0, with either
    choice, as in the authors' code.
    """
    if variance not in ("small", "large") or len(betas) < 2:
        raise ValueError(f'the bound needs variance "small" or "large" and T > 1, not {variance!r} and {len(betas)}')
    abars = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])  # (T + 1,), with abar_0 = 1
    beta_tilde = betas * (1 - abars[:-1]) / (1 - abars[1:])  # Eq. 7; (T,)
    for n in reversed(range(len(betas))):
        beta, abar, before = betas[n], abars[n + 1], abars[n]
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise_like(x_0, generator)
        eps = network(x_t, torch.full((len(x_0),), n, device=x_0.device))
        guess = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()  # x_0-hat, DDPM's Eq. 15
        guess = guess.clamp(-1, 1) if clip else guess
        square = (x_0 - guess).square()  # (B, C, H, W)
        if n == 0:  # q(x_0 | x_1, x_0) is a point, and the mean of p is x_0-hat
            L = -discretised_log_likelihood(x_0, guess, beta_tilde[1].sqrt())
        else:
            c1 = before.sqrt() * beta / (1 - abar)
            sigma2 = beta_tilde[n] if variance == "small" else beta
            L = 0.5 * ((sigma2 / beta_tilde[n]).log() - 1 + (beta_tilde[n] + c1**2 * square) / sigma2)
        yield L.mean(dim=(1, 2, 3)) / math.log(2), square.mean(dim=(1, 2, 3))


def bits_per_dim(
    network: Network, x_0: Tensor, betas: Tensor, variance: str = "small", clip: bool = True, generator: Noise = None
) -> Tensor:
    """L_0, L_1, ..., L_{T-1}, L_T, whose sum is the bound (Eq. 5): (B, T + 1), bits/dim. Arguments as those of `terms`.

    L_{t-1} is the step from x_t to x_{t-1}: column 0 is the decoder at t = 1, the last column the prior.
    """
    found = [L for L, _ in terms(network, x_0, betas, variance, clip, generator)]
    return torch.stack([*reversed(found), prior_term(x_0, (1 - betas).prod())], dim=1)
