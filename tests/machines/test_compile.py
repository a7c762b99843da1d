"""torch.compile around the whole model, block by block while sampling, and by blocks put in the place of others: a LoRA acts
before, behind and between, the graphs last from picture to picture, and names stay those of a checkpoint.
"""

import logging

import comfy.cli_args
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import families
import pytest
import torch
import torch._dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel

from hywu_core import MatchError
from hywu_core.host import model as structure
from hywu_core.host.conditions import hidden_states
from hywu_core.host.lora.apply import applied_loras, apply_lora

WHOLE = ["diffusion_model"]
BLOCKS = [f"diffusion_model.{kind}_blocks.{index}" for kind in ("double", "single") for index in range(2)]


@pytest.fixture(autouse=True)
def _compiling(monkeypatch):
    """Attention is torch's own, as on a GPU: the CPU's asks for free memory, and a graph would be made for each answer."""
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", comfy.ldm.modules.attention.attention_pytorch)
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)
    torch._dynamo.reset()
    with torch.inference_mode():
        yield
    torch._dynamo.reset()


@pytest.fixture
def flux():
    with torch.inference_mode():
        return families.flux()


def close(found, expected):
    unit = expected.std()
    torch.testing.assert_close(found / unit, expected / unit, atol=1e-5, rtol=0)


def compiled_while_sampling(model, keys, backend="eager"):
    clone = model.clone()
    set_torch_compile_wrapper(clone, backend=backend, keys=keys)
    return clone


def compiled_in_place(model, backend="eager"):
    """As older compile nodes do: a compiled block is put in the place of each block, as long as the model is loaded."""
    clone = model.clone()
    for name in BLOCKS:
        clone.add_object_patch(name, torch.compile(clone.get_model_object(name), backend=backend))
    return clone


@pytest.mark.parametrize(
    ("mode", "keys", "backend"),
    [
        ("auto", BLOCKS, "eager"),
        ("bypass", WHOLE, "eager"),
        ("bypass", BLOCKS, "eager"),
        ("bypass", BLOCKS, "aot_eager"),
        ("merge", BLOCKS, "eager"),
    ],
    ids=["auto", "whole", "blocks", "aot", "merge"],
)
def test_a_lora_acts_before_and_behind(flux, mode, keys, backend):
    lora, base = families.random_lora(flux, seed=5), families.sample(flux, flux.model)
    expected = families.sample(flux, apply_lora(flux.model, lora, 0.7, "merge")[0])
    compiled = compiled_while_sampling(flux.model, keys, backend)
    close(families.sample(flux, compiled), base)
    close(families.sample(flux, apply_lora(compiled, lora, 0.7, mode)[0]), expected)
    before, _ = apply_lora(flux.model, lora, 0.7, mode)
    close(families.sample(flux, compiled_while_sampling(before, keys, backend)), expected)
    close(families.sample(flux, compiled), base)
    assert torch.equal(families.sample(flux, flux.model), base)


def test_behind_the_hosts_own_node_the_lora_is_merged_and_before_it_one_line_says_what_it_costs(flux, caplog):
    lora = families.random_lora(flux, seed=5)
    (node,) = TorchCompileModel.execute(flux.model, "inductor").args
    assert not applied_loras(apply_lora(node, lora)[0])
    before = compiled_while_sampling(apply_lora(flux.model, lora)[0], WHOLE)
    families.sample(flux, before)
    families.sample(flux, before)
    assert sum("is compiled" in record.message for record in caplog.records) == 1


def test_auto_goes_beside_a_compiled_model_where_merging_cannot_do_it(flux):
    compiled = compiled_while_sampling(flux.model, BLOCKS)
    lora = families.random_lora(flux, seed=5, batch=2)
    for asked in ({"end": 0.5}, {}):
        assert applied_loras(apply_lora(compiled, lora if not asked else lora.select(0), **asked)[0])


@pytest.mark.parametrize("keys", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_graphs_last(flux, keys):
    """No other LoRA, strength, rank or number of LoRAs makes a new graph: there is a limit, and past it all is eager."""
    made = []

    def counting(graph, _inputs):
        made.append(graph)
        return graph.forward

    compiled = compiled_while_sampling(flux.model, keys, counting)
    families.sample(flux, compiled)
    first, _ = apply_lora(compiled, families.random_lora(flux, seed=5), 0.7, "bypass")
    families.sample(flux, first)
    count = len(made)
    both = first
    for seed in range(6, 10):
        lora = families.random_lora(flux, seed=seed, rank=2 * seed)
        other, _ = apply_lora(compiled, lora, 0.1 * seed, "bypass")
        both, _ = apply_lora(both, lora, 0.1, "bypass")
        for model in (other, both):
            families.sample(flux, model)
    assert count and len(made) == count


def test_names_are_a_checkpoints_while_compiled_blocks_are_in_place(flux):
    base = flux.model.model
    stacks, targets = (
        structure.find_stacks(base),
        structure.choose_targets(structure.choose_stack(base), structure.ATTENTION_AND_FEED_FORWARD),
    )
    families.sample(flux, compiled_in_place(flux.model))
    assert any("_orig_mod" in name for name, _ in base.named_modules()), "or nothing was tested"
    assert structure.find_stacks(base) == stacks
    assert structure.choose_targets(structure.choose_stack(base), structure.ATTENTION_AND_FEED_FORWARD) == targets
    path = "double_blocks.1.img_attn.qkv"
    assert structure.submodule(base.diffusion_model, path).out_features == 96
    assert path in structure.layers(base.diffusion_model)


@pytest.mark.parametrize("mode", ["auto", "bypass"])
def test_a_lora_acts_beside_compiled_blocks_in_place(flux, mode):
    lora, base = families.random_lora(flux, seed=5), families.sample(flux, flux.model)
    expected = families.sample(flux, apply_lora(flux.model, lora, 0.7, "merge")[0])
    compiled = compiled_in_place(flux.model)
    for _ in range(2):  # the second time the blocks are in place when names are looked up
        patched, report = apply_lora(compiled, lora, 0.7, mode)
        assert str(report) == "matched 8/8 targets"
        close(families.sample(flux, patched), expected)
    close(families.sample(flux, compiled), base)
    assert torch.equal(families.sample(flux, flux.model), base)


def test_merging_into_compiled_blocks_in_place_is_refused(flux):
    """The host puts them there before it loads weights, and then looks for patches under names that are no longer there."""
    with pytest.raises(MatchError, match=r"compiled block in the place of diffusion_model.double_blocks.0.*bypass"):
        apply_lora(compiled_in_place(flux.model), families.random_lora(flux, seed=5), 0.7, "merge")


def test_merging_into_the_model_beside_one_with_compiled_blocks(flux):
    """Both share a module tree; the other's blocks are in it when the names are looked up."""
    lora = families.random_lora(flux, seed=5)
    expected = families.sample(flux, apply_lora(flux.model, lora, 0.7, "merge")[0])
    families.sample(flux, compiled_in_place(flux.model))
    close(families.sample(flux, apply_lora(flux.model, lora, 0.7, "merge")[0]), expected)


def test_hidden_states_of_a_compiled_model():
    flux = families.flux(channels=16)
    ((tokens, options),) = flux.conditioning
    entry = [[tokens, options | {"reference_latents": [torch.randn(flux.latent.shape)]}]]
    expected = hidden_states(flux.model, entry)
    close(hidden_states(compiled_while_sampling(flux.model, BLOCKS), entry), expected)
    close(hidden_states(compiled_in_place(flux.model), entry), expected)


def test_a_layer_that_the_model_does_not_call_is_named(flux, caplog):
    """Some bases compute a layer from its weight; others replace a block."""
    lora = families.random_lora(flux, seed=5)
    patched, _ = apply_lora(flux.model, lora, 0.7, "bypass")
    block = {("double_block", 0): lambda args, options: {"img": args["img"], "txt": args["txt"]}}
    patched.model_options["transformer_options"]["patches_replace"] = {"dit": block}
    families.sample(flux, patched)
    families.sample(flux, patched)
    told = [record.message for record in caplog.records if "did not call" in record.message]
    assert len(told) == 1 and "double_blocks.0.img_attn.qkv and 3 more layers" in told[0]


def test_a_host_that_replays_blocks_is_asked_not_to(flux, monkeypatch):
    """Hosts newer than the verified one have this switch; the layers would not be called again otherwise."""
    monkeypatch.setattr(comfy.cli_args.args, "disable_cuda_graphs", False, raising=False)
    patched, _ = apply_lora(flux.model, families.random_lora(flux, seed=5), 0.7, "bypass")
    seen = []
    layer = flux.model.model.diffusion_model.double_blocks[0]
    hook = layer.register_forward_pre_hook(lambda *_: seen.append(comfy.cli_args.args.disable_cuda_graphs))
    families.sample(flux, flux.model, steps=1)
    families.sample(flux, patched, steps=1)
    hook.remove()
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2) and seen
    assert comfy.cli_args.args.disable_cuda_graphs is False
