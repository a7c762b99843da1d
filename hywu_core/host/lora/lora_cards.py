"""What the nodes of a LoRA say of it on their cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...lora import InstanceLora
from ..cards import GOOD, NOTICE, WARNING, Card
from .matching import Matches

NAMED = 8  # instructions that a card names


def applied(lora: InstanceLora, matches: Matches, strength: float, mode: str) -> Card:
    """What of a LoRA fits a MODEL, and how it stands there; a warning where a part of it does not."""
    rows = (
        ("Targets", f"matched {matches.found}/{matches.total} targets ({matches.how or mode})"),
        ("Strength", f"{strength:g}"),
        *_about(lora),
    )
    if strength == 0:
        return Card("Off: the strength is 0", rows, level=NOTICE)
    notes = (str(matches),) if matches.missing or matches.text_encoder else ()
    if matches.missing:
        return Card("Only a part of this LoRA fits this model", rows, notes, WARNING)
    if matches.caution:
        return Card("The LoRA is in the model's weights, where it is slow", rows, (*notes, matches.caution), NOTICE)
    return Card("The LoRA is on the model", rows, notes)


def saved(lora: InstanceLora, path: Path, remarks: str) -> Card:
    """Where a LoRA was written, and what of it acts less than one would expect."""
    rows = (("File", str(path)), *_about(lora))
    title = "Saved" if lora.batch == 1 else f"Saved {lora.batch} files; this is the last one"
    return Card(title, rows, (remarks,) if remarks else (), NOTICE if remarks else GOOD)


def inspected(lora: InstanceLora) -> Card:
    """What a LoRA is."""
    rows = (("Targets", f"{len(lora.names)}, rank {lora.rank}, scale {lora.scale:g}"), *_about(lora))
    return Card("What this LoRA changes", rows)


def compared(loras: Sequence[InstanceLora], centred: bool) -> Card:
    """What was compared, and how its numbers are to be read."""
    texts = [" ".join(str(lora.metadata.get("instruction") or "no instruction").split()) for lora in loras]
    rows = tuple((f"{number}", text) for number, text in enumerate(texts[:NAMED], 1))
    if not centred:
        note = "As they are, with what all of them share: even opposite edits of one generator can be well above 0."
    elif len(loras) < 3:
        note = "Two LoRAs are compared as they are. With three or more, what all of them share can be left out."
    else:
        note = f"Without what all of them share. Unrelated edits have about {-1 / (len(loras) - 1):.2f} then."
    return Card("How alike these edits are", rows, (note,))


def _about(lora: InstanceLora) -> tuple[tuple[str, str], ...]:
    known = {"Instruction": lora.metadata.get("instruction"), "Generator": lora.metadata.get("generator")}
    instances = (("Instances", str(lora.batch)),) if lora.batch > 1 else ()
    return (*((name, str(value)) for name, value in known.items() if value), *instances)
