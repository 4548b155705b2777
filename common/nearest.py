"""The nearest training image: are samples copies of what the network was trained on?"""

import torch
from torch import Tensor


def nearest_training_digit(images: Tensor, train_images: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance in pixels (N,) to, and index (N,) of, the nearest of train_images; both (., C, H, W), [0, 1].

    Exact: an image that is in train_images is at distance 0. A small distance for most samples means memorisation.
    """
    x = images.flatten(1).double()  # (N, D)
    best, index = torch.full_like(x[:, 0], torch.inf), torch.zeros_like(x[:, 0], dtype=torch.long)
    for start in range(0, len(train_images), 4096):
        y = train_images[start : start + 4096].flatten(1).double()
        squared, nearest = (y.square().sum(1) - 2 * x @ y.T).min(dim=1)  # |x - y|^2 - |x|^2
        index = torch.where(squared < best, start + nearest, index)
        best = torch.minimum(squared, best)
    return (images - train_images[index]).flatten(1).norm(dim=1), index  # the difference itself: no cancellation
