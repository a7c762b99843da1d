"""The model folders: `hywu` for generators, `hunyuan_image3` for that base. They are searched, listed and resolved here."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..errors import CheckpointError
from ..files.checkpoint import CONFIG_FILE

FOLDER = "hywu"
BASE_FOLDER = "hunyuan_image3"
SHIPPED = Path(__file__).resolve().parents[2] / "models"  # what comes with the pack
SUFFIX = ".safetensors"


def register() -> None:
    """Announce models/hywu with the pack's own folder, and models/hunyuan_image3, keeping every path that
    extra_model_paths.yaml added.
    """
    _announce(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), str(SHIPPED))
    _announce(BASE_FOLDER, os.path.join(folder_paths.models_dir, BASE_FOLDER))


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
    return _resolve(FOLDER, name, "generator", "Put its file or folder there.")


def base_names() -> list[str]:
    """Folders with a config.json below models/hunyuan_image3, to choose from."""
    names = set()
    for root in folder_paths.get_folder_paths(BASE_FOLDER):
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if CONFIG_FILE in files:
                names.add(Path(folder).relative_to(root).as_posix())
                subfolders.clear()
    return sorted(names)


def base_path(name: str) -> Path:
    """Resolve a name that `base_names` listed.

    Raises:
        CheckpointError: if no folder has it, naming those that were searched.
    """
    return _resolve(BASE_FOLDER, name, "HunyuanImage-3", "Put its folder there.")


def modified(path: Path) -> float:
    """When the newest file of a generator or a base changed, so that a replaced one is loaded again."""
    files = [path, *path.glob("*")] if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files)


def _announce(kind: str, *paths: str) -> None:
    known = list(folder_paths.folder_names_and_paths.get(kind, ([], set()))[0])
    known += [path for path in paths if path not in known]
    folder_paths.folder_names_and_paths[kind] = (known, {SUFFIX})


def _resolve(kind: str, name: str, what: str, remedy: str) -> Path:
    roots = folder_paths.get_folder_paths(kind)
    for root in roots:
        path = Path(os.path.normpath(os.path.join(root, name)))  # as written: links to other disks are welcome
        if path.exists() and path.is_relative_to(os.path.normpath(root)):
            return path
    raise CheckpointError(f"There is no {what} {name!r} in {', '.join(roots)}. {remedy}")
