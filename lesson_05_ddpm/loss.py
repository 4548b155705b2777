"""The loss of Algorithm 1: predict the noise in a noisy image.

Changes from lesson 4: the image shrinks as the noise comes, so that the variance stays; the network predicts the noise
itself, which is the score times -sqrt(1 - abar_t); the loss is a mean over the pixels, without the factor 1/2.
"""

from collections.abc import Callable

from torch import Tensor


def noisy_image(x_0: Tensor, alpha_bars: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Eq. 4). Shapes as in `noise_prediction_loss`."""
    tables = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()  # (T,), cast only now
    a, s = (table.to(x_0)[t][:, None, None, None] for table in tables)  # (B, 1, 1, 1)
    return a * x_0 + s * eps


def noise_prediction_loss(
    network: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, alpha_bars: Tensor, t: Tensor, eps: Tensor
) -> Tensor:
    """L_simple (Eq. 14): the mean over the pixels of (eps - eps_theta(x_t, t))^2.

    network: any callable (x_t, t) -> the noise, shaped like x_t. x_0 (B, C, H, W) clean images in [-1, 1];
    alpha_bars (T,); t (B,) long, which step each image gets, 0 for the paper's t = 1; eps (B, C, H, W) standard normal.
    Returns (B,): about 1 for a network that predicts zero.
    """
    return (eps - network(noisy_image(x_0, alpha_bars, t, eps), t)).square().mean(dim=(1, 2, 3))
