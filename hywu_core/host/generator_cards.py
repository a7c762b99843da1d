"""What the nodes of a generator say of it: what it is, what it knows, what it wrote, and what it was not made for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import knowledge
from ..condition import REFERENCE_LATENT, Condition, assemble, text_of
from ..layout import lora_elements
from ..lineage import thinned
from ..lora import InstanceLora
from ..messages import Message, listed
from ..plan import parameters, plan
from ..training.memory import graph_bytes
from . import memory, told
from .cards import BARS, NOTICE, Card, Chart
from .lora.charts import norms_of_layers
from .lora.lora_cards import targets
from .memory import GeneratorHandle

NAMED = 6  # instructions that a card names
MEASURED = 100e6  # elements of a LoRA up to which its norms are taken at once
READS = {
    knowledge.TOLD: Message("the instruction as well (told)"),
    knowledge.BLIND: Message("an empty prompt (blind)"),
    None: Message("not said in its file"),
}
NOT_AS_TEXT = Message("(not given as text)")
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
        (
            "To generate",
            Message(
                "{size} for a condition of {length} tokens", size=_bytes(needed), length=f"{memory.EXAMPLE_LENGTH:,}"
            ),
        ),
    )
    return Card("What this generator knows", rows)


def made(handle: GeneratorHandle) -> Card:
    """Of a new generator."""
    graph = graph_bytes(handle.config, memory.EXAMPLE_LENGTH, torch.float32, recomputed=True)
    rows = (
        ("For", handle.config.hywu.get("base", "")),
        ("Size", _size(handle)),
        ("Writes", _writes(handle)),
        (
            "To train",
            Message(
                "{size} a pair, with gradient_checkpointing and {length} tokens",
                size=_bytes(graph),
                length=f"{memory.EXAMPLE_LENGTH:,}",
            ),
        ),
    )
    return Card("New: it changes nothing before it is trained", rows)


def saved(handle: GeneratorHandle, path: Path) -> Card:
    """Of a generator's file."""
    rows = (("File", str(path)), ("Size", _bytes(path.stat().st_size)), *_knows(handle))
    note = Message("Load HY-WU Generator lists it once the node definitions are refreshed (press R).")
    return Card("Saved", rows, (note,))


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
        ("Instruction", listed([one.instruction or NOT_AS_TEXT for one in given], "{first}; {second}")),
        ("Targets", targets(lora)),
        ("Size", _numbers(lora)),
        ("Time", _time(seconds, fresh.made)),
        ("The base reads", READS[knowledge.reads(handle.config.hywu)]),
    )
    bars = ()
    if lora.elements <= MEASURED:
        bars = (Chart(BARS, "How much it changes, layer by layer", tuple(norms_of_layers(lora))),)
    if notices:
        return Written(lora, Card("Wrote a LoRA, but it may not do what is meant", rows, notices, NOTICE, bars))
    return Written(lora, Card("Wrote a LoRA for this edit", rows, charts=bars))


def strange(handle: GeneratorHandle, condition: Condition) -> list[Message]:
    """In what a condition is far from all that a generator was trained on, as far as its file says that."""
    hywu, notices = handle.config.hywu, []
    tokens = text_of(assemble(condition, handle.config), handle.config)
    if tokens is not None and knowledge.longer(hywu, tokens):
        notices.append(
            Message(
                "The condition has {count} tokens, and none trained on had more than {most}. Several instructions joined "
                "(Conditioning Concat) are not several edits: generate one LoRA for each, and blend them.",
                count=tokens.shape[1],
                most=hywu[knowledge.KEY]["length"],
            )
        )
    elif tokens is not None and knowledge.unknown(hywu, tokens):
        notices.append(_unlike("; ".join(thinned(hywu.get("instructions", ()), NAMED))))
    for part in condition.parts:
        if part.kind == REFERENCE_LATENT:
            width, height = knowledge.picture_size(hywu, *part.tokens.shape[-2:])
            if knowledge.strange_size(hywu, (width, height)):
                notices.append(
                    Message(
                        "The picture has {width} x {height} pixels, far from the sizes that the generator was trained on "
                        "({sizes}). Scale it, for an edit as it was learned.",
                        width=width,
                        height=height,
                        sizes=_sizes(handle),
                    )
                )
    return notices


def _unlike(known: str) -> Message:
    said = Message("This instruction is unlike those that the generator was trained on, so the edit may be a muddle.")
    return Message("{said} It knows: {instructions}.", said=said, instructions=known) if known else said


def _numbers(lora: InstanceLora) -> Message:
    numbers = _count(lora.elements)
    if lora.batch == 1:
        return Message("{count} numbers", count=numbers)
    return Message("{count} numbers in {batch} LoRAs", count=numbers, batch=lora.batch)


def _time(seconds: float, generated: bool) -> Message:
    spent = f"{seconds:.2f}"
    if generated:
        return Message("{seconds} s, generated now", seconds=spent)
    return Message("{seconds} s, read from the disk", seconds=spent)


def _knows(handle: GeneratorHandle) -> list[tuple[str, str]]:
    hywu = handle.config.hywu
    return [
        row
        for row in (
            ("Knows", _instructions(list(hywu.get("instructions", ())))),
            ("The base reads", READS[knowledge.reads(hywu)]),
            ("Pictures", _sizes(handle)),
            ("Trained", _trained(hywu.get("training"))),
        )
        if row[1]
    ]


def _instructions(texts: Sequence[str]) -> str:
    if not texts:
        return Message("its file names no instructions")
    named, more = "; ".join(thinned(texts, NAMED)), len(texts) - NAMED
    return Message("{names} and {count} more", names=named, count=more) if more > 0 else named


def _trained(training: Any) -> str:
    counts = training if isinstance(training, dict) else {}
    steps, pairs = (count if isinstance(count := counts.get(name), int) else 0 for name in ("steps", "pairs"))
    said = [Message("{count} steps", count=f"{steps:,}")] if steps else []
    return listed([*said, *([Message("{count} pairs", count=f"{pairs:,}")] if pairs else [])])


def _sizes(handle: GeneratorHandle) -> str:
    sizes = handle.config.hywu.get(knowledge.KEY, {}).get("sizes", ())
    if not sizes:
        return ""
    small, large = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    first = f"{small[0]} x {small[1]}"
    if small == large:
        return first
    return Message("{smallest} to {largest} pixels", smallest=first, largest=f"{large[0]} x {large[1]}")


def _size(handle: GeneratorHandle) -> Message:
    count, size = _count(parameters(handle.config)), _bytes(handle.patcher.model_size())
    return Message("{count} parameters, {size}", count=count, size=size)


def _writes(handle: GeneratorHandle) -> Message:
    config = handle.config
    return Message("LoRAs of rank {rank} with {count} numbers", rank=config.rank, count=_count(lora_elements(config)))


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def _bytes(number: int) -> str:
    unit, size = next((found for found in UNITS if number >= found[1]), UNITS[-1])
    return f"{number / size:,.1f} {unit}"
