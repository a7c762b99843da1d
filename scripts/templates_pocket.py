"""Templates on the pocket editor, which ships: they run anywhere. Each is a function that describes one workflow."""

from __future__ import annotations

from workflow_builder import Graph, Node, Socket

SIZE = 64  # longest side in pixels of what the pocket editor is given
PICTURE = "example.png"  # comes with ComfyUI
GENERATOR = "pocket-generator.safetensors"
WARM, COOL, DARK, GREY = "make the colours warm", "make the colours cool", "darken the picture", "make it gray"


def _sample(
    graph: Graph, model: Socket, positive: Socket, negative: Socket, latent: Socket, title: str | None = None
) -> Node:
    return graph.add(
        "KSampler", title, model=model, positive=positive, negative=negative, latent_image=latent,
        seed=1, steps=8, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip


def quickstart(graph: Graph) -> None:
    """A picture, an instruction, an edit."""
    graph.notes(
        """
# One picture, one instruction, one LoRA

Press **Run**. **Edit with Instance LoRA** lets the generator look at picture and instruction, writes a LoRA for exactly these two, and puts it on the model. The rest is stock ComfyUI.

- Change the **instruction**: *make the colours cool*, *darken the picture*, *saturate the colours*, *blur the picture*. The LoRA is written again, in a moment.
- Change the **seed**, the sampler or the **strength**: it is not written again. Strength 0 is the model alone, which copies.
- Take a picture of your own in **Load Image**.

The pocket editor is tiny, so that this runs on any computer with nothing downloaded: it works on small pictures, and the result is enlarged to stand beside yours. Other templates show larger models.
""",
        """
# 一张图片，一条指令，一个 LoRA

点击**运行**。**用实例 LoRA 编辑**让生成器看图片和指令，只为这两者写出一个 LoRA，并把它加到模型上。其余都是 ComfyUI 自带的节点。

- 修改**指令**：*make the colours cool*、*darken the picture*、*saturate the colours*、*blur the picture*。LoRA 会立刻重新生成。
- 修改**种子**、采样器或**强度**：不会重新生成。强度为 0 时只有模型本身，它照抄原图。
- 在**加载图像**中换上你自己的图片。

口袋编辑器非常小，不用下载任何东西就能在任何电脑上运行：它只处理小图，结果会放大后放在原图旁边。更大的模型请看其他模板。
""",
    )
    with graph.group("1  Picture and models"):
        whole = graph.add("LoadImage", image=PICTURE)["IMAGE"]
        base = graph.add("HYWULoadPocketEditor")
        graph.column()
        small = graph.add(
            "ImageScaleToMaxDimension", f"Scale to {SIZE} pixels", image=whole, upscale_method="area", largest_size=SIZE
        )["IMAGE"]
        generator = graph.add("HYWULoadGenerator", generator=GENERATOR)["generator"]
    with graph.group("2  Edit"):
        edit = graph.add(
            "HYWUEdit", model=base["model"], generator=generator, clip=base["clip"], image=small, vae=base["vae"],
            instruction=WARM,
        )  # fmt: skip
        graph.column()
        sampled = _sample(graph, edit["model"], edit["positive"], edit["negative"], edit["latent"])
    with graph.group("3  Before and after"):
        after = graph.add("VAEDecode", samples=sampled["LATENT"], vae=base["vae"])["IMAGE"]
        both = graph.add("ImageStitch", "Side by side", image1=whole, image2=after, spacing_width=8)["IMAGE"]
        graph.column()
        graph.add("SaveImage", "Before and after", width=560, images=both, filename_prefix="hywu/quickstart")
