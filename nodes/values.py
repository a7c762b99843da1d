"""What can be done with a LoRA before it meets a model: choose one of a batch, change single blocks, make it a hook."""

from comfy_api.latest import io

from ..hywu_core import by_block
from ..hywu_core.host import cards
from ..hywu_core.host.lora import hooks, lora_cards, store
from .types import lora_input, lora_outputs


class HYWUPickLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUPickLoRA",
            display_name="Pick Instance LoRA",
            category="HY-WU",
            search_aliases=["instance lora", "select lora", "lora from batch", "batch index"],
            description="One LoRA of a batch, such as Generate Instance LoRA writes for several pictures or instructions.",
            inputs=[
                lora_input("A batch of LoRAs."),
                io.Int.Input(
                    "index",
                    default=0,
                    min=-4096,
                    max=4096,
                    tooltip="Which one, counted from 0. Negative numbers count from the end: -1 is the last one.",
                ),
            ],
            outputs=lora_outputs("This one LoRA."),
        )

    @classmethod
    def execute(cls, lora, index):
        chosen = store.as_instance_lora(lora).select(index)
        return io.NodeOutput(chosen, store.output_for_the_host(chosen), ui=cards.outputs(lora_cards.inspected(chosen)))


class HYWULoRAByBlock(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWULoRAByBlock",
            display_name="Instance LoRA by Block",
            category="HY-WU",
            search_aliases=["instance lora", "block weight", "lora block", "layer strength", "edit"],
            description="Makes a LoRA stronger or weaker in single blocks and targets. Inspect Instance LoRA shows what "
            "there is.",
            inputs=[
                lora_input("The LoRA to change. It stays as it is."),
                io.String.Input(
                    "rules",
                    default="0-99: 1",
                    multiline=True,
                    tooltip="One rule on each line: what, a colon, a strength. 0-7: 0.5 is the blocks 0 to 7, *mlp*: 0 all "
                    "targets with mlp in their name, single_blocks 0-3: 2 both. The last rule that fits decides; where none "
                    "fits, the LoRA stays as it is.",
                ),
            ],
            outputs=lora_outputs("The changed LoRA."),
        )

    @classmethod
    def execute(cls, lora, rules):
        changed = by_block.by_block(store.as_instance_lora(lora), rules)
        return io.NodeOutput(
            changed, store.output_for_the_host(changed), ui=cards.outputs(lora_cards.inspected(changed))
        )


class HYWUHookLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUHookLoRA",
            display_name="Create Hook Instance LoRA",
            category="HY-WU",
            search_aliases=["instance lora", "hook", "hooks", "mask", "schedule", "regional"],
            description="A LoRA as a hook, without a file: ComfyUI's own hook nodes put it on one conditioning only, on a "
            "mask or on a schedule of strengths. What Create Hook LoRA does with a saved file.",
            inputs=[
                lora_input("The LoRA. Of a batch, choose one with Pick Instance LoRA."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,  # as wide as ComfyUI's own hooks: it refuses a saved workflow with a value beyond
                    max=20.0,
                    step=0.05,
                    tooltip="1 is what the generator meant; beyond -2 and 2 pictures fall apart.",
                ),
                io.Hooks.Input("prev_hooks", optional=True, tooltip="Hooks that this one joins."),
            ],
            outputs=[io.Hooks.Output("hooks", tooltip="For Cond Set Props, Set CLIP Hooks, Set Hook Keyframes, ...")],
        )

    @classmethod
    def execute(cls, lora, strength, prev_hooks=None):
        return io.NodeOutput(hooks.hook_of(store.as_instance_lora(lora), strength, prev_hooks))


NODES = [HYWUPickLoRA, HYWULoRAByBlock, HYWUHookLoRA]
