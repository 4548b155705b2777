"""The noise network: the U-Net of lesson 5, conditioned on t in every block.

Changes from lesson 5: there is a second output, v; t can scale and shift the second norm of a block.

Shapes: B images of C channels and H x W pixels; E numbers that embed t.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.layers import GroupNorm

GROUPS = 32  # of channels that GroupNorm standardises together, where there are so many channels


def timestep_embedding(t: Tensor, dimension: int) -> Tensor:
    """The Transformer's embedding of t (B,): sines, then cosines, of t times 10000^(-k/(half - 1)); (B, dimension)."""
    half = (dimension + 1) // 2  # of an odd dimension, the last cosine is left out
    frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dimension]


def conv3x3(c_in, c_out, stride=1):
    """A 3x3 convolution; with stride 2 it halves height and width."""
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)


def norm(channels):
    """GroupNorm, in fewer groups where the channels are few."""
    return GroupNorm(math.gcd(GROUPS, channels // 4 or 1, channels), channels)


def zero(layer):
    """The layer with weights of zero, so that what it is added to passes unchanged at the start."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(dropout(act(norm(conv(act(norm(x))) + embedding)))); x (B, c_in, H, W), e (B, E).

    With scale_shift it is norm(h) (1 + w) + b in place of norm(h + embedding), w and b from the embedding (App. A).
    """

    def __init__(self, c_in, c_out, embedding, dropout, scale_shift):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv3x3(c_in, c_out)
        self.scale_shift = scale_shift
        self.embed = nn.Linear(embedding, 2 * c_out if scale_shift else c_out)
        self.norm2, self.dropout, self.conv2 = norm(c_out), nn.Dropout(dropout), zero(conv3x3(c_out, c_out))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        e = self.embed(e)[:, :, None, None]
        if self.scale_shift:
            w, b = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + w) + b
        else:
            h = self.norm2(h + e)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(x) + h


class SelfAttention(nn.Module):
    """x + out(attention(norm(x))): each pixel takes a mean over all pixels, weighted by how well they match."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b (h w) c", three=3)
        weights = (q @ k.mT / math.sqrt(x.shape[1])).softmax(dim=2)  # (B, H W, H W)
        h = rearrange(weights @ v, "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.out(h.contiguous(memory_format=torch.channels_last))


class Level(nn.Module):
    """A residual block and, at the resolution that has it, self-attention."""

    def __init__(self, c_in, c_out, embedding, dropout, scale_shift, attention):
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, embedding, dropout, scale_shift)
        self.attention = SelfAttention(c_out) if attention else nn.Identity()

    def forward(self, x, e):
        return self.attention(self.block(x, e))


class NoiseNetwork(nn.Module):
    """Predicts the noise eps in x_t, for every t at once, and v, which says how large the variance of a step back is.

    Images have `channels` channels. The other arguments trade quality for time; their defaults are DDPM's network for
    CIFAR-10 (App. B, authors' code) without dropout. width: feature channels at full size; twice as many at each lower
    resolution. levels: how many resolutions, each half of the one before. blocks: residual blocks at each on the way
    down, one more on the way up.
    patch: 2 runs on blocks of 2x2 pixels, each with its numbers stacked as channels; a quarter of the work. 1 or 2.
    dropout: share of numbers that each residual block sets to zero in training. scale_shift: how t comes in.
    """

    def __init__(self, channels=1, width=128, levels=4, blocks=2, patch=1, dropout=0.0, scale_shift=True):
        super().__init__()
        E = 4 * width
        part = partial(Level, embedding=E, dropout=dropout, scale_shift=scale_shift)
        widths = [width] + [2 * width] * (levels - 1)
        self.patch, self.width = patch, width
        self.embedding = nn.Sequential(nn.Linear(width, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.first = conv3x3(channels * patch**2, width)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [width]
        for n, c in enumerate(widths):  # feature maps of a 28-pixel image, patch 1: 28, 14, 7
            if n > 0:
                self.down.append(conv3x3(widths[n - 1], widths[n - 1], stride=2))
                skips.append(widths[n - 1])
            for _ in range(blocks):
                self.down.append(part(skips[-1], c, attention=n == 1))
                skips.append(c)
        self.middle = nn.ModuleList([part(c, c, attention=True), part(c, c, attention=False)])
        for n, c in reversed(list(enumerate(widths))):
            below = widths[min(n + 1, levels - 1)]
            for k in range(blocks + 1):
                self.up.append(part((c if k else below) + skips.pop(), c, attention=n == 1))
            if n > 0:
                self.up.append(conv3x3(c, c))
        self.norm = norm(width)
        self.last = zero(conv3x3(width, 2 * channels * patch**2))

    def forward(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (B, C, H, W) noisy images, t (B,) long, 0 for the paper's t = 1; returns eps and v, shaped like x_t,
        float32. v is not squashed: 0 stands for beta_tilde, 1 for beta (Eq. 15).
        """
        e = self.embedding(timestep_embedding(t, self.width))  # (B, E)
        h = rearrange(x_t, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.first(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, Level) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, e)
        for layer in self.up:
            if isinstance(layer, Level):
                h = layer(torch.cat([h, skips.pop()], dim=1), e)
            else:
                h = layer(F.interpolate(h, skips[-1].shape[2:]))  # the nearest pixel
        h = self.last(F.silu(self.norm(h)))
        eps, out = rearrange(h, "b (two c p q) h w -> two b c (h p) (w q)", two=2, p=self.patch, q=self.patch).float()
        return eps, (out + 1) / 2
