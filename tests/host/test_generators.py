"""Generators under the host's memory management, and conditions from the host's types."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.model_prefetch
import comfy.ops
import comfy.pinned_memory
import comfy.utils
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_execution.caching
import families
import folder_paths
import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from hywu_core import (
    ConditionError,
    GenerationError,
    Generator,
    GeneratorConfig,
    load_generator,
    save_generator,
)
from hywu_core.chunked import Engine, generate_layers
from hywu_core.condition import CLIP_VISION, CONDITIONING, Condition, ConditionPart
from hywu_core.files.lora_files import to_state_dict
from hywu_core.host import conditions, engine, memory
from hywu_core.host.lora import apply
from hywu_core.plan import plan
from hywu_core.transformer import REAL, Rotation, Tables

pytestmark = pytest.mark.usefixtures("inference")


def as_condition(tokens: torch.Tensor) -> Condition:
    return Condition((ConditionPart(CONDITIONING, tokens),))


def test_the_host_path_gives_the_reference_numbers(gen_2, golden):
    handle = memory.load(gen_2)
    lora = memory.generate(handle, as_condition(golden["case1.condition"]))
    for name, pair in lora.factors.items():
        torch.testing.assert_close(pair.down, golden[f"case1.out.{name}.lora_A"], atol=2e-5, rtol=0)
        torch.testing.assert_close(pair.up, golden[f"case1.out.{name}.lora_B"], atol=2e-5, rtol=0)
    assert lora.metadata["generator_hash"] == handle.fingerprint


def test_weights_are_counted_and_loaded_only_on_use(gen_2, golden):
    handle = memory.load(gen_2)
    assert handle.patcher not in comfy.model_management.loaded_models()
    memory.generate(handle, as_condition(golden["case1.condition"]))
    assert handle.patcher in comfy.model_management.loaded_models()
    assert handle.patcher.model_size() == sum(p.numel() * 4 for p in handle.generator.parameters())


def test_the_host_is_told_how_much_room_the_run_needs(gen_2, golden, monkeypatch):
    asked, load = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required):
        asked.append(memory_required)
        load(models, memory_required=memory_required)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    handle, tokens = memory.load(gen_2), golden["case1.condition"]
    memory.generate(handle, as_condition(tokens))
    planned = plan(handle.config, 1, tokens.shape[1], torch.float32)
    assert asked == [planned.peak + planned.block]
    grid = handle.config.num_base_model_layers * handle.generator.model.hw_pos.weight.numel() * 4
    assert grid < asked[0] < 2**25


def test_nothing_changes_when_every_layer_is_offloaded(gen_2, golden, monkeypatch):
    """The host as with --novram: each layer of the generator is brought to the device for its forward."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    handle = memory.load(gen_2)
    lora = memory.generate(handle, as_condition(golden["case1.condition"]))
    assert comfy.model_management.current_loaded_models[0].model_loaded_memory() == 0
    for name, pair in lora.factors.items():
        torch.testing.assert_close(pair.up, golden[f"case1.out.{name}.lora_B"], atol=2e-5, rtol=0)


@pytest.fixture
def fetched(monkeypatch):
    """How often each layer's weight was brought to the device."""
    counted, cast = Counter(), comfy.ops.cast_bias_weight

    def cast_bias_weight(layer, *args, **kwargs):
        counted[layer] += 1
        return cast(layer, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)
    return counted


def test_each_weight_of_a_block_is_fetched_once(gen_2, golden, fetched, monkeypatch):
    """The host as with --novram, and so little room that every block works in many chunks."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    monkeypatch.setattr(engine, "chunk_bytes", lambda *asked: 5000)
    handle = memory.load(gen_2)
    lora = memory.generate(handle, as_condition(golden["case1.condition"]))
    layers = [m for m in handle.generator.model.blocks.modules() if hasattr(m, "comfy_cast_weights")]
    assert len(layers) == 18 * len(handle.generator.model.blocks)
    assert {fetched[layer] for layer in layers} == {1}
    for name, pair in lora.factors.items():
        torch.testing.assert_close(pair.up, golden[f"case1.out.{name}.lora_B"], atol=2e-5, rtol=0)


class Pages:
    """Dynamic VRAM as the host asks for it, with no room to stay resident: what its native library answers, in Python."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.pinned, self.transfers = Counter(), Counter()
        patch.setattr(comfy_aimdo.model_vbar, "vbar_fault", self.fault)
        patch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda page: self.pinned.subtract([page]))
        patch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda signature, other: False)
        patch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda page, device: torch.empty(page[1], device=device))
        patch.setattr(comfy.pinned_memory, "get_pin", lambda *args, **kwargs: None)
        patch.setattr(comfy.pinned_memory, "pin_memory", lambda *args, **kwargs: None)
        patch.setattr(comfy.model_management, "ensure_pin_registerable", lambda size: None)
        patch.setattr(comfy.model_management, "get_offload_stream", lambda device: None)
        patch.setattr(comfy.model_management, "cast_to_gathered", self.transfer)
        patch.setattr(comfy.model_management, "NUM_STREAMS", 2)
        patch.setattr(comfy.memory_management, "interpret_gathered_like", self.parts)

    def fault(self, page):
        self.pinned[page] += 1
        return page

    def transfer(self, tensors, destination, **kwargs):
        self.transfers.update(tensor.data_ptr() for tensor in tensors if tensor is not None)

    def parts(self, tensors, gathered):
        return [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors]


@pytest.mark.parametrize("cancelled", [False, True])
def test_dynamic_weights_are_prefetched_by_the_block_and_let_go(gen_2, monkeypatch, cancelled):
    pages = Pages(monkeypatch)
    generator = memory.load(gen_2).generator
    layers = [m for m in generator.model.blocks.modules() if hasattr(m, "comfy_cast_weights") and m.weight.ndim == 2]
    for number, layer in enumerate(layers):
        size = comfy.memory_management.vram_aligned_size([layer.weight, layer.bias])
        layer._v, layer._v_signature = (number, size), None
        layer.weight_lowvram_function = layer.bias_lowvram_function = None
    meta = torch.device("meta")
    patcher = SimpleNamespace(model=generator, load_device=meta, is_dynamic=lambda: True)
    generator_on_meta = Generator(generator.config, device=meta)
    generator_on_meta.model.blocks = generator.model.blocks
    tables = Tables(generator.config, meta, REAL)

    def run():
        with engine.engine(patcher, generator.config, torch.float32) as brought:
            brought = brought._replace(rotation=REAL)
            context = torch.empty(1, 5, generator.config.d_model, device=meta)
            for number, _ in enumerate(
                generate_layers(generator_on_meta.model, [context], tables, 5000, engine=brought)
            ):
                if cancelled:
                    raise InterruptedError(number)

    for _ in range(2):
        with pytest.raises(InterruptedError) if cancelled else nullcontext():
            run()
        weights = {layer.weight.data_ptr() for layer in layers}
        assert {pages.transfers[weight] for weight in weights} == {1}
        assert set(pages.pinned.values()) == {0} and not any(hasattr(layer, "_prefetch") for layer in layers)
        pages.transfers.clear()
    assert not any(entry for queue in comfy.model_prefetch.PREFETCH_QUEUES for entry in queue)


def test_the_hosts_rotation_gives_the_references_numbers(gen_2, golden):
    generator = load_generator(gen_2)
    rotation = Rotation(REAL.table, engine._turn)
    lora = generator.generate(golden["case1.condition"], engine=Engine(rotation=rotation))
    for name, pair in lora.factors.items():
        torch.testing.assert_close(pair.up, golden[f"case1.out.{name}.lora_B"], atol=2e-5, rtol=0)


def test_the_hosts_patcher_is_looked_up_when_it_is_needed(gen_2, monkeypatch):
    """The host chooses between its dynamic and its plain one only after node packs could have imported it."""

    class Chosen(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Chosen)
    flux = families.flux()
    patched, _ = apply.apply_lora(flux.model, families.random_lora(flux, seed=5), mode="bypass")
    (bank,) = patched.get_additional_models()
    assert isinstance(bank, Chosen) and isinstance(memory.load(gen_2).patcher, Chosen)


@pytest.mark.parametrize(
    ("name", "bound"), [("bfloat16", 2e-2), ("float16", 5e-3), ("fp8_e4m3fn", 0.08), ("int8", 0.02)]
)
def test_weight_dtypes_stay_near_float32(gen_2, golden, name, bound, tmp_path):
    """As kept while loading, and saved as that and loaded again."""
    handle = memory.load(gen_2, memory.WEIGHT_DTYPES[name])
    weight = handle.generator.model.blocks[0].feed_forward.fc1.weight
    assert isinstance(weight, QuantizedTensor) == (name in ("int8", "fp8_e4m3fn"))
    assert handle.generator.model.norm_final.weight.dtype != torch.float32
    monkey = pytest.MonkeyPatch()
    monkey.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    saved = memory.load(memory.save(memory.load(gen_2), "saved", memory.SAVE_DTYPES[name]))
    monkey.undo()
    for found in (handle, saved):
        lora = memory.generate(found, as_condition(golden["case1.condition"]))
        flat = torch.cat([pair.up.float().flatten() for pair in lora.pairs])
        reference = torch.cat([golden[f"case1.out.{n}.lora_B"].flatten() for n in lora.names])
        error = float((flat - reference).norm() / reference.norm())
        assert 0 < error < bound
    kept = memory.trainable_copy(saved).state_dict()
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32} and len(kept) == 75


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3fn"])
def test_a_quantised_generator_is_held_by_the_block_like_any_other(gen_2, golden, fetched, monkeypatch, name):
    whole = memory.generate(memory.load(gen_2, memory.WEIGHT_DTYPES[name]), as_condition(golden["case1.condition"]))
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    handle = memory.load(gen_2, memory.WEIGHT_DTYPES[name])
    fetched.clear()
    lora = memory.generate(handle, as_condition(golden["case1.condition"]))
    assert {fetched[layer] for layer in handle.generator.model.blocks.modules() if hasattr(layer, "layout_type")} == {1}
    ours, theirs = (torch.cat([pair.up.flatten() for pair in found.pairs]) for found in (lora, whole))
    # not equal under dynamic VRAM, where the host rounds layers of less than 16 KB anew
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_int8_products_of_the_host_stay_within_two_percent(gen_2, golden, monkeypatch):
    """As on a GPU that multiplies in int8: activations are rounded too, each row by a scale of its own."""
    monkeypatch.setattr(engine, "_multiplies", lambda weight: True)
    lora = memory.generate(memory.load(gen_2, memory.WEIGHT_DTYPES["int8"]), as_condition(golden["case1.condition"]))
    flat = torch.cat([pair.up.float().flatten() for pair in lora.pairs])
    reference = torch.cat([golden[f"case1.out.{n}.lora_B"].flatten() for n in lora.names])
    assert 0 < (flat - reference).norm() < 0.02 * reference.norm()


def test_the_host_can_load_it_again_by_itself(gen_2, golden):
    """MultiGPU and the trainer ask a patcher for a second, non-dynamic copy of its model."""
    handle = memory.load(gen_2)
    copy = handle.patcher.clone(force_deepcopy=True)
    assert copy.model is not handle.patcher.model
    ours, theirs = handle.patcher.model_state_dict(), copy.model_state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def test_a_generator_of_plain_layers_runs_like_any_other(gen_2, golden):
    """One that was trained here is put under the host's care as it is."""
    handle = memory.wrap(load_generator(gen_2), "trained")
    lora = memory.generate(handle, as_condition(golden["case1.condition"]))
    for name, pair in lora.factors.items():
        torch.testing.assert_close(pair.up, golden[f"case1.out.{name}.lora_B"], atol=2e-5, rtol=0)


def test_a_batch_brings_each_block_once(gen_2, golden, fetched):
    handle, tokens = memory.load(gen_2), golden["case1.condition"]
    lora = memory.write(handle, torch.cat((tokens, tokens + 1, tokens - 1)))
    layers = [m for m in handle.generator.model.blocks.modules() if hasattr(m, "comfy_cast_weights")]
    assert lora.batch == 3 and {fetched[layer] for layer in layers} == {1}


@pytest.mark.parametrize("kind", ["default", "int8", "fp8_e4m3fn"])
def test_conditions_of_several_lengths_bring_each_block_once(gen_2, golden, fetched, monkeypatch, kind):
    """The host as with --novram. What comes out is what each condition gets alone, with its own instruction."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    handle, tokens = memory.load(gen_2, memory.WEIGHT_DTYPES[kind]), golden["case1.condition"]
    given = [tokens, torch.cat((tokens, tokens * 2), dim=1), tokens - 1, torch.cat((tokens, -tokens))]
    texts = ("warmer", "make it far warmer", "", "cooler")
    asked = [as_condition(one)._replace(instruction=text) for one, text in zip(given, texts, strict=True)]
    fetched.clear()
    lora = memory.generate(handle, asked[0], more=asked[1:])
    layers = [
        m for m in handle.generator.model.blocks.modules() if hasattr(m, "comfy_cast_weights") and m.weight.ndim == 2
    ]
    assert lora.batch == 5 and {fetched[layer] for layer in layers} == {1}
    number = 0
    for one in asked:
        alone = memory.generate(handle, one)
        for place in range(alone.batch):
            ours, theirs = lora.select(number), alone.select(place)
            assert dict(ours.metadata) == dict(theirs.metadata)
            for found, expected in zip(ours.pairs, theirs.pairs, strict=True):
                torch.testing.assert_close(found.up, expected.up, atol=2e-5, rtol=0)
            number += 1


def test_the_host_is_asked_for_the_room_of_all_lengths(gen_2, golden, monkeypatch):
    asked, load = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required):
        asked.append(memory_required)
        load(models, memory_required=memory_required)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    handle, tokens = memory.load(gen_2), golden["case1.condition"]
    length = tokens.shape[1]
    memory.write(handle, [tokens, torch.cat((tokens, tokens), dim=1), tokens])
    planned = plan(handle.config, 3, [length, 2 * length, length], torch.float32)
    assert asked == [planned.peak + planned.block] and planned.peak > plan(handle.config, 1, length, torch.float32).peak


def test_of_several_conditions_only_new_ones_are_generated(gen_2, golden, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_system_user_directory", lambda name: str(tmp_path / name))
    generated, write = [], memory.write

    def counted(handle, tokens, *args):
        generated.append(len(tokens))
        return write(handle, tokens, *args)

    monkeypatch.setattr(memory, "write", counted)
    handle, tokens = memory.load(gen_2), golden["case1.condition"]
    one, two, both = (
        as_condition(t) for t in (tokens, torch.cat((tokens, tokens), dim=1), torch.cat((tokens, -tokens)))
    )
    memory.generate(handle, two, keep_gb=1)
    first, again = (memory.generate(handle, one, 1, [two, both]) for _ in range(2))
    assert generated == [1, 2] and first.batch == again.batch == 4
    plain = memory.generate(handle, one, more=[two, both])
    for kept, same, made in zip(first.pairs, again.pairs, plain.pairs, strict=True):
        assert torch.equal(kept.up, same.up) and torch.equal(kept.down, same.down)
        torch.testing.assert_close(kept.up, made.up, atol=2e-5, rtol=0)


def test_what_was_kept_is_not_generated_again(gen_2, golden, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_system_user_directory", lambda name: str(tmp_path / name))
    condition = as_condition(golden["case1.condition"])._replace(instruction="make it blue")
    generated, generate = [], Generator.generate

    def counted(self, *args, **kwargs):
        generated.append(self)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Generator, "generate", counted)
    handle = memory.load(gen_2)
    memory.generate(handle, condition)
    assert not list(tmp_path.iterdir()), "off unless asked"
    first, again = (memory.generate(memory.load(gen_2), condition, keep_gb=1) for _ in range(2))
    assert len(generated) == 2 and dict(first.metadata) == dict(again.metadata)
    assert all(
        torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(first.pairs, again.pairs, strict=True)
    )
    memory.generate(memory.load(gen_2, memory.WEIGHT_DTYPES["int8"]), condition, keep_gb=1)
    memory.generate(handle, as_condition(golden["case1.condition"] * 2), keep_gb=1)
    assert len(generated) == 4


def test_progress_is_shown_and_cancel_works_between_chunks(gen_2, golden, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    handle, condition = memory.load(gen_2), as_condition(golden["case1.condition"])
    whole = memory.generate(handle, condition)
    assert seen[-1][0] == seen[-1][1] and [value for value, _ in seen] == sorted(value for value, _ in seen)

    def cancel_at_once(value, total, *_, **__):
        assert value < total, "the run must not come to its end"
        comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel_at_once)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        memory.generate(handle, condition)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    again = memory.generate(handle, condition)
    assert all(torch.equal(a.up, b.up) for a, b in zip(again.pairs, whole.pairs, strict=True))


def test_the_cache_of_the_host_counts_a_lora_fully(gen_2, golden, monkeypatch):
    """Counted too low, LoRAs of old prompts would stay until nothing else fits. The host's own cache tells what it freed."""
    handle = memory.load(gen_2)
    lora = memory.generate(handle, as_condition(golden["case1.condition"]))

    def freed(*outputs) -> int:
        cache = comfy_execution.caching.RAMPressureCache(None)
        cache.generation, cache.used_generation, cache.timestamps = 1, {"node": 0}, {"node": 0.0}
        cache.cache["node"] = SimpleNamespace(outputs=[[output] for output in outputs])
        return cache.ram_release(target=1)

    no_room = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(comfy_execution.caching, "psutil", no_room)
    assert freed(lora, to_state_dict(lora)) - freed(None) == lora.elements * 4
    assert freed(as_condition(golden["case1.condition"])) - freed(None) == golden["case1.condition"].nbytes


def test_not_finite_is_one_error_that_names_the_layer(gen_2, golden, tmp_path):
    generator = load_generator(gen_2)
    generator.model.layer_pos.weight[1] = float("nan")
    path = save_generator(generator, tmp_path / "nan.safetensors")
    with pytest.raises(GenerationError, match="not finite in layer [01]"):
        memory.generate(memory.load(path), as_condition(golden["case1.condition"]))
    bad = golden["case1.condition"].clone()
    bad[0, 0, 0] = float("inf")
    with pytest.raises(ConditionError, match="NaN or infinity"):
        memory.generate(memory.load(gen_2), as_condition(bad))


def test_a_condition_of_another_width_names_both(gen_2):
    with pytest.raises(ConditionError, match=r"conditioning \(1, 5, 63\).*reads hidden_states \(batch, length, 64\)"):
        memory.generate(memory.load(gen_2), as_condition(torch.zeros(1, 5, 63)))


def test_parts_have_their_own_range_of_the_width():
    """Two parts give what one projection for each of them gives."""
    config = two_part_config()
    generator = Generator(config).initialize(0)
    text, vision = torch.randn(1, 5, 12), torch.randn(1, 3, 8)
    both = Condition((ConditionPart(CLIP_VISION, vision), ConditionPart(CONDITIONING, text)))
    tokens = memory.assemble(both, config)
    assert tokens.shape == (1, 8, 20)
    weight, bias = generator.hidden_in.weight, generator.hidden_in.bias
    expected = torch.cat((text @ weight[:, :12].T, vision @ weight[:, 12:].T), dim=1) + bias
    torch.testing.assert_close(generator.hidden_in(tokens), expected)
    with pytest.raises(ConditionError, match=r"conditioning \(1, 5, 12\).*clip_vision \(batch, length, 8\)"):
        memory.assemble(as_condition(text), config)


def two_part_config() -> GeneratorConfig:
    parts = [{"kind": "conditioning", "width": 12}, {"kind": "clip_vision", "width": 8}]
    return GeneratorConfig(
        d_model=16, head_dim=8, num_pg_layers=1, input_dim=20, output_dim=16, num_base_model_layers=2, rank=4, alpha=4,
        token_dim=16, dim_accumulation=1, pg_mapping={"q": {"lora_A_dim": 8, "lora_B_dim": 8}},
        hywu={"condition": parts},
    )  # fmt: skip


def test_conditions_from_the_hosts_types():
    entry, vision = [torch.zeros(1, 5, 12), {}], {"last_hidden_state": torch.zeros(1, 3, 8)}
    condition = conditions.from_host([entry], vision, "make it blue")
    assert [(part.kind, tuple(part.tokens.shape)) for part in condition.parts] == [
        (CONDITIONING, (1, 5, 12)),
        (CLIP_VISION, (1, 3, 8)),
    ]
    with pytest.raises(ConditionError, match="2 entries"):
        conditions.from_host([entry, entry])


def test_a_new_generator_says_how_large_it_is_and_what_training_takes():
    config = GeneratorConfig(
        d_model=128,
        head_dim=32,
        num_pg_layers=2,
        input_dim=64,
        output_dim=64,
        num_base_model_layers=4,
        rank=16,
        alpha=32.0,
        token_dim=64,
        dim_accumulation=2,
        pg_mapping={
            "attn.qkv": {"lora_A_dim": 1024, "lora_B_dim": 3072},
            "mlp": {"lora_A_dim": 1024, "lora_B_dim": 4096},
        },
    )
    handle = memory.new(config, seed=0)
    weights = sum(parameter.numel() for parameter in handle.generator.parameters())
    written = handle.generator.generate(torch.zeros(1, 3, 64)).elements
    said = memory.describe_new(handle)
    assert said.startswith(f"{weights / 1e6:.1f} M parameters ({4 * weights / 1e9:.2f} GB), 1,152 x 4 positions")
    assert f"LoRA {written / 1e6:.1f} M, " in said and " GB for each pair" in said
