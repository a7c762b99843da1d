"""What a run says on its way: a CSV file that any spreadsheet opens, and TensorBoard where that is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .trainer import StepReport

LOG, VALIDATION, STATE, BOARD = "log.csv", "validation.csv", "state.safetensors", "tensorboard"  # of a run's folder
COLUMNS, VALIDATION_COLUMNS = ("step", "loss", "rate", "gradient_norm"), ("step", "loss")


class RunLog:
    """The log of one run's folder. A resumed run goes on in the same file; rows after its last saved state are dropped, since
    those steps are done again.

    Args:
        folder: of the run; made if needed.
        done: steps that are done already.
    """

    def __init__(self, folder: Path, done: int = 0):
        self.path, self._validation = Path(folder) / LOG, Path(folder) / VALIDATION
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.losses = [float(row["loss"]) for row in _keep(self.path, COLUMNS, done)]  # one for each step
        _keep(self._validation, VALIDATION_COLUMNS, done)
        self._board = _board(Path(folder) / BOARD, done)

    def step(self, report: StepReport) -> None:
        """Add a step."""
        self.losses.append(report.loss)
        _add(self.path, report)
        self.values(report.step, dict(zip(COLUMNS[1:], report[1:], strict=True)))

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Other numbers of a step, such as validation metrics, for TensorBoard."""
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def validation(self, step: int, loss: float) -> None:
        """Add the loss on held-out pairs after a step."""
        _add(self._validation, (step, loss))
        self.values(step, {"validation_loss": loss})


def _add(path: Path, row: Sequence[float]) -> None:
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([row[0], *(f"{value:.6g}" for value in row[1:])])


def _keep(path: Path, columns: Sequence[str], done: int) -> list[dict[str, str]]:
    """Write a file anew with its heading and the rows of the steps that are done, and return those."""
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < done]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done)
