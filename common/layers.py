"""Standard operations of a network, in forms that are fast on a CPU: same values, fewer passes over the pixels.

On a CPU the convolutions run near the machine's limit; what is between them decides how long a step takes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ELU(torch.autograd.Function):
    """On a CPU torch.nn.functional.elu computes one exponential at a time; this is several times faster there."""

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(max=0).exp_().sub_(1).add_(F.relu(x))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return torch.addcmul(gradient, gradient, y.clamp(max=0))  # the slope is 1 + min(y, 0)


class _Moments(torch.autograd.Function):
    """The means of x and of x^2 over the pixels; one pass over the pixels backwards instead of several."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.mean((2, 3), dtype=torch.float32), x.square().mean((2, 3), dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient_mean, gradient_square):
        (x,) = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        constant = (gradient_mean / pixels).to(x.dtype)[:, :, None, None]
        return torch.addcmul(constant, x, (2 * gradient_square / pixels).to(x.dtype)[:, :, None, None])


class _AveragePool5(torch.autograd.Function):
    """A symmetric filter with zeros around the image is its own transpose, so backwards is forwards."""

    @staticmethod
    def forward(ctx, x):
        return F.avg_pool2d(x, 5, stride=1, padding=2)

    backward = forward


def elu(x: Tensor) -> Tensor:
    """x where x > 0, exp(x) - 1 elsewhere; any shape."""
    return _ELU.apply(x) if x.device.type == "cpu" else F.elu(x)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel over its pixels: x (B, C, H, W) -> two (B, C), float32."""
    mean, mean_square = _Moments.apply(x)
    return mean, (mean_square - mean.square()).clamp(min=0)


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018): x (B, C, H, W), each group of channels standardised over its channels and pixels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        mean, variance = (m.unflatten(1, (self.num_groups, -1)) for m in channel_moments(x))  # (B, G, C / G)
        mu = mean.mean(2, keepdim=True)  # (B, G, 1), of the group
        variance = (variance + (mean - mu).square()).mean(2, keepdim=True)
        scale = self.weight * torch.rsqrt(variance + self.eps).expand_as(mean).flatten(1)  # (B, C)
        shift = self.bias - scale * mu.expand_as(mean).flatten(1)
        return torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, scale.to(x.dtype)[:, :, None, None])


def average_pool5(x: Tensor) -> Tensor:
    """5x5 average pooling with stride 1, which keeps the size: x (B, C, H, W) -> (B, C, H, W)."""
    return _AveragePool5.apply(x)


ACTIVATIONS = {"elu": elu, "relu": F.relu, "silu": F.silu}
