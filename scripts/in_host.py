"""Make `import comfy` work in a script, as the host's own main.py does."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("hywu_core") is None:  # in a user's own Python; last, so that our nodes/ hides nobody's
    sys.path.append(str(ROOT))

for stream in (
    sys.stdout,
    sys.stderr,
):  # a console without a character of somebody's file name must not end hours of work
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def enter_host(host: Path | None = None, cpu: bool = True, options: Sequence[str] = ()) -> Path:
    """Put the host on the path and have it parse arguments, before anything asks it for a device.

    Args:
        host: ComfyUI's folder; by default COMFYUI_DIR, the one whose custom_nodes this pack lies in, or the one that
            scripts/setup.sh made.
        cpu: keep to the CPU, whatever the machine has.
        options: of the host's own command line.
    Returns:
        ComfyUI's folder.
    """
    named = host or os.environ.get("COMFYUI_DIR")
    # where the pack is a link in custom_nodes, only the path by which the script was called leads to ComfyUI
    called = list(Path(sys.argv[0]).absolute().parents)[3:4]
    candidates = [Path(named)] if named else [*called, ROOT.parent.parent, ROOT / ".host" / "ComfyUI"]
    host = next((folder for folder in candidates if (folder / "comfy" / "sd.py").is_file()), None)
    if host is None:
        sys.exit(
            f"No ComfyUI in {' or '.join(str(folder) for folder in dict.fromkeys(candidates))}. Put this folder into "
            "ComfyUI's custom_nodes, set COMFYUI_DIR to ComfyUI's folder, or run scripts/setup.sh."
        )
    sys.path.insert(0, str(host))
    argv, sys.argv = sys.argv, [sys.argv[0], *(["--cpu"] if cpu else []), *options]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = argv
    return host


def hurry(threads: int) -> None:
    """Settings that make tiny models train faster on a CPU: products in bfloat16 where the processor has them, and plain
    attention, whose backward pass is several times faster than the fused one for sequences this short.
    """
    import torch

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_flash_sdp(False)  # in spite of its name it decides for the CPU as well
