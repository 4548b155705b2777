"""The nearest training image: are samples copies of what the network was trained on?"""

import torch
from torch import Tensor


def nearest_training_digit(images: Tensor, train_images: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance in pixels (N,) to, and index (N,) of, the nearest of train_images; both (., C, H, W), [0, 1].

    Exact: an image that is in train_images is at distance 0. A small distance for most samples means memorisation.
    """
    x, parts = images.flatten(1).double(), train_images.split(4096)  # (N, D)
    nearest = [torch.cdist(x, part.flatten(1).double()).min(dim=1) for part in parts]
    part = torch.stack([found.values for found in nearest]).argmin(dim=0)  # (N,)
    index = torch.stack([found.indices for found in nearest]).gather(0, part[None])[0] + 4096 * part
    return (images - train_images[index]).flatten(1).norm(dim=1), index  # the difference itself: no cancellation
