"""The pieces of HunyuanImage-3 one by one, against the reference's numbers: sequences, positions, masks, sizes, reasoning."""

import json

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import hunyuan_tiny as tiny
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hywu_core.bases.hunyuan_image3 import geometry, sizes
from hywu_core.bases.hunyuan_image3.image_ends import sinusoid
from hywu_core.bases.hunyuan_image3.loader import load
from hywu_core.bases.hunyuan_image3.reason import MODES, OPENING, Choice, generate, reason
from hywu_core.bases.hunyuan_image3.sequence import ImageRun, Layout, PictureRun, Request, SourcePicture, Span
from hywu_core.bases.hunyuan_image3.transformer import Stretch
from hywu_core.errors import ConditionError

pytestmark = pytest.mark.usefixtures("inference")

FACTS = json.loads((tiny.FIXTURES / "units.json").read_text())
STORED = load_file(tiny.FIXTURES / "units.safetensors")
BASE = 256
PROMPT, SYSTEM = "swap the hat, 猫!", "You edit images."
REASONING = "<think>look at it</think><recaption>a cat with a hat</recaption>"
PICTURES = (SourcePicture((15, 17), (8, 8), 15), SourcePicture((19, 13), (10, 6), 19))
GRID, RATIO = (14, 18), 14  # of the image that is generated
SPANS = {
    name: [Span(*span["slice"]) for span in found[0]]
    for name, found in FACTS["masks"]["mask.joint_full.gen_image"].items()
    if name.endswith("slices")
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    with torch.inference_mode():
        model, _, encoder = load(tiny.make_folder(tmp_path_factory.mktemp("hunyuan") / "base"), torch.float32)
    return model, encoder


@pytest.fixture(scope="module")
def builder(loaded):
    return loaded[1].builder


@pytest.fixture(scope="module")
def edit(loaded):
    """The edit that the reference reasoned about."""
    with torch.inference_mode():
        known = tiny.golden_edit(loaded[1])
        latent = STORED["cot.cond_vae_latents"].unsqueeze(2) / known.config.vae.scaling_factor
    return known._replace(request=known.request._replace(reasoning=None), latents=(latent,))


def sequences(builder, mode):
    """The rows of tokout.<mode> and of the masks, as we build them."""
    request = Request(PROMPT, PICTURES, REASONING, SYSTEM)
    if mode == "gen_text":
        return [builder.ratio(request)]
    return [builder.image(request, RATIO, GRID, unconditional) for unconditional in (False, True)]


def marked(length, spans):
    mask = torch.zeros(length, dtype=torch.bool)
    for span in spans:
        mask[span.start : span.stop] = True
    return mask


def some_layouts(builder):
    plain = Request(PROMPT, (), None, SYSTEM)
    found = [*sequences(builder, "gen_image"), *sequences(builder, "gen_text")]
    found += [builder.ratio(plain), builder.image(plain, RATIO, GRID), builder.reason(Request("x"), "think")]
    return [sequence.layout for sequence in found] + [found[0].layout.without_tail()]


def expanded(rows, length, offset=0):
    """The mask (queries from offset on, keys) that stretches of queries stand for."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for row in rows:
        mask[row.start : row.stop, : row.stop] = True
        if row.causal:
            own = slice(row.start, row.stop)
            mask[own, own] = torch.ones(row.stop - row.start, row.stop - row.start, dtype=torch.bool).tril()
    return mask[offset:]


@pytest.mark.parametrize("case", range(5))
def test_rotary_tables(case):
    asked = FACTS["rope"][case]
    grids = [(Span(*place["slice"]), tuple(grid)) for place, grid in asked["image_infos"]]
    pictures, image = (), None
    if len(grids) == 2:
        (latent, latent_grid), (vision, patch_grid) = grids
        pictures = (PictureRun(latent.start - 1, latent, vision, latent_grid, patch_grid),)
    elif grids:
        image = ImageRun(grids[0][0].start - 1, None, None, *grids[0])
    places = geometry.positions(Layout(asked["seq_len"], pictures, image))
    assert torch.equal(places, STORED[f"rope{case}.pos_yx"])
    tables = geometry.rotary(places, asked["n_elem"], asked["base"])
    for name, table in zip(("cos", "sin"), tables, strict=True):
        torch.testing.assert_close(table, STORED[f"rope{case}.{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["gen_image", "gen_text"])
def test_dense_masks_are_the_references(builder, mode):
    name = f"mask.joint_full.{mode}"
    shape = FACTS["masks"][name]["shape"]
    stored = np.unpackbits(STORED[name].numpy())[: np.prod(shape)].reshape(shape).astype(bool)
    for row, sequence in enumerate(sequences(builder, mode)):
        assert np.array_equal(geometry.dense_mask(sequence.layout).numpy(), stored[row, 0])


def test_attention_rows_stand_for_the_dense_mask(builder):
    for layout in some_layouts(builder):
        rows = geometry.attention_rows(layout)
        assert [row.start for row in rows] == [0, *(row.stop for row in rows[:-1])]
        assert torch.equal(expanded(rows, layout.length), geometry.dense_mask(layout))


def test_a_stretch_after_an_offset_stands_for_the_rest_of_the_mask(builder, loaded):
    config, checked = loaded[1].config, 0
    for layout in some_layouts(builder):
        whole = Stretch.of(layout, config, torch.device("cpu"))
        inside = {place for row in whole.rows if not row.causal for place in range(row.start + 1, row.stop)}
        offsets = {1, 20, layout.length // 2, layout.length - 1} | ({layout.image.timestep} if layout.image else set())
        for offset in offsets - inside:
            rest = Stretch.of(layout, config, torch.device("cpu"), offset)
            assert rest.offset == rest.rows[0].start == offset
            assert torch.equal(expanded(rest.rows, layout.length, offset), geometry.dense_mask(layout)[offset:])
            assert torch.equal(rest.cos, whole.cos[offset:]) and torch.equal(rest.sin, whole.sin[offset:])
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("mode", ["gen_image", "gen_text"])
def test_tokens_are_the_references(builder, mode):
    for row, (ids, layout) in enumerate(sequences(builder, mode)):
        stored = {
            name: STORED[f"tokout.{mode}.{name}"][row]
            for name in ("tokens", "vae_image_mask", "vit_image_mask", "cond_timestep_scatter_index", "real_pos")
        }
        assert list(ids) == stored["tokens"].tolist() and layout.length == int(stored["real_pos"])
        assert torch.equal(marked(layout.length, [run.latent for run in layout.pictures]), stored["vae_image_mask"])
        assert torch.equal(marked(layout.length, [run.vision for run in layout.pictures]), stored["vit_image_mask"])
        assert [run.timestep for run in layout.pictures] == stored["cond_timestep_scatter_index"].tolist()
        assert [run.joint for run in layout.pictures] == SPANS["joint_image_slices"]
        if mode == "gen_image":
            image = marked(layout.length, [layout.image.image])
            assert torch.equal(image, STORED["tokout.gen_image.gen_image_mask"][row])
            assert layout.image.timestep == int(STORED["tokout.gen_image.gen_timestep_scatter_index"][row])


@pytest.mark.parametrize("case", range(len(FACTS["templates"])))
def test_templates_are_the_references(builder, case):
    asked = FACTS["templates"][case]
    pictures = PICTURES[:1] if "image" in asked else ()
    request = Request(asked["prompt"], pictures, asked.get("cot_text"), asked.get("system_prompt", ""))
    builder = builder._replace(drop_think=asked["drop_think"])
    if asked["mode"] == "gen_image":
        ratio = sizes.parse_size(asked["image_size"], BASE)
        grid = tuple(side // 16 for side in sizes.buckets(BASE)[ratio])
        found = [builder.image(request, ratio, grid, unconditional) for unconditional in (False, True)]
    elif asked["bot_task"] in ("think", "recaption"):
        found = [builder.reason(request, asked["bot_task"])]
    else:
        found = [builder.ratio(request)]
    found = [list(sequence.ids) for sequence in found]
    if asked.get("bot_task") == "auto":  # nothing follows; we have no such pass
        assert len(found[0]) == len(asked["tokens"][0]) + 3
        found = [found[0][:-3]]
    assert found == asked["tokens"]


@pytest.mark.parametrize("base", [256, 1024])
def test_sizes_are_the_references(base):
    table = sizes.buckets(base)
    assert [list(size) for size in table] == FACTS[f"reso_{base}"]
    for query in FACTS[f"reso_{base}_queries_wh"]:
        index = sizes.nearest(sizes.Size(*reversed(query["wh"])), base)
        assert index == query["idx"] and [*reversed(table[index])] == query["target_wh"]
    assert all(sizes.nearest(size, base) == index for index, size in enumerate(table))


def test_a_size_is_asked_for_in_four_ways():
    assert sizes.parse_size(" Auto ", BASE) is None
    assert sizes.parse_size("224x288", BASE) == sizes.parse_size("224 X 288", BASE) == 14  # height first
    assert sizes.parse_size("4:1", BASE) == 0 and sizes.parse_size("1 : 4", BASE) == 32  # width first
    assert sizes.parse_size("1024x1024", 1024) == sizes.parse_size("1:1", 1024) == 16
    assert [sizes.parse_size(f"<img_ratio_{index}>", BASE) for index in (0, 3, 36)] == [0, 3, 36]


@pytest.mark.parametrize(
    "text", ["", "big", "0x256", "256x0", "1:0", "-1x2", "256", "1.5:1", "<img_ratio_37>", "1x2x3", "a:b"]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(ConditionError, match=r"is no size\. Write auto.*<img_ratio_0> to <img_ratio_36>"):
        sizes.parse_size(text, BASE)


def test_timesteps_are_embedded_as_in_the_reference():
    """Processors round a frequency's exponential differently in its last place, and a timestep turns it that many times."""
    timesteps = torch.tensor([0, 1000, 333.33, 982.5])
    room = 1e-6 + timesteps * torch.finfo(torch.float32).eps
    error = (sinusoid(timesteps) - STORED["timestep_embedding"]).abs().amax(dim=1)
    assert (error <= room).all(), error


@pytest.mark.parametrize("name", sorted(n.removesuffix(".sigmas") for n in STORED if n.endswith(".sigmas")))
def test_the_hosts_simple_schedule_is_the_references(name):
    _, steps, shift = name.split("_")
    assert 1000 % int(steps) == 0  # of others the host's table has no exact entry
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=float(shift), multiplier=1000)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", int(steps))
    torch.testing.assert_close(sigmas, STORED[f"{name}.sigmas"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sampling.timestep(sigmas[:-1]), STORED[f"{name}.timesteps"], atol=1e-3, rtol=0)


class Scripted:
    """Chooses given tokens, whatever the scores."""

    def __init__(self, *ids):
        self.left = list(ids)

    def next(self, logits, source):
        return self.left.pop(0)


def test_greedy_reasoning_is_the_references(loaded, edit, monkeypatch):
    model, encoder = loaded
    decoder, scores = model.model.diffusion_model, []
    real = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: scores.append(real(hidden)) or scores[-1])
    limit = FACTS["cot_greedy"]["max_new_tokens"]
    assert list(edit.reason_sequence("think").ids) == STORED["cot.input_ids"][0].tolist()
    ids = generate(model, edit, "think and recaption", 0, Choice(0.0), limit)
    for found, name in zip(scores, ("prefill_last_logits", "decode1.logits", "decode2.logits"), strict=False):
        assert tiny.relative(found[0, 0], STORED[f"cot.{name}"][0]) < 1e-5
    assert (
        ids[:-1] == STORED["cot.generated_ids_but_last"][0].tolist() and len(scores) == FACTS["cot_greedy"]["n_calls"]
    )
    assert "<think>" + encoder.builder.tokenizer.decode(ids) == FACTS["cot_greedy"]["text"][0]
    text = reason(model, edit, "think and recaption", 0, Choice(0.0), limit)
    assert text == FACTS["cot_greedy"]["text"][0].replace("<img_ratio_10>", "</think>")


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_text_again(loaded, edit, mode):
    model, _ = loaded
    choice = Choice(temperature=2.0)
    texts = [reason(model, edit, mode, seed, choice, 12) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(f"<{OPENING[mode]}>")


def test_reasoning_stops_where_its_mode_ends(loaded, edit):
    model, encoder = loaded
    special, a = encoder.builder.tokenizer.special, encoder.builder.tokenizer.encode("a")[0]
    written = {
        "think": ([a, special.think_end, a], "<think>a</think>"),
        "recaption": ([a, special.recaption_end, a], "<recaption>a</recaption>"),
        "think and recaption": (
            [a, special.think_end, a, special.recaption_end, a],
            "<think>a</think><recaption>a</recaption>",
        ),
    }
    for mode, (script, text) in written.items():
        chosen = Scripted(*script)
        assert reason(model, edit, mode, choice=chosen, most_tokens=20) == text
        assert chosen.left == [a]
    for stop in (special.eos, special.answer_end, special.ratios[36]):
        chosen = Scripted(a, stop, a)
        assert reason(model, edit, "think", choice=chosen, most_tokens=20) == "<think>a</think>"
        assert chosen.left == [a]


def test_reasoning_that_is_cut_has_closed_tags(loaded, edit):
    model, encoder = loaded
    special, a = encoder.builder.tokenizer.special, encoder.builder.tokenizer.encode("a")[0]
    script, mode, seen = [a, a, special.think_end, a, a], "think and recaption", []
    found = {}
    for most in (1, 2, 3, 4, 5, 6):
        found[most] = reason(model, edit, mode, choice=Scripted(*script), most_tokens=most, watch=seen.append)
    thought = "<think>aa</think>"
    assert found == {1: "<think>a</think>", 2: thought, 3: thought, 4: thought} | {
        5: f"{thought}<recaption>a</recaption>",
        6: f"{thought}<recaption>aa</recaption>",
    }
    assert seen[-6:] == ["a", "aa", "aa</think>"] + [f"aa</think><recaption>{'a' * count}" for count in range(3)]


def test_the_likeliest_tokens_are_chosen_among():
    logits, source = torch.tensor([0.0, 3.0, 1.0, 2.9]), torch.Generator().manual_seed(0)
    assert Choice(0.0).next(logits, source) == 1
    for choice, possible in {
        Choice(1.0, top_k=1): {1},
        Choice(1.0, top_k=2, top_p=1.0): {1, 3},
        Choice(1.0, top_k=0, top_p=0.4): {1},
        Choice(1.0, top_k=0, top_p=0.6): {1, 3},
        Choice(100.0, top_k=0, top_p=1.0): {0, 1, 2, 3},
    }.items():
        assert {choice.next(logits, source) for _ in range(100)} == possible


def test_reasoning_can_be_cancelled(loaded, edit, monkeypatch):
    model, _ = loaded
    cancelled, seen = comfy.model_management.InterruptProcessingException, []

    def check():
        if len(seen) == 3:
            raise cancelled

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", check)
    with pytest.raises(cancelled):
        reason(model, edit, "recaption", 1, Choice(2.0), 50, seen.append)
    assert len(seen) == 3


def as_levels(picture):
    levels = (picture[0] * 255).round()
    assert torch.equal(levels / 255, picture[0])
    return levels.byte().numpy()


def pillow(levels, size, stretch):
    """What the reference does to a picture (H, W, 3) of 8-bit pixels."""
    image, (height, width) = Image.fromarray(levels), levels.shape[:2]
    if stretch:
        return np.array(image.resize((size.width, size.height), Image.LANCZOS))
    if height / width < size.height / size.width:
        resized = (round(size.height / height * width), size.height)
    else:
        resized = (size.width, round(size.width / width * height))
    left, top = (round((have - want) / 2) for have, want in zip(resized, reversed(size), strict=True))
    image = image.resize(resized, Image.LANCZOS)
    return np.array(image.crop((left, top, left + size.width, top + size.height)))


def test_a_picture_of_its_buckets_size_stays_bit_equal():
    picture = tiny.picture()
    size = sizes.buckets(BASE)[sizes.nearest(sizes.Size(240, 272), BASE)]
    assert torch.equal(sizes.fit(picture, size), tiny.picture("a_vae_center"))
    assert torch.equal(sizes.fit(picture, size, stretch=True), tiny.picture("a_vae_resize"))


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("height, width", [(101, 77), (333, 250), (64, 301), (272, 241), (255, 257), (700, 90)])
def test_pictures_are_resized_by_pillow_on_8_bit_pixels(height, width, stretch):
    levels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = torch.from_numpy(levels).float()[None] / 255
    for size in (sizes.buckets(BASE)[index] for index in (0, 14, 16, 23, 33)):
        found = sizes.fit(picture, size, stretch)
        assert np.array_equal(as_levels(found), pillow(levels, size, stretch)), (height, width, size)
