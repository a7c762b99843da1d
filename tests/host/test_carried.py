"""What else a MODEL carries acts in training and evaluation as it does in sampling, or is refused by name."""

import comfy.model_management
import comfy.sd
import families
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from test_objective import Pairs, draws

from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.errors import MatchError
from hywu_core.files.lora_files import to_state_dict
from hywu_core.host import told
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.training.data import Draw
from hywu_core.training.trainable import leaves


@pytest.fixture(params=("flux_double", "qwen_image"))
def family(request):
    return families.FAMILIES[request.param]()


def measured(model, family, lora=None, stack=None):
    """(losses, gradients of the factors of a further LoRA) on a MODEL."""
    objective = DiffusionObjective(model, stack)
    objective.prepare()
    found = leaves(lora or families.random_lora(family, 8))
    losses = objective.backward(found, draws(family), 0.5)
    return losses, [factor.grad for pair in found.pairs for factor in pair]


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    for first, second in zip(one[1], other[1], strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stack", [None, "all"])
def test_a_bypass_lora_acts_in_training_as_a_merged_one(family, stack):
    lora = families.random_lora(family, 1, size=0.1)
    bypass, merged = (apply_lora(family.model, lora, 0.7, mode)[0] for mode in ("bypass", "merge"))
    found = measured(bypass, family, stack=stack)
    assert_same(found, measured(merged, family))
    assert float((found[0] - measured(family.model, family)[0]).abs().min()) > 1e-2
    assert not any("forward" in vars(module) for module in family.model.model.modules())


def test_evaluation_sees_it_too(family):
    lora = families.random_lora(family, 1, size=0.1)
    bypass, merged = (apply_lora(family.model, lora, mode=mode)[0] for mode in ("bypass", "merge"))
    found = []
    for model in (bypass, merged):
        objective = DiffusionObjective(model)
        objective.prepare()
        found.append(objective.evaluate(None, draws(family), 0.5))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_two_bypass_loras_made_in_inference_mode_as_nodes_make_them(family):
    with torch.inference_mode():
        first, second = (families.random_lora(family, seed, size=0.1) for seed in (1, 2))
        bypass = merged = family.model
        for lora in (first, second):
            bypass, merged = apply_lora(bypass, lora, mode="bypass")[0], apply_lora(merged, lora, mode="merge")[0]
    assert_same(measured(bypass, family), measured(merged, family))


def test_a_scheduled_lora_acts_at_its_noise_levels_only(family):
    lora = families.random_lora(family, 1, size=0.1)
    early, _ = apply_lora(family.model, lora, mode="bypass", start=0.0, end=0.5)
    whole, _ = apply_lora(family.model, lora, mode="bypass")
    objectives = [DiffusionObjective(model) for model in (early, whole, family.model)]
    for objective in objectives:
        objective.prepare()
    for percent, same in ((0.2, 1), (0.8, 2)):
        scheduled, *others = (objective.evaluate(None, draws(family), percent) for objective in objectives)
        torch.testing.assert_close(scheduled, others[same - 1], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(*others, rtol=1e-3)


def test_the_hosts_own_bypass_lora_acts(family):
    lora = families.random_lora(family, 1, size=0.1)
    stock, _ = comfy.sd.load_bypass_lora_for_models(family.model, None, to_state_dict(lora), 1.0, 0.0)
    assert stock.injections
    plain, _ = apply_lora(family.model, lora, mode="merge")
    whole = [name for name in family.targets if "[" not in name]
    if len(whole) == len(family.targets):
        assert_same(measured(stock, family), measured(plain, family))
    comfy.model_management.unload_all_models()


def test_on_a_copy_of_the_base_too():
    """Nodes run in inference mode, so that the base that they load must be loaded again for training."""
    with torch.inference_mode():
        model, _, _ = load_pocket_editor()
        source = torch.Generator().manual_seed(4)
        state = {}
        for block in range(4):
            name = f"diffusion_model.double_blocks.{block}.img_attn.proj"
            state[f"{name}.lora_down.weight"] = torch.randn(4, 128, generator=source) * 0.1
            state[f"{name}.lora_up.weight"] = torch.randn(128, 4, generator=source) * 0.1
        bypass, _ = comfy.sd.load_bypass_lora_for_models(model, None, state, 0.8, 0.0)
        merged, _ = comfy.sd.load_lora_for_models(model, None, state, 0.8, 0.0)
    found = []
    words = families.conditioning(64, 64)[0]
    for carrying in (bypass, merged, model):
        objective = DiffusionObjective(carrying)
        assert objective.patcher.model is not model.model
        objective.prepare()
        sample = Pairs(families.flux()).sample(0, None)._replace(latent=torch.ones(3, 16, 16), conditioning=words)
        found.append(objective.evaluate(None, [Draw(sample, torch.Generator().manual_seed(0))], 0.4))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[2], rtol=1e-3)


def test_wrappers_and_patches_of_others_act_one_sample_at_a_time():
    family, seen = families.flux(), []

    def wrapper(executor, x, *args, **kwargs):
        seen.append(len(x))
        return executor(x, *args, **kwargs) * 1.5

    wrapped = family.model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "others", wrapper)
    before, after = measured(family.model, family)[0], measured(wrapped, family)[0]
    assert seen == [1, 1] and not torch.allclose(before, after, rtol=1e-2)
    replaced = family.model.clone()
    noticed = []

    def block(arguments, extra):
        noticed.append(extra["original_block"])
        return extra["original_block"](arguments)

    replaced.set_model_patch_replace(block, "dit", "double_block", 0)
    torch.testing.assert_close(measured(replaced, family)[0], before, rtol=1e-5, atol=1e-5)
    assert len(noticed) == 2
    called = family.model.clone()
    called.set_model_unet_function_wrapper(
        lambda apply, given: 2 * apply(given["input"], given["timestep"], **given["c"])
    )
    assert not torch.allclose(measured(called, family)[0], before, rtol=1e-2)


def test_what_only_watches_a_sampling_costs_a_training_nothing(family):
    """Apply's look at what the base is told is a wrapper, too; with one of another pack, samples would pass one by one."""
    lora = families.random_lora(family, 1, size=0.1)
    patched, _ = apply_lora(family.model, lora, mode="bypass")
    expected = measured(patched, family)
    told.watch(patched, lora.with_metadata(condition_digest=[1.0] * 16, regime="blind"), None, None)
    assert patched.get_wrappers(WrappersMP.APPLY_MODEL, told.KEY)
    objective = DiffusionObjective(patched)
    assert not objective.carried.foreign and not objective.carried.one_by_one
    assert_same(measured(patched, family), expected)


def test_blocks_are_remembered_where_a_wrapper_may_change_them_for_the_call_only(caplog):
    family = families.flux()
    wrapped = family.model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "others", lambda executor, *a, **k: executor(*a, **k))
    assert DiffusionObjective(wrapped, "all").checkpoint_stack == ()
    assert "diffusion_model wrapper of others" in caplog.text
    assert DiffusionObjective(family.model, "all").checkpoint_stack == ("double_blocks", "single_blocks")


def test_what_acts_on_the_whole_sampling_is_refused_by_name():
    family = families.flux()
    wrapped = family.model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "a cache", lambda executor, *a, **k: executor(*a, **k))
    with pytest.raises(MatchError, match="a predict_noise wrapper of a cache"):
        DiffusionObjective(wrapped)
    calculating = family.model.clone()
    calculating.set_model_sampler_calc_cond_batch_function(lambda arguments: None)
    with pytest.raises(MatchError, match="sampler_calc_cond_batch_function"):
        DiffusionObjective(calculating)


def test_guidance_is_said_not_to_act(caplog):
    family = families.flux()
    guided = family.model.clone()
    guided.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"])
    torch.testing.assert_close(measured(guided, family)[0], measured(family.model, family)[0])
    assert "sampler_post_cfg_function" in caplog.text


def test_an_injection_that_is_bound_to_the_loaded_model_is_refused_on_a_copy():
    with torch.inference_mode():
        model, _, _ = load_pocket_editor()
    model.set_injections("others", [comfy.model_patcher.PatcherInjection(lambda patcher: None, lambda patcher: None)])
    with pytest.raises(MatchError, match="injection of 'others'"):
        DiffusionObjective(model)


def test_a_forward_of_somebody_else_outlives_recomputing():
    family = families.flux()
    block = family.model.model.diffusion_model.double_blocks[0]
    theirs = block.forward = block.forward
    measured(family.model, family, stack="double_blocks")
    assert vars(block)["forward"] is theirs
