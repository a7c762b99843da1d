"""LoRAs of other tools against the host's own loader: every name of its key table, every spelling, every kind of adapter.

Merge gives the stock loader's weights; bypass gives them or refuses by name; nothing differs in silence. -s shows counts.
"""

from collections import Counter

import comfy.utils
import families
import pytest
import torch
from other_tools import (
    KINDS,
    PAIRS,
    STRENGTH,
    able,
    bfl_control,
    changed,
    entries,
    files,
    low_rank,
    model_of,
    noise,
    same_change,
    stock,
    uso,
    wan_fun,
)

from hywu_core import MatchError
from hywu_core.files.lora_files import to_state_dict
from hywu_core.host.lora import foreign
from hywu_core.host.lora.apply import applied_loras, apply_lora, beside
from hywu_core.host.lora.matching import canonical
from hywu_core.host.model import layer_of

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module", params=["flux_double", "qwen_image", "z_image", "wan", "sd3", "sd15", "sdxl"])
def model(request):
    with torch.inference_mode():
        yield model_of(request.param)
    entries.cache_clear()


@pytest.mark.parametrize("spelling", PAIRS)
def test_merge_is_the_stock_loader_for_every_name_and_spelling(model, spelling):
    counts = Counter()
    shaped = {name for name, (*_, shape) in entries(model).items() if len(shape) >= 2}
    assert len(shaped) > 20
    for state in files(model, lambda name, shape: low_rank(name, shape, spelling), shaped):
        merged, matches = apply_lora(model, foreign.read(state), STRENGTH, "merge")
        assert not matches.missing
        exact, total = same_change(model, merged, stock(model, state))
        counts += Counter({"exact": exact, "weights": total, "names": matches.total})
    assert counts["names"] == len(shaped)
    print(f"\n{type(model.model).__name__} {spelling}: {dict(counts)}")


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_stock_loader_for_every_kind(model, kind):
    counts = Counter()
    for state in files(model, KINDS[kind], able(model, kind)):
        expected = stock(model, state)
        merged, matches = apply_lora(model, foreign.read(state), STRENGTH, "merge")
        exact, total = same_change(model, merged, expected)
        counts += Counter(
            {"exact": exact, "weights": total, "names": matches.found, "said to be missing": len(matches.missing)}
        )
    assert counts["names"] or kind in ("LoCon with a middle factor", "norm")
    print(f"\n{type(model.model).__name__} {kind}: {dict(counts)}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "LoRA and bias"])
def test_bypass_refuses_what_cannot_stand_beside_a_layer_and_auto_takes_it(model, kind):
    for state in files(model, KINDS[kind], able(model, kind)):
        with pytest.raises(MatchError, match=r"x .*cannot stand beside a layer. Use the mode merge or auto"):
            apply_lora(model, foreign.read(state), STRENGTH, "bypass")
        same_change(model, apply_lora(model, foreign.read(state), STRENGTH, "auto")[0], stock(model, state))


def test_bypass_is_the_stock_loader_for_every_name_or_refuses_it(model):
    """Name by name: the layer's output with the adapter beside it is that of the stock loader's weight."""
    counts = Counter()
    base = model.model.state_dict()
    for name, (key, _, _, shape) in entries(model).items():
        if len(shape) < 2:
            continue
        state = low_rank(name, shape)
        module = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
        lora = foreign.read(state)
        try:
            patched, _ = apply_lora(model, lora, STRENGTH, "bypass")
        except MatchError as refused:
            assert f"({lora.names[0]})" in str(refused) and layer_of(module) is None
            counts["refused"] += 1
            continue
        change = changed(stock(model, state))[key] - base[key]
        pixels = len(shape) > 2
        x = noise(2, base[key].shape[1], *[3] * (len(shape) - 2)) if pixels else noise(2, 5, base[key].shape[1])
        with beside(model.model.diffusion_model, applied_loras(patched)):
            found = module(x)
        found -= module(x)
        expected = torch.einsum("bi...,oi->bo...", x, change.flatten(1)) if pixels else x @ change.T
        assert (found - expected).norm() <= 1e-3 * expected.norm(), name
        counts["equal"] += 1
    print(f"\n{type(model.model).__name__} bypass: {dict(counts)}")


def test_norms_that_diffusers_keeps_the_other_way_round():
    """The host's table says of some names that scale and shift are swapped there."""
    model = model_of("flux_double")
    name = "transformer.norm_out.linear"
    key, _, function, shape = entries(model)[name]
    assert function is not None
    state = low_rank(name, shape)
    expected = changed(stock(model, state))[key]
    for mode in ("merge", "bypass"):
        patched, _ = apply_lora(model, foreign.read(state), STRENGTH, mode)
        if mode == "merge":
            torch.testing.assert_close(changed(patched)[key], expected)
    lora = canonical(foreign.read(state), model.model)
    assert lora.names == ("final_layer.adaLN_modulation.1",) and not lora.foreign
    torch.testing.assert_close(changed(stock(model, to_state_dict(lora)))[key], expected)


CONVERTED = {
    "BFL control": (families.flux, bfl_control),
    "USO": (families.deep_flux, uso),
    "Wan-Fun": (families.wan, wan_fun),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_files_that_the_host_converts(kind):
    family, make = CONVERTED[kind]
    model = family().model
    state = make(model)
    for mode in ("merge", "auto"):
        patched, matches = apply_lora(model, foreign.read(state), STRENGTH, mode)
        assert not matches.missing and matches.found > 10
        if mode == "merge":
            exact, total = same_change(model, patched, stock(model, state))
            print(f"\n{kind}: {total} weights, {exact} exact, {matches}")
    same_change(model, stock(model, to_state_dict(foreign.read(state))), stock(model, state))
