"""HunyuanImage-3.0-Instruct: the base that Tencent's generator was trained for."""

from comfy_api.latest import io

from ..hywu_core.bases import hunyuan_image3 as hi3
from ..hywu_core.bases.hunyuan_image3 import model_folder
from ..hywu_core.host import folders, memory, streaming
from .types import Condition, Encoder

WEIGHT_DTYPES = ("default", "bfloat16", "float32")


def _pictures_input() -> io.Autogrow.Input:
    tooltip = "The source pictures, in the order in which the instruction speaks of them. A batch counts as several."
    template = io.Autogrow.TemplatePrefix(io.Image.Input("image", tooltip=tooltip), prefix="image", min=1, max=3)
    return io.Autogrow.Input("images", template=template, tooltip=tooltip)


def _prompt_input() -> io.String.Input:
    return io.String.Input(
        "prompt",
        multiline=True,
        dynamic_prompts=True,
        tooltip="The instruction: what is to be changed in the pictures.",
    )


class HYWULoadHunyuanImage3(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWULoadHunyuanImage3",
            display_name="Load HunyuanImage-3",
            category="HY-WU/HunyuanImage-3",
            search_aliases=["hunyuan image 3", "instruct", "tencent", "80b"],
            description="Loads HunyuanImage-3.0-Instruct, the 80B base of the released HY-WU generator: its official folder, "
            "or one converted to fp8 or 4 bit. Put the folder into models/hunyuan_image3. The weights have a licence of "
            "their own, which grants nothing in the EU, the UK and South Korea.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=model_folder.names(),
                    tooltip="A folder in models/hunyuan_image3 with config.json, tokenizer.json, system_prompt.py and the "
                    ".safetensors files.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="What weights that are not quantised are kept in. default: as stored, if the device can use it.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="For HunyuanImage-3 Condition, Apply Instance LoRA and KSampler."),
                io.Vae.Output("vae", tooltip="For VAE Decode."),
                Encoder.Output("encoder", tooltip="For HunyuanImage-3 Edit and HunyuanImage-3 Reason."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, weight_dtype):
        return folders.modified(model_folder.path(folder))

    @classmethod
    def execute(cls, folder, weight_dtype):
        return io.NodeOutput(*hi3.load(model_folder.path(folder), memory.WEIGHT_DTYPES[weight_dtype]))


class HYWUHunyuanImage3Edit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUHunyuanImage3Edit",
            display_name="HunyuanImage-3 Edit",
            category="HY-WU/HunyuanImage-3",
            search_aliases=["edit", "image editing", "hunyuan image 3"],
            description="Encodes an instruction and one to three pictures for HunyuanImage-3. Positive and negative go into "
            "KSampler (cfg 2.5, euler, simple, 50 steps), positive also into HunyuanImage-3 Condition.",
            inputs=[
                Encoder.Input("encoder", tooltip="From Load HunyuanImage-3."),
                _prompt_input(),
                _pictures_input(),
                io.String.Input(
                    "reasoning",
                    multiline=True,
                    default="",
                    tooltip="How the edit is to be understood, in <think> and <recaption> tags: from HunyuanImage-3 "
                    "Reason, or your own. Empty: none, which is fastest.",
                ),
                io.String.Input(
                    "size",
                    default="auto",
                    tooltip="auto; pixels as height x width, as the model itself writes them; or a ratio as width : "
                    "height. 1024x768 and 3:4 are both a portrait. The nearest of the model's sizes is taken. auto: the "
                    "latent of this node has the first picture's shape, that of HunyuanImage-3 Condition the shape that "
                    "the model chooses.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Only read by reference_compatible: its source pictures' latents are drawn with it.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(hi3.FITS),
                    default="auto",
                    advanced=True,
                    tooltip="How a picture comes to the nearest of the model's sizes: cropped around its centre, or "
                    "stretched. auto: stretched where size is auto, as in the reference.",
                ),
                io.Boolean.Input(
                    "reference_compatible",
                    default=False,
                    advanced=True,
                    tooltip="Do as the reference implementation: draw source latents at random (by seed) instead of taking "
                    "their mean, and write an empty reasoning as an empty answer.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Images to make of this edit at once.",
                ),
                io.String.Input(
                    "system_prompt",
                    multiline=True,
                    default="",
                    advanced=True,
                    tooltip="Another than the base's own, which Tencent's generator was trained with. Empty: its own.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="For KSampler and for HunyuanImage-3 Condition."),
                io.Conditioning.Output("negative", tooltip="For KSampler: the pictures without the instruction."),
                io.Latent.Output("latent", tooltip="For KSampler: empty, of the size asked for."),
            ],
        )

    @classmethod
    def execute(
        cls,
        encoder,
        prompt,
        images: io.Autogrow.Type,
        reasoning,
        size,
        seed,
        fit,
        reference_compatible,
        batch_size,
        system_prompt,
    ):
        wishes = hi3.Wishes(reasoning, size, fit, seed, reference_compatible, batch_size, system_prompt or None)
        return io.NodeOutput(*hi3.for_sampler(hi3.make_edit(encoder, prompt, list(images.values()), wishes)))


class HYWUHunyuanImage3Condition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUHunyuanImage3Condition",
            display_name="HunyuanImage-3 Condition",
            category="HY-WU/HunyuanImage-3",
            search_aliases=["hunyuan image 3", "hidden states", "instance lora"],
            description="Runs HunyuanImage-3 once over the instruction and the pictures, and gives what the released "
            "generator reads: the base's last hidden states. The same pass says which size the model would choose.",
            inputs=[
                io.Model.Input("model", tooltip="From Load HunyuanImage-3. LoRAs on it do not act here."),
                io.Conditioning.Input("positive", tooltip="From HunyuanImage-3 Edit."),
            ],
            outputs=[
                Condition.Output("condition", tooltip="For Generate Instance LoRA."),
                io.Int.Output(
                    "width", tooltip="Of the size that was asked for, or that the model chooses where it is auto."
                ),
                io.Int.Output("height", tooltip="The same, height."),
                io.Latent.Output("latent", tooltip="For KSampler: empty, of that size."),
            ],
        )

    @classmethod
    def execute(cls, model, positive):
        edit = hi3.from_conditioning(positive)
        read = hi3.read_edit(model, edit)
        return io.NodeOutput(read.condition, read.size.width, read.size.height, {"samples": edit.latent(read.size)})


class HYWUHunyuanImage3Reason(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUHunyuanImage3Reason",
            display_name="HunyuanImage-3 Reason",
            category="HY-WU/HunyuanImage-3",
            search_aliases=["hunyuan image 3", "think", "recaption", "prompt rewrite"],
            description="Lets HunyuanImage-3 think about an edit and write it out in full, as text for HunyuanImage-3 Edit. "
            "It is slow where the weights do not fit into the GPU's memory: every token streams the experts that it needs.",
            inputs=[
                io.Model.Input("model", tooltip="From Load HunyuanImage-3. LoRAs on it do not act here."),
                Encoder.Input("encoder", tooltip="From Load HunyuanImage-3."),
                _prompt_input(),
                _pictures_input(),
                io.Combo.Input(
                    "mode",
                    options=list(hi3.MODES),
                    default="recaption",
                    tooltip="recaption writes the instruction out in full. think and recaption thinks first: better, and "
                    "several times longer.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same text.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=2048,
                    min=1,
                    max=8192,
                    tooltip="The text ends here at the latest, its tags closed.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.6,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip="0 always takes the likeliest token.",
                ),
                io.Int.Input(
                    "top_k",
                    default=1024,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip="Choose among that many of the likeliest tokens; 0 among all.",
                ),
                io.Float.Input(
                    "top_p",
                    default=0.95,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="And of these among the fewest that together have this share.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(hi3.FITS),
                    default="auto",
                    advanced=True,
                    tooltip="How a picture comes to the nearest of the model's sizes; as in HunyuanImage-3 Edit.",
                ),
            ],
            outputs=[
                io.String.Output("reasoning", tooltip="For HunyuanImage-3 Edit. Text that can be read and changed.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, encoder, prompt, images: io.Autogrow.Type, mode, seed, max_tokens, temperature, top_k, top_p, fit
    ):
        edit = hi3.make_edit(encoder, prompt, list(images.values()), hi3.Wishes(fit=fit))
        choice, watch = hi3.Choice(temperature, top_k, top_p), streaming.on_node(cls.hidden.unique_id)
        text = hi3.reason(model, edit, mode, seed, choice, max_tokens, watch)
        return io.NodeOutput(text, ui={"text": (text,)})


NODES = [HYWULoadHunyuanImage3, HYWUHunyuanImage3Edit, HYWUHunyuanImage3Condition, HYWUHunyuanImage3Reason]
