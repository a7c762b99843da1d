"""The pack's own socket types."""

from comfy_api.latest import io

Generator = io.Custom("HYWU_GENERATOR")  # hywu_core.host.generators.GeneratorHandle
Condition = io.Custom("HYWU_CONDITION")  # hywu_core.condition.Condition
Lora = io.Custom("HYWU_LORA")  # hywu_core.InstanceLora
Encoder = io.Custom("HYWU_HI3_ENCODER")  # hywu_core.bases.hunyuan_image3.edit.Encoder


def lora_input(tooltip: str, id: str = "lora") -> io.MultiType.Input:
    """A LoRA of either kind: ours, or ComfyUI's own LORA_MODEL."""
    return io.MultiType.Input(id, types=[Lora, io.LoraModel], tooltip=f"{tooltip} A LORA_MODEL does as well.")


def lora_outputs(tooltip: str) -> list:
    """A LoRA as both kinds."""
    return [
        Lora.Output("lora", tooltip=tooltip),
        io.LoraModel.Output(
            "lora_model",
            tooltip="The same LoRA for ComfyUI's own nodes; the first one of a batch, without banks of experts.",
        ),
    ]


def curve_input(tooltip: str) -> io.Curve.Input:
    """A socket for ComfyUI's own CURVE, without a curve drawn on the node."""
    curve = io.Curve.Input("curve", optional=True, socketless=False, default=[(0.0, 1.0), (1.0, 1.0)], tooltip=tooltip)
    curve.force_input = True
    return curve


def part_inputs() -> list[io.Float.Input]:
    """The part of the sampling in which a LoRA acts."""
    ends = (
        ("start_percent", 0.0, "From which part of the sampling on"),
        ("end_percent", 1.0, "Up to which part of the sampling"),
    )
    return [
        io.Float.Input(
            name,
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip=f"{words} the LoRA acts. Needs bypass.",
        )
        for name, default, words in ends
    ]
