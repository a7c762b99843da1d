"""The generator: a transformer that reads a condition and writes the token grids of a LoRA (paper Fig. 5), one for each stack
of the base.

    condition (B, L, input_dim) -- hidden_in, norm_input --> context (B, L, d)
    context -- TokenTransformer (transformer.py) --> token grid (B, N, T, r, token_dim) -- detokenize --> InstanceLora

Letters as in transformer.py. `Generator.forward` keeps the graph, for training; `Generator.generate` gives the same numbers
in bounded memory (chunked.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .chunked import Engine, generate_layers
from .config import GeneratorConfig
from .errors import ConditionError, GenerationError
from .layout import LayerPlace, detokenize, full_name, layer_places, target_names, targets
from .lora import InstanceLora, LoraFactor, finite
from .plan import LEAST_CHUNK, Plan, plan
from .recompute import recomputed
from .transformer import EncoderLayer, Tables, TokenTransformer


class Generator(nn.Module):
    """Writes a LoRA for every target of the base from one condition, in one forward pass.

    Args:
        config: a validated configuration.
        operations: namespace of layers (`Linear`, `RMSNorm`, `Embedding`): `torch.nn`, or the host's casting ones.
        device, dtype: of the parameters, which are left uninitialised on purpose when a checkpoint follows.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        operations: ModuleType | type = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.hidden_in = operations.Linear(config.input_dim, config.d_model, **factory)
        self.encoder = nn.ModuleList(EncoderLayer(config, operations, **factory) for _ in range(config.encoder_layers))
        self.model = TokenTransformer(config, operations, **factory)
        self.checkpoint_blocks = False  # recompute blocks in the backward pass instead of keeping their activations

    def initialize(self, seed: int = 0) -> Generator:
        """Fill the parameters for training: A head N(0, 0.02), B head zero (paper Fig. 5), so that the first dW is zero."""
        source = torch.Generator().manual_seed(seed)

        def normal_(parameter: Tensor, std: float) -> None:
            parameter.copy_(torch.randn(parameter.shape, generator=source) * std)

        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("model.proj_out_"):
                    parameter.zero_()
                elif "_pos." in name:
                    normal_(parameter, 1.0)
                elif parameter.ndim == 2:
                    normal_(parameter, 1 / math.sqrt(parameter.shape[1]))
                elif name.endswith(".bias"):
                    parameter.zero_()
                else:
                    parameter.fill_(1.0)
            normal_(self.model.proj_out_A.weight, 0.02)
        return self

    def context(self, condition: Tensor, tables: Tables) -> Tensor:
        """condition (B, L, input_dim) or (B, 1, L, input_dim) -> (B, L, d).

        Raises:
            ConditionError: for another width or number of axes.
        """
        x = self.hidden_in(self._checked(condition))
        for layer in self.encoder:
            x = layer(x, tables.condition(x.shape[1]))
        return self.model.norm_input(x)

    def tokens(self, condition: Tensor) -> Tensor:
        """The token grid (B, N, T, r, token_dim) of a condition, graph kept; of several stacks, the first one's."""
        tables = Tables(self.config, condition.device)
        return self._tokens(self.context(condition, tables), tables)

    def forward(self, condition: Tensor) -> InstanceLora:
        """The LoRA of a condition, graph kept, whole grids at once. For inference use `generate`."""
        tables = Tables(self.config, condition.device)
        context = self.context(condition, tables)
        grids = (self._tokens(context, tables.of_stack(stack)) for stack in range(len(self.config.stacks)))
        layers = (tokens for grid in grids for tokens in grid.unbind(1))
        return self._assembled(self._factors(*each) for each in zip(layer_places(self.config), layers, strict=True))

    def generate(
        self,
        condition: Tensor | Sequence[Tensor],
        *,
        dtype: torch.dtype | None = None,
        result_device: torch.device | str = "cpu",
        result_dtype: torch.dtype | None = None,
        chunk_bytes: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        engine: Engine = Engine(),  # noqa: B008 (a value, never changed)
    ) -> InstanceLora:
        """The LoRA of a condition, in bounded memory, without a graph.

        Args:
            condition: (B, L, input_dim) or (B, 1, L, input_dim), on the device to compute on; or several of these, whose
                lengths may differ: they are one batch then, in their order. Samples of one length are worked on together and
                the others beside them, nothing is padded, and a block's weights are fetched once for all.
            dtype: to compute in; the parameters' own by default.
            result_device, result_dtype: where each layer's factors go as soon as they are ready, and as what.
            chunk_bytes: what intermediate tensors may take beside the token grids; a sensible share of them by default.
            progress: called with (done, total) between chunks. What it raises ends the run: this is how to cancel.
            engine: what the device's owner brings to the run.
        Raises:
            ConditionError: for a condition of another width, or none at all.
            GenerationError: naming the layer, when a factor is not finite; or when memory runs out with the smallest chunks.
        """
        dtype, device = dtype or next(self.parameters()).dtype, torch.device(result_device)
        samples = self._by_length([condition] if isinstance(condition, Tensor) else condition, dtype)
        try:
            with torch.no_grad():
                tables = Tables(self.config, samples.device, engine.rotation)
                contexts = [self.context(group, tables) for group in samples.groups]
                chunk_bytes = chunk_bytes or samples.plan(self.config, contexts[0].dtype).chunk
                run = generate_layers(self.model, contexts, tables, chunk_bytes, progress, engine)
                places = layer_places(self.config)
                return self._assembled(
                    self._delivered(place, samples.in_order(tokens), device, result_dtype)
                    for place, tokens in zip(places, run, strict=True)
                )
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
            needed = samples.plan(self.config, dtype, LEAST_CHUNK)
            raise GenerationError(
                f"Out of memory on {samples.device} although the work was split as far as it goes. Beside its weights the "
                f"generator needs {needed.peak / 1e9:.1f} GB for {samples}. "
                "Close other programs, use a smaller or quantised generator, or a shorter condition."
            ) from error

    def _checked(self, condition: Tensor) -> Tensor:
        if condition.ndim == 4 and condition.shape[1] == 1:
            condition = condition.squeeze(1)
        if condition.ndim != 3 or condition.shape[-1] != self.config.input_dim or not condition.shape[1]:
            raise ConditionError(
                f"The condition has the shape {tuple(condition.shape)}, but this generator reads "
                f"(batch, length, {self.config.input_dim}). Use the condition that it was trained with."
            )
        return condition

    def _by_length(self, conditions: Sequence[Tensor], dtype: torch.dtype) -> _Samples:
        if not conditions:
            raise ConditionError("There is no condition to generate from.")
        by_length: dict[int, list[Tensor]] = {}
        numbers: dict[int, list[int]] = {}
        count = 0
        for condition in (self._checked(given) for given in conditions):
            by_length.setdefault(condition.shape[1], []).append(condition.to(dtype))
            numbers.setdefault(condition.shape[1], []).extend(range(count, count + condition.shape[0]))
            count += condition.shape[0]
        groups = tuple(those[0] if len(those) == 1 else torch.cat(those) for those in by_length.values())
        return _Samples(groups, tuple(number for group in numbers.values() for number in group))

    def _tokens(self, context: Tensor, tables: Tables) -> Tensor:
        """The token grid (B, N, T, r, token_dim) of one stack for a context (B, L, d), graph kept."""
        x = self.model.initial_tokens(context.device, context.dtype, tables.stack)
        x = x.expand(context.shape[0], -1, -1, -1)
        for block in self.model.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = recomputed(block, x, context, tables)
            else:
                x = block(x, context, tables)
        return self.model.project(x, tables.stack)

    def _factors(self, place: LayerPlace, tokens: Tensor) -> dict[str, LoraFactor]:
        """tokens (B, T, r, token_dim) of one layer -> {full name of a target: factors}."""
        stack, layer = place
        state = detokenize(tokens, self.config, stack)
        return {
            full_name(self.config, layer, target.name, stack): LoraFactor(
                state[f"{target.name}.lora_A"], state[f"{target.name}.lora_B"]
            )
            for target in targets(self.config, stack)
        }

    def _delivered(
        self, place: LayerPlace, tokens: Tensor, device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, LoraFactor]:
        """One layer's factors on their way out, each in a storage of its own, so that no padding is kept alive."""
        # asked once for the layer, since every question waits for the device
        if not finite(tokens):
            several = f" of {self.config.stacks[place.stack].prefix.rstrip('.')}" if len(self.config.stacks) > 1 else ""
            raise GenerationError(
                f"The generated LoRA is not finite in layer {place.layer}{several}. The generator's weights or the condition "
                "hold NaN or infinity, or the computation overflowed: try bfloat16 or float32 weights."
            )

        def own(factor: Tensor) -> Tensor:
            return torch.empty_like(factor, device=device, dtype=dtype or factor.dtype).copy_(factor)

        return {name: LoraFactor(own(down), own(up)) for name, (down, up) in self._factors(place, tokens).items()}

    def _assembled(self, layers: Iterable[dict[str, LoraFactor]]) -> InstanceLora:
        """The factors of all layers as one LoRA."""
        factors = {name: pair for layer in layers for name, pair in layer.items()}
        metadata = {"rank": self.config.rank, "alpha": self.config.alpha, "base": self.config.hywu.get("base")}
        return InstanceLora(factors, self.config.scale, metadata)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of everything this generator writes a LoRA for."""
        return target_names(self.config)


class _Samples(NamedTuple):
    """Conditions by their length."""

    groups: tuple[Tensor, ...]  # each (b, L, input_dim)
    numbers: tuple[int, ...]  # of the samples, group by group, among all that were asked for

    @property
    def device(self) -> torch.device:
        return self.groups[0].device

    def plan(self, config: GeneratorConfig, dtype: torch.dtype, chunk_bytes: int | None = None) -> Plan:
        """What generating for them costs."""
        lengths = [group.shape[1] for group in self.groups for _ in range(group.shape[0])]
        return plan(config, len(lengths), lengths, dtype, chunk_bytes=chunk_bytes)

    def in_order(self, tokens: Tensor) -> Tensor:
        """What was made group by group (B, ...) in the order of the samples."""
        if len(self.groups) == 1:
            return tokens
        return tokens[torch.tensor(self.numbers).argsort().to(tokens.device)]

    def __str__(self) -> str:
        if len(self.groups) == 1:
            return f"this condition of {self.groups[0].shape[1]:,} tokens"
        return f"these {len(self.numbers)} conditions of up to {max(group.shape[1] for group in self.groups):,} tokens"
