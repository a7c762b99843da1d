"""A folder of pairs as the lists that the training nodes read."""

import json

import folder_paths
import nodes as host_nodes
import pytest
import torch
from comfy_extras.nodes_edit_model import ReferenceLatent
from PIL import Image

from hywu_core.bases import pocket
from hywu_core.host import pictures
from hywu_core.host.training import pairs_in_server
from hywu_core.host.training.pair_lists import PairError
from hywu_core.host.training.pairs_of_folder import Reading

WORDS = ["brighten the picture", "make it gray"]


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        return pocket.load_pocket_editor()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """input/pairs with sources, targets and captions, as other trainers lay them out, written in no order."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    root = tmp_path / "input" / "pairs"
    source = torch.Generator().manual_seed(0)
    for name in ("c", "a", "b"):
        size = (24, 32) if name == "b" else (32, 24)
        for kind in ("control", "target"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (*size, 3), generator=source).byte()
            Image.fromarray(pixels.numpy()).save(root / kind / f"{name}.png")
        (root / "target" / f"{name}.txt").write_text(WORDS[name == "b"], encoding="utf-8")
    return root


def load(loaded, **reading):
    _, clip, vae = loaded
    with torch.inference_mode():
        return pairs_in_server.load("pairs", clip, vae, Reading(**reading))


@pytest.mark.parametrize("regime", ["told", "blind"])
def test_the_lists_are_what_the_hosts_nodes_make_of_the_pictures(loaded, folder, regime):
    _, clip, vae = loaded
    found = load(loaded, regime=regime)
    assert found.instructions == [WORDS[0], WORDS[1], WORDS[0]]
    for place, name in enumerate("abc"):
        with torch.inference_mode():
            (target,) = host_nodes.VAEEncode().encode(vae, pictures.read(folder / "target" / f"{name}.png"))
            (latent,) = host_nodes.VAEEncode().encode(vae, pictures.read(folder / "control" / f"{name}.png"))
            text = found.instructions[place]
            for words, entries in (
                (text, found.generator_positive),
                (text if regime == "told" else "", found.positive),
            ):
                expected = ReferenceLatent.execute(host_nodes.CLIPTextEncode().encode(clip, words)[0], latent).args[0]
                ((tokens, options),) = entries[place]
                assert torch.equal(tokens, expected[0][0])
                assert torch.equal(options["pooled_output"], expected[0][1]["pooled_output"])
                assert torch.equal(options["reference_latents"][0], expected[0][1]["reference_latents"][0])
        assert torch.equal(found.latents[place]["samples"], target["samples"])
    assert found.sheet.shape[-1] == 3 and found.sheet.shape[2] >= 512


def test_sizes_and_buckets(loaded, folder):
    squares = [tuple(latent["samples"].shape[-2:]) for latent in load(loaded, size=16).latents]
    assert squares == [(16, 16)] * 3
    shapes = {tuple(latent["samples"].shape[-2:]) for latent in load(loaded, size=32, buckets=True).latents}
    assert len(shapes) == 2 and all(height != width for height, width in shapes)


def test_every_wording_is_a_pair(loaded, folder):
    lines = [
        {"source": "control/a.png", "target": "target/a.png", "instruction": ["brighter", "more light"]},
        {"source": "control/b.png", "target": "target/b.png", "instruction": "gray"},
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = load(loaded)
    assert found.instructions == ["brighter", "more light", "gray"] and len(found.latents) == 3


def test_a_changed_folder_is_read_again_and_bad_ones_are_named(loaded, folder):
    before = pairs_in_server.fingerprint("pairs")
    assert pairs_in_server.fingerprint("pairs") == before
    (folder / "target" / "a.txt").write_text("something else entirely", encoding="utf-8")
    assert pairs_in_server.fingerprint("pairs") != before
    (folder / "target" / "b.caption").write_text("a caption of another trainer", encoding="utf-8")
    before = pairs_in_server.fingerprint("pairs")
    (folder / "target" / "b.caption").write_text("a changed one of another trainer", encoding="utf-8")
    assert pairs_in_server.fingerprint("pairs") != before
    (folder / "target" / "b.caption").unlink()
    assert load(loaded).instructions[0] == "something else entirely"
    (folder / "control" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(PairError, match=r"a\.png"):
        load(loaded)
    for name in ("nothing", "..", "../input", "."):
        with pytest.raises(PairError, match="There is no folder"):
            pairs_in_server.folder_of(name)


def test_a_clip_of_other_settings_encodes_anew(loaded):
    _, clip, vae = loaded
    plain, layer, padded = (pairs_in_server._encoders(made, vae) for made in _settings_of(clip))
    assert pairs_in_server._encoders(clip.clone(), vae) == plain and len({plain, layer, padded}) == 3


def _settings_of(clip):
    layer, padded = clip.clone(), clip.clone()
    layer.clip_layer(-2)
    padded.set_tokenizer_option("min_padding", 8)
    return clip, layer, padded
