"""A study's results as one JSON file that grows: what it holds is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from in_host import ROOT  # noqa: F401 (puts the pack on the path)

from hywu_core.files.atomic import atomic_write


def once(path: Path, group: str, name: str, make: Callable[[], Any]) -> Any:
    """What the file holds in a group under a name; made and written if it is not there."""
    results = read(path)
    found = results.setdefault(group, {})
    if name not in found:
        found[name] = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(results), encoding="utf-8")
    return found[name]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{group: {name: result}}; nothing if there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def mean(values: list[float]) -> float:
    """Of PSNR in dB, for show."""
    return sum(values) / len(values)
