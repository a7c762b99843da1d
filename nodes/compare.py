"""Blend LoRAs, and see what they change."""

from comfy_api.latest import io

from ..hywu_core.host import cards
from ..hywu_core.host.lora import charts, lora_cards, store
from .types import lora_input, lora_outputs

MOST_SLIDERS = 8


def _loras_input(minimum: int, tooltip: str) -> io.Autogrow.Input:
    template = io.Autogrow.TemplatePrefix(lora_input(tooltip), prefix="lora", min=minimum, max=50)
    return io.Autogrow.Input("loras", template=template, tooltip=tooltip)


def _sliders(count: int) -> list[io.Float.Input]:
    return [
        io.Float.Input(
            f"weight{place}",
            default=0.5,
            min=-2.0,
            max=2.0,
            step=0.01,
            display_mode=io.NumberDisplay.slider,
            tooltip=f"Weight of the LoRA number {place}.",
        )
        for place in range(1, count + 1)
    ]


class HYWUBlendLoRAs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUBlendLoRAs",
            display_name="Blend Instance LoRAs",
            category="HY-WU",
            search_aliases=["merge loras", "mix loras", "instance lora", "combine", "average", "sum"],
            description="One LoRA whose every change is the weighted sum of the given ones'. Exact: the ranks are put side "
            "by side, products are never averaged factor by factor. A maximum rank cuts the result to the nearest LoRA of "
            "that rank.",
            inputs=[
                _loras_input(2, "The LoRAs to blend; a new socket appears for each one wired in."),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One number for each LoRA, separated by commas, such as 0.7, 0.3 or 70%, 30%. Empty: equal.",
                ),
                io.Int.Input(
                    "max_rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="0 keeps the exact blend, whose rank is the sum of all. Any other number cuts it to that rank.",
                ),
                io.DynamicCombo.Input(
                    "sliders",
                    options=[
                        io.DynamicCombo.Option("off", []),
                        *(io.DynamicCombo.Option(str(count), _sliders(count)) for count in range(2, MOST_SLIDERS + 1)),
                    ],
                    optional=True,
                    tooltip="One slider for each LoRA, instead of the weights above.",
                ),
            ],
            outputs=lora_outputs("The blend, for Apply Instance LoRA and Save Instance LoRA."),
        )

    @classmethod
    def execute(cls, loras: io.Autogrow.Type, weights, max_rank, sliders: io.DynamicCombo.Type = None):
        given = [store.as_instance_lora(lora) for lora in loras.values()]
        numbers = [value for name, value in (sliders or {}).items() if name != "sliders"]
        blended = store.blend_of(given, weights, numbers, max_rank)
        return io.NodeOutput(
            blended, store.output_for_the_host(blended), ui=cards.outputs(lora_cards.inspected(blended))
        )


class HYWUInspectLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUInspectLoRA",
            display_name="Inspect Instance LoRA",
            category="HY-WU",
            search_aliases=["lora norms", "instance lora", "weights", "analyse lora"],
            description="How much a LoRA changes each weight: the norm of its change by layer and target, as a picture and "
            "as a table.",
            inputs=[lora_input("The LoRA to look at. Of a batch, the mean is shown.")],
            outputs=[
                io.Image.Output("image", tooltip="Layers down, targets across. The node shows it, too."),
                io.String.Output("table", tooltip="The same as tab-separated text."),
            ],
        )

    @classmethod
    def execute(cls, lora):
        lora = store.as_instance_lora(lora)
        image, table = charts.norms_by_layer(lora)
        card = lora_cards.inspected(lora)
        return io.NodeOutput(image, table + store.beside_the_pairs([lora]), ui=cards.outputs(card, image, cls))


class HYWUCompareLoRAs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUCompareLoRAs",
            display_name="Compare Instance LoRAs",
            category="HY-WU",
            search_aliases=["lora similarity", "instance lora", "cosine"],
            description="How alike LoRAs are: the cosine between the changes of every two. 1 is the same direction, 0 has "
            "nothing in common, -1 is the opposite direction. Of three or more, what all of them share is left out first "
            "(centred), so that opposite edits stand apart. Compared are the products B A, not the factors.",
            inputs=[
                _loras_input(2, "The LoRAs to compare; a new socket appears for each one wired in."),
                io.Boolean.Input(
                    "centred",
                    default=True,
                    optional=True,
                    tooltip="Leave out what all of them share, so that opposite edits are told apart: LoRAs of one generator "
                    "share much. Needs three or more; two are always compared as they are.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="Every LoRA against every other. The node shows it, too."),
                io.String.Output("table", tooltip="The same as tab-separated text."),
            ],
        )

    @classmethod
    def execute(cls, loras: io.Autogrow.Type, centred=True):
        given = [store.as_instance_lora(lora) for lora in loras.values()]
        image, table = charts.cosines_of(given, centred)
        card = lora_cards.compared(given, centred)
        return io.NodeOutput(image, table + store.beside_the_pairs(given), ui=cards.outputs(card, image, cls))


NODES = [HYWUBlendLoRAs, HYWUInspectLoRA, HYWUCompareLoRAs]
