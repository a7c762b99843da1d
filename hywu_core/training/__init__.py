"""Training generators end to end: the base's own diffusion loss through the frozen base, with no collected LoRAs (paper
Figs 2c and 3).

    Sample       what one picture and one instruction bring: latent, the base's conditioning, the generator's condition
    Trainable    what is trained: a generator, one shared LoRA, or the base itself
    Objective    how well a LoRA does on samples; runs the base and its backward pass (hywu_core.host.training)
    Trainer      the loop: two-stage backward, schedule, EMA, exact resume
    RunLog       its CSV file, and TensorBoard
    geometry     how generated dW lie to each other; statistics: paired intervals

This package knows torch only.
"""

from .data import Sample, SampleSource
from .log import RunLog
from .options import SessionOptions, TrainConfig
from .trainable import FullFineTuning, GeneratorTrainable, SharedLora, Trainable
from .trainer import Objective, StepReport, Trainer, TrainingError

__all__ = [
    "FullFineTuning",
    "GeneratorTrainable",
    "Objective",
    "RunLog",
    "Sample",
    "SampleSource",
    "SessionOptions",
    "SharedLora",
    "StepReport",
    "TrainConfig",
    "Trainable",
    "Trainer",
    "TrainingError",
]
