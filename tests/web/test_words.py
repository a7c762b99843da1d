"""Words in the browser: a search in either language finds the node, and Chinese reaches nodes, choices and help pages."""

import json
from pathlib import Path

import pytest
from demo import PICTURE, draw_picture

ROOT = Path(__file__).resolve().parents[2]

SEARCHES = {
    "edit": "HYWUGenerateLoRA",
    "merge": "HYWUBlendLoRAs",
    "mix": "HYWUBlendLoRAs",
    "lora": "HYWULoadLoRA",
    "instance lora": "HYWUApplyLoRA",
    "apply generated lora": "HYWUApplyLoRA",
    "hypernetwork": "HYWULoadGenerator",
    "权重": "HYWUBlendLoRAs",
    "超网络": "HYWUGenerateLoRA",
    "编辑": "HYWUGenerateLoRA",
    "混合": "HYWUBlendLoRAs",
    "合并": "HYWUBlendLoRAs",
    "训练": "HYWUTrainGenerator",
    "混元": "HYWULoadHunyuanImage3",
}
# the search box of both frontends asks this, and shows as many
FIND = """query => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeDef')
    .nodeSearchService.searchNode(query, [], {limit: 64}).map(node => node.name)"""
OPEN = "window.app?.graph && Object.keys(LiteGraph.registered_node_types).includes('HYWUApplyLoRA')"


def open_page(browser, server):
    server.post("/api/settings", {"Comfy.TutorialCompleted": True})  # or the templates are shown over everything
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(server.url)
    page.wait_for_function(OPEN, timeout=90_000)
    return page


@pytest.fixture(scope="module")
def english(browser, server):
    page = open_page(browser, server)
    yield page
    page.close()


@pytest.fixture(scope="module")
def chinese(browser, server):
    before = server.get("/api/settings").get("Comfy.Locale", "en")
    server.post("/api/settings", {"Comfy.Locale": "zh"})
    page = open_page(browser, server)
    yield page
    page.close()
    server.post("/api/settings", {"Comfy.Locale": before})


@pytest.mark.parametrize("query", SEARCHES)
def test_a_search_in_english_finds_it(english, query):
    assert SEARCHES[query] in english.evaluate(FIND, query)


@pytest.mark.parametrize("query", SEARCHES)
def test_a_search_in_chinese_finds_it(chinese, query):
    assert SEARCHES[query] in chinese.evaluate(FIND, query)


def add_node(page, kind: str) -> dict:
    """Names and shown values of a fresh node's widgets, and its title."""
    return page.evaluate(
        """kind => {
            const node = LiteGraph.createNode(kind);
            app.graph.add(node);
            return {
                title: node.title,
                labels: node.widgets.map(widget => widget.label),
                shown: node.widgets.map(widget => widget._displayValue),
                values: node.widgets.map(widget => widget.value),
                choices: node.widgets.map(widget => widget.type === 'combo'
                    ? widget.options.values.map(value => widget.options.getOptionLabel?.(value) ?? value) : null),
            };
        }""",
        kind,
    )


def test_a_node_speaks_chinese_and_keeps_its_values(chinese):
    node = add_node(chinese, "HYWUApplyLoRA")
    assert node["title"] == "应用实例 LoRA"
    assert node["labels"][:2] == ["强度", "模式"]
    assert node["shown"][1] == "自动（auto）" and node["values"][1] == "auto"
    assert node["choices"][1] == ["自动（auto）", "旁路（bypass）", "合并（merge）"]


def test_a_node_speaks_english(english):
    node = add_node(english, "HYWUTeachGenerator")
    choices = next(choices for choices in node["choices"] if choices and "told: the base reads it too" in choices)
    assert "as the generator was trained" in choices
    assert add_node(english, "HYWUApplyLoRA")["choices"][1] == ["auto", "bypass", "merge"]


def help_page(page, kind: str):
    """The help of a node, opened as an artist does: click the node, click the i above it."""
    page.evaluate(
        """kind => {
            app.graph.clear();
            const node = LiteGraph.createNode(kind);
            node.pos = [500, 400];
            app.graph.add(node);
            app.canvas.ds.reset();
            app.canvas.setDirty(true, true);
        }""",
        kind,
    )
    page.wait_for_timeout(500)  # until the canvas is drawn: it knows only then what lies where
    canvas = page.locator("#graph-canvas").bounding_box()
    page.mouse.click(canvas["x"] + 560, canvas["y"] + 385)
    page.get_by_test_id("info-button").click()
    content = page.locator(".node-help-content").first
    content.locator("h1").wait_for(timeout=20_000)
    return content


def check_help(page, title: str):
    """The page is in the language, found at the first address that is asked for, and so are its pictures."""
    asked = []
    page.on("response", lambda response: asked.append((response.url, response.status)))
    content = help_page(page, "HYWUBlendLoRAs")
    assert content.locator("h1").inner_text() == title
    pages = [status for url, status in asked if "/docs/HYWUBlendLoRAs" in url]
    assert pages and set(pages) == {200}
    page.wait_for_function(
        "[...document.querySelectorAll('.node-help-content img')].every(picture => picture.naturalWidth)",
        timeout=20_000,
    )


def test_the_help_is_in_english(english):
    check_help(english, "Blend Instance LoRAs")


def test_the_help_is_in_chinese(chinese):
    check_help(chinese, "混合实例 LoRA")


CARDS = "[...document.querySelectorAll('.hywu-card-page')].map(page => page.innerText).join('\\n')"


def test_cards_are_in_chinese(chinese, server):
    draw_picture(server.input / PICTURE)
    workflow = json.loads((ROOT / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
    chinese.evaluate("workflow => app.loadGraphData(workflow).then(() => app.queuePrompt(0))", workflow)
    chinese.wait_for_function(f"{CARDS}.includes('匹配 16/16 个目标（旁路）')", timeout=120_000)
    text = chinese.evaluate(CARDS)
    assert "LoRA 已加到模型上" in text and "Targets" not in text and "{" not in text
