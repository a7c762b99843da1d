"""HunyuanImage-3 on disk: the official folder, and the folder that the conversion writes. Everything is checked by name and
shape before a weight is read.

The official folder keeps every expert's matrices on their own; here they are stacked into banks, one bank at a time, straight
from the memory-mapped shards. A converted folder holds whole banks, quantised or not.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...files.safetensors import open_safetensors
from ...files.shards import DTYPES, INDEX_FILE, Header, folder_shards, read_headers, some
from ...files.text import read_text
from ...host.mapped import mapped_by_host
from . import quantised, vae, vision
from .config import BaseConfig
from .quantised import MARK, Stored
from .transformer import HunyuanImage3

PROMPT_FILE, PROMPT_TEXT_FILE = "system_prompt.py", "system_prompt.txt"
PROMPT_NAME = "unified_system_prompt_en"
PROMPT_HASH = "78b97adc8e7c851ef90562269177a880d0ca0ff16e15c48841f013aad10d9706"  # of the released text
VAE, TOWER = "vae.", ("vision_model.", "vision_aligner.")
LONGEST_SOURCE = 2**20  # characters; the released system_prompt.py has some 20,000
UNUSED = ("vision_model.head.",)  # a pooling head that nothing reads
CONVERSION_FILE = "conversion.json"  # what a folder that the conversion writes is made from
_BANK = re.compile(r"^(?P<layer>model\.layers\.\d+\.mlp\.experts)\.(?P<part>gate_and_up_proj|down_proj)\.weight$")


class BaseFiles(NamedTuple):
    """A base on disk whose headers were read and fit its configuration."""

    folder: Path
    config: BaseConfig
    headers: dict[str, Header]
    kinds: dict[str, str]  # format of every weight that is quantised

    @property
    def quantised(self) -> bool:
        """Whether some weights are in one of the host's quantised formats."""
        return bool(self.kinds)

    def decoder_modules(self, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The diffusion model's weights module by module: (module's path, {key: tensor}), unquantised ones in this dtype.

        A bank that has to be stacked is made in its own memory, where it stays; everything else is memory-mapped.
        """
        modules: dict[str, list[str]] = {}
        for name in decoder_shapes(self.config):
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        with Shards() as shards:
            for module, names in modules.items():
                weights = {name: self._weight(name, shards, dtype) for name in names}
                yield module, weights | self._beside(module, shards)

    def memory_of_its_own(self, dtype: torch.dtype) -> int:
        """Bytes that the diffusion model's weights take beside the mapped files: what is stacked or cast."""
        stored = {name: header.dtype for name, header in self.headers.items()}
        copied = (
            shape
            for name, shape in decoder_shapes(self.config).items()
            if name not in self.kinds and DTYPES.get(stored.get(name)) is not dtype
        )
        return sum(math.prod(shape) for shape in copied) * dtype.itemsize

    def part(self, *prefixes: str, strip: str = "") -> dict[str, Tensor]:
        """Weights whose names begin so, memory-mapped, without the prefix `strip` and without what is unused."""
        with Shards() as shards:
            names = [name for name in self.headers if name.startswith(prefixes) and not name.startswith(UNUSED)]
            return {name.removeprefix(strip): shards.tensor(name, self.headers[name]) for name in names}

    def matrices(self, name: str, shards: Shards) -> Iterator[Tensor]:
        """A weight that is not quantised as it is stored, memory-mapped: a bank expert by expert, else in one piece."""
        keys = expert_keys(name, self.config.num_experts)
        if name in self.headers:
            tensor = shards.tensor(name, self.headers[name])
            yield from tensor if keys else (tensor,)
        else:
            yield from (shards.tensor(key, self.headers[key]) for key in keys)

    def _weight(self, name: str, shards: Shards, dtype: torch.dtype) -> Tensor:
        if name in self.kinds:
            return shards.tensor(name, self.headers[name])
        if name in self.headers:
            return shards.tensor(name, self.headers[name]).to(dtype)
        keys = expert_keys(name, self.config.num_experts)
        bank = torch.empty(len(keys), *self.headers[keys[0]].shape, dtype=dtype)
        with Shards() as briefly:  # so that the pages that were read are given back at once
            for row, matrix in zip(bank, self.matrices(name, briefly), strict=True):
                row.copy_(matrix)
        return bank

    def _beside(self, module: str, shards: Shards) -> dict[str, Tensor]:
        names = [f"{module}.{own}" for own in (MARK, quantised.SCALE, quantised.SCALE_2)]
        return {name: shards.tensor(name, self.headers[name]) for name in names if name in self.headers}


class Shards(ExitStack):
    """Files that stay open while their tensors are read."""

    def __init__(self):
        super().__init__()
        self._open: dict[Path, Callable[[str], Tensor]] = {}
        self.callback(self._open.clear)

    def tensor(self, name: str, header: Header) -> Tensor:
        """Memory-mapped: its bytes are read when they are used."""
        if header.shard not in self._open:
            mapped = mapped_by_host(header.shard)
            if mapped is not None:
                self._open[header.shard] = mapped.__getitem__
            else:
                shard = self.enter_context(open_safetensors(header.shard, CheckpointError))
                self._open[header.shard] = shard.get_tensor
        return self._open[header.shard](name)


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
    if (folder / CONVERSION_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds a conversion that was not finished. Run the same scripts/convert_hunyuan_image3.py again: it "
            "goes on where it stopped."
        )
    config = BaseConfig.read(folder)
    headers = read_headers(folder_shards(folder))
    kinds = _read_kinds(headers)
    _check_census(folder, config, headers, kinds)
    return BaseFiles(folder, config, headers, kinds)


def read_system_prompt(folder: Path) -> str | None:
    """The unified English prompt out of system_prompt.py, which is parsed and never run; a .txt of that stem is taken whole.
    None if neither is there: an edit can bring its own.

    Raises:
        CheckpointError: if the prompt is not in the file.
    """
    text_file, source = folder / PROMPT_TEXT_FILE, folder / PROMPT_FILE
    if text_file.is_file():
        return _plain(read_text(text_file, CheckpointError).strip(), text_file)
    if not source.is_file():
        return None
    text = read_text(source, CheckpointError)
    if len(text) > LONGEST_SOURCE:
        raise CheckpointError(f"{source} has {len(text):,} characters, which Instruct's has not. Download it again.")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: expressions nested too deep
        raise CheckpointError(f"{source} cannot be parsed ({error}). Download it again.") from None
    for node in tree.body:
        targets = [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
        if PROMPT_NAME in targets and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return _known(_plain(node.value.value.strip(), source), source)
    raise CheckpointError(f"{source} assigns no text to {PROMPT_NAME}. It belongs to another model; use Instruct's.")


def decoder_shapes(config: BaseConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the diffusion model's weights, experts in banks.

    Of torch's own layers: under dynamic VRAM the host's have no weights before they are loaded.
    """
    model = HunyuanImage3(config, torch.bfloat16, torch.device("meta"), nn)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def official_shapes(config: BaseConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every weight of the official folder that anything reads, each expert on its own."""
    shapes = {}
    for name, shape in decoder_shapes(config).items():
        keys = expert_keys(name, config.num_experts)
        shapes |= dict.fromkeys(keys, shape[1:]) if keys else {name: shape}
    shapes |= {VAE + name: shape for name, shape in vae.expected_shapes(config.vae).items()}
    tower = vision.VisionTower(config, nn, device="meta", dtype=torch.bfloat16).state_dict()
    return shapes | {name: tuple(tensor.shape) for name, tensor in tower.items()}


def expert_keys(name: str, experts: int) -> list[str]:
    """The official names of the matrices that a bank is stacked from; empty for everything else."""
    found = _BANK.match(name)
    return [f"{found['layer']}.{expert}.{found['part']}.weight" for expert in range(experts)] if found else []


def _read_kinds(headers: Mapping[str, Header]) -> dict[str, str]:
    """{name of a weight: its format} from the marks that lie beside quantised ones."""
    with Shards() as shards:
        return {
            name.removesuffix(MARK) + "weight": quantised.read_mark(name, shards.tensor(name, header))
            for name, header in headers.items()
            if name.endswith(f".{MARK}")
        }


def _expected(config: BaseConfig, headers: Mapping[str, Header], kinds: Mapping[str, str]) -> dict[str, Stored]:
    """Every tensor that a folder must hold, but for marks: as the official one, with banks and formats where it has them."""
    expected = {name: Stored(shape, None) for name, shape in official_shapes(config).items()}
    for name, shape in decoder_shapes(config).items():
        keys = expert_keys(name, config.num_experts) if name in headers else []
        for key in keys:
            expected.pop(key)
        if name in kinds and quantised.can_be_quantised(name):
            module = name.removesuffix("weight")
            expected |= {module + own: kept for own, kept in quantised.stored(kinds[name], shape).items()}
        elif keys:
            expected[name] = Stored(shape, None)
    return expected


def _check_census(folder: Path, config: BaseConfig, headers: Mapping[str, Header], kinds: Mapping[str, str]) -> None:
    expected = _expected(config, headers, kinds)
    known = [name for name in headers if not name.startswith(UNUSED) and not name.endswith(f".{MARK}")]
    problems = [f"missing {name} {list(kept.shape)}" for name, kept in expected.items() if name not in headers]
    problems += [f"unexpected {name} {list(headers[name].shape)}" for name in known if name not in expected]
    problems += [f"{name} is not one that can be quantised" for name in kinds if not quantised.can_be_quantised(name)]
    for name in known:
        wanted, found = expected.get(name), headers[name]
        if wanted is None:
            continue
        if found.shape != wanted.shape:
            problems.append(f"{name} has the shape {list(found.shape)}, expected {list(wanted.shape)}")
        elif found.dtype not in (DTYPES if wanted.dtype is None else (wanted.dtype,)):
            kind = wanted.dtype or "a floating-point type"
            problems.append(f"{name} is stored as {found.dtype}, expected {kind}")
    if problems:
        raise CheckpointError(
            f"{folder} holds {len(known)} tensors where its config.json describes {len(expected)}, and they do not fit: "
            f"{some(problems, '; ')}. Download the files again, or use the config.json that belongs to them."
        )


def _plain(prompt: str, source: Path) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{source} holds half a character ({error}). Download it again.") from None
    return prompt


def _known(prompt: str, source: Path) -> str:
    if hashlib.sha256(prompt.encode()).hexdigest() != PROMPT_HASH:
        logging.warning(
            "HY-WU: the system prompt in %s is not the one that the released generator was trained with.", source
        )
    return prompt
