"""scripts/train.py on folders of pairs: what is wrong with one is one clear error."""

import csv

import pytest
from PIL import Image

from hywu_core.host.training.pairs_of_folder import PairError, read_pairs

pytest.importorskip("accelerate")
from train_script import WORDS, folder_of_pairs, run, write_list


def spoil_nothing(folder, lines):
    (folder / "pairs.jsonl").unlink()


def spoil_all_lines(folder, lines):
    write_list(folder, [])


def spoil_all_but_one(folder, lines):
    write_list(folder, lines[:1])


def spoil_picture(folder, lines):
    (folder / "2.png").write_bytes(b"not a picture")


def spoil_end_of_picture(folder, lines):
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])


def spoil_size(folder, lines):
    Image.new("RGB", (24, 16)).save(folder / "2_edited.png")


def spoil_file(folder, lines):
    (folder / "2_edited.png").unlink()


def spoil_line(folder, lines):
    (folder / "pairs.jsonl").write_text('{"source": "0.png"\n')


def spoil_column(folder, lines):
    del lines[1]["instruction"]
    write_list(folder, lines)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_nothing, "has neither pairs.jsonl nor pairs.csv"),
        (spoil_all_lines, "names no pairs"),
        (spoil_all_but_one, "names one pair"),
        (spoil_picture, "2.png cannot be read as a picture"),
        (spoil_end_of_picture, "2.png cannot be read as a picture"),
        (spoil_size, "line 3: 2.png has 16 x 16 pixels, but 2_edited.png has 24 x 16"),
        (spoil_file, "line 3: .*2_edited.png does not exist"),
        (spoil_line, "line 1: not valid JSON"),
        (spoil_column, "line 2: instruction is missing or empty"),
    ],
)
def test_bad_pairs_are_one_clear_error(tmp_path, spoil, said):
    lines = folder_of_pairs(tmp_path / "pairs")
    spoil(tmp_path / "pairs", lines)
    with pytest.raises(PairError, match=said):
        run(tmp_path)


def test_pairs_from_a_table_with_other_sizes(tmp_path):
    folder = tmp_path / "pairs"
    lines = folder_of_pairs(folder)
    (folder / "pairs.jsonl").unlink()
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    Image.new("RGB", (32, 32)).save(folder / "2_edited.png")
    with pytest.raises(PairError, match=r"pairs.csv, line 4.*\(size\)"):
        read_pairs(folder)
    assert [pair.instruction for pair in read_pairs(folder, size=16)] == list(WORDS)
