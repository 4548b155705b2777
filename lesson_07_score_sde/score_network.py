"""The score network: a 4-cascade RefineNet (Lin et al. 2017), conditioned on log sigma.

Changes from lesson 4: log sigma moves the weights of the norms; sigma scales x, and x / sigma comes in beside it.

Shapes: B images of C channels and H x W pixels; E numbers that embed log sigma.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.layers import ACTIVATIONS, average_pool5, channel_moments

E = 32  # numbers that embed log sigma


def log_sigma_embedding(sigma: Tensor) -> Tensor:
    """Sines and cosines (B, E) of log sigma times 1/4, ..., 16/4; sigma (B,) > 0 (ours; the paper's are random)."""
    angles = sigma.float().log()[:, None] * torch.arange(1, E // 2 + 1, device=sigma.device) / 4  # (B, E / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def conv3x3(c_in, c_out, dilation=1, bias=True):
    """A 3x3 convolution that keeps the size of the feature map."""
    return nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, bias=bias)


class InstanceNormPlusPlus(nn.Module):
    """InstanceNorm++ (NCSN, App. A): standardises channels over pixels, and adds their means, standardised too."""

    def __init__(self, channels, conditional):
        super().__init__()
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.alpha = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        if conditional:
            self.embed = nn.Linear(E, 3 * channels)
            nn.init.zeros_(self.embed.weight)  # sigma changes nothing until the layer has learned to look at it

    def forward(self, x, e):
        gamma, alpha, beta = self.gamma, self.alpha, self.beta  # (C,)
        if e is not None:  # (B, E), what embeds log sigma: the weights are functions of it
            gamma, alpha, beta = (w + change for w, change in zip((gamma, alpha, beta), self.embed(e).chunk(3, 1)))
        mu, variance = channel_moments(x)  # (B, C), float32
        m, v = mu.mean(1, keepdim=True), mu.var(1, keepdim=True)  # (B, 1)
        # gamma (x - mu) / s + beta + alpha (mu - m) / sqrt(v) as scale x + shift, one pass over the pixels
        scale = gamma * torch.rsqrt(variance + 1e-5)
        shift = beta + alpha * (mu - m) * torch.rsqrt(v + 1e-5) - scale * mu
        return torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, scale.to(x.dtype)[:, :, None, None])


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm(x)))))); `downsample` halves height and width, averaging 2x2 pixels."""

    def __init__(self, c_in, c_out, act, conditional, dilation=1, downsample=False, shortcut=None):
        super().__init__()
        self.act, self.downsample = act, downsample
        self.norm1 = InstanceNormPlusPlus(c_in, conditional)
        self.conv1 = conv3x3(c_in, c_in if downsample else c_out, dilation)
        self.norm2 = InstanceNormPlusPlus(self.conv1.out_channels, conditional)
        self.conv2 = conv3x3(self.conv1.out_channels, c_out, dilation)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x, e):
        h = self.conv1(self.act(self.norm1(x, e)))
        h = self.conv2(self.act(self.norm2(h, e)))
        if self.downsample:
            h, x = (F.avg_pool2d(t, 2, ceil_mode=True) for t in (h, x))
        return self.shortcut(x) + h


class ConvUnit(nn.Module):
    """conv(before(x)), the piece that the blocks of RefineNet are made of."""

    def __init__(self, c_in, c_out, before, bias=False):
        super().__init__()
        self.before = before
        self.conv = conv3x3(c_in, c_out, bias=bias)

    def forward(self, x):
        return self.conv(self.before(x))


class ResidualConvUnits(nn.Module):
    """RCU: n times x + unit(unit(x))."""

    def __init__(self, c, n, act):
        super().__init__()
        self.units = nn.ModuleList(nn.ModuleList(ConvUnit(c, c, act) for _ in range(2)) for _ in range(n))

    def forward(self, x):
        for unit1, unit2 in self.units:
            x = x + unit2(unit1(x))
        return x


class ChainedResidualPooling(nn.Module):
    """CRP: act(x) plus a chain of 5x5 average pooling and convolution, which sees far at little cost."""

    def __init__(self, channels, act):
        super().__init__()
        self.act = act
        self.units = nn.ModuleList(ConvUnit(channels, channels, average_pool5) for _ in range(2))

    def forward(self, x):
        x = path = self.act(x)
        for unit in self.units:
            path = unit(path)
            x = x + path
        return x


class RefineBlock(nn.Module):
    """One cascade of RefineNet: adapts each input, fuses them at the size of the first, pools, adapts the result."""

    def __init__(self, c_ins, c_out, act, blocks, blocks_out=1):
        super().__init__()
        self.adapt = nn.ModuleList(ResidualConvUnits(c, blocks, act) for c in c_ins)
        self.fuse = nn.ModuleList(ConvUnit(c, c_out, nn.Identity(), bias=True) for c in c_ins if len(c_ins) > 1)
        self.pool = ChainedResidualPooling(c_out, act)
        self.output = ResidualConvUnits(c_out, blocks_out, act)

    def forward(self, inputs):
        hs = [adapt(x) for adapt, x in zip(self.adapt, inputs, strict=True)]
        if self.fuse:
            hs = [fuse(h) for fuse, h in zip(self.fuse, hs, strict=True)]
            hs = [F.interpolate(h, hs[0].shape[2:], mode="bilinear", align_corners=True) for h in hs]
        return self.output(self.pool(sum(hs)))


class ScoreNetwork(nn.Module):
    """Estimates the score of the data under Gaussian noise of scale sigma, for every sigma up to sigma_max at once.

    Conditioned on log sigma (App. H), with sigma^2 + 0.1 for the mean square; if not, lesson 4's network, weights too.
    Images have `channels` channels, and an even height and width from 16 to 64. The other arguments trade quality for
    time; their defaults are NCSN's network for MNIST.
    width: feature channels at full size; after the only downsampling there are twice as many.
    patch: 2 runs on blocks of 2x2 pixels, each with its numbers stacked as channels; a quarter of the work. 1 or 2.
    blocks: residual blocks in each stage, and residual units that adapt each input of a refine block.
    activation: a name in common.layers.ACTIVATIONS.
    skip: the layers see c x, with c = 1 / sqrt(0.2 + mean square), and c (h - x) takes the place of their output h. For
    strong noise (in lesson 3, of scale 1) the right h is nearly the clean image; for weak noise c is about 2.
    """

    def __init__(
        self, channels=1, width=64, patch=1, blocks=2, activation="elu", skip=False, conditional=True, sigma_max=1
    ):
        super().__init__()
        act, W, W2 = ACTIVATIONS[activation], width, 2 * width
        block = partial(ResidualBlock, act=act, conditional=conditional)
        refine = partial(RefineBlock, act=act, blocks=blocks)
        self.register_buffer("sigma_max", torch.tensor(float(sigma_max)))
        self.patch, self.act, self.skip, self.conditional = patch, act, skip, conditional
        self.first = conv3x3((1 + conditional) * channels * patch**2, W)
        self.stages = nn.ModuleList(  # feature maps of a 28-pixel image, patch 1:
            nn.ModuleList([first, *(block(c, c, dilation=dilation) for _ in range(blocks - 1))])
            for first, c, dilation in (
                (block(W, W), W, 1),  # (B, W, 28, 28)
                (block(W, W2, downsample=True, shortcut=nn.Conv2d(W, W2, 1)), W2, 1),  # (B, 2W, 14, 14)
                (block(W2, W2, dilation=2, shortcut=conv3x3(W2, W2, 2)), W2, 2),  # (B, 2W, 14, 14)
                (block(W2, W2, dilation=4, shortcut=conv3x3(W2, W2, 4)), W2, 4),  # (B, 2W, 14, 14)
            )
        )
        self.cascade = nn.ModuleList([
            refine([W2], W2),  # (B, 2W, 14, 14), from the fourth stage
            refine([W2, W2], W2),  # (B, 2W, 14, 14), from the third stage and the result above
            refine([W2, W2], W),  # (B, W, 14, 14)
            refine([W, W], W, blocks_out=blocks + 1),  # (B, W, 28, 28)
        ])  # fmt: skip
        self.norm = InstanceNormPlusPlus(W, conditional)
        self.last = conv3x3(W, channels * patch**2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B, C, H, W) noisy images, sigma (B,) their noise scales; returns the score (B, C, H, W), float32."""
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"the network takes images of even height and width, not {tuple(x.shape[2:])}")
        scale = sigma.to(x)[:, None, None, None]
        e = log_sigma_embedding(sigma) if self.conditional else None  # (B, E)
        magnified = (x / scale).clamp(-4, 4) / 4  # black pixels have their noise at full size, however weak it is
        if self.skip:
            mean_square = scale**2 + 0.1 if self.conditional else x.square().mean(dim=(1, 2, 3), keepdim=True)
            c = torch.rsqrt(0.2 + mean_square)  # (B, 1, 1, 1)
            x = c * x
        h = torch.cat([x, magnified], dim=1) if self.conditional else x
        h = rearrange(h, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.first(h.contiguous(memory_format=torch.channels_last))
        stages = []
        for blocks in self.stages:
            for block in blocks:
                h = block(h, e)
            stages.append(h)
        h = self.cascade[0]([stages.pop()])
        for refine in self.cascade[1:]:
            h = refine([stages.pop(), h])
        h = self.last(self.act(self.norm(h, e)))
        h = rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch).float()
        return (c * h - x if self.skip else h) / scale  # Technique 3
