"""A LoRA on real models of the host, through the host's own sampler: exact in both modes, and no trace on the base."""

import comfy.model_management
import comfy.sd
import comfy.utils
import families
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper

from hywu_core import InstanceLora, LoraError, LoraFactor, MatchError
from hywu_core.files.lora_files import from_state_dict, load_lora, save_lora, to_state_dict
from hywu_core.host.lora.apply import applied_loras, apply_lora
from hywu_core.lora import blend

pytestmark = pytest.mark.usefixtures("inference")

STOPS = [RuntimeError("broken layer"), comfy.model_management.InterruptProcessingException()]


@pytest.fixture(params=families.FAMILIES)
def family(request):
    with torch.inference_mode():
        return families.FAMILIES[request.param]()


@pytest.fixture
def flux():
    with torch.inference_mode():
        return families.flux()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the picture's standard deviation: latents of random weights are several times as large as 1."""
    unit = expected.std()
    torch.testing.assert_close(found / unit, expected / unit, atol=1e-5, rtol=0)


def untouched(model, before: dict[str, torch.Tensor]) -> bool:
    """Whether every tensor of the base is what it was, to the bit, and no forward is left wrapped."""
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    return same and not wrapped(model)


def wrapped(model) -> list:
    return [name for name, module in model.model.named_modules() if "forward" in vars(module)]


def with_dense_weights(family, lora: InstanceLora, strength: float) -> torch.Tensor:
    """What sampling gives when W + strength * scale * B . A is written into the weights by hand."""
    saved = families.weights(family.model)
    for name, pair in lora.factors.items():
        module, _, rows = name.partition("[")
        weight = family.model.model.diffusion_model.get_submodule(module).weight
        start, stop = (int(n) for n in rows.partition("/")[0].split(":")) if rows else (0, weight.shape[0])
        weight[start:stop] += strength * lora.scale * (pair.up[0] @ pair.down[0])
    result = families.sample(family, family.model)
    for name, tensor in family.model.model.state_dict().items():
        tensor.copy_(saved[name])
    return result


@pytest.mark.parametrize("strength", [0.7, -1.3])
def test_bypass_merge_and_dense_weights_agree(family, strength):
    lora = families.random_lora(family, seed=5)
    base = families.sample(family, family.model)
    bypassed, report = apply_lora(family.model, lora, strength, "bypass")
    merged, _ = apply_lora(family.model, lora, strength, "merge")
    dense = with_dense_weights(family, lora, strength)
    assert len(report.matched) == report.total == len(lora.names)
    close(families.sample(family, bypassed), dense)
    close(families.sample(family, merged), dense)
    assert (dense - base).norm() > 0.05 * base.norm(), "the LoRA must change the picture, or nothing was tested"


def test_base_is_left_bit_identical(family):
    before, picture = families.weights(family.model), families.sample(family, family.model)
    for mode in ("bypass", "merge"):
        patched, _ = apply_lora(family.model, families.random_lora(family, seed=5), 1.0, mode)
        for put_back in (comfy.model_management.unload_all_models, lambda: families.sample(family, family.model)):
            families.sample(family, patched)
            put_back()
            assert untouched(family.model, before)
        assert torch.equal(families.sample(family, family.model), picture)


def test_a_b_a_gives_identical_pictures(flux):
    a, _ = apply_lora(flux.model, families.random_lora(flux, seed=5))
    b, _ = apply_lora(flux.model, families.random_lora(flux, seed=6))
    first = families.sample(flux, a)
    other = families.sample(flux, b)
    assert torch.equal(families.sample(flux, a), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("modes", [("bypass", "bypass"), ("bypass", "merge"), ("merge", "bypass"), ("merge", "merge")])
def test_stacked_loras_add_up_in_any_order(flux, modes):
    one, two = families.random_lora(flux, seed=5), families.random_lora(flux, seed=6)
    both, _ = apply_lora(flux.model, blend([one, two], [0.5, -0.8]), 1.0)
    expected = families.sample(flux, both)
    for order in (((one, 0.5), (two, -0.8)), ((two, -0.8), (one, 0.5))):
        stacked = flux.model
        for (lora, strength), mode in zip(order, modes, strict=True):
            stacked, _ = apply_lora(stacked, lora, strength, mode)
        close(families.sample(flux, stacked), expected)


def test_opposite_strengths_cancel_and_zero_is_the_base(flux):
    lora, base = families.random_lora(flux, seed=5), families.sample(flux, flux.model)
    plus, _ = apply_lora(flux.model, lora, 0.9)
    none, _ = apply_lora(plus, lora, -0.9)
    close(families.sample(flux, none), base)
    zero, _ = apply_lora(flux.model, lora, 0.0)
    assert torch.equal(families.sample(flux, zero), base)


def test_branches_do_not_see_each_other(flux):
    """Two nodes behind one MODEL, and nodes behind these: each has what it was given, the MODEL before it stays as it is."""
    one, two = families.random_lora(flux, seed=5), families.random_lora(flux, seed=6)
    first, _ = apply_lora(flux.model, one)
    expected = families.sample(flux, first)
    both, _ = apply_lora(first, two)
    sibling, _ = apply_lora(flux.model, two, mode="merge")
    assert [len(applied_loras(model)) for model in (flux.model, first, both, sibling)] == [0, 1, 2, 0]
    pictures = [families.sample(flux, model) for model in (both, sibling, first.clone(), first)]
    assert torch.equal(pictures[2], expected) and torch.equal(pictures[3], expected)
    assert not torch.equal(pictures[0], expected) and not torch.equal(pictures[0], pictures[1])
    assert not flux.model.patches and not flux.model.wrappers and not flux.model.get_additional_models()


def test_every_picture_of_a_batch_has_its_own_lora(family):
    lora = families.random_lora(family, seed=5, batch=2)
    patched, _ = apply_lora(family.model, lora)
    pictures = families.sample(family, patched, batch=2)
    for index in range(2):
        alone, _ = apply_lora(family.model, lora.select(index))
        close(pictures[index], families.sample(family, alone, batch=2)[index])
    assert (pictures[0] - pictures[1]).norm() > 0.05


def test_batch_errors_say_what_to_do(flux):
    lora = families.random_lora(flux, seed=5, batch=3)
    patched, _ = apply_lora(flux.model, lora)
    with pytest.raises(MatchError, match="latent batch of 3"):
        families.sample(flux, patched, batch=2)
    assert not wrapped(flux.model)
    with pytest.raises(MatchError, match="3 instances. Use the mode bypass"):
        apply_lora(flux.model, lora, mode="merge")
    with pytest.raises(MatchError, match="mode bypass for start, end and curve"):
        apply_lora(flux.model, lora.select(0), mode="merge", end=0.5)
    with pytest.raises(MatchError, match="start at 0.8 of the sampling and end at 0.2, so it would never act"):
        apply_lora(flux.model, lora.select(0), start=0.8, end=0.2)


def test_schedule_limits_when_it_acts(flux):
    lora, base = families.random_lora(flux, seed=5), families.sample(flux, flux.model, steps=4)
    whole, _ = apply_lora(flux.model, lora)
    early, _ = apply_lora(flux.model, lora, end=0.4)
    late, _ = apply_lora(flux.model, lora, start=0.4)
    never, _ = apply_lora(flux.model, lora, start=0.4, end=0.41)
    pictures = [families.sample(flux, model, steps=4) for model in (whole, early, late)]
    assert torch.equal(families.sample(flux, never, steps=4), base)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (pictures[one] - pictures[other]).norm() > 1e-3
    assert all((picture - base).norm() > 1e-3 for picture in pictures)


@pytest.mark.parametrize("mode", ["bypass", "merge"])
@pytest.mark.parametrize("stop", STOPS, ids=["error", "interrupt"])
def test_base_survives_errors_and_interrupts_inside_the_model(flux, stop, mode):
    before, picture = families.weights(flux.model), families.sample(flux, flux.model)
    patched, _ = apply_lora(flux.model, families.random_lora(flux, seed=5), mode=mode)
    good = families.sample(flux, patched)
    last = flux.model.model.diffusion_model.final_layer.linear

    def raise_stop(*args):
        raise stop

    hook = last.register_forward_pre_hook(raise_stop)
    with pytest.raises(type(stop)):
        families.sample(flux, patched)
    hook.remove()
    assert not wrapped(flux.model)
    assert torch.equal(families.sample(flux, flux.model), picture)
    assert untouched(flux.model, before)
    assert torch.equal(families.sample(flux, patched), good)


def test_an_error_while_wrapping_unwraps_everything(flux, monkeypatch):
    before = families.weights(flux.model)
    patched, _ = apply_lora(flux.model, families.random_lora(flux, seed=5))
    adapters = applied_loras(patched)[0].bank.adapters
    monkeypatch.setattr(adapters[-1], "path", "no.such.layer")  # the others are wrapped by then
    with pytest.raises(AttributeError):
        families.sample(flux, patched)
    assert untouched(flux.model, before)


def test_dropping_a_patched_model_leaves_nothing(flux):
    picture = families.sample(flux, flux.model)
    patched, _ = apply_lora(flux.model, families.random_lora(flux, seed=5))
    families.sample(flux, patched)
    del patched
    assert not wrapped(flux.model)
    assert torch.equal(families.sample(flux, flux.model), picture)


def test_stock_loader_gives_the_same_bits_as_merge(family, tmp_path):
    """Slices of fused weights, which a file holds as one pair, included."""
    lora = families.random_lora(family, seed=5)
    merged, _ = apply_lora(family.model, lora, 0.8, "merge")
    file = save_lora(lora, tmp_path / "lora.safetensors")
    stock = comfy.sd.load_lora_for_models(family.model, None, comfy.utils.load_torch_file(str(file)), 0.8, 0)[0]
    assert torch.equal(families.sample(family, stock), families.sample(family, merged))
    assert not torch.equal(families.sample(family, stock), families.sample(family, family.model))


def test_saved_file_comes_back_exactly(flux, tmp_path):
    lora = families.random_lora(flux, seed=5).with_metadata(instruction="make it blue", base="Flux")
    back = load_lora(save_lora(lora, tmp_path / "lora.safetensors"))
    assert set(back.names) == set(lora.names) and back.scale == lora.scale
    assert back.metadata["instruction"] == "make it blue"
    assert all(torch.equal(back.factors[n].up, p.up) for n, p in lora.factors.items())


def test_lora_model_of_the_host_shares_storage(flux):
    lora = families.random_lora(flux, seed=5)
    state = to_state_dict(lora)
    assert state[f"diffusion_model.{lora.names[0]}.lora_up.weight"].data_ptr() == lora.pairs[0].up.data_ptr()
    one, _ = apply_lora(flux.model, lora)
    two, _ = apply_lora(flux.model, from_state_dict(state))
    assert torch.equal(families.sample(flux, one), families.sample(flux, two))


def test_names_of_other_tools_are_resolved(flux):
    """Diffusers has to_q, to_k and to_v where this base has one fused qkv; the host's table tells."""
    source = torch.Generator().manual_seed(4)
    state, dense = {}, torch.zeros(96, 32)
    for row, part in enumerate(("to_q", "to_k", "to_v")):
        down, up = torch.randn(4, 32, generator=source) * 0.2, torch.randn(32, 4, generator=source) * 0.2
        state[f"transformer.transformer_blocks.1.attn.{part}.lora_A.weight"] = down
        state[f"transformer.transformer_blocks.1.attn.{part}.lora_B.weight"] = up
        dense[32 * row : 32 * row + 32] = up @ down
    patched, report = apply_lora(flux.model, from_state_dict(state), mode="bypass")
    assert str(report) == "matched 3/3 targets"
    whole = InstanceLora({"double_blocks.1.img_attn.qkv": LoraFactor(torch.eye(32)[None], dense[:, :][None])})
    expected, _ = apply_lora(flux.model, whole, mode="merge")
    close(families.sample(flux, patched), families.sample(flux, expected))


def test_names_of_trainers_are_resolved(flux):
    """Names with underscores only, as the widespread trainers write them, and a text encoder's part beside them."""
    lora, state = families.random_lora(flux, seed=5), {}
    for name, pair in lora.factors.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": pair.down[0], f"{key}.lora_up.weight": pair.up[0]}
        state[f"{key}.alpha"] = torch.tensor(lora.scale * pair.rank)
    text = {f"lora_te1_layer.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
    patched, report = apply_lora(flux.model, from_state_dict(state | text), 0.8, "merge")
    assert str(report) == "matched 8/8 targets; 1 of a text encoder, which is not part of a MODEL, left out"
    stock, _ = comfy.sd.load_lora_for_models(flux.model, None, state, 0.8, 0)
    close(families.sample(flux, patched), families.sample(flux, stock))


@pytest.mark.parametrize("mode", ["bypass", "merge"])
@pytest.mark.parametrize("first", ["stock", "ours"])
def test_the_hosts_own_bypass_on_the_same_model_adds_up(flux, first, mode):
    """The host's bypass wraps forwards for as long as a model is loaded; ours nests inside, for one call."""
    one, two = families.random_lora(flux, seed=5), families.random_lora(flux, seed=6)
    expected, _ = apply_lora(flux.model, blend([one, two], [0.5, 0.7]), 1.0, "merge")
    before, base = families.weights(flux.model), families.sample(flux, flux.model)
    alone, _ = apply_lora(flux.model, two, 0.7, mode)
    if first == "stock":
        stock, _ = comfy.sd.load_bypass_lora_for_models(flux.model, None, to_state_dict(one), 0.5, 0)
        both, _ = apply_lora(stock, two, 0.7, mode)
    else:
        both, _ = comfy.sd.load_bypass_lora_for_models(alone, None, to_state_dict(one), 0.5, 0)
    picture = families.sample(flux, both)
    close(picture, families.sample(flux, expected))
    families.sample(flux, alone)
    assert torch.equal(families.sample(flux, both), picture)
    assert torch.equal(families.sample(flux, flux.model), base)
    assert all(torch.equal(t, before[n]) for n, t in flux.model.model.state_dict().items())


@pytest.mark.parametrize("mode", ["auto", "bypass", "merge"])
def test_compiled_models_keep_the_lora_in_any_order(flux, mode):
    """A compiled graph may not go on without the adapters. auto merges what is compiled: adapters cost a new graph."""
    lora, base = families.random_lora(flux, seed=5), families.sample(flux, flux.model)
    expected = families.sample(flux, apply_lora(flux.model, lora, 0.7, "merge")[0])
    compiled = flux.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    close(families.sample(flux, compiled), base)  # the graph exists before the LoRA does
    behind, _ = apply_lora(compiled, lora, 0.7, mode)
    close(families.sample(flux, behind), expected)
    assert len(applied_loras(behind)) == (mode == "bypass")
    before, _ = apply_lora(flux.model, lora, 0.7, mode)
    set_torch_compile_wrapper(before, backend="eager")
    close(families.sample(flux, before), expected)
    close(families.sample(flux, compiled), base)


def test_factors_are_under_the_hosts_memory_management(flux):
    lora = families.random_lora(flux, seed=5)
    patched, _ = apply_lora(flux.model, lora)
    patched, _ = apply_lora(patched, families.random_lora(flux, seed=6))
    families.sample(flux, patched)
    banks = [model.model for model in patched.get_additional_models()]
    assert [id(bank) for bank in banks] == [id(applied.bank) for applied in applied_loras(patched)]
    sizes = [loaded.model_size() for loaded in comfy.model_management.loaded_models() if loaded.model in banks]
    assert sizes == [lora.elements * 4] * 2


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_nothing_changes_when_every_layer_is_offloaded(family, mode, monkeypatch):
    """The host as with --novram: no layer of base and bank stays on the device, each is brought there for its forward."""
    lora = families.random_lora(family, seed=5)
    patched, _ = apply_lora(family.model, lora, 0.7, mode)
    base, expected = families.sample(family, family.model), families.sample(family, patched)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    found = families.sample(family, patched)
    loaded = comfy.model_management.current_loaded_models
    assert len(loaded) == (2 if mode == "bypass" else 1) and not any(model.model_loaded_memory() for model in loaded)
    close(found, expected)
    close(families.sample(family, family.model), base)


def test_partially_loaded_model_merges_the_same(flux):
    """Under low memory the host recomputes W + dW on every forward of an offloaded layer."""
    lora = families.random_lora(flux, seed=5)
    merged, _ = apply_lora(flux.model, lora, 0.7, "merge")
    expected = families.sample(flux, merged)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    kwargs = {"c_crossattn": flux.conditioning[0][0], "y": flux.conditioning[0][1]["pooled_output"]}
    whole = merged.model.apply_model(x, t, **kwargs)
    merged.detach()
    merged.patch_model(merged.load_device, lowvram_model_memory=1)
    assert merged.lowvram_patch_counter() > 0
    close(merged.model.apply_model(x, t, **kwargs), whole)
    merged.detach()
    assert torch.equal(families.sample(flux, merged), expected)


def test_quantised_base_keeps_the_lora_in_bypass(flux):
    """Merged into 8 bits a small dW is mostly lost; beside the forward it is exact."""
    for layer in block_layers(flux.model):
        layer.weight.copy_(layer.weight.to(torch.float8_e4m3fn).float())
    lora = families.random_lora(flux, seed=5, size=0.003)
    exact = families.sample(flux, apply_lora(flux.model, lora, 1.0, "merge")[0])
    base = families.sample(flux, flux.model)
    exact -= base
    for layer in block_layers(flux.model):  # as the host keeps an fp8 checkpoint: cast to the input's type on use
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        layer.comfy_cast_weights = True
    base8 = families.sample(flux, flux.model)
    close(base8, base)
    errors = {
        mode: float((families.sample(flux, apply_lora(flux.model, lora, 1.0, mode)[0]) - base8 - exact).norm())
        for mode in ("bypass", "merge")
    }
    assert errors["bypass"] < 1e-3 * exact.norm() and errors["merge"] > 0.1 * exact.norm()


def block_layers(model) -> list[torch.nn.Linear]:
    blocks = model.model.diffusion_model.double_blocks
    return [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]


def test_another_base_is_refused_by_name(flux):
    lora = families.random_lora(flux, seed=5).with_metadata(base="Flux")
    with pytest.raises(MatchError, match=r"None of the LoRA's 8 targets.*WAN21.*generated for Flux"):
        apply_lora(families.wan().model, lora)


def test_another_shape_is_refused_with_both_shapes(flux):
    name = "double_blocks.0.img_attn.proj"
    lora = InstanceLora({name: LoraFactor(torch.zeros(1, 4, 48), torch.zeros(1, 32, 4))})
    with pytest.raises(MatchError, match=r"double_blocks.0.img_attn.proj.*\(32, 48\).*\(32, 32\)"):
        apply_lora(flux.model, lora)


def test_partial_matches_are_reported_once(flux, caplog):
    lora = families.random_lora(flux, seed=5)
    extended = InstanceLora({**lora.factors, "double_blocks.7.img_attn.proj": lora.pairs[0]}, lora.scale)
    with caplog.at_level("INFO"):
        patched, report = apply_lora(flux.model, extended)
    assert str(report) == "matched 8/9 targets; not in this model: double_blocks.7.img_attn.proj"
    families.sample(flux, patched)
    assert sum("matched 8/9" in record.message for record in caplog.records) == 1


def test_foreign_kinds_of_lora_are_named(flux):
    state = to_state_dict(families.random_lora(flux, seed=5))
    with pytest.raises(LoraError, match="dora_scale"):
        from_state_dict({**state, "diffusion_model.double_blocks.0.img_mlp.0.dora_scale": torch.ones(1)})
    with pytest.raises(LoraError, match="no LoRA weights"):
        from_state_dict({})
