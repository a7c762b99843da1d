"""Make, train, save and evaluate generators.

Nodes that take whole lists of pairs get every input as a list; `_first` takes the single values out.
"""

from comfy_api.latest import io

from ..hywu_core.condition import SOURCES
from ..hywu_core.host import cards, generator_cards, memory, model, new_generator
from ..hywu_core.host.training import evaluate, in_server, teach
from ..hywu_core.training import SessionOptions, TrainConfig
from ..hywu_core.training.options import ALL_STACKS, CONSTANT, FALLING, PRECISIONS, REFUSE, RESTART, RESUME
from .types import Condition, Generator


def _first(values):
    return None if values is None else values[0]


def _pair_inputs() -> list:
    return [
        io.Latent.Input(
            "latents",
            tooltip="The edited pictures, encoded: a list with one latent for each pair, as dataset nodes and VAE Encode "
            "give them.",
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="What the base reads, in the same order: the encoded instruction with the source picture on it (Set "
            "Reference Latent). One for all is fine if generator_positive has one for each pair.",
        ),
    ]


def _generator_positive() -> io.MultiType.Input:
    return io.MultiType.Input(
        "generator_positive",
        types=[io.Conditioning, Condition],
        optional=True,
        tooltip="What the generator reads, in the same order, if that is not what the base reads: wire the instructions "
        "here and an empty prompt into positive, and only the generator knows what is to be done.",
    )


class HYWUNewGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUNewGenerator",
            display_name="New HY-WU Generator",
            category="HY-WU/training",
            search_aliases=["hypernetwork", "create generator", "train generator"],
            is_input_list=True,
            description="Makes a fresh generator for a model. Which layers get a LoRA is read off the model, what the "
            "generator reads off an example condition. Before training, its LoRAs change nothing.",
            inputs=[
                io.Model.Input("model", tooltip="The base that the generator will write LoRAs for."),
                io.MultiType.Input(
                    "condition",
                    types=[Condition, io.Conditioning],
                    tooltip="An example of what the generator will read: parts and widths are taken from it. The list that "
                    "goes into training is fine; its first entry counts.",
                ),
                io.Combo.Input(
                    "condition_source",
                    options=list(SOURCES),
                    default=next(iter(SOURCES)),
                    tooltip="What of it the generator reads. The source picture is its reference latent. hidden states of "
                    "the base is Tencent's way: wire the model into HY-WU Condition for the example.",
                ),
                io.Combo.Input(
                    "size",
                    options=list(new_generator.SIZES),
                    default="small",
                    tooltip="Width and depth of the generator: small is 128 wide with 2 blocks, medium 512 with 6, large "
                    "1024 with 12.",
                ),
                io.Int.Input(
                    "rank", default=16, min=1, max=256, tooltip="Rank of the LoRAs. Tencent's generator has 16."
                ),
                io.Float.Input(
                    "alpha",
                    default=32.0,
                    min=0.01,
                    max=4096.0,
                    step=0.01,
                    tooltip="Scale of the LoRAs times their rank. Twice to four times the rank trains well.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(model.PRESETS),
                    default=model.PRESETS[0],
                    tooltip="Which linear layers of each block get a LoRA. Modulation is only in the last choice.",
                ),
                io.Int.Input(
                    "encoder_layers",
                    default=1,
                    min=0,
                    max=24,
                    tooltip="Layers of a small encoder over the condition, trained with the generator. Give one or more if "
                    "it reads the source picture's latent.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the first weights. Keep it fixed, so that a run can be resumed.",
                ),
                io.String.Input(
                    "stack",
                    default=model.LARGEST,
                    optional=True,
                    advanced=True,
                    tooltip="Which list of blocks gets LoRAs, such as double_blocks, or several, with commas between them. "
                    "largest: the one with most weights. all stacks: every one. Any other word is an error that lists them.",
                ),
                io.String.Input(
                    "target_names",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Layers by name instead of by the choice above, with wildcards, separated by commas: img_attn.*, "
                    "img_mlp.*",
                ),
            ],
            outputs=[Generator.Output("generator", tooltip="For Train HY-WU Generator.")],
        )

    @classmethod
    def execute(cls, model, condition, **settings):
        made = memory.new_for(model[0], condition[0], **{name: _first(values) for name, values in settings.items()})
        return io.NodeOutput(made, ui=cards.outputs(generator_cards.made(made)))


class HYWUTrainGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUTrainGenerator",
            display_name="Train HY-WU Generator",
            category="HY-WU/training",
            search_aliases=["hypernetwork training", "train lora generator", "edit training"],
            is_input_list=True,
            description="Trains a generator end to end, by the base's own diffusion loss on pairs of pictures before and "
            "after an edit. The base stays frozen. A cancelled run goes on where it stopped when it is queued again under "
            "the same name; state, log, validation pictures and the generator as it is are in output/hywu/<run name>.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base, frozen. It may be quantised (fp8, int8, nvfp4, mxfp8); its weights are then taken as "
                    "they are. LoRAs on it act.",
                ),
                *_pair_inputs(),
                Generator.Input(
                    "generator",
                    tooltip="A new generator, or one to train further. It stays as it is; a copy is trained.",
                ),
                io.String.Input(
                    "run_name",
                    default="my-edits",
                    tooltip="The run's folder below output/hywu. A run of this name goes on, see if_exists; take a new name "
                    "for other data or settings.",
                ),
                io.Int.Input(
                    "steps",
                    default=TrainConfig.steps,
                    min=1,
                    max=1000000,
                    tooltip="Steps of the optimizer in all. More than a run of this name has done extend it; fewer give its "
                    "generator as it is.",
                ),
                io.Int.Input("batch_size", default=TrainConfig.batch, min=1, max=4096, tooltip="Pairs of one step."),
                io.Int.Input(
                    "micro_batch",
                    default=TrainConfig.micro_batch,
                    min=0,
                    max=4096,
                    tooltip="Pairs that pass through the base at once. 0 is all of a step; less saves memory and changes "
                    "nothing else (gradient accumulation).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=TrainConfig.learning_rate,
                    min=0.0000001,
                    max=1.0,
                    step=0.0000001,
                    tooltip="Reached after the warm-up; it then falls to zero along a cosine. If the loss rises instead of "
                    "falling, take a third of it.",
                ),
                io.Int.Input(
                    "warmup",
                    default=TrainConfig.warmup,
                    min=0,
                    max=100000,
                    tooltip="Steps over which the learning rate rises from zero.",
                ),
                io.Float.Input(
                    "ema",
                    default=TrainConfig.ema,
                    min=0.0,
                    max=0.99999,
                    step=0.00001,
                    tooltip="Decay of averaged weights, such as 0.99 for a thousand steps; the averages are returned then. 0 "
                    "is none.",
                ),
                io.Float.Input(
                    "diversity",
                    default=TrainConfig.diversity,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    tooltip="Weight of a loss against writing one and the same LoRA for all pairs. 0 is none.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=SessionOptions.precision,
                    tooltip="What the generator computes in while it is trained; its weights are kept in float32.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Compute blocks again in the backward pass instead of remembering them: less memory, more time, "
                    "the same numbers.",
                ),
                io.Int.Input(
                    "save_every",
                    default=SessionOptions.save_every,
                    min=0,
                    max=100000,
                    tooltip="Steps after which the state is written. 0: at the end and when cancelled only.",
                ),
                io.Int.Input(
                    "validate_every",
                    default=SessionOptions.validate_every,
                    min=0,
                    max=100000,
                    tooltip="Steps after which held-out pairs are measured and, with a VAE, shown. 0: never.",
                ),
                io.Int.Input(
                    "held_out",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Pairs that are not trained on, taken evenly from the list, for validation.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0x7FFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the order of the pairs, of noise and noise levels. Keep it fixed, so that a run can be "
                    "resumed.",
                ),
                _generator_positive(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Shows source, result and right answer of up to 4 pairs at the node, every validate_every steps.",
                ),
                io.Combo.Input(
                    "if_exists",
                    options=[RESUME, RESTART, REFUSE],
                    default=SessionOptions.if_exists,
                    optional=True,
                    tooltip="If there is a run of this name: resume goes on with it, if it is about the same pairs, base and "
                    "settings; restart deletes its state and begins anew; refuse is an error.",
                ),
                io.Int.Input(
                    "keep_every",
                    default=SessionOptions.keep_every,
                    min=0,
                    max=100000,
                    optional=True,
                    tooltip="Steps after which the generator is kept as it is then, in models/hywu/<run name>. 0: never.",
                ),
                io.String.Input(
                    "instructions",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="The instructions of the pairs as text, one on each line. They are written into the generator's "
                    "file, so that Teach HY-WU Generator knows what to keep.",
                ),
                io.Float.Input(
                    "memory",
                    default=TrainConfig.memory,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Weight of staying with what a teacher writes for old instructions, on the pairs' pictures. "
                    "0: none. Needs clip.",
                ),
                io.Combo.Input(
                    "memory_schedule",
                    options=[CONSTANT, FALLING],
                    default=TrainConfig.memory_schedule,
                    optional=True,
                    advanced=True,
                    tooltip="Whether memory keeps its weight, or falls to zero until the last step: for a start from another "
                    "generator.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The base's text encoder, for old instructions. Only with memory."
                ),
                io.String.Input(
                    "old_instructions",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="What memory asks, one on each line. Empty: the instructions that the teacher's file names.",
                ),
                Generator.Input(
                    "teacher",
                    optional=True,
                    tooltip="Whose LoRAs memory stays with, such as a larger generator for the same base. By default the "
                    "generator that is trained further.",
                ),
            ],
            outputs=[
                Generator.Output(
                    "generator", tooltip="The trained generator, for Generate Instance LoRA, Save and Evaluate."
                ),
                io.LossMap.Output("loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
                io.Int.Output("steps", tooltip="Steps done, those before a resume included."),
            ],
        )

    @classmethod
    def execute(cls, model, latents, positive, generator, generator_positive=None, vae=None, **settings):
        # a list of instructions is as good as lines
        texts = {name: teach.lines(settings.pop(name, ())) for name in ("instructions", "old_instructions")}
        values = {name: _first(value) for name, value in settings.items()}
        config = TrainConfig(
            steps=values["steps"],
            batch=values["batch_size"],
            micro_batch=values["micro_batch"],
            learning_rate=values["learning_rate"],
            warmup=values["warmup"],
            ema=values["ema"],
            diversity=values["diversity"],
            memory=values.get("memory", TrainConfig.memory),
            memory_batch=values["batch_size"],
            memory_schedule=values.get("memory_schedule", TrainConfig.memory_schedule),
            seed=values["seed"],
        )
        recompute = values["gradient_checkpointing"]
        options = SessionOptions(
            precision=values["precision"],
            save_every=values["save_every"],
            validate_every=values["validate_every"],
            keep_every=values.get("keep_every", SessionOptions.keep_every),
            if_exists=values.get("if_exists", SessionOptions.if_exists),
            checkpoint_stack=ALL_STACKS if recompute else "",
            checkpoint_generator=recompute,
        )
        trained = in_server.train_on_lists(
            model[0],
            generator[0],
            latents,
            positive,
            generator_positive,
            config,
            options,
            values["run_name"],
            values["held_out"],
            _first(vae),
            texts["instructions"],
            in_server.Remember(values.get("clip"), texts["old_instructions"], values.get("teacher")),
        )
        return io.NodeOutput(trained.handle, trained.losses, trained.steps, ui=cards.outputs(trained.card))


class HYWUSaveGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUSaveGenerator",
            display_name="Save HY-WU Generator",
            category="HY-WU/training",
            search_aliases=["hypernetwork", "export generator"],
            is_output_node=True,
            description="Saves a generator into models/hywu as one .safetensors file that Load HY-WU Generator reads, with "
            "how it was trained in its metadata. A file of the same name stays; the new one gets a number.",
            inputs=[
                Generator.Input("generator", tooltip="The generator to save."),
                io.String.Input("filename", default="my-edits", tooltip="Its name in models/hywu, without the ending."),
                io.Combo.Input(
                    "dtype",
                    options=list(memory.SAVE_DTYPES),
                    default="as trained",
                    tooltip="What the weights are stored in. bfloat16 halves the file of a generator that was trained here, "
                    "int8 quarters it; fp8_e4m3fn is as small and less exact.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, generator, filename, dtype):
        path = memory.save(generator, filename, memory.SAVE_DTYPES[dtype])
        return io.NodeOutput(str(path), ui=cards.outputs(generator_cards.saved(generator, path)))


class HYWUEvaluateGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUEvaluateGenerator",
            display_name="Evaluate HY-WU Generator",
            category="HY-WU/training",
            search_aliases=["validate generator", "test generator", "controls", "hypernetwork"],
            is_input_list=True,
            description="Measures a generator on pairs that it was not trained on: the base's loss with the matched LoRA, "
            "without any, with the LoRA of another pair (shuffled) and with the average of all. If shuffled or averaged are "
            "as good as matched, the generator ignores what it reads.",
            inputs=[
                io.Model.Input("model", tooltip="The base that the generator was trained for."),
                *_pair_inputs(),
                Generator.Input("generator", tooltip="The generator to measure."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0x7FFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the noise, the same for every control, and of who gets whose LoRA in shuffled.",
                ),
                _generator_positive(),
            ],
            outputs=[
                io.Image.Output(
                    "image", tooltip="Losses by noise level, and gains with their intervals. The node shows it, too."
                ),
                io.String.Output("table", tooltip="The same as tab-separated text."),
            ],
        )

    @classmethod
    def execute(cls, model, latents, positive, generator, seed, generator_positive=None):
        image, table, card = evaluate.evaluate_generator(
            model[0], generator[0], latents, positive, generator_positive, seed[0]
        )
        return io.NodeOutput(image, table, ui=cards.outputs(card, image, cls))


NODES = [HYWUNewGenerator, HYWUTrainGenerator, HYWUSaveGenerator, HYWUEvaluateGenerator]
