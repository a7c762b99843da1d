"""What one layer of the released HunyuanImage-3 asks of a device: kernels launched, and how often the CPU waits for it.

Run: .venv/bin/python scripts/bench_hunyuan_launches.py
Counted on torch's meta device, which computes nothing and needs no memory: a sampling step of two images of 1024x1024 (with
and without the instruction), whose prefix is cached; the layer as it is, and with a LoRA beside all of its weights. Attention
and norms count as the one kernel that they are on a GPU, views and allocations as none.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple
from unittest import mock

from in_host import enter_host

KINDS = ("bfloat16", "fp8")
IMAGES, TOKENS, PREFIX, RANK = 2, 4097, 2048, 16


class Counts(NamedTuple):
    """Of one layer and step."""

    launches: int
    waits: int
    kernels: Counter  # {name: times}
    before: int  # kernels that were launched before the first wait


def count(kind: str = "bfloat16", with_lora: bool = True) -> Counts:
    """Run a layer once. The host must have been entered.

    Args:
        kind: what its large weights are stored as.
    """
    import comfy.ldm.modules.attention as attention
    import torch
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from hywu_core.bases.hunyuan_image3.config import BaseConfig
    from hywu_core.bases.hunyuan_image3.geometry import Rows
    from hywu_core.bases.hunyuan_image3.transformer import Stretch
    from hywu_core.host.lora.forwards import Beside

    class Fused(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm):
                seen[func.__name__] += 1
                return torch.empty_like(args[0])
            return func(*args, **(kwargs or {}))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not all(kind in (torch.Tensor, torch.nn.Parameter) for kind in types):
                return NotImplemented
            leaves = tree_leaves((args, kwargs))
            if func is torch.ops.aten._to_copy.default and kwargs.get("device", meta).type == "cpu":
                waited.append(sum(seen.values()))
                return _even(args[0], IMAGES * TOKENS * config.moe_topk)
            if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves) or "device" in (kwargs or {}):
                if not func.is_view and func.overloadpacket not in free and "empty" not in func.name():
                    seen[func.name()] += 1
            return func(*args, **(kwargs or {}))

    free = {torch.ops.aten.detach, torch.ops.aten._unsafe_view}
    seen, waited, meta, config = Counter(), [], torch.device("meta"), BaseConfig()
    layer = _layer(config, kind)
    besides = _besides(layer, config) if with_lora else {}
    for module, parts in besides.items():
        beside = Beside()
        beside.start(module.forward, parts)
        module.forward = beside
    head = config.attention_head_dim
    past = [torch.empty(IMAGES, config.num_key_value_heads, PREFIX, head, device=meta, dtype=torch.bfloat16)] * 2
    table = torch.empty(TOKENS, head, device=meta)
    stretch = Stretch(PREFIX, table, table, (Rows(PREFIX, PREFIX + 1, True), Rows(PREFIX + 1, PREFIX + TOKENS, False)))
    x = torch.empty(IMAGES, TOKENS, config.hidden_size, device=meta, dtype=torch.bfloat16)
    as_on_a_gpu = mock.patch.object(attention, "optimized_attention", attention.attention_pytorch)
    with torch.no_grad(), as_on_a_gpu, Fused(), Seen():
        layer(x, stretch, tuple(past))
    return Counts(sum(seen.values()), len(waited), seen, waited[0] if waited else 0)


def _even(like, total: int):
    """Counts that are as equal as they can be."""
    import torch

    share, rest = divmod(total, like.numel())
    return torch.tensor([share + (index < rest) for index in range(like.numel())]).view(like.shape)


def _layer(config, kind: str):
    """On the meta device, without a number in it."""
    import comfy.ops
    import torch

    from hywu_core.bases.hunyuan_image3.transformer import Layer

    if kind == "bfloat16":
        return Layer(config, comfy.ops.disable_weight_init, device="meta", dtype=torch.bfloat16)
    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.bfloat16)
    layer = Layer(config, operations, device="meta", dtype=torch.bfloat16)
    for name, module in layer.named_modules():
        if not hasattr(module, "in_features"):
            continue
        experts = getattr(module, "num_experts", None)
        shape = (*(() if experts is None else (experts,)), module.out_features, module.in_features)
        if name == "mlp.gate.wg":
            module.weight = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16), False)
            continue
        _store_as_fp8(module, shape)
    return layer


def _store_as_fp8(module, shape: tuple[int, ...]) -> None:
    import torch
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class

    name = QUANT_ALGOS["float8_e4m3fn"]["comfy_tensor_layout"]
    scale = torch.empty(shape[:-2], device="meta", dtype=torch.float32)
    params = get_layout_class(name).Params(scale=scale, orig_dtype=torch.bfloat16, orig_shape=shape)
    stored = QuantizedTensor(torch.empty(shape, device="meta", dtype=torch.float8_e4m3fn), name, params)
    module.weight = torch.nn.Parameter(stored, requires_grad=False)
    module.quant_format, module.layout_type = "float8_e4m3fn", name
    module._full_precision_mm = module._full_precision_mm_config = True


def _besides(layer, config) -> dict:
    """{module: [(adapter, strength)]} of a LoRA on every weight that the released generator writes for."""
    import torch

    from hywu_core.host.lora.bank import Adapter
    from hywu_core.host.lora.matching import Match
    from hywu_core.lora import LoraFactor

    hidden, inner = config.hidden_size, config.moe_intermediate_size
    halves = ((0, inner), (inner, inner))
    targets = {
        "self_attn.qkv_proj": (hidden, config.qkv_features, ((0, None),)),
        "self_attn.o_proj": (config.num_attention_heads * config.attention_head_dim, hidden, ((0, None),)),
        "mlp.shared_mlp.gate_and_up_proj": (hidden, inner, halves),
        "mlp.shared_mlp.down_proj": (inner, hidden, ((0, None),)),
        "mlp.experts.gate_and_up_proj": (hidden, inner, halves),
        "mlp.experts.down_proj": (inner, hidden, ((0, None),)),
    }
    besides = {}
    for path, (columns, rows, places) in targets.items():
        lead = (1, config.num_experts) if ".experts." in path else (1,)
        besides[layer.get_submodule(path)] = []
        for start, length in places:
            down = torch.empty(*lead, RANK, columns, device="meta", dtype=torch.bfloat16)
            up = torch.empty(*lead, rows, RANK, device="meta", dtype=torch.bfloat16)
            adapter = Adapter(Match(path, LoraFactor(down, up), path, start, length), 1.0)
            besides[layer.get_submodule(path)].append((adapter, 1.0))
    return besides


def main() -> None:
    """Print a table."""
    enter_host()
    print("weights     LoRA   launches   waits   launches before the wait")
    for kind in KINDS:
        for with_lora in (False, True):
            found = count(kind, with_lora)
            print(
                f"{kind:<10} {'yes' if with_lora else 'no':>5} {found.launches:>10} {found.waits:>7} {found.before:>10}"
            )


if __name__ == "__main__":
    main()
