"""What our own work costs beside what must be done anyway, each suite against its baseline in the same run.

    generate    the generator against the bare matrix products and attention of the same shapes
    forward     generate against the same forward unchunked
    apply       putting a LoRA beside the layers against the host's own bypass loader
    switch      from one LoRA to the next, against the host's merge, which rewrites weights
    sample      sampling with a LoRA in bypass against the host's own bypass
    switch-flux, sample-flux    the same on a random Flux of 300 M parameters; scripts/bench_switch.py asks a server
    load        a generator's file against reading its tensors alone
    train-step  two-stage backward against one graph

Time is the processor's with one thread, which other programs disturb least; ours and the baseline take turns; the ratio is
the median of the turns' ratios.
Run: .venv/bin/python scripts/bench.py [SUITE ...] [--small] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from in_host import enter_host

enter_host()
import bench_training  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from comfyui_version import __version__ as host_version  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors import safe_open  # noqa: E402

from hywu_core import Generator, GeneratorConfig, InstanceLora, LoraFactor, load_generator, save_generator  # noqa: E402
from hywu_core.bases.pocket import EditorConfig, build_editor  # noqa: E402
from hywu_core.files.lora_files import to_state_dict  # noqa: E402
from hywu_core.host.lora.apply import apply_lora  # noqa: E402
from hywu_core.host.sampling import sample  # noqa: E402
from hywu_core.plan import equal_part, plan, positions, row_bytes  # noqa: E402


class Result(NamedTuple):
    """Seconds of the processor, and the ratio that each suite is about."""

    ours: float
    baseline: float
    ratio: float
    ratios: list[float]


def compare(ours: Callable, baseline: Callable, turns: int, inner: int = 1) -> Result:
    """Both in turns, after one of each that does not count."""
    ours(), baseline()
    seconds = []
    for turn in range(turns):
        pair = [0.0, 0.0]
        for which, run in sorted(enumerate((ours, baseline)), reverse=bool(turn % 2), key=lambda entry: entry[0]):
            start = time.process_time()
            for _ in range(inner):
                run()
            pair[which] = (time.process_time() - start) / inner
        seconds.append(pair)
    ratios = [a / max(b, 1e-9) for a, b in seconds]
    return Result(
        *(statistics.median(column) for column in zip(*seconds, strict=True)), statistics.median(ratios), ratios
    )


def generator_of(small: bool) -> tuple[Generator, torch.Tensor]:
    """d_model 1,024, 4 layers of 5,516 positions, two blocks, a condition of 1,024 tokens: random weights."""
    width, tokens, length = (128, (72, 66), 64) if small else (1024, (719, 660), 1024)
    config = GeneratorConfig(
        d_model=width, head_dim=32 if small else 128, num_pg_layers=2, input_dim=width, output_dim=width // 4, rank=16,
        token_dim=width // 4, num_base_model_layers=4, alpha=16, dim_accumulation=4,
        pg_mapping={"q": {"lora_A_dim": width // 4 * tokens[0], "lora_B_dim": width // 4 * tokens[1]}},
    )  # fmt: skip
    return Generator(config).initialize(0), torch.randn(1, length, width)


def bare_products(generator: Generator, length: int) -> Callable[[], None]:
    """The matrix products and attention of a generate, in its chunks, and nothing else."""
    config, (layers, each) = generator.config, positions(generator.config).grids[0]
    d, heads, width = config.d_model, config.heads, config.head_dim
    rows = plan(config, 1, length, torch.float32).chunk // row_bytes(1, d, torch.float32)
    source = torch.randn(max(layers * each, length), d)
    weights = {many: (torch.randn(many * d, d) / d**0.5, torch.randn(many * d)) for many in (1, 3, 4)}
    down, head = torch.randn(d, 4 * d), torch.randn(config.output_dim, d // config.dim_accumulation)

    def parts(total: int, most: int) -> Iterator[int]:
        size = equal_part(total, most)
        return (min(size, total - start) for start in range(0, total, size))

    def product(count: int, many: int = 1) -> torch.Tensor:
        return F.linear(source[:count], *weights[many])

    def attention(sequences: int, queries: int, keys: int) -> None:
        asked, known = (source[: sequences * n].view(sequences, heads, n, width) for n in (queries, keys))
        F.scaled_dot_product_attention(asked, known, known)

    @torch.no_grad()
    def run() -> None:
        product(length)
        for _ in range(config.num_pg_layers):
            for count in parts(each, rows // layers):
                product(count * layers, 3), attention(count, layers, layers), product(count * layers)
            for _ in range(layers):
                for count in parts(each, rows):
                    product(count, 3), attention(1, count, each), product(count)
            product(length), product(length)
            for count in parts(layers * each, rows):
                product(count), attention(1, count, length), product(count), F.linear(product(count, 4), down)
        for _ in range(layers):
            F.linear(source[:each].view(-1, head.shape[1]), head)

    return run


def generate(small: bool, turns: int) -> Result:
    generator, condition = generator_of(small)
    return compare(lambda: generator.generate(condition), bare_products(generator, condition.shape[1]), turns)


def forward(small: bool, turns: int) -> Result:
    generator, condition = generator_of(small=True)
    return compare(lambda: generator.generate(condition), lambda: torch.no_grad()(generator)(condition), turns)


SMALL = EditorConfig(width=128, heads=4, depth=2)
POCKET = EditorConfig(width=256, heads=8, depth=6)
FLUX = EditorConfig(width=1024, heads=32, depth=8)  # 303 M parameters


def editor_of(config: EditorConfig) -> tuple[object, list, torch.Tensor]:
    """A random editor, a conditioning, and latents to make."""
    model = build_editor(config)
    picture = torch.randn(1, 3, 48, 48)
    options = {"pooled_output": torch.randn(1, 64), "reference_latents": [picture]}
    return model, [[torch.randn(1, 16, 64), options]], picture


def random_lora(model: object, seed: int) -> InstanceLora:
    """On every attention and feed-forward layer of the picture's stream."""
    source, pairs = torch.Generator().manual_seed(seed), {}
    for name, layer in model.model.diffusion_model.named_modules():
        if (
            ".img_" in name
            and getattr(layer, "weight", None) is not None
            and layer.weight.ndim == 2
            and "mod" not in name
        ):
            rows, columns = layer.weight.shape
            down = torch.randn(1, 16, columns, generator=source)
            pairs[name] = LoraFactor(down, 0.01 * torch.randn(1, rows, 16, generator=source))
    return InstanceLora(pairs)


def bypassed(model: object, lora: InstanceLora) -> object:
    return apply_lora(model, lora, mode="bypass")[0]


def bypassed_by_host(model: object, lora: InstanceLora) -> object:
    return comfy.sd.load_bypass_lora_for_models(model, None, to_state_dict(lora), 1.0, 0.0)[0]


def merged_by_host(model: object, lora: InstanceLora) -> object:
    return comfy.sd.load_lora_for_models(model, None, to_state_dict(lora), 1.0, 0.0)[0]


def apply(small: bool, turns: int) -> Result:
    model, *_ = editor_of(SMALL if small else POCKET)
    lora = random_lora(model, 0)
    return compare(lambda: bypassed(model, lora), lambda: bypassed_by_host(model, lora), turns, inner=5)


def switch(small: bool, turns: int, config: EditorConfig = POCKET) -> Result:
    model, *_ = editor_of(SMALL if small else config)
    loras = [random_lora(model, seed) for seed in range(2)]

    def run(put: Callable) -> None:
        for lora in loras:
            comfy.model_management.load_models_gpu([put(model, lora)])

    return compare(lambda: run(bypassed), lambda: run(merged_by_host), turns)


def sampled(small: bool, turns: int, config: EditorConfig = POCKET) -> Result:
    model, conditioning, like = editor_of(SMALL if small else config)
    lora = random_lora(model, 0)
    ours, theirs = bypassed(model, lora), bypassed_by_host(model, lora)
    return compare(*(lambda m=m: sample(m, conditioning, like, steps=8) for m in (ours, theirs)), turns)


def load(small: bool, turns: int) -> Result:
    generator, _ = generator_of(small)
    with tempfile.TemporaryDirectory() as folder:
        path = save_generator(generator, Path(folder) / "generator.safetensors")

        def read() -> None:
            with safe_open(str(path), "pt") as file:
                for name in file.keys():
                    file.get_tensor(name)

        return compare(lambda: load_generator(path, dtype=None), read, turns)


def train_step(small: bool, turns: int) -> Result:
    trainers = [bench_training.build(False, False, 0) for _ in range(2)]
    return compare(trainers[0].step, lambda: bench_training.one_graph(trainers[1]), turns)


SUITES = {
    "generate": generate, "forward": forward, "apply": apply, "switch": switch, "sample": sampled,
    "switch-flux": partial(switch, config=FLUX), "sample-flux": partial(sampled, config=FLUX), "load": load,
    "train-step": train_step,
}  # fmt: skip


def draw(results: dict[str, Result], machine: str) -> Image.Image:
    """The ratios as bars, 1 being the baseline."""
    picture = Image.new("RGB", (640, 60 + 34 * len(results)), "white")
    pen, left, unit = ImageDraw.Draw(picture), 110, 200
    pen.text((10, 10), f"time against the baseline (1), {machine}", "black")
    for number, (name, found) in enumerate(results.items()):
        top = 40 + 34 * number
        pen.text((10, top + 5), name, "black")
        pen.rectangle((left, top, left + min(unit * found.ratio, 460), top + 20), "#4a7dbb")
        pen.text((left + min(unit * found.ratio, 460) + 6, top + 5), f"{found.ratio:.3g}", "black")
    pen.line((left + unit, 34, left + unit, 44 + 34 * len(results)), "black")
    return picture


def main() -> None:
    """Run the suites, print a table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - SUITES.keys()
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    machine = f"{platform.machine()} {platform.system()}, torch {torch.__version__}, ComfyUI {host_version}"
    print(machine, f"{'suite':12} {'ours s':>10} {'baseline s':>11} {'ratio':>7}", sep="\n")
    results = {}
    for name in arguments.suites or SUITES:
        results[name] = found = SUITES[name](arguments.small, arguments.turns)
        spread = f"{min(found.ratios):.3g} to {max(found.ratios):.3g}"
        print(f"{name:12} {found.ours:10.4f} {found.baseline:11.4f} {found.ratio:7.3g}   ({spread})", flush=True)
    if arguments.json:
        told = {"machine": machine, "suites": {name: found._asdict() for name, found in results.items()}}
        arguments.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    if arguments.plot:
        draw(results, machine).save(arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
