"""Adam, as in the papers, or Muon, which learns more from the same number of images."""

import torch
from torch import Tensor, nn
from torch.optim.adam import adam  # the function; the class would load PyTorch's compiler first, for 1 to 3 seconds

from common import ranks
from common.machine import CLEARLY, bfloat16_speedup

MOMENTUM = 0.95
WEIGHT_DECAY = 0.5  # times the learning rate; without it the weights grow until a network without norms blows up


class Optimizer:
    """Adam for all parameters of a network, or, as "muon", Muon for its convolutions and Adam for the rest.

    Muon (Jordan et al. 2024, github.com/KellerJordan/Muon) makes each update of a weight matrix orthogonal, so that
    all directions of the matrix learn equally fast, not only the few that dominate the gradient. The weights of a
    convolution, (C_out, C_in, 3, 3), are a matrix of C_out rows. PyTorch has a Muon too, which always computes in
    bfloat16, one matrix at a time; this one takes all matrices of a shape at once, in the faster of two precisions.
    """

    def __init__(self, network: nn.Module, name: str):
        kernels = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)] if name == "muon" else []
        kernels = [w for w in kernels if min(w.shape[:2]) > 4]  # not those from and to pixels: too narrow
        self.groups = {}  # {shape: weights}
        for w in kernels:
            self.groups.setdefault(w.shape, []).append(w)
        self.rest = [p for p in network.parameters() if all(p is not w for w in kernels)]
        device = self.rest[0].device
        self.fused = device.type != "mps"
        self.state = {  # {name: tensors}
            "momentum": [torch.zeros(len(ws), *ws[0].flatten(1).shape, device=device) for ws in self.groups.values()],
            "mean": [torch.zeros_like(p) for p in self.rest],
            "mean square": [torch.zeros_like(p) for p in self.rest],
            "steps": [torch.zeros((), device=device if self.fused else "cpu") for _ in self.rest],
        }
        fast = ranks.agreed(name == "muon" and bfloat16_speedup(device) > CLEARLY)  # the same update in all processes
        self.dtype = torch.bfloat16 if fast else torch.float32

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Takes a step with the gradients of the network's parameters, and clears them."""
        for weights, momentum in zip(self.groups.values(), self.state["momentum"], strict=True):
            gradient = torch.stack([w.grad for w in weights]).flatten(2)  # (n, C_out, C_in h w)
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM).to(self.dtype))  # Nesterov's momentum
            size = 0.2 * max(update.shape[1:]) ** 0.5  # as large as Adam's, so that both can share a learning rate
            for w, u in zip(weights, update, strict=True):
                w.mul_(1 - learning_rate * WEIGHT_DECAY).sub_(u.reshape(w.shape), alpha=learning_rate * size)
                w.grad = None
        mean, square, steps = (self.state[name] for name in ("mean", "mean square", "steps"))
        adam(self.rest, [p.grad for p in self.rest], mean, square, [], steps, fused=self.fused, amsgrad=False,
             beta1=0.9, beta2=0.999, lr=learning_rate, weight_decay=0, eps=1e-8, maximize=False)  # fmt: skip
        for p in self.rest:
            p.grad = None

    def state_dict(self) -> dict:
        """What a checkpoint holds of the optimiser."""
        return self.state

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned. ValueError if it is of other weights."""
        for name, tensors in self.state.items():
            for mine, saved in zip(tensors, state[name], strict=True):
                if mine.shape != saved.shape:
                    raise ValueError(f"{name} of {tuple(saved.shape)} in place of {tuple(mine.shape)}")
                mine.copy_(saved)


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of each matrix x = U S V^T, x (n, rows, columns): five Newton-Schulz steps (Jordan et al. 2024).

    Singular values above a hundredth of the norm come to lie near 1, from 0.68 to 1.14, which does as well in an
    update; much smaller ones only grow.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        y = x @ x.mT
        y = torch.baddbmm(y, y, y, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, y, x, beta=3.4445)
    return x
