"""Generators that are wrong in one way each, made from the one that ships; and one that is slow enough to cancel."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hywu_core import Generator, GeneratorConfig, save_generator
from hywu_core.files.checkpoint import CONFIG_FILE, CONFIG_KEY, WEIGHTS_FILE

RENAMED = "model.blocks.0.norm1.weight"


def write_bad_generators(good: Path, folder: Path) -> None:
    """Write them all below `folder`, each as an artist might have it on disk."""
    with safe_open(str(good), framework="pt") as handle:
        config = json.loads(handle.metadata()[CONFIG_KEY])
        state = {name: handle.get_tensor(name) for name in handle.keys()}
    folder.mkdir(parents=True)

    def single(name: str, config: dict, state: dict) -> None:
        save_file(state, folder / f"{name}.safetensors", {CONFIG_KEY: json.dumps(config)})

    def as_folder(name: str) -> Path:
        path = folder / name
        path.mkdir()
        (path / CONFIG_FILE).write_text(json.dumps(config))
        return path

    save_file(state, as_folder("truncated") / WEIGHTS_FILE)
    whole = (folder / "truncated" / WEIGHTS_FILE).read_bytes()
    (folder / "truncated" / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])

    as_folder("empty")
    torch.save(state, as_folder("pickle") / "pytorch_model.bin")
    (folder / "no-config").mkdir()
    save_file(state, folder / "no-config" / "weights.safetensors")

    single("renamed", config, {name + "_" * (name == RENAMED): tensor for name, tensor in state.items()})
    single("integer", config, state | {RENAMED: state[RENAMED].to(torch.int32)})
    weight = state["model.proj_out_A.weight"].clone()
    weight[3, 5] = torch.nan
    single("nan", config, state | {"model.proj_out_A.weight": weight})
    single("rank", config | {"rank": 3}, state)
    single("other-base", config | {"prefix": "transformer_blocks."}, state)
    single("forgetful", config | {"hywu": {k: v for k, v in config["hywu"].items() if k != "instructions"}}, state)
    _fresh(config | {"input_dim": 32, "hywu": {}}, folder / "narrow.safetensors")
    _fresh(
        config | {"rank": 64, "d_model": 256, "dim_accumulation": 1, "num_pg_layers": 8}, folder / "slow.safetensors"
    )


def _fresh(config: dict, path: Path) -> None:
    save_generator(Generator(GeneratorConfig.from_dict(config)).initialize(0), path, dtype=torch.bfloat16)
