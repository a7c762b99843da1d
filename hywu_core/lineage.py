"""What a generator's file says of its past: the instructions that it was trained on, and what was taught in which order.

Both are bounded lists of the configuration's `hywu` part, so that any reader can hold them.

    instructions  texts, at most INSTRUCTIONS of them; of more, as many as that, evenly chosen
    lineage       the steps of its past, the oldest first, at most STEPS of them, then the oldest are left out; each an object
                  with at least a kind, and the fingerprint of the generator that it began with
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import ConfigError

INSTRUCTIONS, CHARACTERS = 256, 1000
STEPS, NAMED = 64, 16  # NAMED: instructions that one step of the past names
KEYS, VALUE = 24, 2000  # entries of one step, and characters of each, as a file may hold them


def check(hywu: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: for lists that are none, too long, or hold something else.
    """
    texts, steps = hywu.get("instructions", ()), hywu.get("lineage", ())
    if not isinstance(texts, (list, tuple)) or len(texts) > INSTRUCTIONS:
        raise ConfigError(f"hywu.instructions must be a list of at most {INSTRUCTIONS} texts, found {_short(texts)}.")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= CHARACTERS:
            raise ConfigError(
                f"hywu.instructions must hold texts of 1 to {CHARACTERS} characters, found {_short(text)}."
            )
    if not isinstance(steps, (list, tuple)) or len(steps) > STEPS:
        raise ConfigError(f"hywu.lineage must be a list of at most {STEPS} objects, found {_short(steps)}.")
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get("kind"), str) or not _small(step):
            raise ConfigError(f"hywu.lineage must hold small objects, each with a kind, found {_short(step)}.")


def instructions(texts: Iterable[str]) -> tuple[str, ...]:
    """Texts as a file keeps them: stripped, each once, in their order, none empty, no more than may be."""
    found = [text.strip()[:CHARACTERS].rstrip() for text in texts]
    return thinned(list(dict.fromkeys(text for text in found if text)), INSTRUCTIONS)


def continued(
    hywu: Mapping[str, Any], step: Mapping[str, Any], texts: Sequence[str], known: Sequence[str] = ()
) -> dict[str, Any]:
    """The `hywu` part of a generator after a step of its life.

    Args:
        step: its kind, and what else is to be said of it.
        texts: the instructions that it was trained on in this step.
        known: others, that its file may not name yet.
    """
    # a full list makes room for what is new, or nobody would ask for it, nor the next teaching hold it
    newest = instructions(texts)
    held = thinned([text for text in instructions(known) if text not in newest], INSTRUCTIONS - len(newest))
    kept = {*held, *newest}
    before = [text for text in instructions(hywu.get("instructions", ())) if text not in kept]
    listed = (*thinned(before, INSTRUCTIONS - len(newest) - len(held)), *held, *newest)
    named = {"instructions": len(texts), "named": list(thinned(texts, NAMED))} if texts else {}
    past = [*hywu.get("lineage", ()), {**step, **named}][-STEPS:]
    return {**hywu, **({"instructions": list(listed)} if listed else {}), "lineage": past}


def thinned(texts: Sequence[str], most: int) -> tuple[str, ...]:
    """A list, or as many as may be from all parts of it: instructions stand edit by edit, so the first ones may all ask for
    the same.
    """
    count = min(len(texts), most)
    return tuple(texts[place * len(texts) // count] for place in range(count))


def _small(step: dict) -> bool:
    texts = [text for value in step.values() for text in (value if isinstance(value, list) else [value])]
    plain = all(isinstance(text, (str, int, float, bool, type(None))) for text in texts)
    return plain and len(step) <= KEYS and len(texts) <= KEYS + NAMED and all(len(str(text)) <= VALUE for text in texts)


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > NAMED:
        return f"{len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
