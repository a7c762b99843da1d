"""Stacks, targets and a generator's shape are read off the host's own model families."""

import comfy.ops
import comfy.supported_models
import pytest
import torch
from families import FAMILIES, build, conditioning, z_image

from hywu_core import MatchError
from hywu_core.condition import CLIP_VISION, CONDITIONING, REFERENCE_LATENT, Condition, ConditionPart
from hywu_core.host import model, new_generator
from hywu_core.host.conditions import from_host
from hywu_core.host.lora.experts import make_bank
from hywu_core.layout import target_names, token_spans

EXPECTED = {  # the stacks, the largest first
    "flux_double": ("double_blocks", "single_blocks"),
    "qwen_image": ("transformer_blocks",),
    "z_image": ("layers",),
    "wan": ("blocks",),
    "sd3": ("joint_blocks",),
}


@pytest.fixture(scope="module", params=EXPECTED)
def family(request):
    return FAMILIES[request.param](), EXPECTED[request.param]


def example(family, source=True):
    ((tokens, options),) = family.conditioning
    return from_host([[tokens, options | ({"reference_latents": [family.latent]} if source else {})]])


def test_every_family_has_its_stack(family):
    family, expected = family
    base = family.model.model
    found = model.find_stacks(base)
    assert {stack.path for stack in found} == set(expected)
    assert model.choose_stack(base).path == expected[0]
    assert {stack.blocks for stack in found} == {2}


def test_targets_are_linear_layers_of_every_block_and_fit_the_base(family):
    family, _ = family
    base = family.model.model
    config = new_generator.generator_config(base, example(family), rank=4, alpha=8.0, encoder_layers=1)
    new_generator.check_fits(base, config)
    for name in target_names(config):
        layer = base.diffusion_model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        assert not {"mod", "adaLN_modulation", "img_mod", "txt_mod"} & set(name.split("."))
    assert config.hywu["base"] == type(base).__name__
    assert [part["kind"] for part in config.hywu["condition"]] == [CONDITIONING, REFERENCE_LATENT]


def test_presets_hold_what_they_say():
    stack = model.choose_stack(FAMILIES["flux_double"]().model.model)
    attention, both, everything = (
        set(model.choose_targets(stack, preset))
        for preset in (model.ATTENTION, model.ATTENTION_AND_FEED_FORWARD, model.ALL)
    )
    assert attention == {f"{stream}_attn.{layer}" for stream in ("img", "txt") for layer in ("qkv", "proj")}
    assert both == attention | {f"{stream}_mlp.{layer}" for stream in ("img", "txt") for layer in (0, 2)}
    assert everything == both | {"img_mod.lin", "txt_mod.lin"} == set(stack.linears)
    assert set(model.choose_targets(stack, model.ALL, "img_attn.*, txt_mlp.0")) == {
        "img_attn.qkv", "img_attn.proj", "txt_mlp.0",
    }  # fmt: skip


@pytest.mark.parametrize("size", new_generator.SIZES)
@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_tokens_are_filled_well(size, rank):
    family = FAMILIES["qwen_image"]()
    config = new_generator.generator_config(family.model.model, example(family), size=size, rank=rank, alpha=2.0 * rank)
    spans = token_spans(config)
    held = sum(span.tokens for span in spans) * rank * config.token_dim
    assert sum(span.elements for span in spans) / held > 0.95
    assert rank % config.dim_accumulation == 0


def test_the_token_of_a_large_base_is_as_wide_as_the_generator_can_make_it():
    widths = {"attn": (3072, 9216), "mlp": (3072, 12288)}
    assert new_generator._token_dim(widths, 128) == 128


def test_a_model_without_a_stack_is_one_clear_error():
    config = comfy.supported_models.SD15(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
            "channel_mult": [1, 1], "transformer_depth": [0, 0], "transformer_depth_middle": -1, "num_heads": 2,
            "transformer_depth_output": [0, 0, 0, 0], "use_spatial_transformer": True, "context_dim": 12,
            "adm_in_channels": None, "use_linear_in_transformer": False, "legacy": False,
        }
    )  # fmt: skip
    base = build(config).model
    with pytest.raises(model.StackError, match="no stack of like blocks"):
        model.choose_stack(base)


def test_wrong_names_say_what_there_is():
    family = FAMILIES["flux_double"]()
    base = family.model.model
    with pytest.raises(model.StackError, match=r"no stack 'layers'. It has: double_blocks \(2 blocks\), single_blocks"):
        model.choose_stack(base, "layers")
    with pytest.raises(model.StackError, match=r"matches attn\*. Its blocks have img_mod.lin, img_attn.qkv"):
        model.choose_targets(model.choose_stack(base), model.ALL, "attn*")
    with pytest.raises(model.StackError, match="'all linear layers', or name"):
        model.choose_targets(model.choose_stack(base, "single_blocks"), model.ATTENTION)


def test_several_stacks_are_named_or_all_taken():
    family = FAMILIES["flux_double"]()
    base = family.model.model
    ways = {
        "largest": ["double_blocks"], "": ["double_blocks"], "single_blocks": ["single_blocks"],
        "all stacks": ["double_blocks", "single_blocks"],
        # in the order of the base
        "single_blocks, double_blocks.": ["double_blocks", "single_blocks"], "single_blocks,": ["single_blocks"],
        "largest, single_blocks": ["double_blocks", "single_blocks"],
    }  # fmt: skip
    for asked, paths in ways.items():
        assert [stack.path for stack in model.choose_stacks(base, asked)] == paths
        config = new_generator.generator_config(base, example(family), stack=asked, rank=4)
        assert [stack.prefix for stack in config.stacks] == [f"{path}." for path in paths]
        assert ("further_stacks" in config.hywu) == (len(paths) > 1)
        new_generator.check_fits(base, config)
    with pytest.raises(model.StackError, match="no stack 'blocks'.*Several can be named.*'all stacks'"):
        model.choose_stacks(base, "double_blocks, blocks")
    with pytest.raises(model.StackError, match="No linear layer of single_blocks belongs to 'attention'"):
        new_generator.generator_config(base, example(family), targets=model.ATTENTION, stack=model.EVERY)
    one = new_generator.generator_config(base, example(family), target_names="img_attn.*, linear2", stack=model.EVERY)
    assert [list(stack.pg_mapping) for stack in one.stacks] == [["img_attn.qkv", "img_attn.proj"], ["linear2"]]


def test_refiners_are_stacks_of_their_own():
    family = z_image(refiners=2)
    base = family.model.model
    config = new_generator.generator_config(base, example(family), stack=model.EVERY, rank=4)
    assert {stack.prefix for stack in config.stacks} == {"noise_refiner.", "context_refiner.", "layers."}
    new_generator.check_fits(base, config)
    with pytest.raises(MatchError, match="None of the LoRA's .* targets"):
        new_generator.check_fits(FAMILIES["wan"]().model.model, config)


def test_an_example_without_what_is_to_be_read_is_one_clear_error():
    family = FAMILIES["flux_double"]()
    with pytest.raises(model.StackError, match="no reference_latent: it has conditioning. Put the source picture"):
        new_generator.generator_config(family.model.model, example(family, source=False))
    with pytest.raises(model.StackError, match="no clip_vision.*Wire a CLIP_VISION_OUTPUT"):
        new_generator.generator_config(family.model.model, example(family), source="instruction and CLIP Vision")


def test_parts_are_read_off_the_example():
    family = FAMILIES["qwen_image"]()
    features = ConditionPart(CLIP_VISION, torch.zeros(1, 9, 24))
    seen = Condition((*example(family).parts, features))
    config = new_generator.generator_config(family.model.model, seen, source="everything wired in")
    kinds = {part["kind"]: part["width"] for part in config.hywu["condition"]}
    assert kinds == {CONDITIONING: 12, REFERENCE_LATENT: 16 * 2 * 2, CLIP_VISION: 24}
    assert config.input_dim == 12 + 64 + 24


def test_a_generator_of_another_base_is_refused_before_any_work():
    made_for, other = FAMILIES["qwen_image"](), FAMILIES["wan"]()
    config = new_generator.generator_config(made_for.model.model, example(made_for))
    with pytest.raises(MatchError, match="None of the LoRA's .* generated for QwenImage"):
        new_generator.check_fits(other.model.model, config)


def test_the_example_conditioning_is_not_changed():
    entry = conditioning(12, 8)
    before = dict(entry[0][1])
    from_host(entry)
    assert entry[0][1].keys() == before.keys()


class Packed(torch.nn.Module):
    """Of another pack: no Linear, and no weight of that name."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.qweight = 4, 6, torch.zeros(6, 2)


CARRIERS = {
    "linear": (torch.nn.Linear(4, 6), (4, 6, None, False)),
    "packed": (Packed(), (4, 6, None, False)),
    "1x1": (torch.nn.Conv2d(4, 6, 1), (4, 6, None, True)),
    "a bank": (make_bank(comfy.ops.disable_weight_init, 3, 4, 6), (4, 6, 3, False)),
    "3x3": (torch.nn.Conv2d(4, 6, 3), None),
    "strided": (torch.nn.Conv2d(4, 6, 1, stride=2), None),
    "grouped": (torch.nn.Conv2d(4, 6, 1, groups=2), None),
    "padded": (torch.nn.Conv2d(4, 6, 1, padding=1), None),
    "transposed": (torch.nn.ConvTranspose2d(4, 6, 1), None),
    "embedding": (torch.nn.Embedding(4, 6), None),
    "bilinear": (torch.nn.Bilinear(4, 4, 6), None),
    "block": (torch.nn.Sequential(torch.nn.Linear(4, 6)), None),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_what_can_carry_a_lora(name):
    module, expected = CARRIERS[name]
    found = model.layer_of(module)
    assert (None if found is None else tuple(found[1:])) == expected
