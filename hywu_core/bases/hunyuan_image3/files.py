"""HunyuanImage-3 on disk: the official folder, and the folder that the conversion writes. Everything is checked by name and
shape before a weight is read.

The official folder keeps every expert's matrices on their own; here they are stacked into banks, one bank at a time, straight
from the memory-mapped shards. A converted folder holds whole banks, quantised or not.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import comfy.ops
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files import open_safetensors
from ...shards import Header, folder_shards, read_headers, some
from . import vae, vision
from .config import BaseConfig
from .transformer import HunyuanImage3

PROMPT_FILE = "system_prompt.py"
PROMPT_NAME = "unified_system_prompt_en"
PROMPT_HASH = "78b97adc8e7c851ef90562269177a880d0ca0ff16e15c48841f013aad10d9706"  # of the released text
VAE, TOWER = "vae.", ("vision_model.", "vision_aligner.")
UNUSED = ("vision_model.head.",)  # a pooling head that nothing reads
QUANTISATION = (".comfy_quant", ".weight_scale", ".weight_scale_2")  # what the host keeps beside a quantised weight
_BANK = re.compile(r"^(?P<layer>model\.layers\.\d+\.mlp\.experts)\.(?P<part>gate_and_up_proj|down_proj)\.weight$")


class BaseFiles(NamedTuple):
    """A base on disk whose headers were read and fit its configuration."""

    folder: Path
    config: BaseConfig
    headers: dict[str, Header]

    @property
    def quantised(self) -> bool:
        """Whether some weights are in one of the host's quantised formats."""
        return any(name.endswith(QUANTISATION[0]) for name in self.headers)

    def decoder_groups(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The diffusion model's weights module by module: (module's path, {key: tensor}), banks stacked. One group is in
        memory at a time, beside what the caller keeps.
        """
        with _Shards() as shards:
            for name in decoder_shapes(self.config):
                if not name.endswith((".weight", ".bias")):
                    continue
                yield name, {name: self._weight(name, shards)} | self._beside(name, shards)

    def part(self, *prefixes: str, strip: str = "") -> dict[str, Tensor]:
        """Weights whose names begin so, memory-mapped, without the prefix `strip` and without what is unused."""
        with _Shards() as shards:
            names = [name for name in self.headers if name.startswith(prefixes) and not name.startswith(UNUSED)]
            return {name.removeprefix(strip): shards.tensor(name, self.headers[name]) for name in names}

    def _weight(self, name: str, shards: _Shards) -> Tensor:
        if name in self.headers:
            return shards.tensor(name, self.headers[name])
        experts = [shards.tensor(key, self.headers[key]) for key in expert_keys(name, self.config.num_experts)]
        bank = torch.empty(len(experts), *experts[0].shape, dtype=experts[0].dtype)
        for row, expert in zip(bank, experts, strict=True):
            row.copy_(expert)
        return bank

    def _beside(self, name: str, shards: _Shards) -> dict[str, Tensor]:
        module = name.rpartition(".")[0]
        names = [module + suffix for suffix in QUANTISATION] if name.endswith(".weight") else []
        return {key: shards.tensor(key, self.headers[key]) for key in names if key in self.headers}


class _Shards(ExitStack):
    """Files that stay open while their tensors are read."""

    def __init__(self):
        super().__init__()
        self._open: dict[Path, object] = {}

    def tensor(self, name: str, header: Header) -> Tensor:
        """Memory-mapped: its bytes are read when they are used."""
        if header.shard not in self._open:
            self._open[header.shard] = self.enter_context(open_safetensors(header.shard, CheckpointError))
        return self._open[header.shard].get_tensor(name)


def inspect_base(folder: str | Path) -> BaseFiles:
    """Read the configuration and all headers of a folder and check them against each other. Loads no weights.

    Raises:
        CheckpointError: naming the file, and the tensors that are missing, unexpected or mis-shaped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. Choose the folder that holds HunyuanImage-3.0-Instruct: config.json, tokenizer.json, "
            "system_prompt.py and the .safetensors files."
        )
    config = BaseConfig.read(folder)
    headers = read_headers(folder_shards(folder))
    _check_census(folder, config, headers)
    return BaseFiles(folder, config, headers)


def read_system_prompt(folder: Path) -> str:
    """The unified English prompt out of system_prompt.py, which is parsed and never run; a .txt of that stem is taken whole.

    Raises:
        CheckpointError: if neither file is there, or the prompt is not in it.
    """
    text_file, source = folder / "system_prompt.txt", folder / PROMPT_FILE
    if text_file.is_file():
        return text_file.read_text(encoding="utf-8").strip()
    if not source.is_file():
        raise CheckpointError(
            f"{folder} has no {PROMPT_FILE}. Copy it from the repository of HunyuanImage-3.0-Instruct, or write the system "
            "prompt of your choice into system_prompt.txt there."
        )
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be parsed ({error}). Download it again.") from None
    for node in tree.body:
        targets = [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
        if PROMPT_NAME in targets and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return _known(node.value.value.strip(), source)
    raise CheckpointError(f"{source} assigns no text to {PROMPT_NAME}. It belongs to another model; use Instruct's.")


def decoder_shapes(config: BaseConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the diffusion model's weights, experts in banks."""
    model = HunyuanImage3(config, torch.bfloat16, torch.device("meta"), comfy.ops.disable_weight_init)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def official_shapes(config: BaseConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every weight of the official folder that anything reads, each expert on its own."""
    shapes = {}
    for name, shape in decoder_shapes(config).items():
        keys = expert_keys(name, config.num_experts)
        shapes |= dict.fromkeys(keys, shape[1:]) if keys else {name: shape}
    shapes |= {VAE + name: shape for name, shape in vae.expected_shapes(config.vae).items()}
    tower = vision.build(config, torch.bfloat16).state_dict()
    return shapes | {name: tuple(tensor.shape) for name, tensor in tower.items()}


def expert_keys(name: str, experts: int) -> list[str]:
    """The official names of the matrices that a bank is stacked from; empty for everything else."""
    found = _BANK.match(name)
    return [f"{found['layer']}.{expert}.{found['part']}.weight" for expert in range(experts)] if found else []


def _check_census(folder: Path, config: BaseConfig, headers: Mapping[str, Header]) -> None:
    expected = official_shapes(config)
    banks = decoder_shapes(config)
    quantised = {name.removesuffix(QUANTISATION[0]) + ".weight" for name in headers if name.endswith(QUANTISATION[0])}
    for name in banks:
        if name in headers:  # a bank that is stacked in the file
            for key in expert_keys(name, config.num_experts):
                expected.pop(key)
            expected.setdefault(name, banks[name])
    known = [name for name in headers if not name.startswith(UNUSED) and not name.endswith(QUANTISATION)]
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in headers]
    problems += [f"unexpected {name} {list(headers[name].shape)}" for name in known if name not in expected]
    for name in known:
        wanted, shape = expected.get(name), headers[name].shape
        if name in quantised and wanted is not None:  # a packed format keeps fewer columns
            wanted, shape = wanted[:-1], shape[:-1]
        if wanted is not None and shape != wanted:
            problems.append(f"{name} has the shape {list(shape)}, expected {list(wanted)}")
    if problems:
        raise CheckpointError(
            f"{folder} holds {len(known)} tensors where its config.json describes {len(expected)}, and they do not fit: "
            f"{some(problems, '; ')}. Download the files again, or use the config.json that belongs to them."
        )


def _known(prompt: str, source: Path) -> str:
    if hashlib.sha256(prompt.encode()).hexdigest() != PROMPT_HASH:
        logging.warning(
            "HY-WU: the system prompt in %s is not the one that the released generator was trained with.", source
        )
    return prompt
