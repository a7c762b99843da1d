"""LoRAs on mixtures of experts, against the reference's numbers: a two-layer toy with its base, its LoRA and its outputs."""

import comfy.model_management
import pytest
import torch
import toy_mixture
from safetensors.torch import load_file
from toy_mixture import LAYERS, stacked

from hywu_core import InstanceLora, LoraFactor
from hywu_core.files.lora_files import METADATA_KEY, from_state_dict, to_peft_state_dict, to_state_dict
from hywu_core.host import cards
from hywu_core.host.lora import foreign, lora_cards
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.lora.bank import delta_of
from hywu_core.host.lora.experts import Rows


@pytest.fixture
def golden(fixtures_dir):
    with torch.inference_mode():
        yield load_file(fixtures_dir / "lora_apply.safetensors")


@pytest.fixture
def toy(golden):
    return toy_mixture.base_of(golden)


@pytest.fixture
def lora(golden):
    return toy_mixture.lora_of(golden)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["x1", "x2"])  # batch 1, and batch 2 with one LoRA: the two rows of guidance
@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_the_reference_numbers(toy, lora, golden, case, mode):
    x, run = golden[f"{case}.in"], toy.model.run
    close(run(toy, x), golden[f"{case}.out_base"])
    patched, report = apply_lora(toy, lora, 1.0, mode)
    assert str(report) == "matched 14/14 targets"
    close(run(patched, x), golden[f"{case}.out_lora"])
    assert (golden[f"{case}.out_lora"] - golden[f"{case}.out_base"]).abs().max() > 0.5
    close(run(toy, x), golden[f"{case}.out_base"])


@pytest.mark.parametrize("case", ["x1", "x2"])
@pytest.mark.parametrize("mode", ["base", "bypass", "merge"])
def test_every_module_gives_the_reference_numbers(toy, lora, golden, case, mode):
    """Linear layers, the shared expert and the routed experts one by one, so that no error hides behind another."""
    patched = toy if mode == "base" else apply_lora(toy, lora, 1.0, mode)[0]
    prefix, found = f"{case}.{'base' if mode == 'base' else 'lora'}_io.", {}
    for key in (name for name in golden if name.startswith(prefix) and name.endswith(".out")):
        module = toy.model.diffusion_model.get_submodule(key.removeprefix(prefix).removesuffix(".out"))
        module.register_forward_hook(lambda module, inputs, output, key=key: found.update({key: output}))
    toy.model.run(patched, golden[f"{case}.in"])
    assert len(found) == 14
    for key, output in found.items():
        close(output, golden[key])


def test_the_router_chooses_as_the_reference(toy, golden):
    for index in range(LAYERS):
        gate = toy.model.diffusion_model.model.layers[index].mlp.gate
        weights, chosen = gate(golden["x1.in"])
        assert torch.equal(chosen[0], golden[f"gate{index}.topk_idx"])
        torch.testing.assert_close(weights[0], golden[f"gate{index}.topk_weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_experts_are_the_references_when_every_layer_is_offloaded(toy, lora, golden, mode, monkeypatch):
    """The host as with --novram: banks and adapters are brought to the device for each forward."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    patched, _ = apply_lora(toy, lora, 1.0, mode)
    close(toy.model.run(patched, golden["x2.in"]), golden["x2.out_lora"])
    assert not any(model.model_loaded_memory() for model in comfy.model_management.current_loaded_models)
    close(toy.model.run(toy, golden["x2.in"]), golden["x2.out_base"])


def test_merged_weights_are_the_references(toy, lora, golden):
    patched, _ = apply_lora(toy, lora, 1.0, "merge")
    before = {name: tensor.clone() for name, tensor in toy.model.state_dict().items()}
    comfy.model_management.load_models_gpu([patched])
    state = patched.model.state_dict()
    for name, tensor in golden.items():
        if name.startswith("merged.") and ".experts." not in name:
            close(state[f"diffusion_model.{name.removeprefix('merged.')}"], tensor)
    for layer in range(LAYERS):
        for part in ("gate_and_up_proj", "down_proj"):
            bank = f"model.layers.{layer}.mlp.experts"
            close(state[f"diffusion_model.{bank}.{part}.weight"], stacked(golden, "merged", bank, part))
    comfy.model_management.load_models_gpu([toy])
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.model.state_dict().items())


def test_batched_factors_are_the_references(golden):
    down, up = golden["bmm.A"], golden["bmm.B"]
    for rows in ("2", "3"):
        found = delta_of(golden[f"bmm.h{rows}"], down, up)
        torch.testing.assert_close(found, golden[f"bmm.out{rows}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_strengths_of_stacked_loras_add_up(toy, lora, golden, mode):
    x, run = golden["x2.in"], toy.model.run
    whole, _ = apply_lora(toy, lora, 1.0, "bypass")
    part, _ = apply_lora(toy, lora, 1.5, mode)
    stacked_twice, _ = apply_lora(part, lora, -0.5, "bypass")
    close(run(stacked_twice, x), run(whole, x))


def test_every_sample_has_its_own_experts(toy, lora, golden):
    """Rows are sorted by expert, so a sample's rows lie scattered; each must find its own factors."""
    other = lora.scaled(-0.7)
    factors = {
        name: LoraFactor(*(torch.cat(pair) for pair in zip(pair, (pair.down, pair.up * -0.7), strict=True)))
        for name, pair in lora.factors.items()
    }
    both, _ = apply_lora(toy, InstanceLora(factors, lora.scale), 1.0, "bypass")
    found = toy.model.run(both, golden["x2.in"])
    for index, single in enumerate((lora, other)):
        alone, _ = apply_lora(toy, single, 1.0, "bypass")
        close(found[index : index + 1], toy.model.run(alone, golden["x2.in"][index : index + 1]))


@pytest.mark.parametrize("dialect", [to_state_dict, to_peft_state_dict])
@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_files_carry_experts(toy, lora, golden, dialect, mode):
    for back in (from_state_dict(dialect(lora)), foreign.read(dialect(lora), {METADATA_KEY: "{}"})):
        patched, _ = apply_lora(toy, back, 1.0, mode)
        close(toy.model.run(patched, golden["x1.in"]), golden["x1.out_lora"])


def test_experts_of_another_number_are_refused(toy, lora):
    name = "model.layers.0.mlp.experts.w1"
    pair = lora.factors[name]
    with pytest.raises(Exception, match=r"experts.w1.*\(3, 20, 32\).*4 experts"):
        apply_lora(toy, InstanceLora({name: LoraFactor(pair.down[:, :3], pair.up[:, :3])}), 1.0)


@pytest.mark.parametrize("mode", ["base", "bypass"])
def test_experts_that_are_brought_one_by_one_give_the_same(toy, lora, golden, mode, monkeypatch):
    """As for a token of text whose bank is on another device: only the experts that it needs come."""
    patched = toy if mode == "base" else apply_lora(toy, lora, 1.0, mode)[0]
    token = golden["x1.in"][:, :1]
    whole, brought = toy.model.run(patched, token), []
    monkeypatch.setattr(Rows, "_is_elsewhere", lambda bank, x: True)
    alone = Rows._expert_alone
    monkeypatch.setattr(Rows, "_expert_alone", lambda bank, x, e: brought.append(e) or alone(bank, x, e))
    close(toy.model.run(patched, token), whole)
    assert len(brought) == 2 * 2 * LAYERS  # two experts, two banks


def test_a_merge_into_banks_that_do_not_stay_is_cautioned_against(toy, lora, monkeypatch):
    """There the host writes the LoRA into a bank again whenever it fetches it."""
    assert apply_lora(toy, lora, 1.0, "merge")[1].caution is None
    monkeypatch.setattr(comfy.model_management, "maximum_vram_for_weights", lambda device: 0)
    patched, matches = apply_lora(toy, lora, 1.0, "merge")
    assert "The mode bypass gives the same picture" in matches.caution
    card = lora_cards.applied(lora, matches, 1.0, "merge")
    assert card.level == cards.NOTICE and matches.caution in card.notes
    assert apply_lora(toy, lora, 1.0, "bypass")[1].caution is None
