"""Ancestral sampling: run the forward process backwards, one step for each t.

Changes from lesson 4: no step size and no number of steps is left to choose. The betas that were fixed beforehand say
how far each step goes, and how much fresh noise it adds. `ddim_sampling` is a later sampler with fewer network calls.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.noise import Noise, noise_like

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> eps, shaped like x_t


def clean_image(x_t: Tensor, abar: Tensor, eps: Tensor, clip: bool) -> Tensor:
    """x_0-hat, the mean of the clean image given x_t (B, C, H, W) and its noise: DDPM's Eq. 15. abar is alpha bar at t.

    clip: cut to [-1, 1], where images are. An error of eps counts sqrt(1 - abar) / sqrt(abar) times: with linear betas,
    157 at t = T.
    """
    x_0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    return x_0.clamp(-1, 1) if clip else x_0


@torch.no_grad()
def ancestral_sampling(
    network: Network, x: Tensor, betas: Tensor, variance: str = "small", clip: bool = True, generator: Noise = None
) -> Iterator[Tensor]:
    """Algorithm 2. x (B, C, H, W), the paper's x_T, is standard normal; yields x_{T-1}, ..., x_0 for T network calls.

    betas (T,). variance of the fresh noise: "small" is beta_tilde, exact if the data are one point; "large" is beta,
    exact if they are standard normal (Sec. 3.2). The last step adds none. A step goes to the mean of
    q(x_{t-1} | x_t, x_0-hat); without the clip, it is (x_t - beta_t eps / sqrt(1 - abar_t)) / sqrt(1 - beta_t), line 4.
    """
    if variance not in ("small", "large"):
        raise ValueError(f'variance is "small" or "large", not {variance!r}')
    abars = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])  # (T + 1,), with abar_0 = 1 for the image itself
    for n in reversed(range(len(betas))):
        beta, abar, before = betas[n], abars[n + 1], abars[n]
        x_0 = clean_image(x, abar, network(x, torch.full((len(x),), n, device=x.device)), clip)
        x = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - abar)  # Eq. 7
        if n > 0:
            sigma = (beta * (1 - before) / (1 - abar) if variance == "small" else beta).sqrt()
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
        x_0 = clean_image(x, abar, network(x, timesteps[k].to(x.device).expand(len(x))), clip)
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
        x_0 = clean_image(x, abar, network(x, timesteps[k].to(x.device).expand(len(x))), clip)
        x = ddim_step(x, x_0, abar, before, 1.0, generator)
        noisy_y = before.sqrt() * y + (1 - before).sqrt() * noise_like(y, generator)
        x = noisy_y * known + x * (1 - known)
        yield x
