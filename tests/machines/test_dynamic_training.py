"""Training where the host streams weights through buffers that it uses again: gradients are those of a base that stays."""

from contextlib import nullcontext

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import families
import folder_paths
import pytest
import torch
from dynamic import dynamic_vram

from hywu_core import InstanceLora, LoraFactor
from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.errors import MatchError
from hywu_core.host import memory
from hywu_core.host.training import in_server, objective
from hywu_core.training import Sample, SessionOptions, TrainConfig
from hywu_core.training.data import Draw
from hywu_core.training.trainable import leaves


def draws():
    """Two samples of one size for the pocket editor."""
    source, found = torch.Generator().manual_seed(0), []
    for index in range(2):
        words, options = families.conditioning(64, 64, seed=index)[0]
        picture = torch.randn(1, 3, 16, 16, generator=source)
        entry = [words, options | {"reference_latents": [picture]}]
        sample = Sample(torch.randn(3, 16, 16, generator=source), entry, words[0])
        found.append(Draw(sample, torch.Generator().manual_seed(index)))
    return found


def lora():
    source = torch.Generator().manual_seed(1)
    factors = {}
    for block in range(4):
        for name, (rows, columns) in {"img_attn.qkv": (3, 1), "img_mlp.0": (4, 1), "img_mlp.2": (1, 4)}.items():
            down, up = (
                torch.randn(2, *shape, generator=source) * 0.1 for shape in ((4, 128 * columns), (128 * rows, 4))
            )
            factors[f"double_blocks.{block}.{name}"] = LoraFactor(down, up)
    return InstanceLora(factors, 2.0)


def gradients(model, stack=None):
    """(losses, gradients of the factors)."""
    made, found = objective.DiffusionObjective(model, stack), leaves(lora())
    made.prepare()
    losses = made.backward(found, draws(), 0.5)
    return losses, [factor.grad for pair in found.pairs for factor in pair]


@pytest.fixture(scope="module")
def expected():
    found = gradients(load_pocket_editor()[0])
    comfy.model_management.unload_all_models()
    return found


class StreamingPatcher(comfy.model_patcher.ModelPatcher):
    """As the host's dynamic patcher treats layers whose weights are not on the device: every layer that runs finds its weight
    at the head of one buffer, over the weight of the layer that ran before it.
    """

    def is_dynamic(self):
        return True

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        for module in self.model.modules():
            module.streams = True


@pytest.fixture
def streaming(monkeypatch):
    """A host that streams; `load` gives the pocket editor there."""
    buffer, cast = torch.empty(1 << 22, dtype=torch.uint8), comfy.ops.cast_bias_weight

    def cast_into_buffer(module, *args, **kwargs):
        weight, *others = cast(module, *args, **kwargs)
        if not getattr(module, "streams", False):
            return weight, *others
        place = buffer[: weight.nbytes].view(weight.dtype).view(weight.shape)
        # no version counter notices what the device's own copies do
        place.data.copy_(weight.detach())
        return place.detach(), *others

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_into_buffer)
    with dynamic_vram():
        yield lambda: streamed(load_pocket_editor()[0])


def streamed(model):
    found = StreamingPatcher(model.model, model.load_device, model.offload_device)
    found.cached_patcher_init = model.cached_patcher_init
    found.force_cast_weights = True
    return found


@pytest.mark.parametrize("stack", [None, "all"])
def test_weights_that_come_and_go_are_fetched_again_for_the_backward_pass(streaming, expected, monkeypatch, stack):
    monkeypatch.setattr(objective, "differentiable_base", lambda patcher: patcher)
    losses, found = gradients(streaming(), stack)
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found, expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_weights_that_are_remembered_are_others_by_then(streaming, expected, monkeypatch):
    """Or this machine would show nothing."""
    monkeypatch.setattr(objective, "differentiable_base", lambda patcher: patcher)
    monkeypatch.setattr(objective, "frozen", lambda patcher: nullcontext())
    losses, found = gradients(streaming())
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-5)
    assert any(
        not torch.allclose(one, other, rtol=0.1, atol=1e-4) for one, other in zip(found, expected[1], strict=True)
    )


@pytest.mark.parametrize("stack", [None, "all"])
def test_gradients_are_those_of_a_base_that_stays(streaming, expected, stack):
    model = streaming()
    assert model.is_dynamic() and not objective.differentiable_base(model).is_dynamic()
    losses, found = gradients(model, stack)
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found, expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_base_that_can_only_be_streamed_is_refused(streaming, monkeypatch):
    model = streaming()
    kept, model.cached_patcher_init = model.cached_patcher_init, None
    with pytest.raises(MatchError, match="cannot load it again"):
        objective.differentiable_base(model)
    model.cached_patcher_init = kept
    monkeypatch.setattr(StreamingPatcher, "clone", lambda self, **_: self)
    with pytest.raises(MatchError, match="--disable-dynamic-vram"):
        objective.differentiable_base(model)


def test_a_session_trains_there(streaming, tmp_path, monkeypatch):
    """In inference mode, as nodes run, with pictures on the way."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    with torch.inference_mode():
        model, clip, vae = load_pocket_editor()
        model = streamed(model)
        source = vae.encode(torch.rand(1, 16, 16, 3))
        words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("darker", "brighter")]
        positive = [[[entry[0], entry[1] | {"reference_latents": [source]}]] for (entry,) in words]
        latents = [{"samples": source * 0.5}, {"samples": source}]
        handle = memory.new_for(model, positive[0], "instruction", 0, rank=2, alpha=4.0)
        how, options = TrainConfig(steps=2, batch=2, warmup=0), SessionOptions(validate_every=1)
        found = in_server.train_on_lists(model, handle, latents, positive, None, how, options, "run", vae=vae)
    assert found.steps == 2 and len(list((tmp_path / "output" / "hywu" / "run").glob("*.png"))) == 2
