"""What damaged or foreign LoRA data says: one LoraError each, that names the key and what was expected."""

import pytest
import torch
from safetensors.torch import save_file

from hywu_core import InstanceLora, LoraError, LoraFactor
from hywu_core.files.lora_files import from_state_dict, load_lora, to_state_dict
from hywu_core.lora import blend, cosine, truncate

DOWN, UP = torch.ones(4, 6), torch.ones(8, 4)


def pair(down=DOWN, up=UP, **others):
    return {"q.lora_down.weight": down, "q.lora_up.weight": up} | {f"q.{key}": value for key, value in others.items()}


def experts(*downs):
    state = {}
    for index, down in enumerate(downs):
        state[f"m.experts.{index}.w.lora_A.weight"] = down
        state[f"m.experts.{index}.w.lora_B.weight"] = torch.ones(8, down.shape[0])
    return state


STATES = {
    "empty": ({}, "no LoRA weights here"),
    "a checkpoint": ({"a.weight": DOWN}, "a.weight .* is not part of a plain low-rank pair"),
    "no partner": ({"q.lora_down.weight": DOWN}, "q.lora_down.weight has no partner q.lora_up.weight"),
    "rank 0": (pair(torch.zeros(0, 6), torch.zeros(8, 0)), r"q: the factors \(1, 0, 6\) and \(1, 8, 0\) do not fit"),
    "no inputs": (pair(torch.zeros(4, 0)), r"q: the factors \(1, 4, 0\).*none of them 0"),
    "other ranks": (pair(up=torch.ones(8, 5)), r"q: the factors \(1, 4, 6\) and \(1, 8, 5\) do not fit"),
    "one axis": (pair(torch.zeros(6)), r"shapes \(6,\) and \(8, 4\), expected \(r, in\) and \(out, r\)"),
    "one empty axis": (pair(torch.zeros(0)), r"shapes \(0,\) and \(8, 4\)"),
    "no axis": (pair(torch.tensor(1.0)), r"shapes \(\) and \(8, 4\)"),
    "whole numbers": (pair(DOWN.int(), UP.int()), "torch.int32 and torch.int32, expected floating point"),
    "several alphas": (
        pair(alpha=torch.ones(2)),
        r"q.alpha of the LoRA has the shape \(2,\), expected one finite number",
    ),
    "no alpha in it": (pair(alpha=torch.ones(0)), r"q.alpha of the LoRA has the shape \(0,\)"),
    "complex alpha": (
        pair(alpha=torch.tensor(1j)),
        "q.alpha of the LoRA is a .*complex64.*expected plain real numbers",
    ),
    "alpha NaN": (pair(alpha=torch.tensor(float("nan"))), "q.alpha of the LoRA holds NaN"),
    "NaN": (pair(torch.full((4, 6), float("nan"))), "q.lora_down.weight of the LoRA holds NaN or infinite"),
    "infinite, 8 bits": (pair(torch.full((4, 6), float("inf")).to(torch.float8_e5m2)), "holds NaN or infinite"),
    "NaN, 8 bits": (pair(torch.full((4, 6), float("nan")).to(torch.float8_e4m3fn)), "holds NaN or infinite"),
    "a key that is no text": ({1: DOWN}, "key 1 that is no text"),
    "a list": (pair([1.0]), "q.lora_down.weight of the LoRA is a list, expected a tensor"),
    "nothing": (pair(None), "q.lora_down.weight of the LoRA is a NoneType, expected a tensor"),
    "meta": (pair(torch.ones(4, 6, device="meta")), "q.lora_down.weight of the LoRA has no values"),
    "sparse": (
        pair(DOWN.to_sparse()),
        "q.lora_down.weight of the LoRA is a torch.sparse_coo.*expected plain real numbers",
    ),
    "complex": (pair(DOWN * 1j), "q.lora_down.weight of the LoRA is a .*complex64"),
    "differing experts": (
        experts(torch.ones(4, 6), torch.ones(3, 6)),
        "m.experts.w: the factors of its experts differ in shape",
    ),
    "missing experts": (
        {f"m.experts.{e}.w.lora_{f}.weight": torch.ones(4, 4) for e in (0, 2) for f in "AB"},
        r"experts \[0, 2\], expected all from 0 on",
    ),
    "DoRA": (pair(dora_scale=torch.ones(8)), "q.dora_scale .*Load Instance LoRA in ComfyUI reads such files"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_are_no_lora(case):
    state, message = STATES[case]
    with pytest.raises(LoraError, match=message):
        from_state_dict(state)


def test_metadata_that_cannot_be_read_does_not_matter(tmp_path):
    for text in ("[" * 50_000, '{"a":' * 50_000, "{", "NaN"):
        save_file(pair(), tmp_path / "lora.safetensors", {"hywu": text})
        assert load_lora(tmp_path / "lora.safetensors").metadata == {}


def test_files_say_where_they_are(tmp_path):
    save_file(pair(torch.zeros(0, 6), torch.zeros(8, 0)), tmp_path / "lora.safetensors")
    with pytest.raises(LoraError, match="lora.safetensors: q: the factors"):
        load_lora(tmp_path / "lora.safetensors")


def lora(down=DOWN, up=UP, **fields):
    return InstanceLora({"q": LoraFactor(down.unsqueeze(0), up.unsqueeze(0))}, **fields)


def test_algebra_on_eight_bits():
    """Eight bits hold numbers, not sums: they are widened before anything is computed."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        half = lora(DOWN.to(dtype), UP.to(dtype), scale=0.5)
        mixed = blend([half, lora()], [0.3, 1.0])
        change = mixed.pairs[0].up[0].float() @ mixed.pairs[0].down[0].float()
        torch.testing.assert_close(change, (UP @ DOWN) * (0.5 * 0.3 + 1.0), atol=1e-4, rtol=1e-5)
        assert truncate(mixed, 1).rank == 1 and float(cosine(half, lora())) == pytest.approx(1.0)
        state = pair(DOWN.to(dtype), UP.to(dtype), alpha=torch.tensor(2.0)) | {
            key.replace("q.", "k."): tensor for key, tensor in pair(DOWN.to(dtype), UP.to(dtype)).items()
        }
        read = from_state_dict(state)
        changes = {name: read.scale * p.up[0].float() @ p.down[0].float() for name, p in read.factors.items()}
        torch.testing.assert_close(changes["q"], 0.5 * UP @ DOWN)
        torch.testing.assert_close(changes["k"], UP @ DOWN)


def test_nothing_is_computed_from_what_is_no_number():
    broken = lora(torch.full((4, 6), float("nan")))
    with pytest.raises(
        LoraError, match="q: the factors hold NaN or infinite values, so there is no nearest LoRA of rank 1"
    ):
        truncate(broken, 1)
    with pytest.raises(LoraError, match="weights of a blend must be finite numbers, got nan, 1.0"):
        blend([lora(), lora()], [float("nan"), 1.0])


def test_batches_that_cannot_be_compared():
    two, three = (lora().map(lambda p, n=n: LoraFactor(*(t.expand(n, *t.shape[1:]) for t in p))) for n in (2, 3))
    with pytest.raises(LoraError, match="LoRAs of 2 and of 3 instances cannot be compared"):
        cosine(two, three)
    assert cosine(two, lora()).shape == (2,)


def test_alphas_are_folded_without_rounding():
    """The commonest scale stays a number; the others go into float32 factors, never into sixteen bits."""
    state = {}
    for name, alpha in (("a", 1.0), ("b", 1.0), ("c", 1.3)):
        state |= {f"{name}.lora_down.weight": DOWN.bfloat16(), f"{name}.lora_up.weight": (UP * 1.7).bfloat16()}
        state[f"{name}.alpha"] = torch.tensor(alpha)
    read = from_state_dict(state)
    assert read.scale == 0.25
    assert [p.up.dtype for p in read.pairs] == [torch.bfloat16, torch.bfloat16, torch.float32]
    exact = state["c.lora_up.weight"].double() * (1.3 / 4)
    torch.testing.assert_close(read.pairs[2].up[0].double() * read.scale, exact, atol=0, rtol=1e-6)


def test_convolutions_are_matrices_over_their_kernel():
    read = from_state_dict(pair(torch.ones(4, 6, 3, 3), torch.ones(8, 4, 1, 1)))
    assert read.pairs[0].down.shape == (1, 4, 54) and read.pairs[0].up.shape == (1, 8, 4)
    state = to_state_dict(read)
    assert list(state) == ["q.lora_down.weight", "q.lora_up.weight", "q.alpha"]


def test_two_spellings_of_one_name_in_a_state_add_up():
    state = {f"diffusion_model.{key}": tensor for key, tensor in pair().items()}
    state |= {f"base_model.model.{key}": tensor for key, tensor in pair().items()}
    read = from_state_dict(state)
    assert read.names == ("q",) and read.rank == 8
    torch.testing.assert_close(read.scale * read.pairs[0].up[0] @ read.pairs[0].down[0], 2 * UP @ DOWN)
