"""The pocket editor through the host's own nodes: what stock nodes do with any model, they do with this one."""

import inspect
import math
import time

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.sd
import nodes as host_nodes
import pytest
import torch

from hywu_core.bases import pocket
from hywu_core.bases.pocket import editor, text
from hywu_core.bases.pocket.clip import FIRST_WORD, START
from hywu_core.errors import CheckpointError


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        return pocket.load_pocket_editor()


@pytest.fixture
def picture():
    generator = torch.Generator().manual_seed(1)
    return torch.rand((1, 64, 64, 3), generator=generator)


def edit(loaded, pixels, prompt="make it warmer", seed=3, steps=8, reference=True):
    """The quickstart's stock nodes, called as the executor calls them."""
    from comfy_extras.nodes_edit_model import ReferenceLatent

    model, clip, vae = loaded
    with torch.inference_mode():
        (latent,) = host_nodes.VAEEncode().encode(vae, pixels)
        (positive,) = host_nodes.CLIPTextEncode().encode(clip, prompt)
        (negative,) = host_nodes.CLIPTextEncode().encode(clip, "")
        if reference:
            positive = ReferenceLatent.execute(positive, latent).args[0]
        (samples,) = host_nodes.KSampler().sample(
            model, seed, steps, 1.0, "euler", "simple", positive, negative, latent, denoise=1.0
        )
        return host_nodes.VAEDecode().decode(vae, samples)[0]


def test_it_is_the_hosts_own_flux(loaded):
    model, clip, vae = loaded
    assert type(model.model) is comfy.model_base.Flux
    assert type(model.model.diffusion_model) is comfy.ldm.flux.model.Flux
    assert type(clip) is comfy.sd.CLIP
    assert isinstance(vae, comfy.sd.VAE)
    flux = model.model.diffusion_model
    assert (flux.hidden_size, flux.num_heads, flux.patch_size, len(flux.double_blocks)) == (128, 4, 4, 4)
    assert sum(parameter.numel() for parameter in flux.parameters()) == 2_503_216
    assert model.model.latent_format.latent_channels == 3


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 64), (96, 36), (128, 128)])
def test_samples_any_size_of_whole_patches(loaded, height, width):
    pixels = torch.rand((1, height, width, 3), generator=torch.Generator().manual_seed(0))
    result = edit(loaded, pixels)
    assert result.shape == pixels.shape
    assert torch.isfinite(result).all()
    assert 0 <= result.min() and result.max() <= 1


def test_other_sizes_are_cropped_to_whole_patches(loaded):
    pixels = torch.rand((1, 61, 66, 3), generator=torch.Generator().manual_seed(0))
    assert edit(loaded, pixels).shape == (1, 60, 64, 3)
    _, _, vae = loaded
    assert torch.equal(vae.decode(vae.encode(pixels)).clamp(0, 1), (pixels[:, :60, 1:65] * 2 - 1 + 1) / 2)


def test_a_batch_of_pictures(loaded):
    pixels = torch.rand((3, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    assert edit(loaded, pixels).shape == pixels.shape


def test_the_same_inputs_give_the_same_picture(loaded, picture):
    assert torch.equal(edit(loaded, picture), edit(loaded, picture))


def test_reference_and_prompt_reach_the_picture(loaded, picture):
    result = edit(loaded, picture)
    assert not torch.equal(result, edit(loaded, picture, prompt="make it cooler"))
    assert not torch.equal(result, edit(loaded, picture.flip(2)))
    assert not torch.equal(result, edit(loaded, picture, reference=False))


def test_eight_steps_take_under_a_second(loaded, picture):
    edit(loaded, picture)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        edit(loaded, picture)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_the_host_can_load_every_part_again(loaded):
    model, clip, vae = loaded
    for patcher in (model, clip.patcher, vae.patcher):
        function, arguments = patcher.cached_patcher_init
        assert "disable_dynamic" in inspect.signature(function).parameters
        again = function(*arguments, disable_dynamic=True).model.state_dict()
        for name, tensor in patcher.model.state_dict().items():
            assert torch.equal(tensor, again[name]), name
    assert model.clone(force_deepcopy=True).model is not model.model


def test_the_memory_estimate_fits_a_tiny_model(loaded):
    model, _, _ = loaded
    assert model.model.memory_required([2, 3, 64, 64]) < 64 * 1024**2


def test_adapters_on_the_image_stream_change_the_picture(loaded, picture):
    """Otherwise a generated LoRA could not be seen working before the weights are trained."""
    model, clip, vae = loaded
    patched = model.clone()
    key = "diffusion_model.double_blocks.3.img_mlp.2.weight"
    patched.add_patches({key: (0.5 * torch.randn((128, 512), generator=torch.Generator().manual_seed(0)),)})
    change = (edit((patched, clip, vae), picture) - edit(loaded, picture)).abs().mean()
    assert change > 0.01


def test_words_are_tokens_and_other_words_are_spelled(loaded):
    _, clip, _ = loaded
    (section,) = clip.tokenize("Make it warmer, zyzzyva é")["pocket"]
    ids = [token for token, _ in section]
    words = clip.tokenizer.pocket.tokenizer
    assert len(ids) == 32 and ids[0] == START
    assert ids[1:4] == [words.words[word] for word in ("make", "it", "warmer")]
    assert words.decode(ids) == "make it warmer , zyzzyva é"


@pytest.mark.parametrize("typed", ["brightem", "brihgten", "brigten", "brightenn"])
def test_a_mistyped_word_is_read_as_the_one_that_was_meant(loaded, typed):
    words = loaded[1].tokenizer.pocket.tokenizer
    assert words.read(typed) == words.words["brighten"]


def test_right_and_short_words_are_never_read_as_others(loaded):
    words = loaded[1].tokenizer.pocket.tokenizer
    assert words.read("hat") == words.words["hat"] and words.read("hst") is None
    assert all(words.read(word) == token for word, token in list(words.words.items())[:2000])


def test_words_of_like_meaning_are_alike(loaded):
    _, clip, _ = loaded

    def likeness(one, other):
        first, second = (clip.encode_from_tokens(clip.tokenize(t), return_pooled=True)[1] for t in (one, other))
        return float(torch.cosine_similarity(first, second))

    assert likeness("make it blurry", "soft focus") > likeness("make it blurry", "add a hat") + 0.2
    assert likeness("vivid colours", "make it colourful") > likeness("vivid colours", "where is the dog") + 0.2
    # words that tell little hardly matter
    assert likeness("brighten", "could you please brighten it") > 0.9


def test_order_is_in_the_tokens_and_silence_is_nothing(loaded):
    _, clip, _ = loaded

    def encoded(prompt):
        return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)

    one, other = encoded("warm light and cool shadow"), encoded("cool light and warm shadow")
    assert torch.allclose(one[1], other[1], atol=1e-4) and not torch.allclose(one[0], other[0], atol=0.1)
    assert all(tensor.count_nonzero() == 0 for tensor in encoded(""))


def test_a_token_means_the_same_whatever_pads_it(loaded):
    """Padding is masked, so a prompt's own tokens do not depend on the section's length."""
    _, clip, _ = loaded
    encoder = clip.cond_stage_model.pocket
    with torch.inference_mode():
        short, long = encoder([[1, 300, 301, 2]])[0], encoder([[1, 300, 301, 2, 0, 0, 0]])[0]
    assert torch.allclose(short, long[:, :4], atol=1e-6)


def test_long_prompts_take_more_sections(loaded):
    _, clip, _ = loaded
    cond, pooled = clip.encode_from_tokens(clip.tokenize("make it warmer " * 20), return_pooled=True)
    assert cond.shape == (1, 64, 64) and pooled.shape == (1, 64)
    assert torch.isfinite(cond).all()


def test_prompt_weights_work_as_in_any_stock_encoder(loaded):
    _, clip, _ = loaded
    plain, strong = (clip.encode(prompt) for prompt in ("make it warmer", "make it (warmer:1.5)"))
    changed = (plain - strong).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [3]


def test_save_and_load_give_the_same_weights(tmp_path):
    config = editor.EditorConfig(width=64, heads=2, depth=2)
    built = pocket.build_editor(config, seed=5)
    path = pocket.save_editor(
        built.model.diffusion_model.state_dict(), config, tmp_path / "editor.safetensors", dtype=torch.float32
    )
    loaded = pocket.load_editor(path).model.diffusion_model
    assert (loaded.num_heads, len(loaded.double_blocks)) == (2, 2)
    for name, tensor in built.model.diffusion_model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_table_of_words_keeps_its_numbers_to_a_byte(tmp_path):
    config = text.TextConfig(words=("make", "warm"), before=8)
    state = text.initial_state(config, 1)
    path = pocket.save_text_encoder(state, config, tmp_path / "words.safetensors")
    clip = pocket.load_text_encoder(path)
    kept = clip.cond_stage_model.pocket.transformer.state_dict()[text.TABLE]
    assert kept.shape == (FIRST_WORD + 2, 56)
    torch.testing.assert_close(kept, state[text.TABLE], rtol=0, atol=float(state[text.TABLE].abs().max()) / 254 + 1e-6)
    assert clip.tokenizer.pocket.tokenizer.read("wram") == FIRST_WORD + 1


def test_the_same_seed_gives_the_same_weights():
    config = editor.EditorConfig(depth=1)
    first, again, other = (editor.initial_state(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["img_in.weight"], other["img_in.weight"])


def test_gradients_reach_every_weight_of_the_text_encoder():
    clip = pocket.build_text_encoder(text.TextConfig(words=("make", "warm")))
    transformer = clip.cond_stage_model.pocket.transformer.requires_grad_(True)
    out = clip.cond_stage_model.encode_token_weights(clip.tokenize("make warm"))
    (out[0].square().sum() + out[1].square().sum()).backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None and math.isfinite(parameter.grad.abs().sum()), name


@pytest.mark.parametrize("part", ["editor", "text"])
def test_files_of_the_wrong_kind_are_refused(tmp_path, part):
    files, load = pocket.pocket_files(), {"editor": pocket.load_editor, "text": pocket.load_text_encoder}[part]
    other = files.text if part == "editor" else files.editor
    with pytest.raises(CheckpointError, match="is not a pocket"):
        load(other)
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes(getattr(files, part).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load(truncated)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "none.safetensors")


def test_missing_and_misshaped_weights_are_named(tmp_path):
    config = editor.EditorConfig(depth=1)
    state = editor.initial_state(config, 0)
    state["img_in.weight"] = state["img_in.weight"][:, :-1]
    del state["final_layer.linear.weight"]
    path = pocket.save_editor(state, config, tmp_path / "editor.safetensors")
    with pytest.raises(CheckpointError, match=r"missing final_layer\.linear\.weight.*img_in\.weight has the shape"):
        pocket.load_editor(path)
