"""LoRA algebra from the factors alone, against dense matrices."""

import copy
import pickle

import pytest
import torch

from hywu_core import InstanceLora, LoraError, LoraFactor
from hywu_core.lora import blend, cosine, cosines, inner, norms, truncate

SHAPES = {"a.q": (24, 16, None), "a.mlp": (10, 30, None), "a.experts.w1": (12, 8, 3)}  # out, in, experts


def random_lora(seed, rank=4, batch=2, scale=1.5, names=tuple(SHAPES)):
    source, factors = torch.Generator().manual_seed(seed), {}
    for name in names:
        rows, columns, experts = SHAPES[name]
        lead = (batch,) if experts is None else (batch, experts)
        factors[name] = LoraFactor(
            torch.randn(*lead, rank, columns, generator=source), torch.randn(*lead, rows, rank, generator=source)
        )
    return InstanceLora(factors, scale, {"seed": seed})


def dense(lora, name):
    return lora.scale * (lora.factors[name].up.double() @ lora.factors[name].down.double())


def test_blend_is_the_weighted_sum_of_changes():
    one, two = random_lora(1), random_lora(2, rank=3, scale=0.5)
    found = blend([one, two], [0.7, -0.2])
    assert found.rank == 7
    for name in SHAPES:
        expected = 0.7 * dense(one, name) - 0.2 * dense(two, name)
        torch.testing.assert_close(dense(found, name), expected, atol=1e-5, rtol=1e-5)


def test_blend_of_other_targets_and_batches():
    one, two = random_lora(1, batch=1, names=("a.q",)), random_lora(2, names=("a.mlp", "a.q"))
    found = blend([one, two], [1.0, 1.0])
    torch.testing.assert_close(dense(found, "a.q"), dense(one, "a.q") + dense(two, "a.q"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense(found, "a.mlp"), dense(two, "a.mlp"), atol=1e-5, rtol=1e-5)
    with pytest.raises(LoraError, match="one weight for each LoRA, got 2 LoRAs and 1 weights"):
        blend([one, two], [1.0])
    with pytest.raises(LoraError, match=r"different batch sizes cannot be blended: \[2, 3\]"):
        blend([random_lora(1), random_lora(1, batch=3)], [1.0, 1.0])


def test_truncation_is_the_best_approximation():
    lora = blend([random_lora(1), random_lora(2)], [1.0, 0.3])
    found = truncate(lora, 3)
    for name in SHAPES:
        left, values, right = torch.linalg.svd(dense(lora, name), full_matrices=False)
        best = (left[..., :3] * values[..., None, :3]) @ right[..., :3, :]
        torch.testing.assert_close(dense(found, name), best, atol=1e-4, rtol=1e-4)
        assert found.factors[name].rank == 3
    whole = truncate(lora, 100)
    assert all(torch.equal(a.up, b.up) for a, b in zip(whole.pairs, lora.pairs, strict=True))
    with pytest.raises(LoraError, match="at least 1"):
        truncate(lora, 0)


def test_norms_inner_and_cosine_are_the_dense_ones():
    one, two = random_lora(1), random_lora(2, rank=3, scale=0.5)
    flat = [torch.cat([dense(lora, name).flatten(1) for name in SHAPES], dim=1) for lora in (one, two)]
    torch.testing.assert_close(cosine(one, two), torch.nn.functional.cosine_similarity(*flat), atol=1e-9, rtol=0)
    torch.testing.assert_close(cosine(one, one.scaled(-3.0)), -torch.ones(2).double(), atol=1e-9, rtol=0)
    for name, value in norms(one).items():
        torch.testing.assert_close(value, dense(one, name).flatten(1).norm(dim=1), atol=1e-6, rtol=1e-9)
    pair = one.factors["a.q"], two.factors["a.q"]
    expected = (dense(one, "a.q") * dense(two, "a.q")).sum((-2, -1)) / (one.scale * two.scale)
    torch.testing.assert_close(inner(*pair), expected, atol=1e-4, rtol=1e-6)
    zero = one.scaled(0.0)
    assert not cosine(one, zero).any()
    with pytest.raises(LoraError, match="same targets.*only one has"):
        cosine(one, random_lora(1, names=("a.q",)))


def test_cosines_are_computed_once_for_each_two():
    loras = [random_lora(seed) for seed in range(3)]
    told = []
    found = cosines([*loras, loras[0].select(1)], lambda done, total: told.append((done, total)))
    assert found.shape == (4, 4, 2) and torch.equal(found, found.transpose(0, 1))
    for i, one in enumerate(loras):
        for j, two in enumerate(loras):
            torch.testing.assert_close(found[i, j], cosine(one, two), atol=1e-12, rtol=0)
    assert float(found[0, 3, 1]) == pytest.approx(1) and abs(float(found[0, 3, 0])) < 0.9
    assert told == [(done, len(SHAPES)) for done in range(1, len(SHAPES) + 1)]


def test_loras_that_cannot_be_compared():
    one = random_lora(1)
    three = InstanceLora(
        {name: LoraFactor(*(t.repeat(3, *[1] * (t.ndim - 1))[:3] for t in pair)) for name, pair in one.factors.items()}
    )
    with pytest.raises(LoraError, match="LoRAs of 2 and of 3 instances cannot be compared"):
        cosine(one, three)
    pair = one.factors["a.q"]
    other = InstanceLora(dict(one.factors) | {"a.q": LoraFactor(pair.down[..., 1:], pair.up)})
    with pytest.raises(LoraError, match="a.q has different shapes in the LoRAs to compare"):
        cosine(one, other)


def test_it_is_a_value():
    lora = random_lora(1)
    changed = lora.scaled(2.0).with_metadata(note="x").to(dtype=torch.float64).select(1)
    assert (lora.scale, lora.batch, dict(lora.metadata)) == (1.5, 2, {"seed": 1})
    assert (changed.scale, changed.batch, dict(changed.metadata)) == (3.0, 1, {"seed": 1, "note": "x"})
    torch.testing.assert_close(changed.pairs[0].up[0], lora.pairs[0].up[1].double())
    with pytest.raises(TypeError):
        lora.metadata["seed"] = 2
    with pytest.raises(LoraError, match="no instance 2: this LoRA holds 2"):
        lora.select(2)
    for twin in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        assert twin.names == lora.names and torch.equal(twin.pairs[2].down, lora.pairs[2].down)
        assert dict(twin.metadata) == {"seed": 1}


def test_sharing_and_counting():
    lora = random_lora(1)
    assert lora.to(dtype=torch.float32).pairs[0].up.data_ptr() == lora.pairs[0].up.data_ptr()
    assert lora.elements == sum(pair.down.numel() + pair.up.numel() for pair in lora.pairs)
    assert isinstance(lora, tuple) and all(isinstance(pair, tuple) for pair in lora.pairs)


@pytest.mark.parametrize(
    ("down", "up"), [((1, 4, 8), (1, 8, 3)), ((1, 4, 8), (2, 8, 4)), ((4, 8), (8, 4)), ((1, 2, 4, 8), (1, 3, 8, 4))]
)
def test_factors_that_do_not_fit(down, up):
    with pytest.raises(LoraError, match="q: the factors .* do not fit together"):
        InstanceLora({"q": LoraFactor(torch.zeros(down), torch.zeros(up))})


def test_one_batch_for_all():
    pairs = {
        "q": LoraFactor(torch.zeros(1, 4, 8), torch.zeros(1, 8, 4)),
        "k": LoraFactor(torch.zeros(2, 4, 8), torch.zeros(2, 8, 4)),
    }
    with pytest.raises(LoraError, match=r"different batch sizes: \[1, 2\]"):
        InstanceLora(pairs)


def test_an_instance_of_a_batch_takes_its_own_instruction_along():
    lora = random_lora(1).with_metadata(instructions=["warmer", "cooler"])
    for index, text in ((0, "warmer"), (1, "cooler"), (-1, "cooler")):
        assert dict(lora.select(index).metadata) == {"seed": 1, "instruction": text}
    one = random_lora(1).with_metadata(instruction="darker")
    assert one.select(1).metadata["instruction"] == "darker"
