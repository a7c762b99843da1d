"""The generator: a transformer that reads a condition and writes the token grid of a LoRA (paper Fig. 5).

    condition (B, L, input_dim) -- hidden_in, norm_input --> context (B, L, d)
    context -- TokenTransformer (transformer.py) --> token grid (B, N, T, r, token_dim) -- detokenize --> InstanceLora

Letters as in transformer.py. `Generator.forward` keeps the graph, for training; `Generator.generate` gives the same numbers
in bounded memory (chunked.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from .chunked import Engine, generate_layers
from .config import GeneratorConfig
from .errors import ConditionError, GenerationError
from .layout import detokenize, full_name, target_names, targets
from .lora import InstanceLora, LoraFactor
from .plan import LEAST_CHUNK, plan
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
        if condition.ndim == 4 and condition.shape[1] == 1:
            condition = condition.squeeze(1)
        if condition.ndim != 3 or condition.shape[-1] != self.config.input_dim or not condition.shape[1]:
            raise ConditionError(
                f"The condition has the shape {tuple(condition.shape)}, but this generator reads "
                f"(batch, length, {self.config.input_dim}). Use the condition that it was trained with."
            )
        x = self.hidden_in(condition)
        for layer in self.encoder:
            x = layer(x, tables.condition(x.shape[1]))
        return self.model.norm_input(x)

    def tokens(self, condition: Tensor) -> Tensor:
        """The token grid (B, N, T, r, token_dim) of a condition, graph kept."""
        tables = Tables(self.config, condition.device)
        context = self.context(condition, tables)
        x = self.model.initial_tokens(context.device, context.dtype)
        x = x.expand(context.shape[0], -1, -1, -1)
        for block in self.model.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = recomputed(block, x, context, tables)
            else:
                x = block(x, context, tables)
        return self.model.project(x)

    def forward(self, condition: Tensor) -> InstanceLora:
        """The LoRA of a condition, graph kept, the whole grid at once. For inference use `generate`."""
        return self.assemble([self.layer_factors(layer) for layer in self.tokens(condition).unbind(1)])

    def generate(
        self,
        condition: Tensor,
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
            condition: (B, L, input_dim) or (B, 1, L, input_dim), on the device to compute on.
            dtype: to compute in; the parameters' own by default.
            result_device, result_dtype: where each layer's factors go as soon as they are ready, and as what.
            chunk_bytes: what intermediate tensors may take beside the token grid; a sensible share of it by default.
            progress: called with (done, total) between chunks. What it raises ends the run: this is how to cancel.
            engine: what the device's owner brings to the run.
        Raises:
            ConditionError: for a condition of another width.
            GenerationError: naming the layer, when a factor is not finite; or when memory runs out with the smallest chunks.
        """
        condition = condition.to(dtype or next(self.parameters()).dtype)
        device = torch.device(result_device)
        try:
            with torch.no_grad():
                tables = Tables(self.config, condition.device, engine.rotation)
                context = self.context(condition, tables)
                chunk_bytes = chunk_bytes or plan(self.config, *context.shape[:2], context.dtype).chunk
                run = generate_layers(self.model, context, tables, chunk_bytes, progress, engine)
                layers = [self._deliver(index, tokens, device, result_dtype) for index, tokens in enumerate(run)]
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
            batch, length = condition.shape[0], condition.shape[-2]
            needed = plan(self.config, batch, length, condition.dtype, chunk_bytes=LEAST_CHUNK)
            raise GenerationError(
                f"Out of memory on {condition.device} although the work was split as far as it goes. Beside its weights the "
                f"generator needs {needed.peak / 1e9:.1f} GB for this condition of {length:,} tokens. "
                "Close other programs, use a smaller or quantised generator, or a shorter condition."
            ) from error
        return self.assemble(layers)

    def layer_factors(self, tokens: Tensor) -> dict[str, LoraFactor]:
        """tokens (B, T, r, token_dim) of one layer -> {target: factors}."""
        state = detokenize(tokens, self.config)
        return {
            target.name: LoraFactor(state[f"{target.name}.lora_A"], state[f"{target.name}.lora_B"])
            for target in targets(self.config)
        }

    def _deliver(
        self, layer: int, tokens: Tensor, device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, LoraFactor]:
        """One layer's factors on their way out, each in a storage of its own, so that no padding is kept alive."""
        # asked once for the layer, since every question waits for the device; in one pass, which knows NaN and infinity
        if not torch.isfinite(torch.stack(tokens.aminmax())).all():
            raise GenerationError(
                f"The generated LoRA is not finite in layer {layer}. The generator's weights or the condition hold NaN or "
                "infinity, or the computation overflowed: try bfloat16 or float32 weights."
            )

        def own(factor: Tensor) -> Tensor:
            return torch.empty_like(factor, device=device, dtype=dtype or factor.dtype).copy_(factor)

        return {name: LoraFactor(own(down), own(up)) for name, (down, up) in self.layer_factors(tokens).items()}

    def assemble(self, layers: list[dict[str, LoraFactor]]) -> InstanceLora:
        """The factors of all layers as one LoRA."""
        factors = {
            full_name(self.config, index, name): pair
            for index, layer in enumerate(layers)
            for name, pair in layer.items()
        }
        metadata = {"rank": self.config.rank, "alpha": self.config.alpha, "base": self.config.hywu.get("base")}
        return InstanceLora(factors, self.config.scale, metadata)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of everything this generator writes a LoRA for."""
        return target_names(self.config)
