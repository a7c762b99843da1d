"""The editing model that ships with the pack."""

from comfy_api.latest import io

from ..hywu_core.bases.pocket import load_pocket_editor


class HYWULoadPocketEditor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWULoadPocketEditor",
            display_name="Load Pocket Editor",
            category="HY-WU",
            search_aliases=["tiny model", "test model", "demo", "pixel space", "image editing"],
            description="Loads the tiny editing model that ships with this pack: a 2.5-million-parameter Flux in pixel "
            "space with its text encoder. It runs on a CPU in a second and needs no download, so that every HY-WU node can "
            "be tried at once. It takes small pictures of any shape, best 64 to 128 pixels a side.",
            outputs=[
                io.Model.Output(
                    "model", tooltip="The editing model, for Apply Instance LoRA or straight for KSampler."
                ),
                io.Clip.Output("clip", tooltip="Its text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae", tooltip="Pixels to latents and back, for VAE Encode and VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls):
        return io.NodeOutput(*load_pocket_editor())


NODES = [HYWULoadPocketEditor]
