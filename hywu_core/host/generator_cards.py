"""What the nodes of a generator say of it: what it is, what it knows, what it wrote, and what it was not made for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import knowledge
from ..condition import REFERENCE_LATENT, Condition, assemble, text_of
from ..lora import InstanceLora
from . import memory
from .cards import BARS, GOOD, NOTICE, Card, Chart
from .lora.charts import norms_of_layers
from .memory import GeneratorHandle

NAMED = 6  # instructions that a card names
MEASURED = 100e6  # elements of a LoRA up to which its norms are taken at once
READS = {
    knowledge.TOLD: "the instruction, as the generator does (told)",
    knowledge.BLIND: "an empty prompt; only the generator reads the instruction (blind)",
    None: "not said in its file",
}


class Written(NamedTuple):
    """A LoRA, and what is said of it."""

    lora: InstanceLora
    card: Card


def loaded(handle: GeneratorHandle) -> Card:
    """Of a generator that was loaded or trained: what it is and what it knows."""
    rows = (
        ("Generator", handle.name),
        ("Size", memory.describe(handle)),
        ("For", handle.config.hywu.get("base") or "the released base"),
        *_knows(handle),
    )
    return Card("What this generator knows", tuple(row for row in rows if row[1]))


def made(handle: GeneratorHandle) -> Card:
    """Of a new generator."""
    rows = (("Size", memory.describe_new(handle)), ("For", handle.config.hywu.get("base", "")))
    return Card("A new generator. It changes nothing before it is trained.", rows)


def saved(handle: GeneratorHandle, path: Path) -> Card:
    """Of a generator's file."""
    size = f"{path.stat().st_size / 1e6:,.1f} MB"
    rows = (("File", str(path)), ("Size", size), *_knows(handle))
    return Card("Saved. Load HY-WU Generator lists it after a refresh (R).", rows)


def generate(
    handle: GeneratorHandle, condition: Condition, keep_gb: float = 0.0, more: Sequence[Condition] = ()
) -> Written:
    """Write the LoRA of a condition, or of several as one batch, and say what there is to say. See `memory.generate`."""
    began, fresh, given = time.monotonic(), memory.Fresh(), (condition, *more)
    lora = memory.generate(handle, condition, keep_gb, more, fresh)
    seconds = time.monotonic() - began
    notices = tuple(dict.fromkeys(notice for one in given for notice in strange(handle, one)))
    for notice in notices:
        logging.warning("HY-WU: %s", notice)
    rows = (
        ("Instruction", "; ".join(one.instruction or "(not given as text)" for one in given)),
        ("Targets", f"{len(lora.names)}, rank {lora.rank}, scale {lora.scale:g}"),
        ("Size", f"{lora.elements / 1e6:,.2f} M numbers" + (f" in {lora.batch} LoRAs" if lora.batch > 1 else "")),
        ("Time", f"{seconds:.2f} s, generated now" if fresh.made else f"{seconds:.2f} s, read from the disk"),
        ("The base reads", READS[knowledge.reads(handle.config.hywu)]),
    )
    bars = ()
    if lora.elements <= MEASURED:
        bars = (Chart(BARS, "How much it changes, layer by layer", tuple(norms_of_layers(lora))),)
    title = "Wrote a LoRA for this edit" if not notices else "Wrote a LoRA, but it may not do what is meant"
    return Written(lora, Card(title, rows, notices, NOTICE if notices else GOOD, bars))


def strange(handle: GeneratorHandle, condition: Condition) -> list[str]:
    """In what a condition is far from all that a generator was trained on, as far as its file says that."""
    hywu, notices = handle.config.hywu, []
    tokens = text_of(assemble(condition, handle.config), handle.config)
    if tokens is not None and knowledge.unknown(hywu, tokens):
        known = "; ".join(hywu.get("instructions", ())[:NAMED])
        notices.append(
            "This instruction is unlike those that the generator was trained on, so the edit may be a muddle."
            + (f" It knows: {known}." if known else "")
        )
    for part in condition.parts:
        if part.kind == REFERENCE_LATENT:
            width, height = knowledge.picture_size(hywu, *part.tokens.shape[-2:])
            if knowledge.strange_size(hywu, (width, height)):
                notices.append(
                    f"The picture has {width} x {height} pixels, far from the sizes that the generator was trained on "
                    f"({_sizes(handle)}). Scale it, for an edit as it was learned."
                )
    return notices


def _knows(handle: GeneratorHandle) -> list[tuple[str, str]]:
    hywu = handle.config.hywu
    texts = list(hywu.get("instructions", ()))
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    training = hywu.get("training")
    training = training if isinstance(training, dict) else {}
    trained = ", ".join(f"{training[name]} {name}" for name in ("steps", "pairs") if training.get(name))
    return [
        row
        for row in (
            ("Knows", "; ".join(texts[:NAMED]) + more if texts else "its file names no instructions"),
            ("The base reads", READS[knowledge.reads(hywu)]),
            ("Pictures", _sizes(handle)),
            ("Trained", trained),
        )
        if row[1]
    ]


def _sizes(handle: GeneratorHandle) -> str:
    sizes = handle.config.hywu.get(knowledge.KEY, {}).get("sizes", ())
    if not sizes:
        return ""
    small, large = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    first = f"{small[0]} x {small[1]}"
    return first if small == large else f"{first} to {large[0]} x {large[1]} pixels"
