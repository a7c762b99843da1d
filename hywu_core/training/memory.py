"""What the graph of a generator takes while it is trained."""

from __future__ import annotations

import torch

from ..config import GeneratorConfig
from ..plan import USUAL_CHUNK, positions

GRAPH_ROOM = 2**30  # bytes that graphs may take beside the base's before samples are taken one after the other
# grids of d elements a position that are there at the same time, counted
OF_A_BLOCK, OF_THE_ENDS = 31, 10
# the same where blocks are computed again: of the one that is, between its branches; around it; and from its end to the LoRA
BETWEEN_BRANCHES, AROUND, AT_THE_END = 4, 3, 5


def graph_bytes(config: GeneratorConfig, length: int, dtype: torch.dtype, recomputed: bool) -> int:
    """Of one sample, with a condition of that length; `recomputed`: blocks are computed again in the backward pass."""
    row, grids = config.d_model * dtype.itemsize, positions(config)
    grid = (grids.all + length) * row
    if not recomputed:
        return (OF_A_BLOCK * config.num_pg_layers + OF_THE_ENDS) * grid
    # a block is computed again for one stack of the base after the other
    largest = (max(stack.all for stack in grids.grids) + length) * row
    block = min(OF_A_BLOCK * largest, BETWEEN_BRANCHES * largest + USUAL_CHUNK)
    return (config.num_pg_layers + AT_THE_END) * grid + AROUND * largest + block
