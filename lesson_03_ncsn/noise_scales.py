"""The noise scales sigma_1 > sigma_2 > ... > sigma_L, from noise that hides much to noise nobody sees."""

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
