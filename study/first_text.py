"""The pocket editor's text encoder: two transformer layers over words, wrapped as a stock `comfy.sd.CLIP`.

A word of the shipped vocabulary is one token; any other word is spelled in bytes, so no instruction is lost.

    B - prompts    L - tokens (32 per section, padded; longer prompts take more sections)    D - width (64)
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention_for_device
from torch import Tensor, nn

from hywu_core.errors import CheckpointError
from hywu_core.files.safetensors import open_safetensors, write_safetensors
from hywu_core.files.text import parse_json

CONFIG_KEY = "pocket_text_config"  # of the file's metadata
NAME = "pocket"  # of the encoder inside the host's CLIP
PAD, START, END = 0, 1, 2
FIRST_BYTE = 3  # 256 byte tokens follow, then the words
FIRST_WORD = FIRST_BYTE + 256
WORD = re.compile(r"[a-z]+|[^\sa-z]+")
NORM = re.compile(r"norm\d?\.weight$")


@dataclass(frozen=True)
class TextConfig:
    """Sizes and vocabulary of the text encoder. The order of `words` is the order of their tokens."""

    words: tuple[str, ...] = field(repr=False)
    width: int = 64
    heads: int = 4
    depth: int = 2
    max_length: int = 32  # tokens of one section, start and end included

    @property
    def tokens(self) -> int:
        return FIRST_WORD + len(self.words)


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
            spelled = (FIRST_BYTE + byte for byte in f" {word}".encode())  # the space keeps neighbours apart
            ids += [self.words[word]] if word in self.words else spelled
        return {"input_ids": [*ids, END]}

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


class _Block(nn.Module):
    """A pre-norm transformer block. Out of place, unlike the host's CLIPLayer, so that it can be trained."""

    def __init__(self, config: TextConfig, dtype, device, operations):
        super().__init__()
        width = config.width
        self.layer_norm1 = operations.LayerNorm(width, dtype=dtype, device=device)
        self.self_attn = comfy.clip_model.CLIPAttention(width, config.heads, dtype, device, operations)
        self.layer_norm2 = operations.LayerNorm(width, dtype=dtype, device=device)
        self.mlp = comfy.clip_model.CLIPMLP(width, 4 * width, "gelu_pytorch_tanh", dtype, device, operations)

    def forward(self, x: Tensor, mask: Tensor, attention) -> Tensor:  # (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x), mask, attention)
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    """Bidirectional transformer, called by the host's `SDClipModel` with tokens that are embedded already."""

    def __init__(self, config: TextConfig, dtype=None, device=None, operations=None):
        super().__init__()
        self.num_layers = config.depth
        self.token_embedding = operations.Embedding(config.tokens, config.width, dtype=dtype, device=device)
        self.position_embedding = operations.Embedding(config.max_length, config.width, dtype=dtype, device=device)
        self.layers = nn.ModuleList(_Block(config, dtype, device, operations) for _ in range(config.depth))
        self.final_layer_norm = operations.LayerNorm(config.width, dtype=dtype, device=device)

    def get_input_embeddings(self):
        """The token table, which the host looks tokens up in."""
        return self.token_embedding

    def forward(self, _tokens, attention_mask: Tensor, embeds: Tensor, dtype=torch.float32, **_options):
        """(B, L, D) embedded tokens and their (B, L) mask -> (tokens (B, L, D), None, pooled start token (B, D))."""
        positions = comfy.ops.cast_to(self.position_embedding.weight, dtype=dtype, device=embeds.device)
        x = embeds + positions[: embeds.shape[1]]
        hidden = attention_mask[:, None, None, :].expand(-1, 1, x.shape[1], -1) == 0
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, -torch.finfo(x.dtype).max)
        attention = optimized_attention_for_device(x.device, mask=True, small_input=True)
        for layer in self.layers:
            x = layer(x, mask, attention)
        x = self.final_layer_norm(x)
        return x, None, x[:, 0]


def build_text_encoder(config: TextConfig, seed: int = 0) -> comfy.sd.CLIP:
    """A freshly initialised text encoder as a CLIP, for training. The same seed gives the same weights."""
    return text_encoder_from_state(initial_state(config, seed), config)


def load_text_encoder(path: str | Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Load a text encoder's file as a CLIP that the host can load again by itself.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a pocket text encoder.
    """
    with open_safetensors(Path(path), CheckpointError) as handle:
        text = (handle.metadata() or {}).get(CONFIG_KEY)
        if text is None:
            raise CheckpointError(f"{path} is not a pocket text encoder: its metadata has no {CONFIG_KEY!r}.")
        state = {name: handle.get_tensor(name) for name in handle.keys()}
    values = parse_json(text, f"{path} ({CONFIG_KEY})", CheckpointError)
    try:
        config = TextConfig(**values | {"words": tuple(values["words"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a pocket text encoder: its {CONFIG_KEY} is damaged ({error!r})."
        ) from None
    clip = text_encoder_from_state(state, config, disable_dynamic)
    clip.patcher.cached_patcher_init = (_load_patcher, (str(path),))
    return clip


def save_text_encoder(
    state: dict[str, Tensor],
    config: TextConfig,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a text encoder's file atomically: `state` is the transformer's state dict, metadata its provenance."""
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    write_safetensors(Path(path), stored, {"format": "pt", **(metadata or {}), CONFIG_KEY: json.dumps(asdict(config))})
    return Path(path)


def text_encoder_from_state(state: dict[str, Tensor], config: TextConfig, disable_dynamic: bool = False):
    """Wrap weights as a stock CLIP under the host's memory management."""
    expected = _transformer(config).state_dict()
    wrong = sorted(state.keys() ^ expected.keys())
    wrong += [name for name in state.keys() & expected.keys() if state[name].shape != expected[name].shape]
    if wrong:
        raise CheckpointError(f"These are not the weights of this text encoder; they differ in {', '.join(wrong[:8])}.")
    target = comfy.supported_models_base.ClipTarget(partial(_tokenizer, config), partial(_encoder, config))
    parameters = sum(tensor.numel() for tensor in state.values())
    return comfy.sd.CLIP(
        target,
        parameters=parameters,
        state_dict=[dict(state)],
        model_options={"dtype": torch.float32},  # half a megabyte: nothing to gain from the host's float16
        disable_dynamic=disable_dynamic,
    )


def initial_state(config: TextConfig, seed: int) -> dict[str, Tensor]:
    """Seeded float32 weights: matrices N(0, 1/fan_in), embeddings N(0, 1), positions N(0, 0.02^2), norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in _transformer(config).state_dict().items():
        if tensor.ndim == 1:
            state[name] = torch.ones(tensor.shape) if NORM.search(name) else torch.zeros(tensor.shape)
        else:
            std = {"token_embedding.weight": 1.0, "position_embedding.weight": 0.02}.get(name)
            state[name] = torch.randn(tensor.shape, generator=generator) * (std or 1 / math.sqrt(tensor.shape[1]))
    return state


def _load_patcher(path: str, disable_dynamic: bool = False):
    return load_text_encoder(path, disable_dynamic).patcher


def _transformer(config: TextConfig) -> TextTransformer:
    """Without weights, of torch's own layers: under dynamic VRAM the host's have no shapes before they are loaded."""
    return TextTransformer(config, torch.float32, "meta", torch.nn)


def _tokenizer(config: TextConfig, embedding_directory=None, tokenizer_data=None):
    return comfy.sd1_clip.SD1Tokenizer(
        embedding_directory, tokenizer_data or {}, name=NAME, tokenizer=partial(_section_tokenizer, config)
    )


def _section_tokenizer(config: TextConfig, embedding_directory=None, tokenizer_data=None):
    return comfy.sd1_clip.SDTokenizer(
        tokenizer_path=config.words,
        tokenizer_class=Vocabulary,
        max_length=config.max_length,
        pad_with_end=False,
        pad_token=PAD,
        embedding_directory=embedding_directory,
        embedding_size=config.width,
        embedding_key=NAME,
        tokenizer_data=tokenizer_data or {},
    )


def _encoder(config: TextConfig, device="cpu", dtype=None, model_options=None):
    section = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=config.max_length,
        textmodel_json_config={},
        model_class=lambda _json, dtype, device, operations: TextTransformer(config, dtype, device, operations),
        special_tokens={"start": START, "end": END, "pad": PAD},
        enable_attention_masks=True,
    )
    return comfy.sd1_clip.SD1ClipModel(device, dtype, model_options or {}, name=NAME, clip_model=section)
