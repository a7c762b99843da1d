"""The templates: laid out so that one can read them, valid for this server, run to pictures where their models are here."""

import functools
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import templates_bases
import templates_pocket
from host_server import DYNAMIC_COMBO, FRONTEND_ONLY, MUTED, to_api_format, widgets_of
from make_templates import HEIGHT, WIDTH, build
from PIL import Image
from workflow_builder import PACK_VERSION

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
DESCRIBED = {describe.__name__: describe for describe in (*templates_pocket.TEMPLATES, *templates_bases.TEMPLATES)}
SLOW = {"train", "teach"}  # run with fewer steps
TITLE_BAR = 30  # pixels of the canvas above a node's position
LOADERS = {"UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader"}
MODEL_FILES = (".safetensors", "/", "HunyuanImage-3.0-Instruct")


@functools.cache
def saved(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def known(server) -> dict:
    return server.get("/object_info")


def test_every_feature_has_a_template_and_every_template_a_description():
    assert set(NAMES) == set(DESCRIBED)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_description_makes(name, known):
    assert saved(name) == json.loads(json.dumps(build(DESCRIBED[name], known)))


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_thumbnail(name):
    with Image.open(ROOT / "workflows" / f"{name}.jpg") as picture:
        assert picture.size == (WIDTH, HEIGHT)
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another_and_groups_hold_whole_nodes(name):
    boxes = {node["id"]: box_of(node) for node in saved(name)["nodes"]}
    for (one, a), (two, b) in combinations(boxes.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{one} and {two} overlap"
    for group in saved(name)["groups"]:
        left, top, width, height = group["bounding"]
        for id_, box in boxes.items():
            outside = box[2] <= left or box[0] >= left + width or box[3] <= top or box[1] >= top + height
            inside = left <= box[0] and box[2] <= left + width and top <= box[1] and box[3] <= top + height
            assert outside or inside, f"{group['title']} cuts {id_}"


def box_of(node: dict) -> tuple:
    """left, top, right, bottom, with the title bar"""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height


@pytest.mark.parametrize("name", NAMES)
def test_wires_go_from_left_to_right(name):
    nodes = {node["id"]: node for node in saved(name)["nodes"]}
    for number, source, _, target, _, _ in saved(name)["links"]:
        assert nodes[source]["pos"][0] + nodes[source]["size"][0] < nodes[target]["pos"][0], f"link {number}"


@pytest.mark.parametrize("name", NAMES)
def test_links_agree_with_their_sockets(name, known):
    nodes, links = {node["id"]: node for node in saved(name)["nodes"]}, saved(name)["links"]
    assert len({link[0] for link in links}) == len(links)
    for number, source, slot, target, place, kind in links:
        output, input_ = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in output["links"] and number == input_["link"]
        assert kind == output["type"] == known[nodes[source]["type"]]["output"][slot]
        wanted = input_["type"]
        assert "COMFY_" in wanted + kind or kind in wanted.split(","), f"{kind} into {wanted}"
    wired = sum(slot["link"] is not None for node in nodes.values() for slot in node.get("inputs", ()))
    assert wired == len(links)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_one_that_its_widget_takes(name, known):
    for node in saved(name)["nodes"]:
        if node["type"] in FRONTEND_ONLY:
            continue
        chosen, values = {}, list(node["widgets_values"])
        for widget, kind, options in widgets_of(known[node["type"]]["input"], chosen):
            value = chosen[widget] = values.pop(0)
            if options.get("control_after_generate") or options.get("image_upload"):
                assert values.pop(0) in ("fixed", "image"), "templates give the same picture every time"
            choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
            if kind == DYNAMIC_COMBO:
                assert value in [option["key"] for option in options["options"]]
            elif choices is not None and value not in choices:
                assert str(value).endswith(MODEL_FILES), f"{node['type']}.{widget} is {value!r}"
            elif kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value)
        assert not values, f"{node['type']} has {values} left"


@pytest.mark.parametrize("name", NAMES)
def test_nodes_say_where_they_come_from_and_files_where_to_get_them(name):
    for node in saved(name)["nodes"]:
        properties = node["properties"]
        ours = node["type"].startswith("HYWU")
        assert properties["cnr_id"] == ("hywu" if ours else "comfy-core")
        assert properties["ver"] == (PACK_VERSION if ours else "0.30.0")
        named = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        models = properties.get("models", [])
        assert {model["name"] for model in models} == (named if node["type"] in LOADERS else set())
        for model in models:
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(f"/{model['name']}")
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae")


def test_the_files_are_those_of_the_hosts_own_templates():
    """Where its package is installed."""
    package = pytest.importorskip("comfyui_workflow_templates_json")
    texts = [
        path.read_text(encoding="utf-8")
        for wanted in ("flux_kontext", "image_qwen_image_edit", "image_flux2_klein", "image_z_image")
        for path in Path(package.__file__).parent.glob(f"templates/{wanted}*.json")
    ]
    assert texts
    for name in NAMES:
        for node in saved(name)["nodes"]:
            for model in node["properties"].get("models", ()):
                assert any(model["url"] in text for text in texts), model["url"]


@pytest.mark.parametrize("name", NAMES)
def test_notes_are_in_both_languages_and_can_be_read_in_both_renderers(name):
    english, chinese = (node["widgets_values"][0] for node in saved(name)["nodes"] if node["type"] in FRONTEND_ONLY)
    for text in (english, chinese):
        assert text.startswith("# ") and "`" not in text
    assert not any("\u4e00" <= letter <= "\u9fff" for letter in english)
    assert sum("\u4e00" <= letter <= "\u9fff" for letter in chinese) > 80


def test_the_quickstart_is_nine_nodes_in_three_groups():
    nodes = [node for node in saved("quickstart")["nodes"] if node["type"] not in FRONTEND_ONLY]
    assert len(nodes) <= 9 and len(saved("quickstart")["groups"]) == 3
    assert sum(node["type"].startswith("HYWU") for node in nodes) <= 3
    assert "crop" not in {slot["name"] for node in nodes for slot in node["inputs"]}


def test_training_is_ten_nodes():
    nodes = [node for node in saved("train")["nodes"] if node["type"] not in FRONTEND_ONLY]
    assert len(nodes) <= 10


@pytest.fixture
def atelier(server, host_dir):
    """Runs a template, changed a little: NodeClass={"input": value}. Gives (run, its pictures)."""
    (server.input / "whole.png").write_bytes((host_dir / "input" / templates_pocket.PICTURE).read_bytes())

    def run(name: str, workflow: dict | None = None, **changes: dict):
        prompt = to_api_format(workflow or saved(name), server.get("/object_info"))
        for node in prompt.values():
            node["inputs"] |= {"LoadImage": {"image": "whole.png"}, **changes}.get(node["class_type"], {})
        done = server.run(prompt, seconds=1200)
        assert done.outcome == "execution_success", done.messages[-1]
        shown = [id_ for id_ in prompt if prompt[id_]["class_type"] == "SaveImage"]
        return done, [np.asarray(Image.open(server.output / path)) for id_ in shown for path in done.files(id_)]

    return run


FEW_STEPS = {
    "HYWUTrainGenerator": {"steps": 4, "keep_every": 4, "warmup": 1, "validate_every": 2},
    "HYWUTeachGenerator": {"steps": 2},
}


@pytest.mark.parametrize("name", [describe.__name__ for describe in templates_pocket.TEMPLATES])
def test_it_runs(name, atelier):
    done, pictures = atelier(name, **(FEW_STEPS if name in SLOW else {}))
    awake = {
        str(node["id"]) for node in saved(name)["nodes"] if node["type"] not in FRONTEND_ONLY and node["mode"] != MUTED
    }
    assert set(done.executed) | done.cached == awake
    assert pictures or name == "inspect_and_compare"
    for picture in pictures:
        assert picture.std() > 10


def test_before_and_after_are_large_and_whole(atelier):
    _, (both,) = atelier("quickstart")
    height, width, _ = both.shape
    assert height >= 256 and width == 2 * height + 8
    before, after = both[:, :height].astype(float), both[:, height + 8 :].astype(float)
    assert 10 < np.abs(before - after).mean() < 100
    small = [
        np.asarray(Image.fromarray(part.astype(np.uint8)).convert("L").resize((16, 16))).ravel()
        for part in (before, after)
    ]
    assert np.corrcoef(*small)[0, 1] > 0.8, "the same picture, uncropped"


def test_the_long_way_comes_to_the_same_picture(atelier):
    (_, (short,)), (_, (long,)) = atelier("quickstart"), atelier("the_long_way")
    assert np.array_equal(short, long)


def test_a_saved_lora_comes_back_through_the_stock_loader(atelier, server):
    """As its note says: run, refresh, wake the other half, choose the file."""
    _, (before,) = atelier("save_and_reload", HYWUSaveLoRA={"filename_prefix": "loras/template"})
    (file,) = (server.output / "loras").glob("template_*.safetensors")
    awake = json.loads(json.dumps(saved("save_and_reload")))
    for node in awake["nodes"]:
        node["mode"] = 0
    _, pictures = atelier("", awake, LoraLoaderModelOnly={"lora_name": file.name})
    assert len(pictures) == 2 and all(np.abs(picture.astype(int) - before).max() <= 1 for picture in pictures)


def test_each_half_gets_its_own_hook(atelier):
    _, (both,) = atelier("hooks")
    after = both[:, both.shape[1] // 2 + 4 :].astype(float)
    left, right = after[:, : after.shape[1] // 2].mean((0, 1)), after[:, after.shape[1] // 2 :].mean((0, 1))
    assert left[0] - left[2] > right[0] - right[2] + 40, "the left half is warmer"


def test_what_is_missing_is_said_before_anything_runs(server):
    for name in (describe.__name__ for describe in templates_bases.TEMPLATES):
        workflow = saved(name)
        with pytest.raises(RuntimeError, match="refused") as refused:
            server.run(to_api_format(workflow, server.get("/object_info")))
        for node in workflow["nodes"]:
            if node["type"] in LOADERS | {"HYWULoadHunyuanImage3"} and node["mode"] != MUTED:
                assert node["widgets_values"][0] in str(refused.value), name
