"""The door of the pack. ComfyUI imports this folder as a package; test runners and linters may import it as a file."""

WEB_DIRECTORY = "./web"

if __package__:  # empty when pytest collects this file: the host's modules are not there, and nothing here is needed
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
