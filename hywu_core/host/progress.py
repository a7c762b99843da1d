"""The host's progress bar and cancel button for long work of the core."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils


def bar() -> Callable[[int, int], None]:
    """What to call with (done, total) after every part of the work; it raises once the artist cancels."""
    shown: list[comfy.utils.ProgressBar] = []

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not shown:
            shown.append(comfy.utils.ProgressBar(total))
        shown[0].update_absolute(done, total)

    return progress
