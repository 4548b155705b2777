"""Ancestral sampling: run the forward process backwards, one step for each t, or for some of them.

Changes from lesson 5: the fresh noise has the learned variance; a chain may have some of the timesteps only.
Equations before 15 are DDPM's.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.noise import Noise, noise_like

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x_t, t) -> eps and v, shaped like x_t


def clean_image(x_t: Tensor, abar: Tensor, eps: Tensor, clip: bool) -> Tensor:
    """x_0-hat, the mean of the clean image given x_t (B, C, H, W) and its noise: DDPM's Eq. 15. abar is alpha bar at t.

    clip: cut to [-1, 1], where images are. An error of eps counts sqrt(1 - abar) / sqrt(abar) times: with linear betas,
    157 at t = T, and with cosine betas 20 000.
    """
    x_0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    return x_0.clamp(-1, 1) if clip else x_0


@torch.no_grad()
def ancestral_sampling(
    network: Network,
    x: Tensor,
    betas: Tensor,
    timesteps: Tensor,
    clip: bool = True,
    generator: Noise = None,
    variance: str = "learned",
) -> Iterator[Tensor]:
    """Algorithm 2 of DDPM on K of the timesteps. x (B, C, H, W) is standard normal; yields x after each of K steps.

    betas (K,) are those of the chain with the kept timesteps only (noise_schedule.py::respaced_betas); timesteps (K,)
    long, ascending, are what the network is told. variance of the fresh noise: "small" is beta_tilde, "large" is beta,
    "learned" is between them, or beyond, as the network's v says (Eq. 15). The last step adds none.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f'variance is "small", "large" or "learned", not {variance!r}')
    abars = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])  # (K + 1,), with abar_0 = 1 for the image itself
    for n in reversed(range(len(betas))):
        beta, abar, before = betas[n], abars[n + 1], abars[n]
        eps, v = network(x, timesteps[n].to(x.device).expand(len(x)))
        x_0 = clean_image(x, abar, eps, clip)
        x = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - abar)  # Eq. 7
        if n > 0:
            beta_tilde = beta * (1 - before) / (1 - abar)
            share = {"small": torch.zeros_like(v), "large": torch.ones_like(v), "learned": v}[variance]
            sigma = (0.5 * (share * beta.log() + (1 - share) * beta_tilde.log())).exp()
            x = x + sigma * noise_like(x, generator)
        yield x


@torch.no_grad()
def ddim_sampling(
    network: Network,
    x: Tensor,
    alpha_bars: Tensor,
    timesteps: Tensor,
    eta: float = 0.0,
    clip: bool = True,
    generator: Noise = None,
) -> Iterator[Tensor]:
    """Denoising diffusion implicit models (Song et al. 2021, arXiv 2010.02502, Eq. 12): not in DDPM's paper.

    Jumps from each of the K timesteps (ascending) to the one before: K network calls. x_t is x_0-hat and eps-hat, mixed
    as sqrt(abar_t) and sqrt(1 - abar_t); the next x is the same two, mixed for the next t. With eta = 0 no noise is
    fresh: the start decides all. With eta = 1 beta_tilde says how much of eps-hat fresh noise replaces, and with all T
    timesteps that is Algorithm 2. x (B, C, H, W) standard normal; alpha_bars (T,).
    """
    abars = torch.cat([alpha_bars.new_ones(1), alpha_bars[timesteps]])  # (K + 1,): the last step goes to the image
    for k in reversed(range(len(timesteps))):
        abar, before = abars[k + 1], abars[k]
        x_0 = clean_image(x, abar, network(x, timesteps[k].to(x.device).expand(len(x)))[0], clip)
        x = ddim_step(x, x_0, abar, before, eta, generator)
        yield x


def ddim_step(x: Tensor, x_0: Tensor, abar: Tensor, before: Tensor, eta: float, generator: Noise) -> Tensor:
    """From x at abar to the next x at `before`, with x_0-hat; `ddim_sampling` says what eta is."""
    eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()  # what is not image is noise; the clip may have changed it
    sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
    x = before.sqrt() * x_0 + (1 - before - sigma**2).clamp(min=0).sqrt() * eps
    return x + sigma * noise_like(x, generator) if eta > 0 else x


@torch.no_grad()
def inpaint(
    network: Network, y: Tensor, known: Tensor, x: Tensor, alpha_bars: Tensor, timesteps: Tensor, clip: bool = True,
    generator: Noise = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Fills in a picture by replacement: after each step, the known pixels are y's, with the noise of that t.

    As Algorithm 2 of lessons 3 and 4; not in the DDPM paper. y (B, C, H, W); known (1, 1, H, W) is 1 where a pixel of y
    is known. The rest is `ddim_sampling` with eta = 1.
    """
    abars = torch.cat([alpha_bars.new_ones(1), alpha_bars[timesteps]])
    for k in reversed(range(len(timesteps))):
        abar, before = abars[k + 1], abars[k]
        x_0 = clean_image(x, abar, network(x, timesteps[k].to(x.device).expand(len(x)))[0], clip)
        x = ddim_step(x, x_0, abar, before, 1.0, generator)
        noisy_y = before.sqrt() * y + (1 - before).sqrt() * noise_like(y, generator)
        x = noisy_y * known + x * (1 - known)
        yield x
