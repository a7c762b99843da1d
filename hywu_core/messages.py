"""What the pack says to an artist, so that it can be said in another language: a template, and the values in it.

locales/<language>/main.json translates the templates (hywuCards), and web/cards.js puts the values in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any


class Message(str):
    """A sentence or a few words, in English wherever a text is taken.

    Values are shown as they are, so a number comes formatted; those that are messages are translated as well.
    """

    template: str
    values: dict[str, Any]

    def __new__(cls, template: str, **values: Any) -> Message:
        made = super().__new__(cls, template.format(**values) if values else template)
        made.template, made.values = template, values
        return made

    def as_json(self) -> dict[str, Any]:
        return {"message": self.template, "values": {name: as_json(value) for name, value in self.values.items()}}


def as_json(text: Any) -> Any:
    """As web/cards.js takes it: a message to be translated, anything else as the text that it is."""
    return text.as_json() if isinstance(text, Message) else str(text)


def listed(texts: Sequence[str], template: str = "{first}, {second}") -> str:
    """Several texts as one, each translated by itself; nothing if there are none."""
    return reduce(lambda first, second: Message(template, first=first, second=second), texts) if texts else ""
