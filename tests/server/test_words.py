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
SPEAKING = re.compile(r"cards import|import cards|messages import")
MAKERS = ("messages.py", "cards.py")  # of messages from what they are given
PLACE = re.compile(r"{\w+}")
WORD = re.compile(r"[A-Za-z]{3}(?![^{]*})")  # outside of places
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


def called(node: ast.AST) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""


def either(node: ast.AST) -> list[ast.AST]:
    return [*either(node.body), *either(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def fixed_words(tree: ast.Module) -> set[str]:
    """What cards say without a value in it: titles, names of rows and charts."""
    spoken = []
    for node in ast.walk(tree):
        if called(node) in ("Card", "_card"):
            spoken += node.args[:1]
        elif called(node) == "Chart":
            spoken += node.args[1:2]
        elif isinstance(node, ast.Tuple) and len(node.elts) == 2:
            spoken.append(node.elts[0])
    texts = [part.value for one in spoken for part in either(one) if isinstance(part, ast.Constant)]
    return {text for text in texts if isinstance(text, str) and text[:1].isupper() and not text.isupper()}  # no units


def templates(tree: ast.Module) -> list[ast.AST]:
    """Of messages."""
    found = [node.args[:1] for node in ast.walk(tree) if called(node) == "Message"]
    found += [node.args[1:2] for node in ast.walk(tree) if called(node) == "listed"]
    return [part for arguments in found for one in arguments for part in either(one)]


def on_cards() -> set[str]:
    """All that cards can say: web/cards.js looks each up as it is, and then puts the values in."""
    found = {"{first}, {second}"}  # of several texts, unless something else is asked for
    for file in (ROOT / "hywu_core").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name in MAKERS or not SPEAKING.search(text):
            continue
        tree = ast.parse(text)
        of_messages = templates(tree)
        composed = [node.lineno for node in of_messages if not isinstance(node, ast.Constant)]
        assert not composed, f"{file.name}: the templates in the lines {composed} cannot be looked up"
        found |= fixed_words(tree) | {node.value for node in of_messages}
    return found


def test_all_that_cards_can_say_is_there_in_chinese(words):
    said, chinese = on_cards(), words["zh"]["hywuCards"]
    assert {"The LoRA is on the model", "Targets", "Step", "matched {found}/{total} targets"} <= said
    assert sorted(said - set(chinese)) == []
    assert [text for text in sorted(said) if WORD.search(text) and not CHINESE.search(chinese[text])] == []
    assert sorted(set(chinese) - said) == []


def test_a_translation_has_the_places_of_its_template(words):
    for text, translated in words["zh"]["hywuCards"].items():
        assert set(PLACE.findall(text)) == set(PLACE.findall(translated)), text


def test_no_text_holds_what_the_frontend_takes_for_a_formula():
    """It compiles most texts as messages, in which these mean something; those of cards only web/cards.js reads."""
    for file in (ROOT / "locales").rglob("*.json"):
        for path, text in leaves(json.loads(file.read_text(encoding="utf-8"))).items():
            assert path[0] == "hywuCards" or not set("{}@|$") & set(text), (file.name, path)


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
