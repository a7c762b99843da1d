"""The short way: one node's worth of work equals the nodes that it stands for."""

import nodes as host_nodes
import pytest
import torch
from comfy_extras.nodes_edit_model import ReferenceLatent

from hywu_core.bases import pocket
from hywu_core.errors import ConditionError
from hywu_core.host import conditions, edit, memory
from hywu_core.host.folders import SHIPPED
from hywu_core.host.lora import apply
from hywu_core.host.lora.apply import applied_loras

WORDS = "make the colours warm"


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        return pocket.load_pocket_editor()


@pytest.fixture
def picture():
    return torch.rand((1, 32, 48, 3), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["", "-told"], ids=["blind", "told"])
def handle(request):
    return memory.load(SHIPPED / f"pocket-generator{request.param}.safetensors")


def long_way(loaded, handle, picture, strength=1.0):
    """(MODEL, positive, negative, latent, LoRA) by the nodes that HYWUEdit stands for."""
    model, clip, vae = loaded
    (latent,) = host_nodes.VAEEncode().encode(vae, picture)
    told, silent = (
        ReferenceLatent.execute(host_nodes.CLIPTextEncode().encode(clip, text)[0], latent).args[0]
        for text in (WORDS, "")
    )
    lora = memory.generate(handle, conditions.from_host(told))
    patched, _ = apply.apply_lora(model, lora, strength)
    return patched, silent if handle.name == "pocket-generator.safetensors" else told, silent, latent, lora


def sampled(model, positive, negative, latent):
    with torch.inference_mode():
        return host_nodes.KSampler().sample(model, 3, 2, 1.0, "euler", "simple", positive, negative, latent)[0][
            "samples"
        ]


def test_it_is_the_long_way_bit_for_bit(loaded, handle, picture):
    model, clip, vae = loaded
    words, given = edit.Words(clip=clip, instruction=WORDS), edit.Picture(image=picture, vae=vae)
    with torch.inference_mode():
        done = edit.edit(model, handle, words, given, edit.How(0.5))
        expected = long_way(loaded, handle, picture, 0.5)
    assert torch.equal(sampled(*done[:4]), sampled(*expected[:4]))
    assert done.lora.metadata["instruction"] == WORDS
    assert not applied_loras(model)


def test_another_strength_does_not_generate_again_and_other_words_do(loaded, handle, picture, monkeypatch):
    model, clip, vae = loaded
    written = []
    real = edit.generate
    monkeypatch.setattr(edit, "generate", lambda *args: written.append(args) or real(*args))
    given = edit.Picture(image=picture, vae=vae)
    with torch.inference_mode():
        for strength, words in ((1.0, WORDS), (0.3, WORDS), (0.3, "make it gray"), (1.0, WORDS)):
            edit.edit(model, handle, edit.Words(clip=clip, instruction=words), given, edit.How(strength))
    assert len(written) == 3


def test_encoded_words_and_a_latent_are_taken_as_they_are(loaded, handle, picture):
    model, clip, vae = loaded
    with torch.inference_mode():
        expected = long_way(loaded, handle, picture)
        told, empty = (host_nodes.CLIPTextEncode().encode(clip, text)[0] for text in (WORDS, ""))
        by_latent = edit.edit(model, handle, edit.Words(told, empty=empty), edit.Picture(expected[3]), edit.How())
        on_it = ReferenceLatent.execute(told, expected[3]).args[0]
        by_reference = edit.edit(model, handle, edit.Words(on_it, empty=empty), edit.Picture(), edit.How())
    for done in (by_latent, by_reference):
        assert torch.equal(sampled(*done[:4]), sampled(*expected[:4]))


def test_what_is_missing_or_given_twice_is_named(loaded, picture):
    model, clip, vae = loaded
    handle = memory.load(SHIPPED / "pocket-generator.safetensors")
    (latent,) = host_nodes.VAEEncode().encode(vae, picture)
    (told,) = host_nodes.CLIPTextEncode().encode(clip, WORDS)
    both = ReferenceLatent.execute(told, latent).args[0]
    here = edit.Picture(latent)
    cases = [
        (edit.Words(), here, "Wire the encoded instruction into conditioning, or clip"),
        (edit.Words(clip=clip, instruction="  "), here, "instruction is empty"),
        (edit.Words(told), here, "no empty prompt.*Wire clip, or the encoded empty prompt"),
        (edit.Words(told, clip), edit.Picture(), "no source picture"),
        (edit.Words(told, clip), edit.Picture(image=picture), "Wire vae"),
        (edit.Words(told, clip), edit.Picture(latent, picture, vae), "given twice"),
        (edit.Words(both, clip), here, "holds a source picture already"),
    ]
    for words, given, said in cases:
        with pytest.raises(ConditionError, match=said):
            edit.edit(model, handle, words, given, edit.How())
