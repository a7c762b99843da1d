"""The short way: one node from picture and words to what a sampler takes."""

from comfy_api.latest import io

from ..hywu_core.host import cards, edit
from ..hywu_core.host.lora import store
from .types import Generator, lora_outputs, part_inputs


class HYWUEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUEdit",
            display_name="Edit with Instance LoRA",
            category="HY-WU",
            search_aliases=["edit", "image edit", "instruction", "instance lora", "hypernetwork"],
            description="The short way from a picture and an instruction to an edit: writes the LoRA for exactly these two, "
            "puts it on the model, and gives everything that KSampler takes. The same as Generate Instance LoRA and Apply "
            "Instance LoRA with what stands around them; another strength does not generate again.",
            inputs=[
                io.Model.Input("model", tooltip="The base that the generator was trained for."),
                Generator.Input("generator", tooltip="From Load HY-WU Generator."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The encoded instruction, for text encoders that want more than the text, such as those that see "
                    "the picture. Without it, clip encodes the instruction below.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The base's text encoder. It encodes the instruction, and the empty prompt.",
                ),
                io.Image.Input("image", optional=True, tooltip="The source picture. Needs vae."),
                io.Vae.Input("vae", optional=True, tooltip="The base's VAE, to encode the picture."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The source picture, encoded already: instead of image and vae. With neither, it must be on the "
                    "conditioning (Set Reference Latent).",
                ),
                io.String.Input(
                    "instruction",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What to do with the picture. With conditioning wired, it is only written into saved LoRAs.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="1 is what the generator meant, 0 switches it off.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["auto", "bypass", "merge"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="How the LoRA is put on the model; see Apply Instance LoRA.",
                ),
                *part_inputs(),
                io.Conditioning.Input(
                    "empty",
                    optional=True,
                    tooltip="The encoded empty prompt, where clip is not wired. It is the negative, and what the base is "
                    "told with generators that alone read the instruction.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="The source picture, from CLIP Vision Encode. Only for generators that were trained with it.",
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
                    tooltip="Keep generated LoRAs on the disk, this many GB of them in all; see Generate Instance LoRA.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the LoRA, for KSampler."),
                io.Conditioning.Output(
                    "positive",
                    tooltip="What the base is told: the instruction, or nothing, as the generator was trained; with the "
                    "source picture.",
                ),
                io.Conditioning.Output("negative", tooltip="The empty prompt with the source picture."),
                io.Latent.Output("latent", tooltip="The source picture, encoded: gives the sampler its size."),
                *lora_outputs("The LoRA, for Save Instance LoRA, Blend, Inspect and Compare."),
            ],
        )

    @classmethod
    def execute(
        cls, model, generator, conditioning=None, clip=None, image=None, vae=None, latent=None, instruction="",
        strength=1.0, mode="auto", start_percent=0.0, end_percent=1.0, empty=None, clip_vision_output=None, keep_gb=0.0,
    ):  # fmt: skip
        words = edit.Words(conditioning, clip, instruction, empty)
        how = edit.How(strength, mode, start_percent, end_percent, keep_gb)
        done = edit.edit(model, generator, words, edit.Picture(latent, image, vae), how, clip_vision_output)
        return io.NodeOutput(*done[:-1], store.output_for_the_host(done.lora), ui=cards.outputs(done.card))


NODES = [HYWUEdit]
