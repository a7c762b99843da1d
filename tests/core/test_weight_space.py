"""The objective in weight space: against dense products, finite differences, and the single graph."""

import pytest
import torch

from hywu_core import Generator, GeneratorConfig, HywuError, InstanceLora, LoraError, LoraFactor
from hywu_core.training import GeneratorTrainable, Sample
from hywu_core.training.weight_space import Lesson, WeightSpace, weight_distance

SHAPES = {"a": ((3, 5), (7, 3)), "experts": ((2, 3, 4), (2, 6, 3))}


def lora(batch: int = 2, seed: int = 0, scale: float = 0.5, dtype=torch.float64) -> InstanceLora:
    source = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(batch, *shape, generator=source, dtype=torch.float64).to(dtype)

    return InstanceLora({n: LoraFactor(draw(down), draw(up)) for n, (down, up) in SHAPES.items()}, scale)


def dense(value: InstanceLora) -> torch.Tensor:
    """(B, all weights)."""
    return torch.cat([(value.scale * (p.up.double() @ p.down.double())).flatten(1) for p in value.pairs], dim=1)


def test_the_distance_is_that_of_the_dense_products():
    ours, wanted = lora(seed=1), lora(seed=2, scale=1.5)
    expected = (dense(ours) - dense(wanted)).square().sum(1) / dense(wanted).square().sum(1)
    torch.testing.assert_close(weight_distance(ours, wanted), expected, rtol=1e-12, atol=0)


def test_equal_nothing_and_opposite():
    wanted = lora()
    for times, expected in ((1.0, 0.0), (0.0, 1.0), (-1.0, 4.0)):
        torch.testing.assert_close(
            weight_distance(wanted.scaled(times), wanted), torch.full((2,), expected, dtype=torch.float64)
        )


def test_only_the_product_counts():
    wanted = lora()
    turn = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    turned = wanted.map(lambda pair: LoraFactor(turn @ pair.down, pair.up @ torch.linalg.inv(turn)))
    assert float(weight_distance(turned, wanted).max()) < 1e-12
    padded = wanted.map(  # another rank, the same product
        lambda pair: LoraFactor(
            torch.cat((pair.down, torch.zeros_like(pair.down[..., :1, :])), -2),
            torch.cat((pair.up, torch.ones_like(pair.up[..., :1])), -1),
        )
    )
    assert float(weight_distance(padded, wanted).max()) < 1e-12


def test_a_wanted_lora_that_changes_nothing_has_no_length():
    ours = lora()
    found = weight_distance(ours, ours.scaled(0.0))
    torch.testing.assert_close(found, dense(ours).square().sum(1))


def test_gradients_against_finite_differences():
    ours, wanted = lora(seed=1), lora(seed=2)

    def distance(*factors):
        pairs = zip(factors[::2], factors[1::2], strict=True)
        return weight_distance(InstanceLora(dict(zip(SHAPES, map(LoraFactor._make, pairs), strict=True)), 0.5), wanted)

    inputs = tuple(factor.requires_grad_() for pair in ours.pairs for factor in pair)
    assert torch.autograd.gradcheck(distance, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_what_does_not_fit_is_named():
    ours = lora()
    lacking = InstanceLora({"a": ours.factors["a"]}, 0.5)
    with pytest.raises(LoraError, match="experts is in one of them only"):
        weight_distance(ours, lacking)
    with pytest.raises(LoraError, match=r"a: .*\(2, 7, 5\).*\(3, 7, 5\)"):
        weight_distance(ours, lora(batch=3))


ALONE = 10, 0, 1  # of ten steps, the first of one process
CONFIG = GeneratorConfig(
    d_model=16,
    head_dim=8,
    num_pg_layers=1,
    input_dim=6,
    output_dim=4,
    num_base_model_layers=2,
    rank=2,
    alpha=4.0,
    token_dim=4,
    dim_accumulation=1,
    pg_mapping={"proj": {"lora_A_dim": 8, "lora_B_dim": 12}},
)


def generator(seed: int) -> Generator:
    made = Generator(CONFIG, dtype=torch.float64).initialize(seed)
    with torch.no_grad():  # a fresh one writes nothing
        made.model.proj_out_B.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return made


def samples(count: int) -> list[Sample]:
    source = torch.Generator().manual_seed(9)
    return [Sample(torch.zeros(0), None, torch.randn(3, 6, generator=source).double()) for _ in range(count)]


def gradients(made: Generator) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


def test_a_lesson_gives_the_gradient_of_its_mean_distance():
    pupil, teacher, old = generator(1), generator(2), samples(5)
    lesson = Lesson("memory", old, GeneratorTrainable(teacher, torch.float64), weight=0.5, batch=5)
    [found] = WeightSpace([lesson], seed=0).backward(GeneratorTrainable(pupil, torch.float64), 3, *ALONE)
    through_lesson = gradients(pupil)
    assert not gradients(teacher)
    again = WeightSpace([lesson], seed=0).backward(GeneratorTrainable(pupil, torch.float64), 3, *ALONE)
    assert again == [found], "the draw depends on nothing but seed, step and place"
    other = WeightSpace([lesson], seed=0).backward(GeneratorTrainable(pupil, torch.float64), 4, *ALONE)
    assert other != [found]

    pupil.zero_grad()
    step = 1e-6
    with torch.no_grad():
        weight = pupil.model.proj_out_B.weight
        before = [_mean(pupil, teacher, lesson, 3)]
        weight[0, 0] += step
        before.append(_mean(pupil, teacher, lesson, 3))
    numeric = 0.5 * (before[1] - before[0]) / step
    assert abs(numeric - float(through_lesson["model.proj_out_B.weight"][0, 0])) < 1e-4 * max(1.0, abs(numeric))


def _mean(pupil, teacher, lesson, step) -> float:
    """The lesson's distance, without its gradient."""
    with torch.enable_grad():
        found = WeightSpace([lesson], seed=0).backward(GeneratorTrainable(pupil, torch.float64), step, *ALONE)
    return found[0]


def test_training_on_a_lesson_alone_reaches_the_teacher():
    pupil, teacher = generator(1), generator(2)
    lesson = Lesson("memory", samples(2), GeneratorTrainable(teacher, torch.float64), weight=1.0, batch=4)
    trainable, objective = GeneratorTrainable(pupil, torch.float64), WeightSpace([lesson], seed=0)
    optimizer = torch.optim.Adam(pupil.parameters(), lr=1e-2)
    course = []
    for step in range(120):
        optimizer.zero_grad()
        course += objective.backward(trainable, step, *ALONE)
        optimizer.step()
    assert course[-1] < 0.05 * course[0]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_a_lesson_out(processes):
    """However unevenly: the mean of their gradients and of what they say is what one process finds."""
    teacher = GeneratorTrainable(generator(2), torch.float64)
    objective = WeightSpace([Lesson("memory", samples(7), teacher, weight=1.0, batch=4)], seed=5)
    pupil = generator(1)
    alone = objective.backward(GeneratorTrainable(pupil, torch.float64), 0, 10, 0, 1)
    expected = gradients(pupil)
    said, total = [], {name: torch.zeros_like(value) for name, value in expected.items()}
    for rank in range(processes):
        pupil.zero_grad()
        said += objective.backward(GeneratorTrainable(pupil, torch.float64), 0, 10, rank, processes)
        for name, value in gradients(pupil).items():
            total[name] += value / processes
    assert sum(said) / processes == pytest.approx(alone[0], rel=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(total[name], value, rtol=1e-9, atol=1e-12)


def test_a_falling_weight_is_zero_at_the_end():
    lesson = Lesson("loras", samples(1), GeneratorTrainable(generator(2)), 2.0, 1, "falling")
    assert [lesson.weight_at(share) for share in (0.0, 0.5, 1.0)] == [2.0, 1.0, 0.0]
    assert lesson._replace(schedule="constant").weight_at(0.9) == 2.0


def test_a_lesson_without_samples_is_refused():
    with pytest.raises(HywuError, match="nothing to learn for memory"):
        WeightSpace([Lesson("memory", [], GeneratorTrainable(generator(2)), 1.0, 4)], seed=0)
