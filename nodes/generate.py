"""Load a generator, gather its condition, and write the LoRA of one edit."""

from comfy_api.latest import io

from ..hywu_core.host import cards, conditions, folders, generator_cards, memory
from ..hywu_core.host.lora import store
from .types import Condition, Generator, Lora

MORE = (
    "Further edits, of any lengths: one LoRA comes out that holds an instance for each, in this order, for as many pictures "
    "in one batch. The generator is brought to the device once for all of them."
)


class HYWULoadGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWULoadGenerator",
            display_name="Load HY-WU Generator",
            category="HY-WU",
            search_aliases=["hypernetwork", "instance lora", "weight unleashing", "hy-wu"],
            description="Loads a generator: the network that reads one picture and one instruction and writes a LoRA for "
            "exactly that edit. Put its folder (config.json and .safetensors files) or its single .safetensors file into "
            "models/hywu.",
            inputs=[
                io.Combo.Input(
                    "generator",
                    options=folders.generator_names(),
                    tooltip="A generator in models/hywu. A name that ends in / is a folder.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(memory.WEIGHT_DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="What the weights are kept in. default: as stored. int8 and fp8_e4m3fn keep large matrices in "
                    "half of what bfloat16 takes; int8 is the more exact of the two.",
                ),
            ],
            outputs=[Generator.Output("generator", tooltip="Wire it into Generate Instance LoRA.")],
        )

    @classmethod
    def fingerprint_inputs(cls, generator, weight_dtype):
        return folders.modified(folders.generator_path(generator))

    @classmethod
    def execute(cls, generator, weight_dtype):
        path = folders.generator_path(generator)
        handle = memory.load(path, memory.WEIGHT_DTYPES[weight_dtype])
        return io.NodeOutput(handle, ui=cards.outputs(generator_cards.loaded(handle)))


class HYWUCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUCondition",
            display_name="HY-WU Condition",
            category="HY-WU",
            search_aliases=["instruction", "edit", "hidden states", "hypernetwork input"],
            description="Gathers what a generator reads: the encoded instruction (and picture, where the text encoder sees "
            "it), and for generators that were trained with them the patch features of a CLIP Vision model or the base's own "
            "hidden states.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The instruction, from the base's own text encoder, as for the sampler."
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="The source picture, from CLIP Vision Encode. Only for generators that were trained with it.",
                ),
                io.String.Input(
                    "instruction",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="The instruction as text. It changes nothing; it is written into the metadata of saved LoRAs.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base itself, only for generators that were trained with its hidden states. It is run once "
                    "on the source picture (Set Reference Latent), and what it sees takes the place of the conditioning.",
                ),
            ],
            outputs=[Condition.Output("condition", tooltip="Wire it into Generate Instance LoRA.")],
        )

    @classmethod
    def execute(cls, conditioning, clip_vision_output=None, instruction="", model=None):
        return io.NodeOutput(conditions.from_host(conditioning, clip_vision_output, instruction, model))


class HYWUGenerateLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUGenerateLoRA",
            display_name="Generate Instance LoRA",
            category="HY-WU",
            search_aliases=["edit", "image editing", "instance lora", "hypernetwork", "write lora"],
            description="Writes the LoRA for exactly this picture and this instruction, in one forward pass of the "
            "generator. The result depends on nothing else: changing the seed, the sampler or the strength does not run "
            "it again.",
            inputs=[
                Generator.Input("generator", tooltip="From Load HY-WU Generator."),
                io.MultiType.Input(
                    "condition",
                    types=[Condition, io.Conditioning],
                    tooltip="What the generator reads: a HY-WU condition, or the text encoder's CONDITIONING directly.",
                ),
                io.Float.Input(
                    "keep_gb",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Keep generated LoRAs on the disk, this many GB of them in all, so that the same edit is read "
                    "the next time instead of generated. 0: keep none.",
                ),
                io.Autogrow.Input(
                    "more_conditions",
                    optional=True,
                    template=io.Autogrow.TemplatePrefix(
                        io.MultiType.Input("condition", types=[Condition, io.Conditioning], tooltip=MORE),
                        prefix="condition",
                        min=0,
                        max=50,
                    ),
                    tooltip=MORE,
                ),
            ],
            outputs=[
                Lora.Output("lora", tooltip="The generated LoRA, for Apply Instance LoRA and Save Instance LoRA."),
                io.LoraModel.Output(
                    "lora_model",
                    tooltip="The same LoRA for ComfyUI's own nodes; the first one of a batch. They have no key for banks of "
                    "experts: of HunyuanImage-3 only the other targets act there.",
                ),
            ],
        )

    @classmethod
    def execute(cls, generator, condition, keep_gb=0.0, more_conditions: io.Autogrow.Type = None):
        first, *more = map(conditions.as_condition, (condition, *(more_conditions or {}).values()))
        lora, card = generator_cards.generate(generator, first, keep_gb, more)
        return io.NodeOutput(lora, store.output_for_the_host(lora), ui=cards.outputs(card))


NODES = [HYWULoadGenerator, HYWUCondition, HYWUGenerateLoRA]
