"""The tiny HunyuanImage-3 of the fixtures as a folder that loads, and the edit that the reference's numbers are for."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SYSTEM_PROMPT = "You edit images."
PATCH = 16
HEAD = {  # {name: shape in widths} of the pooling head of the released vision tower, which nothing reads
    "probe": (1, 1, 1),
    "attention.in_proj_weight": (3, 1),
    "attention.in_proj_bias": (3,),
    "attention.out_proj.weight": (1, 1),
    "attention.out_proj.bias": (1,),
    "layernorm.weight": (1,),
    "layernorm.bias": (1,),
    "mlp.fc1.weight": (1, 1),
    "mlp.fc1.bias": (1,),
    "mlp.fc2.weight": (1, 1),
    "mlp.fc2.bias": (1,),
}


def make_folder(target: Path) -> Path:
    """The fixture's base with a system_prompt.py, as the official repository has one."""
    shutil.copytree(FIXTURES / "base_tiny", target)
    assigned = f'unified_system_prompt_en = """{SYSTEM_PROMPT}\n"""'
    (target / "system_prompt.py").write_text(f'import sys\n\n{assigned}\nsys.exit("this file is never run")\n')
    return target


def full_count_config(hidden: int = 32, intermediate: int = 8, **more) -> dict:
    """config.json with as many layers, experts and blocks as the released model has, but narrow ones."""
    values = json.loads((FIXTURES / "base_tiny" / "config.json").read_text())
    values |= {"num_hidden_layers": 32, "num_experts": 64, "moe_topk": 8, "hidden_size": hidden}
    values |= {"moe_intermediate_size": intermediate, "intermediate_size": intermediate}
    values["vae"] |= {"layers_per_block": 2}
    values["vit"] |= {"num_hidden_layers": 27, "hidden_size": 16, "intermediate_size": 16}
    return values | more


def full_count_shapes(values: dict) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor of the released model in the widths of such a config.json."""
    from hywu_core.bases.hunyuan_image3.config import BaseConfig
    from hywu_core.bases.hunyuan_image3.files import official_shapes

    width = values["vit"]["hidden_size"]
    head = {
        f"vision_model.head.{name}": (1, 1, width) if name == "probe" else tuple(width * times for times in shape)
        for name, shape in HEAD.items()
    }
    return official_shapes(BaseConfig.from_dict(values, {})) | head


def make_full_count_folder(target: Path, shards: int, values: dict) -> Path:
    """Such a checkpoint with random numbers; shards are cut anywhere, also inside the experts of a layer."""
    make_folder(target)
    (target / "model.safetensors").unlink()
    (target / "config.json").write_text(json.dumps(values))
    shapes, source, files = full_count_shapes(values), torch.Generator().manual_seed(0), {}
    names = sorted(shapes)
    for number in range(shards):
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        file = f"model-{number + 1:04}-of-{shards:04}.safetensors"
        numbers = {name: torch.randn(shapes[name], generator=source).mul(0.05).bfloat16() for name in part}
        save_file(numbers, str(target / file), metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return target


def golden(name: str) -> dict[str, torch.Tensor]:
    """Tensors of e2e_one_<name>, names of equal tensors filled in."""
    tensors = load_file(FIXTURES / f"e2e_one_{name}.safetensors")
    facts = FIXTURES / f"e2e_one_{name}.json"
    for alias, kept in (json.loads(facts.read_text())["alias"] if facts.exists() else {}).items():
        tensors.setdefault(alias, tensors.get(kept))
    return tensors


def facts(name: str = "condition") -> dict:
    """What e2e_one_<name> was asked for."""
    return json.loads((FIXTURES / f"e2e_one_{name}.json").read_text())


def picture(name: str = "a_272x240") -> torch.Tensor:
    """A fixture's picture as an IMAGE (1, H, W, 3)."""
    return (
        torch.from_numpy(np.array(Image.open(FIXTURES / "images" / f"{name}.png").convert("RGB"))).float()[None] / 255
    )


def vision_pixels(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Stored patches (1, slots, 768) -> the normalised pixels (1, 3, H, W) that they were cut from, without padding."""
    rows, columns = grid
    cells = patches[:, : rows * columns].view(1, rows, columns, PATCH, PATCH, 3)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(1, 3, rows * PATCH, columns * PATCH)


def golden_edit(encoder):
    """The edit of e2e_one with the latents and vision pixels that were stored: another resize would change them."""
    from hywu_core.bases.hunyuan_image3 import vision
    from hywu_core.bases.hunyuan_image3.edit import Edit
    from hywu_core.bases.hunyuan_image3.sequence import Request, SourcePicture

    stored, asked = golden("condition"), facts()
    latent = stored["call0.in.cond_vae_images"].unsqueeze(2) / encoder.config.vae.scaling_factor
    pixels = vision_pixels(stored["call0.in.cond_vit_images.0"], (8, 8))
    tokens = vision.look(encoder.tower, pixels, torch.float32)
    request = Request(
        asked["prompt"], (SourcePicture((15, 17), (8, 8), 15),), asked["cot_text"], asked["system_prompt"]
    )
    return Edit((latent,), (tokens,), request, encoder.builder, encoder.config)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found - expected).norm() / expected.norm())
