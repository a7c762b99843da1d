"""Teach a generator one new edit from a folder of pairs, or from a folder of LoRA files, and keep what it knows.

    python scripts/teach.py --pocket --generator models/hywu/mine.safetensors --pairs my-edit --output out/taught
    python scripts/teach.py --pocket --generator new.safetensors --loras my-loras

--pairs: as for scripts/train.py (source, target, instruction); all of one edit, in several words. The same command goes on
with a run that was stopped. The generator is written into the output folder, with a report of what was kept.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from in_host import enter_host
from stopping import STOPPED, Signals

from hywu_core.errors import HywuError


def arguments_of(given: list[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pairs", type=Path, help="folder of pairs of the new edit")
    what.add_argument("--loras", type=Path, help="folder of LoRA files with their instructions")
    parser.add_argument("--generator", type=Path, required=True, help="what is to learn more; it stays as it is")
    parser.add_argument("--output", type=Path, default=Path("out/teach"), help="folder of the run")
    parser.add_argument(
        "--old-instructions", type=Path, help="text file, one on each line; by default the generator's own"
    )
    parser.add_argument("--pictures", type=Path, help="folder of any pictures to ask instructions about")
    parser.add_argument("--steps", type=int, help="of the optimizer in all")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--memory", type=float, help="how strongly the LoRAs of old edits are held (--pairs)")
    parser.add_argument("--prediction", type=float, help="how strongly what the base predicts with them is (--pairs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", type=int, default=0, help="side to which pictures are cut and resized; 0: as they are"
    )
    parser.add_argument("--regime", choices=("told", "blind"), help="whether the base reads the instruction (--pairs)")
    parser.add_argument("--text-sees-source", action="store_true")
    parser.add_argument("--if-exists", choices=("resume", "restart", "refuse"), default="resume")
    parser.add_argument("--pocket", action="store_true", help="the base is the pocket editor")
    for name in ("model", "checkpoint", "vae", "clip-vision"):
        parser.add_argument(f"--{name}", default="", help="file of the base, as for scripts/train.py")
    parser.add_argument("--text-encoders", nargs="+", default=[])
    parser.add_argument("--clip-type", default="flux")
    parser.add_argument("--cpu", action="store_true", help="keep to the CPU")
    found = parser.parse_args(given)
    held = (found.memory, found.prediction, found.regime, found.old_instructions)
    if found.loras and any(value is not None for value in held):
        parser.error("--memory, --prediction, --regime and --old-instructions have no effect with --loras")
    return found


def work(given: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """The command, inside the host."""
    from hywu_core.bases import pocket
    from hywu_core.host import memory, pictures
    from hywu_core.host.training import base_files, teach
    from hywu_core.host.training.in_script import ScriptFront
    from hywu_core.host.training.pairs_of_folder import read_pairs
    from hywu_core.training import SessionOptions
    from hywu_core.training.options import RunConfig

    def shown(files) -> list:
        return [pictures.read(file, given.size) for file in files]

    if given.pocket:
        model, clip, vae = pocket.load_pocket_editor()
        vision = None
    else:
        names = {"model", "checkpoint", "vae", "clip_vision", "clip_type"}
        run = RunConfig(**{name: getattr(given, name) for name in names}, text_encoders=tuple(given.text_encoders))
        base_files.check_files(run)
        model, (clip, vae, vision) = base_files.load_model(run), base_files.load_encoders(run)
    studio = teach.Studio(model, clip, vae, vision, given.text_sees_source)
    handle = memory.load(given.generator)
    names = ("steps", "learning_rate", "batch", "memory", "prediction")
    asked = {name: getattr(given, name) for name in names}
    changes = {name: value for name, value in asked.items() if value is not None} | {"seed": given.seed}
    config = teach.with_steps(teach.TEACH if given.pairs else teach.LEARN, **changes)
    options = SessionOptions(if_exists=given.if_exists, validate_every=0)
    about = shown(teach.picture_files(given.pictures)) if given.pictures else []
    if given.pairs:
        pairs = read_pairs(given.pairs, given.size)
        wordings = [text for pair in pairs for text in pair.wordings]
        new = teach.NewEdit(shown(p.source for p in pairs), shown(p.target for p in pairs), wordings)
        old = teach.read_lines(given.old_instructions) if given.old_instructions else ()
        regime = given.regime or teach.AS_TRAINED
        task, _ = teach.prepare_teaching(studio, handle, new, old, about, config, options, regime)
    else:
        task = teach.prepare_learning(studio, handle, given.loras, about, config)
    front = ScriptFront(given.output, stop, lambda text: print(text, flush=True))
    found = teach.do(task, config, options, given.output, front, given.output.name)
    print(f"{found.report}\nsaved {front.generator_file(None)}", flush=True)


def main() -> None:
    """Errors that a user can cause are one line."""
    given = arguments_of(None)
    enter_host(cpu=given.cpu)
    logging.getLogger().setLevel(logging.WARNING)
    from hywu_core.host.training.session import StoppedError

    try:
        work(given, Signals().asked)
    except StoppedError as stopped:
        print(stopped)
        sys.exit(STOPPED)
    except HywuError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
