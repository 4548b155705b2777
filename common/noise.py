"""The random numbers of sampling: every image has a stream of its own, so its seed alone decides what it becomes."""

import math

import torch
from torch import Tensor


class SeededNoise:
    """Called with x (N, C, H, W), returns standard normal noise of its shape and device, new at each call.

    Image k draws from the stream of seed + k: it gets the same numbers whatever N, the batch size and the device.
    """

    def __init__(self, seed: int, N: int):
        self.streams = [torch.Generator().manual_seed(seed + k) for k in range(N)]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in self.streams]).to(x.device)


class InterpolatedNoise:
    """Like SeededNoise, for N >= 2 images on the way from the image of seed a to the image of seed b, ends included.

    z_k = cos(t_k) z_a + sin(t_k) z_b with t_k from 0 to pi/2 (slerp), as for the interpolations of the NCSNv2 paper: a
    sum of two independent normal numbers with these weights is standard normal again, where their average would be too
    small. All the noise of sampling is mixed so, not only that of the start.
    """

    def __init__(self, a: int, b: int, N: int):
        self.ends = SeededNoise(a, 1), SeededNoise(b, 1)
        self.towards_b = torch.linspace(0, math.pi / 2, N).sin()[:, None, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        z_a, z_b = (end(x[:1].cpu()) for end in self.ends)  # (1, C, H, W)
        return (self.towards_b.flip(0) * z_a + self.towards_b * z_b).to(x.device)  # flip: the cosine, exactly 0 at b


class JoinedNoise:
    """Several such sources one after the other; the next images of x are the next source's. `sizes` are their N."""

    def __init__(self, sources: list, sizes: list[int]):
        self.sources, self.sizes = sources, sizes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([source(part) for source, part in zip(self.sources, x.split(self.sizes), strict=True)])
