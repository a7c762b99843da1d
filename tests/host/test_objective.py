"""The training objective on tiny random instances of the host's own model families: exact where exactness exists."""

import comfy.model_management
import comfy.model_sampling
import families
import pytest
import torch

from hywu_core import Generator, InstanceLora
from hywu_core.errors import MatchError
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.training.objective import DiffusionObjective, pass_room, prediction_spread
from hywu_core.training import GeneratorTrainable, Sample, SharedLora, TrainConfig, Trainer
from hywu_core.training.data import Draw, batch_of
from hywu_core.training.trainable import leaves

NAMES = ("flux_double", "qwen_image", "wan")


@pytest.fixture(params=NAMES)
def family(request):
    return families.FAMILIES[request.param]()


class Pairs:
    """Random latents, each with a conditioning of its own."""

    def __init__(self, family, count=4):
        source = torch.Generator().manual_seed(3)
        self.latents = torch.randn(count, *family.latent.shape[1:], generator=source)
        self.words = [families.conditioning(12, 8, seed=20 + index)[0] for index in range(count)]

    def __len__(self):
        return len(self.latents)

    def sample(self, index, source):
        return Sample(self.latents[index], self.words[index], self.words[index][0][0], f"pair {index}")


def draws(family, count=2):
    return batch_of(Pairs(family), 0, 0, count, slice(None))


def generator(family, **changes):
    return Generator(families.generator_config(family, **changes)).initialize()


def trainer(family, made=None, objective=None, **changes):
    config = TrainConfig(**{"steps": 25, "batch": 2, "learning_rate": 1e-2, "warmup": 2} | changes)
    trainable = GeneratorTrainable(made or generator(family))
    return Trainer(trainable, objective or DiffusionObjective(family.model), Pairs(family), config)


def test_the_loss_is_the_flow_matching_loss(family):
    objective = DiffusionObjective(family.model)
    objective.prepare()
    found = objective.evaluate(None, draws(family), percent=0.5)
    base, sigma = family.model.model, family.model.model.model_sampling.percent_to_sigma(0.5)
    for index, draw in enumerate(draws(family)):
        noise = torch.randn(draw.sample.latent.shape, generator=draw.source)
        clean = base.process_latent_in(draw.sample.latent[None])[0]
        noisy = sigma * noise + (1 - sigma) * clean
        tokens, options = draw.sample.conditioning
        conds = base.extra_conds(cross_attn=tokens, noise=noisy[None], device=noisy.device, **options)
        inputs = {name: cond.process_cond(batch_size=1, area=None).cond for name, cond in conds.items()}
        with torch.inference_mode():
            denoised = base.apply_model(noisy[None], torch.tensor([sigma]), **inputs)
        velocity = (noisy - denoised[0]) / sigma  # of a flow model: noise - clean
        assert float(found[index]) == pytest.approx(float((velocity - (noise - clean)).square().mean()), rel=1e-4)


def test_at_step_0_the_output_is_the_bases_bit_for_bit(family):
    lora = GeneratorTrainable(generator(family)).lora([draw.sample for draw in draws(family)])
    objective = DiffusionObjective(family.model)
    objective.prepare()
    alone = objective.evaluate(None, draws(family))
    beside = objective.evaluate(leaves(lora), draws(family))
    assert torch.equal(alone, beside)


def test_every_sample_has_its_own_lora_in_one_pass(family):
    lora = InstanceLora(
        {
            name: tuple(torch.cat(parts) for parts in zip(one, two, strict=True))
            for (name, one), two in zip(
                families.random_lora(family, 1).factors.items(), families.random_lora(family, 2).pairs, strict=True
            )
        },
        2.0,
    )
    objective = DiffusionObjective(family.model)
    objective.prepare()
    together = objective.evaluate(lora, draws(family))
    apart = torch.cat([objective.evaluate(lora.select(i), draws(family)[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert float((together - objective.evaluate(None, draws(family))).abs().max()) > 1e-4


def test_training_sees_the_lora_as_sampling_does(family):
    lora = families.random_lora(family, 1)
    patched, _ = apply_lora(family.model, lora, mode="merge")
    merged = DiffusionObjective(patched)
    merged.prepare()
    expected = merged.evaluate(None, draws(family))
    objective = DiffusionObjective(family.model)
    objective.prepare()
    torch.testing.assert_close(objective.evaluate(lora, draws(family)), expected, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences(family):
    """Through the base's blocks; in float32, as the host computes, so along the gradient and not to the last digit."""
    objective = DiffusionObjective(family.model)
    objective.prepare()
    leaf = leaves(families.random_lora(family, 1))
    objective.backward(leaf, draws(family), 0.5)
    factors = [factor for pair in leaf.pairs for factor in pair]
    gradients = [
        torch.zeros_like(f) if f.grad is None else f.grad for f in factors
    ]  # a last block may not use its text
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert float(length) > 0

    def loss(step):
        values = iter([gradient * (step / length) for gradient in gradients])
        moved = leaf.map(lambda pair: type(pair)(*(factor.detach() + next(values) for factor in pair)))
        return float(objective.evaluate(moved, draws(family)).double().mean())

    slope = (loss(5e-3) - loss(-5e-3)) / 1e-2
    assert slope == pytest.approx(float(length), rel=2e-2)


def test_what_is_followed_is_what_the_base_predicts_with_that_lora(family):
    objective = DiffusionObjective(family.model)
    objective.prepare()
    leaf, shown = leaves(families.random_lora(family, 1)), families.random_lora(family, 2)
    same = objective.backward(leaf, draws(family), 0.5, leaf.map(lambda pair: type(pair)(*(f.detach() for f in pair))))
    assert not same.any(), "what it predicts with this LoRA is what it predicts with it"
    assert not any(factor.grad.any() for pair in leaf.pairs for factor in pair if factor.grad is not None)
    found = objective.backward(leaf, draws(family), 0.5, shown)
    noised = objective._noised(draws(family), None)
    with torch.no_grad():
        predicted = []
        for lora in (leaf, shown):
            with objective.in_training(lora, noised.sigma):
                predicted.append(objective._denoised(noised))
    expected = ((predicted[0] - predicted[1]) / noised.sigma.view(-1, *[1] * (predicted[0].ndim - 1))).square()
    torch.testing.assert_close(found, expected.flatten(1).mean(1), rtol=1e-5, atol=1e-8)
    assert float(found.min()) > 0 and all(
        factor.grad is None or factor.grad.isfinite().all() for factor in leaf.pairs[0]
    )
    assert not any(factor.requires_grad for pair in shown.pairs for factor in pair)


def test_loss_falls_and_the_base_stays(family):
    before, losses = families.weights(family.model), []
    run = trainer(family, steps=40, batch=4)
    run.objective.prepare()
    run.run(lambda report: losses.append(report.loss))
    fixed = [
        run.objective.evaluate(lora, draws(family, 4), percent=0.3).mean() for lora in (None, trained_lora(run, family))
    ]
    assert float(fixed[1]) < 0.9 * float(fixed[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.model.model.state_dict().items())
    assert not any("forward" in vars(module) for module in family.model.model.modules())
    assert not comfy.model_management.in_training


def trained_lora(run, family):
    return leaves(run.trainable.lora([draw.sample for draw in draws(family, 4)]))


def test_a_failure_leaves_no_trace(family):
    objective = DiffusionObjective(family.model, checkpoint_stack=family.prefix.rstrip("."))
    objective.prepare()
    broken = families.random_lora(family, 1, batch=2)
    states = [parameter.requires_grad for parameter in family.model.model.parameters()]
    with pytest.raises(MatchError, match="2 instances"):
        objective.backward(broken, draws(family, 3), 1.0)
    assert not any("forward" in vars(module) for module in family.model.model.modules())
    assert not any(module._forward_pre_hooks for module in family.model.model.modules())
    assert states == [parameter.requires_grad for parameter in family.model.model.parameters()]
    assert not comfy.model_management.in_training


def test_samples_of_different_sizes_go_one_by_one():
    family = families.flux()
    source = Pairs(family)
    mixed = [Draw(source.sample(i, None), torch.Generator().manual_seed(i)) for i in range(2)]
    small = mixed[1].sample._replace(latent=mixed[1].sample.latent[..., :4])
    mixed[1] = mixed[1]._replace(sample=small)
    lora = leaves(families.random_lora(family, 1, batch=2))
    objective = DiffusionObjective(family.model)
    objective.prepare()
    assert objective.backward(lora, mixed, 0.5).shape == (2,)
    assert all(factor.grad.flatten(1).any(1).all() for pair in lora.pairs for factor in pair)


def test_what_is_quantised_but_no_layer_of_the_host_is_refused():
    family = families.flux()
    family.model.model.diffusion_model.pe_embedder.register_parameter(
        "codes", torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    )
    with pytest.raises(MatchError, match="pe_embedder.codes is quantised"):
        DiffusionObjective(family.model)


def test_bfloat16_computing_with_float32_parameters():
    family = families.flux()
    made = generator(family)
    run = Trainer(
        GeneratorTrainable(made, torch.bfloat16), DiffusionObjective(family.model), Pairs(family), TrainConfig(batch=2)
    )
    run.objective.prepare()
    for _ in range(2):
        report = run.step()
    assert report.loss == report.loss and report.gradient_norm > 0
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


def test_a_shared_lora_trains_by_the_same_loop():
    family = families.flux()
    shared = SharedLora(families.generator_config(family), 4, 8.0)
    run = Trainer(shared, DiffusionObjective(family.model), Pairs(family), TrainConfig(batch=4, learning_rate=1e-2))
    run.objective.prepare()
    before = run.objective.evaluate(None, draws(family, 4), percent=0.3).mean()
    for _ in range(20):
        run.step()
    assert float(run.objective.evaluate(leaves(shared.lora()), draws(family, 4), percent=0.3).mean()) < float(before)


@pytest.mark.parametrize("share", [1 / 8, 1 / 2048])
def test_gradients_do_not_vanish_in_float16(share):
    """The gradient of a mean over a latent is too small for float16 unless the loss is scaled."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        family = families.FAMILIES["flux_double"]()
        family.model.model.diffusion_model.to(dtype).dtype = dtype
        assert family.model.model.get_dtype_inference() == dtype
        objective = DiffusionObjective(family.model)
        objective.prepare()
        lora = leaves(generator(family).generate(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))))
        for pair in lora.pairs:
            pair.up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        objective.backward(lora, draws(family), share)
        found[dtype] = torch.cat([factor.grad.flatten() / share for pair in lora.pairs for factor in pair])
    exact, half = found.values()
    assert half.isfinite().all() and (half[exact != 0] == 0).float().mean() < 0.01
    assert float((half - exact).norm() / exact.norm()) < 0.02


def test_the_loss_is_of_what_the_base_predicts():
    """An error of the prediction counts alike at every noise level, however the prediction is turned into a picture."""
    sigma = torch.tensor([0.05, 0.5, 2.0, 40.0])
    for kind in ("CONST", "EPS", "V_PREDICTION", "EDM", "COSMOS_RFLOW"):
        sampling = getattr(comfy.model_sampling, kind)()
        sampling.sigma_data = 0.5
        noisy, right = (torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        denoised = sampling.calculate_denoised(sigma, right + 0.1, noisy) - sampling.calculate_denoised(
            sigma, right, noisy
        )
        off = denoised / prediction_spread(sampling, sigma).unsqueeze(1)
        assert torch.allclose(off.abs(), torch.full_like(off, 0.1), rtol=1e-3), kind
        if kind in ("CONST", "EPS"):
            assert torch.equal(prediction_spread(sampling, sigma), sigma)


def test_room_counts_the_source_pictures():
    family = families.FAMILIES["flux_double"]()
    base, shape, (tokens, options) = family.model.model, family.latent.shape[1:], families.conditioning(12, 8)[0]
    alone = pass_room(base, shape, [tokens, options], 2)
    source = {"reference_latents": [family.latent]}
    assert pass_room(base, shape, [tokens, options | source], 2) == pytest.approx(2 * alone, rel=1e-6)
    assert pass_room(base, shape, [tokens, options | source], 1) == pytest.approx(alone, rel=1e-6)
