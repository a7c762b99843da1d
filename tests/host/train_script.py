"""scripts/train.py on a few pairs of the pocket editor: as a launcher starts it, and in this process."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from hywu_core.host.training.in_script import GENERATOR, train_on_folder
from hywu_core.training.distributed import Accelerated
from hywu_core.training.log import LOG
from hywu_core.training.options import build_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
from pocket_run import PocketRun, sources  # noqa: E402

WORDS = ("brighten the picture", "darken the picture", "make it vivid", "make it gray")


def folder_of_pairs(folder, count=4, size=(16, 16)):
    """Random pictures with their edits, and the list that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(0)
    lines = []
    for index in range(count):
        pixels = torch.randint(256, (size[1], size[0], 3), generator=source).byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        Image.fromarray((pixels // 2).numpy()).save(folder / f"{index}_edited.png")
        lines.append({"source": f"{index}.png", "target": f"{index}_edited.png", "instruction": WORDS[index % 4]})
    write_list(folder, lines)
    return lines


def write_list(folder, lines):
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def options(tmp_path, **changes):
    """A short run for the pocket editor on four pairs."""
    values = {
        "cpu": True, "pocket": True, "pairs": str(tmp_path / "pairs"), "output": str(tmp_path / "out"), "steps": 4,
        "batch": 2, "warmup": 0, "save_every": 2, "validate_every": 2, "held_out_share": 0.25, "size": 16,
    }  # fmt: skip
    return values | changes


def start(values, tmp_path, processes=1, rank=0, port=0, threads=1):
    """scripts/train.py as a launcher starts it, without the launcher."""
    file = tmp_path / f"run-{rank}.json"
    file.write_text(json.dumps(values))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if processes > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        environment |= {name: str(value) for name, value in (places | address).items()}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(values, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(values, tmp_path, 2, rank, port) for rank in (0, 1)]


def finish(*processes):
    """Wait for them; returns their exit codes and what they said."""
    try:
        said = ["".join(process.communicate(timeout=300)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def wait_for_steps(folder, count, process):
    """Until a run has logged that many steps."""
    for _ in range(6000):
        if process.poll() is not None or ((folder / LOG).exists() and len((folder / LOG).read_text().split()) > count):
            return
        time.sleep(0.05)


def weights(folder):
    return load_file(folder / GENERATOR / "model.safetensors")


def run(tmp_path, stop=lambda: False, say=lambda text: None, encoders=None, **changes):
    """The same in this process."""
    config = build_run(options(tmp_path, **changes), PocketRun)
    given = sources(config)
    if encoders:
        base_of = given["base_of"]
        given["base_of"] = lambda run: base_of(run)._replace(encoders=lambda: encoders)
    return train_on_folder(config, Accelerated(cpu=True), stop, say, **given)
