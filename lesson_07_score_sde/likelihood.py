"""The log-density of images, exact for the ODE of the network, up to the solver's steps and one random probe.

Along the ODE dx = v d ln sigma, the log-density of x changes by -div v: where the flow spreads, the density thins. So
that of an image is that of its latent, which is normal, plus the integral of div v on the way.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.noise import Noise, noise_like
from common.ode import runge_kutta_4


def probe_like(x: Tensor, generator: Noise = None) -> Tensor:
    """Signs, +1 or -1 with equal odds (Rademacher), shaped like x."""
    return torch.where(noise_like(x, generator) < 0, -1.0, 1.0)


def log_likelihood_terms(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    steps: int = 24,
    generator: Noise = None,
) -> tuple[Tensor, Tensor]:
    """The two terms of `log_likelihood`, in nats, (B,) each: log N(latent; 0, sigma_max^2), and the integral of div v.

    div v is the mean of e^T (dv/dx) e over random signs e (the Skilling-Hutchinson estimate, App. D.2). There is one e
    for each image, and the same for the whole way.
    """
    e, B, D = probe_like(x, generator), len(x), x[0].numel()

    def slope(y, log_sigma):  # y (B, D + 1): images, and the integral so far
        sigma = log_sigma.exp()
        with torch.enable_grad():
            image = y[:, :-1].reshape(x.shape).detach().requires_grad_()
            v = -(sigma**2) * score(image, sigma.expand(B)) + 0 * image  # even if it does not look at the image
            (gradient,) = torch.autograd.grad((v * e).sum(), image)  # e^T (dv/dx), one pass back
        return torch.cat([v.detach().flatten(1), (gradient * e).flatten(1).sum(1, keepdim=True)], dim=1)

    times = torch.linspace(math.log(sigma_min), math.log(sigma_max), steps + 1, device=x.device, dtype=x.dtype)
    y = runge_kutta_4(slope, torch.cat([x.flatten(1), x.new_zeros(B, 1)], dim=1), times)
    latent, divergence = y[:, :-1], y[:, -1]
    prior = -0.5 * (latent / sigma_max).square().sum(1) - 0.5 * D * math.log(2 * math.pi * sigma_max**2)
    return prior, divergence


def log_likelihood(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    steps: int = 24,
    generator: Noise = None,
) -> Tensor:
    """log p(x) in nats, (B,), of images x (B, C, H, W) in [0, 1], dequantised (Sec. 4.3, App. D.2).

    p is the density at noise scale sigma_min. No such density scores below log2(256 sigma_min sqrt(2 pi)) bits per
    dimension. sigma_max is where the latent is taken to be normal. 4 steps network calls, each with its way back; in
    float32.
    """
    prior, divergence = log_likelihood_terms(score, x, sigma_min, sigma_max, steps, generator)
    return prior + divergence


def dequantise(images: Tensor, generator: Noise = None) -> Tensor:
    """(255 x + u) / 256 for images x in [0, 1] of 256 gray levels, u uniform on [0, 1]: a density needs no gaps."""
    u = torch.special.ndtr(noise_like(images, generator))
    return (255 * images + u) / 256


def bits_per_dim(log_p: Tensor, dimension: int) -> Tensor:
    """Bits for each of D numbers of 256 levels, from the log-density of images in [0, 1], in nats: its negative in
    bits, and 8 more, since a level is 1/256 wide. A uniform density has exactly 8.
    """
    return -log_p / (dimension * math.log(2)) + 8
