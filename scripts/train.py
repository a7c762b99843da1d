"""Train a generator outside the server: one process, several GPUs, or several machines, through Hugging Face accelerate.

    accelerate launch scripts/train.py --config run.json
    accelerate launch scripts/train.py --pocket --suite eight --steps 400 --output out/train

The same command goes on with a run that was stopped: Ctrl-C and SIGTERM write its state first, and the generator as it is
then. A file named `finish` in the run's folder ends it as if it were done; more --steps extend it. COMFYUI_DIR names the
host.
"""

from __future__ import annotations

import logging
import signal
import sys

from in_host import enter_host
from pocket_run import PocketRun, sources

from hywu_core.errors import HywuError
from hywu_core.training.distributed import Accelerated
from hywu_core.training.options import read_arguments

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


def run(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    config = read_arguments(arguments, __doc__.splitlines()[0], PocketRun)
    communication = Accelerated(config.cpu)  # chooses this process's device, so it comes before the host looks at them
    enter_host(cpu=config.cpu)
    logging.getLogger().setLevel(logging.WARNING)
    from hywu_core.host.training.in_script import train_on_folder
    from hywu_core.host.training.session import StoppedError

    signals = Signals()
    try:
        train_on_folder(config, communication, signals.asked, **sources(config))
    except StoppedError as stopped:
        if communication.main:
            print(stopped)
        return STOPPED
    finally:
        communication.close()
    return 0


def main() -> None:
    """Errors that a user can cause are one line."""
    try:
        code = run()
    except HywuError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
