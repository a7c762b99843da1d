"""A LoRA's strength by block and target, from rules."""

import pytest
import torch

from hywu_core import InstanceLora, LoraError, LoraFactor
from hywu_core.by_block import by_block, place_of

NAMES = [f"double_blocks.{i}.{t}" for i in range(3) for t in ("img_attn.qkv", "img_mlp.0")] + [
    "single_blocks.1.linear1",
    "head",
]


@pytest.fixture
def lora():
    source = torch.Generator().manual_seed(0)
    pairs = {
        n: LoraFactor(torch.randn(1, 2, 4, generator=source), torch.randn(1, 3, 2, generator=source)) for n in NAMES
    }
    return InstanceLora(pairs, 0.5)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("", [1] * 8),
        ("0-1: 0.5", [0.5, 0.5, 0.5, 0.5, 1, 1, 0.5, 1]),
        ("2: 0", [1, 1, 1, 1, 0, 0, 1, 1]),
        ("*mlp*: -1", [1, -1, 1, -1, 1, -1, 1, 1]),
        ("mlp: 50%\n0: 2", [2, 2, 1, 0.5, 1, 0.5, 1, 1]),
        ("single_blocks 0-3: 2; head: 0", [1, 1, 1, 1, 1, 1, 2, 0]),
        ("double_blocks.*.img_attn.qkv 1-2 : 3", [1, 1, 3, 1, 3, 1, 1, 1]),
        ("0-2：0.25；head：4", [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 4]),
    ],
)
def test_the_last_rule_that_fits_decides(lora, rules, expected):
    changed = by_block(lora, rules)
    for name, strength in zip(NAMES, expected, strict=True):
        assert torch.equal(changed.factors[name].up, lora.factors[name].up * strength), name
        assert torch.equal(changed.factors[name].down, lora.factors[name].down)


@pytest.mark.parametrize("rules", ["0.5", ": 1", "0-7: a lot", "0-7: nan", "*mlp*", "1 2: 3"])
def test_what_is_no_rule_is_named(lora, rules):
    with pytest.raises(LoraError, match="is no rule. Write what, a colon and a strength"):
        by_block(lora, rules)


def test_a_rule_that_fits_nothing_says_what_there_is(lora):
    with pytest.raises(
        LoraError, match=r"'9: 1' fits nothing.*blocks 0-2 of double_blocks, 1-1 of single_blocks.*img_mlp"
    ):
        by_block(lora, "0: 2\n9: 1")
    with pytest.raises(LoraError, match="2 comes behind 1"):
        by_block(lora, "2-1: 1")


def test_names_of_other_tools_have_places_too():
    assert place_of("lora_unet_double_blocks_12_img_attn_qkv") == ("lora_unet_double_blocks", 12, "img_attn_qkv")
