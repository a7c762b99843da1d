"""What the nodes of a generator say of it: what it is, what it knows, what it wrote, and what it was not made for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import knowledge
from ..condition import REFERENCE_LATENT, Condition, assemble, text_of
from ..layout import lora_elements
from ..lora import InstanceLora
from ..plan import parameters, plan
from ..training.memory import graph_bytes
from . import memory, told
from .cards import BARS, GOOD, NOTICE, Card, Chart
from .lora.charts import norms_of_layers
from .memory import GeneratorHandle

NAMED = 6  # instructions that a card names
MEASURED = 100e6  # elements of a LoRA up to which its norms are taken at once
READS = {
    knowledge.TOLD: "the instruction as well (told)",
    knowledge.BLIND: "an empty prompt (blind)",
    None: "not said in its file",
}
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Written(NamedTuple):
    """A LoRA, and what is said of it."""

    lora: InstanceLora
    card: Card


def loaded(handle: GeneratorHandle) -> Card:
    """Of a generator that was loaded or trained: what it is and what it knows."""
    needed = plan(handle.config, 1, memory.EXAMPLE_LENGTH, handle.compute_dtype).peak
    rows = (
        *_knows(handle),
        ("For", handle.config.hywu.get("base") or "HunyuanImage-3"),
        ("Size", _size(handle)),
        ("Writes", _writes(handle)),
        ("To generate", f"{_bytes(needed)} for a condition of {memory.EXAMPLE_LENGTH:,} tokens"),
    )
    return Card("What this generator knows", rows)


def made(handle: GeneratorHandle) -> Card:
    """Of a new generator."""
    graph = graph_bytes(handle.config, memory.EXAMPLE_LENGTH, torch.float32, recomputed=True)
    rows = (
        ("For", handle.config.hywu.get("base", "")),
        ("Size", _size(handle)),
        ("Writes", _writes(handle)),
        ("To train", f"{_bytes(graph)} a pair, with gradient_checkpointing and {memory.EXAMPLE_LENGTH:,} tokens"),
    )
    return Card("New: it changes nothing before it is trained", rows)


def saved(handle: GeneratorHandle, path: Path) -> Card:
    """Of a generator's file."""
    rows = (("File", str(path)), ("Size", _bytes(path.stat().st_size)), *_knows(handle))
    return Card("Saved", rows, ("Load HY-WU Generator lists it once the node definitions are refreshed (press R).",))


def generate(
    handle: GeneratorHandle, condition: Condition, keep_gb: float = 0.0, more: Sequence[Condition] = ()
) -> Written:
    """Write the LoRA of a condition, or of several as one batch, and say what there is to say. See `memory.generate`."""
    began, fresh, given = time.monotonic(), memory.Fresh(), (condition, *more)
    lora = memory.generate(handle, condition, keep_gb, more, fresh)
    seconds = time.monotonic() - began
    if not more:
        lora = told.marked(lora, condition, handle.config)
    notices = tuple(dict.fromkeys(notice for one in given for notice in strange(handle, one)))
    for notice in notices:
        logging.warning("HY-WU: %s", notice)
    rows = (
        ("Instruction", "; ".join(one.instruction or "(not given as text)" for one in given)),
        ("Targets", f"{len(lora.names)}, rank {lora.rank}, scale {lora.scale:g}"),
        ("Size", f"{_count(lora.elements)} numbers" + (f" in {lora.batch} LoRAs" if lora.batch > 1 else "")),
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
    if tokens is not None and knowledge.longer(hywu, tokens):
        notices.append(
            f"The condition has {tokens.shape[1]} tokens, and none trained on had more than "
            f"{hywu[knowledge.KEY]['length']}. Several instructions joined (Conditioning Concat) are not several edits: "
            "generate one LoRA for each, and blend them."
        )
    elif tokens is not None and knowledge.unknown(hywu, tokens):
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
    counts = [(training.get(name), name) for name in ("steps", "pairs")]
    trained = ", ".join(f"{count:,} {name}" for count, name in counts if isinstance(count, int) and count)
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


def _size(handle: GeneratorHandle) -> str:
    return f"{_count(parameters(handle.config))} parameters, {_bytes(handle.patcher.model_size())}"


def _writes(handle: GeneratorHandle) -> str:
    config = handle.config
    return f"LoRAs of rank {config.rank} with {_count(lora_elements(config))} numbers"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def _bytes(number: int) -> str:
    unit, size = next((found for found in UNITS if number >= found[1]), UNITS[-1])
    return f"{number / size:,.1f} {unit}"
