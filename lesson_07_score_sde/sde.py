"""Three stochastic differential equations that turn images into noise: VE, VP and sub-VP (Sec. 3.4, App. B).

    dx = f(x, t) dt + g(t) dw,  t from 0 to 1.

Given the image x_0, x at time t is normal with mean m(t) x_0 and standard deviation std(t). So x / m is the image with
noise of scale std / m, whatever the SDE: all three are one family, and one network that knows the score for every noise
scale serves all of them. It is that of VE, where m = 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def per_image(numbers: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), to be multiplied with images."""
    return numbers[:, None, None, None]


class SDE:
    """What the three have in common. Times t (B,) lie in [0, 1]; results are (B,), or shaped like x (B, C, H, W)."""

    def noise_scale(self, t: Tensor) -> Tensor:
        """std / m: the scale of the noise on x / m, in the unit of pixels."""
        return self.std(t) / self.mean_factor(t)

    def score(self, ve_score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The score (x, t) of this SDE, from that of VE, ve_score (x, sigma), by change of variables.

        The density of x at t is that of x / m, over m^D. The gradient of its logarithm is ve_score(x / m, std / m) / m.
        """

        def score(x, t):
            m = per_image(self.mean_factor(t))
            return ve_score(x / m, self.noise_scale(t)) / m

        return score


class VE(SDE):
    """Variance exploding: the image stays, and noise of scale sigma_min (sigma_max / sigma_min)^t is added (Eq. 9)."""

    def __init__(self, sigma_min: float, sigma_max: float):
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"VE needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.log_ratio = math.log(sigma_max / sigma_min)

    def mean_factor(self, t: Tensor) -> Tensor:
        """m, by which the image is multiplied: 1."""
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise."""
        return self.sigma_min * torch.exp(self.log_ratio * t)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t) = 0."""
        return torch.zeros_like(x)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = std sqrt(2 ln(sigma_max / sigma_min)), since g^2 is the derivative of std^2."""
        return self.std(t) * math.sqrt(2 * self.log_ratio)

    def time(self, sigma: Tensor) -> Tensor:
        """t at which the noise scale is sigma."""
        return (sigma / self.sigma_min).log() / self.log_ratio


class VP(SDE):
    """Variance preserving: the image fades as noise is added, so that their variances add up to 1 (Eq. 11).

    It is the limit of DDPM's chain for many small steps. B(t) is the integral of beta(t) = beta_min + (beta_max -
    beta_min) t from 0 to t.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 < beta_min < beta_max < math.inf:
            raise ValueError(f"{type(self).__name__} needs 0 < beta_min < beta_max, not {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: Tensor) -> Tensor:
        """The rate at which the image fades."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def B(self, t: Tensor) -> Tensor:
        """The integral of beta up to t."""
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def mean_factor(self, t: Tensor) -> Tensor:
        """m = exp(-B/2)."""
        return torch.exp(-self.B(t) / 2)

    def std(self, t: Tensor) -> Tensor:
        """sqrt(1 - exp(-B))."""
        return torch.sqrt(-torch.expm1(-self.B(t)))

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t) = -beta x / 2."""
        return -per_image(self.beta(t)) / 2 * x

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = sqrt(beta)."""
        return self.beta(t).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """t at which the noise scale is sigma."""
        return self._time_of(torch.log1p(sigma**2))

    def _time_of(self, B):
        slope = self.beta_max - self.beta_min
        return 2 * B / (self.beta_min + (self.beta_min**2 + 2 * slope * B).sqrt())  # of the quadratic B(t)


class SubVP(VP):
    """As VP, with less noise at every t: its variance is the square of VP's (Eq. 12). The paper's best likelihoods."""

    def std(self, t: Tensor) -> Tensor:
        """1 - exp(-B)."""
        return -torch.expm1(-self.B(t))

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = sqrt(beta (1 - exp(-2B)))."""
        return (self.beta(t) * -torch.expm1(-2 * self.B(t))).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """t at which the noise scale, 2 sinh(B/2), is sigma."""
        return self._time_of(2 * torch.asinh(sigma / 2))
