"""Names of files and folders that a user chooses: one rule everywhere, so that what is made can be kept anywhere."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SaveError

LONGEST = 255  # bytes of one name on the usual file systems
ROOM = 55  # bytes that a chosen name leaves for a number and a suffix
_FORBIDDEN = frozenset('<>:"|?*')  # by Windows; / and \ part a path
_DEVICES = frozenset(
    (
        "CON",
        "PRN",
        "AUX",
        "NUL",
        "CONIN$",
        "CONOUT$",
        *(f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³"),
    )
)


def below(root: str | Path, name: str, what: str) -> Path:
    """The path of a chosen name below a folder. It may name sub-folders, with slashes of either kind.

    Args:
        what: the name is for, with its article, as in "a run".
    Raises:
        SaveError: for a name that is empty, leads out of the folder, or cannot be one on some platform.
    """
    root, cleaned = Path(os.path.normpath(root)), name.strip().replace("\\", "/")
    parts = [part for part in cleaned.split("/") if part not in ("", ".")]
    wrong = "it leads out of its folder" if cleaned.startswith("/") or ".." in parts else None
    wrong = wrong or ("it is empty" if not parts else None)
    wrong = wrong or next(filter(None, (wrong_with(part, LONGEST - ROOM) for part in parts)), None)
    if wrong:
        raise SaveError(
            f"{name!r} is no name for {what}: {wrong}. Use a plain name such as my-edits; what it names is made in {root}."
        )
    return root.joinpath(*parts)


def check_path(path: Path) -> None:
    """See that a file of this path can be made on every platform, as far as its own name decides that.

    Raises:
        SaveError: if it cannot.
    """
    unusable = "it holds a NUL character" if "\0" in str(path) else None
    unusable = unusable or ("it names no file" if not path.name else wrong_with(path.name, LONGEST))
    unusable = unusable or _not_encodable(str(path))
    if unusable:
        raise SaveError(f"Cannot write {str(path)!r}: {unusable}. Nothing was changed. Choose a plainer name.")


def wrong_with(part: str, longest: int) -> str | None:
    """Why this cannot be the name of a file or folder somewhere; None if it can."""
    if control := next((character for character in part if ord(character) < 32 or ord(character) == 127), None):
        return f"it holds the control character {control!r}"
    if forbidden := sorted(_FORBIDDEN & set(part)):
        return f"Windows allows no {' '.join(forbidden)} in it"
    if part != part.rstrip(". "):
        return "Windows allows no dot or space at its end"
    if part.partition(".")[0].rstrip().upper() in _DEVICES:
        return "Windows keeps that name for a device"
    unusable = _not_encodable(part)
    if not unusable and len(os.fsencode(part)) > longest:
        return f"it has {len(os.fsencode(part))} bytes, and {longest} are allowed"
    return unusable


def _not_encodable(text: str) -> str | None:
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        return (
            f"{text[error.start : error.end]!r} cannot be written in this system's file names, which are in "
            f"{error.encoding} (PYTHONUTF8=1 in the environment changes that)"
        )
    return None
