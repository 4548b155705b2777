"""Which t to train on: all alike, or those more often whose terms of the bound are large (Sec. 3.3).

New in lesson 9. Importance sampling does not change the loss that is minimised, since a term that comes more often gets
a smaller weight. It changes how noisy the gradient is.
"""

import torch
from torch import Tensor


class UniformTimesteps:
    """Each of T timesteps as often as the others."""

    def __init__(self, T: int):
        self.T = T

    def draw(self, B: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) long, spread evenly over the batch: one in each B-th part; and their weights (B,), all 1."""
        u = spread(B, generator)
        return (u * self.T).long().clamp(max=self.T - 1), torch.ones_like(u)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict:
        """What a checkpoint holds of it: nothing."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned."""


class LossAwareTimesteps(UniformTimesteps):
    """Eq. 18: t with probability p_t ~ sqrt(E[L_t^2]) over the last `history` losses of each t, weighted 1 / (T p_t).

    Uniform until every t has so many. A thousandth of the draws stays uniform, so that no weight is above 1000.
    """

    def __init__(self, T: int, history: int = 10):
        super().__init__(T)
        self.losses, self.count = torch.zeros(T, history, dtype=torch.float64), torch.zeros(T, dtype=torch.long)

    def probabilities(self) -> Tensor:
        """p (T,) float64; they sum to 1."""
        if self.count.min() < self.losses.shape[1]:
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        p = self.losses.square().mean(1).sqrt().clamp(min=1e-30)  # all may be 0
        return 0.999 * p / p.sum() + 0.001 / self.T

    def draw(self, B: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) long, spread evenly over the probabilities, and their weights (B,), of mean 1."""
        u, p = spread(B, generator), self.probabilities().float()
        p = p.to(u.device)
        t = torch.searchsorted(p.cumsum(0) / p.sum(), u).clamp(max=self.T - 1)
        return t, 1 / (self.T * p[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Takes the losses (B,), terms of the bound for vlb, without their weights, that timesteps t (B,) had."""
        for n, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[n, self.count[n] % self.losses.shape[1]] = loss
            self.count[n] += 1

    def state_dict(self) -> dict:
        """What a checkpoint holds of it."""
        return {"losses": self.losses, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned. ValueError if it is of another T or history."""
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"a history of {tuple(state['losses'].shape)}, not of {tuple(self.losses.shape)}")
        self.losses, self.count = state["losses"].clone(), state["count"].clone()


def spread(B: int, generator: torch.Generator | None) -> Tensor:
    """Random numbers (B,) in [0, 1), one in each B-th part."""
    device = generator.device if generator else None
    u = torch.rand(1, generator=generator, device=device)
    return (torch.arange(B, device=device) + u) / B
