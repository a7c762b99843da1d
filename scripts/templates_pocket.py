"""Templates on the pocket editor, which ships: they run anywhere. A function describes a workflow and is named as its file.

The notes are in template_notes/<name>.en.md and .zh.md.
"""

from __future__ import annotations

from typing import NamedTuple

from workflow_builder import Graph, Node, Socket

SIZE, LARGER = 96, 128  # longest side in pixels of what the pocket editor is given: for several edits, for one
TAUGHT_SIZE = 64  # of what is taught, and of what is edited with a generator that was just trained
PAIRS_SIZE = 48  # of the pairs that template train trains on: as near to that as a minute or two allows
PICTURE = "example.png"  # comes with ComfyUI
GENERATOR = "pocket-generator.safetensors"
SHARED = "HY-WU pocket-shared.safetensors"
PAIRS = "HY-WU example pairs"
SUNSET = "make it look like a sunset"  # in words that no generator was trained on
WARM, COOL, DARK, GREY = "make the colours warm", "make the colours cool", "darken the picture", "make it gray"
NEW = "fade the picture"  # none of what the pocket generator was trained on
WIDE = 560  # of nodes that show wide pictures


class Studio(NamedTuple):
    """What every template begins with."""

    model: Socket
    clip: Socket
    vae: Socket
    generator: Socket
    whole: Socket  # the picture as it is
    small: Socket  # as the editor is given it, uncropped


def _studio(graph: Graph, size: int = SIZE) -> Studio:
    with graph.group("1  Picture and models"):
        whole = graph.add("LoadImage", image=PICTURE)["IMAGE"]
        base = graph.add("HYWULoadPocketEditor")
        graph.column()
        small = _scaled(graph, whole, size)
        generator = graph.add("HYWULoadGenerator", generator=GENERATOR)["generator"]
    return Studio(base["model"], base["clip"], base["vae"], generator, whole, small)


def _scaled(graph: Graph, picture: Socket, size: int = SIZE) -> Socket:
    title = f"Scale to {size} pixels"
    scale = graph.add("ImageScaleToMaxDimension", title, image=picture, upscale_method="area", largest_size=size)
    return scale["IMAGE"]


def _edit(
    graph: Graph, studio: Studio, instruction: str, title: str | None = None, generator: Socket | None = None
) -> Node:
    return graph.add(
        "HYWUEdit", title, model=studio.model, generator=generator or studio.generator, clip=studio.clip,
        image=studio.small, vae=studio.vae, instruction=instruction,
    )  # fmt: skip


def _sample(
    graph: Graph, edit: Node, model: Socket | None = None, title: str | None = None, latent: Socket | None = None
) -> Socket:
    """The sampled latent of an edit, by its own model or another one."""
    sampler = graph.add(
        "KSampler", title, model=model or edit["model"], positive=edit["positive"], negative=edit["negative"],
        latent_image=latent or edit["latent"], seed=1, steps=8, cfg=1.0, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    return sampler["LATENT"]


def _decoded(graph: Graph, studio: Studio, latent: Socket, title: str | None = None) -> Socket:
    return graph.add("VAEDecode", title, samples=latent, vae=studio.vae)["IMAGE"]


def _beside(graph: Graph, first: Socket, second: Socket, title: str = "Side by side") -> Socket:
    return graph.add("ImageStitch", title, image1=first, image2=second, spacing_width=8)["IMAGE"]


def _shown(graph: Graph, picture: Socket, title: str, name: str) -> None:
    graph.column()
    graph.add("SaveImage", title, wide=WIDE, images=picture, filename_prefix=f"hywu/{name}")


def quickstart(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph, LARGER)
    with graph.group("2  Edit"):
        edit = _edit(graph, studio, SUNSET)
        graph.column()
        latent = _sample(graph, edit)
    with graph.group("3  Before and after"):
        both = _beside(graph, studio.whole, _decoded(graph, studio, latent))
        _shown(graph, both, "Before and after", "quickstart")


def your_picture(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph, LARGER)
    with graph.group("2  Your words"):
        edit = _edit(graph, studio, COOL)
        graph.column()
        latent = _sample(graph, edit)
    with graph.group("3  Before and after"):
        after = _decoded(graph, studio, latent)
        big = graph.add("ImageScaleBy", "Enlarge", image=after, upscale_method="lanczos", scale_by=4.0)["IMAGE"]
        graph.column()
        both = _beside(graph, studio.whole, big)
        graph.add("SaveImage", "The result alone", images=big, filename_prefix="hywu/your_picture")
        _shown(graph, both, "Before and after", "your_picture_before_and_after")


def the_long_way(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph, LARGER)
    with graph.group("2  What the generator reads"):
        latent = graph.add("VAEEncode", pixels=studio.small, vae=studio.vae)["LATENT"]
        nothing = graph.add("CLIPTextEncode", "Nothing for the model itself", text="", clip=studio.clip)["CONDITIONING"]
        words = graph.add("CLIPTextEncode", "Instruction", text=SUNSET, clip=studio.clip)["CONDITIONING"]
        graph.column()
        read = graph.add("ReferenceLatent", "The picture for the generator", conditioning=words, latent=latent)
        told = graph.add("ReferenceLatent", "The picture for the model", conditioning=nothing, latent=latent)
    with graph.group("3  The LoRA"):
        made = graph.add("HYWUGenerateLoRA", generator=studio.generator, condition=read["CONDITIONING"])
        applied = graph.add("HYWUApplyLoRA", model=studio.model, lora=made["lora"], strength=1.0)
    with graph.group("4  Sample"):
        negative = graph.add("ConditioningZeroOut", conditioning=nothing)["CONDITIONING"]
        sampled = graph.add(
            "KSampler", model=applied["model"], positive=told["CONDITIONING"], negative=negative, latent_image=latent,
            seed=1, steps=8, cfg=1.0, sampler_name="euler", scheduler="simple",
        )  # fmt: skip
        graph.column()
        after = _decoded(graph, studio, sampled["LATENT"])
        both = _beside(graph, studio.whole, after)
        _shown(graph, both, "Before and after", "the_long_way")


def batch_of_four(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph)
    with graph.group("2  Four instructions"):
        words = [
            graph.add("CLIPTextEncode", f"Instruction {place + 1}", text=text, clip=studio.clip)["CONDITIONING"]
            for place, text in enumerate((WARM, COOL, DARK, GREY))
        ]
        nothing = graph.add("CLIPTextEncode", "Nothing for the model itself", text="", clip=studio.clip)["CONDITIONING"]
        latent = graph.add("VAEEncode", pixels=studio.small, vae=studio.vae)["LATENT"]
        graph.column()
        *read, told = (
            graph.add("ReferenceLatent", "The picture", conditioning=one, latent=latent)["CONDITIONING"]
            for one in (*words, nothing)
        )
    with graph.group("3  Four LoRAs, one run"):
        first, *more = read
        further = {f"more_conditions__condition{place}": one for place, one in enumerate(more)}
        made = graph.add("HYWUGenerateLoRA", generator=studio.generator, condition=first, **further)
        applied = graph.add("HYWUApplyLoRA", model=studio.model, lora=made["lora"], strength=1.0)
        four = graph.add("RepeatLatentBatch", "Four of it", samples=latent, amount=4)["LATENT"]
        graph.column()
        sampled = graph.add(
            "KSampler", model=applied["model"], positive=told, negative=told, latent_image=four,
            seed=1, steps=8, cfg=1.0, sampler_name="euler", scheduler="simple",
        )  # fmt: skip
    with graph.group("4  Four edits"):
        four = _decoded(graph, studio, sampled["LATENT"])
        big = graph.add("ImageScaleBy", "Enlarge", image=four, upscale_method="lanczos", scale_by=4.0)["IMAGE"]
        _shown(graph, big, "Four edits", "batch_of_four")


def blend(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph)
    with graph.group("2  Two LoRAs"):
        one = _edit(graph, studio, WARM, "One edit")
        two = _edit(graph, studio, DARK, "Another edit")
    with graph.group("3  Their blend"):
        both = {"loras__lora0": one["lora"], "loras__lora1": two["lora"]}
        mixed = graph.add("HYWUBlendLoRAs", **both, sliders="2", sliders__weight1=0.8, sliders__weight2=0.8)["lora"]
        applied = graph.add("HYWUApplyLoRA", model=studio.model, lora=mixed, strength=1.0)["model"]
        graph.column()
        latent = _sample(graph, one, applied)
    with graph.group("4  Before and after"):
        _shown(graph, _beside(graph, studio.whole, _decoded(graph, studio, latent)), "Before and after", "blend")


def inspect_and_compare(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph)
    with graph.group("2  Three LoRAs"):
        made = [_edit(graph, studio, text, text) for text in (WARM, COOL, GREY)]
    with graph.group("3  Look inside"):
        looked = graph.add("HYWUInspectLoRA", "What it changes", wide=WIDE, lora=made[0]["lora"])
        several = {f"loras__lora{place}": one["lora"] for place, one in enumerate(made)}
        compared = graph.add("HYWUCompareLoRAs", "How alike they are", wide=WIDE, **several)
        graph.column()
        graph.add("PreviewImage", "Norms by block", wide=WIDE, images=looked["image"])
        graph.add("PreviewImage", "Likeness", wide=WIDE, images=compared["image"])


def save_and_reload(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph)
    with graph.group("2  Write and save"):
        edit = _edit(graph, studio, WARM)
        graph.column()
        graph.add("HYWUSaveLoRA", lora=edit["lora"], filename_prefix="loras/warm")
        latent = _sample(graph, edit)
        graph.column()
        _shown(graph, _decoded(graph, studio, latent), "From memory", "save_and_reload")
    with graph.group("3  Then: reload it in the stock loader (muted)", muted=True):
        stock = graph.add(
            "LoraLoaderModelOnly", model=studio.model, lora_name="warm_00001_.safetensors", strength_model=1.0
        )
        graph.column()
        again = _sample(graph, edit, stock["MODEL"])
        graph.column()
        _shown(graph, _decoded(graph, studio, again), "From the file", "save_and_reload")


def hooks(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph)
    with graph.group("2  Two LoRAs as hooks"):
        edits = [_edit(graph, studio, WARM, "Left: warm"), _edit(graph, studio, COOL, "Right: cool")]
        graph.column()
        made = [graph.add("HYWUHookLoRA", lora=edit["lora"], strength=1.0)["hooks"] for edit in edits]
    with graph.group("3  Each on its half"):
        nowhere = graph.add("SolidMask", "Nowhere", value=0.0, width=SIZE, height=SIZE)["MASK"]
        half = graph.add("SolidMask", "A half", value=1.0, width=SIZE // 2, height=SIZE)["MASK"]
        graph.column()
        left = graph.add("MaskComposite", "Left", destination=nowhere, source=half, x=0, y=0, operation="add")["MASK"]
        right = graph.add("InvertMask", "Right", mask=left)["MASK"]
        graph.column()
        masked = [
            graph.add(
                "PairConditioningSetProperties", title, wide=330, positive_NEW=edit["positive"],
                negative_NEW=edit["negative"], mask=mask, hooks=hook, strength=1.0, set_cond_area="default",
            )
            for title, edit, mask, hook in zip(("Left", "Right"), edits, (left, right), made, strict=True)
        ]  # fmt: skip
        graph.column()
        both = graph.add(
            "PairConditioningCombine", positive_A=masked[0]["positive"], negative_A=masked[0]["negative"],
            positive_B=masked[1]["positive"], negative_B=masked[1]["negative"],
        )  # fmt: skip
        sampled = graph.add(
            "KSampler", model=studio.model, positive=both["positive"], negative=both["negative"],
            latent_image=edits[0]["latent"], seed=1, steps=8, cfg=1.0, sampler_name="euler", scheduler="simple",
        )  # fmt: skip
    with graph.group("4  Before and after"):
        after = _decoded(graph, studio, sampled["LATENT"])
        _shown(graph, _beside(graph, studio.whole, after), "Before and after", "hooks")


def base_shared_instance(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph)
    with graph.group("2  Two kinds of LoRA"):
        edit = _edit(graph, studio, WARM, "Written for this picture and instruction")
        loaded = graph.add("HYWULoadLoRA", "Trained on all edits at once", lora=SHARED)["lora"]
        graph.column()
        shared = graph.add("HYWUApplyLoRA", model=studio.model, lora=loaded, strength=1.0)["model"]
    with graph.group("3  The same noise for all"):
        models = (("Base alone", studio.model), ("Shared LoRA", shared), ("LoRA for this picture", edit["model"]))
        latents = [(title, _sample(graph, edit, model, title)) for title, model in models]
        graph.column()
        made = [_decoded(graph, studio, latent, title) for title, latent in latents]
    with graph.group("4  Side by side"):
        row = studio.whole
        for (title, _), picture in zip(latents, made, strict=True):
            row = _beside(graph, row, picture, title)
            graph.column()
        _shown(graph, row, "Picture, base alone, shared LoRA, LoRA for this picture", "base_shared_instance")


def train(graph: Graph) -> None:
    graph.notes()
    with graph.group("1  Model and pairs"):
        base = graph.add("HYWULoadPocketEditor")
        graph.column()
        pairs = graph.add(
            "HYWULoadEditPairs", folder=PAIRS, clip=base["clip"], vae=base["vae"], size=PAIRS_SIZE, base_reads="blind"
        )
    with graph.group("2  Train"):
        fresh = graph.add(
            "HYWUNewGenerator", model=base["model"], condition=pairs["generator_positive"], size="small", rank=4,
            alpha=8.0, target_names="img_*",
        )  # fmt: skip
        graph.column()
        trained = graph.add(
            "HYWUTrainGenerator", wide=340, model=base["model"], latents=pairs["latents"], positive=pairs["positive"],
            generator=fresh["generator"], generator_positive=pairs["generator_positive"], vae=base["vae"],
            instructions=pairs["instructions"], run_name="darken-and-brighten", steps=120, batch_size=8,
            learning_rate=0.001, warmup=12, gradient_checkpointing=False, validate_every=40, held_out=4, keep_every=120,
        )  # fmt: skip
    with graph.group("3  Edit with it"):
        small = _scaled(graph, graph.add("LoadImage", image=PICTURE)["IMAGE"], TAUGHT_SIZE)
        graph.column()
        edit = graph.add(
            "HYWUEdit", model=base["model"], generator=trained["generator"], clip=base["clip"], image=small,
            vae=base["vae"], instruction=DARK,
        )  # fmt: skip
        graph.column()
        latent = _sample(graph, edit)
        graph.column()
        after = graph.add("VAEDecode", samples=latent, vae=base["vae"])["IMAGE"]
        graph.add("SaveImage", "Edited", images=after, filename_prefix="hywu/train")


def teach(graph: Graph) -> None:
    graph.notes()
    studio = _studio(graph, TAUGHT_SIZE)
    with graph.group("2  Pairs of the new edit"):
        larger = graph.add(
            "ImageScale", image=studio.whole, upscale_method="area", width=112, height=112, crop="disabled"
        )
        before = graph.add(
            "SplitImageToTileList",
            "Sixteen views of it",
            image=larger["IMAGE"],
            tile_width=TAUGHT_SIZE,
            tile_height=TAUGHT_SIZE,
            overlap=48,
        )["IMAGE"]
        after = graph.add("AdjustContrast", "How they shall look", images=before, factor=0.35)["images"]
    with graph.group("3  Teach"):
        taught = graph.add(
            "HYWUTeachGenerator", wide=340, model=studio.model, clip=studio.clip, vae=studio.vae,
            generator=studio.generator, before=before, after=after, instruction=NEW, run_name="fade", steps=100,
            batch_size=4,
        )  # fmt: skip
        graph.column()
        graph.add("HYWUSaveGenerator", generator=taught["generator"], filename="pocket-and-fade")
    with graph.group("4  The new edit, and an old one"):
        edits = [_edit(graph, studio, text, text, taught["generator"]) for text in (NEW, WARM)]
        graph.column()
        latents = [_sample(graph, edit) for edit in edits]
        graph.column()
        new, old = (_decoded(graph, studio, latent) for latent in latents)
        graph.column()
        first = _beside(graph, studio.whole, new, "Picture and new edit")
        graph.column()
        row = _beside(graph, first, old, "and an old edit")
        _shown(graph, row, "Picture, new edit, old edit", "teach")


TEMPLATES = (
    quickstart, your_picture, the_long_way, batch_of_four, blend, inspect_and_compare, save_and_reload, hooks,
    base_shared_instance, train, teach,
)  # fmt: skip
