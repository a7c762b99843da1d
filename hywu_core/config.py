"""The configuration of a generator: the keys of the released `config.json`, validated as a whole."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from . import knowledge, lineage
from .errors import ConfigError
from .files.text import parse_json

GROUPED = "grouped"

# Bounds far above any model that exists, so that a damaged number is an error and not an hour of work or all of the memory.
MAX_WIDTH = 2**20  # features of any layer; the released generator writes for layers of 6,144
MAX_STACKS = 32  # the released one writes for one
MAX_BLOCKS = 128  # of the generator, and of its encoder; the released one has 24
MAX_TARGETS = 2**17  # over all layers of the base; the released one has 224
MAX_EXPERTS = 2**12  # the released one has 64
MAX_RANK = 2**12  # the released one has 16
MAX_ALPHA = 2.0**20  # the released one has 64
MAX_ELEMENTS = 2**38  # of one LoRA; the released one has 722,993,152

FURTHER_STACKS = "further_stacks"  # of `hywu`: a list of objects with the keys below, each as for the first stack
STACK_KEYS = ("prefix", "num_base_model_layers", "pg_mapping")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class TargetStack(NamedTuple):
    """Blocks of the base that follow each other and have LoRAs on the same targets."""

    prefix: str
    num_base_model_layers: int
    pg_mapping: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that decides a generator's shape and the LoRA that it writes.

    Names are those of the released checkpoint. `pg_mapping` lists the targets of one layer, and **its order is the token
    order**: it is kept exactly as given, in and out of JSON. Keys that are not known here survive a round trip in `extra`.

    The released keys describe one stack of the base. A generator may write for more: `hywu["further_stacks"]` is a list of
    objects with a `prefix`, `num_base_model_layers` and `pg_mapping` of their own; rank, alpha and the shape of a token are
    common to all.

    Raises:
        ConfigError: on construction, for every value that contradicts another.
    """

    d_model: int  # width of the generator's transformer
    head_dim: int  # width of one attention head
    num_pg_layers: int  # blocks of the generator
    input_dim: int  # width of the condition
    output_dim: int  # width of the output heads; equals token_dim
    num_base_model_layers: int  # blocks of the base's stack that receive a LoRA
    rank: int  # of every generated factor pair
    alpha: float  # scale = alpha / rank
    token_dim: int  # a token holds rank x token_dim elements
    dim_accumulation: int  # rows of a token that share one position of the sequence
    pg_mapping: dict[str, dict[str, Any]]  # target -> {lora_A_dim: in, lora_B_dim: out} or a grouped entry
    prefix: str = "model.layers."  # of the stack's module path in the base: "<prefix><layer>.<target>"
    hywu: dict[str, Any] = field(default_factory=dict)  # our own keys: base family, condition parts, provenance
    extra: dict[str, Any] = field(default_factory=dict)  # released keys that carry no meaning here

    def __post_init__(self):
        self._check_numbers()
        self._check_widths()
        self._check_further_stacks()
        self._check_mappings()
        self._check_condition()
        lineage.check(self.hywu)
        knowledge.check(self.hywu)

    @property
    def scale(self) -> float:
        """What multiplies B.A when a LoRA is applied: alpha / rank."""
        return self.alpha / self.rank

    @property
    def heads(self) -> int:
        return self.d_model // self.head_dim

    @property
    def encoder_layers(self) -> int:
        """Self-attention layers over the condition, trained with the generator. The released one has none."""
        return self.hywu.get("encoder_layers", 0)

    @property
    def stacks(self) -> tuple[TargetStack, ...]:
        """Every stack that receives LoRAs, the one of the released keys first."""
        further = self.hywu.get(FURTHER_STACKS, ())
        return tuple(TargetStack(*(found[key] for key in STACK_KEYS)) for found in (vars(self), *further))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> GeneratorConfig:
        """Build from the keys of a `config.json`; `where` names the source in errors."""
        known = {f.name for f in fields(cls)} - {"extra"}
        required = known - {"prefix", "hywu"}
        missing = sorted(required - values.keys())
        if missing:
            raise ConfigError(f"{where}: not the configuration of a HY-WU generator, missing {', '.join(missing)}.")
        chosen = {key: values[key] for key in values if key in known}
        extra = {key: values[key] for key in values if key not in known}
        try:
            return cls(**chosen, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_json(cls, text: str, where: str = "config") -> GeneratorConfig:
        """Parse the text of a `config.json`. The order of `pg_mapping` is kept."""
        return cls.from_dict(parse_json(text, where, ConfigError), where)

    def to_dict(self) -> dict[str, Any]:
        """The keys of a `config.json`, unknown ones included, `pg_mapping` in its order."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "hywu")}
        return values | ({"hywu": self.hywu} if self.hywu else {}) | self.extra

    def to_json(self) -> str:
        """The text of a `config.json`. Keys are never sorted: the order of `pg_mapping` is the token order."""
        return json.dumps(self.to_dict(), indent=2)

    def _check_numbers(self) -> None:
        largest = {"num_pg_layers": MAX_BLOCKS, "num_base_model_layers": MAX_TARGETS, "rank": MAX_RANK}
        for name in (f.name for f in fields(self) if f.type == "int"):
            _check_positive(name, getattr(self, name), largest.get(name, MAX_WIDTH))
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not 0 < self.alpha <= MAX_ALPHA:
            raise ConfigError(
                f"alpha must be a positive number, found {_shown(self.alpha)} (at most {MAX_ALPHA:,.0f})."
            )
        if not isinstance(self.prefix, str):
            raise ConfigError(f"prefix must be text, found {_shown(self.prefix)}.")
        if not isinstance(self.hywu, dict):
            raise ConfigError(f"hywu must be an object, found {_shown(self.hywu)}.")
        if not isinstance(self.hywu.get("base"), str | None):
            raise ConfigError(f"hywu.base must be the name of a base, found {_shown(self.hywu['base'])}.")
        layers = self.encoder_layers
        if not isinstance(layers, int) or isinstance(layers, bool) or not 0 <= layers <= MAX_BLOCKS:
            raise ConfigError(
                f"hywu.encoder_layers must be a number of layers from 0 to {MAX_BLOCKS}, found {_shown(layers)}."
            )

    def _check_widths(self) -> None:
        if self.rank % self.dim_accumulation:
            raise ConfigError(
                f"rank {self.rank} must be divisible by dim_accumulation {self.dim_accumulation}: "
                "that many rows of a token share one position of the sequence."
            )
        if self.d_model % self.dim_accumulation:
            raise ConfigError(f"d_model {self.d_model} must be divisible by dim_accumulation {self.dim_accumulation}.")
        if self.output_dim != self.token_dim:
            raise ConfigError(f"output_dim {self.output_dim} must equal token_dim {self.token_dim}.")
        if self.d_model % self.head_dim:
            raise ConfigError(f"d_model {self.d_model} must be divisible by head_dim {self.head_dim}.")
        if self.head_dim % 4:
            raise ConfigError(
                f"head_dim {self.head_dim} must be divisible by 4: two axes of rotary positions, two numbers each."
            )

    def _check_further_stacks(self) -> None:
        further = self.hywu.get(FURTHER_STACKS, ())
        where = f"hywu.{FURTHER_STACKS}"
        if not isinstance(further, (list, tuple)) or len(further) >= MAX_STACKS:
            raise ConfigError(f"{where} must be a list of less than {MAX_STACKS} stacks, found {_shown(further)}.")
        for number, stack in enumerate(further):
            own = f"{where}[{number}]"
            if not isinstance(stack, dict) or set(stack) != set(STACK_KEYS):
                raise ConfigError(f"{own} must be an object with {', '.join(STACK_KEYS)}, found {_shown(stack)}.")
            _check_positive(f"{own}.num_base_model_layers", stack["num_base_model_layers"], MAX_TARGETS)
            if not isinstance(stack["prefix"], str):
                raise ConfigError(f"{own}.prefix must be text, found {_shown(stack['prefix'])}.")
        # names of targets are a prefix, a number and the rest: they are distinct if no prefix continues another
        prefixes = sorted(stack.prefix for stack in self.stacks)
        for shorter, longer in zip(prefixes, prefixes[1:], strict=False):
            if longer.startswith(shorter):
                raise ConfigError(
                    f"{where}: the prefix {_shown(longer)} begins with that of another stack, {_shown(shorter)}; "
                    "the names of their targets could be the same."
                )

    def _check_mappings(self) -> None:
        count, elements = 0, 0
        for number, stack in enumerate(self.stacks):
            where = f"hywu.{FURTHER_STACKS}[{number - 1}].pg_mapping" if number else "pg_mapping"
            sizes = _sizes(stack.pg_mapping, where)
            count += len(sizes) * stack.num_base_model_layers
            elements += stack.num_base_model_layers * self.rank * sum(sizes.values())
            if count > MAX_TARGETS:
                raise ConfigError(
                    f"{len(sizes)} targets in each of {stack.num_base_model_layers} layers are more than {MAX_TARGETS:,}."
                )
        if elements > MAX_ELEMENTS:
            raise ConfigError(f"Its LoRAs would have {elements:,} elements, more than {MAX_ELEMENTS:,}.")

    def _check_condition(self) -> None:
        if "condition" not in self.hywu:  # a released generator
            return
        parts = self.hywu["condition"]
        if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, dict) for part in parts):
            raise ConfigError(
                f"hywu.condition must be a list of parts, each with kind and width, found {_shown(parts)}."
            )
        kinds = [part.get("kind") for part in parts]
        if not all(isinstance(kind, str) for kind in kinds) or len(set(kinds)) < len(kinds):
            raise ConfigError(
                f"hywu.condition must name each of its parts by a kind of its own, found {_shown(kinds)}."
            )
        for part in parts:
            _check_positive(f"hywu.condition, the width of {_shown(part['kind'])}", part.get("width"), MAX_WIDTH)
            if "patch" in part:
                _check_positive(f"hywu.condition, the patch of {_shown(part['kind'])}", part["patch"], MAX_WIDTH)
        if sum(part["width"] for part in parts) != self.input_dim:
            widths = " + ".join(str(part["width"]) for part in parts)
            raise ConfigError(f"input_dim {self.input_dim} must be the sum of the condition's widths {widths}.")


def _sizes(mapping: Any, where: str) -> dict[str, int]:
    """{target of one layer: experts x (in + out)}"""
    if not isinstance(mapping, dict) or not mapping:
        raise ConfigError(f"{where} must name at least one target.")
    sizes: dict[str, int] = {}
    for name, entry in mapping.items():
        own = f"{where}[{_shown(name)}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{own} must be an object, found {_shown(entry)}.")
        kind = entry.get("type")
        if kind not in (None, GROUPED):
            raise ConfigError(f'{own} has the unknown type {_shown(kind)}; expected none or "{GROUPED}".')
        for target, size in _sizes_of_group(name, entry, own) if kind else [(name, _check_dims(own, entry))]:
            if target in sizes:
                raise ConfigError(f"{own}: the target {_shown(target)} is named twice.")
            sizes[target] = size
    return sizes


def _sizes_of_group(name: str, entry: dict[str, Any], where: str) -> list[tuple[str, int]]:
    experts, parts = entry.get("num_experts"), entry.get("sub_weights")
    _check_positive(f"{where}.num_experts", experts, MAX_EXPERTS)
    if not isinstance(parts, dict) or not parts:
        raise ConfigError(f"{where}.sub_weights must name at least one weight.")
    return [
        (f"{name}.{part}", experts * _check_dims(f"{where}.sub_weights[{_shown(part)}]", dims))
        for part, dims in parts.items()
    ]


def _check_dims(where: str, entry: Any) -> int:
    """The elements of both factors for each of the rank."""
    dims = entry if isinstance(entry, dict) else {}
    for key in ("lora_A_dim", "lora_B_dim"):
        _check_positive(f"{where}.{key}", dims.get(key), MAX_WIDTH)
    return dims["lora_A_dim"] + dims["lora_B_dim"]


def _check_positive(where: str, value: Any, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where} must be a positive integer, found {_shown(value)}.")
    if value > largest:
        raise ConfigError(f"{where} must be at most {largest:,}, found {_shown(value)}.")


def _shown(value: Any) -> str:
    """A bad value as far as an error can show it. The longest whole numbers cannot be printed at all."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a far larger number"
    return _SHORT.repr(value)
