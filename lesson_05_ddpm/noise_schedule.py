"""The forward process: T small steps, fixed beforehand, that turn an image into noise.

x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z. The steps are Gaussian, so t of them are one (Eq. 4):
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z, and the way back from x_t to x_{t-1} is Gaussian too, if x_0 is known.

Tables have T entries, float64; entry 0 is the paper's t = 1.
"""

import torch
from torch import Tensor


def linear_betas(T: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """DDPM's schedule (Sec. 4): T values from beta_1 to beta_T, both included, evenly spaced; (T,) float64.

    Raises ValueError for T < 1, and where a beta does not lie between 0 and 1.
    """
    if T < 1:
        raise ValueError(f"a schedule needs at least one step, not T = {T}")
    return checked(torch.linspace(beta_1, beta_T, T, dtype=torch.float64))


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
