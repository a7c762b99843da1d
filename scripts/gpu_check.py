"""What this machine's accelerator does with generators, bases and training: speed, memory, exactness, limits. One command,
numbers as JSON.

    .venv/bin/python scripts/gpu_check.py                    every check, at the released sizes
    .venv/bin/python scripts/gpu_check.py --cpu --small      that the checks themselves run
    .venv/bin/python scripts/gpu_check.py generate attention --json numbers.json

Runs in a git checkout and needs no downloads: weights are random, of the released shapes, made on the spot (--small: a few
MB). At the released sizes they take up to 40 GB of the folder for temporary files (TMPDIR names another). A check that fails
says why, and the others go on; the exit code is 1 then. COMFYUI_DIR names the host.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_checks import base, generator, hunyuan, launches, training
from gpu_checks.machine import Machine

Check = Callable[[Machine], dict[str, Any]]

CHECKS: dict[str, Check] = {
    "versions": generator.versions, "applied": base.applied, "interrupted": base.interrupted,
    "launches": launches.launches, "attention": generator.attention, "limits": generator.limits,
    "exact": generator.exact, "loading": generator.loading, "generate": generator.generate, "capped": generator.capped,
    "out_of_memory": generator.out_of_memory, "gradients": training.gradients,
    **{f"training_{kind}": partial(training.steps, kind=kind) for kind in training.KINDS},
    **{f"hunyuan_{kind}": partial(hunyuan.hunyuan, kind=kind) for kind in hunyuan.KINDS},
}  # fmt: skip
# what a check starts in a process of its own, because the host must be started otherwise
PARTS: dict[str, Check] = {
    "generate_one": generator.generate_one,
    "load_cold": generator.load_cold,
    "gradients_here": training.gradients_here,
    "hunyuan_files": hunyuan.from_files,
}


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}; all by default")
    parser.add_argument("--cpu", action="store_true", help="keep to the CPU, whatever the machine has")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--length", type=int, help="tokens of the condition (default: 7000, small: 50)")
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--host-options", default="", metavar="TEXT", help='for the host: "--reserve-vram 8"')
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.checks) - CHECKS.keys() - PARTS.keys()
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    return arguments


def main() -> int:
    """Run the checks, print as they come, write what was asked for."""
    arguments = read_arguments()
    options = tuple(shlex.split(arguments.host_options))
    machine = Machine(arguments.cpu, arguments.small, arguments.length, arguments.files, options)
    results, failed = {}, []
    for name in arguments.checks or CHECKS:
        try:
            results[name] = (CHECKS | PARTS)[name](machine)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            failed.append(name)
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        if arguments.json:  # at once: what comes next may take an hour, or end the process
            arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(
        f"{len(results) - len(failed)} of {len(results)} checks ran"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
