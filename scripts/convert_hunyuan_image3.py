"""Convert the official folder of HunyuanImage-3.0-Instruct into one with its large weights quantised, for less memory.

    .venv/bin/python scripts/convert_hunyuan_image3.py SOURCE TARGET --format fp8
    .venv/bin/python scripts/convert_hunyuan_image3.py SOURCE TARGET --format nvfp4 --device gpu
    .venv/bin/python scripts/convert_hunyuan_image3.py --verify TARGET

The same command goes on with a conversion that was stopped. COMFYUI_DIR names the host.
"""

from __future__ import annotations

import argparse
import logging
import sys

from in_host import enter_host

from hywu_core.errors import HywuError

KINDS = ("fp8", "nvfp4")  # the names of convert.FORMATS, which can be read only once the host is entered
STOPPED = 130  # the exit code of a run that was asked to stop


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="the official folder")
    parser.add_argument("target", nargs="?", help="the folder to write: empty, not there, or of the same conversion")
    parser.add_argument("--format", choices=KINDS, default="fp8", help="8 or 4 bits a weight (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: the one that the host chooses")
    parser.add_argument("--verify", metavar="FOLDER", help="check every file of a converted folder instead")
    arguments = parser.parse_args()
    if not arguments.verify and not arguments.target:
        parser.error("SOURCE and TARGET are needed, or --verify FOLDER")
    return arguments


def main() -> None:
    """Errors that a user can cause are one line."""
    arguments = read_arguments()
    enter_host(cpu=arguments.device == "cpu" or bool(arguments.verify))
    logging.getLogger().setLevel(logging.WARNING)
    import comfy.model_management

    from hywu_core.bases.hunyuan_image3.convert import convert, verify

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        if arguments.verify:
            verify(arguments.verify, say)
        else:
            device = comfy.model_management.get_torch_device()
            convert(arguments.source, arguments.target, arguments.format, device, say)
    except HywuError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
