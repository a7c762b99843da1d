"""Memory and time of one training step: gradient checkpointing, micro-batches, two-stage backward against one graph.

Base and generator are random, see `build`. Each variant runs in processes of its own, so that its peak is its own: the peak
resident size during a step, above what is resident before it (weights, libraries, optimizer). Time is that of the processor,
which other programs disturb least; it is the wall clock's with OMP_NUM_THREADS=1.
Run: .venv/bin/python scripts/bench_training.py [stages | quantised] [--steps N] [--json FILE]

With `stages`: a batch of 8 beside a batch of 1, for a generator whose graphs are too large to stay while the base is run.
With `quantised`: a pocket generator trained on the editor that ships, in float32 and with its blocks in fp8, from the same
seeds; fails if the two end further apart than a bound.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

VARIANTS = {  # name -> (checkpoint the base, checkpoint the generator, micro-batch, one graph)
    "one graph": (False, False, 0, True),
    "plain": (False, False, 0, False),
    "base checkpointed": (True, False, 0, False),
    "generator checkpointed": (False, True, 0, False),
    "both checkpointed": (True, True, 0, False),
    "micro-batch of 1": (False, False, 1, False),
    "both, micro-batch of 1": (True, True, 1, False),
}
BATCHES = {"batch of 1": 1, "batch of 8": 8}  # with `stages`
BATCH, SIZE, STEPS = 4, 48, 3
BASES = {"float32": None, "fp8": "float8_e4m3fn"}  # with `quantised`: the host's name of the format
MOST_APART = 0.03  # of the losses at the end, relative to the float32 base's
LAST = 50  # steps whose mean is the loss at the end
MAPPED = (
    65536  # bytes from which the allocator gives memory back to the system at once, so that the peak is what is in use
)


def generator_for(base, **sizes):
    """The configuration of a generator for an EditorConfig, on the layers of the picture's stream."""
    from hywu_core import GeneratorConfig

    layers = {"img_attn.qkv": (1, 3), "img_attn.proj": (1, 1), "img_mlp.0": (1, 4), "img_mlp.2": (4, 1)}
    return GeneratorConfig(
        **sizes, head_dim=32, input_dim=64, alpha=16, dim_accumulation=2,
        num_base_model_layers=base.depth, prefix="double_blocks.",
        pg_mapping={n: {"lora_A_dim": base.width * i, "lora_B_dim": base.width * o} for n, (i, o) in layers.items()},
    )  # fmt: skip


def build(base_again: bool, generator_again: bool, micro_batch: int, batch: int = BATCH, large: bool = False):
    """A trainer of everything real but the data and the weights. `large`: many layers, and many positions in each."""
    from in_host import enter_host

    enter_host()
    import torch

    from hywu_core import Generator
    from hywu_core.bases.pocket import EditorConfig, build_editor
    from hywu_core.host.training.objective import DiffusionObjective
    from hywu_core.training import GeneratorTrainable, TrainConfig, Trainer

    base = EditorConfig(width=512, heads=16, depth=16) if large else EditorConfig(width=256, heads=8, depth=6)
    sizes = {"d_model": 192, "num_pg_layers": 4, "output_dim": 128, "token_dim": 128, "rank": 8}
    if large:
        sizes = {"d_model": 128, "num_pg_layers": 2, "output_dim": 64, "token_dim": 64, "rank": 16}
    generator = Generator(generator_for(base, **sizes), dtype=torch.float32).initialize()
    generator.checkpoint_blocks = generator_again
    objective = DiffusionObjective(build_editor(base), "double_blocks" if base_again else None)
    objective.prepare()
    how = TrainConfig(steps=100, batch=batch, micro_batch=micro_batch)
    return Trainer(GeneratorTrainable(generator), objective, RandomPairs(SIZE // 3 if large else SIZE), how)


class RandomPairs:
    """Random pictures and words."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return 100

    def sample(self, index: int, source):
        """A pair drawn from `source`."""
        import torch

        from hywu_core.training import Sample

        latent, picture = (torch.randn(3, self.size, self.size, generator=source) for _ in range(2))
        words = torch.randn(1, 16, 64, generator=source)
        options = {"pooled_output": torch.randn(1, 64, generator=source), "reference_latents": [picture.unsqueeze(0)]}
        return Sample(latent, [words, options], words[0])


def one_graph(trainer) -> None:
    """The gradient without a cut between generator and base: no micro-batches are possible then."""
    draws = trainer.draws()
    trainer.optimizer.zero_grad()
    lora = trainer.trainable.lora([draw.sample for draw in draws])
    trainer.objective.backward(lora, draws, 1 / len(draws))
    trainer.optimizer.step()
    trainer.done += 1


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class Peak:
    """The largest resident size while the block runs, looked at every millisecond."""

    def __enter__(self):
        self.bytes, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.bytes = max(self.bytes, resident())


def measure(variant: str, timed: bool) -> dict[str, float]:
    """Run one variant in this process, for its time or for its memory."""
    if variant in BATCHES:
        trainer, whole = build(True, True, 1, BATCHES[variant], large=True), False
    else:
        base_again, generator_again, micro_batch, whole = VARIANTS[variant]
        trainer = build(base_again, generator_again, micro_batch)
    step = (lambda: one_graph(trainer)) if whole else trainer.step
    step()  # the optimizer's moments come to be
    trainer.optimizer.zero_grad(set_to_none=True)
    ctypes.CDLL(None).malloc_trim(0)
    before, seconds = resident(), []
    with Peak() as peak:
        step()
    for _ in range(STEPS if timed else 0):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"seconds": statistics.median(seconds)} if timed else {"bytes": peak.bytes - before}


def apart(variant: str, kind: str) -> dict[str, float]:
    """`measure` in a process of its own. The allocator that makes peaks exact costs time, so time is taken without it."""
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(MAPPED)} if kind == "memory" else {})
    command = [sys.executable, str(Path(__file__).resolve()), variant, kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def quantised(steps: int) -> dict:
    """The losses of a training on each base: over the first steps and over the last, and how far apart the ends are."""
    bases = {name: trained_on(kind, steps) for name, kind in BASES.items()}
    plain, other = (bases[name]["last"] for name in BASES)
    return {"steps": steps, "bases": bases, "apart": other / plain - 1}


def trained_on(kind: str | None, steps: int) -> dict[str, float]:
    """Train as the pocket generators were, on the same draws whatever the base."""
    from in_host import enter_host

    enter_host()
    import torch
    from quantised_editor import quantised_editor

    from hywu_core import Generator
    from hywu_core.bases import pocket
    from hywu_core.host.training.objective import DiffusionObjective
    from hywu_core.training import GeneratorTrainable, TrainConfig, Trainer
    from study import methods, pictures
    from study.edits import SUITES
    from study.task import EditingTask

    torch.set_num_threads(1)
    model, clip, _ = pocket.load_pocket_editor()
    if kind is not None:
        state = model.model.diffusion_model.state_dict()
        model = quantised_editor(state, pocket.EditorConfig(), kind, torch.float32)
    objective = DiffusionObjective(model)
    objective.prepare()
    composed, names = pictures.compose("train", 32, 1, 0)
    config = methods.generator_config()
    task = EditingTask(clip, composed, names, SUITES["eight"], config, "blind")
    generator = Generator(config, dtype=torch.float32).initialize(0)
    how = TrainConfig(steps=steps, batch=16, learning_rate=2e-3, warmup=max(1, steps // 10))
    losses: list[float] = []
    Trainer(GeneratorTrainable(generator), objective, task, how).run(lambda report: losses.append(report.loss))
    count = min(LAST, max(1, steps // 2))
    return {"first": statistics.fmean(losses[:count]), "last": statistics.fmean(losses[-count:])}


def show_stages(peaks: dict[str, dict[str, float]]) -> None:
    for variant, found in peaks.items():
        print(f"{variant:24} {found['bytes'] / 2**20:9.0f} MiB {found['bytes'] / peaks['batch of 1']['bytes']:6.2f}")


def show_variants(results: dict[str, dict[str, float]]) -> None:
    plain = results["plain"]
    print(f"{'variant':24} {'peak MiB':>9} {'ratio':>6} {'CPU s':>8} {'ratio':>6}")
    for variant, found in results.items():
        print(
            f"{variant:24} {found['bytes'] / 2**20:9.0f} {found['bytes'] / plain['bytes']:6.2f} "
            f"{found['seconds']:8.2f} {found['seconds'] / plain['seconds']:6.2f}"
        )


def show_quantised(results: dict) -> None:
    print(f"{'base':24} {'first loss':>11} {'last loss':>11}")
    for name, found in results["bases"].items():
        print(f"{name:24} {found['first']:11.5f} {found['last']:11.5f}")
    print(f"after {results['steps']} steps {results['apart']:+.2%} apart (bound {MOST_APART:.0%})")


def main() -> int:
    """Measure, show, say whether a bound is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="stages, or quantised; all variants by default")
    parser.add_argument("--steps", type=int, default=200, help="of quantised")
    parser.add_argument("--json", type=Path, help="also write everything there")
    arguments = parser.parse_args()
    if len(arguments.what) == 2:  # one variant, as `apart` asks for it
        print(json.dumps(measure(arguments.what[0], arguments.what[1] == "time")))
        return 0
    if arguments.what == ["stages"]:
        results = {variant: apart(variant, "memory") for variant in BATCHES}
        show_stages(results)
    elif arguments.what == ["quantised"]:
        results = quantised(arguments.steps)
        show_quantised(results)
    elif arguments.what:
        parser.error(f"no such measure: {' '.join(arguments.what)}")
    else:
        results = {variant: apart(variant, "memory") | apart(variant, "time") for variant in VARIANTS}
        show_variants(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 1 if abs(results.get("apart", 0)) > MOST_APART else 0


if __name__ == "__main__":
    sys.exit(main())
