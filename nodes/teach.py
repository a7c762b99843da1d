"""Teach a generator: one new edit beside what it knows, or what a folder of LoRA files holds."""

from comfy_api.latest import io

from ..hywu_core.host import cards
from ..hywu_core.host.training import in_server, teach
from ..hywu_core.training import SessionOptions
from ..hywu_core.training.options import REFUSE, RESTART, RESUME
from .types import Generator


def _pictures(values):
    """What comes as a list of batches as single pictures."""
    return [picture.unsqueeze(0) for batch in values or () for picture in batch]


def _run_inputs(name: str, defaults) -> list:
    return [
        io.String.Input(
            "run_name",
            default=name,
            tooltip="The run's folder below output/hywu. A run of this name goes on, see if_exists; take a new name for "
            "another edit or other settings.",
        ),
        io.Int.Input(
            "steps",
            default=defaults.steps,
            min=1,
            max=1000000,
            tooltip="Steps of the optimizer in all. More than a run of this name has done extend it.",
        ),
        io.Float.Input(
            "learning_rate",
            default=defaults.learning_rate,
            min=0.0000001,
            max=1.0,
            step=0.0000001,
            advanced=True,
            tooltip="Reached after a tenth of the steps; it then falls to zero along a cosine. For large generators take a "
            "third of it.",
        ),
        io.Int.Input(
            "batch_size",
            default=defaults.batch,
            min=1,
            max=4096,
            advanced=True,
            tooltip="What one step looks at: so many pairs of the new edit and as many old instructions, or LoRA files.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0x7FFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Of the order and of noise. Keep it fixed, so that a run can be resumed.",
        ),
        io.Combo.Input(
            "if_exists",
            options=[RESUME, RESTART, REFUSE],
            default=RESUME,
            optional=True,
            advanced=True,
            tooltip="If there is a run of this name: resume goes on with it, if it is about the same; restart deletes its "
            "state and begins anew; refuse is an error.",
        ),
    ]


def _outputs(what: str) -> list:
    return [
        Generator.Output("generator", tooltip=f"{what}, for Generate Instance LoRA and Save HY-WU Generator."),
        io.String.Output("report", tooltip="The report as tab-separated text."),
        io.LossMap.Output("loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
    ]


def _text_sees_source() -> io.Boolean.Input:
    return io.Boolean.Input(
        "text_sees_source",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Show the source picture to the text encoder, for bases whose encoder looks at it and generators that were "
        "trained so.",
    )


def _clip_vision() -> io.ClipVision.Input:
    return io.ClipVision.Input(
        "clip_vision", optional=True, tooltip="Only for generators that were trained with CLIP Vision features."
    )


class HYWUTeachGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWUTeachGenerator",
            display_name="Teach HY-WU Generator",
            category="HY-WU/training",
            search_aliases=[
                "continual learning",
                "add an edit",
                "train further",
                "fine-tune generator",
                "hypernetwork",
            ],
            is_input_list=True,
            description="Teaches a generator one new edit from a few pairs of pictures, and keeps the edits that it knows: "
            "while it learns, its LoRAs for the old instructions, and what the base predicts with them, are held where they "
            "were, without any old pair. Says edit by edit what was kept. Can be cancelled and goes on when queued again.",
            inputs=[
                io.Model.Input("model", tooltip="The base, frozen."),
                io.Clip.Input("clip", tooltip="The base's text encoder, for the new instruction and the old ones."),
                io.Vae.Input("vae", tooltip="The base's VAE, for the pictures."),
                Generator.Input("generator", tooltip="What is to learn more. It stays as it is; a copy is taught."),
                io.Image.Input("before", tooltip="Pictures before the new edit: a list or a batch, 8 to 64 of them."),
                io.Image.Input("after", tooltip="The same pictures after the edit, in the same order and sizes."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    tooltip="What asks for the new edit. Another wording on each line makes it understand more of them.",
                ),
                *_run_inputs("my-new-edit", teach.TEACH)[:2],
                io.Float.Input(
                    "memory",
                    default=teach.TEACH.memory,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="How strongly the LoRAs of old edits are held: the weight of the distance in weight space. More "
                    "keeps more; 0 would forget them and is refused.",
                ),
                *_run_inputs("my-new-edit", teach.TEACH)[2:],
                io.String.Input(
                    "old_instructions",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The instructions to keep, one on each line. Empty: those that the generator's file names.",
                ),
                io.Image.Input(
                    "pictures",
                    optional=True,
                    tooltip="Any pictures on which the old instructions are asked. By default those before the new edit.",
                ),
                _clip_vision(),
                io.Combo.Input(
                    "base_reads",
                    options=[teach.AS_TRAINED, teach.TOLD, teach.BLIND],
                    default=teach.AS_TRAINED,
                    optional=True,
                    advanced=True,
                    tooltip="Whether the base reads the instruction as well (told), or only the generator (blind).",
                ),
                _text_sees_source(),
                io.Float.Input(
                    "prediction",
                    default=teach.TEACH.prediction,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How strongly what the base makes of old edits is held: the weight of how far its predictions "
                    "with their LoRAs are from those before. 0 leaves these passes through the base out: a step takes less "
                    "time, and memory has to be about 100.",
                ),
            ],
            outputs=_outputs("The generator that knows both"),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        generator,
        before,
        after,
        instruction,
        run_name,
        steps,
        memory,
        learning_rate,
        batch_size,
        seed,
        if_exists=(RESUME,),
        old_instructions=("",),
        pictures=(),
        clip_vision=(None,),
        base_reads=(teach.AS_TRAINED,),
        text_sees_source=(False,),
        prediction=(teach.TEACH.prediction,),
    ):
        studio = teach.Studio(model[0], clip[0], vae[0], clip_vision[0], text_sees_source[0])
        new = teach.NewEdit(_pictures(before), _pictures(after), teach.lines(instruction))
        config = teach.with_steps(
            teach.TEACH,
            steps=steps[0],
            learning_rate=learning_rate[0],
            batch=batch_size[0],
            memory=memory[0],
            prediction=prediction[0],
            seed=seed[0],
        )
        options = SessionOptions(if_exists=if_exists[0])
        old = teach.lines(old_instructions)
        found = in_server.teach_on_server(
            studio, generator[0], new, old, _pictures(pictures), config, options, run_name[0], base_reads[0]
        )
        return io.NodeOutput(found.handle, found.report, found.losses, ui=cards.outputs(found.card))


class HYWULearnFromLoRAs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HYWULearnFromLoRAs",
            display_name="Learn from LoRAs",
            category="HY-WU/training",
            search_aliases=["distill loras", "lora collection", "hypernetwork from loras"],
            is_input_list=True,
            description="Trains a generator to write what a folder of LoRA files holds, each for its instruction: no "
            "pictures of edits and no pass through the base are needed. A new generator gets a warm start for Train HY-WU "
            "Generator so. Says file by file how near it came.",
            inputs=[
                io.Model.Input("model", tooltip="The base that the LoRAs are for."),
                io.Clip.Input("clip", tooltip="The base's text encoder, for the instructions."),
                Generator.Input("generator", tooltip="From New HY-WU Generator, or a trained one. A copy is trained."),
                io.Combo.Input(
                    "folder",
                    options=in_server.lora_folders(),
                    tooltip="A folder below models/loras (or output/loras) with plain LoRA files of any rank for this base. "
                    "The instruction of each: in its metadata, a .txt beside it, or a line of loras.jsonl or loras.csv.",
                ),
                *_run_inputs("from-loras", teach.LEARN),
                io.Image.Input(
                    "pictures",
                    optional=True,
                    tooltip="Any pictures on which the instructions are asked, for a generator that reads pictures.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The base's VAE, for the pictures."),
                _clip_vision(),
                _text_sees_source(),
            ],
            outputs=_outputs("The generator"),
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_inputs):
        return in_server.fingerprint(folder[0])

    @classmethod
    def execute(
        cls,
        model,
        clip,
        generator,
        folder,
        run_name,
        steps,
        learning_rate,
        batch_size,
        seed,
        if_exists=(RESUME,),
        pictures=(),
        vae=(None,),
        clip_vision=(None,),
        text_sees_source=(False,),
    ):
        studio = teach.Studio(model[0], clip[0], vae[0], clip_vision[0], text_sees_source[0])
        config = teach.with_steps(
            teach.LEARN,
            steps=steps[0],
            learning_rate=learning_rate[0],
            batch=batch_size[0],
            loras_batch=batch_size[0],
            seed=seed[0],
        )
        options = SessionOptions(if_exists=if_exists[0])
        found = in_server.learn_on_server(
            studio, generator[0], folder[0], _pictures(pictures), config, options, run_name[0]
        )
        return io.NodeOutput(found.handle, found.report, found.losses, ui=cards.outputs(found.card))


NODES = [HYWUTeachGenerator, HYWULearnFromLoRAs]
