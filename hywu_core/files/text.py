"""Text and JSON files that people, downloads and crashes have had in their hands: read within bounds, with typed errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import HywuError

LARGEST = 2**26  # bytes of a text file that is read; the index of a thousand shards has a few million
DEEPEST = 64  # lists and objects in one another; the released files have five
LFS = b"version https://git-lfs"


def read_text(path: Path, error: type[HywuError], remedy: str = "Download it again.") -> str:
    """A text file, with or without a byte order mark.

    Raises:
        error: of the caller's kind, if it is missing, is no text in UTF-8, or far larger than any such file.
    """
    try:
        size = os.path.getsize(path)
        if size > LARGEST:
            raise error(f"{path} has {size:,} bytes, and no such file has more than {LARGEST:,}.{_spaced(remedy)}")
        content = Path(path).read_bytes()
    except (OSError, ValueError) as reason:
        if isinstance(reason, HywuError):
            raise
        raise error(f"{path} cannot be read ({reason}).{_spaced(remedy)}") from None
    if found := what_it_is(content[:512], size):
        raise error(f"{path} {found}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text ({reason}).{_spaced(remedy)}") from None


def read_json(path: Path, error: type[HywuError], remedy: str = "Download it again.") -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        error: of the caller's kind, see `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, error, remedy), str(path), error, remedy)


def parse_json(text: str, where: str, error: type[HywuError], remedy: str = "") -> dict[str, Any]:
    """A JSON object from text.

    Raises:
        error: of the caller's kind, if it is no JSON, no object, or nested deeper than anything that is read here.
    """
    remedy = _spaced(remedy)
    try:
        values = json.loads(text)
    except RecursionError:
        raise error(f"{where}: nested too deep to be read.{remedy}") from None
    except ValueError as reason:
        raise error(f"{where}: not valid JSON ({reason}).{remedy}") from None
    if not isinstance(values, dict):
        raise error(f"{where}: expected a JSON object, found {type(values).__name__}.{remedy}")
    if _deeper_than(values, DEEPEST):
        raise error(f"{where}: nested more than {DEEPEST} deep, which nothing that is read here is.{remedy}")
    return values


def what_it_is(start: bytes, size: int) -> str | None:
    """What a file really is that was saved in place of another one, and what to do, going by its first bytes."""
    if not size:
        return "is empty: the download or the disk failed. Download it again."
    if start.startswith(LFS):
        return (
            f"is a Git LFS pointer: a note of {size} bytes that stands for the file. Run `git lfs pull` in its folder, or "
            "download the file itself."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file: the link led to a page, perhaps to one that asks to log in. Download the file."
    return None


def _spaced(remedy: str) -> str:
    return f" {remedy}" if remedy else ""


def _deeper_than(values: Any, depth: int) -> bool:
    level = [values]
    for _ in range(depth):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [value for values in inner for value in values]
        if not level:
            return False
    return True
