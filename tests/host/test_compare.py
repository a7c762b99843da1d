"""Blending as an artist writes it, and the pictures and tables that show what LoRAs change."""

import families
import pytest
import torch

from hywu_core import InstanceLora, LoraError, LoraFactor
from hywu_core.host import progress
from hywu_core.host.lora import charts, store
from hywu_core.lora import blend, norms


@pytest.fixture
def loras():
    with torch.inference_mode():
        flux = families.flux()
        return [families.random_lora(flux, seed) for seed in (1, 2)]


def cells(table: str) -> list[list[float]]:
    return [[float(cell) for cell in line.split("\t")[1:]] for line in table.splitlines()[1:]]


def test_weights_as_text(loras):
    a, b = loras
    name = a.names[0]

    def dense(lora):
        return lora.scale * (lora.factors[name].up @ lora.factors[name].down)

    expected = 0.7 * dense(a) - 0.2 * dense(b)
    torch.testing.assert_close(dense(store.blend_of(loras, "0.7, -0.2")), expected, atol=1e-5, rtol=1e-5)
    mean = store.blend_of(loras, "")
    torch.testing.assert_close(dense(mean), (dense(a) + dense(b)) / 2, atol=1e-5, rtol=1e-5)
    assert mean.rank == 8 and store.blend_of(loras, "", max_rank=3).rank == 3
    with pytest.raises(LoraError, match="not numbers"):
        store.blend_of(loras, "a lot")
    with pytest.raises(LoraError, match="2 LoRAs and 3 weights"):
        store.blend_of(loras, "1 2 3")


def test_norms_stand_where_they_belong(loras):
    image, table = charts.norms_by_layer(loras[0])
    expected = list(norms(loras[0]).values())
    assert table.splitlines()[0].split("\t")[1:] == ["img_attn.qkv", "img_mlp.0", "txt_attn.proj", "img_mod.lin"]
    flat = [value for line in cells(table) for value in line]
    assert flat == pytest.approx([float(value) for value in expected], rel=1e-3)
    assert image.ndim == 4 and image.shape[-1] == 3 and image.min() >= 0 and image.max() <= 1


def test_cosines_know_the_same_and_the_opposite(loras):
    image, table = charts.cosines_of([*loras, loras[0].scaled(-2.0)])
    values = cells(table)
    assert values[0][0] == pytest.approx(1) and values[0][2] == pytest.approx(-1)
    assert abs(values[0][1]) < 0.1 and values[0][1] == values[1][0]
    assert image.shape[0] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7, 0.3", [0.7, 0.3]),
        ("0.7,0.3", [0.7, 0.3]),
        ("0.5;0.5", [0.5, 0.5]),
        ("50%, 50%", [0.5, 0.5]),
        ("0.5\uff0c0.25", [0.5, 0.25]),
        ("\uff11\uff0e5\u3001 25\uff05", [1.5, 0.25]),
        ("0,7; 0,3", [0.7, 0.3]),
        ("0,7 -0,3", [0.7, -0.3]),
        ("12,5%; 1", [0.125, 1.0]),
        ("1, 0,", [1.0, 0.0]),
        ("2\n3", [2.0, 3.0]),
        ("", [0.5, 0.5]),
        (" , ", [0.5, 0.5]),
    ],
)
def test_weights_as_people_write_them(loras, text, expected):
    found, right = store.blend_of(loras, text), blend(loras, expected)
    assert all(torch.equal(one.up, two.up) for one, two in zip(found.pairs, right.pairs, strict=True))


@pytest.mark.parametrize("text", ["0,5", "1,0", "0,5%"])
def test_a_comma_that_could_be_either_is_refused(loras, text):
    with pytest.raises(LoraError, match="can mean . and .*, or one number. Write decimals with a point"):
        store.blend_of(loras, text)


@pytest.mark.parametrize("text", ["nan 1", "inf 1", "1e999 1", "1,2,x", "% 1", "5%% 1"])
def test_weights_that_are_no_numbers(loras, text):
    with pytest.raises(LoraError, match="are not numbers"):
        store.blend_of(loras, text)


def named(names, seed=0):
    source = torch.Generator().manual_seed(seed)

    def factor(*shape):
        return torch.randn(1, *shape, generator=source)

    return InstanceLora({name: LoraFactor(factor(2, 6), factor(5, 2)) for name in names})


def test_stacks_are_not_mixed_up():
    names = [f"{stack}.{layer}.attention.qkv" for stack in ("noise_refiner", "layers") for layer in range(2)]
    lora = named(names)
    _, table = charts.norms_by_layer(lora)
    rows = {line.split("\t")[0]: float(line.split("\t")[1]) for line in table.splitlines()[1:]}
    expected = {name: float(norm) for name, norm in norms(lora).items()}
    assert rows == pytest.approx(
        {f"{stack} {layer}": expected[f"{stack}.{layer}.attention.qkv"]
         for stack in ("noise_refiner", "layers") for layer in range(2)}, rel=1e-3)  # fmt: skip
    underscored = named([f"lora_unet_double_blocks_{layer}_img_attn_qkv" for layer in range(3)])
    _, table = charts.norms_by_layer(underscored)
    assert [line.split("\t")[0] for line in table.splitlines()[1:]] == ["layer 0", "layer 1", "layer 2"]
    assert table.splitlines()[0].split("\t")[1:] == ["img_attn_qkv"]


LONG = "a_target_with_a_name_that_is_much_longer_than_any_column_could_ever_show_" * 3


@pytest.mark.parametrize(
    "names",
    [
        [f"lora_unet_input_blocks_{block}_1_{LONG}{target}" for block in range(9) for target in range(110)],
        [f"{LONG}{number}" for number in range(986)],
        [f"layers.{layer}.qkv" for layer in range(986)],
    ],
)
def test_pictures_of_large_loras_stay_small_and_tables_whole(names):
    lora = named(names)
    image, table = charts.norms_by_layer(lora)
    assert image.shape[1] <= 4000 and image.shape[2] <= 4000
    found = [value for line in cells(table) for value in line if value == value]
    assert sorted(found) == pytest.approx(sorted(float(norm) for norm in norms(lora).values()), rel=1e-3)


def test_what_shares_a_cell_is_its_mean():
    found = charts._shared({(0, 0): 1.0, (1, 0): 3.0, (0, 1): 5.0, (2, 0): 7.0}, 2, 1)
    assert found == {(0, 0): 2.0, (0, 1): 5.0, (1, 0): 7.0}
    assert charts._fewer(["a", "b", "c"], 2) == (["a +1", "c"], 2)
    assert len(charts._short(LONG)) == charts.WIDEST


def test_long_work_can_be_cancelled(loras, monkeypatch):
    class Cancelled(BaseException):
        """As the host's own, not an Exception."""

    asked = []

    def cancel():
        asked.append(1)
        if len(asked) == 3:
            raise Cancelled

    monkeypatch.setattr(progress.comfy.model_management, "throw_exception_if_processing_interrupted", cancel)
    for work in (lambda: charts.cosines_of(loras), lambda: store.blend_of(loras, "", max_rank=3)):
        asked.clear()
        with pytest.raises(Cancelled):
            work()
        assert len(asked) == 3 < len(loras[0].names)


def test_numbers_that_are_not_finite_are_shown_and_named(loras):
    name = loras[0].names[0]
    factors = dict(loras[0].factors)
    factors[name] = LoraFactor(factors[name].down * float("inf"), factors[name].up)
    bad = InstanceLora(factors)
    image, table = charts.norms_by_layer(bad)
    assert torch.isfinite(image).all() and "nan" in table
    with pytest.raises(LoraError, match=f"{name}: the factors hold NaN or infinite values"):
        store.blend_of([bad, loras[1]], "", max_rank=2)


def test_a_lora_without_pairs_is_named(loras):
    for work in (
        lambda: charts.norms_by_layer(InstanceLora({})),
        lambda: charts.cosines_of([loras[0], InstanceLora({})]),
    ):
        with pytest.raises(LoraError, match="This LoRA holds nothing: no pairs of low-rank factors"):
            work()
