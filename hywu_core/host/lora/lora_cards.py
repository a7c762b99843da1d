"""What the nodes of a LoRA say of it on their cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...lora import InstanceLora
from ...messages import Message
from ..cards import GOOD, NOTICE, WARNING, Card
from .matching import Matches

NAMED = 8  # instructions that a card names


def applied(lora: InstanceLora, matches: Matches, strength: float, mode: str) -> Card:
    """What of a LoRA fits a MODEL, and how it stands there; a warning where a part of it does not."""
    rows = (
        ("Targets", Message("{matched} ({how})", matched=matches.counted, how=matches.how or mode)),
        ("Strength", f"{strength:g}"),
        *_about(lora),
    )
    if strength == 0:
        return Card("Off: the strength is 0", rows, level=NOTICE)
    notes = (matches.said,) if matches.missing or matches.text_encoder else ()
    if matches.missing:
        return Card("Only a part of this LoRA fits this model", rows, notes, WARNING)
    if matches.caution:
        return Card("The LoRA is in the model's weights, where it is slow", rows, (*notes, matches.caution), NOTICE)
    return Card("The LoRA is on the model", rows, notes)


def saved(lora: InstanceLora, path: Path, remarks: Message | None) -> Card:
    """Where a LoRA was written, and what of it acts less than one would expect."""
    rows = (("File", str(path)), *_about(lora))
    title = Message("Saved")
    if lora.batch > 1:
        title = Message("Saved {count} files; this is the last one", count=lora.batch)
    return Card(title, rows, (remarks,) if remarks else (), NOTICE if remarks else GOOD)


def inspected(lora: InstanceLora) -> Card:
    """What a LoRA is."""
    return Card("What this LoRA changes", (("Targets", targets(lora)), *_about(lora)))


def compared(loras: Sequence[InstanceLora], centred: bool) -> Card:
    """What was compared, and how its numbers are to be read."""
    texts = [" ".join(str(lora.metadata.get("instruction", "")).split()) for lora in loras[:NAMED]]
    rows = tuple((f"{number}", text or Message("no instruction")) for number, text in enumerate(texts, 1))
    if not centred:
        note = Message(
            "As they are, with what all of them share: even opposite edits of one generator can be well above 0."
        )
    elif len(loras) < 3:
        note = Message(
            "Two LoRAs are compared as they are. With three or more, what all of them share can be left out."
        )
    else:
        note = Message(
            "Without what all of them share. Unrelated edits have about {cosine} then.",
            cosine=f"{-1 / (len(loras) - 1):.2f}",
        )
    return Card("How alike these edits are", rows, (note,))


def targets(lora: InstanceLora) -> Message:
    """How many weights a LoRA changes, and how."""
    return Message(
        "{count}, rank {rank}, scale {scale}", count=len(lora.names), rank=lora.rank, scale=f"{lora.scale:g}"
    )


def _about(lora: InstanceLora) -> tuple[tuple[str, str], ...]:
    rows = (
        ("Instruction", lora.metadata.get("instruction")),
        ("Generator", lora.metadata.get("generator")),
        ("Instances", lora.batch if lora.batch > 1 else None),
    )
    return tuple((name, str(value)) for name, value in rows if value)
