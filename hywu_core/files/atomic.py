"""Files that are written whole or not at all, on every platform."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import SaveError
from .names import check_path

HELD = (5, 32, 33, 1224)  # Windows: access denied, sharing violation, lock violation, file with a mapped section
WAITS = (0.05, 0.1, 0.2, 0.4, 0.0)  # seconds: a virus scanner or an indexer lets go of a file soon
LONG_PATH = 259  # characters that Windows takes unless its user turned long paths on
# names of process numbers are those of one machine; another may write into the same folder over a network
MACHINE = hashlib.sha256(platform.node().encode(errors="replace")).hexdigest()[:8]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there replaces `path` at once, or is removed on failure.

    Temporary files of this name whose process was killed are removed first.

    Raises:
        SaveError: if the folder cannot be written to, the disk is full, the name cannot be one on some platform, or
            something holds what stands at `path`: then the new file is kept beside it. What stood there stays as it was.
    """
    path = Path(path)
    check_path(path)
    temporary = path.with_name(f"{_head(path)}{os.getpid()}.tmp")
    with no_empty_folders(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path)
            temporary.touch()
            # what the user's umask gives; the writer may leave a file only its owner can read
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "r+b") as handle:  # Windows flushes only what is open for writing
                os.fsync(handle.fileno())
            _put(temporary, path)
        except (OSError, SafetensorError) as error:
            raise SaveError(f"Cannot write {path}: {error}. Nothing was changed. {_remedy(error, path)}") from error
        finally:
            if os.path.exists(temporary):  # not Path.exists: that raises where the folder may not even be looked into
                with suppress(OSError):
                    temporary.unlink()


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Remove the folders of a path that were made meanwhile and stayed empty."""
    absent = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    finally:
        for path in absent:
            with suppress(OSError, ValueError):  # not empty, never made, or no name that could be
                path.rmdir()


def _put(temporary: Path, path: Path) -> None:
    for wait in WAITS:
        try:
            os.replace(temporary, path)
            return
        except OSError as error:
            held = isinstance(error, PermissionError) or getattr(error, "winerror", None) in HELD
            if not held or not os.path.isfile(path):
                raise
            reason = error
            time.sleep(wait)
    kept = _free_beside(path)
    os.replace(temporary, kept)
    raise SaveError(
        f"Cannot replace {path}: {reason}. Something holds it open: another program, or what was loaded from it and is "
        f"still in memory. It is as it was, and the new file is kept as {kept.name} beside it. Close what holds it, and "
        "save again or rename that file."
    ) from reason


def _free_beside(path: Path) -> Path:
    kept, number = path.with_name(f"{path.stem}.new{path.suffix}"), 1
    while os.path.exists(kept):
        number += 1
        kept = path.with_name(f"{path.stem}.new-{number}{path.suffix}")
    return kept


def _head(path: Path) -> str:
    """What the names of a file's temporaries begin with; a process number and .tmp follow."""
    long = len(os.fsencode(path.name)) > 200
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest() if long else path.name
    return f".{name}.{MACHINE}."


def _remove_stale(path: Path) -> None:
    head = _head(path)
    with os.scandir(path.parent) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(head) and entry.name.endswith(".tmp")]
    for file in left:
        process = os.path.basename(file).removeprefix(head).removesuffix(".tmp")
        if process.isdecimal() and not _is_alive(int(process)):
            with suppress(OSError):
                os.unlink(file)


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def _is_alive_on_windows(process: int) -> bool:
    """os.kill would end it there."""
    query, access_denied, still_active = 0x1000, 5, 259
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(query, False, process & 0xFFFFFFFF)
    if not handle:
        return ctypes.get_last_error() == access_denied
    code = ctypes.c_ulong()
    known = kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code))
    kernel.CloseHandle(ctypes.c_void_p(handle))
    return not known or code.value == still_active


def _remedy(error: Exception, path: Path) -> str:
    code, windows = getattr(error, "errno", None), getattr(error, "winerror", None)
    if code in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "Make room, or choose a folder on another disk."
    longest = len(str(path.absolute())) + len(_head(path)) - len(path.name)
    if code == errno.ENAMETOOLONG or windows == 206 or (os.name == "nt" and longest > LONG_PATH):
        return (
            f"The path has {len(str(path.absolute()))} characters. Choose a shorter name or a folder nearer to the root "
            "(Windows takes 259 characters unless long paths are turned on)."
        )
    return "Choose a folder that can be written to and has room."
