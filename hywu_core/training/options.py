"""How a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of one run. What decides a resumed run's numbers is all here and in the data.

    Raises:
        ConfigError: for a value that makes no sense.
    """

    steps: int = 1000  # optimizer steps
    batch: int = 8  # samples of one optimizer step, over all processes
    micro_batch: int = 0  # samples of one pass through the base; 0: all of a process at once
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 50  # steps over which the learning rate rises from zero
    cosine: bool = True  # fall to zero along a cosine; else constant
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema: float = 0.0  # decay of the averaged weights; 0: none
    diversity: float = 0.0  # weight of the loss against collapse to one LoRA
    seed: int = 0  # of data order, noise and noise levels

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")
        for name in ("micro_batch", "warmup", "weight_decay", "clip", "diversity"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, found {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, found {self.learning_rate}.")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be at least 0 and below 1, found {self.ema}.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if not self.cosine:
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
