"""What can be trained by the same loop: a generator, one LoRA shared by all samples, or the base itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..analysis.geometry import cosines, gram
from ..config import GeneratorConfig
from ..generator import Generator
from ..layout import all_targets
from ..lora import InstanceLora, LoraFactor
from .data import Sample
from .memory import GRAPH_ROOM, graph_bytes


class Trainable(Protocol):
    """Parameters, and the LoRA that they make of samples."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by the names under which a run is stored."""

    def lora(self, samples: Sequence[Sample]) -> InstanceLora | None:
        """The samples' LoRA with its graph: one instance for each, or one for all; None if the base itself is trained."""

    def graphs_at_once(self, samples: Sequence[Sample]) -> int | None:
        """How many samples' graphs may be in memory at a time; None: there is one for all."""


class GeneratorTrainable:
    """A generator writes an instance for each sample from its condition.

    Args:
        generator: its parameters are what is trained, in the type that they have.
        dtype: to compute in; float32 parameters with bfloat16 computing is the usual mixed precision.
        room: bytes that the graphs of samples may take together while the base is run. What does not fit is computed twice.
    """

    def __init__(self, generator: Generator, dtype: torch.dtype = torch.float32, room: int = GRAPH_ROOM):
        self.generator, self.dtype, self.room = generator, dtype, room

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.generator.named_parameters())

    def lora(self, samples: Sequence[Sample]) -> InstanceLora:
        parameter = next(self.generator.parameters())
        conditions = [sample.condition.to(parameter) for sample in samples]
        with torch.amp.autocast(parameter.device.type, self.dtype, enabled=self.dtype != parameter.dtype):
            return self._shape_by_shape(conditions)

    def _shape_by_shape(self, conditions: Sequence[Tensor]) -> InstanceLora:
        groups: dict[torch.Size, list[int]] = {}
        for index, condition in enumerate(conditions):
            groups.setdefault(condition.shape, []).append(index)
        parts = [self.generator(torch.stack([conditions[index] for index in group])) for group in groups.values()]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([index for group in groups.values() for index in group]).argsort().tolist()
        return concatenate(parts).map(lambda pair: LoraFactor(pair.down[order], pair.up[order]))

    def graphs_at_once(self, samples: Sequence[Sample]) -> int:
        longest = max(sample.condition.shape[0] for sample in samples)
        each = graph_bytes(self.generator.config, longest, self.dtype, self.generator.checkpoint_blocks)
        return max(1, self.room // each)


class SharedLora(nn.Module):
    """One LoRA for all samples, on the targets of a generator's configuration: the baseline that every edit must share."""

    def __init__(self, config: GeneratorConfig, rank: int, alpha: float, seed: int = 0):
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.scale = alpha / rank
        self.names, self.downs, self.ups = [], nn.ParameterList(), nn.ParameterList()
        for name, target in all_targets(config):
            down = torch.randn(target.down_shape(rank), generator=source) / target.in_features**0.5
            self.names.append(name)
            self.downs.append(nn.Parameter(down))
            self.ups.append(nn.Parameter(torch.zeros(target.up_shape(rank))))

    def named_parameters(self, *args, **kwargs) -> dict[str, nn.Parameter]:
        """The factors, numbered in token order."""
        return dict(super().named_parameters(*args, **kwargs))

    def graphs_at_once(self, samples: Sequence[Sample]) -> None:
        """None: the factors are the parameters."""

    def lora(self, samples: Sequence[Sample] = ()) -> InstanceLora:
        pairs = zip(self.downs, self.ups, strict=True)
        factors = [LoraFactor(down.unsqueeze(0), up.unsqueeze(0)) for down, up in pairs]
        return InstanceLora(dict(zip(self.names, factors, strict=True)), self.scale)


class FullFineTuning:
    """The base itself is trained, without a LoRA."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self.parameters

    def lora(self, samples: Sequence[Sample]) -> None:
        """None: nothing stands beside the base."""

    def graphs_at_once(self, samples: Sequence[Sample]) -> None:
        """None: there is no graph beside the base's."""


def concatenate(loras: Sequence[InstanceLora]) -> InstanceLora:
    """The instances of several LoRAs of the same targets as one batch."""
    factors = {
        name: LoraFactor(*(torch.cat(parts) for parts in zip(*(lora.factors[name] for lora in loras), strict=True)))
        for name in loras[0].names
    }
    return InstanceLora(factors, loras[0].scale, loras[0].metadata)


def leaves(lora: InstanceLora) -> InstanceLora:
    """The same LoRA cut off from its graph, ready to collect gradients of its own, in at least float32: they are sums over
    micro-batches.
    """

    def leaf(factor: Tensor) -> Tensor:
        return factor.detach().to(torch.promote_types(factor.dtype, torch.float32)).requires_grad_()

    return lora.map(lambda pair: LoraFactor(*map(leaf, pair)))


def instances(lora: InstanceLora, part: slice) -> InstanceLora:
    """A part of the batch; the whole where one instance serves all samples."""
    return lora if lora.batch == 1 else lora.map(lambda pair: LoraFactor(pair.down[part], pair.up[part]))


def diversity_loss(lora: InstanceLora) -> Tensor:
    """Mean squared cosine between the dW of different samples of a batch, against collapse to one LoRA for all
    (the idea of TFlow, arXiv 2605.13839). 0 for a single instance or where all dW are still zero.
    """
    if lora.batch < 2:
        return lora.pairs[0].down.new_zeros(())
    similar = cosines(gram(lora))
    others = ~torch.eye(lora.batch, dtype=torch.bool, device=similar.device)
    return similar[others].square().mean()
