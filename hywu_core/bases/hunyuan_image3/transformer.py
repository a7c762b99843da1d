"""The decoder of HunyuanImage-3 as a diffusion model of the host.

Letters: B batch · L tokens · H hidden size · P tokens of a prefix that was computed before · C latent channels

Two uses. `forward` is one step of an image pass: the host's latents and timesteps in, a velocity out. `prefill` and `decode`
are text mode: hidden states, and with `logits` the next token. Source: reference facts 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.ldm.modules.attention
import comfy.model_prefetch
import comfy.patcher_extension
import comfy.rmsnorm
import torch
from torch import Tensor, nn

from . import geometry
from .config import BaseConfig
from .geometry import Rows
from .image_ends import FinalLayer, PatchEmbed, TimestepEmbedder
from .moe import MixtureOfExperts
from .prefix_cache import GrowingKeysValues, KeysValues, PrefixKey, usable
from .sequence import Layout

Past = KeysValues | GrowingKeysValues

TINY = 1e-3  # difference of timesteps that is rounding
ADAPTERS = "hywu"  # where a bypass leaves (identity, strength) of what acts beside the weights


class Sources(NamedTuple):
    """What the source pictures give, in their order."""

    latents: tuple[Tensor, ...] = ()  # (B, C, h, w), scaled as the model's own latents
    vision: tuple[Tensor, ...] = ()  # (B, slots, H), the vision tower's tokens


class Stretch(NamedTuple):
    """The tokens that one run through the layers computes: rotary tables and the queries' rows, from `offset` on."""

    offset: int
    cos: Tensor
    sin: Tensor
    rows: tuple[Rows, ...]

    @classmethod
    def of(cls, layout: Layout, config: BaseConfig, device: torch.device, offset: int = 0) -> Stretch:
        """Everything of a layout after its first `offset` tokens."""
        places = geometry.positions(layout, device)[offset:]
        cos, sin = geometry.rotary(places, config.attention_head_dim, config.rope_theta)
        rows = [row for row in geometry.attention_rows(layout) if row.stop > offset]
        if rows and rows[0].start < offset:  # the rest of a causal stretch is a causal stretch
            rows[0] = rows[0]._replace(start=offset)
        return cls(offset, cos, sin, tuple(rows))


class Attention(nn.Module):
    """Grouped-query attention. Rows of the fused projection: for each key head its queries, the key, the value."""

    def __init__(self, config: BaseConfig, operations: Any, **factory: Any):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.attention_head_dim
        self.qkv_proj = operations.Linear(config.hidden_size, config.qkv_features, bias=False, **factory)
        self.o_proj = operations.Linear(self.heads * self.head_dim, config.hidden_size, bias=False, **factory)
        norm = {"eps": config.rms_norm_eps, **factory}
        self.query_layernorm = operations.RMSNorm(self.head_dim, **norm)
        self.key_layernorm = operations.RMSNorm(self.head_dim, **norm)

    def forward(self, x: Tensor, stretch: Stretch, past: Past | None) -> tuple[Tensor, KeysValues]:
        """x (B, L, H) -> (B, L, H), and the keys and values of x alone (B, kv_heads, L, head_dim)."""
        grouped = self.qkv_proj(x).unflatten(-1, (self.kv_heads, -1, self.head_dim))
        queries, keys, values = grouped.split((self.heads // self.kv_heads, 1, 1), dim=3)
        q = self._turned(queries.flatten(2, 3), self.query_layernorm, stretch)
        k = self._turned(keys.flatten(2, 3), self.key_layernorm, stretch)
        v = values.flatten(2, 3).transpose(1, 2)
        own = k, v
        if isinstance(past, GrowingKeysValues):
            k, v = past.add(own)
        elif past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, own, strict=True))
        return self.o_proj(_attend(q, k, v, stretch)), own

    def _turned(self, x: Tensor, norm: nn.Module, stretch: Stretch) -> Tensor:
        """(B, L, heads, head_dim) -> (B, heads, L, head_dim): rotated, then normalised, in float32."""
        turned = geometry.rotate(x.transpose(1, 2).float(), stretch.cos, stretch.sin)
        return comfy.rmsnorm.rms_norm(turned, norm.weight, norm.eps).to(x.dtype)


class Layer(nn.Module):
    """Attention and a mixture of experts, each on a normalised copy."""

    def __init__(self, config: BaseConfig, operations: Any, **factory: Any):
        super().__init__()
        self.self_attn = Attention(config, operations, **factory)
        self.mlp = MixtureOfExperts(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.moe_topk,
            operations,
            shared_intermediate=config.shared_intermediate_size,
            **factory,
        )
        norm = {"eps": config.rms_norm_eps, **factory}
        self.input_layernorm = operations.RMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = operations.RMSNorm(config.hidden_size, **norm)

    def forward(self, x: Tensor, stretch: Stretch, past: Past | None) -> tuple[Tensor, KeysValues]:
        """See `Attention.forward`."""
        attended, own = self.self_attn(self.input_layernorm(x), stretch, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Decoder(nn.Module):
    """Token embeddings, the layers, and the norm that only the next token is read through."""

    def __init__(self, config: BaseConfig, operations: Any, **factory: Any):
        super().__init__()
        self.wte = operations.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Layer(config, operations, **factory) for _ in range(config.num_hidden_layers))
        self.ln_f = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)

    def forward(
        self, x: Tensor, stretch: Stretch, past: Sequence[Past] | None, keep: int | None, options: dict[str, Any]
    ) -> tuple[Tensor, list[KeysValues]]:
        """x (B, L, H) -> the last layer's output (B, L, H), and every layer's keys and values of the first `keep` tokens."""
        kept = []
        queue = comfy.model_prefetch.make_prefetch_queue(list(self.layers), x.device, options)
        for index, layer in enumerate(self.layers):
            comfy.model_prefetch.prefetch_queue_pop(queue, x.device, layer)
            x, own = layer(x, stretch, past[index] if past else None)
            if keep:
                kept.append(tuple(part[:, :, :keep].clone() for part in own))
        comfy.model_prefetch.prefetch_queue_pop(queue, x.device, None)
        return x, kept


class HunyuanImage3(nn.Module):
    """What the host calls the diffusion model."""

    def __init__(self, config: BaseConfig, dtype=None, device=None, operations=None, **_: Any):
        super().__init__()
        self.config, self.dtype = config, dtype
        factory = {"device": device, "dtype": dtype}
        hidden, channels, inner = config.hidden_size, config.vae.latent_channels, config.patch_embed_hidden_dim
        self.model = Decoder(config, operations, **factory)
        self.lm_head = operations.Linear(hidden, config.vocab_size, bias=False, **factory)
        self.patch_embed = PatchEmbed(channels, inner, hidden, operations, **factory)
        self.final_layer = FinalLayer(hidden, inner, channels, operations, **factory)
        self.timestep_emb = TimestepEmbedder(hidden, operations, **factory)
        self.time_embed = TimestepEmbedder(hidden, operations, **factory)
        self.time_embed_2 = TimestepEmbedder(hidden, operations, **factory)
        if config.distilled:
            self.guidance_emb = TimestepEmbedder(hidden, operations, **factory)
            self.timestep_r_emb = TimestepEmbedder(hidden, operations, **factory)

    def forward(self, x: Tensor, timesteps: Tensor, transformer_options: dict | None = None, **kwargs: Any) -> Tensor:
        """One step of an image pass, inside the host's DIFFUSION_MODEL wrappers; see `_forward`."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, transformer_options=options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        transformer_options: dict,
        ids: Tensor,
        layout: Layout,
        latents: list[Tensor] | None = None,
        vision: list[Tensor] | None = None,
        guidance: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The velocity.

        Args:
            x: (B, C, h, w) or (B, C, 1, h, w), noisy latents of the layout's grid.
            timesteps: (B,), 1000 at pure noise.
            ids: (B, L or more), of one image sequence; latents, vision: see `Sources`.
            guidance: (B,), read by Instruct-Distil only.
        Returns:
            of x's shape, float32.
        """
        layout = layout.without_tail()
        sources = Sources(tuple(latents or ()), tuple(vision or ()))
        numbers = [self.timestep_emb(timesteps, x.dtype)]
        if self.config.distilled:
            numbers.append(self.guidance_emb(1000 * guidance, x.dtype))
            numbers.append(self.timestep_r_emb(_next_timesteps(timesteps, transformer_options), x.dtype))
        image = self._image_tokens(x.flatten(2, 3) if x.ndim == 5 else x, timesteps, numbers)
        hidden = self._run_image(ids, layout, sources, image, transformer_options)
        cells = layout.image.image.length
        velocity = self.final_layer(hidden[:, -cells:], self.time_embed_2(timesteps, x.dtype), layout.image.grid)
        return velocity.float().view_as(x)

    def prefill(
        self,
        ids: Tensor,
        layout: Layout,
        sources: Sources,
        dtype: torch.dtype,
        more: int = 0,
        options: dict | None = None,
    ) -> tuple[Tensor, list[GrowingKeysValues]]:
        """Text mode: the last layer's output for every token (B, L, H), before the final norm; and the keys and values, if
        `more` tokens are to follow.
        """
        x = self._tokens(ids, layout, sources, dtype)
        stretch = Stretch.of(layout, self.config, x.device)
        past = [GrowingKeysValues(layout.length + more) for _ in self.model.layers] if more else []
        return self.model(x, stretch, past, None, options or {})[0], past

    def decode(self, token: Tensor, past: list[GrowingKeysValues], dtype: torch.dtype) -> Tensor:
        """Text mode: the hidden state (B, 1, H) of one more token (B, 1), which is added to what `prefill` kept.

        Nothing is fetched ahead: of a layer's experts, a token needs a few.
        """
        position = past[0].length
        x = self.model.wte(token, out_dtype=dtype)
        stretch = Stretch.of(Layout(position + 1, (), None), self.config, x.device, offset=position)
        return self.model(x, stretch, past, None, {})[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: (B, L, H) -> (B, L, vocabulary), float32."""
        return self.lm_head(self.model.ln_f(hidden)).float()

    def _run_image(self, ids: Tensor, layout: Layout, sources: Sources, image: Tensor, options: dict) -> Tensor:
        """Hidden states of the image's tokens; the prefix comes from the run's cache where it is there."""
        start = layout.image.timestep
        cache, key = (
            usable(options),
            PrefixKey(layout, options.get(ADAPTERS, ()), (ids, *sources.latents, *sources.vision)),
        )
        past = cache.find(key) if cache is not None else None
        if past is not None:
            stretch = Stretch.of(layout, self.config, image.device, offset=start)
            return self.model(image, stretch, past, None, options)[0]
        prefix = self._tokens(ids[:, :start], layout, sources, image.dtype)
        stretch = Stretch.of(layout, self.config, image.device)
        keep = start if cache is not None else None
        hidden, kept = self.model(torch.cat((prefix, image), dim=1), stretch, None, keep, options)
        if cache is not None:
            cache.keep(key, kept)
        return hidden

    def _tokens(self, ids: Tensor, layout: Layout, sources: Sources, dtype: torch.dtype) -> Tensor:
        """Text and source pictures: ids (B, L) -> (B, L, H)."""
        x = self.model.wte(ids, out_dtype=dtype)
        clean = torch.zeros(ids.shape[0], device=ids.device)  # source pictures stand at timestep 0
        for run, latent, features in zip(layout.pictures, sources.latents, sources.vision, strict=True):
            x[:, run.timestep] = self.timestep_emb(clean, dtype)
            x[:, run.latent.start : run.latent.stop] = self.patch_embed(latent, self.time_embed(clean, dtype))
            x[:, run.vision.start : run.vision.stop] = features
        return x

    def _image_tokens(self, x: Tensor, timesteps: Tensor, numbers: list[Tensor]) -> Tensor:
        """Numbers (B, H) as tokens, and the image: (B, numbers + h * w, H)."""
        image = self.patch_embed(x, self.time_embed(timesteps, x.dtype))
        return torch.cat((torch.stack(numbers, dim=1), image), dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, stretch: Stretch) -> Tensor:
    """(B, heads, L, head_dim) queries on all keys -> (B, L, heads * head_dim), stretch by stretch."""
    parts = []
    for row in stretch.rows:
        queries = q[:, :, row.start - stretch.offset : row.stop - stretch.offset]
        mask = _causal_mask(row, q) if row.causal and row.stop - row.start > 1 else None
        parts.append(
            comfy.ldm.modules.attention.optimized_attention(
                queries,
                k[:, :, : row.stop],
                v[:, :, : row.stop],
                q.shape[1],
                mask=mask,
                skip_reshape=True,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(parts, dim=1)


def _causal_mask(row: Rows, like: Tensor) -> Tensor:
    """(queries, keys), to be added to the scores: every attention of the host takes this kind."""
    lowest = torch.finfo(like.dtype).min
    mask = torch.full((row.stop - row.start, row.stop), lowest, dtype=like.dtype, device=like.device)
    return mask.triu_(row.start + 1)


def _next_timesteps(timesteps: Tensor, options: dict[str, Any]) -> Tensor:
    """The timestep that the sampler goes to from here; 0 after the last one."""
    sigmas = options.get("sample_sigmas")
    if sigmas is None:
        return torch.zeros_like(timesteps)
    schedule = 1000 * sigmas.to(timesteps)
    following = schedule[schedule < timesteps[0] - TINY]
    return torch.full_like(timesteps, float(following.max())) if len(following) else torch.zeros_like(timesteps)
