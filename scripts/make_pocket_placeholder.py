"""Write the pocket editor's files with seeded random weights, until trained ones replace them through the same files.

    .venv/bin/python scripts/make_pocket_placeholder.py [--seed N] [--host DIR]

The editor then samples noise: it shows that every node works, not that it edits.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def enter_host(host: Path) -> None:
    """Make `import comfy` work, on the CPU."""
    sys.path.insert(0, str(host))
    argv, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = argv


def write_editor(seed: int) -> None:
    """The base model and its text encoder."""
    from hywu_core.bases import pocket
    from hywu_core.bases.pocket import editor, text

    files, provenance = pocket.pocket_files(), {"weights": f"random, seed {seed}"}
    config, text_config = pocket.EditorConfig(), pocket.TextConfig(words=pocket.default_words())
    pocket.save_editor(editor.initial_state(config, seed), config, files.editor, provenance)
    pocket.save_text_encoder(text.initial_state(text_config, seed), text_config, files.text, provenance)
    print(*files, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", type=Path, default=ROOT / ".host" / "ComfyUI", help="ComfyUI's folder")
    arguments = parser.parse_args()
    enter_host(arguments.host)
    write_editor(arguments.seed)
