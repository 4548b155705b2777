"""The noise scales sigma_1 > sigma_2 > ... > sigma_L, from noise that hides everything to noise nobody sees.

Changes from lesson 3, where the three numbers sigma_1, sigma_L and L were given: they are computed from the data.
- Technique 1, `largest_pairwise_distance`: sigma_1;
- Technique 2, `noise_scale_ratio` and `number_of_noise_scales`: gamma and L.
"""

import math

import torch
from torch import Tensor


def geometric_noise_scales(sigma_1: float, sigma_L: float, L: int) -> Tensor:
    """The noise scales: (L,) float32, descending, with the same ratio between neighbours (Sec. 5 of NCSN).

    sigma_1 > sigma_L > 0 in the unit of pixel values, which run from 0 to 1; L >= 2. ValueError otherwise.
    """
    if not (sigma_1 > sigma_L > 0 and math.isfinite(sigma_1) and L >= 2):
        raise ValueError(f"noise scales need sigma_1 > sigma_L > 0 and L >= 2, not {sigma_1}, {sigma_L} and {L}")
    return torch.linspace(math.log(sigma_1), math.log(sigma_L), L, dtype=torch.float64).exp().float()


def largest_pairwise_distance(images: Tensor) -> float:
    """Technique 1: the largest Euclidean distance between two images, so that noise of scale sigma_1 joins any two.

    images (N, C, H, W), N >= 1 (ValueError otherwise); 0 for one image. Exact for any input. It is fast because
    for vectors without negative entries |x - y|^2 <= |x|^2 + |y|^2: with images in descending order of their norm,
    a short way down the list no pair can be farther apart than the best one found, and the rest is never compared.
    """
    if len(images) == 0:
        raise ValueError("the largest pairwise distance needs at least one image")
    x = images.flatten(1)  # (N, D)
    low = x.amin(0).float()  # subtracted, it leaves the distances as they are, and no entry is negative
    square_norms = torch.cat([(part - low).square().sum(1) for part in x.split(4096)])  # (N,)
    square_norms, order = square_norms.sort(descending=True)
    best, pair, rows = -1.0, (0, 0), 256
    for start in range(0, len(x), rows):
        end = int((square_norms[start] + square_norms > best).sum())  # only these can be far enough from this block
        if end <= start:
            break
        a = x[order[start : start + rows]] - low
        for first in range(start, end, 4096):
            others = slice(first, min(first + 4096, end))
            b = x[order[others]] - low
            square = square_norms[start : start + rows, None] + square_norms[None, others] - 2 * a @ b.T
            if square.max() > best:
                best = square.max().item()
                row, column = divmod(square.argmax().item(), len(b))
                pair = order[start + row], order[first + column]
    a, b = (x[k].cpu().double() for k in pair)
    return (a - b).norm().item()  # without the rounding of the matrix product


def noise_scale_ratio(dimension: int, overlap: float = 0.5) -> float:
    """Technique 2: the ratio gamma = sigma_{i-1} / sigma_i > 1 at which neighbouring scales overlap by `overlap`.

    In D = `dimension` dimensions noise of scale sigma lies in a thin shell: its length is sigma sqrt(D), give or take
    sigma / sqrt(2). gamma solves Eq. 4 of NCSNv2, where Phi is the standard normal distribution function:
    Phi(sqrt(2D) (gamma - 1) + 3 gamma) - Phi(sqrt(2D) (gamma - 1) - 3 gamma) = overlap.
    D >= 5, since in fewer dimensions all shells overlap, and 0 < overlap < 0.99; ValueError otherwise.
    """
    if not (dimension >= 5 and 0 < overlap < 0.99):
        raise ValueError(f"Technique 2 needs dimension >= 5 and 0 < overlap < 0.99, not {dimension} and {overlap}")

    def Phi(t):
        return 0.5 * math.erfc(-t / math.sqrt(2))

    def overlap_at(gamma):
        middle = math.sqrt(2 * dimension) * (gamma - 1)
        return Phi(middle + 3 * gamma) - Phi(middle - 3 * gamma)

    low, high = 1.0, 2.0
    while overlap_at(high) > overlap:
        low, high = high, 2 * high
    for _ in range(100):  # bisection: below 0.99 the overlap falls as gamma grows
        gamma = (low + high) / 2
        low, high = (gamma, high) if overlap_at(gamma) > overlap else (low, gamma)
    return gamma


def number_of_noise_scales(sigma_1: float, sigma_L: float, gamma: float) -> int:
    """Technique 2: the smallest L, at least 2, of scales from sigma_1 to sigma_L whose ratio is not above gamma.

    sigma_1 > sigma_L > 0 and gamma > 1; ValueError otherwise.
    """
    if not (sigma_1 > sigma_L > 0 and gamma > 1):
        raise ValueError(f"noise scales need sigma_1 > sigma_L > 0 and gamma > 1, not {sigma_1}, {sigma_L} and {gamma}")
    return max(2, 1 + math.ceil(math.log(sigma_1 / sigma_L) / math.log(gamma) - 1e-9))
