"""Workflows as the frontend saves them, from short descriptions: nodes in columns, columns in groups, groups left to right.

    graph = Graph("quickstart", object_info)
    with graph.group("1  Picture and models"):
        picture = graph.add("LoadImage", image="example.png")
        graph.column()
        small = graph.add("ImageScaleToMaxDimension", image=picture["IMAGE"], largest_size=64)

What a node has, in which order, and what a widget may hold is read off a running server's /object_info. So a description that
names an input that is not there, or a choice that is none, fails here and not on somebody's canvas.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from host_server import DYNAMIC_COMBO, FRONTEND_ONLY, WIDGET_TYPES, widgets_of

NOTES = Path(__file__).resolve().parent / "template_notes"
PACK, PACK_VERSION = "hywu", "0.1.0"
HOST, HOST_VERSION = "comfy-core", "0.30.0"
MUTED = 2  # a node's mode: it does not run
WIDTH, GAP, ROW, TITLE, MARGIN = 300, 60, 26, 34, 30  # pixels of the canvas
TALL = {"STRING": 110}  # widgets of several lines
CARD = 150  # room for what our nodes say below themselves
PICTURE_HEIGHT = 320  # below the widgets of nodes that show pictures
SHOWS_PICTURES = {"LoadImage", "SaveImage", "PreviewImage", "LossGraphNode"}
OPTIONAL_SHAPE = 7  # how the frontend marks sockets that may stay empty
COLOURS = ("#3f789e", "#8a6d3b", "#3b7a57", "#7a4f8a")
AUTOGROW = "COMFY_AUTOGROW_V3"


class Socket(NamedTuple):
    """An output of a node."""

    node: Node
    slot: int


class Node:
    """A node of a graph; `node["IMAGE"]` is its output of that name."""

    def __init__(self, id: int, kind: str, info: dict | None, title: str | None):
        self.id, self.kind, self.info, self.title = id, kind, info, title
        self.position, self.size, self.mode = [0, 0], [WIDTH, 0], 0
        self.inputs: list[dict] = []
        self.outputs: list[dict] = []
        self.widgets: list[Any] = []
        self.models: list[dict] = []

    def __getitem__(self, output: str) -> Socket:
        names = self.info["output_name"]
        if output not in names:
            raise KeyError(f"{self.kind} has no output {output!r}, but {', '.join(names)}")
        return Socket(self, names.index(output))

    @property
    def right(self) -> int:
        """Where it ends, in pixels of the canvas."""
        return self.position[0] + self.size[0]

    @property
    def bottom(self) -> int:
        return self.position[1] + self.size[1]


class Graph:
    """A workflow that is being described. Notes come first, on the left; see the module.

    Args:
        name: of the file, and of the workflow's fixed id.
        object_info: the server's answer of that name.
    """

    def __init__(self, name: str, object_info: dict):
        self.name, self._known = name, object_info
        self._nodes: list[Node] = []
        self._links: list[list] = []
        self._groups: list[dict] = []
        self._left, self._top, self._muted = 0, 0, False
        self._column: list[Node] = []

    def notes(self, height: int = 420) -> None:
        """What an artist reads first, in both languages: from template_notes/."""
        for language, title in (("en", "About this workflow"), ("zh", "关于此工作流")):
            node = Node(len(self._nodes) + 1, "MarkdownNote", None, title)
            text = (NOTES / f"{self.name}.{language}.md").read_text(encoding="utf-8")
            node.widgets, node.size = [text.strip()], [440, height]
            self._place(node)
        self.column()

    @contextmanager
    def group(self, title: str, muted: bool = False) -> Iterator[None]:
        """A frame around what is added inside. What is muted does not run until the artist says so."""
        first, left, self._muted = len(self._nodes), self._left, muted
        self._left, self._top, self._column = left + MARGIN, 2 * TITLE + MARGIN, []
        yield
        self.column()
        inside = self._nodes[first:]
        right, bottom = max(node.right for node in inside), max(node.bottom for node in inside)
        colour = COLOURS[len(self._groups) % len(COLOURS)]
        bounding = [left, 0, right - left + MARGIN, bottom + MARGIN]
        self._groups.append(
            {
                "id": len(self._groups) + 1,
                "title": title,
                "bounding": bounding,
                "color": colour,
                "font_size": 24,
                "flags": {},
            }
        )
        self._left, self._top, self._muted = right + MARGIN + GAP, 0, False

    def column(self) -> None:
        """What is added from here on stands to the right of what was added before."""
        if self._column:
            self._left, self._column = max(node.right for node in self._column) + GAP, []
        self._top = 2 * TITLE + MARGIN

    def add(
        self, kind: str, title: str | None = None, wide: int = WIDTH, models: tuple[dict, ...] = (), **values: Any
    ) -> Node:
        """A node below the last one.

        Args:
            wide: its width on the canvas.
            models: files that it names: name, url, directory.
            values: its inputs: an output of another node, or a widget's value; dots of their names as two underscores.
        Raises:
            KeyError: for an input or output that is not there.
            ValueError: for a socket that must be wired and is not, or a value that the widget does not take.
        """
        node = Node(len(self._nodes) + 1, kind, self._known[kind], title)
        node.mode, node.models, node.size[0] = MUTED if self._muted else 0, list(models), wide
        values = {name.replace("__", "."): value for name, value in values.items()}
        self._sockets(node, values)
        self._widgets(node, values)
        if values:
            raise KeyError(f"{kind} has no input {', '.join(values)}")
        names, kinds = node.info["output_name"], node.info["output"]
        node.outputs = [{"name": name, "type": type_, "links": None} for name, type_ in zip(names, kinds, strict=True)]
        node.size[1] = self._height(node)
        self._place(node)
        return node

    def saved(self) -> dict:
        """The workflow as the frontend saves it."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hywu/workflows/{self.name}")),
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": [self._saved_node(node, order) for order, node in enumerate(self._nodes)],
            "links": self._links,
            "groups": self._groups,
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [40, 80]}},
            "version": 0.4,
        }

    def _place(self, node: Node) -> None:
        node.position = [self._left, self._top + (TITLE if not self._column else 0)]
        self._top = node.bottom + GAP + (CARD if node.kind.startswith("HYWU") else 0)
        self._column.append(node)
        self._nodes.append(node)

    def _sockets(self, node: Node, values: dict[str, Any]) -> None:
        for section in ("required", "optional"):
            for name, (kind, *_) in node.info["input"].get(section, {}).items():
                if kind == AUTOGROW:
                    self._autogrow(node, name, values, section)
                elif not (isinstance(kind, list) or kind in WIDGET_TYPES or kind == DYNAMIC_COMBO):
                    self._socket(node, name, kind, values, section)

    def _autogrow(self, node: Node, name: str, values: dict[str, Any], section: str) -> None:
        """One socket for each that is wired, and the empty one that the frontend would add."""
        template = node.info["input"][section][name][1]["template"]
        (kind, *_) = next(iter(next(iter(template["input"].values())).values()))
        prefix = template["prefix"]
        wired = [key for key in values if key.startswith(f"{name}.{prefix}")]
        for place in range(max(len(wired) + 1, template["min"])):
            needed = "required" if place < template["min"] else "optional"
            self._socket(node, f"{name}.{prefix}{place}", kind, values, needed)

    def _socket(self, node: Node, name: str, kind: str, values: dict[str, Any], section: str) -> None:
        slot: dict[str, Any] = {"name": name, "type": kind, "link": None}
        source = values.pop(name, None)
        if source is not None:
            slot["link"] = self._link(source, node, kind)
        elif section == "required" and not kind.startswith("COMFY_") and kind != "IMAGEUPLOAD":
            raise ValueError(f"{node.kind} needs {name}")
        if section == "optional":
            slot["shape"] = OPTIONAL_SHAPE
        node.inputs.append(slot)

    def _widgets(self, node: Node, values: dict[str, Any]) -> None:
        chosen: dict[str, Any] = {}
        for name, kind, options in widgets_of(node.info["input"], chosen):
            value = values.pop(name, _default(kind, options))
            slot: dict[str, Any] = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": None}
            if isinstance(value, Socket):
                slot["link"] = self._link(value, node, slot["type"])
                value = _default(kind, options)
            else:
                _check(node, name, kind, options, value)
            chosen[name] = value
            node.inputs.append(slot | {"widget": {"name": name}})
            node.widgets.append(value)
            if options.get("control_after_generate"):
                node.widgets.append("fixed")
            if options.get("image_upload"):
                node.inputs.append(
                    {"name": "upload", "type": "IMAGEUPLOAD", "link": None, "widget": {"name": "upload"}}
                )
                node.widgets.append("image")

    def _link(self, source: Socket, node: Node, wanted: str) -> int:
        given = source.node.info["output"][source.slot]
        if not (wanted.startswith("COMFY_") or given.startswith("COMFY_") or given in wanted.split(",")):
            raise ValueError(f"{source.node.kind} gives {given}, {node.kind} takes {wanted}")
        number = len(self._links) + 1
        self._links.append([number, source.node.id, source.slot, node.id, len(node.inputs), given])
        output = source.node.outputs[source.slot]
        output["links"] = [*(output["links"] or []), number]
        return number

    @staticmethod
    def _height(node: Node) -> int:
        """Generous: the two renderers of the frontend differ, and a node must not cover the next one."""
        widgets = [slot for slot in node.inputs if "widget" in slot]
        sockets = max(len(node.inputs) - len(widgets), len(node.outputs))
        several = [options for _, kind, options in widgets_of(node.info["input"], {}) if options.get("multiline")]
        height = TITLE + ROW * sockets + (ROW + 4) * (len(widgets) - len(several)) + TALL["STRING"] * len(several)
        return height + (PICTURE_HEIGHT if node.kind in SHOWS_PICTURES else 0)

    @staticmethod
    def _saved_node(node: Node, order: int) -> dict:
        properties: dict[str, Any] = {"Node name for S&R": node.kind}
        ours = node.kind.startswith("HYWU")
        properties |= {"cnr_id": PACK if ours else HOST, "ver": PACK_VERSION if ours else HOST_VERSION}
        if node.models:
            properties["models"] = node.models
        saved = {
            "id": node.id,
            "type": node.kind,
            "pos": node.position,
            "size": node.size,
            "flags": {},
            "order": order,
            "mode": node.mode,
            "inputs": node.inputs,
            "outputs": node.outputs,
            "properties": properties,
            "widgets_values": node.widgets,
        }
        if node.title:
            saved["title"] = node.title
        if node.kind in FRONTEND_ONLY:
            saved |= {"color": "#432", "bgcolor": "#653"}
        return saved


def _default(kind: Any, options: dict) -> Any:
    choices = kind if isinstance(kind, list) else options.get("options")
    if kind == DYNAMIC_COMBO:
        return options["options"][0]["key"]
    if choices is not None:
        return options.get("default", next(iter(choices), ""))
    return options.get("default", {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, ""))


def _check(node: Node, name: str, kind: Any, options: dict, value: Any) -> None:
    """Files are another machine's; every other choice and number must be one that the node takes."""
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if kind == DYNAMIC_COMBO:
        choices = [option["key"] for option in options["options"]]
    if choices is not None:
        if value not in choices and not (
            isinstance(value, str) and ("." in value or value.endswith("/") or node.models)
        ):
            raise ValueError(f"{node.kind}: {name} is {value!r}, none of {choices}")
    elif kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        raise ValueError(f"{node.kind}: {name} is {value}, not from {options.get('min')} to {options.get('max')}")
