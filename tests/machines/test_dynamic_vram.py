"""A default NVIDIA install: the host's layers have no weights before they are loaded."""

import os
import subprocess
import sys
from pathlib import Path

import hunyuan_tiny as tiny
import pytest
import torch
from dynamic import dynamic_vram

from hywu_core.bases.hunyuan_image3 import files, load
from hywu_core.bases.hunyuan_image3.foreign import borrow_decoder
from hywu_core.bases.pocket import editor, text

ROOT = Path(__file__).resolve().parents[2]
# what loads, generates and applies. Training is in files of its own, and the long tail of one feature is left out.
AGAIN = (
    "tests/host/test_generators.py",
    "tests/host/test_generators_on_disk.py",
    "tests/host/test_pocket.py",
    "tests/host/test_apply.py",
    "tests/host/test_hunyuan_files.py",
    "tests/host/test_hunyuan_foreign.py",
    "tests/host/test_hunyuan_reference.py",
)
# what plays the offload of the plain patcher, and a time, which was measured before
LEFT_OUT = (
    "every_layer_is_offloaded",
    "each_weight_of_a_block_is_fetched_once",
    "held_by_the_block_like_any_other",
    "take_under_a_second",
)


@pytest.mark.parametrize(
    "shapes",
    [
        lambda: files.official_shapes(files.BaseConfig.read(tiny.FIXTURES / "base_tiny")),
        lambda: files.decoder_shapes(files.BaseConfig.read(tiny.FIXTURES / "base_tiny")),
        lambda: editor._shapes(editor.EditorConfig()),
        text.network_of(text.TextConfig(("a", "b"))).shapes,
    ],
    ids=["hunyuan", "decoder", "pocket editor", "pocket text"],
)
def test_shapes_are_known_before_anything_is_loaded(shapes):
    before = shapes()
    with dynamic_vram():
        assert shapes() == before


def test_a_borrowed_decoder_has_every_layer_of_the_one_it_was_borrowed_from(tmp_path):
    class Theirs(torch.nn.Module):
        """Another pack's tree: banks beside the router."""

        def __init__(self, decoder):
            super().__init__()
            self.model, self.dtype = decoder.model, decoder.dtype
            for name in ("lm_head", "patch_embed", "final_layer", "timestep_emb", "time_embed", "time_embed_2"):
                setattr(self, name, getattr(decoder, name))
            for layer in self.model.layers:
                layer.mlp.experts_gate_up_proj = layer.mlp.experts.gate_and_up_proj
                layer.mlp.experts_down_proj = layer.mlp.experts.down_proj
                layer.mlp.top_k = layer.mlp.gate.top_k

    with dynamic_vram(), torch.inference_mode():
        model, _, encoder = load(tiny.make_folder(tmp_path / "base"), torch.float32)
        theirs = Theirs(model.model.diffusion_model)
        borrowed = borrow_decoder(theirs, encoder.config)
        assert borrowed.lm_head is theirs.lm_head and borrowed.model.wte is theirs.model.wte
        known = {id(module) for module in theirs.modules()}
        layers = [m for path, m in borrowed.named_modules() if hasattr(m, "in_features") and ".mlp." not in path]
        assert layers and all(id(layer) in known and layer.weight is not None for layer in layers)


def test_the_hosts_tests_once_more():
    """In a process of its own: the machine is the same from the first import on."""
    options = ["-q", "-x", "--no-header", "-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    command = [sys.executable, "-m", "pytest", *options, *AGAIN]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HYWU_DYNAMIC_VRAM": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-400:]
