"""The pairs of the training nodes, from the host's lists: sizes, buckets, what is wrong with them."""

import comfy.model_management
import pytest
import torch
from families import flux
from training_runs import interrupted_after, new, pairs, run, same

from hywu_core.host.training import pairs_of_lists
from hywu_core.host.training.objective import DiffusionObjective

pytestmark = pytest.mark.usefixtures("output")


def of_two_sizes(family, wide=4, tall=4):
    """Pairs as `pairs` makes them, some of which are wide and some tall, in turn."""
    latents, positive = pairs(family, wide + tall)
    kinds = [index % 2 == 0 for index in range(2 * min(wide, tall))] + [wide > tall] * abs(wide - tall)
    for latent, entry, is_wide in zip(latents, positive, kinds, strict=True):
        part = (..., slice(None), slice(2)) if is_wide else (..., slice(2), slice(None))
        latent["samples"] = latent["samples"][part]
        entry[0][1]["reference_latents"] = [entry[0][1]["reference_latents"][0][part]]
    return latents, positive


def test_pictures_of_two_sizes_train_in_batches_of_one(monkeypatch):
    family = flux(channels=16)
    latents, positive = of_two_sizes(family)
    sizes = {tuple(latent["samples"].shape) for latent in latents}
    assert len(sizes) == 2
    handle, passes = new(family, positive), []
    losses = DiffusionObjective._losses
    monkeypatch.setattr(
        DiffusionObjective,
        "_losses",
        lambda self, noised, right: (passes.append(noised.latents.shape), losses(self, noised, right))[1],
    )
    whole = run(family, handle, latents, positive, steps=8, name="whole")
    trained = [shape for shape in passes if len(shape) and shape[0] == 4]
    assert len(trained) >= 8 and len({shape[1:] for shape in trained}) == 2, "a pass for each batch of four"
    assert not [shape for shape in passes if shape[0] not in (4,)], "no batch was taken apart"
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        interrupted_after(3, lambda: run(family, handle, latents, positive, steps=8, name="paused"))
    again = run(family, handle, latents, positive, steps=8, name="paused")
    assert same(whole.handle, again.handle)


def test_one_odd_pair_costs_one_more_pass_and_its_batch_has_the_same_gradients():
    family = flux(channels=16)
    latents, positive = of_two_sizes(family, wide=5, tall=1)
    together = run(family, new(family, positive), latents, positive, steps=3, batch=6, name="together")
    alone = run(family, new(family, positive), latents, positive, steps=3, batch=6, micro_batch=1, name="alone")
    assert together.losses["loss"] == pytest.approx(alone.losses["loss"], rel=1e-4)


def wrong_pairs(family):
    """{what is wrong: (latents, positive, generator_positive, words of the error)}."""
    latents, positive = pairs(family)
    ((tokens, options),) = positive[1]
    other = [[tokens, options | {"reference_latents": [torch.zeros(1, 16, 4, 8)]}]]
    odd = [{"samples": torch.zeros(1, 16, 7, 8)}, *latents[1:]]
    return {
        "none": ([], [], None, "no training pairs"),
        "one": (latents[:1], positive[:1], None, "one training pair"),
        "fewer conditionings": (latents, positive[:4], None, "6 latents but 4 of positive"),
        "fewer for the generator": (latents, positive, positive[:2], "6 latents but 2 of generator_positive"),
        "a batch without entries": (
            [{"samples": torch.zeros(3, 16, 8, 8)}] * 2, positive[:2], None, "holds 3 pictures, but positive 1 holds 1"),
        "another size than its source": (latents, [positive[0], other, *positive[2:]], None, "pair 2 has a latent of 8 x 8"),
        "an odd size": (odd, positive, None, "of pair 1 has 7 x 8 rows and columns, which are no multiples"),
        "another VAE": ([{"samples": torch.zeros(1, 4, 8, 8)}] * 6, positive, None, "works on 16 channels"),
        "not finite": ([{"samples": v["samples"] / 0} for v in latents], positive, None, "NaN or infinity"),
        "a batched conditioning": (
            latents, [[[tokens.expand(2, -1, -1), options]], *positive[1:]], None, "batch of 2"),
        "a ControlNet": (
            latents, [[[tokens, options | {"control": object()}]], *positive[1:]], None, "pair 1 carries control"),
        "a mask and a strength": (
            latents, [[[tokens, options | {"mask": tokens, "strength": 0.5}]], *positive[1:]], None, "mask, strength"),
        "several conditions": (
            latents, positive, [[[tokens.expand(2, -1, -1), options]], *positive[1:]], "reads of pair 1 is a batch of 2"),
    }  # fmt: skip


def test_wrong_pairs_are_one_clear_error_each():
    family = flux(channels=16)
    handle = new(family, pairs(family)[1])
    for what, (latents, positive, reads, words) in wrong_pairs(family).items():
        with pytest.raises(pairs_of_lists.PairError, match=words):
            run(family, handle, latents, positive, reads)
            pytest.fail(what)


def test_buckets_and_one_conditioning_for_all():
    family = flux(channels=16)
    latents, positive = pairs(family)
    config = new(family, positive).config
    apart = pairs_of_lists.host_pairs(family.model, config, latents, positive)
    bucket = [{"samples": torch.cat([value["samples"] for value in latents])}]
    together = pairs_of_lists.host_pairs(family.model, config, bucket, [[entry for (entry,) in positive]])
    blind = pairs_of_lists.host_pairs(family.model, config, latents, [positive[0]], positive)
    for one, two, three in zip(apart.samples, together.samples, blind.samples, strict=True):
        assert torch.equal(one.latent, two.latent) and torch.equal(one.condition, two.condition)
        assert torch.equal(one.condition, three.condition)
        assert torch.equal(three.conditioning[0], positive[0][0][0])
    assert len(set(apart.instructions)) == 2


def test_what_pairs_have_in_common_is_kept_once_and_conditions_in_half_their_size():
    family = flux(channels=16)
    latents, positive = pairs(family)
    kept = pairs_of_lists.host_pairs(family.model, new(family, positive).config, latents, positive).kept
    assert kept[0].entry[0] is kept[2].entry[0] and kept[0].entry[0] is not kept[1].entry[0]
    words, picture = kept[0].condition.parts
    assert words.tokens is kept[2].condition.parts[0].tokens and words.tokens.dtype == torch.bfloat16
    assert picture.tokens is kept[0].entry[1]["reference_latents"][0]


def test_a_mixed_batch_passes_through_the_base_shape_by_shape(monkeypatch):
    family, passes = flux(channels=16), []
    latents, positive = pairs(family)
    for index in (1, 4):
        ((tokens, options),) = positive[index]
        latents[index] = {"samples": torch.randn(1, 16, 4, 12)}
        positive[index] = [[tokens, options | {"reference_latents": [torch.randn(1, 16, 4, 12)]}]]
    apply = family.model.model.apply_model
    monkeypatch.setattr(
        family.model.model, "apply_model", lambda x, *a, **k: passes.append(len(x)) or apply(x, *a, **k)
    )
    run(family, new(family, positive), latents, positive, steps=2, batch=6)
    # before the second of each step, the base's own loss
    assert sorted(passes) == [2] * 4 + [4] * 4


def test_pairs_may_have_sizes_of_their_own():
    family = flux(channels=16)
    latents, positive = pairs(family)
    ((tokens, options),) = positive[0]
    latents[0] = {"samples": torch.randn(1, 16, 4, 12)}
    positive[0] = [[tokens, options | {"reference_latents": [torch.randn(1, 16, 4, 12)]}]]
    trained = run(family, new(family, positive), latents, positive, steps=3, batch=6)
    assert all(loss == loss for loss in trained.losses["loss"])
