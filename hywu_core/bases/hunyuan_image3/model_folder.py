"""Where this base lies among the host's model folders."""

from __future__ import annotations

from pathlib import Path

from ...host import folders

FOLDER = "hunyuan_image3"
WHAT_GOES_HERE = """\
HunyuanImage-3.0-Instruct, the base of Tencent's HY-WU generator, goes into this folder, in a folder of its own:

  HunyuanImage-3.0-Instruct/     all files of https://huggingface.co/tencent/HunyuanImage-3.0-Instruct (about 166 GB)

scripts/convert_hunyuan_image3.py of this node pack makes fp8 (86 GB) or 4-bit (51 GB) weights of it, in another folder.
The generator itself goes into the folder hywu next to this one. Its licence grants nothing in the EU, the UK and South Korea.

After files were added, press R in ComfyUI.
"""


def register() -> None:
    folders.announce(FOLDER, WHAT_GOES_HERE)


def names() -> list[str]:
    """Its sub-folders with a config.json, to choose from."""
    return folders.folder_names(FOLDER)


def path(name: str) -> Path:
    """Resolve a name that `names` listed.

    Raises:
        CheckpointError: if no folder has it, naming those that were searched.
    """
    return folders.resolve(FOLDER, name, "HunyuanImage-3", "Put its folder there.")
