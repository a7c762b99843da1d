"""LoRA files of other tools: loaded, blended, saved, and what is said of them."""

import comfy.utils
import families
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from other_tools import (
    STRENGTH,
    dora,
    entries,
    loha,
    low_rank,
    model_of,
    named,
    noise,
    only,
    replaced,
    same_change,
    stock,
    wan_fun,
    with_bias,
)
from safetensors.torch import save_file

from hywu_core import InstanceLora, LoraError, LoraFactor, MatchError
from hywu_core.by_block import by_block
from hywu_core.files.lora_files import save_lora, to_state_dict
from hywu_core.host.lora import charts, foreign, store
from hywu_core.host.lora.apply import applied_loras, apply_lora
from hywu_core.host.lora.matching import canonical
from hywu_core.lora import blend, cosine

pytestmark = pytest.mark.usefixtures("inference")


TRAINERS = {
    "kohya": ("flux_double", "lora_unet_double_blocks"),
    "ai-toolkit": ("flux_double", "transformer.single_transformer_blocks"),
    "diffusers": ("sd3", "transformer.transformer_blocks.0.attn"),
    "musubi": ("qwen_image", "lora_unet_transformer_blocks"),
    "peft": ("sd3", "base_model.model.transformer_blocks.1"),
    "OneTrainer": ("flux_double", "lora_transformer_transformer_blocks"),
    "lycoris": ("qwen_image", "lycoris_"),
    "DiffSynth": ("flux_double", "single_transformer_blocks"),
    "unet": ("sdxl", "unet."),
    "Wan-Fun": ("wan", None),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("known", [False, True], ids=["without a model", "with a model"])
def test_blended_and_saved_files_act_in_the_stock_loader_as_before(trainer, known, tmp_path):
    family, pattern = TRAINERS[trainer]
    model = model_of(family)
    one = wan_fun(model) if pattern is None else named(model, pattern)
    two = {key: -tensor if "up" in key or "lora_B" in key else tensor.flip(0) for key, tensor in one.items()}
    loras = [foreign.read(state) for state in (one, two)]
    if known:
        loras = [canonical(lora, model.model) for lora in loras]
        assert not any(lora.foreign for lora in loras)
    file = save_lora(blend(loras, [0.8, 0.5]), tmp_path / "lora.safetensors")
    back = stock(model, comfy.utils.load_torch_file(str(file)), 1.0)
    expected = stock(stock(model, one, 0.8), two, 0.5)
    same_change(model, back, expected)


def test_two_spellings_of_one_layer_are_both_applied_and_become_one_with_a_model(tmp_path):
    model = model_of("flux_double")
    spelled = {
        name: low_rank(name, (32, 32))
        for name in ("lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0")
    }
    one, two = (foreign.read(state) for state in spelled.values())
    mixed = blend([one, two], [1.0, 0.5])
    expected = stock(stock(model, spelled[one.names[0]], STRENGTH), spelled[two.names[0]], STRENGTH / 2)
    same_change(model, apply_lora(model, mixed, STRENGTH, "merge")[0], expected)
    same_change(model, apply_lora(model, foreign.read(spelled[one.names[0]] | spelled[two.names[0]]), 1.0, "merge")[0],
                stock(stock(model, spelled[one.names[0]], 1.0), spelled[two.names[0]], 1.0))  # fmt: skip
    with pytest.raises(LoraError, match="mixes the spellings of several tools.*model input of each Load Instance LoRA"):
        save_lora(mixed, tmp_path / "lora.safetensors")
    with pytest.raises(LoraError, match="same targets can be compared.*Wire the base into Load Instance LoRA"):
        cosine(one, two)
    one, two = (canonical(lora, model.model) for lora in (one, two))
    assert one.names == two.names == ("double_blocks.0.img_attn.proj",)
    assert float(cosine(one, two)) == pytest.approx(1.0)
    same_change(model, stock(model, to_state_dict(blend([one, two], [1.0, 0.5]))), expected)


def test_slices_of_a_fused_weight_keep_the_bases_names():
    model = model_of("flux_double")
    state = {}
    for part in ("to_q", "to_k", "to_v"):
        state |= low_rank(f"transformer.transformer_blocks.1.attn.{part}", (32, 32), ".lora_B.weight")
    lora = canonical(foreign.read(state), model.model)
    assert lora.names == tuple(f"double_blocks.1.img_attn.qkv[{start}:{start + 32}/96]" for start in (0, 32, 64))
    same_change(model, stock(model, to_state_dict(lora)), stock(model, state))
    same_change(model, apply_lora(model, lora, STRENGTH, "merge")[0], stock(model, state))


def test_blends_and_files_of_what_is_no_pair(tmp_path):
    """The host's own trainer writes differences beside its pairs. They add up; what acts on a whole weight is refused."""
    model = model_of("qwen_image")
    first, second = (f"diffusion_model.transformer_blocks.{layer}.attn.to_q" for layer in range(2))
    shape = (32, 32)
    trained, other = with_bias(first, shape), with_bias(first, shape) | only(second, shape)
    loras = [foreign.read(trained), foreign.read(other)]
    mixed = blend(loras, [0.5, -2.0])
    expected = stock(stock(model, trained, 0.5), other, -2.0)
    same_change(model, apply_lora(model, mixed, 1.0, "merge")[0], expected)
    file = save_lora(mixed, tmp_path / "lora.safetensors")
    same_change(model, stock(model, comfy.utils.load_torch_file(str(file)), 1.0), expected)
    for state in (dora(first, shape), loha(second, shape), replaced(second, shape)):
        lora = foreign.read(state)
        alone = save_lora(lora, tmp_path / "alone.safetensors")
        same_change(model, stock(model, comfy.utils.load_torch_file(str(alone))), stock(model, state))
        same_change(model, apply_lora(model, lora.scaled(0.5), STRENGTH, "merge")[0], stock(model, state, STRENGTH / 2))
        with pytest.raises(LoraError, match="cannot hold it at another strength"):
            save_lora(blend([lora, loras[0]], [0.5, 0.5]), tmp_path / "lora.safetensors")
    with pytest.raises(LoraError, match="beside another change of the same weight"):
        to_state_dict(blend([foreign.read(dora(first, shape)), loras[0]], [1.0, 1.0]))


def test_values_are_exact_with_mixed_alphas_in_half_precision():
    """A scale that is folded into sixteen bits would round each number of the factor."""
    model = model_of("wan")
    names = [
        name
        for name, (*_, shape) in entries(model).items()
        if name.startswith("diffusion_model.blocks") and len(shape) == 2
    ]
    state = {}
    for index, name in enumerate(names):
        state |= low_rank(name, entries(model)[name][3], alpha=1.0 + 0.37 * index)
    state = {key: tensor.bfloat16() for key, tensor in state.items()}
    same_change(model, apply_lora(model, foreign.read(state), STRENGTH, "merge")[0], stock(model, state))
    mixed = blend([foreign.read(state)] * 2, [0.3, 0.41])
    same_change(model, apply_lora(model, mixed, 1.0, "merge")[0], stock(stock(model, state, 0.3), state, 0.41))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_files_act_as_in_the_stock_loader(dtype, tmp_path):
    model = model_of("flux_double")
    state = {}
    for index, name in enumerate(
        ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_double_blocks_1_img_attn_proj")
    ):
        state |= low_rank(name, (32, 32), alpha=1.0 + index)
    state = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in state.items()}
    lora = foreign.read(state)
    expected = stock(model, state)
    same_change(model, apply_lora(model, lora, STRENGTH, "merge")[0], expected)
    file = save_lora(blend([lora, lora], [0.5, 0.5]), tmp_path / "lora.safetensors")
    same_change(model, stock(model, comfy.utils.load_torch_file(str(file))), expected)


def test_text_encoders_and_unknown_keys_are_said_once(caplog):
    model = model_of("flux_double")
    state = low_rank("lora_unet_double_blocks_0_img_attn_proj", (32, 32)) | low_rank("lora_te1_text_model_x", (8, 8))
    state |= dora("lora_te1_text_model_y", (8, 8)) | {"lora_unet_nowhere.router": torch.ones(3), "step": torch.ones(1)}
    lora = foreign.read(state)
    assert sum("do nothing: lora_unet_nowhere.router and 1 more" in record.message for record in caplog.records) == 1
    _, matches = apply_lora(model, lora, 1.0, "bypass")
    assert str(matches) == "matched 1/1 targets; 2 of a text encoder, which is not part of a MODEL, left out"
    with pytest.raises(MatchError, match="2 targets of a text encoder and none of a model"):
        text = {key: tensor for key, tensor in state.items() if key.startswith("lora_te1")}
        apply_lora(model, foreign.read(text), 1.0)


def test_a_partial_match_warns(caplog):
    model = model_of("flux_double")
    state = low_rank("lora_unet_double_blocks_0_img_attn_proj", (32, 32)) | low_rank("lora_unet_other_layer", (32, 32))
    state |= dora("lora_unet_third_layer", (32, 32))
    apply_lora(model, foreign.read(state), 1.0)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "HY-WU: matched 1/3 targets; not in this model: lora_unet_other_layer, lora_unet_third_layer (bypass)."
    ]


def test_a_base_respells_what_is_no_pair_and_leaves_out_what_it_does_not_have(caplog):
    model = model_of("flux_double")
    name = "lora_unet_double_blocks_0_img_attn_proj"
    known = with_bias(name, (32, 32)) | dora("lora_unet_double_blocks_1_img_attn_proj", (32, 32))
    text = low_rank("lora_te1_x", (8, 8)) | dora("lora_te1_y", (8, 8))
    lora = canonical(foreign.read(known | text | dora("lora_unet_nowhere", (8, 8))), model.model)
    state = to_state_dict(lora)
    assert {key.split(".")[0] for key in state} == {"diffusion_model", "lora_te1_x", "lora_te1_y"}
    same_change(model, stock(model, state), stock(model, known))
    same_change(model, apply_lora(model, lora, STRENGTH, "merge")[0], stock(model, known))
    assert sum("left out of a loaded LoRA: matched 2/3" in record.message for record in caplog.records) == 1


def test_a_bias_that_the_host_cannot_place_is_named_and_its_pair_acts():
    """The host's table has slices of fused weights, but not of their biases."""
    model = model_of("flux_double")
    state = with_bias("transformer.transformer_blocks.0.attn.to_q", (32, 32))
    lora = foreign.read(state)
    merged, matches = apply_lora(model, lora, STRENGTH, "merge")
    assert matches.missing == ("transformer.transformer_blocks.0.attn.to_q (bias difference)",)
    same_change(model, merged, stock(model, state))
    assert canonical(lora, model.model).names == ("double_blocks.0.img_attn.qkv[0:32/96]",)


def test_each_picture_of_a_batch_has_its_own_pairs_and_all_have_what_is_no_pair():
    flux = families.flux()
    model = flux.model
    state = {"diffusion_model.double_blocks.0.img_attn.proj.diff_b": noise(32) * 9}
    several = families.random_lora(flux, seed=5, batch=2)
    patched, matches = apply_lora(model, blend([several, foreign.read(state)], [1.0, 1.0]), 1.0, "auto")
    assert matches.kinds == "1 x bias difference (double_blocks.0.img_attn.proj)"
    expected, _ = apply_lora(stock(model, state, 1.0), several, 1.0, "bypass")
    found, wanted = (families.sample(flux, one, batch=2) for one in (patched, expected))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    convolution = "diffusion_model.middle_block.0.in_layers.2"
    lora = foreign.read(low_rank(convolution, (64, 64, 3, 3)))
    twice = lora.map(lambda pair: LoraFactor(*(torch.cat((factor, factor)) for factor in pair)))
    for mode in ("auto", "merge"):
        with pytest.raises(MatchError, match="in_layers.2 is no linear layer.*holds 2 instances. Choose one instance"):
            apply_lora(model_of("sd15"), twice, 1.0, mode)


def test_banks_of_experts_are_said_to_be_ignored_by_the_host(caplog):
    """Its loader has no key for a part of a bank; what it loads is the rest."""
    bank = LoraFactor(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 6, 4))
    attention = LoraFactor(torch.ones(1, 4, 32), torch.ones(1, 32, 4))
    lora = InstanceLora({"double_blocks.0.img_attn.proj": attention, "m.experts.w1": bank, "m.experts.w2": bank})
    said = "2 of 3 targets are banks of experts, for which ComfyUI's own LoRA loader has no key"
    assert said in store.remarks(lora, "stock")
    state = store.for_the_host(lora)
    assert sum(said in record.message for record in caplog.records) == 1
    assert len(stock(model_of("flux_double"), state).patches) == 1
    assert len(foreign.read(state).names) == 3
    caplog.clear()
    store.for_the_host(families.random_lora(families.flux(), 1))
    assert not caplog.records


def test_what_has_no_pairs_cannot_be_measured():
    lora = foreign.read(dora("lora_unet_a", (8, 8)))
    with pytest.raises(LoraError, match="holds only lora_unet_a.lora_up.weight and the like: no pairs"):
        charts.norms_by_layer(lora)
    with pytest.raises(LoraError, match="no pairs of low-rank factors"):
        charts.cosines([lora, lora])
    assert store.beside_the_pairs([lora]) == "\nnot counted: 4 tensors that are no pairs of low-rank factors"


def test_files_that_are_no_lora(tmp_path, monkeypatch):
    monkeypatch.setattr(store.folder_paths, "get_full_path_or_raise", lambda folder, name: str(tmp_path / name))
    states = {
        "empty": ({}, "no LoRA weights here that ComfyUI knows. The file is empty"),
        "checkpoint": ({"a.weight": torch.ones(4, 4)}, "The first key is a.weight.*a checkpoint belongs"),
        "half": ({"a.lora_down.weight": torch.ones(4, 4)}, "a.lora_down.weight has no partner"),
        "other half": ({"a.lora_up.weight": torch.ones(4, 4)}, "lacks a.lora_down.weight; it is incomplete"),
        "alphas": (low_rank("a", (8, 8), alpha=None) | {"a.alpha": torch.ones(2)}, "damaged, or not a LoRA"),
        "NaN": (only("a", (8, 8)) | {"b.diff": torch.tensor([float("nan")])}, "b.diff of the LoRA holds NaN"),
        "rank 0": (
            {"a.lora_up.weight": torch.ones(8, 0), "a.lora_down.weight": torch.ones(0, 8)}, r"\(1, 0, 8\).*do not fit"
        ),
        "LoHa without its half": ({"a.hada_w1_a": torch.ones(4, 4)}, "lacks a.hada_w1_b; it is incomplete"),
        "one axis": ({"a.lora_up.weight": torch.ones(8), "a.lora_down.weight": torch.ones(8)}, r"expected \(r, in\)"),
    }  # fmt: skip
    for name, (state, message) in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(LoraError, match=message) as refused:
            store.load(f"{name}.safetensors")
        assert str(tmp_path / f"{name}.safetensors") in str(refused.value)
        with pytest.raises(LoraError, match=message):
            store.as_instance_lora(state)


def test_a_convolution_of_another_size_is_refused():
    model = model_of("sd15")
    name = "lora_unet_input_blocks_0_0"
    with pytest.raises(MatchError, match=rf"{name}.*\(7, 36\).*\(32, 4, 3, 3\)"):
        apply_lora(model, foreign.read(low_rank(name, (7, 4, 3, 3))), 1.0, "merge")


def test_a_picture_from_a_file_of_the_hosts_trainer(tmp_path):
    """Pairs beside the layers, differences in the weights: the mode auto gives the stock loader's picture."""
    flux = families.flux()
    state = {}
    for name, (key, *_, shape) in entries(flux.model).items():
        if name.startswith("diffusion_model.double_blocks") and key.endswith(".weight"):
            state |= with_bias(name, shape) if len(shape) == 2 else only(name, shape)
    expected = families.sample(flux, stock(flux.model, state))
    patched, matches = apply_lora(flux.model, foreign.read(state), STRENGTH, "auto")
    assert applied_loras(patched) and "merged" in matches.how and not matches.missing
    found = families.sample(flux, patched)
    assert (found - expected).norm() < 1e-4 * (expected - families.sample(flux, flux.model)).norm()
    with pytest.raises(MatchError, match="Let it act from 0 to 1"):
        apply_lora(flux.model, foreign.read(state), STRENGTH, "auto", 0.0, 0.5)


def test_it_stays_a_value():
    lora = foreign.read(with_bias("lora_unet_a_b", (8, 8)) | dora("lora_unet_c", (8, 8)))
    assert lora.names == lora.foreign == ("lora_unet_a_b",) and len(lora.parts) == 2
    half = lora.scaled(0.5).with_metadata(note=1).to(dtype=torch.float16).select(0)
    assert half.parts[0].strength == 0.5 and half.foreign == lora.foreign and lora.parts[0].strength == 1
    assert isinstance(half.parts[0], tuple) and half.elements == lora.elements
    same = InstanceLora({"lora_unet_a_b": LoraFactor(*lora.pairs[0])})
    assert not same.foreign and not same.parts


def test_rules_reach_what_is_no_pair_block_by_block():
    names = [f"diffusion_model.transformer_blocks.{layer}.attn.to_q" for layer in range(3)]
    state = {}
    for name in names:
        state |= with_bias(name, (32, 32))
    changed = by_block(foreign.read(state), "0: 0\n2: 0.5")
    assert {part.keys[0].split(".")[2]: part.strength for part in changed.parts} == {"0": 0.0, "1": 1.0, "2": 0.5}
    assert [bool(pair.up.any()) for pair in changed.pairs] == [False, True, True]
    both = by_block(foreign.read(loha(names[0], (32, 32)) | loha(names[1], (32, 32))), "1: 0.5")
    assert [part.strength for part in both.parts] == [1.0, 0.5]


def test_what_no_file_can_hold_ends_only_what_takes_a_file_of_it():
    first, second = (f"diffusion_model.transformer_blocks.{layer}.attn.to_q" for layer in range(2))
    mixed = blend([foreign.read(loha(name, (32, 32))) for name in (first, second)], [0.5, 0.5])
    blocked = store.output_for_the_host(mixed)
    assert isinstance(blocked, ExecutionBlocker) and "another strength" in blocked.message
    assert len(apply_lora(model_of("qwen_image"), mixed, 1.0, "auto")[1].patches) == 2
    with pytest.raises(LoraError, match="another strength"):
        store.for_the_host(mixed)
