"""Instance-conditioned LoRA generation. This package needs torch, numpy and safetensors; `host` and `bases` need ComfyUI."""

from .config import GeneratorConfig
from .errors import (
    CheckpointError,
    ConditionError,
    ConfigError,
    GenerationError,
    HywuError,
    LoraError,
    MatchError,
    SaveError,
)
from .files.checkpoint import load_generator, save_generator
from .generator import Generator
from .lora import InstanceLora, LoraFactor

__all__ = [
    "CheckpointError",
    "ConditionError",
    "ConfigError",
    "GenerationError",
    "Generator",
    "GeneratorConfig",
    "HywuError",
    "InstanceLora",
    "LoraError",
    "LoraFactor",
    "MatchError",
    "SaveError",
    "load_generator",
    "save_generator",
]
