"""What an artist sees. Each file here lists its nodes in NODES: schemas and one call each, no maths."""

from comfy_api.latest import ComfyExtension

from ..hywu_core.bases.hunyuan_image3 import model_folder
from ..hywu_core.bases.pocket import extras as pocket_extras
from ..hywu_core.host import folders, pack
from . import compare, edit, generate, hunyuan_image3, lora, pairs, pocket, teach, train, values

TOPICS = (edit, generate, lora, values, compare, pairs, train, teach, pocket, hunyuan_image3)


class HYWUExtension(ComfyExtension):
    async def get_node_list(self):
        return [node for topic in TOPICS for node in topic.NODES]


async def comfy_entrypoint() -> ComfyExtension:
    pack.warn_if_not_served()
    folders.register()
    model_folder.register()
    pocket_extras.register()
    return HYWUExtension()
