"""Checks of the generator alone: what runs it, its speed, memory, exactness and limits, and how long it takes to load."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_checks.machine import Machine, forget_pages, resident_gb
from gpu_checks.trace import Profile

ROOMS_GB = (24, 16, 12, 8)  # of cards that a larger one plays


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
    """Seconds, peak and what waits for the device, in each kind of weights."""
    from hywu_core.plan import plan

    planned = plan(machine.config, 1, machine.length, machine.dtype)
    found: dict[str, Any] = {"planned_peak_gb": planned.peak / 1e9, "pflop": planned.flops / 1e15}
    for name in ("default", "int8", "fp8_e4m3fn"):
        found[name] = generate_one(machine, name)
        machine.management.unload_all_models()
    return found


def generate_one(machine: Machine, weights: str = "default") -> dict[str, Any]:
    """The same in one kind of weights."""
    from hywu_core.host import memory
    from hywu_core.plan import plan

    handle, tokens = machine.handle(memory.WEIGHT_DTYPES[weights]), machine.condition()

    def run() -> None:
        memory.write(handle, tokens)

    seconds, profile = machine.seconds(run), Profile(machine.device)
    found = {
        "seconds": seconds,
        "tflops": plan(machine.config, 1, machine.length, machine.dtype).flops / seconds / 1e12,
    }
    found |= machine.peak_gb(run)
    profile.start()
    run()
    return found | profile.stop()


def capped(machine: Machine) -> dict[str, Any]:
    """A generate where the host keeps so much of the device free that a card of each size is left."""
    if machine.cpu:
        return {"reserve 1 GB": machine.again("generate_one", "--reserve-vram", "1", files=machine.generator_file())}
    total = machine.management.get_total_memory(machine.device) / 1024**3
    found: dict[str, Any] = {}
    for room in ROOMS_GB:
        if room < total:
            options = "--reserve-vram", f"{total - room:.2f}"
            found[f"{room} GB"] = machine.again("generate_one", *options, files=machine.generator_file())
    return found


def exact(machine: Machine) -> dict[str, dict[str, float]]:
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


def attention(machine: Machine) -> dict[str, dict[str, float]]:
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


def loading(machine: Machine) -> dict[str, Any]:
    """Seconds and memory from the file to a handle and to the first LoRA: from the disk, from the system's cache, and from
    the disk without the host's dynamic memory, which reads weights from their place in the file to the device.
    """
    path = machine.generator_file()
    found = {"cold": load_cold(machine), "warm": loaded(machine, path)}
    if not machine.cpu:
        found["cold, plain memory"] = machine.again("load_cold", "--disable-dynamic-vram", files=path)
    return found


def load_cold(machine: Machine) -> dict[str, Any]:
    """From the disk."""
    path = machine.generator_file()
    if not forget_pages(path):
        return {"skipped": "this system cannot be told to forget what it read"}
    return loaded(machine, path)


def loaded(machine: Machine, path: Path) -> dict[str, Any]:
    from hywu_core.host import memory

    before, start = resident_gb(), time.perf_counter()
    handle = memory.load(path, None)
    seconds = time.perf_counter() - start
    memory.write(handle, machine.condition())
    machine.synchronise()
    first, after = time.perf_counter() - start, resident_gb()
    machine.management.unload_all_models()
    grown = {f"{name}_grown_gb": after[name] - before[name] for name in before}
    return {"load_seconds": seconds, "first_lora_seconds": first, **grown}
