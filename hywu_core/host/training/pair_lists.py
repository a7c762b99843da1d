"""Which pictures of a folder make pairs, and what is asked for in each: lists and the layouts of other trainers.

- `pairs.jsonl` or `pairs.csv` with source, target and instruction; in a .jsonl the instruction may be a list of wordings
- `metadata.jsonl` or `metadata.csv` as datasets of the hub have them (`source_file_name`, `target_file_name`, `edit_prompt`)
- a folder of sources and a folder of targets with pictures of the same names, and a text file beside each target
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import HywuError

LISTS = ("pairs.jsonl", "pairs.csv", "metadata.jsonl", "metadata.csv")
COLUMNS = ("source", "target", "instruction")
# Other words for the columns, without what ENDINGS takes off. A column that is there under its own name wins.
ALIASES = {
    "source": {"control", "control_image", "conditioning_image", "input", "input_image", "original", "original_image",
               "before", "edit_image"},
    "target": {"file_name", "image", "output", "output_image", "edited", "edited_image", "after"},
    "instruction": {"edit_prompt", "prompt", "text", "caption"},
}  # fmt: skip
ENDINGS = ("_file_name", "_image_path", "_path", "_file", "_image")
SOURCE_FOLDERS = (
    "source",
    "sources",
    "control",
    "controls",
    "input",
    "inputs",
    "before",
    "original",
    "conditioning_images",
)
TARGET_FOLDERS = ("target", "targets", "edited", "output", "outputs", "after", "images")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
CAPTIONS = (".txt", ".caption")
DELIMITERS = ",;\t|"
SHOWN = 10  # problems that one error names

EXAMPLE = '{"source": "a.png", "target": "a_edited.png", "instruction": "make it warmer"}'


class PairError(HywuError):
    """Training pairs are missing, cannot be read, or do not fit together."""


class Row(NamedTuple):
    """A pair by the names of its pictures, which are there."""

    source: Path
    target: Path
    instruction: str
    where: str  # file and line that name it
    others: tuple[str, ...] = ()  # further wordings of the instruction


def rows_of(folder: Path) -> tuple[list[Row], list[str]]:
    """All pairs that a folder names, in their order there, and what is wrong with the others.

    Raises:
        PairError: if the folder has no list and no layout that is known, or several, or a list cannot be read at all.
    """
    if not folder.is_dir():
        raise PairError(f"{folder} is not a folder. {_how_to()}")
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise PairError(f"{folder} holds {' and '.join(file.name for file in lists)}. Keep the one that is meant.")
    problems: list[str] = []
    if not lists:
        return _rows_of_layout(folder, problems), problems
    read = _csv_rows if lists[0].suffix == ".csv" else _json_rows
    found = [_row(folder, values, where, problems) for values, where in read(lists[0], problems)]
    return [row for row in found if row], problems


def refuse(problems: Sequence[str]) -> None:
    """
    Raises:
        PairError: naming every problem, if there is any.
    """
    if len(problems) == 1:
        raise PairError(problems[0])
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more." if len(problems) > SHOWN else ""
        raise PairError(f"{len(problems)} pairs cannot be used:\n" + "\n".join(problems[:SHOWN]) + more)


def _how_to() -> str:
    return f"Put pictures there, and a pairs.jsonl with one line for each pair: {EXAMPLE}"


def _text(file: Path) -> str:
    """Of a UTF-8 file, or of a UTF-16 one with its mark; line ends as they are."""
    try:
        data = file.read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PairError(f"{file} cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from None


def _json_rows(file: Path, problems: list[str]) -> Iterator[tuple[Any, str]]:
    # by "\n" alone: other separators of lines, such as U+2028, may stand inside a string
    for number, line in enumerate(_text(file).split("\n"), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            yield json.loads(line), where
        except RecursionError:
            problems.append(f"{where}: nested too deeply. A line is one object such as {EXAMPLE}")
        except ValueError as error:
            problems.append(f"{where}: not valid JSON ({error}). A line is one object such as {EXAMPLE}")


def _csv_rows(file: Path, problems: list[str]) -> Iterator[tuple[dict[str, str], str]]:
    text = _text(file)
    readers = [csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True) for mark in DELIMITERS]
    headings = [_heading(reader) for reader in readers]
    chosen = next((i for i, heading in enumerate(headings) if _columns(heading).keys() >= set(COLUMNS)), None)
    if chosen is None:
        named = ", ".join(repr(name) for name in headings[0]) or "nothing"
        raise PairError(f"{file}, line 1: the heading names {named}. It must name {', '.join(COLUMNS)}.")
    reader, heading = readers[chosen], headings[chosen]
    plain = [name.lower() for name in heading if name]
    twice = next((name for name in plain if plain.count(name) > 1), None)
    if twice:
        raise PairError(f"{file}, line 1: the heading names {twice!r} twice.")
    while True:
        where = f"{file}, line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:  # where the next pair begins is not known any more
            problems.append(f'{where}: {error}. Put text between double quotes, and write "" for one inside.')
            return
        if values is None:
            return
        if not any(values):
            continue
        if len(values) != len(heading):
            problems.append(
                f"{where}: {len(values)} values, but the heading names {len(heading)}. Put text that holds a "
                f"{DELIMITERS[chosen]!r} between double quotes."
            )
            continue
        yield dict(zip(heading, values, strict=True)), where


def _heading(reader: Any) -> list[str]:
    try:
        return [name.strip() for name in next((row for row in reader if any(row)), [])]
    except csv.Error:
        return []


def _columns(names: Sequence[str]) -> dict[str, str]:
    """{column of ours: name there}. A column that several names could be is left to `_ambiguous`."""
    plain = {name.strip().lower().replace(" ", "_"): name for name in names}
    found = {column: plain[column] for column in COLUMNS if column in plain}
    for column in COLUMNS:
        others = [name for key, name in plain.items() if column not in found and _means(key, column)]
        if others:
            found[column] = others[0]
    return found


def _means(key: str, column: str) -> bool:
    stem = next((key.removesuffix(end) for end in ENDINGS if key.endswith(end)), key)
    return stem == column or key in ALIASES[column] or stem in ALIASES[column]


def _ambiguous(names: Sequence[str]) -> str:
    for column in COLUMNS:
        if not any(name.strip().lower() == column for name in names):
            meant = [name for name in names if _means(name.strip().lower().replace(" ", "_"), column)]
            if len(meant) > 1:
                return f"{' and '.join(meant)} could both be the {column}. Name one of them {column}."
    return ""


def _row(folder: Path, values: Any, where: str, problems: list[str]) -> Row | None:
    names = list(values) if isinstance(values, dict) else []
    columns = _columns(names)
    doubt = _ambiguous(names)
    if doubt:
        problems.append(f"{where}: {doubt}")
        return None
    for column in COLUMNS:
        value = values[columns[column]] if column in columns else None
        several = column == "instruction" and isinstance(value, list) and value
        if not all(isinstance(text, str) and text.strip() for text in (value if several else [value])):
            problems.append(
                f"{where}: {column} is missing or empty. Every pair has {', '.join(COLUMNS)}, all of them text; an "
                "instruction may be a list of several wordings."
            )
            return None
    source, target = (_existing(folder, values[columns[name]], where, problems) for name in ("source", "target"))
    found = values[columns["instruction"]]
    wordings = list(dict.fromkeys(found)) if isinstance(found, list) else [found]
    return Row(source, target, wordings[0], where, tuple(wordings[1:])) if source and target else None


def _existing(folder: Path, name: str, where: str, problems: list[str]) -> Path | None:
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):  # lists that were written on Windows
        path = folder / spelling
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name that no file system takes
            problems.append(f"{where}: {name[:80]!r}... is no name of a file. Names are relative to {folder}.")
            return None
    problems.append(f"{where}: {path} does not exist. Names are relative to {folder}.")
    return None


def _rows_of_layout(folder: Path, problems: list[str]) -> list[Row]:
    inside = sorted(folder.iterdir())
    folders = {path.name.lower(): path for path in inside if path.is_dir()}
    sources, targets = ([folders[n] for n in names if n in folders] for names in (SOURCE_FOLDERS, TARGET_FOLDERS))
    if len(sources) != 1 or len(targets) != 1:
        kind = f"has neither {' nor '.join(LISTS[:2])}"
        if len(sources) > 1 or len(targets) > 1:
            named = ", ".join(path.name for path in (*sources, *targets))
            kind += f", and which of the folders {named} are meant is not clear"
        elif any(path.suffix == ".parquet" for path in inside):
            kind += ", only parquet files, which are not read: unpack them into pictures first"
        raise PairError(f"{folder} {kind}. {_how_to()}")
    before, after = _pictures(sources[0], problems), _pictures(targets[0], problems)
    for name in sorted(before.keys() ^ after.keys()):
        lonely, other = (before[name], targets[0]) if name in before else (after[name], sources[0])
        problems.append(f"{lonely}: there is no picture {name}.* in {other}. Both folders hold the same names.")
    rows = []
    for name in sorted(before.keys() & after.keys()):
        instruction = _caption(before[name], after[name], problems)
        if instruction:
            rows.append(Row(before[name], after[name], instruction, str(after[name])))
    return rows


def _pictures(folder: Path, problems: list[str]) -> dict[str, Path]:
    """{name without ending: file}."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES and not path.name.startswith("."):
            if path.stem in found:
                problems.append(f"{path}: {found[path.stem].name} has the same name. Keep one of them.")
            found[path.stem] = path
    return found


def _caption(source: Path, target: Path, problems: list[str]) -> str:
    files = [path.with_suffix(ending) for path in (target, source) for ending in CAPTIONS]
    try:
        texts = list(dict.fromkeys(_text(file).strip() for file in files if file.is_file()))
    except PairError as error:
        problems.append(str(error))
        return ""
    if len(texts) > 1:
        problems.append(f"{target}: its text files say different things. Keep {files[0].name} beside it.")
    elif not texts or not texts[0]:
        problems.append(f"{target}: there is no text for it. Put the instruction into {files[0]}.")
    return texts[0] if len(texts) == 1 else ""
