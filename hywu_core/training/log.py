"""What a run says on its way: a CSV file that any spreadsheet opens, and TensorBoard where that is installed."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SaveError
from ..files.atomic import atomic_write
from .trainer import StepReport

LOG, VALIDATION, STATE, BOARD = "log.csv", "validation.csv", "state.safetensors", "tensorboard"  # of a run's folder
COLUMNS, VALIDATION_COLUMNS = ("step", "loss", "rate", "gradient_norm"), ("step", "loss", "base")


class RunLog:
    """The log of one run's folder. A resumed run goes on in the same file; rows after its last saved state are dropped, since
    those steps are done again.

    Args:
        folder: of the run; made if needed.
        done: steps that are done already.
        lessons: names of those in weight space, whose distances get a column each.
    Rows of a file that is held by another program (under Windows a spreadsheet does) are written as soon as it is free.

    Raises:
        SaveError: if a file cannot be read or made.
    """

    def __init__(self, folder: Path, done: int = 0, lessons: Sequence[str] = ()):
        self.columns = (*COLUMNS, *lessons)
        self.path, self._validation = Path(folder) / LOG, Path(folder) / VALIDATION
        self.losses = [float(row["loss"]) for row in _keep(self.path, self.columns, done)]  # one for each step
        _keep(self._validation, VALIDATION_COLUMNS, done)
        self._board = _board(Path(folder) / BOARD, done)
        self._waiting: dict[Path, list[Sequence[float]]] = {}

    def step(self, report: StepReport) -> None:
        self.losses.append(report.loss)
        *numbers, distances = report
        row = (*numbers, *distances)
        self._add(self.path, row)
        self.values(report.step, dict(zip(self.columns[1:], row[1:], strict=True)))

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Other numbers of a step, such as validation metrics, for TensorBoard."""
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def validation(self, step: int, loss: float, base: float) -> None:
        """Add the loss on held-out pairs after a step, and the base's own on the same pairs."""
        self._add(self._validation, (step, loss, base))
        self.values(step, {"validation_loss": loss, "validation_loss_of_the_base": base})

    def close(self) -> None:
        """Write what is waiting, and end TensorBoard's thread."""
        for path, rows in self._waiting.items():
            if rows and not self._written(path):
                logging.warning("HY-WU: %d rows are missing in %s.", len(rows), path)
        if self._board:
            self._board.close()

    def _add(self, path: Path, row: Sequence[float]) -> None:
        rows = self._waiting.setdefault(path, [])
        rows.append(row)
        if not self._written(path) and len(rows) == 1:
            logging.warning(
                "HY-WU: the log %s cannot be written. Something holds it, such as a spreadsheet, or the disk is full. The "
                "run goes on, and its rows are written as soon as they can be.",
                path,
            )

    def _written(self, path: Path) -> bool:
        rows = self._waiting[path]
        try:
            with _opened(path, "a") as file:
                csv.writer(file).writerows([row[0], *(f"{value:.6g}" for value in row[1:])] for row in rows)
        except SaveError:
            return False
        rows.clear()
        return True


def _keep(path: Path, columns: Sequence[str], done: int) -> list[dict[str, str]]:
    """Write a file anew with its heading and the rows of the steps that are done, and return those."""
    rows = [row for row in _rows(path, columns) if int(row["step"]) < done]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The whole rows of a file. A run that was killed or had no room left half of one: the state counts, not the log."""
    if not os.path.exists(path):
        return []
    with _opened(path, "rb") as file:
        lines = file.read().decode("utf-8", "replace").replace("\0", "\ufffd").splitlines()
    found = [dict(zip(columns, line.split(","), strict=False)) for line in lines]
    rows = [row for row in found if len(row) == len(columns) and all(map(_is_number, row.values()))]
    rows = [row for row in rows if row["step"].isdecimal()]
    if len(rows) < len(lines) - 1 or (lines and lines[0] != ",".join(columns)):
        logging.warning("HY-WU: %s is damaged; %d of its rows are kept, the rest is left out.", path, len(rows))
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return len(text) < 32


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[Any]:
    try:
        with open(path, mode) if "b" in mode else open(path, mode, newline="", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise SaveError(
            f"The log {path} cannot be {'read' if 'r' in mode else 'written'}: {error}. The run's state is kept; make room "
            "or free the file, and start the run again to go on."
        ) from error


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done)
