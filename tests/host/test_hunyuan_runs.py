"""Runs of HunyuanImage-3 in which something else changes weights or layers: hooks, wrappers, LoRAs of several samples."""

from types import SimpleNamespace

import comfy.hooks
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import hunyuan_tiny as tiny
import pytest
import torch

from hywu_core import InstanceLora, LoraFactor, load_generator
from hywu_core.bases.hunyuan_image3 import base_model, moe, prefix_cache, transformer
from hywu_core.bases.hunyuan_image3.edit import to_conditioning
from hywu_core.bases.hunyuan_image3.loader import load
from hywu_core.bases.hunyuan_image3.text_mode import read_edit
from hywu_core.condition import assemble
from hywu_core.files.lora_files import to_state_dict
from hywu_core.host.lora.apply import apply_lora

pytestmark = pytest.mark.usefixtures("inference")

SIGMAS = tiny.golden("base")["step0.sigma"]
SAME = 5e-6  # relative L2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with torch.inference_mode():
        model, _, encoder = load(tiny.make_folder(tmp_path_factory.mktemp("hunyuan") / "base"), torch.float32)
        edit = tiny.golden_edit(encoder)
        generator = load_generator(tiny.FIXTURES / "pg_tiny")
        lora = generator.generate(assemble(read_edit(model, edit).condition, generator.config))
    return SimpleNamespace(model=model, edit=edit, lora=lora)


def hook_of(lora, *keyframes):
    """What the host's nodes Create Hook LoRA and Create Hook Keyframe make; attention only, which its loader reads."""
    state = {name: tensor for name, tensor in to_state_dict(lora).items() if ".self_attn." in name}
    state = {name: tensor[0] if tensor.ndim == 3 else tensor for name, tensor in state.items()}
    hooks = comfy.hooks.create_hook_lora(state, 3.0, 0.0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for strength, start in keyframes:
            group.add(comfy.hooks.HookKeyframe(strength, start_percent=start))
        hooks.set_keyframes_on_hooks(group)
    return hooks


def noise_of(batch=1):
    return torch.randn((batch, 8, 1, 14, 18), generator=torch.Generator().manual_seed(0))


def sample(model, positive, negative, noise=None):
    noise = noise_of() if noise is None else noise
    zeros = torch.zeros_like(noise)
    euler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(model, noise, 2.5, euler, SIGMAS, positive, negative, zeros, disable_pbar=True)


def conditionings(edit, hooks):
    rows = to_conditioning(edit), to_conditioning(edit._replace(unconditional=True))
    return [comfy.hooks.set_hooks_for_conditioning(row, hooks) for row in rows]


def both(model, positive, negative):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "usable", lambda options: None)
        plain = sample(model, positive, negative)
        assert torch.equal(sample(model, positive, negative), plain)
    return sample(model, positive, negative), plain


def test_a_hook_of_constant_strength(base):
    found, plain = both(base.model, *conditionings(base.edit, hook_of(base.lora)))
    assert tiny.relative(found, sample(base.model, *conditionings(base.edit, None))) > 1e-3
    assert tiny.relative(found, plain) < SAME


def test_a_hook_with_keyframes(base):
    found, plain = both(base.model, *conditionings(base.edit, hook_of(base.lora, (0.0, 0.0), (1.0, 0.1))))
    assert tiny.relative(found, plain) < SAME


def test_a_hook_on_one_of_two_conditionings_of_the_same_edit(base):
    bare, hooked = conditionings(base.edit, None), conditionings(base.edit, hook_of(base.lora))
    found, plain = both(base.model, *([*one, *other] for one, other in zip(bare, hooked, strict=True)))
    assert tiny.relative(found, plain) < SAME


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_the_condition_does_not_see_hooks_of_a_run_before(base, mode):
    bare = read_edit(base.model, base.edit).condition.parts[0].tokens
    sample(apply_lora(base.model, base.lora, 1.0, mode)[0], *conditionings(base.edit, hook_of(base.lora)))
    assert torch.equal(read_edit(base.model, base.edit).condition.parts[0].tokens, bare)


def test_a_wrapper_around_the_layers_turns_the_cache_off(base):
    """It may do anything to the prefix, another thing at each step."""
    wrapped, seen = base.model.clone(), []
    wrapped.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
        "test",
        lambda executor, *args, **named: executor(*args, **named),
    )
    layer = base.model.model.diffusion_model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    try:
        found = sample(wrapped, *conditionings(base.edit, None))
    finally:
        handle.remove()
    assert len(seen) == 3 and len(set(seen)) == 1
    assert tiny.relative(found, sample(base.model, *conditionings(base.edit, None))) < SAME


def test_a_cache_keeps_two_prefixes_at_most():
    cache = prefix_cache.PrefixCache()
    keys = [prefix_cache.PrefixKey(index, (), ()) for index in range(3)]
    for key in keys:
        cache.keep(key, [])
    assert [cache.find(key) is not None for key in keys] == [False, True, True]


def test_every_sample_has_its_own_experts_chunk_by_chunk(base, monkeypatch):
    """Chunks of rows that are sorted by expert hold tokens of every sample; each must still find its own sample's LoRA."""
    pairs = {
        name: LoraFactor(torch.cat((pair.down, pair.down)), torch.cat((pair.up, pair.up * -0.5)))
        for name, pair in base.lora.factors.items()
    }
    model, noise = apply_lora(base.model, InstanceLora(pairs, base.lora.scale), 1.0, "bypass")[0], noise_of(2)
    whole = sample(model, *conditionings(base.edit, None), noise)
    monkeypatch.setattr(moe, "ROWS_AT_ONCE", 400)
    assert tiny.relative(sample(model, *conditionings(base.edit, None), noise), whole) < SAME
    for index, strength in enumerate((1.0, -0.5)):
        single = InstanceLora(
            {n: LoraFactor(p.down, p.up * strength) for n, p in base.lora.factors.items()}, base.lora.scale
        )
        alone = apply_lora(base.model, single, 1.0, "bypass")[0]
        found = sample(alone, *conditionings(base.edit, None), noise[index : index + 1])
        assert tiny.relative(whole[index : index + 1], found) < SAME


def test_the_hosts_own_bypass_lora_is_not_in_the_condition(base):
    state = {name: part for name, part in to_state_dict(base.lora).items() if ".self_attn." in name}
    model, _ = comfy.sd.load_bypass_lora_for_models(base.model, None, state, 3.0, 0.0)
    bare = read_edit(base.model, base.edit).condition.parts[0].tokens
    plain, changed = (sample(m, *conditionings(base.edit, None)) for m in (base.model, model))
    assert tiny.relative(changed, plain) > 0.01
    for wired in (model, base.model):  # whichever of them the host loaded last
        assert torch.equal(read_edit(wired, base.edit).condition.parts[0].tokens, bare)
    assert torch.equal(sample(model, *conditionings(base.edit, None)), changed)  # and it acts where it should, still
    assert torch.equal(sample(base.model, *conditionings(base.edit, None)), plain)


def test_memory_is_asked_for_the_whole_sequence_before_sampling_and_in_it(base, monkeypatch):
    """The prefix of a sequence is most of it, and the host asks before it has the sequence."""
    asked = []
    working = base_model.working_memory
    monkeypatch.setattr(base_model, "working_memory", lambda *sizes: asked.append(sizes[2:]) or working(*sizes))
    sample(base.model, *conditionings(base.edit, None))
    length = base.edit.sequence((14, 18)).layout.without_tail().length
    before, inside = asked[0], asked[-1]
    assert before == (2, length)
    assert inside[0] == 2 and length <= inside[1] <= length + 8  # what follows the image is counted, too
