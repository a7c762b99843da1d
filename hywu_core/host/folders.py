"""The model folder `hywu`: where generators are looked for, listed and resolved."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..checkpoint import CONFIG_FILE
from ..errors import CheckpointError

FOLDER = "hywu"
SHIPPED = Path(__file__).resolve().parents[2] / "models"  # what comes with the pack
SUFFIX = ".safetensors"


def register() -> None:
    """Announce models/hywu and the pack's own folder, keeping every path that extra_model_paths.yaml added."""
    paths = list(folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0])
    for path in (os.path.join(folder_paths.models_dir, FOLDER), str(SHIPPED)):
        if path not in paths:
            paths.append(path)
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {SUFFIX})


def generator_names() -> list[str]:
    """What an artist can choose from: single files, and folders that hold a config.json (named with a trailing slash)."""
    names = set()
    for root in folder_paths.get_folder_paths(FOLDER):
        for folder, subfolders, files in os.walk(root, followlinks=True):
            relative = Path(folder).relative_to(root).as_posix()
            if CONFIG_FILE in files and relative != ".":
                names.add(f"{relative}/")
                subfolders.clear()
            else:
                prefix = "" if relative == "." else f"{relative}/"
                names.update(prefix + file for file in files if file.endswith(SUFFIX))
    return sorted(names)


def generator_path(name: str) -> Path:
    """Resolve a name that `generator_names` listed.

    Raises:
        CheckpointError: if no folder has it, naming those that were searched.
    """
    roots = folder_paths.get_folder_paths(FOLDER)
    for root in roots:
        path = Path(os.path.normpath(os.path.join(root, name)))  # as written: links to other disks are welcome
        if path.exists() and path.is_relative_to(os.path.normpath(root)):
            return path
    raise CheckpointError(f"There is no generator {name!r} in {', '.join(roots)}. Put its file or folder there.")


def modified(name: str) -> float:
    """When the newest file of a generator changed, so that a replaced generator is loaded again."""
    path = generator_path(name)
    files = [path, *path.glob("*")] if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files)
