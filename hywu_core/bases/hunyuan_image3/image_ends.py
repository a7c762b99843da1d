"""How latents become tokens and tokens become a velocity, and how timesteps are embedded. Source: reference facts 2 and 3.3.

Letters: B batch · C latent channels · H hidden size · h, w latent rows and columns
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = 32  # of every group norm
FREQUENCIES = 256  # numbers of a timestep's sinusoid


def sinusoid(timesteps: Tensor) -> Tensor:
    """(B,) -> (B, 256) in float32, cosines first."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """A number as a token."""

    def __init__(self, hidden: int, operations: Any, **factory: Any):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(FREQUENCIES, hidden, **factory),
            nn.GELU(),
            operations.Linear(hidden, hidden, **factory),
        )

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, H)."""
        return self.mlp(sinusoid(timesteps).to(dtype))


class ResidualBlock(nn.Module):
    """Two convolutions whose second norm is modulated by a timestep."""

    def __init__(self, channels: int, out_channels: int, hidden: int, operations: Any, **factory: Any):
        super().__init__()
        self.in_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, channels, **factory),
            nn.SiLU(),
            operations.Conv2d(channels, out_channels, 3, padding=1, **factory),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(hidden, 2 * out_channels, **factory))
        self.out_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, out_channels, **factory),
            nn.SiLU(),
            nn.Identity(),  # a dropout in training; kept so that names stay
            operations.Conv2d(out_channels, out_channels, 3, padding=1, **factory),
        )
        self.skip_connection = operations.Conv2d(channels, out_channels, 1, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, channels, h, w), embedding (B, H) -> (B, out_channels, h, w)."""
        norm, rest = self.out_layers[0], self.out_layers[1:]
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.skip_connection(x) + rest(norm(self.in_layers(x)) * (1 + scale) + shift)


class PatchEmbed(nn.Module):
    """Latents to tokens, one for each latent pixel."""

    def __init__(self, channels: int, inner: int, hidden: int, operations: Any, **factory: Any):
        super().__init__()
        self.model = nn.ModuleList(
            (
                operations.Conv2d(channels, inner, 3, padding=1, **factory),
                ResidualBlock(inner, hidden, hidden, operations, **factory),
            )
        )

    def forward(self, latent: Tensor, embedding: Tensor) -> Tensor:
        """latent (B, C, h, w), embedding (B, H) -> (B, h * w, H), row by row."""
        x = self.model[1](self.model[0](latent), embedding)
        return x.flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Tokens to a velocity."""

    def __init__(self, hidden: int, inner: int, channels: int, operations: Any, **factory: Any):
        super().__init__()
        self.model = nn.ModuleList(
            (
                ResidualBlock(hidden, inner, hidden, operations, **factory),
                nn.Sequential(
                    operations.GroupNorm(GROUPS, inner, **factory),
                    nn.SiLU(),
                    operations.Conv2d(inner, channels, 3, padding=1, **factory),
                ),
            )
        )

    def forward(self, tokens: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, h * w, H), embedding (B, H) -> (B, C, h, w)."""
        x = tokens.transpose(1, 2).unflatten(2, grid)
        return self.model[1](self.model[0](x, embedding))


class Aligner(nn.Module):
    """The vision tower's features as tokens."""

    def __init__(self, features: int, hidden: int, operations: Any, **factory: Any):
        super().__init__()
        self.layers = nn.Sequential(
            operations.Linear(features, hidden, **factory), nn.GELU(), operations.Linear(hidden, hidden, **factory)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., H)."""
        return self.layers(x)
