"""LoRA files: there and back, and what damaged ones say."""

import pytest
import torch
from made_files import small_lora
from safetensors.torch import save_file

from hywu_core import (
    InstanceLora,
    LoraError,
    LoraFactor,
)
from hywu_core.files.lora_files import from_state_dict, load_lora, save_lora, to_peft_state_dict, to_state_dict


def test_lora_files_come_back_with_their_metadata(tmp_path):
    lora = small_lora()
    back = load_lora(save_lora(lora, tmp_path / "lora.safetensors"))
    assert back.scale == 2.0 and back.names == lora.names
    assert back.metadata["instruction"] == "make it warm" and back.metadata["rank"] == 4
    assert all(
        torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(back.pairs, lora.pairs, strict=True)
    )


def test_metadata_of_another_tool_under_our_name_is_left_alone(tmp_path):
    for text in ("[1]", "{no json", '"text"'):
        save_file(to_state_dict(small_lora()), tmp_path / "lora.safetensors", {"hywu": text})
        assert load_lora(tmp_path / "lora.safetensors").names == small_lora().names


def test_damaged_lora_files_are_named(tmp_path):
    path = save_lora(small_lora(), tmp_path / "lora.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoraError, match="lora.safetensors is not a readable safetensors file.*probably truncated"):
        load_lora(path)
    save_file({"q.lora_A.weight": torch.zeros(4, 6), "q.lora_B.weight": torch.zeros(8, 5)}, path)
    with pytest.raises(LoraError, match=r"lora.safetensors: q: the factors \(1, 4, 6\) and \(1, 8, 5\) do not fit"):
        load_lora(path)
    with pytest.raises(LoraError, match="nothing.safetensors does not exist"):
        load_lora(tmp_path / "nothing.safetensors")


def test_peft_folds_the_scale():
    lora, back = small_lora(), from_state_dict(to_peft_state_dict(small_lora()))
    assert back.scale == 1.0
    torch.testing.assert_close(back.pairs[0].up, lora.pairs[0].up * 2.0)


def test_slices_of_one_weight_become_one_exact_pair():
    lora = small_lora(("b.0.qkv[0:8/24]", "b.0.qkv[16:24/24]"))
    back = from_state_dict(to_state_dict(lora))
    assert back.names == ("b.0.qkv",) and back.rank == 8 and back.scale == lora.scale
    first, second = (pair.up[0] @ pair.down[0] for pair in lora.pairs)
    expected = torch.cat((first, torch.zeros(8, 6), second))
    torch.testing.assert_close(back.pairs[0].up[0] @ back.pairs[0].down[0], expected)


def test_alphas_of_a_foreign_file_are_kept_per_target():
    state = {}
    for name, alpha in (("x", 4.0), ("y", 1.0)):
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = torch.ones(4, 6), torch.ones(8, 4)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    lora = from_state_dict(state)
    assert lora.scale == 1.0
    assert float(lora.factors["x"].up[0, 0, 0]) == 1.0 and float(lora.factors["y"].up[0, 0, 0]) == 0.25


def test_foreign_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LoraError, match="has no partner q.lora_B.weight"):
        from_state_dict({"q.lora_A.weight": torch.zeros(4, 6)})
    with pytest.raises(LoraError, match=r"experts \[0, 2\], expected all from 0 on"):
        from_state_dict(
            {f"m.experts.{e}.down_proj.{f}.weight": torch.zeros(4, 4) for e in (0, 2) for f in ("lora_A", "lora_B")}
        )
    with pytest.raises(LoraError, match="this LoRA holds 2"):
        pair = LoraFactor(torch.zeros(2, 4, 6), torch.zeros(2, 8, 4))
        save_lora(InstanceLora({"q": pair}), tmp_path / "x.safetensors")
