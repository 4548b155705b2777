"""The record of a training run: losses in all and by noise scale, in metrics.csv and as a plot; it finds a bad loss."""

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from common.errors import LessonError
from common.files import atomic_write
from common.images import save_loss_plot

BANDS = 5  # of neighbouring noise scales, from the largest to the smallest; a ladder of fewer has as many


class TrainingLog:
    """Collects the losses of each step on the device, and looks at them only now and then, so that a GPU need not wait.

    sigmas (L,) is the ladder. `rows` holds [step, loss, loss of band 1, loss of band 2, ...], each the mean over the
    images since the row before, NaN for a band without images.
    """

    def __init__(self, sigmas: Tensor):
        self.device, self.sigmas, self.bands = sigmas.device, sigmas.tolist(), min(BANDS, len(sigmas))
        self.rows, self.recent = [], []

    def add(self, step: int, loss: Tensor, i: Tensor) -> None:
        """Takes the loss (B,) of each image of one step, and the index (B,) of its noise scale."""
        self.recent.append((step, loss.detach(), i))

    def check(self) -> None:
        """LessonError that names step and noise scale if a loss since the last row is not finite."""
        for step, loss, i in self.recent:
            if not loss.isfinite().all():
                n = int(i[~loss.isfinite()][0])
                raise LessonError(
                    f"the loss is not finite at step {step}, noise scale {n + 1} of {len(self.sigmas)} "
                    f"(sigma {self.sigmas[n]:.4g}); the last checkpoint is kept; try a lower --learning-rate"
                )

    def close_row(self) -> float:
        """Makes a row of the steps since the last one, and returns its loss. Raises as `check` does."""
        self.rows.append(self._recent_row())
        self.recent = []
        return self.rows[-1][1]

    def _recent_row(self):
        self.check()
        loss = torch.cat([loss for _, loss, _ in self.recent]).double().cpu()
        band = torch.cat([i for _, _, i in self.recent]).cpu() * self.bands // len(self.sigmas)
        return [self.recent[-1][0], loss.mean().item(), *(loss[band == k].mean().item() for k in range(self.bands))]

    def write(self, folder: str | Path, D: int) -> None:
        """Writes metrics.csv and loss.png. D: numbers in an image; a zero network has loss D / 2.

        The steps since the last row are there as a row too, but the log does not keep it: a run that goes on from here
        writes the rows of one that never stopped.
        """
        folder = Path(folder)
        rows = self.rows + [self._recent_row()] if self.recent else self.rows
        edges = [math.ceil(k * len(self.sigmas) / self.bands) for k in range(self.bands + 1)]
        labels = [f"sigma {self.sigmas[a]:.3g} to {self.sigmas[b - 1]:.3g}" for a, b in zip(edges, edges[1:])]
        with atomic_write(folder / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([["step", "loss", *labels]])
            csv.writer(file).writerows(rows)
        steps, losses, *bands = zip(*rows)
        save_loss_plot(steps, losses, list(zip(*bands)), labels, folder / "loss.png", reference=D / 2)

    def state_dict(self) -> dict:
        """What a checkpoint holds of the log. Raises as `check` does, so that no bad weights are ever saved."""
        self.check()
        return {"rows": self.rows, "recent": self.recent}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned."""
        self.rows = state["rows"]
        self.recent = [(step, loss.to(self.device), i.to(self.device)) for step, loss, i in state["recent"]]
