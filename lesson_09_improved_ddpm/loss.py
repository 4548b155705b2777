"""The losses: predict the noise in a noisy image and, new, the variance of the step back.

Changes from lesson 5: the network returns v as well, and v is learned from the variational bound.
Equations before 15 are DDPM's.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.machine import log_ndtr

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x_t, t) -> eps and v, shaped like x_t


def noisy_image(x_0: Tensor, alpha_bars: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Eq. 4). Shapes as in `noise_prediction_loss`."""
    tables = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()  # (T,), cast only now
    a, s = (table.to(x_0)[t][:, None, None, None] for table in tables)  # (B, 1, 1, 1)
    return a * x_0 + s * eps


def noise_prediction_loss(network: Network, x_0: Tensor, alpha_bars: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """L_simple (Eq. 14): the mean over the pixels of (eps - eps_theta(x_t, t))^2.

    network: any callable (x_t, t) -> the noise, shaped like x_t, and v. x_0 (B, C, H, W) clean images in [-1, 1];
    alpha_bars (T,); t (B,) long, which step each image gets, 0 for the paper's t = 1; eps (B, C, H, W) standard normal.
    Returns (B,): about 1 for a network that predicts zero.
    """
    return (eps - network(noisy_image(x_0, alpha_bars, t, eps), t)[0]).square().mean(dim=(1, 2, 3))


def learned_log_variance(v: Tensor, betas: Tensor, t: Tensor) -> Tensor:
    """Eq. 15: ln sigma^2 = v ln beta_t + (1 - v) ln beta_tilde_t, for each pixel of v (B, C, H, W); t (B,) long.

    v is not held to [0, 1]. beta_tilde_1 = 0 has no logarithm: beta_tilde_2 stands in for it.
    """
    low, high = (table.to(v)[t][:, None, None, None] for table in (posterior_variance(betas).log(), betas.log()))
    return v * high + (1 - v) * low


def posterior_variance(betas: Tensor) -> Tensor:
    """beta_tilde (T,), of which the first is replaced by the second."""
    abars = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])
    beta_tilde = betas * (1 - abars[:-1]) / (1 - abars[1:])
    return torch.cat([beta_tilde[1:2], beta_tilde[1:]])


def discretised_log_likelihood(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """ln of the probability that N(mean, sigma^2) gives to the bin of each pixel (likelihood.py)."""
    low = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / sigma)
    high = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / sigma)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    ln_low, ln_high = log_ndtr(low), log_ndtr(high)
    return ln_high + torch.log(-torch.expm1(ln_low - ln_high))


def bound_term(network: Network, x_0: Tensor, betas: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """L_t of the variational bound in bits/dim (B,), t (B,) long; the decoder's term where t is 0 (the paper's t = 1).

    Other arguments as in `noise_prediction_loss`. The gradient goes to both outputs of the network.
    """
    abars = (1 - betas).cumprod(0)
    x_t = noisy_image(x_0, abars, t, eps)
    noise, v = network(x_t, t)
    log_variance = learned_log_variance(v, betas, t)
    before, beta_tilde = torch.cat([betas.new_ones(1), abars[:-1]]), posterior_variance(betas)
    tables = abars.sqrt(), (1 - abars).sqrt(), before.sqrt() * betas / (1 - abars), beta_tilde
    a, s, c1, beta_tilde = (table.to(x_0)[t][:, None, None, None] for table in tables)  # (B, 1, 1, 1)
    error = x_0 - (x_t - s * noise) / a  # of x_0-hat
    L = 0.5 * (log_variance - beta_tilde.log() - 1 + (beta_tilde + (c1 * error) ** 2) * (-log_variance).exp())
    first = (t == 0).nonzero()[:, 0]  # the decoder; the mean of p is x_0-hat there. A GPU waits at each use of a mask
    L[first] = -discretised_log_likelihood(x_0[first], (x_0 - error)[first], (0.5 * log_variance[first]).exp()).to(L)
    return L.mean(dim=(1, 2, 3)) / math.log(2)


def variational_term(network: Network, x_0: Tensor, betas: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """`bound_term` whose gradient goes to the variance only: the noise prediction is held fixed (Sec. 3.1)."""

    def held(x_t, t):
        noise, v = network(x_t, t)
        return noise.detach(), v

    return bound_term(held, x_0, betas, t, eps)


def hybrid_loss(network: Network, x_0: Tensor, betas: Tensor, t: Tensor, eps: Tensor, lambda_: float = 0.001) -> Tensor:
    """Eq. 16: L_simple + lambda L_vlb, (B,). L_vlb is the sum over all T terms, of which T L_t is the estimate."""
    abars = (1 - betas).cumprod(0)
    out = network(noisy_image(x_0, abars, t, eps), t)  # once, for both
    known = lambda x_t, t: out
    simple = noise_prediction_loss(known, x_0, abars, t, eps)
    return simple + lambda_ * len(betas) * variational_term(known, x_0, betas, t, eps)
