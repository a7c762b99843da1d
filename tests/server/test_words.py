"""What the pack shows can be read in English and in Chinese, and one thing has one name."""

import ast
import json
import re
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# what is written so in every language
SAME = {"VAE", "CLIP", "LoRA", "EMA", "Latent", "alpha", "top_k", "top_p", "HY-WU", "HunyuanImage-3"}
NUMBERS = {"float32", "bfloat16", "float16", "fp8_e4m3fn", "int8"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
SLOT_NAMES = re.compile(r"COMFY_AUTOGROW")  # rows that grow are named by the frontend


@pytest.fixture(scope="module")
def nodes(server) -> dict:
    return {name: node for name, node in server.get("/object_info").items() if name.startswith("HYWU")}


@pytest.fixture(scope="module")
def words(server) -> dict:
    return server.get("/i18n")


def inputs_of(node: dict) -> dict:
    """{name: (kind, options)}, those that a choice of a dynamic combo brings included, as the frontend looks them up."""
    found = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    for key, (kind, options) in list(found.items()):
        if kind == DYNAMIC:
            for choice in options["options"]:
                found |= {f"{key}_{name}": child for name, child in inputs_of({"input": choice["inputs"]}).items()}
    return found


def choices_of(kind, options: dict) -> list[str]:
    """What a combo offers, unless it lists files of the disk."""
    offered = options.get("options", []) if kind == "COMBO" else []
    offered = [choice["key"] for choice in options["options"]] if kind == DYNAMIC else offered
    return [
        choice
        for choice in offered
        if not choice.endswith((".safetensors", "/")) and choice not in NUMBERS and not choice.isdigit()
    ]


def shown(nodes: dict, files: set) -> dict[tuple[str, ...], str]:
    """{path in nodeDefs: English} of every string of the nodes."""
    found = {}
    for name, node in nodes.items():
        found[name, "display_name"], found[name, "description"] = node["display_name"], node["description"]
        for key, (kind, options) in inputs_of(node).items():
            found[name, "inputs", key, "name"], found[name, "inputs", key, "tooltip"] = key, options["tooltip"]
            if (name, key) not in files:
                for choice in choices_of(kind, options):
                    found[name, "inputs", key, "options", choice] = choice
        for index, key in enumerate(node["output_name"]):
            found[name, "outputs", str(index), "name"] = key
            found[name, "outputs", str(index), "tooltip"] = node["output_tooltips"][index]
    return found


def look_up(tree: dict, path: tuple[str, ...]):
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    return tree


def leaves(tree: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {found: text for key, branch in tree.items() for found, text in leaves(branch, (*path, key)).items()}


FILES = {
    ("HYWULoadGenerator", "generator"),
    ("HYWULoadLoRA", "lora"),
    ("HYWULoadHunyuanImage3", "folder"),
    ("HYWULearnFromLoRAs", "folder"),
    ("HYWULoadEditPairs", "folder"),
}


def test_every_string_of_every_node_is_there_in_chinese(nodes, words):
    missing = []
    for path in shown(nodes, FILES):
        text = look_up(words["zh"]["nodeDefs"], path)
        if not text or not (CHINESE.search(text) or text in SAME):
            missing.append((".".join(path), text))
    assert missing == []


def test_categories_and_sockets_are_there_in_chinese(nodes, words):
    categories = {part for node in nodes.values() for part in node["category"].split("/")}
    assert categories <= set(words["zh"]["nodeCategories"])
    kinds = {kind for node in nodes.values() for kind in node["output"] if kind.startswith("HYWU")}
    assert kinds and kinds == set(words["en"]["dataTypes"]) == set(words["zh"]["dataTypes"])


def test_every_node_is_found_by_words_in_both_languages(nodes, words):
    for name, node in nodes.items():
        chinese = words["zh"]["nodeDefs"][name].get("search_aliases", [])
        assert node["search_aliases"] and chinese and all(map(CHINESE.search, chinese)), name


def test_nothing_is_translated_that_is_not_there(nodes, words):
    known = set(shown(nodes, set()))
    for language in ("en", "zh"):
        entries = {path for path in leaves(words[language]["nodeDefs"]) if path[0].startswith("HYWU")}
        entries = {path for path in entries if path[1] != "search_aliases"}
        assert entries <= known, sorted(".".join(path) for path in entries - known)


def on_cards() -> set[str]:
    """What cards say in fixed words: titles, names of rows and charts. web/cards.js looks each up as it is."""
    found = set()
    for file in (ROOT / "hywu_core").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name not in ("cards.py", "session.py") and not re.search(r"cards import|import cards", text):
            continue
        for node in ast.walk(ast.parse(text)):
            spoken = []
            if isinstance(node, ast.Call) and node.args:
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                spoken += node.args[:1] if called in ("Card", "_card") else node.args[1:2] if called == "Chart" else []
            elif isinstance(node, ast.Tuple) and len(node.elts) == 2:
                spoken.append(node.elts[0])
            either = [
                part for one in spoken for part in ([one.body, one.orelse] if isinstance(one, ast.IfExp) else [one])
            ]
            texts = [one.value for one in either if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            found |= {one for one in texts if one[:1].isupper() and not one.isupper()}  # units are no words
    return found


def test_cards_are_there_in_chinese(words):
    spoken = on_cards()
    assert {"The LoRA is on the model", "Targets", "Loss, step by step", "Step"} <= spoken
    chinese = words["zh"]["hywuCards"]
    assert [text for text in sorted(spoken) if not CHINESE.search(chinese.get(text, ""))] == []


def test_no_text_holds_what_the_frontend_takes_for_a_formula():
    """It compiles most texts as messages, in which these mean something."""
    for file in (ROOT / "locales").rglob("*.json"):
        for path, text in leaves(json.loads(file.read_text(encoding="utf-8"))).items():
            assert not set("{}@|$") & set(text), (file.name, path)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_help_page_names_the_node_and_all_its_sockets(nodes, words, server, language):
    for name, node in nodes.items():
        with urllib.request.urlopen(f"{server.url}/extensions/hywu/docs/{name}/{language}.md") as response:
            page = response.read().decode()
        translated = words[language]["nodeDefs"].get(name, {}) if language != "en" else {}
        assert page.startswith(f"# {translated.get('display_name', node['display_name'])}\n"), name
        table = "\n".join(line for line in page.splitlines() if line.startswith("| "))
        for key, (kind, *_) in {**node["input"].get("required", {}), **node["input"].get("optional", {})}.items():
            shown_as = translated.get("inputs", {}).get(key, {}).get("name", key)
            assert shown_as in table or SLOT_NAMES.match(kind), f"{name}: input {shown_as}"
        for index, key in enumerate(node["output_name"]):
            shown_as = translated.get("outputs", {}).get(str(index), {}).get("name", key)
            assert shown_as in table, f"{name}: output {shown_as}"


def test_one_thing_has_one_name():
    """A node goes by its display name wherever it is spoken of, and what was its name once is gone."""
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "web" / "docs").rglob("*.md")]
    texts += [*(ROOT / "locales").rglob("*.json"), *(ROOT / "nodes").glob("*.py")]
    for file in texts:
        text = file.read_text(encoding="utf-8")
        for former in ("Apply Generated LoRA", "应用生成的 LoRA", "潜变量", "潜空间", "正向条件"):
            assert former not in text, f"{file.name}: {former}"
