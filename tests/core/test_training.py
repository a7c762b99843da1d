"""The trainer without a base: a quadratic objective stands in for the diffusion loss, everything else is real."""

import math

import pytest
import torch

from hywu_core import Generator, GeneratorConfig
from hywu_core.errors import ConfigError
from hywu_core.training import (
    GeneratorTrainable,
    Sample,
    SharedLora,
    TrainConfig,
    Trainer,
    TrainingError,
)
from hywu_core.training.data import batch_of, buckets_of, epoch_order
from hywu_core.training.memory import graph_bytes
from hywu_core.training.recall import Recall
from hywu_core.training.state import StateError
from hywu_core.training.trainable import leaves
from hywu_core.training.validation import base_loss


def tiny_config(**changes):
    values = {
        "d_model": 16, "head_dim": 8, "num_pg_layers": 1, "input_dim": 8, "output_dim": 8, "token_dim": 8, "rank": 2,
        "num_base_model_layers": 2, "alpha": 4, "dim_accumulation": 2, "hywu": {"encoder_layers": 1},
        "pg_mapping": {"b": {"lora_A_dim": 6, "lora_B_dim": 10}, "a": {"lora_A_dim": 12, "lora_B_dim": 4}},
    }  # fmt: skip
    return GeneratorConfig.from_dict(values | changes)


class Pairs:
    """Conditions with a wanted dW for each: what the objective below asks for."""

    def __init__(self, count=6, length=5, width=8):
        source = torch.Generator().manual_seed(0)
        self.conditions = torch.randn(count, length, width, generator=source)

    def __len__(self):
        return len(self.conditions)

    def sample(self, index, source):
        return Sample(torch.randn(3, generator=source), index, self.conditions[index], f"pair {index}")


def apart(lora, followed):
    """(B,) how far two LoRAs are from each other, as what a base predicts with them might be."""
    pairs = zip(lora.pairs, followed.pairs, strict=True)
    return sum((lora.scale * (a.up @ a.down - b.up @ b.down)).square().mean(dim=(-2, -1)) for a, b in pairs)


class Quadratic:
    """Every dW should be the sample's own multiple of ones. Like a base, it sees the factors only through their products."""

    def __init__(self, spoil_at=None):
        self.calls, self.spoil_at = 0, spoil_at

    def losses(self, lora, draws):
        rows = []
        for index, draw in enumerate(draws):
            wanted = (draw.sample.conditioning % 3 - 1) + 0.1 * draw.sample.latent.mean()
            instance = lora.select(index if lora.batch > 1 else 0)
            rows.append(sum((lora.scale * (p.up @ p.down) - wanted).square().mean() for p in instance.pairs))
        return torch.stack(rows)

    def backward(self, lora, draws, share, followed=None):
        losses = self.losses(lora, draws) if followed is None else apart(lora, followed)
        self.calls += 1
        if self.calls == self.spoil_at:
            losses = losses * torch.tensor([1.0] * (len(draws) - 1) + [math.nan])
        (losses.sum() * share).backward()
        return losses.detach()


def trainer(seed=0, objective=None, **changes):
    config = TrainConfig(**{"steps": 12, "batch": 4, "learning_rate": 3e-3, "warmup": 2, "ema": 0.5} | changes)
    generator = Generator(tiny_config()).initialize(seed)
    return Trainer(GeneratorTrainable(generator), objective or Quadratic(), Pairs(), config)


def parameters(run):
    return {name: parameter.detach().clone() for name, parameter in run.parameters.items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_first_lora_changes_nothing():
    lora = GeneratorTrainable(Generator(tiny_config()).initialize()).lora([Pairs().sample(0, torch.Generator())])
    assert all(not pair.up.any() and pair.down.any() for pair in lora.pairs)


def test_loss_falls():
    run, losses = trainer(steps=60, learning_rate=1e-2), []
    run.run(lambda report: losses.append(report.loss))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def recalling(seed=1, **changes):
    """A run that is to keep what a teacher does for other pairs than its own."""
    run = trainer(seed, **changes)
    teacher = Generator(tiny_config()).initialize(7)
    with torch.no_grad():  # a fresh one writes nothing
        teacher.model.proj_out_B.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(7))
    recall = Recall(Pairs(4), GeneratorTrainable(teacher), 2.0, 4)
    return Trainer(run.trainable, run.objective, run.data, run.config, recall=recall)


def test_what_is_recalled_adds_the_gradient_of_its_mean():
    run = recalling(micro_batch=2)
    run._try_backward()
    both = {name: parameter.grad.clone() for name, parameter in run.parameters.items()}
    run.optimizer.zero_grad()
    draws, old = run.draws(), run.recall.draws(run.config.seed, 0, 0, 1)
    loss = run.objective.losses(run.trainable.lora([draw.sample for draw in draws]), run.draws()).mean()
    shown = run.recall.teacher.lora([draw.sample for draw in old])
    (loss + 2.0 * apart(run.trainable.lora([draw.sample for draw in old]), shown).mean()).backward()
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(both[name], parameter.grad, atol=1e-6, rtol=1e-5)
    assert {draw.sample.key for draw in old} <= {f"pair {index}" for index in range(4)}


def test_a_run_that_recalls_reports_it_and_resumes_bit_for_bit(tmp_path):
    whole, first, second, reports = recalling(), recalling(), recalling(), []
    whole.run(lambda report: reports.append(report.distances))
    assert whole.names == ("prediction",) and all(len(found) == 1 and found[0] > 0 for found in reports)
    first.run(lambda report: report.step == 4, tmp_path / "state.safetensors")
    second.resume(tmp_path / "state.safetensors")
    second.run()
    assert_equal(parameters(whole), parameters(second))


def test_two_stage_backward_is_the_single_graph():
    run = trainer(micro_batch=2)
    draws = run.draws()
    run._backward(draws)
    two_stage = {name: parameter.grad.clone() for name, parameter in run.parameters.items()}
    run.optimizer.zero_grad()
    (run.objective.losses(run.trainable.lora([draw.sample for draw in run.draws()]), run.draws()).mean()).backward()
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(two_stage[name], parameter.grad, atol=1e-6, rtol=1e-5)


def stages(room, **changes):
    """(losses, gradients) of one step in float64, with so many bytes for graphs."""
    generator = Generator(tiny_config(), dtype=torch.float64).initialize()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        head = generator.model.proj_out_B.weight
        head.copy_(torch.randn(head.shape, generator=source, dtype=torch.float64) * 0.1)
    written = GeneratorTrainable(generator, torch.float64, room)
    run = Trainer(written, Quadratic(), Pairs(), TrainConfig(**{"batch": 5, "steps": 1} | changes))
    losses = run._backward(run.draws())
    return losses, {name: parameter.grad for name, parameter in run.parameters.items()}


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 2}, {"diversity": 0.5}, {"diversity": 0.5, "micro_batch": 2}])
def test_three_stages_give_the_gradients_of_the_single_graph(changes):
    losses, expected = stages(room=1 << 40, **changes | {"micro_batch": 0})
    for room in (0, 2 * graph_bytes(tiny_config(), 5, torch.float64, False)):
        found_losses, found = stages(room=room, **changes)
        torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=0)
        for name, gradient in expected.items():
            assert float((found[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name


def test_no_more_graphs_are_there_at_a_time_than_there_is_room_for():
    generator, alive = Generator(tiny_config()).initialize(), []
    generator.register_forward_hook(
        lambda module, inputs, output: alive.append((torch.is_grad_enabled(), len(inputs[0])))
    )
    room = 2 * graph_bytes(tiny_config(), 5, torch.float32, False)
    run = Trainer(GeneratorTrainable(generator, room=room), Quadratic(), Pairs(), TrainConfig(batch=5))
    run._backward(run.draws())
    assert alive == [(False, 2), (False, 2), (False, 1), (True, 2), (True, 2), (True, 1)]


def test_samples_of_equal_shapes_are_written_together_and_keep_their_places():
    generator, passes = Generator(tiny_config()).initialize(), []
    generator.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    found = [Pairs(6, length).sample(index, torch.Generator()) for index, length in enumerate((5, 3, 5, 3, 3))]
    lora = GeneratorTrainable(generator).lora(found)
    assert passes == [2, 3]
    for index, sample in enumerate(found):
        alone = generator(sample.condition.unsqueeze(0))
        for one, other in zip(lora.select(index).pairs, alone.pairs, strict=True):
            torch.testing.assert_close(one.down, other.down)


def test_factors_in_half_precision_collect_their_gradients_in_float32():
    written = SharedLora(tiny_config(), 2, 4.0).lora()
    lora = written.map(lambda pair: type(pair)(*(factor.detach().bfloat16() for factor in pair)))
    assert {factor.dtype for pair in leaves(lora).pairs for factor in pair} == {torch.float32}


def test_micro_batches_change_nothing():
    whole, parts = trainer(), trainer(micro_batch=1)
    whole.run()
    parts.run()
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter, parts.parameters[name], atol=1e-5, rtol=1e-4)


def test_gradients_of_the_whole_chain_agree_with_finite_differences():
    generator = Generator(tiny_config(), dtype=torch.float64).initialize()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        head = generator.model.proj_out_B.weight
        head.copy_(torch.randn(head.shape, generator=source, dtype=torch.float64) * 0.1)
    run = Trainer(GeneratorTrainable(generator, torch.float64), Quadratic(), Pairs(), TrainConfig(batch=2))
    run._backward(run.draws())

    def loss():
        draws = run.draws()
        with torch.no_grad():
            return float(Quadratic().losses(run.trainable.lora([d.sample for d in draws]), draws).mean())

    for name, parameter in run.parameters.items():
        direction = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            parameter += 1e-5 * direction
            up = loss()
            parameter -= 2e-5 * direction
            down = loss()
            parameter += 1e-5 * direction
        found = (parameter.grad * direction).sum()
        assert float(found) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-8), name


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = trainer()
    whole.run()
    begun = trainer()

    def stop(report):
        if report.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begun.run(stop, tmp_path / "state.safetensors")
    resumed = trainer(seed=9)  # whatever it was initialised with
    resumed.resume(tmp_path / "state.safetensors")
    assert resumed.done == 5
    resumed.run()
    assert_equal(parameters(whole), parameters(resumed))
    assert_equal(whole.averaged, resumed.averaged)


def test_a_state_of_other_settings_or_another_model_is_refused(tmp_path):
    run = trainer()
    run.step()
    run.save(tmp_path / "state.safetensors")
    with pytest.raises(StateError, match="learning_rate"):
        trainer(learning_rate=1.0).resume(tmp_path / "state.safetensors")
    other = Trainer(SharedLora(tiny_config(), 2, 2.0), Quadratic(), Pairs(), run.config)
    with pytest.raises(StateError, match="another model"):
        other.resume(tmp_path / "state.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(StateError, match="truncated"):
        trainer().resume(tmp_path / "broken.safetensors")


def test_a_loss_that_is_not_finite_names_step_and_sample_and_keeps_the_last_good_state(tmp_path):
    run = trainer(objective=Quadratic(spoil_at=4))
    reached = []
    with pytest.raises(TrainingError, match=r"step 3, sample 'pair \d'"):
        run.run(lambda report: reached.append(parameters(run)), tmp_path / "state.safetensors")
    assert len(reached) == run.done == 3
    assert_equal(reached[-1], parameters(run))
    again = trainer()
    again.resume(tmp_path / "state.safetensors")
    assert_equal(reached[-1], parameters(again))


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    run = trainer()
    run.step()
    run.save(path)
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    run.step()
    with pytest.raises(ValueError, match="No space left"):
        run.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_every_epoch_has_every_pair_once_in_an_order_of_its_own():
    pairs = Pairs(6)
    draws = [draw.sample.key for step in range(4) for draw in batch_of(pairs, 0, step, 3, slice(None))]
    epochs = draws[:6], draws[6:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"pair {i}" for i in range(6)]
    assert epochs[0] != epochs[1]


def test_processes_share_what_one_process_draws():
    pairs = Pairs(6)
    whole = batch_of(pairs, 3, 7, 4, slice(0, 4))
    parts = batch_of(pairs, 3, 7, 4, slice(0, 2)) + batch_of(pairs, 3, 7, 4, slice(2, 4))
    assert [d.sample.key for d in whole] == [d.sample.key for d in parts]
    assert all(torch.equal(a.sample.latent, b.sample.latent) for a, b in zip(whole, parts, strict=True))


class SeveralSizes(Pairs):
    """The pictures' sizes, in turn as `kinds` says."""

    def __init__(self, kinds):
        super().__init__(len(kinds))
        self.kinds = kinds

    def sizes(self):
        return [(2, 3 + kind) for kind in self.kinds]

    def sample(self, index, source):
        sample = super().sample(index, source)
        return sample._replace(latent=torch.randn(2, 3 + self.kinds[index], generator=source))


@pytest.mark.parametrize(("kinds", "batch"), [([0] * 9 + [1] * 5 + [2], 4), ([0, 1] * 8, 4), ([0] * 6 + [1] * 7, 1)])
def test_batches_are_of_one_size_and_every_pair_comes_once_an_epoch(kinds, batch):
    pairs, epochs = SeveralSizes(kinds), 4
    buckets, steps = buckets_of(pairs), epochs * len(kinds)
    order = [batch_of(pairs, 3, step, batch, slice(None), buckets) for step in range(steps // batch)]
    keys = [draw.sample.key for draws in order for draw in draws]
    for start in range(0, len(keys) - len(kinds) + 1, len(kinds)):
        assert len(set(keys[start : start + len(kinds)])) == len(kinds)
    mixed = sum(len({draw.sample.latent.shape for draw in draws}) > 1 for draws in order)
    assert mixed <= epochs * len(set(kinds)) and (batch > 1 or not mixed)
    if min(kinds.count(kind) for kind in set(kinds)) % batch == 0 and len(kinds) % batch == 0:
        assert mixed == 0
    without = [batch_of(pairs, 3, step, batch, slice(None)) for step in range(steps // batch)]
    if batch > 1:
        assert sum(len({draw.sample.latent.shape for draw in draws}) > 1 for draws in without) > mixed
    ends = keys[: len(kinds)], keys[-len(kinds) :]
    assert ends[0] != ends[1], "epochs have orders of their own"


def test_pairs_of_one_size_are_drawn_as_without_buckets():
    assert buckets_of(SeveralSizes([1] * 6)) is None and buckets_of(Pairs(6)) is None
    for epoch in range(3):
        plain, bucketed = (epoch_order(5, epoch, 7, 3, given) for given in (None, torch.zeros(7, dtype=torch.long)))
        assert torch.equal(plain, bucketed)


def test_processes_share_a_bucketed_batch_and_a_resumed_run_draws_the_same(tmp_path):
    pairs = SeveralSizes([0, 1, 0, 1, 1, 0, 2])
    buckets = buckets_of(pairs)
    for step in range(6):
        whole = batch_of(pairs, 3, step, 4, slice(0, 4), buckets)
        parts = [d for start in (0, 2) for d in batch_of(pairs, 3, step, 4, slice(start, start + 2), buckets)]
        assert [d.sample.key for d in whole] == [d.sample.key for d in parts]

    def run():
        config = TrainConfig(steps=8, batch=4, learning_rate=3e-3)
        return Trainer(GeneratorTrainable(Generator(tiny_config()).initialize(0)), Quadratic(), pairs, config)

    whole, begun, again = run(), run(), run()
    whole.run()
    begun.run(on_step=lambda report: report.step == 2, save_to=tmp_path / "state.safetensors")
    again.resume(tmp_path / "state.safetensors")
    again.run()
    assert all(torch.equal(p, again.parameters[name]) for name, p in whole.parameters.items())


def test_no_pairs_is_an_error():
    with pytest.raises(ConfigError, match="no training pairs"):
        batch_of(Pairs(0), 0, 0, 1, slice(None))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0}, {"ema": 1.0}, {"clip": -1}, {"micro_batch": -2}])
def test_settings_that_make_no_sense_are_errors(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_the_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(steps=110, warmup=10, learning_rate=1.0)
    assert [config.rate(s) for s in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert config.rate(60) == pytest.approx(0.5)
    assert config.rate(110) == pytest.approx(0.0)


def test_the_bases_own_loss_is_measured_in_parts_as_training_goes():
    class Measured(Quadratic):
        sizes: list[int] = []

        def evaluate(self, lora, draws, percent=None):
            self.sizes.append(len(draws))
            return torch.tensor([draw.sample.conditioning for draw in draws], dtype=torch.float32)

    found = {}
    for part in (0, 1, 3):
        run = trainer(objective=Measured(), micro_batch=part)
        Measured.sizes.clear()
        found[part] = base_loss(run, 1), list(Measured.sizes)
    assert [sizes for _, sizes in found.values()] == [[4], [1] * 4, [3, 1]]
    assert len({loss for loss, _ in found.values()}) == 1
