"""Where this base lies among the host's model folders."""

from __future__ import annotations

from pathlib import Path

from ...host import folders

FOLDER = "hunyuan_image3"


def register() -> None:
    folders.announce(FOLDER)


def names() -> list[str]:
    """Its sub-folders with a config.json, to choose from."""
    return folders.folder_names(FOLDER)


def path(name: str) -> Path:
    """Resolve a name that `names` listed.

    Raises:
        CheckpointError: if no folder has it, naming those that were searched.
    """
    return folders.resolve(FOLDER, name, "HunyuanImage-3", "Put its folder there.")
