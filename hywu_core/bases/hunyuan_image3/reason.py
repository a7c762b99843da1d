"""Reasoning: the base writes, token by token, how it understands an edit, before any image is made. Source: reference fact 6.

The text is what the node HunyuanImage-3 Edit takes back: <think>...</think><recaption>...</recaption>. Where it changes from
thinking to rewriting is forced; where it ends is decided by the model, or by a limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from .edit import Edit
from .sequence import Start
from .text_mode import prepare
from .tokenizer import SpecialTokens, Tokenizer

Mode = Literal["think and recaption", "recaption", "think"]
MODES: tuple[Mode, ...] = ("think and recaption", "recaption", "think")
OPENING: dict[Mode, Start] = {"think and recaption": "think", "recaption": "recaption", "think": "think"}


class Choice(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.6  # 0 takes the likeliest
    top_k: int = 1024
    top_p: float = 0.95

    def next(self, logits: Tensor, source: torch.Generator) -> int:
        """One token of scores (vocabulary,), float32 on the CPU.

        As the reference: temperature, the k likeliest, then the fewest of these whose shares reach top_p.
        """
        if self.temperature <= 0:
            return int(logits.argmax())
        scores, tokens = logits.div(self.temperature).topk(min(self.top_k or len(logits), len(logits)))
        shares = scores.softmax(dim=-1)
        before = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(before >= self.top_p, 0.0)
        return int(tokens[torch.multinomial(shares, 1, generator=source)])


def reason(
    model: comfy.model_patcher.ModelPatcher,
    edit: Edit,
    mode: Mode = "think and recaption",
    seed: int = 0,
    choice: Choice | None = None,
    most_tokens: int = 2048,
    watch: Callable[[str], None] | None = None,
) -> str:
    """Let the base reason about an edit. The same seed gives the same text.

    Args:
        most_tokens: the text ends here at the latest, its open tag closed.
        watch: is told the text so far.
    Returns:
        text in complete tags.
    Raises:
        ConditionError: if the MODEL is another base, or the sequence is too long.
    """
    tokenizer = edit.builder.tokenizer
    ids = generate(model, edit, mode, seed, choice or Choice(), most_tokens, watch)
    return _in_tags(tokenizer.decode(ids), mode, tokenizer)


def generate(
    model: comfy.model_patcher.ModelPatcher,
    edit: Edit,
    mode: Mode,
    seed: int,
    choice: Choice,
    most_tokens: int,
    watch: Callable[[str], None] | None = None,
) -> list[int]:
    """The ids that the base writes after the opening tag, the one that ended it included. Shows progress; the host's cancel
    button works between tokens.
    """
    tokenizer, special = edit.builder.tokenizer, edit.builder.tokenizer.special
    sequence = edit.reason_sequence(OPENING[mode])
    ready = prepare(model, edit, sequence, more_tokens=most_tokens)
    source = torch.Generator().manual_seed(seed)
    bar = comfy.utils.ProgressBar(most_tokens)
    stops, forced = _stops(special, mode), _forced(special, mode)
    hidden, past = ready.decoder.prefill(
        ready.ids, sequence.layout, ready.sources, ready.dtype, more=most_tokens, options=ready.options
    )
    written: list[int] = []
    while len(written) < most_tokens:
        comfy.model_management.throw_exception_if_processing_interrupted()
        after = forced.get(written[-1]) if written else None
        token = after if after is not None else choice.next(_scores(ready.decoder, hidden), source)
        written.append(token)
        bar.update(1)
        if watch is not None:
            watch(tokenizer.decode(written))
        if token in stops:
            break
        hidden = ready.decoder.decode(torch.tensor([[token]], device=ready.ids.device), past, ready.dtype)
    return written


def _scores(decoder, hidden: Tensor) -> Tensor:
    return decoder.logits(hidden[:, -1:])[0, 0].cpu()


def _stops(special: SpecialTokens, mode: Mode) -> set[int]:
    """What ends it: the closing tag; and what only comes when the model goes on to something else."""
    end = special.think_end if mode == "think" else special.recaption_end
    return {end, special.eos, special.answer_end, *special.ratios}


def _forced(special: SpecialTokens, mode: Mode) -> dict[int, int]:
    """{token: the one that must follow it}."""
    return {special.think_end: special.recaption} if mode == "think and recaption" else {}


def _in_tags(text: str, mode: Mode, tokenizer: Tokenizer) -> str:
    """The text with its opening tag, and cut or closed so that every tag is complete."""
    opening = OPENING[mode]
    text = f"<{opening}>{text}"
    for stop in (tokenizer.special.eos, tokenizer.special.answer_end, *tokenizer.special.ratios):
        text = text.removesuffix(tokenizer.decode([stop]))
    for tag in ("think", "recaption"):
        if text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>"):
            text += f"</{tag}>"
    return text.removesuffix("<recaption></recaption>")
