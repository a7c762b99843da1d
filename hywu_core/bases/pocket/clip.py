"""A network over words as a stock `comfy.sd.CLIP`: text to tokens and back, and what the host needs to run and keep it.

A word of the vocabulary is one token; any other word is spelled in bytes, so no instruction is lost.

    B - prompts    L - tokens of a section, padded; longer prompts take more sections    D - width
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...errors import CheckpointError

NAME = "pocket"  # of the encoder inside the host's CLIP
PAD, START, END = 0, 1, 2
FIRST_BYTE = 3  # 256 byte tokens follow, then the words
FIRST_WORD = FIRST_BYTE + 256
WORD = re.compile(r"[a-z]+|[^\sa-z]+")


class Vocabulary:
    """Text to token ids and back, in the shape that the host's `SDTokenizer` expects of a tokenizer class."""

    def __init__(self, words: tuple[str, ...]):
        self.words = {word: FIRST_WORD + index for index, word in enumerate(words)}
        self.texts = {token: word for word, token in self.words.items()}

    @classmethod
    def from_pretrained(cls, words: tuple[str, ...]) -> Vocabulary:
        """How the host's `SDTokenizer` makes its tokenizer."""
        return cls(words)

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = [START]
        for word in WORD.findall(text.lower()):
            known = self.read(word)
            spelled = (FIRST_BYTE + byte for byte in f" {word}".encode())  # the space keeps neighbours apart
            ids += spelled if known is None else [known]
        return {"input_ids": [*ids, END]}

    def read(self, word: str) -> int | None:
        """The token of a word; None if it is to be spelled."""
        return self.words.get(word)

    def get_vocab(self) -> dict[str, int]:
        special = {"<pad>": PAD, "<start>": START, "<end>": END}
        return special | {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)} | self.words

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Words and spelled bytes back to text; the spaces between words are normalised."""
        parts, spelled = [], bytearray()
        for token in [*token_ids, END]:
            if FIRST_BYTE <= token < FIRST_WORD:
                spelled.append(token - FIRST_BYTE)
                continue
            if spelled:
                parts.append(spelled.decode("utf-8", errors="replace").strip())
                spelled = bytearray()
            if token in self.texts:
                parts.append(self.texts[token])
        return " ".join(parts)


class Network(NamedTuple):
    """What encodes, and what it reads."""

    make: Callable[[Any, Any, Any], nn.Module]  # of dtype, device and operations; called by the host's `SDClipModel`
    words: tuple[str, ...]  # in the order of their tokens
    max_length: int  # tokens of one section, start and end included
    width: int  # of an embedded token
    vocabulary: type[Vocabulary] = Vocabulary

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight by its name."""
        # of torch's own layers: under dynamic VRAM the host's have no shapes before they are loaded
        state = self.make(torch.float32, "meta", torch.nn).state_dict()
        return {name: tuple(weight.shape) for name, weight in state.items()}


def clip_of(network: Network, state: dict[str, Tensor], disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A network with its weights under the host's memory management.

    Raises:
        CheckpointError: for weights that are not the network's.
    """
    expected = network.shapes()
    wrong = sorted(state.keys() ^ expected.keys())
    wrong += [name for name in state.keys() & expected.keys() if tuple(state[name].shape) != expected[name]]
    if wrong:
        raise CheckpointError(f"These are not the weights of this text encoder; they differ in {', '.join(wrong[:8])}.")
    target = comfy.supported_models_base.ClipTarget(partial(_tokenizer, network), partial(_encoder, network))
    return comfy.sd.CLIP(
        target,
        parameters=sum(tensor.numel() for tensor in state.values()),
        state_dict=[dict(state)],
        model_options={"dtype": torch.float32},  # a few megabytes: nothing to gain from the host's float16
        disable_dynamic=disable_dynamic,
    )


def _tokenizer(network: Network, embedding_directory=None, tokenizer_data=None):
    return comfy.sd1_clip.SD1Tokenizer(
        embedding_directory, tokenizer_data or {}, name=NAME, tokenizer=partial(_section_tokenizer, network)
    )


def _section_tokenizer(network: Network, embedding_directory=None, tokenizer_data=None):
    return comfy.sd1_clip.SDTokenizer(
        tokenizer_path=network.words,
        tokenizer_class=network.vocabulary,
        max_length=network.max_length,
        pad_with_end=False,
        pad_token=PAD,
        embedding_directory=embedding_directory,
        embedding_size=network.width,
        embedding_key=NAME,
        tokenizer_data=tokenizer_data or {},
    )


def _encoder(network: Network, device="cpu", dtype=None, model_options=None):
    section = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=network.max_length,
        textmodel_json_config={},
        model_class=lambda _json, dtype, device, operations: network.make(dtype, device, operations),
        special_tokens={"start": START, "end": END, "pad": PAD},
        enable_attention_masks=True,
    )
    return comfy.sd1_clip.SD1ClipModel(device, dtype, model_options or {}, name=NAME, clip_model=section)
