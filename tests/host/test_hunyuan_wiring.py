"""What may be wired wrongly around HunyuanImage-3, and what is then said."""

import comfy.model_management
import comfy.sample
import hunyuan_tiny as tiny
import nodes as host_nodes
import pytest
import torch

from hywu_core.bases.hunyuan_image3 import for_sampler, from_conditioning, load, loader
from hywu_core.bases.hunyuan_image3.convert import convert
from hywu_core.bases.hunyuan_image3.edit import to_conditioning
from hywu_core.errors import CheckpointError, ConditionError
from hywu_core.host.conditions import from_host

pytestmark = pytest.mark.usefixtures("inference")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("hunyuan") / "base")


@pytest.fixture(scope="module")
def base(folder):
    with torch.inference_mode():
        model, _, encoder = load(folder, torch.float32)
        return model, tiny.golden_edit(encoder)


def sample(base, positive, negative):
    model, edit = base
    _, _, latent = for_sampler(edit)
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    return comfy.sample.sample(model, noise, 1, 3.0, "euler", "simple", positive, negative, latent["samples"], seed=0)


def test_zeroed_out_it_is_the_one_without_the_instruction(base):
    positive, negative, _ = for_sampler(base[1])
    (zeroed,) = host_nodes.ConditioningZeroOut().zero_out(positive)
    assert torch.equal(sample(base, positive, zeroed), sample(base, positive, negative))
    with pytest.raises(ConditionError, match="zeroed out"):
        from_conditioning(zeroed)


def test_averaged_or_joined_it_is_refused(base):
    edit = base[1]
    positive, negative, _ = for_sampler(edit)
    other = to_conditioning(edit._replace(request=edit.request._replace(prompt="another instruction")))
    (averaged,) = host_nodes.ConditioningAverage().addWeighted(positive, other, 0.5)
    (joined,) = host_nodes.ConditioningConcat().concat(positive, other)
    for changed in (averaged, joined):
        with pytest.raises(ConditionError, match="cannot be averaged or joined"):
            from_conditioning(changed)
        with pytest.raises(ConditionError, match="cannot be averaged or joined"):
            sample(base, changed, negative)


@pytest.mark.parametrize("with_model", [False, True])
def test_a_generator_is_told_to_read_it_through_its_own_node(base, with_model):
    model, edit = base
    with pytest.raises(ConditionError, match="into HunyuanImage-3 Condition"):
        from_host(to_conditioning(edit), model=model if with_model else None)


def test_an_official_folder_that_does_not_fit_into_memory_is_refused(folder, monkeypatch, tmp_path):
    config = loader.inspect_base(folder).config
    matrices = 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size
    banks = config.num_hidden_layers * matrices * torch.bfloat16.itemsize
    files = loader.inspect_base(folder)
    assert files.memory_of_its_own(torch.bfloat16) == banks  # everything else stays mapped, as it is stored
    assert files.memory_of_its_own(torch.float32) > 2 * banks
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda dev=None, torch_free_too=False: banks - 1)
    with pytest.raises(CheckpointError, match="convert_hunyuan_image3.py .* --format fp8"):
        loader.load_model(folder, torch.bfloat16)
    converted = convert(folder, tmp_path / "fp8", "fp8", CPU, lambda _: None)
    assert loader.inspect_base(converted).memory_of_its_own(torch.bfloat16) == 0
    assert loader.load_model(converted, torch.bfloat16)


def test_the_banks_on_their_way_are_counted_as_they_are_stored(folder, tmp_path):
    official = loader.load_model(folder, torch.bfloat16).model
    quantised = loader.load_model(convert(folder, tmp_path / "fp8", "fp8", CPU, lambda _: None), torch.bfloat16).model
    config = official.config
    numbers = config.num_experts * 3 * config.moe_intermediate_size * config.hidden_size
    assert official.diffusion_model.model.layers[0].mlp.experts.stored_bytes() == 2 * numbers
    scales = 2 * 1024  # of the two banks; the host keeps each tensor at a boundary of its own
    assert quantised.diffusion_model.model.layers[0].mlp.experts.stored_bytes() == numbers + scales
    shape = [2, 8, 1, 14, 18]
    assert official.memory_required(shape) - quantised.memory_required(shape) == 2 * (numbers - scales)
