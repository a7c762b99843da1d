"""The log of a run: resumed, held by another program, or damaged."""

import pytest

from hywu_core.errors import SaveError
from hywu_core.training import RunLog, StepReport


def test_a_log_drops_what_is_done_again(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.step(StepReport(step, 1.0 / (step + 1), 1e-3, 0.5))
    assert RunLog(tmp_path, done=3).losses == pytest.approx([1.0, 0.5, 1 / 3], abs=1e-5)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4


def test_a_log_that_is_held_ends_no_run_and_loses_no_row(tmp_path, caplog):
    log = RunLog(tmp_path)
    log.step(StepReport(0, 1.0, 1e-3, 0.5))
    held = log.path.rename(tmp_path / "held")
    log.path.mkdir()
    for step in (1, 2):
        log.step(StepReport(step, 2.0, 1e-3, 0.5))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "cannot be written" in caplog.text
    log.path.rmdir()
    held.rename(log.path)
    log.step(StepReport(3, 4.0, 1e-3, 0.5))
    assert log.losses == [1.0, 2.0, 2.0, 4.0] == RunLog(tmp_path, 4).losses


def test_rows_that_were_never_written_are_counted_at_the_end(tmp_path, caplog):
    log = RunLog(tmp_path)
    log.path.unlink()
    log.path.mkdir()
    log.step(StepReport(0, 1.0, 1e-3, 0.5))
    log.close()
    assert "1 rows are missing in" in caplog.text
    with pytest.raises(SaveError, match="log.csv cannot be read"):
        RunLog(tmp_path)
