"""Memory and time of `Generator.generate` against the same forward unchunked.

Each variant runs in a process of its own, so that its peak is its own. Memory is the peak resident size above what is
resident before the run (weights, libraries) and above the output. Run: .venv/bin/python scripts/bench_generate.py
Fails if `generate` needs more than half of the plain forward's memory, or more than 1.1 of its time.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time

VARIANTS = {
    "forward": "the plain forward, no graph",
    "one chunk": "generate, nothing split",
    "generate": "generate as it is",
}
REPEATS = 3
MOST_MEMORY, MOST_TIME = 0.5, 1.1  # of the plain forward's


def build():
    """d_model 512, 8 layers of 371 tokens, rank 16, 4 blocks, a condition of 512 tokens: random weights."""
    import torch

    from hywu_core import Generator, GeneratorConfig

    config = GeneratorConfig(
        d_model=512, head_dim=64, num_pg_layers=4, input_dim=512, output_dim=128, token_dim=128, num_base_model_layers=8,
        rank=16, alpha=16, dim_accumulation=4, pg_mapping={"q": {"lora_A_dim": 128 * 185, "lora_B_dim": 128 * 186}},
    )  # fmt: skip
    source = torch.Generator().manual_seed(0)
    return Generator(config).initialize(0), torch.randn(1, 512, 512, generator=source)


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * resource.getpagesize()


def measure(variant: str) -> dict[str, float]:
    import torch

    generator, condition = build()
    run = {
        "forward": lambda: torch.no_grad()(generator)(condition),
        "one chunk": lambda: generator.generate(condition, chunk_bytes=2**60),
        "generate": lambda: generator.generate(condition),
    }[variant]
    before = resident()
    lora = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"bytes": peak - before - lora.elements * 4, "seconds": min(seconds)}


def main() -> int:
    """Measure all, print a table, say whether the bounds hold."""
    fresh = multiprocessing.get_context("spawn")  # not a fork, which would inherit this process's memory
    results = {}
    for variant in VARIANTS:
        with fresh.Pool(1) as process:
            results[variant] = process.apply(measure, (variant,))
    plain, ours = results["forward"], results["generate"]
    print(f"{'variant':12} {'peak MiB':>9} {'ratio':>6} {'seconds':>8} {'ratio':>6}")
    for variant, found in results.items():
        print(
            f"{variant:12} {found['bytes'] / 2**20:9.0f} {found['bytes'] / plain['bytes']:6.2f} "
            f"{found['seconds']:8.2f} {found['seconds'] / plain['seconds']:6.2f}   {VARIANTS[variant]}"
        )
    small, fast = ours["bytes"] <= MOST_MEMORY * plain["bytes"], ours["seconds"] <= MOST_TIME * plain["seconds"]
    for bound, kept in ((f"{MOST_MEMORY}x the memory", small), (f"{MOST_TIME}x the time", fast)):
        print(f"at most {bound}: {'yes' if kept else 'NO'}")
    return 0 if small and fast else 1


if __name__ == "__main__":
    sys.exit(main())
