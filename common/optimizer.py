"""Adam, as in the papers, or Muon, which learns more from the same number of images."""

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adam", "muon")


class Optimizer:
    """Adam for all parameters of a network, or, as "muon", Muon for its convolutions and Adam for the rest.

    Muon (Jordan et al. 2024, github.com/KellerJordan/Muon) makes each update of a weight matrix orthogonal, so that
    all directions of the matrix learn equally fast, not only the few that dominate the gradient. PyTorch's takes
    matrices only: it is given the weights of a convolution, (C_out, C_in, 3, 3), as (C_out, 9 C_in) in the same memory.
    The network's weights must be in channels_last order, and must not be moved afterwards.
    """

    def __init__(self, network: nn.Module, name: str, fused: bool):
        convolutions = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)] if name == "muon" else []
        self.kernels = [w for w in convolutions if min(w.shape[:2]) > 4]  # not those from and to pixels: too narrow
        self.matrices = [nn.Parameter(_as_matrix(w.data)) for w in self.kernels]
        kernel_ids = {id(w) for w in self.kernels}
        self.parts = [torch.optim.Adam((p for p in network.parameters() if id(p) not in kernel_ids), fused=fused)]
        if self.matrices:  # match_rms_adamw: updates as large as Adam's, so that both can share a learning rate
            self.parts.append(torch.optim.Muon(self.matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))

    def step(self, learning_rate: float) -> None:
        """Takes a step with the gradients of the network's parameters, and clears them."""
        for matrix, kernel in zip(self.matrices, self.kernels):
            matrix.grad = _as_matrix(kernel.grad)
            kernel.grad = None
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad()

    def state_dict(self) -> dict:
        """What a checkpoint holds of the optimiser."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def _as_matrix(kernel: Tensor) -> Tensor:
    return kernel.permute(0, 2, 3, 1).flatten(1)  # (C_out, C_in, h, w) -> (C_out, h w C_in)
