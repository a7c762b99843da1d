"""What tests of files begin with: a generator in the released form, and a small LoRA."""

import json

import torch
from safetensors.torch import save_file

from hywu_core import (
    InstanceLora,
    LoraFactor,
)


def sharded(folder, generator):
    """The released form: an index and shards."""
    folder.mkdir()
    state, names = generator.state_dict(), sorted(generator.state_dict())
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name].contiguous() for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(generator.config.to_json())
    return folder


def small_lora(names=("b.0.q", "b.1.q"), scale=2.0):
    source = torch.Generator().manual_seed(0)
    return InstanceLora(
        {n: LoraFactor(torch.randn(1, 4, 6, generator=source), torch.randn(1, 8, 4, generator=source)) for n in names},
        scale,
        {"instruction": "make it warm"},
    )
