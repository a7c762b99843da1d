"""What the graph of a generator takes at the size of real bases, counted on the meta device."""

import pytest
import torch
import torch.nn.functional as F
from counting import Alive

from hywu_core import Generator, GeneratorConfig
from hywu_core.training.memory import graph_bytes

LENGTH = 512
SIZES = {"small": (128, 32, 2, 2, 64), "medium": (512, 64, 6, 4, 128)}


class FusedAttention(torch.autograd.Function):
    """Attention as one kernel remembers it; the meta device would write all scores out."""

    @staticmethod
    def forward(ctx, queries, keys, values):
        result = torch.empty_like(queries)
        ctx.save_for_backward(queries, keys, values, result, queries.new_empty(queries.shape[:-1]))
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def config(size, layers=19, width=3072):
    """For the double blocks of Flux."""
    d_model, head_dim, blocks, accumulation, token_dim = SIZES[size]
    sides = {"attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.0": (1, 4), "mlp.2": (4, 1)}
    return GeneratorConfig.from_dict(
        {
            "d_model": d_model, "head_dim": head_dim, "num_pg_layers": blocks, "input_dim": 64, "output_dim": token_dim,
            "token_dim": token_dim, "rank": 16, "alpha": 32, "num_base_model_layers": layers, "prefix": "double_blocks.",
            "dim_accumulation": accumulation, "hywu": {"encoder_layers": 1},
            "pg_mapping": {
                f"{stream}_{name}": {"lora_A_dim": width * columns, "lora_B_dim": width * rows}
                for stream in ("img", "txt") for name, (columns, rows) in sides.items()
            },
        }
    )  # fmt: skip


def peak(made):
    with Alive() as alive:
        lora = made(torch.empty(1, LENGTH, 64, device="meta"))
        factors = [factor for pair in lora.pairs for factor in pair]
        torch.autograd.backward(factors, [torch.empty_like(factor) for factor in factors])
    return alive.peak


@pytest.mark.parametrize(("size", "recomputed"), [("small", True), ("small", False), ("medium", True)])
def test_a_graph_takes_what_it_is_said_to(monkeypatch, size, recomputed):
    monkeypatch.setattr(F, "scaled_dot_product_attention", FusedAttention.apply)
    made = Generator(config(size), device="meta", dtype=torch.float32)
    made.checkpoint_blocks = recomputed
    said = graph_bytes(made.config, LENGTH, torch.float32, recomputed)
    assert 0.8 * said < peak(made) < 1.05 * said


def test_recomputing_leaves_a_fifth(monkeypatch):
    said = [graph_bytes(config("small"), LENGTH, torch.float32, again) for again in (False, True)]
    assert said[1] < 0.25 * said[0] and said[1] < 2.2e9
