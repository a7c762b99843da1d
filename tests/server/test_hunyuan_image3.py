"""The official flow through the real server on the tiny base: the template as it ships, with the reference's numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from host_server import to_api_format
from hunyuan_tiny import FIXTURES, facts, golden, relative
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PICTURE = "a_272x240.png"
ASKED = facts()
STEPS = 4  # the stock schedule is the reference's where 1000 is a multiple of it


class Flow:
    """The template as a prompt, on the tiny base."""

    def __init__(self, server):
        self.server = server
        shutil.copy(FIXTURES / "images" / PICTURE, server.input)
        workflow = json.loads((ROOT / "workflows" / "hunyuan_image3_edit.json").read_text(encoding="utf-8"))
        self._prompt = to_api_format(workflow, server.get("/object_info"))

    def node(self, kind: str) -> str:
        """The id of the template's node of a class."""
        return next(name for name, node in self._prompt.items() if node["class_type"] == kind)

    def prompt(self, **changes: dict) -> dict:
        """The template for the reference's edit; changes are `NodeClass={"input": value}`."""
        settings = {
            "LoadImage": {"image": PICTURE},
            "HYWULoadHunyuanImage3": {"folder": "tiny", "weight_dtype": "float32"},
            "HYWULoadGenerator": {"generator": "tiny/"},
            "HYWUHunyuanImage3Edit": {
                "prompt": ASKED["prompt"],
                "reasoning": ASKED["cot_text"],
                "size": ASKED["image_size"],
                "seed": ASKED["seed"],
                "reference_compatible": True,
            },
            "KSampler": {"steps": STEPS},
        }
        prompt = json.loads(json.dumps(self._prompt))
        for wanted in (settings, changes):
            for kind, inputs in wanted.items():
                prompt[self.node(kind)]["inputs"] |= inputs
        return prompt

    def keep_lora(self, prompt: dict, name: str) -> dict:
        """Also save the generated LoRA."""
        inputs = {"lora": [self.node("HYWUGenerateLoRA"), 0], "filename_prefix": name, "format": "stock"}
        prompt["keep"] = {"class_type": "HYWUSaveLoRA", "inputs": inputs | {"dtype": "as generated"}}
        return prompt

    def run(self, prompt: dict, on_message=None):
        run = self.server.run(prompt, on_message)
        assert run.outcome == "execution_success" or on_message, run.messages[-1]
        return run

    def image(self, run) -> np.ndarray:
        return np.asarray(Image.open(self.server.output / run.files(self.node("SaveImage"))[0])).astype(int)


@pytest.fixture(scope="module")
def flow(server) -> Flow:
    return Flow(server)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The same edit by the parity script, with the noise that the stock sampler draws for seed 0."""
    folder = tmp_path_factory.mktemp("parity")
    noise = torch.randn((1, 8, 14, 18), generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise}, folder / "noise.safetensors")
    command = [sys.executable, str(ROOT / "scripts" / "parity_hunyuan_image3.py"), "dump", "--noise"]
    command += [str(folder / "noise.safetensors"), "--base", str(FIXTURES / "base_tiny")]
    command += ["--generator", str(FIXTURES / "pg_tiny"), "--image", str(FIXTURES / "images" / PICTURE)]
    command += [
        "--prompt",
        ASKED["prompt"],
        "--system-prompt",
        ASKED["system_prompt"],
        "--reasoning",
        ASKED["cot_text"],
    ]
    command += [
        "--size",
        ASKED["image_size"],
        "--seed",
        str(ASKED["seed"]),
        "--steps",
        str(STEPS),
        "--dtype",
        "float32",
    ]
    command += ["--out", str(folder / "out.safetensors")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return load_file(folder / "out.safetensors")


def test_the_template_edits_as_the_reference(flow, dumped):
    run = flow.run(flow.prompt())
    assert set(run.executed) | run.cached == set(flow.prompt())
    expected = (dumped["image"][0] * 255).clamp(0, 255).numpy()
    assert np.abs(flow.image(run) - expected).max() <= 1.0


def test_the_lora_changes_the_image_as_much_as_the_references(flow, dumped):
    """Saved latents with the LoRA and without it: final latents of both, and so their difference."""
    found = {}
    for name, strength in (("lora", 1.0), ("base", 0.0)):
        prompt = flow.prompt(HYWUApplyLoRA={"strength": strength})
        inputs = {"samples": [flow.node("KSampler"), 0], "filename_prefix": f"hunyuan-{name}"}
        prompt["latent"] = {"class_type": "SaveLatent", "inputs": inputs}
        flow.run(prompt)
        (file,) = flow.server.output.glob(f"hunyuan-{name}*.latent")
        found[name] = load_file(file)["latent_tensor"][:, :, 0] * 0.5625
        assert relative(found[name], dumped[f"{name}.latent_final"]) < 5e-5
    assert relative(found["lora"] - found["base"], dumped["lora.latent_final"] - dumped["base.latent_final"]) < 1e-4
    assert relative(found["lora"], found["base"]) > 0.1


def test_the_generated_lora_is_the_references(flow):
    flow.run(flow.keep_lora(flow.prompt(), "loras/hunyuan"))
    (file,) = (flow.server.output / "loras").glob("hunyuan_*.safetensors")
    saved, expected = load_file(file), golden("pg_state_dict")
    for target in ("self_attn.qkv_proj", "mlp.shared_mlp.down_proj"):
        name = f"model.layers.1.{target}"
        up = next(value for key, value in saved.items() if name in key and "up" in key)
        assert relative(up, expected[f"{name}.lora_B"][0]) < 1e-5


def test_an_automatic_size_is_the_models_choice(flow):
    prompt = flow.prompt(HYWUHunyuanImage3Edit={"size": "auto", "fit": "crop"})
    prompt["width"] = {"class_type": "PreviewAny", "inputs": {"source": [flow.node("HYWUHunyuanImage3Condition"), 1]}}
    run = flow.run(prompt)
    shown = {data["node"]: data["output"] for kind, data in run.messages if kind == "executed"}
    assert shown["width"]["text"] == ["336"]
    assert flow.image(run).shape == (176, 336, 3)


def test_strength_does_not_run_the_base_or_the_generator_again(flow):
    flow.run(flow.prompt())
    again = flow.run(flow.prompt(HYWUApplyLoRA={"strength": 0.5}))
    ran = {flow.prompt()[node]["class_type"] for node in again.executed}
    assert not ran & {
        "HYWUHunyuanImage3Condition",
        "HYWUGenerateLoRA",
        "HYWULoadHunyuanImage3",
        "HYWUHunyuanImage3Edit",
    }


def test_reasoning_is_text_that_goes_back_in(flow):
    prompt = flow.prompt(HYWUHunyuanImage3Edit={"reasoning": ["reason", 0]})
    loader = flow.node("HYWULoadHunyuanImage3")
    inputs = {"model": [loader, 0], "encoder": [loader, 2], "prompt": ASKED["prompt"], "mode": "recaption", "seed": 3}
    inputs |= {"max_tokens": 24, "temperature": 0.6, "top_k": 1024, "top_p": 0.95, "fit": "auto"}
    prompt["reason"] = {"class_type": "HYWUHunyuanImage3Reason", "inputs": inputs}
    prompt["reason"]["inputs"]["images.image0"] = [flow.node("LoadImage"), 0]
    run = flow.run(prompt)
    shown = {data["node"]: data["output"] for kind, data in run.messages if kind == "executed"}
    (text,) = shown["reason"]["text"]
    assert text.startswith("<recaption>") and text.endswith("</recaption>")


def test_cancelled_while_sampling_and_right_afterwards(flow):
    whole = flow.image(flow.run(flow.prompt()))
    pressed = []

    def on_message(kind, data):
        if kind == "progress" and data["node"] == flow.node("KSampler") and data["value"] >= 2 and not pressed:
            pressed.append(flow.server.post("/interrupt"))

    run = flow.run(flow.prompt(KSampler={"steps": 500, "seed": 7}), on_message)
    assert run.outcome == "execution_interrupted"
    assert np.array_equal(flow.image(flow.run(flow.prompt(SaveImage={"filename_prefix": "again"}))), whole)


WRONG = {
    "no instruction": ({"HYWUHunyuanImage3Edit": {"prompt": "  "}}, "HYWUHunyuanImage3Edit", "instruction is empty"),
    "no size": ({"HYWUHunyuanImage3Edit": {"size": "large"}}, "HYWUHunyuanImage3Edit", "'large' is no size"),
    "another generator": (
        {"HYWULoadGenerator": {"generator": "pocket-generator.safetensors"}},
        "HYWUGenerateLoRA",
        "this generator reads",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_can_be_wired_wrong_says_so(flow, what):
    changes, kind, expected = WRONG[what]
    run = flow.server.run(flow.prompt(**changes))
    assert run.outcome == "execution_error"
    assert run.messages[-1][1]["node_id"] == flow.node(kind)
    assert expected in run.error


def test_another_models_conditioning_says_what_to_wire(flow):
    prompt = flow.prompt()
    prompt["pocket"] = {"class_type": "HYWULoadPocketEditor", "inputs": {}}
    prompt["text"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "warm", "clip": ["pocket", 1]}}
    prompt[flow.node("KSampler")]["inputs"]["positive"] = ["text", 0]
    run = flow.server.run(prompt)
    assert run.outcome == "execution_error" and "HunyuanImage-3 Edit" in run.error
    prompt = flow.prompt()
    prompt["pocket"] = {"class_type": "HYWULoadPocketEditor", "inputs": {}}
    prompt[flow.node("HYWUHunyuanImage3Condition")]["inputs"]["model"] = ["pocket", 0]
    run = flow.server.run(prompt)
    assert run.outcome == "execution_error" and "Load HunyuanImage-3" in run.error
