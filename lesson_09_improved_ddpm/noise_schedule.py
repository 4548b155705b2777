"""The forward process: T small steps, fixed beforehand, that turn an image into noise.

x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z. The steps are Gaussian, so t of them are one (Eq. 4):
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z, and the way back from x_t to x_{t-1} is Gaussian too, if x_0 is known.

Tables have T entries, float64; entry 0 is the paper's t = 1.

Changes from lesson 5: the cosine schedule, and schedules on some of the timesteps. Equations before 15 are DDPM's.
"""

import math

import torch
from torch import Tensor


def linear_betas(T: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """DDPM's schedule (Sec. 4): T values from beta_1 to beta_T, both included, evenly spaced; (T,) float64.

    Raises ValueError for T < 1, and where a beta does not lie between 0 and 1.
    """
    if T < 1:
        raise ValueError(f"a schedule needs at least one step, not T = {T}")
    return checked(torch.linspace(beta_1, beta_T, T, dtype=torch.float64))


def cosine_betas(T: int, s: float = 0.008) -> Tensor:
    """Eq. 17: abar_t falls as a squared cosine, nearly straight in the middle and flat at both ends; (T,) float64.

    The last beta, which would be 1, is cut to 0.999. Raises ValueError for T < 1.
    """
    if T < 1:
        raise ValueError(f"a schedule needs at least one step, not T = {T}")
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2  # (T + 1,), t from 0
    return checked((1 - f[1:] / f[:-1]).clamp(max=0.999))


def spaced_timesteps(T: int, K: int) -> Tensor:
    """K of the timesteps 0, ..., T - 1, evenly spaced, ascending, both ends included: (K,) long (Sec. 4).

    Raises ValueError unless 2 <= K <= T.
    """
    if not 2 <= K <= T:
        raise ValueError(f"of {T} timesteps between 2 and {T} can be kept, not {K}")
    return torch.linspace(0, T - 1, K, dtype=torch.float64).round().long()


def respaced_betas(betas: Tensor, timesteps: Tensor) -> Tensor:
    """The betas (K,) of a chain with only these timesteps (K,) long, ascending: with the same abar at each (Eq. 19)."""
    kept = torch.cat([betas.new_ones(1), alpha_bars(betas)[timesteps]])  # (K + 1,)
    return checked(1 - kept[1:] / kept[:-1])


def checked(betas: Tensor) -> Tensor:
    """betas (T,) float64; ValueError that names the first that does not lie between 0 and 1."""
    bad = ~((betas > 0) & (betas < 1))  # not `(betas <= 0) | ...`, which lets nan through
    if bad.any():
        t = int(bad.nonzero()[0])
        raise ValueError(f"beta_{t + 1} = {float(betas[t]):g} of T = {len(betas)} does not lie between 0 and 1")
    return betas.double()


def alpha_bars(betas: Tensor) -> Tensor:
    """abar_t = (1 - beta_1) ... (1 - beta_t): how much of the variance of x_t is the image's. (T,) float64."""
    return (1 - checked(betas)).cumprod(0)


def posterior(betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 6 and Eq. 7: q(x_{t-1} | x_t, x_0) is normal, of mean c1 x_0 + c2 x_t and variance beta_tilde.

    Returns c1, c2, beta_tilde, (T,) float64 each. At the paper's t = 1 they are 1, 0 and 0: x_0 is known.
    """
    abar = alpha_bars(betas)
    before = torch.cat([abar.new_ones(1), abar[:-1]])  # abar_{t-1}
    c1 = before.sqrt() * betas / (1 - abar)
    c2 = (1 - betas).sqrt() * (1 - before) / (1 - abar)
    c1[0] = 1.0  # 1 - abar_1 is beta_1, but for rounding
    return c1, c2, betas * (1 - before) / (1 - abar)
