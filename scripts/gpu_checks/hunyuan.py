"""Checks of a HunyuanImage-3 of four layers in the released shape: a sampling step with and without a LoRA, tokens of text,
and how long it takes to load, with all weights on the device and with weights that come when they are needed.

Its weights are random; its autoencoder, vision tower and vocabulary are the tests' tiny ones, which nothing here is about.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from in_host import ROOT

from gpu_checks.machine import RELEASED, Machine, forget_pages, resident_gb
from gpu_checks.trace import Profile

OF_LAYERS = "model.layers."  # beginning of a name
KINDS = ("bf16", "fp8", "nvfp4")
LAYERS = 4  # of 32
STEPS, GUIDANCE, RANK = 4, 2.5, 16
HELD = 0.3  # of the weights, where they are streamed
WORK_GB = 8  # what a step takes beside the weights, with the layer that is fetched ahead


def hunyuan(machine: Machine, kind: str) -> dict[str, Any]:
    """Everything resident, and streamed."""
    folder = machine.folder / f"hunyuan-{kind}"
    values, needed = configuration(machine.small), weights_gb(machine, kind)
    free = shutil.disk_usage(machine.folder).free / 1e9
    if 1.2 * needed > free:
        return {"skipped": f"the weights take {needed:.0f} GB, but {free:.0f} GB of {machine.folder} are free"}
    try:
        write_base(machine, folder, values, kind)
        found: dict[str, Any] = {"weights_gb": needed, "resident": measure(machine, folder)}
        if machine.cpu:
            return found | {"streamed": {"skipped": "a CPU has no memory of its own that weights could come to"}}
        total = machine.management.get_total_memory(machine.device) / 1e9
        room = WORK_GB + HELD * needed
        if room >= total:
            return found | {
                "streamed": {"skipped": f"the device has less than the {room:.0f} GB that it would be left"}
            }
        reserve = f"{(total - room) * 1e9 / 1024**3:.2f}"
        return found | {
            "streamed": machine.again("hunyuan_files", "--reserve-vram", reserve, files=folder) | {"room_gb": room}
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def from_files(machine: Machine) -> dict[str, Any]:
    """What another process wrote."""
    return measure(machine, machine.files)


def configuration(small: bool) -> dict[str, Any]:
    """config.json: sizes as released, but for the number of layers and what is named at the top."""
    sys.path.append(str(ROOT / "tests"))
    from hunyuan_tiny import FIXTURES, full_count_config

    if small:
        return json.loads((FIXTURES / "base_tiny" / "config.json").read_text(encoding="utf-8")) | {
            "num_hidden_layers": 2
        }
    return full_count_config(
        4096, 3072, num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=8, attention_head_dim=128,
        patch_embed_hidden_dim=1024, image_base_size=1024, max_position_embeddings=22800,
    )  # fmt: skip


def weights_gb(machine: Machine, kind: str) -> float:
    """Of the decoder, as they are stored; scales are left out."""
    from hywu_core.bases.hunyuan_image3.config import BaseConfig
    from hywu_core.bases.hunyuan_image3.files import decoder_shapes
    from hywu_core.bases.hunyuan_image3.quantised import can_be_quantised

    each = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5}[kind]
    shapes = decoder_shapes(BaseConfig.from_dict(configuration(machine.small), {}))
    size = machine.torch.Size
    return sum(size(shape).numel() * (each if can_be_quantised(name) else 2.0) for name, shape in shapes.items()) / 1e9


def write_base(machine: Machine, folder: Path, values: dict[str, Any], kind: str) -> None:
    """A folder as the conversion leaves it: banks of experts, a file for each layer."""
    from hunyuan_tiny import make_folder
    from safetensors.torch import save_file

    from hywu_core.bases.hunyuan_image3 import files, quantised
    from hywu_core.bases.hunyuan_image3.config import CONFIG_FILE, GENERATION_FILE, BaseConfig

    make_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / CONFIG_FILE).write_text(json.dumps(values), encoding="utf-8")
    if not machine.small:
        (folder / GENERATION_FILE).unlink()  # the tiny base's sequences are short
    config = BaseConfig.read(folder)
    decoder, source = files.decoder_shapes(config), machine.torch.Generator(machine.device).manual_seed(0)
    experts = {key for name in decoder for key in files.expert_keys(name, config.num_experts)}
    shapes = decoder | {name: shape for name, shape in files.official_shapes(config).items() if name not in experts}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.startswith(OF_LAYERS) and name.split(".")[2]
        parts.setdefault(f"layer-{layer}.safetensors" if layer else "rest.safetensors", []).append(name)
    index: dict[str, str] = {}
    for file, names in parts.items():
        made: dict[str, Any] = {}
        for name in names:
            shape = shapes[name]
            if kind != "bf16" and quantised.can_be_quantised(name):
                stored = quantised.quantise(kind, name, matrices(machine, shape, source), shape, machine.device)
                made |= {name.removesuffix("weight") + own: tensor for own, tensor in stored.items()}
            else:
                made[name] = machine.torch.stack([part.cpu() for part in matrices(machine, shape, source)]).view(shape)
        save_file(made, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(made, file)
    told = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(told, encoding="utf-8")


def matrices(machine: Machine, shape: tuple[int, ...], source: Any) -> Iterator[Any]:
    """A weight in bfloat16 on the device, a bank expert by expert; norms are one."""
    torch = machine.torch
    for _ in range(shape[0] if len(shape) == 3 else 1):
        own = shape[1:] if len(shape) == 3 else shape
        if len(own) == 1:
            yield torch.ones(own, dtype=torch.bfloat16, device=machine.device)
        else:
            numbers = torch.randn(own, generator=source, device=machine.device)
            yield numbers.mul_(math.prod(own[1:]) ** -0.5).bfloat16()


def measure(machine: Machine, folder: Path) -> dict[str, Any]:
    """Seconds to load, of a step, and of a token; and what the device did meanwhile."""
    from hywu_core.bases.hunyuan_image3.edit import Wishes, make_edit
    from hywu_core.bases.hunyuan_image3.loader import load
    from hywu_core.host.lora.apply import apply_lora

    torch = machine.torch
    cold = all([forget_pages(file) for file in folder.glob("*.safetensors")])
    before, start = resident_gb(), time.perf_counter()
    with torch.inference_mode():
        model, _, encoder = load(folder)
        found: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "cold": cold}
        side = encoder.config.image_base_size
        picture = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(1))
        edit = make_edit(encoder, "make it warm", [picture], Wishes(size=f"{side}x{side}"))
        found["first_run_seconds"] = sum(step_seconds(machine, model, edit)[0])
        after = resident_gb()
        found |= {f"{name}_grown_gb": after[name] - before[name] for name in before}
        beside, _ = apply_lora(model, lora_for(machine, encoder.config), mode="bypass")
        for name, patched in (("step", model), ("step_with_lora", beside)):
            seconds, counted = step_seconds(machine, patched, edit)
            found[name] = {"seconds": statistics.median(seconds[1:]), **counted}
        found["token"] = token(machine, model, edit)
    machine.management.unload_all_models()
    return found


def step_seconds(machine: Machine, model: Any, edit: Any) -> tuple[list[float], dict[str, float]]:
    """Of every step but the last, the first with the prefix; and what the device did in the last one."""
    import comfy.sample

    from hywu_core.bases.hunyuan_image3.edit import to_conditioning

    times, counted, profile = [time.perf_counter()], {}, Profile(machine.device)

    def after(number: int, *_: Any) -> None:
        machine.synchronise()
        times.append(time.perf_counter())
        if number == STEPS - 2:
            profile.start()
        elif number == STEPS - 1:
            counted.update(profile.stop())

    rows = to_conditioning(edit), to_conditioning(edit._replace(unconditional=True))
    empty = edit.latent(edit.size or edit.default_size)
    noise = machine.torch.randn(empty.shape, generator=machine.torch.Generator().manual_seed(7))
    comfy.sample.sample(
        model, noise, STEPS, GUIDANCE, "euler", "simple", *rows, empty, callback=after, disable_pbar=True, seed=7
    )
    return [later - earlier for earlier, later in zip(times, times[1:-1], strict=False)], counted


def token(machine: Machine, model: Any, edit: Any) -> dict[str, Any]:
    """Seconds of a token of text; launches, copies and gigabytes of one, over the second half of some."""
    from hywu_core.bases.hunyuan_image3.reason import Choice, generate

    times, counted, profile, most = [], {}, Profile(machine.device), 6 if machine.small else 32

    def written(_: str) -> None:
        machine.synchronise()
        times.append(time.perf_counter())
        if len(times) == most // 2:
            profile.start()
        elif len(times) == most:
            counted.update(profile.stop())

    generate(model, edit, "recaption", 0, Choice(temperature=0), most, written)
    if len(times) < most:
        return {"skipped": f"the random base ended its text after {len(times)} of {most} tokens"}
    whole = {"launches", "waits", "copies_to_device", "copied_gb"}
    profiled = most - most // 2
    each = {name: value / profiled if name in whole else value for name, value in counted.items()}
    before = [later - earlier for earlier, later in zip(times, times[1 : most // 2], strict=False)]
    return {"seconds": statistics.median(before), **each}


def lora_for(machine: Machine, config: Any) -> Any:
    """A random LoRA on every weight that the released generator writes for."""
    from hywu_core import GeneratorConfig
    from hywu_core.layout import all_targets
    from hywu_core.lora import InstanceLora, LoraFactor

    torch, source = machine.torch, machine.torch.Generator().manual_seed(3)
    hidden, inner, attended = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads
    wide, narrow = {"lora_A_dim": hidden, "lora_B_dim": inner}, {"lora_A_dim": inner, "lora_B_dim": hidden}
    mapping = {
        "self_attn.qkv_proj": {"lora_A_dim": hidden, "lora_B_dim": config.qkv_features},
        "self_attn.o_proj": {"lora_A_dim": attended * config.attention_head_dim, "lora_B_dim": hidden},
        "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": hidden, "lora_B_dim": 2 * config.shared_intermediate_size},
        "mlp.shared_mlp.down_proj": {"lora_A_dim": config.shared_intermediate_size, "lora_B_dim": hidden},
        "mlp.experts": {
            "type": "grouped", "num_experts": config.num_experts, "sub_weights": {"w1": wide, "w2": narrow, "w3": wide},
        },
    }  # fmt: skip
    sizes = {"num_base_model_layers": config.num_hidden_layers, "pg_mapping": mapping}
    pairs = {}
    for name, target in all_targets(GeneratorConfig.from_dict(RELEASED | sizes)):
        down = torch.randn(1, *target.down_shape(RANK), generator=source) / target.in_features**0.5
        up = 0.01 * torch.randn(1, *target.up_shape(RANK), generator=source)
        pairs[name] = LoraFactor(down.to(machine.dtype), up.to(machine.dtype))
    return InstanceLora(pairs)
