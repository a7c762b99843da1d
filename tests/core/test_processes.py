"""Several processes of one run, as threads: what one of them meets, all of them must live with."""

import threading
from functools import partial

import pytest
import torch

from hywu_core import Generator, GeneratorConfig
from hywu_core.errors import ConfigError
from hywu_core.training import GeneratorTrainable, Sample, TrainConfig, Trainer, TrainingError
from hywu_core.training.distributed import buckets
from hywu_core.training.options import build_run, read_arguments
from hywu_core.training.recall import Recall
from hywu_core.training.validation import averaged_weights
from hywu_core.training.weight_space import Lesson, WeightSpace

# beside the stack that every generator here has
FURTHER = ({"prefix": "single.", "num_base_model_layers": 3, "pg_mapping": {"c": {"lora_A_dim": 8, "lora_B_dim": 14}}},)
STACKS = pytest.mark.parametrize("further", [(), FURTHER], ids=["one stack", "two stacks"])


def tiny_config(further=()):
    return GeneratorConfig.from_dict(
        {
            "d_model": 16, "head_dim": 8, "num_pg_layers": 1, "input_dim": 8, "output_dim": 8, "token_dim": 8, "rank": 2,
            "num_base_model_layers": 2, "alpha": 4, "dim_accumulation": 2,
            "pg_mapping": {"b": {"lora_A_dim": 6, "lora_B_dim": 10}, "a": {"lora_A_dim": 12, "lora_B_dim": 4}},
            "hywu": {"further_stacks": list(further)},
        }
    )  # fmt: skip


class Pairs:
    """Conditions, each with a number that says which dW is wanted."""

    def __init__(self):
        self.conditions = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.conditions)

    def sample(self, index, source):
        return Sample(torch.randn(3, generator=source), index % 3 - 1, self.conditions[index], f"pair {index}")


class Quadratic:
    """Every dW should be the sample's multiple of ones; at one call, a loss is not a number."""

    def __init__(self, spoil_at=None):
        self.calls, self.spoil_at = 0, spoil_at

    def backward(self, lora, draws, share, followed=None):
        wanted = torch.tensor([draw.sample.conditioning + 0.1 * float(draw.sample.latent.mean()) for draw in draws])
        rights = [wanted.view(-1, 1, 1)] * len(lora.pairs)
        if followed is not None:
            rights = [pair.up @ pair.down for pair in followed.pairs]
        written = zip(lora.pairs, rights, strict=True)
        errors = [(pair.up @ pair.down - right).square().mean((1, 2)) for pair, right in written]
        losses = torch.stack(errors).mean(0)
        if self.calls == self.spoil_at:
            losses = losses * float("nan")
        self.calls += 1
        (losses.sum() * share).backward()
        return losses.detach()


class Threads:
    """`Communication` among threads; a process that waits for another longer than 20 s fails."""

    def __init__(self, processes):
        self.processes, self.given = processes, [None] * processes
        self.barrier = threading.Barrier(processes, timeout=20)

    def member(self, rank):
        member = type("Member", (), {"rank": rank, "processes": self.processes})()
        member.average = lambda tensors: self.average(rank, tensors)
        return member

    def average(self, rank, tensors):
        self.given[rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait()
        shapes = {tuple(t.shape for t in tensors) for tensors in self.given}
        means = [sum(parts) / self.processes for parts in zip(*self.given, strict=True)]
        self.barrier.wait()
        assert len(shapes) == 1
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean)


def teaching(further=()):
    """A teacher that writes something."""
    teacher = Generator(tiny_config(further), dtype=torch.float64).initialize(5).requires_grad_(False)
    torch.nn.init.normal_(teacher.model.proj_out_B.weight, std=0.1, generator=torch.Generator().manual_seed(5))
    return GeneratorTrainable(teacher, torch.float64)


def remembering(batch=3, further=()):
    """Old instructions, and a teacher."""
    pairs = Pairs()
    samples = [pairs.sample(index, torch.Generator()) for index in range(len(pairs))]
    return WeightSpace([Lesson("memory", samples, teaching(further), 0.5, batch)], seed=0)


def together(objectives, steps=4, batch=4, lessons=lambda: None, dtype=torch.float32, further=(), recall=lambda: None):
    """Train one process for each objective; returns (trainers, what each raised)."""
    threads, raised = Threads(len(objectives)), [None] * len(objectives)
    trainers = []
    for rank, objective in enumerate(objectives):
        config = TrainConfig(steps=steps, batch=batch, learning_rate=1e-2, warmup=0, ema=0.5)
        generator = Generator(tiny_config(further), dtype=dtype).initialize()
        data = None if objective is None else Pairs()
        member = threads.member(rank)
        trainers.append(
            Trainer(
                GeneratorTrainable(generator, dtype),
                objective,
                data,
                config,
                member,
                lessons=lessons(),
                recall=recall(),
            )
        )

    def run(rank):
        try:
            trainers[rank].run()
        except Exception as error:
            raised[rank] = error

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(len(objectives))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return trainers, raised


def largest_difference(one, other):
    return max(float((p - other.parameters[name]).detach().abs().max()) for name, p in one.parameters.items())


@STACKS
def test_two_processes_train_as_one(further):
    # how float32 rounds sums of other parts differs from processor to processor
    (one,), _ = together([Quadratic()], further=further, dtype=torch.float64)
    pair, raised = together([Quadratic(), Quadratic()], further=further, dtype=torch.float64)
    assert raised == [None, None]
    assert largest_difference(*pair) == 0
    assert largest_difference(one, pair[0]) < 1e-10


@pytest.mark.parametrize("objective", [Quadratic, lambda: None], ids=["beside the loss", "alone"])
@STACKS
def test_two_processes_remember_as_one(objective, further):
    """Three old instructions of a step are shared out unevenly."""
    how = {"lessons": partial(remembering, further=further), "dtype": torch.float64, "further": further}
    (one,), _ = together([objective()], **how)
    pair, raised = together([objective(), objective()], **how)
    assert raised == [None, None]
    assert largest_difference(*pair) == 0
    assert largest_difference(one, pair[0]) < 1e-9
    if objective() is not None:
        (without,), _ = together([objective()], dtype=torch.float64, further=further)
        assert largest_difference(one, without) > 1e-3


@STACKS
def test_two_processes_recall_as_one(further):
    def recall():
        return Recall(Pairs(), teaching(further), 2.0, 4)

    how = {"recall": recall, "dtype": torch.float64, "further": further}
    (one,), _ = together([Quadratic()], **how)
    pair, raised = together([Quadratic(), Quadratic()], **how)
    assert raised == [None, None]
    assert largest_difference(*pair) == 0
    assert largest_difference(one, pair[0]) < 1e-9
    (without,), _ = together([Quadratic()], dtype=torch.float64, further=further)
    assert largest_difference(one, without) > 1e-3


def test_what_is_recalled_is_shared_out_evenly():
    with pytest.raises(TrainingError, match="batch of 3 cannot be shared out"):
        together([Quadratic(), Quadratic()], recall=lambda: Recall(Pairs(), teaching(), 2.0, 3))


def test_a_bad_sample_in_one_process_stops_all_of_them():
    trainers, raised = together([Quadratic(), Quadratic(spoil_at=2)])
    assert all(isinstance(error, TrainingError) for error in raised)
    assert "pair" in str(raised[1]) and "Another process" in str(raised[0])
    assert trainers[0].done == trainers[1].done
    assert largest_difference(*trainers) == 0


def test_a_crash_in_one_process_stops_all_of_them():
    class Crashing(Quadratic):
        def backward(self, lora, draws, share):
            raise RuntimeError("out of memory")

    trainers, raised = together([Quadratic(), Crashing()])
    assert isinstance(raised[0], TrainingError) and str(raised[1]) == "out of memory"
    assert trainers[0].done == 0


def test_a_parameter_without_gradient_in_one_process_stays_in_step():
    class Partial(Quadratic):
        """Reaches no parameter at all."""

        def backward(self, lora, draws, share):
            for pair in lora.pairs[:1]:
                (pair.up.sum() * 0).backward()
            return torch.zeros(len(draws))

    class Idle(GeneratorTrainable):
        def named_parameters(self):
            return super().named_parameters() | {"unused": self.unused}

        unused = torch.nn.Parameter(torch.ones(3))

    trainers, raised = together([Quadratic(), Partial()])
    assert raised == [None, None]
    assert largest_difference(*trainers) == 0
    alone = Trainer(
        Idle(Generator(tiny_config()).initialize()), Quadratic(), Pairs(), TrainConfig(steps=2, batch=2, warmup=0)
    )
    alone.run()
    assert torch.equal(alone.parameters["unused"], torch.ones(3))


def test_a_run_with_an_unused_parameter_resumes(tmp_path):
    class Idle(GeneratorTrainable):
        def named_parameters(self):
            return super().named_parameters() | {"unused": torch.nn.Parameter(torch.ones(3))}

    def fresh():
        config = TrainConfig(steps=4, batch=2, warmup=0)
        return Trainer(Idle(Generator(tiny_config()).initialize()), Quadratic(), Pairs(), config)

    whole, first, second = fresh(), fresh(), fresh()
    whole.run()
    first.step()
    first.save(tmp_path / "state.safetensors")
    second.resume(tmp_path / "state.safetensors")
    second.run()
    assert largest_difference(whole, second) == 0


def test_buckets_hold_every_tensor_once_in_order():
    tensors = [torch.zeros(n) for n in (3, 4, 10, 1, 1)]
    found = list(buckets(tensors, elements=7))
    assert [[t.numel() for t in group] for group in found] == [[3, 4], [10], [1, 1]]
    assert list(buckets([])) == []


def test_averaged_weights_stand_in_for_a_time():
    (trainer,), _ = together([Quadratic()])
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with averaged_weights(trainer):
        assert all(torch.equal(p, trainer.averaged[name]) for name, p in trainer.parameters.items())
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_a_run_is_read_from_a_file_with_flags_on_top(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"cpu": true, "steps": 20, "learning_rate": 1, "betas": [0.9, 0.95], "text_encoders": ["a", "b"]}')
    run = read_arguments(["--config", str(file), "--steps", "30", "--no-cpu"], "")
    assert (run.training.steps, run.training.learning_rate, run.training.betas) == (30, 1.0, (0.9, 0.95))
    assert (run.cpu, run.text_encoders) == (False, ("a", "b"))
    assert run.training.identity() == build_run(run.training.identity() | {"steps": 7}).training.identity()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"stpes": 3}', "Did you mean 'steps'"),
        ('{"steps": "many"}', "steps must be of the kind int"),
        ('{"regime": "deaf"}', "regime must be one of told, blind"),
        ('{"held_out_share": 1}', "held_out_share"),
        ('{"steps": 0}', "steps must be at least 1"),
        (None, "cannot be read"),
    ],
)
def test_bad_configurations_are_one_clear_error(tmp_path, text, said):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_arguments(["--config", str(file)], "")
