"""The pocket editor in one of the host's quantised formats, for what measures training on such bases."""

from __future__ import annotations

import json
from typing import Any

BLOCKS = "double_blocks."


def quantised_editor(state: dict[str, Any], config: Any, kind: str, dtype: Any) -> Any:
    """An editor of these weights as a MODEL. The host must have been entered.

    Args:
        state: the diffusion model's; its blocks' matrices are quantised, as checkpoints have it.
        config: an EditorConfig.
        kind: the host's name of the format, "float8_e4m3fn".
        dtype: to compute in, and to keep the rest in.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops

    from hywu_core.bases.pocket.editor import PixelFlux

    model_config = PixelFlux(config.detected(state))
    model_config.set_inference_dtype(dtype, None)
    model_config.custom_operations = comfy.ops.mixed_precision_ops({}, dtype)
    model = model_config.get_model({}, "")
    missing, unexpected = model.diffusion_model.load_state_dict(_stored(state, kind, dtype), strict=False)
    if missing or unexpected:
        raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _stored(state: dict[str, Any], kind: str, dtype: Any) -> dict[str, Any]:
    """What a checkpoint of that format holds."""
    import torch
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
    options = {"scale": "recalculate"} if kind.startswith("float8") else {}
    mark = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        if name.startswith(BLOCKS) and tensor.ndim == 2:
            found |= QuantizedTensor.from_float(tensor.float(), layout, **options).state_dict(name)
            found[name.removesuffix("weight") + "comfy_quant"] = mark
        else:
            found[name] = tensor.to(dtype)
    return found
