"""The pack's own socket types."""

from comfy_api.latest import io

Generator = io.Custom("HYWU_GENERATOR")  # hywu_core.host.generators.GeneratorHandle
Condition = io.Custom("HYWU_CONDITION")  # hywu_core.condition.Condition
Lora = io.Custom("HYWU_LORA")  # hywu_core.InstanceLora
Encoder = io.Custom("HYWU_HI3_ENCODER")  # hywu_core.bases.hunyuan_image3.edit.Encoder
