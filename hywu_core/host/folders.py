"""Model folders of the host: announced by whoever owns their kind, searched, listed and resolved here."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ..errors import CheckpointError
from ..files.checkpoint import CONFIG_FILE

FOLDER = "hywu"  # of generators
SHIPPED = Path(__file__).resolve().parents[2] / "models"  # what comes with the pack
SUFFIX = ".safetensors"
README = "put_files_here.txt"  # the host calls its own so
WHAT_GOES_HERE = """\
Generators of HY-WU go into this folder:

  my-edits.safetensors       one file, as the node Save HY-WU Generator writes it
  HY-WU/                     or a folder with config.json and .safetensors files

Tencent's generator: https://huggingface.co/tencent/HY-WU (about 16 GB). It writes LoRAs for one base only,
HunyuanImage-3.0-Instruct, which has a folder of its own next to this one. Its licence grants nothing in the EU, the UK and
South Korea.

For other bases (Flux, Qwen-Image, Z-Image, Wan, ...) nobody has published a generator: train one, with the template "train".
The tiny model of the template "quickstart" brings its own.

After files were added, press R in ComfyUI.
"""


def register() -> None:
    """Announce the folder of generators, with the pack's own behind it."""
    announce(FOLDER, WHAT_GOES_HERE, SHIPPED)


def announce(kind: str, readme: str, *more: Path) -> None:
    """Make models/<kind> known to the host, and more folders behind it. Paths of extra_model_paths.yaml stay.

    The folder is made if it is not there, with a readme in it: an artist who looks for it finds it.
    """
    known = list(folder_paths.folder_names_and_paths.get(kind, ([], set()))[0])
    own = os.path.join(folder_paths.models_dir, kind)
    known += [path for path in (own, *map(str, more)) if path not in known]
    folder_paths.folder_names_and_paths[kind] = (known, {SUFFIX})
    _make(Path(own), readme)


def generator_names() -> list[str]:
    """What an artist can choose from: single files, and folders that hold a config.json (named with a trailing slash)."""
    names = set()
    for relative, files in _walk(FOLDER):
        if CONFIG_FILE in files and relative:
            names.add(f"{relative}/")
        else:
            names.update(f"{relative}/{file}".lstrip("/") for file in files if file.endswith(SUFFIX))
    return sorted(names)


def generator_path(name: str) -> Path:
    """Resolve a name that `generator_names` listed.

    Raises:
        CheckpointError: if no folder has it, naming those that were searched.
    """
    return resolve(FOLDER, name, "generator", "Put its file or folder there.")


def folder_names(kind: str) -> list[str]:
    """The folders of a kind that hold a config.json, to choose from."""
    return sorted({relative or "." for relative, files in _walk(kind) if CONFIG_FILE in files})


def resolve(kind: str, name: str, what: str, remedy: str) -> Path:
    """The path of a name that was listed, here or on a machine that parts names with backslashes.

    Args:
        what, remedy: for the error: what is looked for, and what to do.
    Raises:
        CheckpointError: if no folder of the kind has it, naming those that were searched.
    """
    roots = folder_paths.get_folder_paths(kind)
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        for root in roots:
            path = Path(os.path.normpath(os.path.join(root, spelling)))  # as written: links to other disks are welcome
            if os.path.exists(path) and path.is_relative_to(os.path.normpath(root)):
                return path
    raise CheckpointError(f"There is no {what} {name!r} in {', '.join(roots)}. {remedy}")


def modified(path: Path) -> float:
    """When the newest file of a generator or a base changed, so that a replaced one is loaded again."""
    times = []
    try:
        files = [path, *os.scandir(path)] if os.path.isdir(path) else [path]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked into ({error}).") from None
    for file in files:
        try:
            times.append(os.stat(file).st_mtime)
        except OSError:  # a link to nothing, or a file that is being replaced
            continue
    return max(times, default=0.0)


def _make(folder: Path, readme: str) -> None:
    """Never fails: on a disk that cannot be written the nodes work all the same. A folder that is there is left as it is."""
    try:
        folder.mkdir(parents=True)
        (folder / README).write_text(readme, encoding="utf-8")
    except FileExistsError:
        return
    except OSError as error:
        logging.info("HY-WU: %s was not made (%s). Make it to put files there.", folder, error.strerror)


def _walk(kind: str) -> Iterator[tuple[str, list[str]]]:
    """(path below its root with slashes, names of its files) of every folder of a kind, each real folder once below a root;
    what lies below a folder with a config.json belongs to that one. What cannot be looked into, such as a drive that is not
    there, is said in the log.
    """

    def skipped(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a folder that was announced need not be made
            logging.warning("HY-WU: %s is not listed: %s.", error.filename, error.strerror)

    for root in folder_paths.get_folder_paths(kind):
        seen = set()
        for folder, subfolders, files in os.walk(root, onerror=skipped, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above, or to one that was listed under another name
                subfolders.clear()
                continue
            seen.add(real)
            relative = "" if folder == root else Path(folder).relative_to(root).as_posix()
            if CONFIG_FILE in files and (relative or kind != FOLDER):
                subfolders.clear()
            yield relative, files
