"""The training objective on any MODEL of the host: its own conds, noise, model sampling and latent format.

Letters: B batch of one pass through the base. One pass serves samples that each have a LoRA of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import MatchError
from ...lora import InstanceLora, LoraFactor
from ...training.data import Draw, Sample
from ...training.options import ALL_STACKS
from ..lora.apply import wrapped_forwards
from ..lora.bank import Adapter
from ..lora.matching import match
from ..model import find_stacks
from .carried import Carried
from .frozen import frozen, refuse_untrainable

WITH_BACKWARD = 3  # times what the host reckons with for a pass without one
HEADROOM = 8  # how far below 1 the gradient of an element of the output begins in float16


class Divided(torch.autograd.Function):
    """The same value, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx, value: Tensor, number: float) -> Tensor:
        ctx.number = number
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.number, None


class GraphFactor:
    """A factor that carries a graph, where a bank for inference has weights.

    Args:
        loss_scale: by which the loss was multiplied; gradients are divided by it once they are in the factor's own type.
    """

    def __init__(self, tensor: Tensor, loss_scale: float = 1.0):
        self.tensor = tensor if loss_scale == 1 else Divided.apply(tensor, loss_scale)

    @contextmanager
    def near(self, x: Tensor) -> Iterator[Tensor]:
        """The factor in x's dtype."""
        yield self.tensor.to(x.dtype)


class Noised(NamedTuple):
    """Samples of one pass, made noisy."""

    entries: list[Any]  # of their CONDITIONING
    latents: Tensor  # (B, C, ..., H, W) as the base works on them, on its device
    noisy: Tensor
    sigma: Tensor  # (B,)


class DiffusionObjective:
    """The base's own diffusion loss: the mean square of how far its prediction is from the right one, so the flow-matching
    loss of flow models, the noise-prediction loss of others and the v-prediction loss where that is predicted. What else the
    MODEL carries acts as it does in sampling, see `Carried`.

    Args:
        patcher: the frozen base. It is loaded on use and left as it was found.
        checkpoint_stack: path of the base's stack of blocks, or of several, separated by commas
            ("double_blocks,single_blocks"), or "all"; blocks are then computed again in the backward pass instead of being
            remembered.
        train_base: train the base's own parameters (full fine-tuning); else gradients reach the LoRA only. The caller owns
            the base then, and nobody else may use it.
    Raises:
        MatchError: if no gradient can pass through a part of the base, or it carries what cannot act.
    """

    def __init__(
        self,
        patcher: comfy.model_patcher.ModelPatcher,
        checkpoint_stack: str | None = None,
        train_base: bool = False,
    ):
        self.given = patcher
        self.patcher = differentiable_base(patcher)
        self.train_base = train_base
        refuse_untrainable(self.base)
        self.carried = Carried(patcher, self.patcher)
        self.banks = self.carried.banks(self.patcher)
        self.checkpoint_stack = self._stacks_to_recompute(checkpoint_stack)

    @property
    def base(self) -> Any:
        return self.patcher.model

    @property
    def patchers(self) -> list[comfy.model_patcher.ModelPatcher]:
        """Everything that the host must have loaded, the base first."""
        return [self.patcher, *self.banks, *self.patcher.get_nested_additional_models()]

    def prepare(self) -> None:
        """Have the host load the base. Call once before a run, and again after others used the memory."""
        comfy.model_management.load_models_gpu(self.patchers, force_full_load=self.train_base)

    def room(self, sample: Sample, count: int) -> int:
        """Bytes that a pass of `count` such samples is thought to need beside the weights, backward included."""
        return pass_room(self.base, sample.latent.shape, sample.conditioning, count)

    def backward(
        self, lora: InstanceLora | None, draws: Sequence[Draw], share: float, followed: InstanceLora | None = None
    ) -> Tensor:
        """See `hywu_core.training.trainer.Objective`."""
        with torch.inference_mode(False), torch.enable_grad(), self._naming_what_is_in_the_way():
            losses = torch.empty(len(draws))
            for group in self._groups(draws):
                noised = self._noised([draws[index] for index in group], None)
                scale, right = self._loss_scale(noised, share), noised.latents
                if followed is not None:
                    right = self._shown(chosen(followed, group, len(draws)), noised)
                with self.in_training(chosen(lora, group, len(draws)), noised.sigma, scale):
                    found = self._losses(noised, right)
                    (found.sum() * share * scale).backward()
                losses[group] = found.detach().cpu()
        return losses

    def evaluate(self, lora: InstanceLora | None, draws: Sequence[Draw], percent: float | None = None) -> Tensor:
        """The loss of every sample (B,), without a graph; at one noise level for all, if `percent` of the sampling schedule
        says which.
        """
        with torch.inference_mode(False), torch.no_grad():
            losses = torch.empty(len(draws))
            for group in self._groups(draws):
                noised = self._noised([draws[index] for index in group], percent)
                with self.in_training(chosen(lora, group, len(draws)), noised.sigma):
                    losses[group] = self._losses(noised, noised.latents).cpu()
        return losses

    def _shown(self, lora: InstanceLora, noised: Noised) -> Tensor:
        """The latents that the base makes of noisy ones with a LoRA (B, C, ..., H, W), without a graph."""
        with torch.no_grad(), self.in_training(lora, noised.sigma):
            return self._denoised(noised)

    def _denoised(self, noised: Noised) -> Tensor:
        conds = self._conds(noised.entries, noised.noisy)
        return self.carried.call(self.base, noised.noisy, noised.sigma, conds)

    def _losses(self, noised: Noised, right: Tensor) -> Tensor:
        """The loss of every sample (B,), graph kept."""
        spread = _like(prediction_spread(self.base.model_sampling, noised.sigma), noised.latents)
        return ((self._denoised(noised) - right) / spread).float().square().flatten(1).mean(dim=1)

    def _loss_scale(self, noised: Noised, share: float) -> float:
        """What the loss is multiplied by on its way back: the gradient of its mean over a latent's elements is too small for
        float16. A fixed power of two, so that a resumed run is exact.
        """
        if self.train_base or self.base.get_dtype_inference() != torch.float16:
            return 1.0
        return 2.0 ** math.floor(math.log2(noised.latents[0].numel() / share / HEADROOM))

    def _noised(self, draws: Sequence[Draw], percent: float | None) -> Noised:
        device = self.patcher.load_device
        latents = torch.cat([self._latent(draw) for draw in draws]).to(device)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=draw.source) for draw in draws]).to(latents)
        sigma = torch.tensor([self._sigma(draw, percent) for draw in draws], device=device, dtype=latents.dtype)
        noisy = self.base.model_sampling.noise_scaling(_like(sigma, latents), noise, latents)
        return Noised([draw.sample.conditioning for draw in draws], latents, noisy, sigma)

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

    def _groups(self, draws: Sequence[Draw]) -> list[list[int]]:
        """Samples that can pass through the base at once: those of one shape."""
        if self.carried.one_by_one:
            return [[index] for index in range(len(draws))]
        groups: dict[Any, list[int]] = {}
        for index, draw in enumerate(draws):
            groups.setdefault(_shapes(draw.sample), []).append(index)
        return list(groups.values())

    def _stacks_to_recompute(self, wanted: str | None) -> tuple[str, ...]:
        if not wanted:
            return ()
        if self.carried.wrapped:
            logging.warning(
                "HY-WU: %s may act for the time of a model call only, so blocks are not computed again in the backward pass "
                "but remembered, which takes more memory.",
                ", ".join(self.carried.wrapped),
            )
            return ()
        if wanted == ALL_STACKS:
            return tuple(stack.path for stack in find_stacks(self.base))
        return tuple(name.strip() for name in wanted.split(","))

    @contextmanager
    def in_training(self, lora: InstanceLora | None, sigma: Tensor, loss_scale: float = 1.0) -> Iterator[None]:
        """For the time of the block, the host in training mode, LoRAs beside the base, in-place operations made safe."""
        before = comfy.model_management.in_training, self.base.current_patcher
        comfy.model_management.in_training = True
        self.base.current_patcher = self.patcher
        adapters = self.carried.adapters(self.base.model_sampling, sigma)
        factor = partial(GraphFactor, loss_scale=loss_scale)
        for found in () if lora is None else match(lora, self.base).matched:
            adapters.setdefault(found.module, []).append((Adapter(found, lora.scale, factor), 1.0))
        try:
            with ExitStack() as undo:
                undo.enter_context(requiring_gradients(self.base.diffusion_model, self.train_base))
                if not self.train_base:
                    undo.enter_context(frozen(self.patcher))
                undo.enter_context(wrapped_forwards(self.base.diffusion_model, adapters))
                undo.enter_context(safe_in_place(self.base.diffusion_model))
                for stack in self.checkpoint_stack:
                    undo.enter_context(checkpointed(self.base.diffusion_model, stack))
                yield
        finally:
            comfy.model_management.in_training, self.base.current_patcher = before

    @contextmanager
    def _naming_what_is_in_the_way(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "nference tensor" not in str(error) or not self.carried.foreign:
                raise
            raise MatchError(
                f"No gradient passes through what the MODEL carries: {', '.join(self.carried.foreign)} ({error}). Wire the "
                "MODEL from before the nodes that added it."
            ) from error


def pass_room(base: Any, shape: Sequence[int], conditioning: Any, count: int) -> int:
    """Bytes that a pass of `count` samples is thought to need beside the weights, backward included: as the host reckons,
    source pictures included.

    Args:
        shape: of one latent. conditioning: its entry, as the base reads it.
    """
    options = comfy.sampler_helpers.convert_cond([conditioning])[0]
    shapes = {name: [found] * count for name, found in base.extra_conds_shapes(**options).items()}
    return WITH_BACKWARD * int(base.memory_required((count, *shape), cond_shapes=shapes))


def prediction_spread(model_sampling: Any, sigma: Tensor) -> Tensor:
    """(B,) how much the denoised latent moves with what the base predicts: sigma for flow and noise, other for others."""
    at = sigma.unsqueeze(1)
    one, nothing = torch.ones_like(at), torch.zeros_like(at)
    moved = model_sampling.calculate_denoised(sigma, one, nothing)
    still = model_sampling.calculate_denoised(sigma, nothing, nothing)
    return (moved - still).abs().flatten()


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
    wrapped = []
    try:
        for block in diffusion_model.get_submodule(stack):
            wrapped.append((block, vars(block).get("forward")))
            block.forward = _recomputed(block.forward)
        yield
    finally:
        for block, previous in reversed(wrapped):
            vars(block).pop("forward", None)
            # somebody else's, which stays
            if previous is not None:
                block.forward = previous


def differentiable_base(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
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
        copy = patcher.clone(disable_dynamic=True, force_deepcopy=True)
    if copy.is_dynamic():
        raise MatchError(
            "This model cannot be trained on: the host streams its weights through buffers that it uses again, so that a "
            "backward pass would read others. Start ComfyUI with --disable-dynamic-vram."
        )
    return copy


def chosen(lora: InstanceLora | None, group: Sequence[int], count: int) -> InstanceLora | None:
    """The instances of some samples out of `count`; the whole where one instance serves all samples."""
    if lora is None or len(group) == count or lora.batch == 1:
        return lora
    index = list(group)
    return lora.map(lambda pair: LoraFactor(pair.down[index], pair.up[index]))


def _recomputed(forward: Callable) -> Callable:
    def own(value):  # a block adds to its inputs in place; the copy kept for the second time must stay what it was
        return value.clone() if isinstance(value, Tensor) else value

    def inner(args, kwargs):
        return forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    def forward_with_checkpoint(*args, **kwargs):
        return checkpoint(inner, args, kwargs, use_reentrant=False)

    return forward_with_checkpoint


def _like(sigma: Tensor, latents: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (latents.ndim - 1))


def _shapes(sample: Sample) -> tuple:
    """What samples that pass through the base at once have in common."""
    tokens, options = sample.conditioning[0], sample.conditioning[1]
    references = tuple(tuple(latent.shape) for latent in options.get("reference_latents", ()))
    return tuple(sample.latent.shape), tuple(tokens.shape), references
