"""What a HunyuanImage-3 folder says about its model: the keys of config.json and generation_config.json that decide anything.

Where a file is silent, the values are those of the released HunyuanImage-3.0-Instruct.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import comfy.clip_model

from ...errors import CheckpointError
from ...files.text import read_json
from .image_ends import GROUPS

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SUPPORTED = {  # keys whose other values mean another model, and the one that is implemented
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_qk_norm": True,
    "use_mixed_mlp_moe": True,
    "use_cla": False,
    "use_mla": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "moe_drop_tokens": False,
    "moe_layer_num_skipped": 0,
    "rope_type": "2d",
    "cond_image_type": "vae_vit",
    "cond_token_attn_type": "joint_full",
    "img_proj_type": "unet",
    "patch_size": 1,
}

# Bounds far above any model of this kind, so that a damaged number is an error and not an hour of work or all of the memory.
LARGEST = 2**20  # of a whole number that has no bounds of its own here
MAX_MATRICES = 2**16  # experts of all layers; the released model has 2,048
BOUNDS = {  # smallest and largest, both allowed
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "attention_head_dim": (2, 4096),
    "num_experts": (1, 4096),
    "num_shared_expert": (1, 64),
    "max_position_embeddings": (1, 2**24),
    "vocab_size": (1, 2**22),
    "image_base_size": (16, 2**14),  # the sizes of pictures are made of its sixteenths
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
    "vae.layers_per_block": (1, 16),
    "vae.latent_channels": (1, 1024),
    "vae.ffactor_spatial": (1, 256),
    "vae.ffactor_temporal": (1, 256),
    "vae.scaling_factor": (1e-6, 1e6),
    "vit.num_hidden_layers": (1, 512),
    "vit.num_attention_heads": (1, 4096),
    "vit.num_channels": (1, 64),
    "vit.patch_size": (1, 1024),
    "vit.layer_norm_eps": (0.0, 1.0),
    "generation_config.diff_guidance_scale": (0.0, 1e3),
    "generation_config.flow_shift": (1e-3, 1e3),
    "generation_config.temperature": (0.0, 1e3),
    "generation_config.top_k": (0, LARGEST),
    "generation_config.top_p": (0.0, 1.0),
    "generation_config.max_length": (1, 2**24),
}
MAX_STAGES = 16  # of the autoencoder; the released one has 5


@dataclass(frozen=True)
class VaeConfig:
    """The autoencoder: pictures (3, H, W) <-> latents (latent_channels, H / spatial, W / spatial)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    layers_per_block: int = 2
    latent_channels: int = 32
    ffactor_spatial: int = 16  # pixels per latent pixel, along each side
    ffactor_temporal: int = 4  # frames per latent frame; pictures are one latent frame
    downsample_match_channel: bool = True
    upsample_match_channel: bool = True
    scaling_factor: float = 0.562679178327931  # the model's latents are the autoencoder's, times this


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, a SigLIP2 with patches of any number of rows and columns."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_patches: int = 256  # of the square grid of position embeddings
    patch_size: int = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class SamplingConfig:
    """The released defaults of generation_config.json, for image passes and for reasoning."""

    diff_infer_steps: int = 50
    diff_guidance_scale: float = 2.5
    flow_shift: float = 3.0
    temperature: float = 0.6
    top_k: int = 1024
    top_p: float = 0.95
    max_length: int = 22800  # tokens
    drop_think: bool = False


@dataclass(frozen=True)
class BaseConfig:
    """Sizes of one HunyuanImage-3. Names are those of its config.json."""

    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    attention_head_dim: int = 128
    num_experts: int = 64
    moe_topk: int = 8
    num_shared_expert: int = 1
    moe_intermediate_size: int = 3072
    intermediate_size: int = 3072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 22800
    vocab_size: int = 133120
    patch_embed_hidden_dim: int = 1024
    image_base_size: int = 1024  # pixels: pictures have about this side squared
    cfg_distilled: bool = False  # Instruct-Distil: guidance is a token of the sequence
    use_meanflow: bool = False  # Instruct-Distil: the next timestep is a token of the sequence
    max_num_patches: int = 1024  # slots of the vision tower's patches, used or not
    vae: VaeConfig = field(default_factory=VaeConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the expert that every token passes."""
        return self.moe_intermediate_size * self.num_shared_expert

    @property
    def qkv_features(self) -> int:
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.attention_head_dim

    @property
    def distilled(self) -> bool:
        """Whether this is Instruct-Distil."""
        return self.cfg_distilled or self.use_meanflow

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], generation: Mapping[str, Any], where: str = "config") -> BaseConfig:
        """Build from the keys of both files.

        Raises:
            CheckpointError: for another model, or a variant of this one that is not implemented.
        """
        _check_supported(values, where)
        chosen = _pick(cls, {key: _first_of_layers(key, value, where) for key, value in values.items()})
        chosen |= {
            "vae": VaeConfig(**_tuples(_pick(VaeConfig, _object(values, "vae", where)))),
            "vision": VisionConfig(**_pick(VisionConfig, _object(values, "vit", where))),
            "sampling": SamplingConfig(**_pick(SamplingConfig, generation)),
        }
        processor = _object(values, "vit_processor", where)
        if "max_num_patches" in processor:
            chosen["max_num_patches"] = processor["max_num_patches"]
        config = cls(**chosen)
        config._check(where)
        return config

    @classmethod
    def read(cls, folder: Path) -> BaseConfig:
        """Read the two files of a folder; generation_config.json may be absent."""
        config = folder / CONFIG_FILE
        if not config.is_file():
            raise CheckpointError(
                f"{folder} has no {CONFIG_FILE}. Download the whole repository of HunyuanImage-3.0-Instruct into it."
            )
        generation = folder / GENERATION_FILE
        sampling = read_json(generation, CheckpointError) if generation.is_file() else {}
        return cls.from_dict(read_json(config, CheckpointError), sampling, str(config))

    def _check(self, where: str) -> None:
        for part, config in (
            ("", self),
            ("vae.", self.vae),
            ("vit.", self.vision),
            ("generation_config.", self.sampling),
        ):
            for entry in fields(config):
                _check_value(f"{part}{entry.name}", entry.type, getattr(config, entry.name), where)
        problems = {
            f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value heads": (
                self.num_attention_heads % self.num_key_value_heads
            ),
            f"attention_head_dim {self.attention_head_dim} is odd": self.attention_head_dim % 2,
            f"moe_topk {self.moe_topk} is more than the {self.num_experts} experts": self.moe_topk > self.num_experts,
            f"{self.num_experts} experts in each of {self.num_hidden_layers} layers are more than {MAX_MATRICES:,}": (
                self.num_experts * self.num_hidden_layers > MAX_MATRICES
            ),
            f"hidden_size {self.hidden_size} is no multiple of {GROUPS}": self.hidden_size % GROUPS,
            f"patch_embed_hidden_dim {self.patch_embed_hidden_dim} is no multiple of {GROUPS}": (
                self.patch_embed_hidden_dim % GROUPS
            ),
            f"vit.num_patches {self.vision.num_patches} is not a square": (
                math.isqrt(self.vision.num_patches) ** 2 != self.vision.num_patches
            ),
            f"vit.hidden_size {self.vision.hidden_size} is no multiple of its {self.vision.num_attention_heads} heads": (
                self.vision.hidden_size % self.vision.num_attention_heads
            ),
            f"vit.hidden_act {reprlib.repr(self.vision.hidden_act)} is none of {', '.join(comfy.clip_model.ACTIVATIONS)}": (
                self.vision.hidden_act not in comfy.clip_model.ACTIVATIONS
            ),
        }
        if found := [problem for problem, wrong in problems.items() if wrong]:
            raise CheckpointError(f"{where}: {found[0]}.")


def _check_value(name: str, kind: str, value: Any, where: str) -> None:
    """See that a value is of its field's kind and within its bounds."""
    low, high = BOUNDS.get(name, (1, LARGEST))
    if kind == "int" and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
        expected = f"a whole number from {low:,} to {high:,}"
    elif kind == "float" and (
        not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high
    ):
        expected = f"a number from {low:g} to {high:g}"
    elif kind == "bool" and not isinstance(value, bool):
        expected = "true or false"
    elif kind == "str" and not isinstance(value, str):
        expected = "text"
    elif kind.startswith("tuple") and not _are_channels(value):
        expected = f"a list of 1 to {MAX_STAGES} multiples of {GROUPS}, {LARGEST:,} at most"
    else:
        return
    raise CheckpointError(f"{where}: {name} must be {expected}, found {reprlib.repr(value)}.")


def _are_channels(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and 1 <= len(value) <= MAX_STAGES
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= LARGEST and not n % GROUPS for n in value)
    )


def _object(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = values.get(key)
    if not isinstance(found, Mapping | None):
        raise CheckpointError(f"{where}: {key} must be an object, found {reprlib.repr(found)}.")
    return found or {}


def _check_supported(values: Mapping[str, Any], where: str) -> None:
    if "num_experts" not in values or "vae" not in values:
        raise CheckpointError(
            f"{where} is not the configuration of a HunyuanImage-3: it names no num_experts or no vae. "
            "Choose the folder of HunyuanImage-3.0-Instruct."
        )
    for key, supported in SUPPORTED.items():
        found = values.get(key, supported)
        if found != supported:
            raise CheckpointError(
                f"{where}: {key} is {reprlib.repr(found)}, but only {supported!r} is implemented. This is another model than "
                "HunyuanImage-3.0-Instruct."
            )
    scaling = _object(values, "rope_scaling", where)
    if scaling.get("factor", 1.0) != 1.0 or scaling.get("alpha", 1.0) != 1.0:
        raise CheckpointError(f"{where}: rope_scaling {reprlib.repr(scaling)} is not implemented, only a factor of 1.")


def _first_of_layers(key: str, value: Any, where: str) -> Any:
    """Some sizes are lists with a number for each layer; only equal ones are implemented."""
    per_layer = key in ("moe_topk", "moe_intermediate_size", "num_shared_expert", "num_experts")
    if not (per_layer and isinstance(value, list) and value):
        return value
    if any(other != value[0] for other in value):
        raise CheckpointError(f"{where}: {key} differs from layer to layer, which is not implemented.")
    return value[0]


def _pick(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)} - {"vae", "vision", "sampling"}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
