"""Blocks of a generator that are computed again in the backward pass, as a whole or by parts of branches."""

import pytest
import torch

from hywu_core import Generator, GeneratorConfig
from hywu_core.recompute import ROW_COST, recomputed
from hywu_core.transformer import Tables


@pytest.fixture
def generator():
    config = GeneratorConfig.from_dict(
        {
            "d_model": 16, "head_dim": 8, "num_pg_layers": 2, "input_dim": 8, "output_dim": 8, "token_dim": 8, "rank": 2,
            "num_base_model_layers": 3, "alpha": 4, "dim_accumulation": 2, "hywu": {"encoder_layers": 1},
            "pg_mapping": {"b": {"lora_A_dim": 40, "lora_B_dim": 24}, "a": {"lora_A_dim": 24, "lora_B_dim": 8}},
        }
    )  # fmt: skip
    return Generator(config, dtype=torch.float64).initialize()


@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
def test_a_block_in_parts_gives_the_same_numbers_and_gradients(generator, rows):
    source = torch.Generator().manual_seed(0)
    block, tables = generator.model.blocks[0], Tables(generator.config, torch.device("cpu"))
    shape = (2, 3, tables.positions, 16)
    x, context = (torch.randn(s, generator=source, dtype=torch.float64).requires_grad_() for s in (shape, (2, 5, 16)))
    wanted = torch.randn(shape, generator=source, dtype=torch.float64)
    found = []
    for run in (block, lambda *args: recomputed(block, *args, chunk=rows * ROW_COST * 2 * 16 * 8)):
        y = run(x, context, tables)
        y.backward(wanted)
        found.append([y.detach(), *(t.grad.clone() for t in (x, context, *block.parameters()))])
        block.zero_grad()
        x.grad = context.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_less_is_remembered(generator):
    block, tables = generator.model.blocks[0], Tables(generator.config, torch.device("cpu"))
    x = torch.randn(1, 3, tables.positions, 16, dtype=torch.float64, requires_grad=True)
    context = torch.randn(1, 5, 16, dtype=torch.float64)

    def remembered(run):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            run(x, context, tables)
        return sum(kept.values())

    assert remembered(lambda *args: recomputed(block, *args)) < remembered(block) / 10
