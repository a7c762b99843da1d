"""LoRAs of other tools through the nodes: loaded, blended, saved, and what the nodes say."""

import pytest
import torch
from demo import PICTURE
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
    assert "not in this model: lora_unet_nowhere; 1 of a text encoder, which is not part of a MODEL, left out" in text
    assert "targets (bypass)" in text and "Only a part of this LoRA fits this model" in text


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


def test_the_short_way_gives_its_lora_to_the_hosts_own_nodes(studio):
    """The same LoRA from both outputs."""
    base = {name: ["editor", slot] for slot, name in enumerate(("model", "clip", "vae"))}
    scale = {"image": ["picture", 0], "upscale_method": "area", "width": 64, "height": 64, "crop": "center"}
    given = {**base, "generator": ["generator", 0], "image": ["scaled", 0], "instruction": "make the colours warm"}
    prompt = {
        "editor": {"class_type": "HYWULoadPocketEditor", "inputs": {}},
        "generator": {
            "class_type": "HYWULoadGenerator",
            "inputs": {"generator": "pocket-generator.safetensors", "weight_dtype": "default"},
        },
        "picture": {"class_type": "LoadImage", "inputs": {"image": PICTURE}},
        "scaled": {"class_type": "ImageScale", "inputs": scale},
        "edit": {"class_type": "HYWUEdit", "inputs": given},
    }
    how = {"format": "stock", "dtype": "as generated"}
    for name, slot in (("lora", 4), ("lora_model", 5)):
        save = {"lora": ["edit", slot], "filename_prefix": f"loras/short_{name}", **how}
        prompt[name] = {"class_type": "HYWUSaveLoRA", "inputs": save}
    run = studio.run(prompt)
    assert run.outcome == "execution_success", run.error
    folder = studio.server.output / "loras"
    (ours,), (hosts,) = (map(load_file, folder.glob(f"short_{name}_0*")) for name in ("lora", "lora_model"))
    assert ours and ours.keys() == hosts.keys()
    assert all(torch.equal(tensor, hosts[name]) for name, tensor in ours.items())


def said(prompt, link, text, mark):
    """Another instruction through copies of the nodes that lead to a link: where it comes out."""
    name, output = link
    node = prompt[name]
    if node["class_type"] == "CLIPTextEncode":
        prompt[name + mark] = {**node, "inputs": {**node["inputs"], "text": text}}
        return [name + mark, output]
    inputs = {key: said(prompt, value, text, mark) if isinstance(value, list) else value
              for key, value in node["inputs"].items()}  # fmt: skip
    if inputs == node["inputs"]:
        return link
    prompt[name + mark] = {**node, "inputs": inputs}
    return [name + mark, output]


def test_further_conditions_are_instances_of_one_lora(studio):
    """Texts of other lengths; each file holds what its text alone gives."""
    texts, generate = ("warm the colours", "make it much darker, please", "blur"), studio.node("HYWUGenerateLoRA")
    save = {"filename_prefix": "loras/batch", "format": "stock", "dtype": "as generated"}

    def saved(prefix, first, *more):
        prompt = studio.quickstart()
        link = prompt[generate]["inputs"]["condition"]
        links = [said(prompt, link, text, f"-{number}") for number, text in enumerate((first, *more))]
        prompt[generate]["inputs"]["condition"] = links[0]
        for number, found in enumerate(links[1:]):
            prompt[generate]["inputs"][f"more_conditions.condition{number}"] = found
        inputs = {"lora": [generate, 0], **save, "filename_prefix": f"loras/{prefix}"}
        prompt = {**prompt, "save": {"class_type": "HYWUSaveLoRA", "inputs": inputs}}
        for name in [name for name, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage")]:
            del prompt[name]
        run = studio.run(prompt)
        assert run.outcome == "execution_success", run.error
        return [load_file(path) for path in sorted((studio.server.output / "loras").glob(f"{prefix}_*"))]

    together = saved("together", *texts)
    assert len(together) == len(texts)
    for number, text in enumerate(texts):
        (alone,) = saved(f"alone{number}", text)
        assert alone.keys() == together[number].keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[number][name], tensor, atol=2e-5, rtol=1e-4)
    assert not all(torch.allclose(together[0][name], together[1][name]) for name in together[0])
