"""More of HunyuanImage-3 against independent implementations: the vision tower's padding, attention, stored masks."""

import json

import hunyuan_tiny as tiny
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hywu_core.bases.hunyuan_image3 import files, geometry, loader, sizes, transformer, vision
from hywu_core.bases.hunyuan_image3.sequence import Request, SequenceBuilder, SourcePicture
from hywu_core.bases.hunyuan_image3.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("inference")

PICTURES = (SourcePicture((15, 17), (8, 8), 15), SourcePicture((19, 13), (10, 6), 19))
SLOTS = 64


@pytest.fixture(scope="module")
def folder():
    return files.inspect_base(tiny.FIXTURES / "base_tiny")


@pytest.fixture(scope="module")
def tower(folder):
    return loader.load_tower(folder, torch.float32)[0].model


@pytest.fixture(scope="module")
def builder(folder):
    return SequenceBuilder(Tokenizer.read(folder.folder, folder.config), SLOTS)


@pytest.fixture(scope="module")
def siglip(folder):
    """The library's own tower with the same weights."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    known = Siglip2VisionConfig().to_dict()
    facts = json.loads((tiny.FIXTURES / "base_tiny" / "config.json").read_text())["vit"]
    config = Siglip2VisionConfig(**{name: value for name, value in facts.items() if name in known})
    config._attn_implementation = "eager"
    model, prefix = Siglip2VisionModel(config).eval(), "vision_model."
    # transformers 4 keeps the tower in a part of its own, 5 does not
    own = prefix if hasattr(model, "vision_model") else ""
    state = {own + name.removeprefix(prefix): tensor.float() for name, tensor in folder.part(prefix).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.removeprefix(own).startswith("head.") for name in missing)
    return model


@pytest.mark.parametrize("grid", [(8, 8), (10, 6), (5, 3), (1, 40)])
def test_unused_slots_are_what_the_padded_tower_gives(tower, siglip, grid):
    rows, columns = grid
    pixels = torch.randn(1, 3, rows * 16, columns * 16, generator=torch.Generator().manual_seed(0))
    patches, mask = torch.zeros(1, SLOTS, 768), torch.zeros(1, SLOTS, dtype=torch.int32)
    cells = pixels.view(1, 3, rows, 16, columns, 16).permute(0, 2, 4, 3, 5, 1)
    patches[:, : rows * columns], mask[:, : rows * columns] = cells.reshape(1, rows * columns, 768), 1
    expected = siglip(patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor([grid])).last_hidden_state
    torch.testing.assert_close(tower.features(pixels), expected, atol=1e-5, rtol=0)


def test_the_stored_patches_come_from_the_picture(folder):
    pixels, grid = vision.preprocess(tiny.picture(), folder.config)
    stored = tiny.vision_pixels(tiny.golden("condition")["call0.in.cond_vit_images.0"], grid)
    assert grid == (8, 8)
    torch.testing.assert_close(pixels, stored, atol=1e-6, rtol=0)


def unpacked(name, key):
    shape = tiny.facts(name)["packed_mask_shapes"][key]
    bits = np.unpackbits(tiny.golden(name)[key].numpy())[: np.prod(shape)]
    return torch.from_numpy(bits.reshape(shape).astype(bool))


def test_masks_of_the_whole_edit(builder):
    asked = tiny.facts()
    request = Request(asked["prompt"], PICTURES[:1], asked["cot_text"], asked["system_prompt"])
    condition = geometry.dense_mask(builder.ratio(request).layout)
    assert torch.equal(condition, unpacked("condition", "call0.in.attention_mask")[0, 0])
    stored = tiny.golden("lora")
    for row in (0, 1):
        layout = builder.image(request, 14, (14, 18), bool(row)).layout
        mask = geometry.dense_mask(layout)
        assert torch.equal(mask, unpacked("lora", "call0.in.attention_mask")[row, 0])
        assert stored["call0.in.position_ids"][row].tolist() == list(range(layout.length))
        later = slice(layout.image.timestep, layout.image.image.stop)
        assert torch.equal(mask[later], unpacked("lora", "call1.in.attention_mask")[row, 0])
        assert stored["call1.in.position_ids"][row].tolist() == list(range(later.start, later.stop))
        assert layout.image.timestep == int(stored["call0.in.timesteps_index"][row])


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("tail", ["image", "ratio"])
def test_attention_stretch_by_stretch_equals_one_mask(builder, folder, count, tail):
    request = Request("swap the hat", PICTURES[:count], None, "x")
    layout = (builder.image(request, 14, (5, 6)) if tail == "image" else builder.ratio(request)).layout
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, layout.length, 16, generator=source) for heads in (4, 2, 2))
    mask = geometry.dense_mask(layout)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
    for offset in {0, 1, 7, layout.length // 2, layout.length - 1}:
        stretch = transformer.Stretch.of(layout, folder.config, q.device, offset)
        found = transformer._attend(q[:, :, offset:], k, v, stretch)
        torch.testing.assert_close(found, whole[:, offset:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "size, resized, left",
    [
        ((480, 545), (272, 240), 0),  # 272.5 wide: the even neighbour
        ((480, 547), (274, 240), 1),  # 273.5
        ((480, 546), (273, 240), 0),  # half a pixel to crop: the even neighbour
        ((480, 550), (275, 240), 2),  # one and a half
    ],
)
def test_halves_round_to_even_as_in_python(size, resized, left):
    levels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = sizes.fit(torch.from_numpy(levels).float()[None] / 255, sizes.Size(240, 272))
    expected = Image.fromarray(levels).resize(resized, Image.LANCZOS).crop((left, 0, left + 272, 240))
    assert np.array_equal((found[0] * 255).round().byte().numpy(), np.array(expected))


def test_levels_that_arithmetic_left_just_below_are_not_lost():
    picture = torch.randint(0, 256, (1, 300, 200, 3), generator=torch.Generator().manual_seed(0)) / 255
    assert not torch.equal(1 - (1 - picture), picture)
    assert torch.equal(sizes.fit(1 - (1 - picture), sizes.Size(256, 256)), sizes.fit(picture, sizes.Size(256, 256)))
