"""How a run trains: its hyper-parameters, and what a run outside the server is told by a JSON file, flags, or both."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.text import read_json

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}  # what a generator is computed in while it is trained
ALL_STACKS = "all"
RESUME, RESTART, REFUSE = "resume", "restart", "refuse"  # what to do where a run of that name exists

# how the weight of a lesson in weight space goes over a run: to zero at its end, in a line
CONSTANT, FALLING = "constant", "falling"

# what a run that goes on may change: its length, the warm-up that may follow from it, and how it is cut up
FREE = {"steps", "warmup", "micro_batch"}


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of one run. What decides a resumed run's numbers is all here and in the data.

    Raises:
        ConfigError: for a value that makes no sense.
    """

    steps: int = 1000  # optimizer steps
    batch: int = 8  # samples of one optimizer step, over all processes
    micro_batch: int = 0  # samples of one pass through the base; 0: all of a process at once
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 50  # steps over which the learning rate rises from zero
    cosine: bool = True  # fall to zero along a cosine; else constant
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema: float = 0.0  # decay of the averaged weights; 0: none
    diversity: float = 0.0  # weight of the loss against collapse to one LoRA
    seed: int = 0  # of data order, noise and noise levels
    # weight of the base's own loss; 0: the lessons in weight space alone, no pass through the base
    diffusion: float = 1.0
    memory: float = 0.0  # weight of staying with what a teacher writes for old instructions; 0: none
    memory_batch: int = 8  # old instructions of one optimizer step, each on some picture
    memory_schedule: str = CONSTANT
    # weight of the base predicting what it did with a teacher's LoRAs, for old instructions; 0: weight space alone
    prediction: float = 0.0
    prediction_batch: int = 8  # old instructions of one optimizer step for it
    loras: float = 0.0  # weight of writing what LoRA files hold; 0: none
    loras_batch: int = 8  # files of one optimizer step, each on some picture
    loras_schedule: str = CONSTANT

    def __post_init__(self):
        for name in ("steps", "batch", "memory_batch", "prediction_batch", "loras_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")
        weights = ("diffusion", "memory", "prediction", "loras", "diversity")
        for name in ("micro_batch", "warmup", "weight_decay", "clip", *weights):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, found {getattr(self, name)}.")
        for name in ("memory_schedule", "loras_schedule"):
            if getattr(self, name) not in (CONSTANT, FALLING):
                raise ConfigError(f"{name} must be {CONSTANT} or {FALLING}, found {getattr(self, name)!r}.")
        if not (self.diffusion or self.memory or self.loras):
            raise ConfigError("There is nothing to train for: diffusion, memory and loras all have the weight 0.")
        if self.prediction and not self.diffusion:
            raise ConfigError(
                "prediction needs passes through the base, which diffusion 0 leaves out. Set one of them."
            )
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

    def identity(self) -> dict[str, Any]:
        """What must stay when a run goes on, as JSON holds it."""
        # what older runs have not written down, so that those go on
        unused = set() if self.prediction else {"prediction", "prediction_batch"}
        return json.loads(
            json.dumps({name: value for name, value in asdict(self).items() if name not in FREE | unused})
        )


@dataclass(frozen=True)
class SessionOptions:
    """What of a run does not decide its numbers, precision excepted. The defaults of node and script are these.

    Raises:
        ConfigError: for a value that makes no sense.
    """

    precision: str = "float32"  # to compute the generator in; its weights are float32
    save_every: int = 100  # steps between saved states; 0: at the end only
    validate_every: int = 100  # steps between looks at held-out pairs; 0: never
    keep_every: int = 0  # steps after which the generator is kept as it is then; 0: never
    if_exists: str = RESUME
    held_out_limit: int = 64  # pairs that one validation looks at
    checkpoint_stack: str = ALL_STACKS  # of the base, to compute again in the backward pass; "": none
    checkpoint_generator: bool = True

    def __post_init__(self):
        for name in ("save_every", "validate_every", "keep_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, found {getattr(self, name)}.")
        if self.held_out_limit < 1:
            raise ConfigError(f"held_out_limit must be at least 1, found {self.held_out_limit}.")
        for name, choices in (("precision", tuple(PRECISIONS)), ("if_exists", (RESUME, RESTART, REFUSE))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, found {getattr(self, name)!r}.")


# how pictures and words are read, and which of them are trained on; what they are is told by digests
OF_A_NEW_GENERATOR = ("generator_size", "stack", "targets", "rank", "alpha", "source", "encoder_layers")
FILES_OF_A_BASE = ("model", "checkpoint", "text_encoders", "clip_type", "vae", "clip_vision", "weight_dtype")
IDENTIFYING = ("held_out_share", "regime", "text_sees_source", "guidance", "background")


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """One run. Its hyper-parameters (`TrainConfig`) stand beside it, as flags and as keys of the file."""

    output: str = option("out/train", "folder of the run: state, logs, generator")
    pairs: str = option(
        "", "folder with pictures and a pairs.jsonl or pairs.csv (source, target, instruction), or another layout"
    )
    held_out: str = option("", "folder of pairs for validation; by default some pictures of --pairs are held out")
    held_out_share: float = option(0.1, "share of the pictures of --pairs that is held out; 0: no validation")
    held_out_limit: int = option(SessionOptions.held_out_limit, "pairs that one validation looks at")
    size: int = option(0, "side to which pictures are cut and resized; 0: as they are")
    buckets: bool = option(
        False, "with size: cut pictures to the nearest of several shapes of about size x size pixels, not to squares"
    )
    caption_dropout: float = option(
        0.0, "share of the draws in which the base is not told the instruction, for guidance; the generator always is"
    )
    background: str = option("white", "colour under transparent pixels: a name or #rrggbb")
    model: str = option("", "file of the base's diffusion model")
    checkpoint: str = option("", "one file with diffusion model, text encoder and VAE, instead of three")
    text_encoders: tuple[str, ...] = option((), "file or files of the text encoder")
    clip_type: str = option("flux", "kind of text encoder, as in the host's Load CLIP node")
    vae: str = option("", 'file of the VAE, or "pixel_space"')
    clip_vision: str = option("", "file of a CLIP vision model, for a generator that reads one")
    weight_dtype: str = option("default", "type to load the base in", ("default", "float32", "bfloat16", "float16"))
    regime: str = option("told", "told: the base reads the instruction; blind: only the generator", ("told", "blind"))
    text_sees_source: bool = option(False, "show the source picture to the text encoder, if it can see")
    guidance: float = option(0.0, "embedded guidance for bases that have it; 0: the base's default")
    generator: str = option(
        "", "generator to go on from, or a config.json for a new one; by default new, for this base"
    )
    generator_size: str = option("small", "of a new generator", ("small", "medium", "large"))
    stack: str = option(
        "largest", "of a new generator: which stacks of the base's blocks it writes for (a,b), or all stacks"
    )
    targets: str = option("", 'of a new generator: its layers, as patterns ("img_attn.*, img_mlp.*")')
    rank: int = option(16, "of a new generator's LoRAs")
    alpha: float = option(32.0, "of a new generator's LoRAs; their scale is alpha / rank")
    source: str = option("instruction and source picture", "what a new generator reads, as in New HY-WU Generator")
    encoder_layers: int = option(1, "of a new generator, over the condition")
    teacher: str = option(
        "", "generator whose LoRAs are to be kept (memory) or copied (a larger one); by default the one gone on from"
    )
    old_instructions: str = option(
        "", "text file of the instructions that memory asks, one on each line; by default those in the teacher's file"
    )
    lora_files: str = option("", "folder of LoRA files with their instructions, to learn from (loras)")
    dtype: str = option("float32", "type to compute the generator in", ("float32", "bfloat16"))
    checkpoint_stack: str = option(
        SessionOptions.checkpoint_stack,
        'stacks of the base ("double_blocks") to compute again in the backward pass; "all": every one, "": none',
    )
    checkpoint_generator: bool = option(
        SessionOptions.checkpoint_generator, "compute the generator's blocks again in the backward pass"
    )
    save_every: int = option(SessionOptions.save_every, "steps between saved states; 0: at the end only")
    validate_every: int = option(SessionOptions.validate_every, "steps between validations; 0: none")
    keep_every: int = option(SessionOptions.keep_every, "steps after which the generator is kept as it is; 0: never")
    if_exists: str = option(
        SessionOptions.if_exists,
        "where the folder holds a run: go on with it, begin it anew (its state is deleted), or end with an error",
        (RESUME, RESTART, REFUSE),
    )
    cpu: bool = option(False, "keep to the CPU")
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        for name in ("size", "guidance"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, found {getattr(self, name)}.")
        for name in ("held_out_share", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}.")
        for known in fields(self):
            choices, value = known.metadata.get("choices"), getattr(self, known.name)
            if choices and value not in choices:
                raise ConfigError(f"{known.name} must be one of {', '.join(choices)}, found {value!r}.")
        self._check_lessons()
        self.session()
        for reason, names in self._without_effect().items():
            for known in fields(self):
                if known.name in names and getattr(self, known.name) != known.default:
                    raise ConfigError(f"{known.name} has no effect {reason}. Leave it out.")

    def _check_lessons(self) -> None:
        training = self.training
        if training.memory and not (self.teacher or (self.generator and not self.generator.endswith(".json"))):
            raise ConfigError(
                "memory needs a teacher: a trained generator to go on from (generator), or another (teacher)."
            )
        if not training.memory and (self.teacher or self.old_instructions):
            name = "teacher" if self.teacher else "old_instructions"
            raise ConfigError(f"{name} has no effect without memory, which is its weight. Give one, such as 1.")
        if training.prediction:
            raise ConfigError("prediction is for scripts/teach.py, which teaches one new edit. Leave it out.")
        if bool(training.loras) != bool(self.lora_files):
            raise ConfigError(
                "lora_files (a folder) and loras (the weight of what is learned from it) need each other."
            )

    def _without_effect(self) -> dict[str, tuple[str, ...]]:
        """{why: the options that would be dropped}."""
        found = {"with generator, which says what it is": OF_A_NEW_GENERATOR} if self.generator else {}
        if not self.side:
            found["without size: pictures stay as they are then, and those of one size come together"] = ("buckets",)
        if self.regime == "blind":
            found["with the regime blind, where the base is never told"] = ("caption_dropout",)
        return found

    @property
    def side(self) -> int:
        """Pixels to which pictures are cut and resized; 0: as they are."""
        return self.size

    def session(self) -> SessionOptions:
        """What the session is told.

        Raises:
            ConfigError: see `SessionOptions`.
        """
        own = {f.name: getattr(self, f.name) for f in fields(SessionOptions) if f.name != "precision"}
        return SessionOptions(precision=self.dtype, **own)

    def identity(self) -> dict[str, Any]:
        """What must stay when the run goes on, beside the data, the base and the generator."""
        found = {name: getattr(self, name) for name in IDENTIFYING} | {"size": self.side, "precision": self.dtype}
        # beside what older runs have written down, so that those go on
        if self.buckets:
            found["size"] = f"{self.side} in buckets"
        if self.caption_dropout:
            found["regime"] = f"{self.regime} but for {self.caption_dropout:g}"
        return found


def read_arguments(arguments: Sequence[str] | None, description: str, kind: type[RunConfig] = RunConfig) -> RunConfig:
    """The run that a command line asks for: what `--config` names, with flags on top.

    Args:
        kind: with options of its own, if the command has such.
    Raises:
        ConfigError: for a file that cannot be read, an unknown key, or a value that makes no sense.
    """
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help='JSON file with any of the options below, e.g. {"steps": 2000}')
    for known in _options(kind).values():
        _add_flag(parser, known)
    given = vars(parser.parse_args(arguments))
    return build_run(
        read_json(Path(given.pop("config")), ConfigError, "") | given if "config" in given else given, kind
    )


def build_run(values: dict[str, Any], kind: type[RunConfig] = RunConfig) -> RunConfig:
    """A run from flat options: those of its kind and of `TrainConfig`.

    Raises:
        ConfigError: see `read_arguments`.
    """
    known = _options(kind)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(f"There is no option {name!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
        values = values | {name: _converted(name, value, known[name].default)}
    hyper = {f.name for f in fields(TrainConfig)}
    training = TrainConfig(**{name: value for name, value in values.items() if name in hyper})
    return kind(**{name: value for name, value in values.items() if name not in hyper}, training=training)


def _options(kind: type[RunConfig]) -> dict[str, Any]:
    own = {f.name: f for f in fields(kind) if f.name != "training"}
    return own | {f.name: f for f in fields(TrainConfig)}


def _add_flag(parser: argparse.ArgumentParser, known: Any) -> None:
    flag, text = f"--{known.name.replace('_', '-')}", known.metadata.get("help", "hyper-parameter")
    text = f"{text} (default: {known.default!r})".replace("%", "%%")
    if isinstance(known.default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif isinstance(known.default, tuple):
        parser.add_argument(flag, nargs="+", type=type(known.default[0]) if known.default else str, help=text)
    else:
        parser.add_argument(flag, type=type(known.default), choices=known.metadata.get("choices"), help=text)


def _converted(name: str, value: Any, default: Any) -> Any:
    """The value in the type of the option's default. JSON writes 1 for 1.0 and a list for a tuple."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if value.bit_length() < 1000 else math.inf
    if type(value) is not type(default):
        raise ConfigError(f"{name} must be of the kind {type(default).__name__} (as {default!r}), found {value!r}.")
    return value
