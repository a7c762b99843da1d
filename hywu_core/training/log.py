"""What a run says on its way: a CSV file that any spreadsheet opens, and TensorBoard where that is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .trainer import StepReport

LOG, STATE, BOARD = "log.csv", "state.safetensors", "tensorboard"  # files of a run's folder
COLUMNS = ("step", "loss", "rate", "gradient_norm")


class RunLog:
    """The log of one run's folder. A resumed run goes on in the same file; rows after its last saved state are dropped, since
    those steps are done again.

    Args:
        folder: of the run; made if needed.
        done: steps that are done already.
    """

    def __init__(self, folder: Path, done: int = 0):
        self.path = Path(folder) / LOG
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.losses = self._keep(done)  # one for each step
        self._board = _board(Path(folder) / BOARD, done)

    def step(self, report: StepReport) -> None:
        """Add a step."""
        self.losses.append(report.loss)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([report.step, *(f"{value:.6g}" for value in report[1:])])
        self.values(report.step, dict(zip(COLUMNS[1:], report[1:], strict=True)))

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Other numbers of a step, such as validation metrics, for TensorBoard."""
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _keep(self, done: int) -> list[float]:
        rows = []
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < done]
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return [float(row["loss"]) for row in rows]


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done)
