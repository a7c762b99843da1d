"""What a change of LoRA costs in a real server, ours beside the layers against the host's loader, which rewrites weights.

A random Flux of 300 M parameters and so many LoRA files, both read by both ways. Prompts with a new LoRA and prompts with the
last one and new noise take turns; what a change costs is the difference of the two, and is printed with the whole prompt's
time, whose rest (one sampling step, the server's own work) is the same for both.
Run: .venv/bin/python scripts/bench_switch.py [--prompts N] [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from in_host import ROOT, enter_host

enter_host()
import torch  # noqa: E402
from bench import random_lora  # noqa: E402
from host_server import HostServer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from hywu_core.bases.pocket import EditorConfig, build_editor  # noqa: E402
from hywu_core.files.lora_files import save_lora  # noqa: E402

ROTARY = (16, 56, 56)  # a head's, in every Flux that the host's loader knows
SIZES = {
    "small": EditorConfig(width=128, heads=1, depth=2, axes_dim=ROTARY),
    "flux": EditorConfig(width=1024, heads=8, depth=8, axes_dim=ROTARY),
}
CHANNELS, PATCH = 16, 2
WAYS = ("ours", "the host's merge")


def flux_state(config: EditorConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A Flux file's weights, as the host's loader detects them: 16 channels in patches of 2."""
    state = build_editor(config, seed).model.diffusion_model.state_dict()
    width = CHANNELS * PATCH**2
    resized = {
        "img_in.weight": torch.randn(config.width, width) / width**0.5,
        "final_layer.linear.weight": torch.randn(width, config.width) / config.width**0.5,
        "final_layer.linear.bias": torch.zeros(width),
    }
    return {name: tensor.float().contiguous() for name, tensor in (state | resized).items()}


def write_files(folder: Path, config: EditorConfig, count: int) -> None:
    """The base, the LoRAs, and a configuration that shows both to a server."""
    for kind in ("diffusion_models", "loras"):
        (folder / kind).mkdir(parents=True)
    save_file(flux_state(config), folder / "diffusion_models" / "flux.safetensors")
    model = build_editor(config)
    for number in range(count):
        save_lora(random_lora(model, number), folder / "loras" / f"{number}.safetensors")
    paths = {"bench": {"base_path": str(folder), "loras": "loras", "diffusion_models": "diffusion_models"}}
    (folder / "paths.yaml").write_text(json.dumps(paths), encoding="utf-8")  # JSON is YAML


def prompt(way: str, lora: int, seed: int) -> dict[str, Any]:
    """One step of sampling with a LoRA, in the host's API format."""
    name = f"{lora}.safetensors"
    if way == "ours":
        put = {
            "file": {"class_type": "HYWULoadLoRA", "inputs": {"lora": name}},
            "put": {
                "class_type": "HYWUApplyLoRA",
                "inputs": {"model": ["base", 0], "lora": ["file", 0], "strength": 1.0, "mode": "bypass"},
            },
        }
    else:
        inputs = {"model": ["base", 0], "lora_name": name, "strength_model": 1.0}
        put = {"put": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}
    return put | {
        "base": {
            "class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors", "weight_dtype": "default"}
        },
        "pocket": {"class_type": "HYWULoadPocketEditor", "inputs": {}},
        "words": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["pocket", 1], "text": "make it warm"}},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["put", 0], "positive": ["words", 0], "negative": ["words", 0], "latent_image": ["empty", 0],
                "seed": seed, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "bench"}},
    }  # fmt: skip


def timed(server: HostServer, asked: dict[str, Any]) -> float:
    """Seconds from the question to the answer."""
    start = time.perf_counter()
    run = server.run(asked)
    if run.outcome != "execution_success":
        raise RuntimeError(f"The prompt failed: {run.messages[-1]}. The log is {server.log}.")
    return time.perf_counter() - start


def measure(server: HostServer, count: int) -> dict[str, Any]:
    """Both ways over so many changes of LoRA."""
    found, seed = {}, 0
    for way in WAYS:
        timed(server, prompt(way, count, seed))
        changed, kept = [], []
        for lora in range(count):
            for times in (changed, kept):
                seed += 1
                times.append(timed(server, prompt(way, lora, seed)))
        differences = [a - b for a, b in zip(changed, kept, strict=True)]
        found[way] = {
            "change": statistics.median(differences),
            "changed_prompt": statistics.median(changed),
            "same_lora": statistics.median(kept),
            "changes": differences,
        }
    ours, theirs = (found[way] for way in WAYS)
    return {
        "ways": found,
        "change_ratio": ours["change"] / theirs["change"],
        "prompt_ratio": ours["changed_prompt"] / theirs["changed_prompt"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10, help="changes of LoRA, each way")
    parser.add_argument("--small", action="store_true", help="a tiny Flux, to see that it runs")
    parser.add_argument("--pack", default="hywu", help="this pack's name in custom_nodes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    host = ROOT / ".host" / "ComfyUI"
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "models"
        write_files(files, SIZES["small" if arguments.small else "flux"], arguments.prompts + 1)
        options = ("--extra-model-paths-config", str(files / "paths.yaml"))
        with HostServer(sys.executable, host, Path(folder) / "server", arguments.pack, options) as server:
            found = measure(server, arguments.prompts)
    for way, numbers in found["ways"].items():
        print(
            f"{way}: a change costs {numbers['change']:.3f} s; a prompt takes {numbers['changed_prompt']:.3f} s with a new "
            f"LoRA, {numbers['same_lora']:.3f} s with the last one"
        )
    print(f"ours / theirs: change {found['change_ratio']:.3f}, whole prompt {found['prompt_ratio']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
