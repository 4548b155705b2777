"""Denoising score matching: learn the score by predicting the noise that was added.

The score of a noisy picture x~ = x + sigma z, given the clean x, is -(x~ - x) / sigma^2 = -z / sigma. A network
that predicts it under squared error learns its mean over all clean x that could lie behind x~, and that mean is the
score of the noisy data (Vincent 2011). Weighting each scale by lambda(sigma) = sigma^2 makes all scales count alike.

Changes from lesson 4: sigma is any number in a range, not one of L; it is its own label.
"""

from collections.abc import Callable

from torch import Tensor


def denoising_score_matching_loss(
    score: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, z: Tensor
) -> Tensor:
    """Eq. 7, for VE, with lambda = sigma^2: 1/2 ||sigma s(x + sigma z, sigma) + z||^2.

    score: any callable (x, sigma) -> the score, shaped like x. x (B, C, H, W) clean images; sigma (B,), the noise scale
    of each image; z (B, C, H, W) standard normal noise.
    Returns (B,), one loss per image, summed over its D = C H W numbers: a score of zero gives D / 2 on average.
    """
    scale = sigma[:, None, None, None]  # (B, 1, 1, 1)
    s = score(x + scale * z, sigma)  # (B, C, H, W)
    return 0.5 * (scale * s + z).square().sum(dim=(1, 2, 3))  # (B,)
