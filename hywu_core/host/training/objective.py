"""The training objective on any MODEL of the host: its own conds, noise, model sampling and latent format.

Letters: B batch of one pass through the base. One pass serves samples that each have a LoRA of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import MatchError
from ...lora import InstanceLora
from ...training.data import Draw
from ...training.trainable import instances
from ..lora.apply import wrapped_forwards
from ..lora.bank import Adapter
from ..lora.matching import match


class GraphFactor:
    """A factor that carries a graph, where a bank for inference has weights."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    @contextmanager
    def near(self, x: Tensor) -> Iterator[Tensor]:
        """The factor in x's dtype."""
        yield self.tensor.to(x.dtype)


class DiffusionObjective:
    """The base's own diffusion loss: mean((denoised - x0)^2) / sigma^2, which is the flow-matching loss of flow models and
    the noise-prediction loss of others.

    Args:
        patcher: the frozen base. It is loaded on use and left as it was found.
        checkpoint_stack: path of the base's stack of blocks, or of several, separated by commas
            ("double_blocks,single_blocks"); blocks are then computed again in the backward pass instead of being remembered.
        train_base: train the base's own parameters (full fine-tuning); else gradients reach the LoRA only. The caller owns
            the base then, and nobody else may use it.
    Raises:
        MatchError: if the base is quantised, so that no gradient can pass through it.
    """

    def __init__(
        self,
        patcher: comfy.model_patcher.ModelPatcher,
        checkpoint_stack: str | None = None,
        train_base: bool = False,
    ):
        self.patcher = trainable_copy(patcher)
        self.checkpoint_stack, self.train_base = checkpoint_stack, train_base
        refuse_quantised(self.base)

    @property
    def base(self) -> Any:
        """The host's BaseModel."""
        return self.patcher.model

    def prepare(self) -> None:
        """Have the host load the base. Call once before a run, and again after others used the memory."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)

    def backward(self, lora: InstanceLora | None, draws: Sequence[Draw], share: float) -> Tensor:
        """See `hywu_core.training.trainer.Objective`."""
        losses = []
        with torch.inference_mode(False), torch.enable_grad():
            for part in _alike(draws):
                with self.in_training(None if lora is None else instances(lora, part)):
                    found = self.losses(draws[part])
                    (found.sum() * share).backward()
                losses.append(found.detach().cpu())
        return torch.cat(losses)

    def evaluate(self, lora: InstanceLora | None, draws: Sequence[Draw], percent: float | None = None) -> Tensor:
        """The loss of every sample (B,), without a graph; at one noise level for all, if `percent` says which."""
        losses = []
        with torch.inference_mode(False), torch.no_grad():
            for part in _alike(draws):
                with self.in_training(None if lora is None else instances(lora, part)):
                    losses.append(self.losses(draws[part], percent).cpu())
        return torch.cat(losses)

    def losses(self, draws: Sequence[Draw], percent: float | None = None) -> Tensor:
        """The loss of every sample (B,), graph kept. Noise and noise level come from the draws; `percent` of the sampling
        schedule, if given, overrules the level.
        """
        device = self.patcher.load_device
        latents = torch.cat([self._latent(draw) for draw in draws]).to(device)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=draw.source) for draw in draws]).to(latents)
        sigma = torch.tensor([self._sigma(draw, percent) for draw in draws], device=device, dtype=latents.dtype)
        spread = sigma.view(-1, *[1] * (latents.ndim - 1))
        noisy = self.base.model_sampling.noise_scaling(spread, noise, latents)
        conds = self._conds([draw.sample.conditioning for draw in draws], noisy)
        denoised = self.base.apply_model(noisy, sigma, transformer_options={}, **conds)
        return ((denoised - latents) / spread).float().square().flatten(1).mean(dim=1)

    def _latent(self, draw: Draw) -> Tensor:
        return self.base.process_latent_in(draw.sample.latent.unsqueeze(0).float())

    def _sigma(self, draw: Draw, percent: float | None) -> float:
        drawn = float(torch.rand((), generator=draw.source))
        share = min(max(drawn if percent is None else percent, 1e-3), 1 - 1e-3)
        return float(self.base.model_sampling.percent_to_sigma(share))

    def _conds(self, entries: Sequence[Any], noisy: Tensor) -> dict[str, Any]:
        """What the base gets beside the noisy latents, made by the host from each sample's CONDITIONING entry."""
        rows = []
        for entry in entries:
            encoded = comfy.samplers.encode_model_conds(
                self.base.extra_conds, comfy.sampler_helpers.convert_cond([entry]), noisy[:1], noisy.device, "positive"
            )
            model_conds = encoded[0]["model_conds"].items()
            rows.append({name: cond.process_cond(batch_size=1, area=None) for name, cond in model_conds})
        return comfy.samplers.cond_cat(rows)

    @contextmanager
    def in_training(self, lora: InstanceLora | None) -> Iterator[None]:
        """For the time of the block, the host in training mode, the LoRA beside the base, in-place operations made safe."""
        before = comfy.model_management.in_training
        comfy.model_management.in_training = True
        try:
            with ExitStack() as undo:
                undo.enter_context(requiring_gradients(self.base.diffusion_model, self.train_base))
                if lora is not None:
                    undo.enter_context(lora_beside(self.base, lora))
                undo.enter_context(safe_in_place(self.base.diffusion_model))
                for stack in self.checkpoint_stack.split(",") if self.checkpoint_stack else ():
                    undo.enter_context(checkpointed(self.base.diffusion_model, stack.strip()))
                yield
        finally:
            comfy.model_management.in_training = before


@contextmanager
def lora_beside(base: Any, lora: InstanceLora) -> Iterator[None]:
    """A LoRA whose factors carry a graph beside the base, for the time of the block."""
    adapters: dict[str, list[tuple[Adapter, float]]] = {}
    for found in match(lora, base).matched:
        adapters.setdefault(found.module, []).append((Adapter(found, lora.scale, GraphFactor), 1.0))
    with wrapped_forwards(base.diffusion_model, adapters):
        yield


@contextmanager
def requiring_gradients(module: nn.Module, required: bool) -> Iterator[None]:
    """All parameters trainable, or none, for the time of the block."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(required)
        yield
    finally:
        for parameter, state in before:
            parameter.requires_grad_(state)


@contextmanager
def safe_in_place(diffusion_model: nn.Module) -> Iterator[None]:
    """Native blocks add to their residual stream in place, after a norm remembered it for its backward pass: give the norms
    copies, for the time of the block.
    """
    handles = [
        module.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))
        for module in diffusion_model.modules()
        if "Norm" in type(module).__name__
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpointed(diffusion_model: nn.Module, stack: str) -> Iterator[None]:
    """Blocks of a stack are computed again in the backward pass, for the time of the block."""
    blocks = list(diffusion_model.get_submodule(stack))
    try:
        for block in blocks:
            block.forward = _recomputed(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def trainable_copy(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone of the patcher, or a second copy of its model where the host streams its weights, or made them in inference
    mode, so that they cannot take part in a backward pass.

    Raises:
        MatchError: if a copy is needed and the loader that made the model cannot make another.
    """
    usable = not any(parameter.is_inference() for parameter in patcher.model.parameters())
    if usable and not patcher.is_dynamic():
        return patcher.clone()
    if patcher.cached_patcher_init is None:
        raise MatchError(
            "This model cannot be trained on: its loader cannot load it again. Use one of ComfyUI's own loaders."
        )
    with torch.inference_mode(False):
        return patcher.clone(force_deepcopy=True)


def _recomputed(forward: Callable) -> Callable:
    def own(value):  # a block adds to its inputs in place; the copy kept for the second time must stay what it was
        return value.clone() if isinstance(value, Tensor) else value

    def inner(args, kwargs):
        return forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    def forward_with_checkpoint(*args, **kwargs):
        return checkpoint(inner, args, kwargs, use_reentrant=False)

    return forward_with_checkpoint


def _alike(draws: Sequence[Draw]) -> list[slice]:
    """All samples as one batch if their sizes allow it, else one by one."""
    sizes = {
        (tuple(s.latent.shape), tuple(s.conditioning[0].shape), _reference_sizes(s.conditioning))
        for s in (draw.sample for draw in draws)
    }
    size = len(draws) if len(sizes) == 1 else 1
    return [slice(start, start + size) for start in range(0, len(draws), size)]


def _reference_sizes(entry: Any) -> tuple:
    return tuple(tuple(latent.shape) for latent in entry[1].get("reference_latents", ()))


def refuse_quantised(base: Any) -> None:
    """Raises:
    MatchError: if the base is quantised, so that no gradient can pass through it.
    """
    for name, parameter in base.diffusion_model.named_parameters():
        narrow = not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2
        if narrow or isinstance(parameter.data, comfy.quant_ops.QuantizedTensor):  # those claim the type they stand for
            raise MatchError(
                f"{name} is quantised ({parameter.dtype}), and no gradient passes through it. Train on a float32, "
                "bfloat16 or float16 version of this base; the generator can then be used with the quantised one."
            )
