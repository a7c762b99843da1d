"""What the generator does on this machine's accelerator: speed, memory, exactness, limits. One command, numbers as JSON.

    .venv/bin/python scripts/gpu_check.py                    every check, at the released size
    .venv/bin/python scripts/gpu_check.py --cpu --small      that the checks themselves run
    .venv/bin/python scripts/gpu_check.py generate attention --json numbers.json

Needs no downloads: weights are random, of the released shape (16 GB in bfloat16, made on the spot; --small: a few MB). A
check that fails says why, and the others go on; the exit code is 1 then. COMFYUI_DIR names the host.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from in_host import ROOT, enter_host

RELEASED = {  # the released generator's configuration
    "d_model": 4096, "head_dim": 128, "num_pg_layers": 24, "input_dim": 4096, "output_dim": 1024, "token_dim": 1024,
    "num_base_model_layers": 32, "rank": 16, "alpha": 64, "dim_accumulation": 4, "prefix": "model.layers.",
    "pg_mapping": {
        "self_attn.qkv_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
        "self_attn.o_proj": {"lora_A_dim": 4096, "lora_B_dim": 4096},
        "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
        "mlp.shared_mlp.down_proj": {"lora_A_dim": 3072, "lora_B_dim": 4096},
        "mlp.experts": {
            "type": "grouped", "num_experts": 64,
            "sub_weights": {
                "w1": {"lora_A_dim": 4096, "lora_B_dim": 3072},
                "w2": {"lora_A_dim": 3072, "lora_B_dim": 4096},
                "w3": {"lora_A_dim": 4096, "lora_B_dim": 3072},
            },
        },
    },
}  # fmt: skip
SMALL = {
    "d_model": 128, "head_dim": 32, "num_pg_layers": 2, "input_dim": 64, "output_dim": 32, "token_dim": 32,
    "num_base_model_layers": 3, "rank": 8, "alpha": 8, "dim_accumulation": 4, "prefix": "blocks.",
    "pg_mapping": {"q": {"lora_A_dim": 640, "lora_B_dim": 960}},
}  # fmt: skip
RUNS = 3


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}; all by default")
    parser.add_argument("--cpu", action="store_true", help="keep to the CPU, whatever the machine has")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--length", type=int, help="tokens of the condition (default: 7000, small: 50)")
    parser.add_argument("--json", type=Path, help="also write everything there")
    arguments = parser.parse_args()
    unknown = set(arguments.checks) - CHECKS.keys()
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    return arguments


class Machine:
    """The host, its device, and a random generator that is made once. Made after the host is entered."""

    def __init__(self, small: bool, length: int | None):
        import comfy.model_management
        import torch

        from hywu_core.config import GeneratorConfig

        self.management, self.torch, self.small = comfy.model_management, torch, small
        self.device = comfy.model_management.get_torch_device()
        self.config = GeneratorConfig.from_dict(SMALL if small else RELEASED)
        self.length = length or (50 if small else 7000)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self._folder = tempfile.TemporaryDirectory()
        self._path: Path | None = None

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            self.torch.accelerator.synchronize(self.device)

    def seconds(self, run: Callable[[], Any], runs: int = RUNS) -> float:
        """The median of some runs after one that does not count."""
        run()
        found = []
        for _ in range(runs):
            self.synchronise()
            start = time.perf_counter()
            run()
            self.synchronise()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def random(self, config: Any, dtype: Any) -> Any:
        """A generator of random weights, on the CPU."""
        from hywu_core import Generator

        generator, source = Generator(config, dtype=dtype), self.torch.Generator().manual_seed(0)
        for name, parameter in generator.named_parameters():
            if parameter.ndim == 2 and "_pos" not in name:
                parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=source)
            elif "_pos" in name:
                parameter.data.normal_(0, 1, generator=source)
            else:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        return generator

    def handle(self, weight_dtype: Any = None) -> Any:
        """The generator, loaded as a node loads it."""
        from hywu_core import save_generator
        from hywu_core.host import memory

        if self._path is None:
            path = Path(self._folder.name) / "random.safetensors"
            self._path = save_generator(self.random(self.config, self.dtype), path)
        return memory.load(self._path, weight_dtype)

    def condition(self) -> Any:
        """(1, L, input_dim), on the CPU."""
        source = self.torch.Generator().manual_seed(1)
        return self.torch.randn(1, self.length, self.config.input_dim, generator=source).to(self.dtype)


def versions(machine: Machine) -> dict[str, Any]:
    """What runs here."""
    import comfy.memory_management
    from comfy.quant_ops import ck
    from comfyui_version import __version__

    torch = machine.torch
    cuda = torch.cuda.get_device_properties(machine.device) if machine.device.type == "cuda" else None
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ComfyUI": __version__,
        "device": cuda.name if cuda else str(machine.device),
        "memory_gb": machine.management.get_total_memory(machine.device) / 1e9,
        "dynamic_vram": comfy.memory_management.aimdo_enabled,
        "kernels": {name: value.get("available") for name, value in ck.list_backends().items()},
    }


def generate(machine: Machine) -> dict[str, Any]:
    """Seconds, peak and what waits for the device, in each kind of weights that fits."""
    from hywu_core.host import memory
    from hywu_core.plan import plan

    torch, tokens, found = machine.torch, machine.condition(), {}
    planned = plan(machine.config, 1, machine.length, machine.dtype)
    for name in ("default", "int8", "fp8_e4m3fn"):
        handle = machine.handle(memory.WEIGHT_DTYPES[name])
        found[name] = {"seconds": machine.seconds(lambda handle=handle: memory.write(handle, tokens))}
        found[name]["tflops"] = planned.flops / found[name]["seconds"] / 1e12
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(machine.device)
            before = torch.cuda.memory_allocated(machine.device)
            memory.write(handle, tokens)
            found[name]["peak_gb"] = (torch.cuda.max_memory_allocated(machine.device) - before) / 1e9
        found[name] |= profiled(machine, lambda handle=handle: memory.write(handle, tokens))
        machine.management.unload_all_models()
    return {"planned_peak_gb": planned.peak / 1e9, "pflop": planned.flops / 1e15, **found}


def profiled(machine: Machine, run: Callable[[], Any]) -> dict[str, float]:
    """How busy the device was, and how often it was waited for."""
    torch = machine.torch
    if machine.device.type != "cuda":
        return {}
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    start = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        machine.synchronise()
    wall, counted, busy = time.perf_counter() - start, Counter(), 0.0
    for event in profile.events():
        counted[event.name] += 1
        if event.device_type == torch.autograd.DeviceType.CUDA:
            busy += event.time_range.elapsed_us() / 1e6
    named = {
        "launches": "cudaLaunchKernel",
        "waits": "cudaStreamSynchronize",
        "host_to_device": "Memcpy HtoD (Pageable -> Device)",
        "host_to_device_pinned": "Memcpy HtoD (Pinned -> Device)",
    }
    return {"busy": busy / wall, **{name: counted[event] for name, event in named.items()}}


def exact(machine: Machine) -> dict[str, float]:
    """The device's LoRA against float32 on the CPU (two blocks), and how large numbers grow inside."""
    from hywu_core import Generator
    from hywu_core.host import memory

    torch, found = machine.torch, {}
    config = replace(machine.config, num_pg_layers=2, num_base_model_layers=2)
    plain = machine.random(config, torch.float32)
    tokens = machine.condition()[:, :64].float()
    with torch.inference_mode():
        expected = torch.cat([factor.flatten() for pair in plain.generate(tokens).pairs for factor in pair])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            other = Generator(config, device="meta")
            state = {name: tensor.to(dtype) for name, tensor in plain.state_dict().items()}
            other.load_state_dict(state, assign=True)
            handle = memory.wrap(other, "random")._replace(compute_dtype=dtype)
            largest = largest_inside(other.to(machine.device), tokens.to(machine.device, dtype))
            lora = memory.write(handle, tokens)
            result = torch.cat([factor.float().cpu().flatten() for pair in lora.pairs for factor in pair])
            error = ((result - expected).norm() / expected.norm()).item()
            found[str(dtype).removeprefix("torch.")] = {"relative_error": error, "largest_inside": largest}
    return found


def largest_inside(generator: Any, tokens: Any) -> float:
    """The largest number before an activation, of all blocks."""
    found = [0.0]

    def look(layer: Any, given: Any, result: Any) -> None:
        found.append(result.abs().max().item())

    hooks = [block.feed_forward.fc1.register_forward_hook(look) for block in generator.model.blocks]
    generator.generate(tokens)
    for hook in hooks:
        hook.remove()
    return max(found)


def attention(machine: Machine) -> dict[str, Any]:
    """Attention of the shapes of a generate, alone."""
    torch, heads, width = machine.torch, machine.config.heads, machine.config.head_dim
    layers, each = machine.config.num_base_model_layers, 200 if machine.small else 5516
    found = {}
    for name, (sequences, queries, keys) in {
        "over layers": (min(each, 103), layers, layers),
        "over tokens": (1, each // 2, each),
        "over the condition": (1, each // 2, machine.length),
    }.items():
        shapes = [(sequences, heads, count, width) for count in (queries, keys, keys)]
        parts = [torch.randn(shape, device=machine.device, dtype=machine.dtype) for shape in shapes]
        with torch.inference_mode():
            seconds = machine.seconds(lambda p=parts: torch.nn.functional.scaled_dot_product_attention(*p))
        found[name] = {"tflops": 4 * sequences * heads * queries * keys * width / seconds / 1e12}
    return found


def limits(machine: Machine) -> dict[str, str]:
    """Attention over layers with many sequences, forward and backward, as training does it."""
    from hywu_core.transformer import Attention

    torch, found = machine.torch, {}
    counts = (257,) if machine.small else (32_768, 65_535, 65_536, 131_072)
    for dtype in (torch.float32, machine.dtype):
        module = Attention(128, 4, torch.nn, device=machine.device, dtype=dtype)
        for count in counts:
            heads = [
                torch.randn(count, 4, 19, 32, device=machine.device, dtype=dtype, requires_grad=True) for _ in range(3)
            ]
            module.attend(*heads).square().sum().backward()
            machine.synchronise()
            finite = all(bool(torch.isfinite(part.grad).all()) for part in heads)
            found[f"{dtype} {count}"] = "right" if finite else "not finite"
    return found


def out_of_memory(machine: Machine) -> dict[str, Any]:
    """With hardly any room: smaller chunks and the same LoRA, or one clear error; and the memory is given back."""
    from hywu_core.errors import GenerationError
    from hywu_core.host import memory

    torch = machine.torch
    if machine.device.type != "cuda":
        return {"skipped": "only where the device's memory can be limited"}
    handle, tokens = machine.handle(), machine.condition()
    expected = memory.write(handle, tokens)
    total = torch.cuda.get_device_properties(machine.device).total_memory
    held = torch.cuda.memory_allocated(machine.device)
    found: dict[str, Any] = {}
    for room in (3.0e9, 2.0e9, 1.0e9):
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + room) / total), machine.device)
        try:
            lora = memory.write(handle, tokens)
            pairs = zip(lora.pairs, expected.pairs, strict=True)
            found[f"{room / 1e9:.0f} GB"] = max((a.up.float() - b.up.float()).abs().max().item() for a, b in pairs)
        except GenerationError as error:
            found[f"{room / 1e9:.0f} GB"] = str(error)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, machine.device)
    found["gb_not_given_back"] = (torch.cuda.memory_allocated(machine.device) - held) / 1e9
    return found


def applied(machine: Machine) -> dict[str, Any]:
    """The pocket editor with its own LoRA: bypass against merge, and the base afterwards, bit for bit."""
    from hywu_core import load_generator
    from hywu_core.bases import pocket
    from hywu_core.condition import CONDITIONING, Condition, ConditionPart, assemble
    from hywu_core.host.lora.apply import apply_lora
    from hywu_core.host.sampling import sample

    torch = machine.torch
    model, clip, _ = pocket.load_pocket_editor()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    (words,) = clip.encode_from_tokens_scheduled(clip.tokenize("make it brighter"))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    conditioning = [[words[0], words[1] | {"reference_latents": [picture * 2 - 1]}]]
    generator = load_generator(ROOT / "models" / "pocket-generator.safetensors")
    parts = {CONDITIONING: words[0]}
    wanted = [part["kind"] for part in generator.config.hywu["condition"]]
    parts |= {kind: picture * 2 - 1 for kind in wanted if kind != CONDITIONING}
    condition = Condition(tuple(ConditionPart(kind, parts[kind]) for kind in wanted))
    lora = generator.generate(assemble(condition, generator.config))
    pictures = {}
    for mode in ("bypass", "merge"):
        pictures[mode] = sample(apply_lora(model, lora, mode=mode)[0], conditioning, picture, steps=4)
    pictures["none"] = sample(model, conditioning, picture, steps=4)
    after = model.model.state_dict()
    return {
        "bypass_minus_merge": (pictures["bypass"] - pictures["merge"]).abs().max().item(),
        "lora_changes": (pictures["bypass"] - pictures["none"]).abs().max().item(),
        "base_bit_identical": all(torch.equal(tensor.cpu(), after[name].cpu()) for name, tensor in before.items()),
    }


def loading(machine: Machine) -> dict[str, float]:
    """Seconds from the file to a handle, and to the first LoRA."""
    from hywu_core.host import memory

    machine.handle()
    start = time.perf_counter()
    handle = machine.handle()
    loaded = time.perf_counter() - start
    memory.write(handle, machine.condition())
    machine.synchronise()
    return {"load_seconds": loaded, "first_lora_seconds": time.perf_counter() - start}


CHECKS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "versions": versions, "applied": applied, "attention": attention, "limits": limits, "exact": exact, "loading": loading,
    "generate": generate, "out_of_memory": out_of_memory,
}  # fmt: skip


def main() -> int:
    """Run the checks, print as they come, write what was asked for."""
    arguments = read_arguments()
    enter_host(cpu=arguments.cpu)
    machine, results, failed = Machine(arguments.small, arguments.length), {}, []
    for name in arguments.checks or CHECKS:
        try:
            results[name] = CHECKS[name](machine)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            failed.append(name)
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(
        f"{len(results) - len(failed)} of {len(results)} checks ran"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
