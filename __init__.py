"""The door of the pack. ComfyUI imports this folder as a package; test runners and linters may import it as a file."""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

if __package__ and find_spec("comfy_api"):  # inside the host; elsewhere there is nothing to open the door to
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
