"""Editing tasks for the pocket editor as training pairs: a picture, an instruction, and the picture that is right.

Two regimes. In "blind" (R1) the base is told nothing and only the generator reads the instruction. In "told" (R2) the base
reads it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hywu_core.condition import CONDITIONING, REFERENCE_LATENT, Condition, ConditionPart, assemble
from hywu_core.config import GeneratorConfig
from hywu_core.training.data import Sample

from .edits import Edit

Regime = Literal["blind", "told"]
SEPARATOR = ", "  # of the picture's and the edit's name in a sample's key


class Words(NamedTuple):
    """An encoded instruction, as the host's CLIP gives it."""

    tokens: Tensor  # (1, L, D)
    pooled: Tensor  # (1, D)


class Case(NamedTuple):
    """One thing to do: which picture, which edit, in which words."""

    picture: int
    edit: int
    wording: int = 0


class EditingTask:
    """Every picture with every edit, the words drawn at random. See `hywu_core.training.SampleSource`.

    Args:
        clip: the pocket text encoder; used at once, not kept.
        pictures: (N, 3, H, W) in [0, 1]; `names` names them.
        config: of the generator to make conditions for; None where nothing reads one.
        regime: what the base reads, see above.
        silence: what a base that is told nothing reads; by default what `clip` makes of no words.
    """

    def __init__(
        self,
        clip: Any,
        pictures: Tensor,
        names: Sequence[str],
        edits: Sequence[Edit],
        config: GeneratorConfig | None = None,
        regime: Regime = "told",
        silence: Words | None = None,
    ):
        self.pictures, self.names, self.edits, self.config, self.regime = pictures, names, tuple(edits), config, regime
        self.words = [[encode_words(clip, text) for text in edit.wordings] for edit in self.edits]
        self.silence = silence or encode_words(clip, "")

    def __len__(self) -> int:
        return len(self.pictures) * len(self.edits)

    def sample(self, index: int, source: torch.Generator) -> Sample:
        """Pair `index`: the words are drawn from `source`."""
        picture, edit = divmod(index, len(self.edits))
        wording = int(torch.randint(len(self.words[edit]), (), generator=source))
        return self.pair(Case(picture, edit, wording))

    def pair(self, case: Case) -> Sample:
        return Sample(
            latent=to_latent(self.target(case))[0],
            conditioning=self.conditioning([case])[0],
            condition=self.condition([case])[0] if self.config else torch.empty(0, 0),
            key=f"{self.names[case.picture]}{SEPARATOR}{self.edits[case.edit].name}",
        )

    def target(self, case: Case) -> Tensor:
        """The right picture (1, 3, H, W)."""
        return self.edits[case.edit](self.pictures[case.picture : case.picture + 1])

    def targets(self, cases: Sequence[Case]) -> Tensor:
        """The right pictures (B, 3, H, W)."""
        return torch.cat([self.target(case) for case in cases])

    def conditioning(self, cases: Sequence[Case], words: bool | None = None) -> list:
        """What the base reads, as one CONDITIONING of a batch; `words` overrules the regime."""
        told = self.regime == "told" if words is None else words
        encoded = [self.words[case.edit][case.wording] if told else self.silence for case in cases]
        options = {"pooled_output": torch.cat([w.pooled for w in encoded]), "reference_latents": [self.sources(cases)]}
        return [[torch.cat([w.tokens for w in encoded]), options]]

    def condition(self, cases: Sequence[Case]) -> Tensor:
        """What the generator reads (B, L, input_dim)."""
        words = torch.cat([self.words[case.edit][case.wording].tokens for case in cases])
        parts = (ConditionPart(CONDITIONING, words), ConditionPart(REFERENCE_LATENT, self.sources(cases)))
        return assemble(Condition(parts), self.config)

    def sources(self, cases: Sequence[Case]) -> Tensor:
        """The latents of the pictures to edit (B, 3, H, W)."""
        return to_latent(self.pictures[[case.picture for case in cases]])

    def balanced_cases(self, count: int) -> list[Case]:
        """`count` cases, or all there are, over pictures of all kinds, every edit equally often; the same ones every time."""
        pictures, edits = len(self.pictures), len(self.edits)
        order = torch.randperm(pictures, generator=torch.Generator().manual_seed(0)).tolist()
        # after so many cases the same pictures would meet the same edits again
        turn = lcm(pictures, edits)
        chosen = range(min(count, pictures * edits))
        return [Case(order[(index + index // turn) % pictures], index % edits) for index in chosen]


class MixedSizes:
    """Pairs of several tasks whose pictures differ in size, drawn by their shares.

    Args:
        tasks: the same edits on pictures of one size each.
        shares: how often each is drawn, in proportion.
    """

    def __init__(self, tasks: Sequence[EditingTask], shares: Sequence[float]):
        self.tasks, self.shares = list(tasks), torch.tensor(shares)

    def __len__(self) -> int:
        return max(len(task) for task in self.tasks)

    def sample(self, _index: int, source: torch.Generator) -> Sample:
        """A pair; its size, picture and words are drawn from `source`."""
        task = self.tasks[int(torch.multinomial(self.shares, 1, generator=source))]
        return task.sample(int(torch.randint(len(task), (), generator=source)), source)


def edit_named_by(key: str) -> str:
    """The name of the edit in a sample's key."""
    return key.rpartition(SEPARATOR)[2]


def encode_words(clip: Any, text: str) -> Words:
    """An instruction through the host's CLIP."""
    with torch.inference_mode(False), torch.no_grad():
        tokens, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return Words(tokens.clone(), pooled.clone())


def to_latent(pictures: Tensor) -> Tensor:
    """Pixel space: [0, 1] -> [-1, 1]."""
    return pictures * 2 - 1


def from_latent(latents: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return ((latents + 1) / 2).clamp(0, 1)
