"""Templates for models that must be downloaded: HunyuanImage-3 with the released generator, and bases for which one trains a
generator. Files, addresses and folders are those of ComfyUI's own templates for these models.
"""

from __future__ import annotations

from typing import NamedTuple

from templates_pocket import PAIRS, PICTURE, WIDE
from workflow_builder import Graph, Node, Socket

HUB = "https://huggingface.co"
SIDE = 512  # of the pictures that are trained on


class Base(NamedTuple):
    """What a base's loaders give."""

    model: Socket
    clip: Socket
    vae: Socket


def _file(name: str, repository: str, folder: str, inside: str = "split_files/") -> dict:
    """A file of the hub: where it comes from, and the folder below models/ where it goes."""
    place = f"{inside}{folder}/" if inside else ""
    return {"name": name, "url": f"{HUB}/{repository}/resolve/main/{place}{name}", "directory": folder}


def _loaders(graph: Graph, model: dict, texts: tuple[dict, ...], text_type: str, vae: dict) -> Base:
    unet = graph.add("UNETLoader", unet_name=model["name"], models=(model,))
    if len(texts) == 2:
        names = {"clip_name1": texts[0]["name"], "clip_name2": texts[1]["name"]}
        clip = graph.add("DualCLIPLoader", **names, type=text_type, models=texts)
    else:
        clip = graph.add("CLIPLoader", clip_name=texts[0]["name"], type=text_type, models=texts)
    loaded = graph.add("VAELoader", vae_name=vae["name"], models=(vae,))
    return Base(unet["MODEL"], clip["CLIP"], loaded["VAE"])


def _train(graph: Graph, base: Base, name: str, text_sees_source: bool = False) -> None:
    with graph.group("2  Train a generator on your pairs"):
        pairs = graph.add(
            "HYWULoadEditPairs", folder=PAIRS, clip=base.clip, vae=base.vae, size=SIDE, base_reads="told",
            text_sees_source=text_sees_source,
        )  # fmt: skip
        fresh = graph.add("HYWUNewGenerator", model=base.model, condition=pairs["generator_positive"])
        graph.column()
        trained = graph.add(
            "HYWUTrainGenerator", wide=340, model=base.model, latents=pairs["latents"], positive=pairs["positive"],
            generator=fresh["generator"], generator_positive=pairs["generator_positive"], vae=base.vae,
            instructions=pairs["instructions"], run_name=name, steps=5000, batch_size=1, validate_every=500, held_out=2,
        )  # fmt: skip
        graph.column()
        graph.add("HYWUSaveGenerator", generator=trained["generator"], filename=name)


def _trained(graph: Graph, name: str) -> Socket:
    return graph.add("HYWULoadGenerator", generator=f"{name}.safetensors")["generator"]


def _scaled(graph: Graph, image: Socket) -> Socket:
    """As many pixels as the pictures had that were trained on."""
    megapixels = SIDE * SIDE / 2**20
    return graph.add(
        "ImageScaleToTotalPixels", "The size that was trained on", image=image, upscale_method="lanczos",
        megapixels=megapixels,
    )["IMAGE"]  # fmt: skip


def _finish(graph: Graph, base: Base, latent: Socket, name: str) -> None:
    graph.column()
    after = graph.add("VAEDecode", samples=latent, vae=base.vae)["IMAGE"]
    graph.column()
    graph.add("SaveImage", wide=WIDE, images=after, filename_prefix=f"hywu/{name}")


def _sample(graph: Graph, edit: Node, model: Socket, positive: Socket, **settings) -> Socket:
    return graph.add(
        "KSampler", model=model, positive=positive, negative=edit["negative"], latent_image=edit["latent"], seed=1,
        sampler_name="euler", scheduler="simple", **settings,
    )["LATENT"]  # fmt: skip


def flux_kontext_edit(graph: Graph) -> None:
    graph.notes()
    texts = "comfyanonymous/flux_text_encoders"
    with graph.group("1  FLUX.1 Kontext"):
        base = _loaders(
            graph,
            _file(
                "flux1-dev-kontext_fp8_scaled.safetensors", "Comfy-Org/flux1-kontext-dev_ComfyUI", "diffusion_models"
            ),
            (
                _file("clip_l.safetensors", texts, "text_encoders", ""),
                _file("t5xxl_fp8_e4m3fn_scaled.safetensors", texts, "text_encoders", ""),
            ),
            "flux",
            _file("ae.safetensors", "Comfy-Org/Lumina_Image_2.0_Repackaged", "vae"),
        )
    _train(graph, base, "kontext-edits")
    with graph.group("3  Then: edit with it (muted)", muted=True):
        image = graph.add("LoadImage", image=PICTURE)["IMAGE"]
        generator = _trained(graph, "kontext-edits")
        graph.column()
        scaled = _scaled(graph, image)
        graph.column()
        edit = graph.add(
            "HYWUEdit", model=base.model, generator=generator, clip=base.clip, image=scaled, vae=base.vae,
            instruction="brighten the picture",
        )  # fmt: skip
        graph.column()
        positive = graph.add("FluxGuidance", conditioning=edit["positive"], guidance=2.5)["CONDITIONING"]
        graph.column()
        _finish(graph, base, _sample(graph, edit, edit["model"], positive, steps=20, cfg=1.0), "flux_kontext")


def qwen_image_edit(graph: Graph) -> None:
    graph.notes()
    with graph.group("1  Qwen-Image-Edit 2511"):
        base = _loaders(
            graph,
            _file("qwen_image_edit_2511_fp8mixed.safetensors", "Comfy-Org/Qwen-Image-Edit_ComfyUI", "diffusion_models"),
            (_file("qwen_2.5_vl_7b_fp8_scaled.safetensors", "Comfy-Org/HunyuanVideo_1.5_repackaged", "text_encoders"),),
            "qwen_image",
            _file("qwen_image_vae.safetensors", "Comfy-Org/Qwen-Image_ComfyUI", "vae"),
        )
    _train(graph, base, "qwen-edits", text_sees_source=True)
    with graph.group("3  Then: edit with it (muted)", muted=True):
        image = graph.add("LoadImage", image=PICTURE)["IMAGE"]
        generator = _trained(graph, "qwen-edits")
        graph.column()
        scaled = _scaled(graph, image)
        graph.column()
        told, empty = (
            graph.add("TextEncodeQwenImageEdit", title, clip=base.clip, image=scaled, prompt=text)
            for title, text in (("Instruction, with the picture", "brighten the picture"), ("Empty prompt", ""))
        )
        graph.column()
        edit = graph.add(
            "HYWUEdit", model=base.model, generator=generator, conditioning=told["CONDITIONING"],
            empty=empty["CONDITIONING"], image=scaled, vae=base.vae,
        )  # fmt: skip
        graph.column()
        shifted = graph.add("ModelSamplingAuraFlow", model=edit["model"], shift=3.1)["MODEL"]
        normed = graph.add("CFGNorm", model=shifted, strength=1.0)["patched_model"]
        graph.column()
        _finish(graph, base, _sample(graph, edit, normed, edit["positive"], steps=40, cfg=4.0), "qwen_image_edit")


def flux2_klein_edit(graph: Graph) -> None:
    graph.notes()
    with graph.group("1  FLUX.2 klein 4B"):
        base = _loaders(
            graph,
            _file(
                "flux-2-klein-base-4b-fp8.safetensors",
                "black-forest-labs/FLUX.2-klein-base-4b-fp8",
                "diffusion_models",
                "",
            ),
            (_file("qwen_3_4b.safetensors", "Comfy-Org/z_image_turbo", "text_encoders"),),
            "flux2",
            _file("full_encoder_small_decoder.safetensors", "black-forest-labs/FLUX.2-small-decoder", "vae", ""),
        )
    _train(graph, base, "klein-edits")
    with graph.group("3  Then: edit with it (muted)", muted=True):
        image = graph.add("LoadImage", image=PICTURE)["IMAGE"]
        generator = _trained(graph, "klein-edits")
        graph.column()
        scaled = _scaled(graph, image)
        size = graph.add("GetImageSize", image=scaled)
        graph.column()
        edit = graph.add(
            "HYWUEdit", model=base.model, generator=generator, clip=base.clip, image=scaled, vae=base.vae,
            instruction="brighten the picture",
        )  # fmt: skip
        graph.column()
        guider = graph.add(
            "CFGGuider", model=edit["model"], positive=edit["positive"], negative=edit["negative"], cfg=5.0
        )["GUIDER"]
        sigmas = graph.add("Flux2Scheduler", steps=20, width=size["width"], height=size["height"])["SIGMAS"]
        noise = graph.add("RandomNoise", noise_seed=1)["NOISE"]
        sampler = graph.add("KSamplerSelect", sampler_name="euler")["SAMPLER"]
        graph.column()
        sampled = graph.add(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
            latent_image=edit["latent"],
        )["output"]  # fmt: skip
        _finish(graph, base, sampled, "flux2_klein")


def z_image_edit(graph: Graph) -> None:
    graph.notes()
    repository = "Comfy-Org/z_image_turbo"
    with graph.group("1  Z-Image"):
        base = _loaders(
            graph,
            _file("z_image_bf16.safetensors", "Comfy-Org/z_image", "diffusion_models"),
            (_file("qwen_3_4b.safetensors", repository, "text_encoders"),),
            "lumina2",
            _file("ae.safetensors", repository, "vae"),
        )
    _train(graph, base, "z-image-edits")
    with graph.group("3  Then: edit with it (muted)", muted=True):
        image = graph.add("LoadImage", image=PICTURE)["IMAGE"]
        generator = _trained(graph, "z-image-edits")
        graph.column()
        scaled = _scaled(graph, image)
        graph.column()
        edit = graph.add(
            "HYWUEdit", model=base.model, generator=generator, clip=base.clip, image=scaled, vae=base.vae,
            instruction="brighten the picture",
        )  # fmt: skip
        graph.column()
        shifted = graph.add("ModelSamplingAuraFlow", model=edit["model"], shift=3.0)["MODEL"]
        graph.column()
        _finish(graph, base, _sample(graph, edit, shifted, edit["positive"], steps=25, cfg=4.0), "z_image")


def hunyuan_image3_edit(graph: Graph) -> None:
    graph.notes(height=560)
    with graph.group("1  Picture and models"):
        image = graph.add("LoadImage", image=PICTURE)["IMAGE"]
        base = graph.add("HYWULoadHunyuanImage3", folder="HunyuanImage-3.0-Instruct")
        generator = graph.add("HYWULoadGenerator", generator="HY-WU/")["generator"]
    with graph.group("2  What is asked for"):
        asked = graph.add(
            "HYWUHunyuanImage3Edit", wide=400, encoder=base["encoder"], prompt="Put a straw hat on the person.",
            images__image0=image,
        )  # fmt: skip
        graph.column()
        seen = graph.add("HYWUHunyuanImage3Condition", model=base["model"], positive=asked["positive"])
    with graph.group("3  The LoRA"):
        made = graph.add("HYWUGenerateLoRA", generator=generator, condition=seen["condition"])
        applied = graph.add("HYWUApplyLoRA", model=base["model"], lora=made["lora"], strength=1.0)
    with graph.group("4  Sample"):
        sampled = graph.add(
            "KSampler", model=applied["model"], positive=asked["positive"], negative=asked["negative"],
            latent_image=seen["latent"], seed=0, steps=50, cfg=2.5, sampler_name="euler", scheduler="simple",
        )  # fmt: skip
        graph.column()
        after = graph.add("VAEDecode", samples=sampled["LATENT"], vae=base["vae"])["IMAGE"]
        graph.column()
        graph.add("SaveImage", wide=WIDE, images=after, filename_prefix="hywu/hunyuan_image3")


TEMPLATES = (hunyuan_image3_edit, flux_kontext_edit, qwen_image_edit, flux2_klein_edit, z_image_edit)
