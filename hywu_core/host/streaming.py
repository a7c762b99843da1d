"""Text that appears on a node while it is being written, or because of what it found."""

from __future__ import annotations

from collections.abc import Callable

import server
from comfy_execution.utils import get_executing_context


def on_node(node_id: str | None) -> Callable[[str], None] | None:
    """A function that shows text below a node, or None where there is no server or no node."""
    prompt_server = getattr(server.PromptServer, "instance", None)
    if prompt_server is None or node_id is None:
        return None
    return lambda text: prompt_server.send_progress_text(text, node_id)


def say(text: str) -> None:
    """Show text below the node that is running. The frontend draws a node's `ui` text on its own preview nodes only."""
    context = get_executing_context()
    show = on_node(context.node_id if context else None)
    if show:
        show(text)
