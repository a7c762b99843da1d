"""Commands that end a step later when they are asked to: Ctrl-C and SIGTERM are remembered, the third one ends at once."""

from __future__ import annotations

import signal

PATIENCE = 3  # signals after which a process ends at once; launchers repeat what a terminal sends
STOPPED = 130  # the exit code of a run that was asked to stop


class Signals:
    """Remembers that the run was asked to stop."""

    def __init__(self):
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def asked(self) -> bool:
        """Whether it was."""
        return self.count > 0

    def _remember(self, number: int, _frame) -> None:
        self.count += 1
        if self.count >= PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
