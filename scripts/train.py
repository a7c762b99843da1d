"""Train a generator outside the server: one process, several GPUs, or several machines, through Hugging Face accelerate.

    accelerate launch scripts/train.py --config run.json
    accelerate launch scripts/train.py --pocket --suite eight --steps 400 --output out/train

The same command goes on with a run that was stopped: Ctrl-C and SIGTERM write its state first, and the generator as it is
then. A file named `finish` in the run's folder ends it as if it were done; more --steps extend it. COMFYUI_DIR names the
host.
"""

from __future__ import annotations

import logging
import sys

from in_host import enter_host
from pocket_run import PocketRun, sources
from stopping import STOPPED, Signals

from hywu_core.errors import HywuError
from hywu_core.training.distributed import Accelerated
from hywu_core.training.options import read_arguments


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
