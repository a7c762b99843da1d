"""Damage every kind of file that is read here, at random, and see that each reader answers with one typed error, soon.

    python scripts/fuzz.py --executions 200000 --seed 1 --keep out/fuzz

Whatever is raised beside HywuError, and whatever takes longer than --seconds, is an escape: it is counted by reader and
place, and the smallest input that leads there is kept. The exit code is 1 if there was any. COMFYUI_DIR names the host.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_damage import damage_bytes, damage_safetensors, damage_state, json_text
from in_host import ROOT, enter_host

enter_host()

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from hywu_core.bases.hunyuan_image3.config import BaseConfig  # noqa: E402
from hywu_core.bases.hunyuan_image3.files import inspect_base, read_system_prompt  # noqa: E402
from hywu_core.bases.hunyuan_image3.tokenizer import Tokenizer  # noqa: E402
from hywu_core.config import GeneratorConfig  # noqa: E402
from hywu_core.errors import HywuError  # noqa: E402
from hywu_core.files.checkpoint import load_generator, save_generator  # noqa: E402
from hywu_core.files.lora_files import from_state_dict, load_lora, save_lora, to_state_dict  # noqa: E402
from hywu_core.files.quantised import STORED  # noqa: E402
from hywu_core.files.text import parse_json  # noqa: E402
from hywu_core.generator import Generator  # noqa: E402
from hywu_core.host import memory  # noqa: E402
from hywu_core.host.training.pairs_of_folder import read_pairs  # noqa: E402
from hywu_core.layout import target_names  # noqa: E402
from hywu_core.lora import InstanceLora, LoraFactor, blend  # noqa: E402
from hywu_core.training import GeneratorTrainable, RunLog, TrainConfig, Trainer  # noqa: E402
from hywu_core.training.options import read_arguments  # noqa: E402

MEMORY = 4 * 2**30  # bytes of address space that all inputs together may add
BASE = ROOT / "tests" / "fixtures" / "base_tiny"
CONFIG = {
    "d_model": 16, "head_dim": 8, "num_pg_layers": 1, "input_dim": 8, "output_dim": 8, "token_dim": 8, "rank": 2,
    "num_base_model_layers": 2, "alpha": 4.0, "dim_accumulation": 2, "prefix": "layers.",
    "hywu": {
        "encoder_layers": 1, "base": "Flux", "condition": [{"kind": "conditioning", "width": 8}],
        "further_stacks": [
            {"prefix": "more.", "num_base_model_layers": 3, "pg_mapping": {"w": {"lora_A_dim": 8, "lora_B_dim": 6}}},
        ],
    },
    "pg_mapping": {
        "q": {"lora_A_dim": 6, "lora_B_dim": 10},
        "qkv[0:4/8]": {"lora_A_dim": 6, "lora_B_dim": 4},
        "mlp.experts": {"type": "grouped", "num_experts": 2, "sub_weights": {"w1": {"lora_A_dim": 4, "lora_B_dim": 6}}},
    },
}  # fmt: skip
CSV = b'source,target,instruction\na.png,b.png,make it warm\na.png,b.png,"warm, and ""cold"""\n'
JSONL = b'{"source": "a.png", "target": "b.png", "instruction": "make it warm"}\n' * 3
LOG = b"step,loss,rate,gradient_norm\r\n" + b"".join(b"%d,0.5,0.001,1.5\r\n" % step for step in range(6))
PROMPT = b'import os\n\nx = (1 + 2) * 3\nunified_system_prompt_en = """You edit images.\n"""\n'


class TooLongError(BaseException):
    """An input took more than its time."""


class Reader(NamedTuple):
    """Something that is read."""

    name: str
    inputs: tuple[Any, ...]  # that are right
    damage: Callable[[random.Random, Any], Any]
    read: Callable[[Any], None]
    share: float = 1.0  # of the executions, relative to others'; slow ones get fewer


class Escape(NamedTuple):
    """What came out beside a typed error."""

    reader: str
    kind: str  # of what was raised
    place: str  # the deepest line of ours


def a_lora() -> InstanceLora:
    """A LoRA with a plain, a sliced and a grouped target."""
    source = torch.Generator().manual_seed(0)

    def pair(down: tuple[int, ...], up: tuple[int, ...]) -> LoraFactor:
        return LoraFactor(torch.randn(1, *down, generator=source), torch.randn(1, *up, generator=source))

    factors = {
        "b.0.q": pair((2, 6), (10, 2)),
        "b.0.qkv[0:4/8]": pair((2, 6), (4, 2)),
        "b.0.mlp.experts.w1": pair((2, 2, 4), (2, 6, 2)),
    }
    return InstanceLora(factors, 2.0, {"instruction": "make it warm"})


def trainer() -> Trainer:
    """A run to resume."""
    config = GeneratorConfig.from_dict(CONFIG)
    return Trainer(GeneratorTrainable(Generator(config).initialize()), None, [], TrainConfig(steps=9, batch=1, ema=0.5))


def readers(folder: Path) -> list[Reader]:
    """All of them; files are made below a folder."""
    config = GeneratorConfig.from_dict(CONFIG)
    generator = Generator(config).initialize()
    single = save_generator(generator, folder / "single.safetensors")
    whole = save_generator(generator, folder / "whole")
    weights = {name: "model.safetensors" for name in generator.state_dict()}
    (folder / "indexed").mkdir()
    shutil.copytree(whole, folder / "indexed", dirs_exist_ok=True)
    lora, loras = folder / "lora.safetensors", []
    for state in (to_state_dict(a_lora()), _kohya(), _experts()):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, lora)
        loras.append(lora.read_bytes())
    loras.append(save_lora(a_lora(), lora).read_bytes())
    run = trainer()
    for parameter in run.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.save(folder / "state.safetensors")
    pairs = folder / "pairs"
    pairs.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(pairs / name)
    shutil.copytree(BASE, folder / "base")
    base, sampling = (json.loads((BASE / name).read_text()) for name in ("config.json", "generation_config.json"))

    def written(path: Path, read: Callable[[], Any]) -> Callable[[bytes], None]:
        def do(content: bytes) -> None:
            path.write_bytes(content)
            read()

        return do

    def build(text: bytes) -> None:
        found = GeneratorConfig.from_json(text.decode("utf-8", "replace"))
        found.to_json()
        target_names(found)
        Generator(found, device="meta")

    def use(found: InstanceLora) -> None:
        blend([found, found], [0.5, 0.5])
        to_state_dict(found)

    def read_log(content: bytes) -> None:
        (folder / "log" / "validation.csv").write_bytes(content)
        (folder / "log" / "log.csv").write_bytes(content)
        RunLog(folder / "log", 4)

    def read_list(name: str) -> Callable[[bytes], None]:
        def do(content: bytes) -> None:
            for other in ("pairs.csv", "pairs.jsonl", "metadata.jsonl"):
                (pairs / other).unlink(missing_ok=True)
            (pairs / name).write_bytes(content)
            read_pairs(pairs)

        return do

    def read_base(text: bytes) -> None:
        values = parse_json(text.decode("utf-8", "replace"), "config", HywuError)
        BaseConfig.from_dict(values, {})

    def read_sampling(text: bytes) -> None:
        BaseConfig.from_dict(base, parse_json(text.decode("utf-8", "replace"), "config", HywuError))

    def read_prompt(name: str) -> Callable[[bytes], None]:
        def do(content: bytes) -> None:
            for other in ("system_prompt.py", "system_prompt.txt"):
                (folder / "prompt" / other).unlink(missing_ok=True)
            (folder / "prompt" / name).write_bytes(content)
            read_system_prompt(folder / "prompt")

        return do

    for name in ("log", "prompt"):
        (folder / name).mkdir()
    tiny = BaseConfig.read(BASE)
    index, tokens = folder / "indexed" / "model.safetensors.index.json", (BASE / "tokenizer.json").read_bytes()
    found = [
        Reader("generator config", (CONFIG,), json_text, build),
        Reader("generator folder", (CONFIG,), json_text, written(whole / "config.json", lambda: load_generator(whole))),
        Reader(
            "shard index", ({"weight_map": weights},), json_text, written(index, lambda: load_generator(index.parent))
        ),
        Reader(
            "generator file",
            (single.read_bytes(),),
            damage_safetensors,
            written(single, lambda: load_generator(single)),
        ),
        Reader(
            "quantised generator",
            tuple(save_generator(generator, single, kind).read_bytes() for kind in STORED),
            damage_safetensors,
            written(single, lambda: memory.load(single)),
        ),
        Reader("LoRA file", tuple(loras), damage_safetensors, written(lora, lambda: use(load_lora(lora)))),
        Reader("LoRA state dict", (_kohya(), _experts()), damage_state, lambda state: use(from_state_dict(state))),
        Reader("pairs.csv", (CSV,), damage_bytes, read_list("pairs.csv")),
        Reader("pairs.jsonl", (JSONL,), damage_bytes, read_list("pairs.jsonl")),
        Reader(
            "run state",
            ((folder / "state.safetensors").read_bytes(),),
            damage_safetensors,
            written(folder / "state.safetensors", lambda: trainer().resume(folder / "state.safetensors")),
            0.5,
        ),
        Reader(
            "run config",
            (
                {
                    "steps": 20,
                    "betas": [0.9, 0.95],
                    "pairs": "x",
                    "size": 32,
                    "regime": "told",
                    "text_encoders": ["a"],
                },
            ),
            json_text,
            written(folder / "run.json", lambda: read_arguments(["--config", str(folder / "run.json")], "")),
        ),
        Reader("run log", (LOG,), damage_bytes, read_log, 0.4),
        Reader("base config", (base,), json_text, read_base),
        Reader("base sampling", (sampling,), json_text, read_sampling),
        Reader(
            "base folder",
            (base,),
            json_text,
            written(folder / "base" / "config.json", lambda: inspect_base(folder / "base")),
            0.2,
        ),
        Reader("system prompt, source", (PROMPT,), damage_bytes, read_prompt("system_prompt.py")),
        Reader("system prompt, text", (b"You edit images.\n",), damage_bytes, read_prompt("system_prompt.txt")),
        Reader(
            "tokenizer",
            (tokens,),
            damage_bytes,
            written(folder / "base" / "tokenizer.json", lambda: Tokenizer.read(folder / "base", tiny)),
        ),
    ]
    assert load_file(single)
    return found


def _kohya() -> dict[str, torch.Tensor]:
    return {
        "lora_unet_q.lora_down.weight": torch.ones(2, 6), "lora_unet_q.lora_up.weight": torch.ones(8, 2),
        "lora_unet_q.alpha": torch.tensor(1.0), "lora_unet_c.lora_down.weight": torch.ones(2, 4, 1, 1),
        "lora_unet_c.lora_up.weight": torch.ones(4, 2, 1, 1), "lora_unet_c.alpha": torch.tensor(2.0),
    }  # fmt: skip


def _experts() -> dict[str, torch.Tensor]:
    shapes = {"lora_A": (2, 4), "lora_B": (6, 2)}
    return {f"m.experts.{e}.down_proj.{f}.weight": torch.ones(s) for e in range(2) for f, s in shapes.items()}


def run(executions: int, seed: int, seconds: float, keep: Path | None = None, only: str = "") -> Counter[Escape]:
    """Share the executions out among all readers, print what came of it, and give the escapes."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit = resource.getrlimit(resource.RLIMIT_AS)
    try:
        chosen = [reader for reader in readers(folder) if only in reader.name]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limit[1]))
        escapes: Counter[Escape] = Counter()
        total, left = sum(reader.share for reader in chosen), executions
        for number, reader in enumerate(chosen):
            for given in reader.inputs:  # what is whole must be read, or nothing behind its first check would be tried
                reader.read(json.dumps(given).encode() if reader.damage is json_text else given)
            share = left if number == len(chosen) - 1 else round(executions * reader.share / total)
            left -= share
            escapes += _run_reader(reader, share, random.Random(f"{seed} {reader.name}"), seconds, keep)
        return escapes
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)


def _run_reader(
    reader: Reader, executions: int, chance: random.Random, seconds: float, keep: Path | None
) -> Counter[Escape]:
    counts, escapes, smallest = Counter(), Counter(), {}
    start, slowest = time.monotonic(), 0.0
    for _ in range(executions):
        given = reader.damage(chance, chance.choice(reader.inputs))
        begun = time.process_time()
        escape = _try(reader, given, seconds, counts)
        slowest = max(slowest, time.process_time() - begun)
        if escape:
            escapes[escape] += 1
            text = given if isinstance(given, bytes) else repr(given)[:100_000].encode("utf-8", "replace")
            if len(text) < len(smallest.get(escape, text + b" ")):
                smallest[escape] = text
    took = time.monotonic() - start
    print(
        f"{reader.name:22} {executions:7} executions, {counts['refused']:7} refused, {counts['read']:7} read, "
        f"{sum(escapes.values()):5} escapes, slowest {slowest:.2f} s, {took:.0f} s",
        flush=True,
    )
    for number, (escape, count) in enumerate(escapes.most_common()):
        print(f"    {count:5} {escape.kind} at {escape.place}: {smallest[escape][:120]!r}", flush=True)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{reader.name.replace(' ', '-')}-{number}").write_bytes(smallest[escape])
    return escapes


def _try(reader: Reader, given: Any, seconds: float, counts: Counter) -> Escape | None:
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        reader.read(given)
        counts["read"] += 1
    except HywuError as error:
        counts["refused"] += 1
        if len(str(error)) > 4000:
            return Escape(reader.name, f"{type(error).__name__} of many characters", _place(error))
    except (Exception, TooLongError) as error:
        return Escape(reader.name, type(error).__name__, _place(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def _too_long(*_) -> None:
    raise TooLongError


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hywu_core" in frame.filename]
    return f"{frames[-1].filename.rpartition('hywu_core/')[2]}:{frames[-1].lineno}" if frames else "this script"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the processor that one input may take")
    parser.add_argument("--keep", type=Path, help="folder for the smallest inputs that escaped")
    parser.add_argument("--only", default="", help="readers whose name holds this")
    arguments = parser.parse_args()
    escapes = run(arguments.executions, arguments.seed, arguments.seconds, arguments.keep, arguments.only)
    print(
        f"{arguments.executions} executions, seed {arguments.seed}: {sum(escapes.values())} escapes at {len(escapes)} places"
    )
    return 1 if escapes else 0


if __name__ == "__main__":
    sys.exit(main())
