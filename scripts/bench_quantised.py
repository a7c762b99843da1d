"""How far off a quantised generator is: its LoRAs by target, and the pictures that the pocket editor makes with them.

Weights are quantised and widened again, everything else is float32, so the numbers are those of the weights alone. The
generators are the two that ship, and random blocks of the released shape (4,096 wide) over a small grid.
Run: .venv/bin/python scripts/bench_quantised.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from in_host import ROOT, enter_host

enter_host()
import torch  # noqa: E402

from hywu_core import Generator, GeneratorConfig, InstanceLora, load_generator  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from hywu_core.files.quantised import FP8, INT8, plain, quantised  # noqa: E402
from study import evaluation, pictures  # noqa: E402
from study.edits import SUITES  # noqa: E402
from study.task import EditingTask  # noqa: E402

SHIPPED = {
    "blind": ("", "eight"),
    "told": ("-told", "all"),
}  # regime -> suffix of its file, edits that it was trained on
COUNT = 32
MOST_LORA, MOST_PICTURE = 0.02, 0.1  # of int8: relative error of a LoRA, dB of the pictures' mean PSNR


def variants(generator: Generator) -> Iterator[tuple[str, Generator]]:
    """The same generator, its weights as they would be read from a smaller file."""
    state = generator.state_dict()
    makers = {
        "bfloat16": lambda: plain(state, torch.bfloat16),
        "int8": lambda: dict(quantised(state, INT8)),
        "fp8": lambda: dict(quantised(state, FP8)),
        "fp8, everything, no scale": lambda: plain(state, torch.float8_e4m3fn),
    }
    for name, make in makers.items():
        other = Generator(generator.config, device="meta")
        other.load_state_dict(plain(make(), torch.float32), assign=True)
        yield name, other


def errors(found: InstanceLora, expected: InstanceLora) -> dict[str, dict[str, float]]:
    """Relative error of the factors and of dW, and the cosine of dW: of all, and by the last part of a target's name."""
    groups: dict[str, list[str]] = {"all": list(expected.names)}
    for name in expected.names:
        groups.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    return {group: _errors(names, found, expected) for group, names in groups.items()}


def _errors(names: list[str], found: InstanceLora, expected: InstanceLora) -> dict[str, float]:
    ours, theirs = ([lora.factors[name] for name in names] for lora in (found, expected))
    factors = [torch.cat([factor.flatten() for pair in pairs for factor in pair]) for pairs in (ours, theirs)]
    changes = [torch.cat([(pair.up @ pair.down).flatten() for pair in pairs]).double() for pairs in (ours, theirs)]
    relative = [((a - b).norm() / b.norm()).item() for a, b in (factors, changes)]
    cosine = torch.nn.functional.cosine_similarity(*changes, dim=0).item()
    return {"factors": relative[0], "dW": relative[1], "cosine": cosine}


def shipped(regime: str) -> dict[str, Any]:
    """One trained generator: errors of its LoRAs, and mean PSNR of the pictures against the wanted edit."""
    suffix, suite = SHIPPED[regime]
    generator = load_generator(ROOT / "models" / f"pocket-generator{suffix}.safetensors")
    found, names = pictures.compose("test", 32, 1, 0)
    model, clip, _ = pocket.load_pocket_editor()
    task = EditingTask(clip, found[:COUNT], names[:COUNT], SUITES[suite], generator.config, regime)
    cases = task.balanced_cases(COUNT)

    def psnr(by: Generator) -> float:
        return evaluation.score(model, task, cases, lambda part: evaluation.write(by, task, part)).mean().item()

    expected = evaluation.write(generator, task, cases[:8])
    results: dict[str, Any] = {"float32": {"psnr": psnr(generator)}}
    for name, other in variants(generator):
        results[name] = errors(evaluation.write(other, task, cases[:8]), expected) | {"psnr": psnr(other)}
    return results


def released_shape() -> dict[str, Any]:
    """Two random blocks of the released width, 2 layers of 48 positions, a condition of 64 tokens."""
    config = GeneratorConfig(
        d_model=4096, head_dim=128, num_pg_layers=2, input_dim=4096, output_dim=1024, token_dim=1024, rank=16, alpha=64,
        num_base_model_layers=2, dim_accumulation=4, pg_mapping={"q": {"lora_A_dim": 6144, "lora_B_dim": 6144}},
    )  # fmt: skip
    generator = Generator(config).initialize(0)
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.02)  # trained, not zero
    condition = torch.randn(1, 64, 4096, generator=torch.Generator().manual_seed(1))
    expected = generator.generate(condition)
    return {name: errors(other.generate(condition), expected) for name, other in variants(generator)}


def show(title: str, results: dict[str, Any]) -> None:
    """As Markdown."""
    print(f"\n{title}\n\n| weights | target | factors off | dW off | cosine of dW | PSNR |\n|---|---|---|---|---|---|")
    for name, found in results.items():
        psnr = f"{found['psnr']:.2f} dB" if "psnr" in found else ""
        for target, value in found.items():
            if target != "psnr":
                row = f"{value['factors']:.2%} | {value['dW']:.2%} | {value['cosine']:.5f}"
                print(f"| {name} | {target} | {row} | {psnr if target == 'all' else ''} |")
    if "float32" in results:
        print(f"| float32 | all | 0 | 0 | 1 | {results['float32']['psnr']:.2f} dB |", flush=True)


def main() -> int:
    """Measure, show, say whether int8 keeps its bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write everything there")
    arguments = parser.parse_args()
    measures = {f"shipped, {regime}": lambda regime=regime: shipped(regime) for regime in SHIPPED}
    measures["random, released shape"] = released_shape
    results = {}
    with torch.inference_mode():
        for title, measure in measures.items():
            results[title] = measure()
            show(title, results[title])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    off = max(found["int8"]["all"]["factors"] for found in results.values())
    darker = max(found["float32"]["psnr"] - found["int8"]["psnr"] for found in results.values() if "float32" in found)
    print(
        f"\nint8: LoRA off by at most {off:.2%} (bound {MOST_LORA:.0%}), pictures {darker:.3f} dB (bound {MOST_PICTURE})"
    )
    return 0 if off <= MOST_LORA and darker <= MOST_PICTURE else 1


if __name__ == "__main__":
    sys.exit(main())
