"""The first editor's text encoder: two transformer layers over words. A word of its vocabulary is one token; any
other word is spelled in bytes.

    B - prompts    L - tokens (32 per section, padded)    D - width (64)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.ops
import comfy.sd
import torch
from comfy.ldm.modules.attention import optimized_attention_for_device
from torch import Tensor, nn

from hywu_core.bases.pocket.clip import FIRST_WORD, Network, clip_of
from hywu_core.errors import CheckpointError
from hywu_core.files.safetensors import open_safetensors
from hywu_core.files.text import parse_json

CONFIG_KEY = "pocket_text_config"  # of the file's metadata


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


def load_text_encoder(path: Path) -> comfy.sd.CLIP:
    """The encoder of a file.

    Raises:
        CheckpointError: if the file is missing, damaged, or another.
    """
    with open_safetensors(path, CheckpointError) as handle:
        values = parse_json((handle.metadata() or {})[CONFIG_KEY], f"{path} ({CONFIG_KEY})", CheckpointError)
        state = {name: handle.get_tensor(name).float() for name in handle.keys()}
    config = TextConfig(**values | {"words": tuple(values["words"])})
    return clip_of(Network(partial(TextTransformer, config), config.words, config.max_length, config.width), state)
