"""A LoRA's strength for single blocks and targets, from rules as an artist writes them.

    0-7: 0.5             the blocks 0 to 7, of every stack
    12: 0                block 12
    *mlp*: 0             targets by their name, * for anything
    single_blocks 0-3: 2 a name and blocks

Rules stand on lines of their own, or behind semicolons. The last one that fits a target decides; 1 where none does.
"""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from typing import NamedTuple

from .errors import LoraError
from .lora import InstanceLora

PLACE = re.compile(r"^(?P<stack>.*?)[._]?(?<![^._])(?P<layer>\d+)[._](?P<target>.+)$")
_RULE = re.compile(
    r"(?P<name>[^\s:]*[^\s:\d-][^\s:]*)?\s*(?:(?P<first>\d+)(?:\s*-\s*(?P<last>\d+))?)?\s*:\s*(?P<strength>\S+)"
)
SHOWN = 12  # targets that an error names


class Place(NamedTuple):
    """Where a target is, as its name says."""

    stack: str
    layer: int
    target: str


class Rule(NamedTuple):
    """A strength, and for what."""

    text: str
    strength: float
    name: str  # a pattern; empty: any
    layers: range | None  # None: any

    def fits(self, target: str) -> bool:
        """Whether it is meant for a target of this name."""
        layer = place_of(target).layer if PLACE.match(target) else None
        by_name = not self.name or fnmatchcase(target, self.name) or fnmatchcase(target, f"*{self.name}*")
        return by_name and (self.layers is None or layer in self.layers)


def place_of(name: str) -> Place:
    """The stack, the number of the block, and the rest of a target's name; of one outside blocks "", 0 and the name."""
    match = PLACE.match(name)
    return Place(match["stack"], int(match["layer"]), match["target"]) if match else Place("", 0, name)


def rules_of(text: str) -> list[Rule]:
    """The rules of a text, in their order.

    Raises:
        LoraError: naming a rule that is none.
    """
    return [_rule(part) for part in re.split(r"[\n;\uff1b]", text.replace("\uff1a", ":")) if part.strip()]


def by_block(lora: InstanceLora, text: str) -> InstanceLora:
    """The same LoRA, every target as strong as the rules say.

    Raises:
        LoraError: naming a rule that is none, or fits no target of this LoRA.
    """
    rules = rules_of(text)
    names = [*lora.names, *(part.keys[0] for part in lora.parts)]
    for rule in rules:
        if not any(rule.fits(name) for name in names):
            raise LoraError(
                f"The rule {rule.text!r} fits nothing in this LoRA. It has {_blocks(names)}, and targets such as "
                f"{', '.join(list(dict.fromkeys(place_of(name).target for name in names))[:SHOWN])}."
            )
    factors = {
        name: pair._replace(up=pair.up * _strength(rules, name)) if _strength(rules, name) != 1 else pair
        for name, pair in lora.factors.items()
    }
    parts = [part._replace(strength=part.strength * _strength(rules, part.keys[0])) for part in lora.parts]
    return lora.changed(factors=factors, parts=parts)


def _strength(rules: list[Rule], name: str) -> float:
    return next((rule.strength for rule in reversed(rules) if rule.fits(name)), 1.0)


def _rule(text: str) -> Rule:
    text = text.strip().rstrip(",")
    match = _RULE.fullmatch(text)
    try:
        strength = float(match["strength"].removesuffix("%")) / (100 if match["strength"].endswith("%") else 1)
        known = math.isfinite(strength) and bool(match["name"] or match["first"])
    except (TypeError, ValueError):
        known = False
    if not known:
        raise LoraError(
            f"{text!r} is no rule. Write what, a colon and a strength, such as 0-7: 0.5 or *mlp*: 0, each on a line."
        )
    layers = None
    if match["first"]:
        first = int(match["first"])
        layers = range(first, int(match["last"] or first) + 1)
        if not layers:
            raise LoraError(
                f"{text!r} names no block: {first} comes behind {match['last']}. Write the smaller one first."
            )
    return Rule(text, strength, match["name"] or "", layers)


def _blocks(names: list[str]) -> str:
    """ "blocks 0-18 of double_blocks, 0-37 of single_blocks"."""
    stacks: dict[str, list[int]] = {}
    for found in (place_of(name) for name in names if PLACE.match(name)):
        stacks.setdefault(found.stack, []).append(found.layer)
    return (
        "blocks " + ", ".join(f"{min(at)}-{max(at)} of {stack}" for stack, at in stacks.items())
        if stacks
        else "no blocks"
    )
