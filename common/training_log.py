"""The record of a training run: losses in all and by noise level, in metrics.csv and as a plot; it finds a bad loss."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import LessonError
from common.files import atomic_write
from common.images import save_loss_plot

BANDS = 5  # of neighbouring noise levels, from the noisiest on; a schedule of fewer has as many


class TrainingLog:
    """Collects the losses of each step on the device, and looks at them only now and then, so that a GPU need not wait.

    levels: the names of the noise levels, from the noisiest on. `rows` holds [step, loss, loss of band 1, loss of band
    2, ...] of the images since the row before: the mean of weight times loss, and for each band the weighted mean of
    its losses, NaN without images.
    """

    def __init__(self, levels: Sequence[str]):
        self.levels, self.bands = levels, min(BANDS, len(levels))
        self.rows, self.recent = [], []

    def add(self, step: int, losses: Tensor) -> None:
        """Takes (B, 3): of each image of a step its loss, its place from the noisiest level, 0, to 1, and weight."""
        self.recent.append((step, losses))

    def check(self) -> None:
        """LessonError that names step and noise level if a loss since the last row is not finite."""
        for step, losses in self.recent:
            bad = ~losses[:, 0].isfinite()
            if bad.any():
                k = int(losses[bad][0, 1] * len(self.levels))
                raise LessonError(
                    f"the loss is not finite at step {step}, noise level {k + 1} of {len(self.levels)} "
                    f"({self.levels[k]}); an earlier checkpoint is kept; try a lower --learning-rate"
                )

    def close_row(self) -> float:
        """Makes a row of the steps since the last one, and returns its loss. Raises as `check` does."""
        self.rows.append(self._recent_row())
        self.recent = []
        return self.rows[-1][1]

    def _recent_row(self):
        self.check()
        loss, where, weight = torch.cat([losses.cpu().double() for _, losses in self.recent]).T
        band = (where * len(self.levels)).long() * self.bands // len(self.levels)
        sums = [(weight * loss)[band == k].sum() / weight[band == k].sum() for k in range(self.bands)]
        return [self.recent[-1][0], (weight * loss).mean().item(), *torch.stack(sums).tolist()]

    def write(self, folder: str | Path, reference: float) -> None:
        """Writes metrics.csv and loss.png. reference: the loss of a network that returns zero.

        The steps since the last row are there as a row too, but the log does not keep it: a run that goes on from here
        writes the rows of one that never stopped.
        """
        rows = self.rows + [self._recent_row()] if self.recent else self.rows
        edges = [math.ceil(k * len(self.levels) / self.bands) for k in range(self.bands + 1)]
        names = [f"{self.levels[a]} to {self.levels[b - 1].split()[-1]}" for a, b in zip(edges, edges[1:])]
        with atomic_write(Path(folder) / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([["step", "loss", *names], *rows])
        save_loss_plot(rows, names, Path(folder) / "loss.png", reference)

    def state_dict(self) -> dict:
        """What a checkpoint holds of the log. Raises as `check` does, so that no bad weights are ever saved."""
        self.check()
        return {"rows": self.rows, "recent": [(step, losses.cpu()) for step, losses in self.recent]}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned. ValueError if it is of another version."""
        if any(losses.shape[1] != 3 for _, losses in state["recent"]):
            raise ValueError("losses without weights")
        self.rows, self.recent = state["rows"], list(state["recent"])
