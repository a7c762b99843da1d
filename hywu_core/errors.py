"""Errors a user can cause. Each message says what is wrong, where, what was expected and what to do."""

LONGEST = 3000  # characters of a message; files can hold names of any length, and messages name them


class HywuError(ValueError):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        text, half = super().__str__(), LONGEST // 2
        return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"


class ConfigError(HywuError):
    """A generator's configuration contradicts itself or lacks something."""


class CheckpointError(HywuError):
    """A generator's files are missing, damaged, or do not fit its configuration."""


class LoraError(HywuError):
    """A LoRA's factors do not fit together, or a LoRA file cannot be read."""


class ConditionError(HywuError):
    """A condition is not what the generator reads."""


class GenerationError(HywuError):
    """The generator produced something that must not be used."""


class MatchError(HywuError):
    """A LoRA and a base model do not fit together."""


class SaveError(HywuError):
    """A file could not be written; nothing was left half-written."""
