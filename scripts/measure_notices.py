"""How often Generate would say that it does not know an instruction: for known ones, paraphrases, and foreign ones.

    .venv/bin/python scripts/measure_notices.py [--generator FILE] [--suite eight]

Takes the pocket editor's text encoder. Without a file, a part of the ways to ask for the study's edits stands for what a
generator was trained on, and the others are paraphrases that it never met. With the file of a generator, what that keeps is
asked instead. Nothing is generated: a notice depends on the condition and on what the file keeps.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

from in_host import enter_host

enter_host()
import torch  # noqa: E402

from hywu_core import knowledge, load_generator  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from study.edits import SUITES  # noqa: E402

COUNT, SEED = 200, 0
TRAINED_FRAMES = ("{}", "please {}", "{} please", "could you {}", "{} a little")
OTHER_FRAMES = ("{}, thanks", "now {}", "i want you to {}", "{} slightly", "just {}")
SYNONYMS = {
    "picture": "photo",
    "make it": "turn it",
    "colours": "tones",
    "more": "extra",
    "tint": "shade",
    "add": "give it",
}
VERBS = ("add", "remove", "draw", "rotate", "replace", "open", "paint", "erase", "lift", "turn it into", "cut out")
THINGS = ("a hat", "the dog", "a car", "her glasses", "the window", "two apples", "a castle", "his beard", "the moon")
MORE_THINGS = (
    "a red ball",
    "snow on the roof",
    "the text",
    "a bridge",
    "this person",
    "a birthday cake",
    "the background",
)
PLACES = ("", "in the middle")
LANGUAGES = ("", "ajoute un chapeau", "nimm den Hund weg", "añade un coche", "把天空变成蓝色", "加一顶帽子", "帽子をかぶせて",
             "добавь шляпу", "aggiungi un gatto", "voeg een boom toe", "qwertz", "12345")  # fmt: skip


def sentences(suite: str) -> dict[str, list[str]]:
    """COUNT known, paraphrased and foreign instructions each, or all that there are, and all that were trained on."""
    source = random.Random(SEED)
    wordings = [wording for edit in SUITES[suite] for wording in edit.wordings]
    trained = [frame.format(wording) for wording, frame in itertools.product(wordings, TRAINED_FRAMES)]
    other = [frame.format(_reworded(wording)) for wording, frame in itertools.product(wordings, OTHER_FRAMES)]
    foreign = [" ".join(words).strip() for words in itertools.product(VERBS, THINGS + MORE_THINGS, PLACES)]
    return {
        "trained": trained,
        "known": source.sample(trained, min(COUNT, len(trained))),
        "paraphrased": source.sample(other, min(COUNT, len(other))),
        "foreign": [*LANGUAGES, *source.sample(foreign, COUNT - len(LANGUAGES))],
    }


def _reworded(wording: str) -> str:
    for word, other in SYNONYMS.items():
        wording = wording.replace(word, other)
    return wording


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, help="a generator of the pocket editor whose file keeps what it met")
    parser.add_argument("--suite", choices=tuple(SUITES), default="all", help="the edits that are known")
    arguments = parser.parse_args()
    _, clip, _ = pocket.load_pocket_editor()

    def read(text: str) -> torch.Tensor:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]

    asked = sentences(arguments.suite)
    hywu = knowledge.gathered({}, [read(text)[0] for text in asked["trained"]])
    if arguments.generator:
        hywu = load_generator(arguments.generator).config.hywu
        asked["known"] = list(hywu.get("instructions", ()))[:COUNT]
    known = knowledge.points(hywu)
    if known is None:
        parser.error(f"{arguments.generator} does not say what it met; train it again with this version.")
    print(f"{len(known.values)} conditions kept, threshold {known.threshold:.3g}")
    for name in ("known", "paraphrased", "foreign"):
        alarms = [knowledge.unknown(hywu, read(text)) for text in asked[name]]
        print(f"{name:<12} {sum(alarms):>4} of {len(alarms)} noticed ({sum(alarms) / max(1, len(alarms)):.1%})")


if __name__ == "__main__":
    main()
