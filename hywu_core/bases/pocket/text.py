"""The pocket editor's text encoder: a table of what words mean, wrapped as a stock `comfy.sd.CLIP`.

The table holds a short vector for each of 22 thousand words, made from what a language model says of each
(scripts/make_pocket_words.py), so that words of like meaning are alike. A vector is as long as the word is telling: "the"
is short. A word that is not in the table is read as the first word in it that one typing error makes of it; what is no such
word either is spelled in bytes, so no instruction is lost.

    B - prompts    L - tokens (32 per section, padded; longer prompts take more sections)    D - width (64)
    W - width of the table (48), the rest of D says which word came before
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from string import ascii_lowercase

import comfy.sd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import CheckpointError
from ...files.safetensors import open_safetensors, write_safetensors
from ...files.text import parse_json
from .clip import FIRST_BYTE, FIRST_WORD, Network, Vocabulary, clip_of

CONFIG_KEY = "pocket_words_config"  # of the file's metadata
WORDS_KEY = "pocket_words"
SHORTEST_MISTYPED = 4  # letters; shorter words have too many neighbours
TABLE, CODES, SCALES = "token_embedding.weight", "token_embedding.codes", "token_embedding.scales"


@dataclass(frozen=True)
class TextConfig:
    """Sizes and vocabulary of the text encoder. The order of `words` is the order of their tokens, and of preference where
    a mistyped word could be several.
    """

    words: tuple[str, ...] = field(repr=False)
    width: int = 64
    before: int = 16  # of the width, for the word before
    max_length: int = 32  # tokens of one section, start and end included

    def __post_init__(self):
        """Raises:
        ValueError: for sizes that are none.
        """
        sizes = self.width, self.before, self.max_length
        if not all(isinstance(size, int) for size in sizes) or not 0 <= self.before < self.width <= 4096:
            raise ValueError(f"width and before must be whole numbers, 0 <= before < width, found {sizes}")
        if not 2 < self.max_length <= 4096:
            raise ValueError(f"max_length must be 3 to 4096, found {self.max_length}")

    @property
    def tokens(self) -> int:
        return FIRST_WORD + len(self.words)

    @property
    def table_width(self) -> int:
        return self.width - self.before


class MendingVocabulary(Vocabulary):
    """Reads a mistyped word as the one that was meant."""

    def read(self, word: str) -> int | None:
        """The token of a word, or of the word that was meant; None if no word is one typing error away."""
        if word in self.words or len(word) < SHORTEST_MISTYPED or not word.isascii():
            return self.words.get(word)
        meant = (self.words[near] for near in _one_error_away(word) if near in self.words)
        return min(meant, default=None)


def _one_error_away(word: str) -> Iterator[str]:
    """What may have been meant: one letter too many, too few, another one, or two swapped."""
    for place in range(len(word) + 1):
        head, tail = word[:place], word[place:]
        yield from (head + letter + tail for letter in ascii_lowercase)
        if tail:
            yield head + tail[1:]
            yield from (head + letter + tail[1:] for letter in ascii_lowercase)
        if len(tail) > 1:
            yield head + tail[1] + tail[0] + tail[2:]


class WordTable(nn.Module):
    """Looks words up and says which came before, called by the host's `SDClipModel` with tokens that are embedded already.

    The start token and the pooled vector are the direction of the sum over all words, so of the whole phrase.
    """

    num_layers = 1  # which the host asks for

    def __init__(self, config: TextConfig, dtype=None, device=None, operations=None):
        super().__init__()
        self.before = config.before
        self.token_embedding = operations.Embedding(config.tokens, config.table_width, dtype=dtype, device=device)

    def get_input_embeddings(self):
        """The table, which the host looks tokens up in."""
        return self.token_embedding

    def forward(self, _tokens, attention_mask: Tensor, embeds: Tensor, dtype=torch.float32, **_options):
        """(B, L, W) embedded tokens and their (B, L) mask -> (tokens (B, L, D), None, pooled vector (B, D))."""
        words = embeds * attention_mask.unsqueeze(-1).to(embeds)
        before = F.pad(words[:, :-1, : self.before], (0, 0, 1, 0))
        whole = F.normalize(words.sum(1), dim=-1, eps=1e-3) * math.sqrt(words.shape[-1])
        pooled = F.pad(whole, (0, self.before))
        x = torch.cat([pooled.unsqueeze(1), torch.cat([words, before], dim=-1)[:, 1:]], dim=1)
        return x, None, pooled


def build_text_encoder(config: TextConfig, seed: int = 0) -> comfy.sd.CLIP:
    """A text encoder with words of no meaning as a CLIP. The same seed gives the same weights."""
    return text_encoder_from_state(initial_state(config, seed), config)


def load_text_encoder(path: str | Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Load a text encoder's file as a CLIP that the host can load again by itself.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a pocket text encoder.
    """
    with open_safetensors(Path(path), CheckpointError) as handle:
        metadata = handle.metadata() or {}
        if CONFIG_KEY not in metadata or WORDS_KEY not in metadata:
            raise CheckpointError(f"{path} is not a pocket text encoder: its metadata has no {CONFIG_KEY!r}.")
        stored = {name: handle.get_tensor(name) for name in handle.keys()}
    values = parse_json(metadata[CONFIG_KEY], f"{path} ({CONFIG_KEY})", CheckpointError)
    try:
        config = TextConfig(words=tuple(metadata[WORDS_KEY].split()), **values)
        state = {TABLE: stored[CODES].float() * stored[SCALES].float().unsqueeze(1)}
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is not a pocket text encoder: its {CONFIG_KEY} is damaged ({error!r})."
        ) from None
    clip = text_encoder_from_state(state, config, disable_dynamic)
    clip.patcher.cached_patcher_init = (_load_patcher, (str(path),))
    return clip


def save_text_encoder(
    state: dict[str, Tensor], config: TextConfig, path: str | Path, metadata: dict[str, str] | None = None
) -> Path:
    """Write a text encoder's file atomically, one byte a number: `state` is the table's state dict, metadata its
    provenance.
    """
    table = state[TABLE].float()
    scales = table.abs().amax(1).clamp_min(1e-8) / 127
    stored = {CODES: (table / scales.unsqueeze(1)).round().to(torch.int8), SCALES: scales}
    values = {name: value for name, value in asdict(config).items() if name != "words"}
    about = {CONFIG_KEY: json.dumps(values), WORDS_KEY: " ".join(config.words)}
    write_safetensors(Path(path), stored, {"format": "pt", **(metadata or {}), **about})
    return Path(path)


def text_encoder_from_state(state: dict[str, Tensor], config: TextConfig, disable_dynamic: bool = False):
    """Wrap weights as a stock CLIP under the host's memory management."""
    return clip_of(network_of(config), state, disable_dynamic)


def network_of(config: TextConfig) -> Network:
    """What encodes with this configuration, and what it reads."""
    return Network(partial(WordTable, config), config.words, config.max_length, config.table_width, MendingVocabulary)


def initial_state(config: TextConfig, seed: int) -> dict[str, Tensor]:
    """A seeded float32 table N(0, 1); the marks that are no words are zero, bytes half as long as words."""
    table = torch.randn((config.tokens, config.table_width), generator=torch.Generator().manual_seed(seed))
    table[:FIRST_BYTE] = 0
    table[FIRST_BYTE:FIRST_WORD] *= 0.5
    return {TABLE: table}


def _load_patcher(path: str, disable_dynamic: bool = False):
    return load_text_encoder(path, disable_dynamic).patcher
