"""What a training run outside the server is told: a JSON file, flags, or both."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import TrainConfig

# what may change between the parts of one run
FREE = {"output", "save_every", "validate_every", "held_out_limit", "cpu"}


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """One run. Its hyper-parameters (`TrainConfig`) stand beside it, as flags and as keys of the file."""

    output: str = _option("out/train", "folder of the run: state, logs, generator")
    pairs: str = _option(
        "", "folder with pictures and a pairs.jsonl or pairs.csv (source, target, instruction), or another layout"
    )
    held_out: str = _option("", "folder of pairs for validation; by default some pictures of --pairs are held out")
    held_out_share: float = _option(0.1, "share of the pictures of --pairs that is held out; 0: no validation")
    held_out_limit: int = _option(64, "pairs that one validation looks at")
    size: int = _option(0, "side to which pictures are cut and resized; 0: as they are (pocket editor: 32)")
    background: str = _option("white", "colour under transparent pixels: a name or #rrggbb")
    model: str = _option("", "file of the base's diffusion model")
    checkpoint: str = _option("", "one file with diffusion model, text encoder and VAE, instead of three")
    text_encoders: tuple[str, ...] = _option((), "file or files of the text encoder")
    clip_type: str = _option("flux", "kind of text encoder, as in the host's Load CLIP node")
    vae: str = _option("", 'file of the VAE, or "pixel_space"')
    clip_vision: str = _option("", "file of a CLIP vision model, for a generator that reads one")
    weight_dtype: str = _option("default", "type to load the base in", ("default", "float32", "bfloat16", "float16"))
    regime: str = _option("told", "told: the base reads the instruction; blind: only the generator", ("told", "blind"))
    text_sees_source: bool = _option(False, "show the source picture to the text encoder, if it can see")
    guidance: float = _option(0.0, "embedded guidance for bases that have it; 0: the base's default")
    generator: str = _option(
        "", "generator to go on from, or a config.json for a new one; by default new, for this base"
    )
    generator_size: str = _option("small", "of a new generator", ("small", "medium", "large"))
    stack: str = _option("largest", "of a new generator: which stack of the base's blocks it writes for")
    targets: str = _option("", 'of a new generator: its layers, as patterns ("img_attn.*, img_mlp.*")')
    rank: int = _option(16, "of a new generator's LoRAs")
    alpha: float = _option(32.0, "of a new generator's LoRAs; their scale is alpha / rank")
    source: str = _option("instruction and source picture", "what a new generator reads, as in New HY-WU Generator")
    encoder_layers: int = _option(1, "of a new generator, over the condition")
    pocket: bool = _option(False, "train for the pocket editor, on the pictures that ship with it")
    suite: str = _option("eight", "edits for the pocket editor", ("eight", "sixteen", "instance", "all"))
    variants: int = _option(4, "compositions of each picture that ships, for the pocket editor")
    dtype: str = _option("float32", "type to compute the generator in", ("float32", "bfloat16"))
    checkpoint_stack: str = _option("", 'compute this stack of the base ("double_blocks") again in the backward pass')
    checkpoint_generator: bool = _option(False, "compute the generator's blocks again in the backward pass")
    save_every: int = _option(500, "steps between saved states")
    validate_every: int = _option(500, "steps between validations; 0: none")
    cpu: bool = _option(False, "keep to the CPU")
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        if self.held_out_limit < 1:
            raise ConfigError(f"held_out_limit must be at least 1, found {self.held_out_limit}.")
        for name in ("save_every", "validate_every", "size", "guidance"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, found {getattr(self, name)}.")
        if not 0 <= self.held_out_share < 1:
            raise ConfigError(f"held_out_share must be at least 0 and below 1, found {self.held_out_share}.")
        for option in fields(self):
            choices, value = option.metadata.get("choices"), getattr(self, option.name)
            if choices and value not in choices:
                raise ConfigError(f"{option.name} must be one of {', '.join(choices)}, found {value!r}.")

    def identity(self) -> dict[str, Any]:
        """What may not change when the run goes on, as JSON holds it."""
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name not in FREE}))


def read_arguments(arguments: Sequence[str] | None, description: str) -> RunConfig:
    """The run that a command line asks for: what `--config` names, with flags on top.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, or a value that makes no sense.
    """
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help='JSON file with any of the options below, e.g. {"steps": 2000}')
    for option in _options().values():
        _add_flag(parser, option)
    given = vars(parser.parse_args(arguments))
    return build_run(_read_file(Path(given.pop("config"))) | given if "config" in given else given)


def build_run(values: dict[str, Any]) -> RunConfig:
    """A run from flat options: those of `RunConfig` and of `TrainConfig`.

    Raises:
        ConfigError: see `read_arguments`.
    """
    known = _options()
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(f"There is no option {name!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
        values = values | {name: _converted(name, value, known[name].default)}
    hyper = {f.name for f in fields(TrainConfig)}
    training = TrainConfig(**{name: value for name, value in values.items() if name in hyper})
    return RunConfig(**{name: value for name, value in values.items() if name not in hyper}, training=training)


def _options() -> dict[str, Any]:
    own = {f.name: f for f in fields(RunConfig) if f.name != "training"}
    return own | {f.name: f for f in fields(TrainConfig)}


def _add_flag(parser: argparse.ArgumentParser, option: Any) -> None:
    flag, text = f"--{option.name.replace('_', '-')}", option.metadata.get("help", "hyper-parameter")
    text = f"{text} (default: {option.default!r})".replace("%", "%%")
    if isinstance(option.default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif isinstance(option.default, tuple):
        parser.add_argument(flag, nargs="+", type=type(option.default[0]) if option.default else str, help=text)
    else:
        parser.add_argument(flag, type=type(option.default), choices=option.metadata.get("choices"), help=text)


def _converted(name: str, value: Any, default: Any) -> Any:
    """The value in the type of the option's default. JSON writes 1 for 1.0 and a list for a tuple."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{name} must be of the kind {type(default).__name__} (as {default!r}), found {value!r}.")
    return value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"The configuration {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ConfigError(f"The configuration {path} is not valid JSON ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration {path} must be a JSON object, found {type(values).__name__}.")
    return values
