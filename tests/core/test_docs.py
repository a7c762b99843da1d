"""What the pages say can be followed: links lead somewhere, and every script that is named is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "web" / "docs").rglob("*.md"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def headings(page: Path) -> set[str]:
    """As GitHub names them in links."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        file, _, heading = target.partition("#")
        # the frontend looks for what a help page names below web/docs, whatever the page's own folder
        folder = HELP if page.is_relative_to(HELP) else page.parent
        there = folder / file if file else page
        assert there.is_file(), target
        assert not heading or heading in headings(there), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:scripts|docs|results|hywu_core|study)/[\w/]+\.(?:py|sh|md|json|png)\b", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", sorted(HELP.rglob("*.md")), ids=name)
def test_help_pages_show_their_node(page):
    """scripts/make_pictures.py takes the pictures and puts them there."""
    second = page.read_text(encoding="utf-8").splitlines()[2]
    assert re.fullmatch(rf"!\[.+\]\({page.parent.name}/{page.stem}\.webp\)", second), second
    assert page.with_suffix(".webp").stat().st_size < 150_000


NOT_OURS = {"No Results Found", "IMPORT FAILED"}  # what frontend and host say


def said() -> str:
    """Every text in the sources, with "..." where a value is put in."""
    texts = []
    for folder in ("hywu_core", "nodes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "troubleshooting.md"], ids=name)
def test_messages_are_quoted_as_they_are(page):
    """In tables of what goes wrong: the first cell quotes in italics, with ... for what differs."""
    sources, quotes = said(), []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and line.count("|") == 3:
            quotes += re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", line.split("|")[1])
    assert len(quotes) > 5
    for quote in set(quotes) - NOT_OURS:
        for piece in re.split(r"\.\.\.|\d+", quote):
            assert piece.strip(" ,:/") in sources, quote
