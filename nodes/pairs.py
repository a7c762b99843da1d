"""Pairs for training, from a folder."""

from comfy_api.latest import io

from ..hywu_core.host.training import pairs_in_server
from ..hywu_core.host.training.pairs_of_folder import Reading


class HYWULoadEditPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWULoadEditPairs",
            display_name="Load Edit Pairs",
            category="HY-WU/training",
            search_aliases=[
                "load dataset",
                "load folder",
                "training data",
                "image pairs",
                "before and after",
                "edit",
                "train generator",
            ],
            description="Pictures before and after an edit, with what was asked for, from a folder: everything that New and "
            "Train HY-WU Generator read. Takes pairs.jsonl or pairs.csv, metadata.jsonl of the hub, or a folder of sources "
            "and one of targets with a .txt beside each target, as other trainers have them. Always in the same order.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=pairs_in_server.names(),
                    tooltip="A folder in ComfyUI's input folder, or the pairs that come with HY-WU.",
                ),
                io.Clip.Input("clip", tooltip="The base's text encoder."),
                io.Vae.Input("vae", tooltip="The base's VAE."),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Side in pixels to which pictures are brought. 0: as they are; then both of a pair must have one "
                    "size.",
                ),
                io.Boolean.Input(
                    "buckets",
                    default=True,
                    tooltip="With a size: bring each picture to the nearest of several shapes of about size x size pixels. "
                    "Off: cut squares.",
                ),
                io.Combo.Input(
                    "base_reads",
                    options=["told", "blind"],
                    default="told",
                    tooltip="told: the base reads the instruction, too. blind: it reads an empty prompt, and only the "
                    "generator knows what is to be done. What is trained here is what Edit with Instance LoRA does later.",
                ),
                io.Boolean.Input(
                    "text_sees_source",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Show the source picture to the text encoder, as bases such as Qwen-Image-Edit want it.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Guidance for bases that take it as a number, such as FLUX. 0: the base's default.",
                ),
            ],
            outputs=[
                io.Latent.Output("latents", is_output_list=True, tooltip="The edited pictures, for Train."),
                io.Conditioning.Output("positive", is_output_list=True, tooltip="What the base reads, for Train."),
                io.Conditioning.Output(
                    "generator_positive", is_output_list=True, tooltip="What the generator reads, for New and Train."
                ),
                io.String.Output(
                    "instructions", is_output_list=True, tooltip="As text, for Train, which writes them into the file."
                ),
                io.Image.Output("contact_sheet", tooltip="Some of the pairs, before and after."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return pairs_in_server.fingerprint(folder)

    @classmethod
    def execute(cls, folder, clip, vae, size, buckets, base_reads, text_sees_source=False, guidance=0.0):
        reading = Reading(size, base_reads, text_sees_source, guidance, buckets=buckets and size > 0)
        found = pairs_in_server.load(folder, clip, vae, reading)
        return io.NodeOutput(*found)


NODES = [HYWULoadEditPairs]
