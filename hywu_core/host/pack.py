"""The folder that the pack itself lies in, as the host and its frontend see it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

NAME = Path(__file__).parents[2].name  # of the link, where it is one: that is what the host goes by


def is_served(name: str) -> bool:
    """Whether help pages, templates and scripts of a pack in a folder of this name reach the browser.

    The host puts the name into the addresses as it is, where the browser asks for it quoted; the frontend reads the name off
    the name of the module, up to a dot or an @. These are the characters that neither changes.
    """
    return re.fullmatch(r"[A-Za-z0-9_~!$&'()*+,;=-]+", name) is not None


def warn_if_not_served(name: str = NAME) -> None:
    """Say once, at the start, what does not work in such a folder and what to do."""
    if not is_served(name):
        logging.warning(
            "HY-WU: ComfyUI cannot show the help pages, templates and node cards of a pack in a folder named %r; the nodes "
            "themselves work. Rename the folder to hywu and restart.",
            name,
        )
