"""Random numbers: one function for training and sampling, and streams that make a sample depend on its seed alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Where samples get their noise: image k has a stream of its own, with the k-th of N `seeds`.

    So it gets the same numbers whatever N, the batch size and the device. With N more seeds, `towards`, and t (N,) from
    0 to 1, all noise of image k is between that of seeds[k] and that of towards[k]: z = cos(a) z_1 + sin(a) z_2 with
    a = t pi / 2 (slerp), as in the interpolations of the NCSNv2 paper. A sum of two independent normal numbers with
    these weights is standard normal again; their average would be too small.
    """

    def __init__(self, seeds: Sequence[int], towards: Sequence[int] = (), t: Tensor | None = None):
        self.streams, self.others = ([torch.Generator().manual_seed(s) for s in each] for each in (seeds, towards))
        self.angle = None if t is None else (t * math.pi / 2)[:, None, None, None]

    def like(self, x: Tensor) -> Tensor:
        """Standard normal noise, shaped like x (N, C, H, W); new at each call."""
        z = torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in self.streams])
        if self.others:
            other = torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in self.others])
            z = self.angle.cos() * z + self.angle.sin() * other
        return z.to(x.device)


Noise = torch.Generator | SeededNoise | None  # where random numbers come from; None: torch's own random numbers


def noise_like(x: Tensor, generator: Noise = None) -> Tensor:
    """Standard normal noise shaped like x, on its device."""
    if isinstance(generator, SeededNoise):
        return generator.like(x)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device).to(x.device)
