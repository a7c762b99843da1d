"""LoRAs of other tools through the nodes: loaded, blended, saved, and what the nodes say."""

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def kohya(studio):
    """A LoRA file as a trainer writes it, on a layer of the pocket editor, whose names the quickstart's own LoRA has."""
    prompt = studio.quickstart()
    save = {"lora": [studio.node("HYWUGenerateLoRA"), 0], "filename_prefix": "loras/own", "format": "stock"}
    prompt["save"] = {"class_type": "HYWUSaveLoRA", "inputs": save | {"dtype": "as generated"}}
    assert studio.run(prompt).outcome == "execution_success"
    own = load_file(sorted((studio.server.output / "loras").glob("own_*"))[-1])
    state = {}
    for key, tensor in own.items():
        name, _, end = key.removeprefix("diffusion_model.").partition(".lora_")
        if end:
            state[f"lora_unet_{name.replace('.', '_')}.lora_{end}"] = tensor
    state["lora_te1_x.lora_up.weight"], state["lora_te1_x.lora_down.weight"] = torch.ones(4, 2), torch.ones(2, 4)
    state["lora_unet_nowhere.diff"] = torch.ones(4)
    save_file(state, studio.server.output / "loras" / "kohya.safetensors")
    return "kohya.safetensors"


def loaded(studio, file, **changes):
    prompt = studio.quickstart(HYWUApplyLoRA={"lora": ["load", 0]} | changes)
    prompt["load"] = {"class_type": "HYWULoadLoRA", "inputs": {"lora": file}}
    return prompt


def test_the_node_says_what_matched(studio, kohya):
    run = studio.run(loaded(studio, kohya))
    assert run.outcome == "execution_success"
    text = " ".join(str(message) for message in run.messages)
    assert (
        "not in this model: lora_unet_nowhere; 1 of a text encoder, which is not part of a MODEL, left out (bypass)"
        in text
    )


def test_a_base_gives_a_loaded_lora_its_own_names(studio, kohya):
    prompt = loaded(studio, kohya)
    prompt["load"]["inputs"]["model"] = prompt[studio.node("HYWUApplyLoRA")]["inputs"]["model"]
    save = {"lora": ["load", 0], "filename_prefix": "loras/named", "format": "stock", "dtype": "as generated"}
    prompt["save"] = {"class_type": "HYWUSaveLoRA", "inputs": save}
    run = studio.run(prompt)
    assert run.outcome == "execution_success", run.error
    (file,) = (studio.server.output / "loras").glob("named_*")
    names = {key.split(".lora_")[0] for key in load_file(file) if ".lora_" in key}
    assert all(name.startswith("diffusion_model.") for name in names - {"lora_te1_x"}) and "lora_te1_x" in names
