"""Text that appears below a node while it is being written."""

from __future__ import annotations

from collections.abc import Callable

import server


def on_node(node_id: str | None) -> Callable[[str], None] | None:
    """A function that shows text below a node, or None where there is no server or no node."""
    prompt_server = getattr(server.PromptServer, "instance", None)
    if prompt_server is None or node_id is None:
        return None
    return lambda text: prompt_server.send_progress_text(text, node_id)
