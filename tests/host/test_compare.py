"""Blending as an artist writes it, and the pictures and tables that show what LoRAs change."""

import families
import pytest
import torch

from hywu_core import LoraError
from hywu_core.host.lora import charts, store
from hywu_core.lora import norms


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
    torch.testing.assert_close(dense(store.blend_from_text(loras, "0.7, -0.2")), expected, atol=1e-5, rtol=1e-5)
    mean = store.blend_from_text(loras, "")
    torch.testing.assert_close(dense(mean), (dense(a) + dense(b)) / 2, atol=1e-5, rtol=1e-5)
    assert mean.rank == 8 and store.blend_from_text(loras, "", max_rank=3).rank == 3
    with pytest.raises(LoraError, match="not numbers"):
        store.blend_from_text(loras, "a lot")
    with pytest.raises(LoraError, match="2 LoRAs and 3 weights"):
        store.blend_from_text(loras, "1 2 3")


def test_norms_stand_where_they_belong(loras):
    image, table = charts.norms_by_layer(loras[0])
    expected = list(norms(loras[0]).values())
    assert table.splitlines()[0].split("\t")[1:] == ["img_attn.qkv", "img_mlp.0", "txt_attn.proj", "img_mod.lin"]
    flat = [value for line in cells(table) for value in line]
    assert flat == pytest.approx([float(value) for value in expected], rel=1e-3)
    assert image.ndim == 4 and image.shape[-1] == 3 and image.min() >= 0 and image.max() <= 1


def test_cosines_know_the_same_and_the_opposite(loras):
    image, table = charts.cosines([*loras, loras[0].scaled(-2.0)])
    values = cells(table)
    assert values[0][0] == pytest.approx(1) and values[0][2] == pytest.approx(-1)
    assert abs(values[0][1]) < 0.1 and values[0][1] == values[1][0]
    assert image.shape[0] == 1
