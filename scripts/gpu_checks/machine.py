"""The host, its device, and what checks share: weights on the disk, times, memory, and the same command once more with other
options of the host.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
STATUS = Path("/proc/self/status")  # Linux only
AGAIN_SECONDS = 3600  # one check in a process of its own


class Machine:
    """Enters the host, as its own main.py does.

    Args:
        small: tiny sizes.
        length: tokens of a condition; None: 7000, small 50.
        files: what another process made for this one; see `again`.
        options: of the host's command line.
    """

    def __init__(
        self,
        cpu: bool,
        small: bool,
        length: int | None = None,
        files: Path | None = None,
        options: tuple[str, ...] = (),
    ):
        self.host = enter_host(cpu=cpu, options=options)
        turn_on_dynamic_vram()
        import comfy.model_management
        import torch

        from hywu_core.config import GeneratorConfig

        self.management, self.torch, self.small, self.files = comfy.model_management, torch, small, files
        self.device = comfy.model_management.get_torch_device()
        self.cpu = self.device.type == "cpu"
        self.config = GeneratorConfig.from_dict(SMALL if small else RELEASED)
        self.length = length or (50 if small else 7000)
        self.dtype = torch.float32 if self.cpu else torch.bfloat16
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)

    def synchronise(self) -> None:
        """Wait for the device."""
        if not self.cpu:
            self.torch.accelerator.synchronize(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        """The median of some runs after one that does not count."""
        run()
        found = []
        for _ in range(1 if self.small else RUNS):
            self.synchronise()
            start = time.perf_counter()
            run()
            self.synchronise()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def peak_gb(self, run: Callable[[], Any]) -> dict[str, float]:
        """The most device memory that a run takes beside what is there before, where the device counts it."""
        torch = self.torch
        if self.device.type != "cuda":
            return {}
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronise()
        return {"peak_gb": (torch.cuda.max_memory_allocated(self.device) - before) / 1e9}

    def held_gb(self) -> float:
        """Device memory that is in use once every model is unloaded; 0 where the device does not count it."""
        self.management.unload_all_models()
        gc.collect()
        self.management.soft_empty_cache()
        return self.torch.cuda.memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0

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

    def generator_file(self) -> Path:
        """The random generator, written once; another process's, where it was given."""
        from hywu_core import save_generator

        if self.files is not None:
            return self.files
        path = self.folder / "random.safetensors"
        return path if path.exists() else save_generator(self.random(self.config, self.dtype), path)

    def handle(self, weight_dtype: Any = None) -> Any:
        """The generator, loaded as a node loads it."""
        from hywu_core.host import memory

        return memory.load(self.generator_file(), weight_dtype)

    def condition(self) -> Any:
        """(1, L, input_dim), on the CPU."""
        source = self.torch.Generator().manual_seed(1)
        return self.torch.randn(1, self.length, self.config.input_dim, generator=source).to(self.dtype)

    def again(self, check: str, *options: str, files: Path | None = None) -> dict[str, Any]:
        """A check in a process of its own, whose host is started with these options.

        Raises:
            RuntimeError: with the end of what it printed, if it failed.
        """
        self.management.unload_all_models()
        self.management.soft_empty_cache()
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "numbers.json"
            command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), check, "--json", str(found)]
            command += [
                "--length",
                str(self.length),
                *(["--cpu"] if self.cpu else []),
                *(["--small"] if self.small else []),
            ]
            command += [f"--host-options={' '.join(options)}", *(["--files", str(files)] if files else [])]
            environment = os.environ | {"COMFYUI_DIR": str(self.host)}
            done = subprocess.run(command, capture_output=True, text=True, timeout=AGAIN_SECONDS, env=environment)
            if done.returncode:
                raise RuntimeError(f"{check} with {' '.join(options) or 'no options'}: {done.stderr[-2000:]}")
            return json.loads(found.read_text(encoding="utf-8"))[check]


def turn_on_dynamic_vram() -> None:
    """Where the host does so by itself. Before torch is imported, as in the host's main.py, which no function of it does."""
    from comfy.cli_args import args, enables_dynamic_vram

    if not enables_dynamic_vram():
        return
    import comfy_aimdo.control

    headroom = None if args.reserve_vram is None else int(args.reserve_vram * 1024**3)
    comfy_aimdo.control.init(simple_vram_headroom=headroom, nvml_pressure=not args.disable_nvml_pressure)
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    if not management.is_nvidia() or management.is_wsl() or management.torch_version_numeric < (2, 8):
        return
    each = int(args.vram_headroom * 1024**3)
    if comfy_aimdo.control.init_devices((device.index, each) for device in management.get_all_torch_devices()):
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def resident_gb() -> dict[str, float]:
    """This process's memory: of its own, and mapped from files; nothing where the system does not tell them apart."""
    if not STATUS.exists():
        return {}
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 / 1e9 for name in ("RssAnon", "RssFile")}


def forget_pages(path: Path) -> bool:
    """Have the system forget what it holds of a file, so that it is read from the disk; whether it can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # pages that are still to be written would stay
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
