"""The user's tokenizer.json: text to ids segment by segment, special tokens by their names, never by a number."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as FastTokenizer

from ...errors import CheckpointError
from .config import BaseConfig
from .sizes import buckets

TOKENIZER_FILE = "tokenizer.json"


class SpecialTokens(NamedTuple):
    """Ids of the tokens that structure a sequence."""

    bos: int
    eos: int
    boi: int
    eoi: int
    image: int
    cfg: int  # stands for every token of the instruction in the unconditional row
    timestep: int
    separator: int  # between the two runs of a source picture
    answer: int
    answer_end: int
    think: int
    think_end: int
    recaption: int
    recaption_end: int
    size: int  # of the base size
    ratios: tuple[int, ...]  # one for each bucket
    guidance: int | None  # Instruct-Distil only
    timestep_r: int | None


NAMES = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "boi": "<boi>",
    "eoi": "<eoi>",
    "image": "<img>",
    "cfg": "<cfg>",
    "timestep": "<timestep>",
    "separator": "<joint_img_sep>",
    "answer": "<answer>",
    "answer_end": "</answer>",
    "think": "<think>",
    "think_end": "</think>",
    "recaption": "<recaption>",
    "recaption_end": "</recaption>",
}


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, fast: FastTokenizer, special: SpecialTokens):
        self._fast, self.special = fast, special

    @classmethod
    def read(cls, folder: Path, config: BaseConfig) -> Tokenizer:
        """Load tokenizer.json of a folder.

        Raises:
            CheckpointError: if it is missing, unreadable, or lacks a token that the model needs.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {TOKENIZER_FILE}. Copy it from the repository of HunyuanImage-3.0-Instruct."
            )
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise CheckpointError(f"{path} is not a readable tokenizer ({error}). Download it again.") from None
        return cls(fast, _special_tokens(fast, config, path))

    def encode(self, text: str) -> list[int]:
        """Ids of one segment; nothing is added around it, and nothing merges across segments."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens by their names."""
        return self._fast.decode(ids, skip_special_tokens=False)


def _special_tokens(fast: FastTokenizer, config: BaseConfig, path: Path) -> SpecialTokens:
    names = dict(NAMES, size=f"<img_size_{config.image_base_size}>")
    ratios = [f"<img_ratio_{index}>" for index in range(len(buckets(config.image_base_size)))]
    optional = {"guidance": "<guidance>", "timestep_r": "<timestep_r>"}
    needed = [*names.values(), *ratios, *(optional.values() if config.distilled else ())]
    missing = [name for name in needed if fast.token_to_id(name) is None]
    if missing:
        raise CheckpointError(
            f"{path} lacks the tokens {', '.join(missing[:6])}{' and more' if len(missing) > 6 else ''}. It is the "
            "tokenizer of another model (the base HunyuanImage-3.0 lacks some); use the one of HunyuanImage-3.0-Instruct."
        )
    ids = {field: fast.token_to_id(name) for field, name in (names | optional).items()}
    return SpecialTokens(**ids, ratios=tuple(fast.token_to_id(name) for name in ratios))
