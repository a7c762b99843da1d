"""One process that uses a shared folder of LoRAs: python cache_worker.py FOLDER SEED. Exits with 1 if one was read wrong."""

import random
import sys

import torch

from hywu_core import InstanceLora, LoraFactor
from hywu_core.files.lora_cache import LoraCache

ROOM = 3 * 20_000


def lora(seed: int, batch: int = 1) -> InstanceLora:
    source = torch.Generator().manual_seed(seed)
    pairs = {
        f"blocks.{layer}.linear[0:128/512]": LoraFactor(
            torch.randn(batch, 4, 64, generator=source).bfloat16(),
            torch.randn(batch, 128, 4, generator=source).bfloat16(),
        )
        for layer in range(4)
    }
    return InstanceLora(pairs, 2.5, {"instruction": f"edit {seed}", "rank": 4})


def same(found: InstanceLora, expected: InstanceLora) -> bool:
    factors = zip(found.pairs, expected.pairs, strict=True)
    return (
        found.names == expected.names
        and (found.scale, dict(found.metadata)) == (expected.scale, dict(expected.metadata))
        and all(torch.equal(a, b) for ours, theirs in factors for a, b in zip(ours, theirs, strict=True))
    )


if __name__ == "__main__":
    cache, chance = LoraCache(sys.argv[1], ROOM), random.Random(int(sys.argv[2]))
    for _ in range(60):
        number = chance.randrange(8)
        if not same(cache.get(str(number), lambda number=number: lora(number)), lora(number)):
            sys.exit(1)
