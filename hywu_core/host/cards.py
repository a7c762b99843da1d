"""Cards: what a node found or is doing, drawn on that node by web/cards.js, in classic nodes and in Nodes 2.0.

A node that is done gives its card with its ui outputs, so that the frontend gets it again with a cached result; one that is
at work sends it. The same words go along as `text`, for who has no such extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import server
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..messages import Message, as_json

KEY = "hywu_card"  # among the ui outputs
EVENT = "hywu.card"  # of the websocket
GOOD, NOTICE, WARNING = "good", "notice", "warning"  # how web/cards.js colours a card's edge
BARS, CURVE = "bars", "curve"
SHOWN = 400  # values of a chart at most; of more, means of neighbours


class Chart(NamedTuple):
    """Numbers that are drawn small."""

    kind: str  # BARS or CURVE
    title: str
    values: tuple[float, ...]


class Card(NamedTuple):
    """What is drawn: a title, rows of a name and a value, sentences, charts, one picture.

    Titles and names are the pack's own words. A value that is not, such as a path, is shown as it is in every language; one
    that is has to be a message.
    """

    title: str
    rows: tuple[tuple[str, str], ...] = ()
    notes: tuple[Message, ...] = ()
    level: str = GOOD
    charts: tuple[Chart, ...] = ()
    picture: dict[str, str] | None = None  # {"filename", "subfolder", "type"}, as the host's /view takes it

    def __str__(self) -> str:
        return "\n".join((self.title, *(f"{name}: {value}" for name, value in self.rows), *self.notes))

    def as_json(self) -> dict[str, Any]:
        return {
            "title": _own(self.title),
            "rows": [[_own(name), as_json(value)] for name, value in self.rows],
            "notes": [as_json(note) for note in self.notes],
            "level": self.level,
            "charts": [
                {"kind": chart.kind, "title": _own(chart.title), "values": _fewer(chart.values)}
                for chart in self.charts
            ],
            "picture": self.picture,
        }


def outputs(card: Card, image: Tensor | None = None, cls: Any = None) -> dict[str, Any]:
    """A node's ui outputs.

    Args:
        image: an IMAGE that the frontend shows on the node. cls: the node's class, for the picture's metadata.
    """
    pictures = {} if image is None else ui.PreviewImage(image, cls=cls).as_dict()
    return {"text": (str(card),), KEY: (card.as_json(),), **pictures}


def of_this_node() -> Callable[[Card], None] | None:
    """What shows a card on the node that is running, also after it ran; None where there is no server or no node."""
    prompt_server, context = getattr(server.PromptServer, "instance", None), get_executing_context()
    if prompt_server is None or context is None:
        return None
    return lambda card: prompt_server.send_sync(EVENT, {"node": context.node_id, "card": card.as_json()})


def _own(text: str) -> dict[str, Any]:
    return (text if isinstance(text, Message) else Message(text)).as_json()


def _fewer(values: tuple[float, ...]) -> list[float]:
    # JSON, as browsers read it, has no word for what is not finite
    values = tuple(value if math.isfinite(value) else 0.0 for value in values)
    share = -(-len(values) // SHOWN) or 1
    parts = [values[start : start + share] for start in range(0, len(values), share)]
    return [float(f"{sum(part) / len(part):.4g}") for part in parts]
