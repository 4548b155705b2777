"""Denoising score matching: learn the score by predicting the noise that was added.

The score of a noisy picture x~ = x + sigma_i z, given the clean x, is -(x~ - x) / sigma_i^2 = -z / sigma_i. A network
that predicts it under squared error learns its mean over all clean x that could lie behind x~, and that mean is the
score of the noisy data (Vincent 2011). Weighting each scale by lambda(sigma) = sigma^2 makes all scales count alike.
"""

from collections.abc import Callable

from torch import Tensor


def denoising_score_matching_loss(
    score: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor, i: Tensor, z: Tensor
) -> Tensor:
    """Eq. 5 of NCSN weighted by lambda(sigma_i) = sigma_i^2 (Eq. 6): 1/2 ||sigma_i s(x + sigma_i z, i) + z||^2.

    score: any callable (x, i) -> the score, shaped like x. x (B, C, H, W) clean images; sigmas (L,) the scales;
    i (B,) long, which noise scale each image gets; z (B, C, H, W) standard normal noise.
    Returns (B,), one loss per image, summed over its D = C H W numbers: a score of zero gives D / 2 on average.
    """
    sigma_i = sigmas[i][:, None, None, None]  # (B, 1, 1, 1)
    s = score(x + sigma_i * z, i)  # (B, C, H, W)
    return 0.5 * (sigma_i * s + z).square().sum(dim=(1, 2, 3))  # (B,)
