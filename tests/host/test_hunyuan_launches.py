"""What a layer of the released base asks of a device, counted; and products with all experts at once."""

import importlib.util
from pathlib import Path

import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hywu_core.bases.hunyuan_image3.moe import MixtureOfExperts
from hywu_core.bases.hunyuan_image3.prefix_cache import GrowingKeysValues
from hywu_core.host.lora import grouped
from hywu_core.host.lora.apply import wrapped_forwards
from hywu_core.host.lora.bank import Adapter
from hywu_core.host.lora.experts import ExpertBank
from hywu_core.host.lora.grouped import Routing
from hywu_core.host.lora.matching import Match
from hywu_core.host.training.objective import GraphFactor
from hywu_core.lora import LoraFactor

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SAMPLES, LENGTH, TOP, EXPERTS = 2, 9, 2, 7


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bench_hunyuan_launches", SCRIPTS / "bench_hunyuan_launches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_a_layer_of_the_released_base(bench, kind):
    bare, beside = (bench.count(kind, with_lora) for with_lora in (False, True))
    assert bare.waits == beside.waits == 1
    # what a layer does before its experts; each of them has its products behind the wait
    assert beside.before < 70
    assert bare.launches <= {"bfloat16": 200, "fp8": 330}[kind]
    assert beside.launches <= 600


@pytest.fixture
def chosen():
    """Choices (B, L, k) among the experts but for one, which nobody wants."""
    source = torch.Generator().manual_seed(2)
    wanted = torch.rand(SAMPLES, LENGTH, EXPERTS, generator=source)
    wanted[..., 3] = -1
    return wanted.topk(TOP, dim=-1).indices


def test_rows_are_sorted_by_expert_and_sample(chosen):
    routing = Routing.of(chosen, EXPERTS)
    flat = chosen.flatten()[routing.order]
    assert torch.equal(flat, flat.sort().values)
    samples = routing.order // (LENGTH * TOP)
    for expert, sample, part in routing.parts_of_samples():
        assert set(flat[part].tolist()) == {expert} and set(samples[part].tolist()) == {sample}
    assert [expert for expert, _ in routing.parts()] == [0, 1, 2, 4, 5, 6]
    assert torch.equal(routing.offsets, torch.bincount(flat, minlength=EXPERTS).cumsum(0).int())


@pytest.mark.parametrize("most", [1, 5, 12, 17, 35, 36])
def test_chunks_are_all_rows_in_order_and_about_equal(chosen, most):
    routing = Routing.of(chosen, EXPERTS)
    chunks = list(routing.chunks(most))
    assert torch.equal(torch.cat([chunk.order for chunk in chunks]), routing.order)
    largest = max(part.stop - part.start for _, part in routing.parts())
    assert max(len(chunk.order) for chunk in chunks) < most + largest
    experts = [expert for chunk in chunks for expert, _ in chunk.parts()]
    assert experts == [expert for expert, _ in routing.parts()]
    for chunk in chunks:
        assert sum(part.stop - part.start for _, part in chunk.parts()) == len(chunk.order)


def test_single_experts_come_from_pinned_memory_where_they_are(chosen):
    bank, x = ExpertBank(EXPERTS, 16, 24), torch.randn(3, 16)
    bank.weight.data = torch.full((EXPERTS, 24, 16), float("nan"))
    bank.weight_function = []
    kept = torch.randn(EXPERTS, 24, 16)
    assert bank._expert_alone(x, 5).isnan().all()
    bank._pins = {"weights-loaded": {"pin": kept.view(torch.uint8).flatten(), "registered": True}}
    torch.testing.assert_close(bank._expert_alone(x, 5), x @ kept[5].T)


def test_keys_and_values_grow_in_place():
    source = torch.Generator().manual_seed(0)
    steps = [tuple(torch.randn(1, 2, length, 4, generator=source) for _ in range(2)) for length in (5, 1, 1)]
    growing, places = GrowingKeysValues(7), set()
    for index, own in enumerate(steps):
        found = growing.add(own)
        places |= {part.data_ptr() for part in found}
        expected = [torch.cat(parts, dim=2) for parts in zip(*steps[: index + 1], strict=True)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert len(places) == 2 and growing.length == 7


def test_gradients_of_a_lora_on_experts_are_those_of_changed_weights():
    """In float64, against one graph over the weights W + B . A."""
    source = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64) * 0.3

    mixture = MixtureOfExperts(8, 6, EXPERTS, TOP, comfy.ops.disable_weight_init, dtype=torch.float64)
    for parameter in mixture.parameters():
        parameter.data = random(*parameter.shape)
    mixture.requires_grad_(False)
    base, x = nn.ModuleDict({"mlp": mixture}), random(SAMPLES, LENGTH, 8)
    places = {"gate_and_up_proj": ((0, 6, 8), (6, 6, 8)), "down_proj": ((0, 8, 6),)}
    parts, pairs = {}, []
    for name, halves in places.items():
        path = f"mlp.experts.{name}"
        for start, rows, columns in halves:
            pair = LoraFactor(random(1, EXPERTS, 3, columns), random(1, EXPERTS, rows, 3))
            pairs.append((name, start, LoraFactor(*(part.requires_grad_() for part in pair))))
            adapter = Adapter(Match(path, pairs[-1][2], path, start, rows), 0.5, GraphFactor)
            parts.setdefault(path, []).append((adapter, 1.0))
    weights = random(SAMPLES, LENGTH, 8)

    def gradients(loss):
        return torch.autograd.grad(loss, [part for _, _, pair in pairs for part in pair])

    with wrapped_forwards(base, parts):
        found = gradients((mixture(x) * weights).sum())
    changed = {}
    for name in places:
        deltas = [0.5 * pair.up[0] @ pair.down[0] for owner, _, pair in pairs if owner == name]
        changed[f"experts.{name}.weight"] = getattr(mixture.experts, name).weight + torch.cat(deltas, dim=1)
    expected = gradients((torch.func.functional_call(mixture, changed, x.requires_grad_()) * weights).sum())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("most", [10, 100])
def test_torchs_grouped_product_gives_the_same(chosen, monkeypatch, most):
    source = torch.Generator().manual_seed(1)
    bank = ExpertBank(EXPERTS, 16, 24)
    bank.weight.data = torch.randn(EXPERTS, 24, 16, generator=source)
    x = torch.randn(SAMPLES * LENGTH, 16, generator=source)
    down, up = torch.randn(EXPERTS, 8, 16, generator=source), torch.randn(EXPERTS, 24, 8, generator=source)

    def run():
        given, made = [], []
        for chunk in Routing.of(chosen, EXPERTS).chunks(most):
            rows = x[chunk.order // TOP]
            with torch.no_grad(), bank.on_hand(rows, False):
                made.append(grouped.add_low_rank(bank(rows, chunk), rows, down, up, chunk))
                weights = bank.weight + up @ down
                given.append(torch.cat([F.linear(rows[part], weights[expert]) for expert, part in chunk.parts()]))
        return torch.cat(made), torch.cat(given)

    torch.testing.assert_close(*run(), atol=1e-4, rtol=1e-4)
    for module in ("grouped", "experts"):
        monkeypatch.setattr(f"hywu_core.host.lora.{module}.grouped_is_fast", lambda x: True)
    called, product = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **named: called.append(1) or product(*args, **named))
    torch.testing.assert_close(*run(), atol=1e-4, rtol=1e-4)
    assert called
