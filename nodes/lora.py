"""Apply, save and load generated LoRAs."""

from comfy_api.latest import io

from ..hywu_core.host import cards, told
from ..hywu_core.host.lora import apply, lora_cards, store
from .types import curve_input, lora_input, lora_outputs, part_inputs


class HYWUApplyLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUApplyLoRA",
            display_name="Apply Instance LoRA",
            category="HY-WU",
            search_aliases=["apply generated lora", "instance lora", "lora loader", "merge lora", "bypass", "edit"],
            description="Puts a LoRA on a model. The model that is wired in stays as it is, and several of these nodes can "
            "follow each other in any order. Strength and schedule can be changed without generating again.",
            inputs=[
                io.Model.Input("model", tooltip="The base that the LoRA was generated for."),
                lora_input("A generated LoRA."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,  # wider than of use: ComfyUI refuses saved workflows with values beyond
                    max=10.0,
                    step=0.05,
                    tooltip="1 is what the generator meant, 0 switches it off. Negative values take the change away from the "
                    "model, which is seldom the opposite edit; beyond -2 and 2 pictures fall apart.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["auto", "bypass", "merge"],
                    default="auto",
                    tooltip="bypass adds the LoRA beside the layers: exact on quantised and offloaded models, nothing is "
                    "rewritten. merge writes it into the weights: for torch.compile and for saving merged models. auto is "
                    "bypass, and merge where that cannot do it: on a compiled model, and for what of a LoRA cannot stand "
                    "beside a layer.",
                ),
                *part_inputs(),
                curve_input(
                    "What the strength is multiplied by, from the first step (left) to the last one (right): from Curve "
                    "Editor. Needs bypass."
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with the LoRA, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, lora, strength, mode, start_percent=0.0, end_percent=1.0, curve=None):
        lora = store.as_instance_lora(lora)
        patched, matches = apply.apply_lora(model, lora, strength, mode, start_percent, end_percent, curve)
        card = lora_cards.applied(lora, matches, strength, mode)
        told.watch(patched, lora, cards.of_this_node(), card)
        return io.NodeOutput(patched, ui=cards.outputs(card))


class HYWUSaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUSaveLoRA",
            display_name="Save Instance LoRA",
            category="HY-WU",
            search_aliases=["export lora", "instance lora"],
            is_output_node=True,
            description="Saves a generated LoRA as an ordinary LoRA file, into the output folder. In the stock format "
            "ComfyUI's own LoRA loader reads it. A batch is saved as one file for each picture.",
            inputs=[
                lora_input("The LoRA to save."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/hywu",
                    tooltip="Folder and beginning of the name, below the output folder.",
                ),
                io.Combo.Input(
                    "format",
                    options=["stock", "peft"],
                    default="stock",
                    tooltip="stock: a file for ComfyUI. peft: a folder for PEFT, and for diffusers where that names "
                    "the modules as ComfyUI does.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(store.SAVE_DTYPES),
                    default="as generated",
                    advanced=True,
                    tooltip="What the factors are stored in.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="Where the (last) file was written.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix, format, dtype):
        lora = store.as_instance_lora(lora)
        path = store.save_to_output(lora, filename_prefix, format, store.SAVE_DTYPES[dtype])
        return io.NodeOutput(str(path), ui=cards.outputs(lora_cards.saved(lora, path, store.remarks(lora, format))))


class HYWULoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWULoadLoRA",
            display_name="Load Instance LoRA",
            category="HY-WU",
            search_aliases=["lora loader", "instance lora", "import lora"],
            description="Loads a saved LoRA, generated here or made by another tool, with its metadata.",
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=store.names(),
                    tooltip="A LoRA file in models/loras or output/loras, or the pocket editor's own.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base of the LoRA. With it, targets that another tool has named get the base's own names, so "
                    "that LoRAs of several tools can be blended, compared and saved together.",
                ),
            ],
            outputs=lora_outputs("For Apply Instance LoRA, Blend, Inspect and Compare."),
        )

    @classmethod
    def fingerprint_inputs(cls, lora, model=None):
        return store.modified(lora)

    @classmethod
    def execute(cls, lora, model=None):
        loaded = store.load(lora, model)
        return io.NodeOutput(loaded, store.output_for_the_host(loaded))


NODES = [HYWUApplyLoRA, HYWUSaveLoRA, HYWULoadLoRA]
