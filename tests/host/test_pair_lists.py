"""Lists and layouts of training pairs: what real files hold, what spoils them, and what is kept of what is encoded."""

import json

import families  # noqa: F401  the host comes first
import pytest
import torch
from PIL import Image

from hywu_core.bases import pocket
from hywu_core.host import memory
from hywu_core.host.training import base_files, buckets, pairs_of_folder
from hywu_core.host.training.pair_lists import PairError, rows_of
from hywu_core.host.training.pairs_of_folder import EncodedPairs, Encoders, Reading, fingerprint, hold_out, read_pairs


def picture(path, level=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level % 256, 90, 30)).save(path)


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(("a", "b")):
        picture(tmp_path / f"{name}.png", index)
        picture(tmp_path / f"{name}2.png", 100 + index)
    return tmp_path


def read(folder, name, text, encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return [(row.source.name, row.target.name, row.instruction) for row in read_pairs(folder)]


def lines(*objects):
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in objects)


PLAIN = [("a.png", "a2.png", "make it warm"), ("b.png", "b2.png", "cool")]
COMMAS = [("a.png", "a2.png", "warm, and cold"), ("b.png", "b2.png", 'say "no"\nnow')]
HEAD = "source,target,instruction\n"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("pairs.csv", HEAD + "a.png,a2.png,make it warm\nb.png,b2.png,cool\n", PLAIN),
        ("pairs.csv", HEAD + 'a.png,a2.png,"warm, and cold"\nb.png,b2.png,"say ""no""\nnow"', COMMAS),
        ("pairs.csv", "Source;TARGET; Instruction\r\na.png;a2.png;make it warm\r\nb.png;b2.png;cool\r\n", PLAIN),
        ("pairs.csv", "source\ttarget\tinstruction\na.png\ta2.png\tmake it warm\nb.png\tb2.png\tcool", PLAIN),
        ("pairs.csv", "\ufeff" + HEAD + "a.png,a2.png,make it warm\n,,\n\nb.png,b2.png,cool\n", PLAIN),
        ("pairs.csv", "instruction,target,source,note\nmake it warm,a2.png,a.png,\ncool,b2.png,b.png,x", PLAIN),
        ("metadata.csv", "file_name,control_path,text\na2.png,a.png,make it warm\nb2.png,b.png,cool", PLAIN),
        ("metadata.csv", "image,prompt,edit_image\na2.png,make it warm,a.png\nb2.png,cool,b.png", PLAIN),
        (
            "metadata.jsonl",
            lines(
                {"source_file_name": "a.png", "target_file_name": "a2.png", "edit_prompt": "make it warm"},
                {"input_image": "b.png", "edited_image": "b2.png", "edit_prompt": "cool", "original_prompt": "x"},
            ),
            PLAIN,
        ),
        (
            "pairs.jsonl",
            lines(
                {"image_path": "a2.png", "control_path": "a.png", "caption": "make it warm"},
                {"source": "b.png", "target": "b2.png", "instruction": "cool", "prompt": "another", "image": "c"},
            ),
            PLAIN,
        ),
        (
            "pairs.jsonl",
            lines(
                {"source": "a.png", "target": "a2.png", "instruction": "one\u2028two\x85three\u2029"},
                {"source": "b.png", "target": ".\\b2.png", "instruction": "cool"},
            ).replace("\n", "\r\n\r\n"),
            [("a.png", "a2.png", "one\u2028two\x85three\u2029"), PLAIN[1]],
        ),
    ],
)
def test_lists_as_people_have_them(folder, name, text, expected):
    assert read(folder, name, text) == expected


def test_a_list_of_a_spreadsheet_in_unicode(folder):
    assert read(folder, "pairs.csv", HEAD + "a.png,a2.png,make it warm\nb.png,b2.png,cool\n", "utf-16") == PLAIN


GOOD = {"source": "a.png", "target": "a2.png", "instruction": "warm"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "pairs.csv",
            HEAD + "a.png,a2.png,warm, and cold\n",
            r"line 2: 4 values, but the heading names 3.*double quotes",
        ),
        ("pairs.csv", HEAD + 'a.png,a2.png,"one\ntwo"\na.png,a2.png\n', "line 4: 2 values"),
        ("pairs.csv", HEAD + 'a.png,a2.png,"never closed\nb.png,b2.png,cool\n', "line 2: unexpected end of data"),
        ("pairs.csv", HEAD + "a.png,a2.png," + "x" * 140_000 + "\n", "line 2: field larger than field limit"),
        ("pairs.csv", "from,to\na.png,a2.png\n", "line 1: the heading names 'from', 'to'. It must name source, target"),
        ("pairs.csv", "", "line 1: the heading names nothing"),
        ("pairs.csv", "source,target,instruction,Target\na.png,a2.png,warm,b2.png\n", "names 'target' twice"),
        ("pairs.csv", "source,target,instruction\na.png,a2.png,w\xe4rmer\n", "cannot be read as UTF-8"),
        ("pairs.jsonl", "[" * 60_000, "line 1: nested too deeply"),
        ("pairs.jsonl", '{"a":' * 60_000, "line 1: nested too deeply"),
        ("pairs.jsonl", lines(GOOD | {"target": "x" * 300}), "line 1: .*is no name of a file"),
        ("pairs.jsonl", lines(GOOD | {"target": "a\0.png"}), "line 1: .*does not exist"),
        ("pairs.jsonl", lines(GOOD | {"source": 3}), "line 1: source is missing or empty"),
        ("pairs.jsonl", lines([GOOD]), "line 1: source is missing or empty"),
        ("pairs.jsonl", lines(GOOD | {"instruction": " "}), "line 1: instruction is missing or empty"),
        (
            "pairs.jsonl",
            lines({"image": "a", "edited_image": "b", "source": "a.png", "text": "c"}),
            "image and edited_image",
        ),
    ],
)
def test_every_bad_line_is_named_with_what_to_do(folder, name, text, said):
    with pytest.raises(PairError, match=said):
        read(folder, name, text, "latin-1" if "\xe4" in text else "utf-8")


def test_all_bad_pairs_are_named_at_once(folder):
    Image.new("RGB", (16, 16)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:40])
    picture(folder / "wide.png", size=(20, 16))
    bad = [{"source": "cut.png"}, {"target": "gone.png"}, {"target": "wide.png"}, {"instruction": ""}, GOOD]
    with pytest.raises(PairError) as told:
        read(folder, "pairs.jsonl", "{\n" + lines(GOOD, *(GOOD | spoiled for spoiled in bad)))
    text = str(told.value)
    assert text.startswith("5 pairs cannot be used:")
    for part in ("line 1: not valid JSON", "line 3: ", "cut.png cannot be read", "line 4: ", "gone.png does not exist",
                 "line 5: a.png has 16 x 16 pixels, but wide.png has 20 x 16", "line 6: instruction is missing"):  # fmt: skip
        assert part in text
    many = [GOOD | {"target": f"{index}.png"} for index in range(30)]
    with pytest.raises(PairError, match=r"30 pairs cannot be used:(.|\n)*and 20 more"):
        read(folder, "pairs.jsonl", lines(*many))


def test_two_lists_are_one_too_many(folder):
    (folder / "pairs.csv").write_text(HEAD)
    with pytest.raises(PairError, match="holds pairs.jsonl and pairs.csv"):
        read(folder, "pairs.jsonl", lines(GOOD))


@pytest.fixture
def layout(tmp_path):
    for index, name in enumerate(("b", "a", "c")):
        picture(tmp_path / "control" / f"{name}.png", index)
        picture(tmp_path / "target" / f"{name}.jpg", 50 + index)
        (tmp_path / "target" / f"{name}.txt").write_text(f"edit {name}\n")
    return tmp_path


def test_folders_of_controls_and_targets_go_by_name(layout):
    rows = [(r.source.name, r.target.name, r.instruction) for r in read_pairs(layout)]
    assert rows == [(f"{name}.png", f"{name}.jpg", f"edit {name}") for name in "abc"]


def spoil_step(folder):
    (folder / "control" / "b.png").rename(folder / "control" / "b2.png")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            spoil_step,
            r"(?s)target/b.jpg: there is no picture b.* in .*control.*b2.png: there is no picture b2.* in .*target",
        ),
        (lambda f: (f / "target" / "a.txt").unlink(), "target/a.jpg: there is no text for it. Put .* into .*a.txt"),
        (lambda f: (f / "target" / "a.txt").write_text(" "), "a.jpg: there is no text for it"),
        (lambda f: (f / "control" / "a.txt").write_text("other"), "a.jpg: its text files say different things"),
        (lambda f: (f / "target" / "a.txt").write_bytes(b"\xe4"), "a.txt cannot be read as UTF-8"),
        (lambda f: picture(f / "control" / "a.webp"), "a.webp: a.png has the same name"),
        (lambda f: (f / "source").mkdir(), "which of the folders source, control, target are meant is not clear"),
        (lambda f: (f / "target").rename(f / "other"), "has neither pairs.jsonl nor pairs.csv. Put pictures there"),
    ],
)
def test_folders_out_of_step_are_named(layout, spoil, said):
    spoil(layout)
    with pytest.raises(PairError, match=said):
        read_pairs(layout)


def test_parquet_is_said_not_to_be_read(tmp_path):
    (tmp_path / "train.parquet").touch()
    with pytest.raises(PairError, match="only parquet files, which are not read"):
        rows_of(tmp_path)


def test_pairs_are_known_by_their_content(folder):
    rows = lines(GOOD, {"source": "b.png", "target": "b2.png", "instruction": "cool"})
    read(folder, "pairs.jsonl", rows)
    before = fingerprint(read_pairs(folder))
    stat = (folder / "a.png").stat()
    (folder / "a.png").touch()
    assert fingerprint(read_pairs(folder)) == before
    picture(folder / "a.png", 7)
    assert (folder / "a.png").stat().st_size == stat.st_size
    assert fingerprint(read_pairs(folder)) != before


def test_one_picture_in_two_files_is_held_out_as_one(folder):
    (folder / "again.png").write_bytes((folder / "a.png").read_bytes())
    read(folder, "pairs.jsonl", lines(GOOD, GOOD | {"source": "again.png"}, GOOD | {"source": "b.png"}))
    for share in (0.3, 0.5):
        train, held_out = hold_out(read_pairs(folder), share)
        assert not {pair.source_digest for pair in train} & {pair.source_digest for pair in held_out}
        assert len(train) + len(held_out) == 3 and held_out


class Counted:
    """The pocket editor's text encoder, counting."""

    def __init__(self, clip):
        self.clip, self.texts = clip, []

    def tokenize(self, text, **options):
        self.texts.append(text)
        return self.clip.tokenize(text, **options)

    def encode_from_tokens(self, *arguments, **options):
        return self.clip.encode_from_tokens(*arguments, **options)


@pytest.fixture
def encoders():
    _, clip, vae = pocket.load_pocket_editor()
    return Encoders(Counted(clip), vae)


def encoded(folder, encoders, reading=None):
    pairs = EncodedPairs(read_pairs(folder), folder / "kept", "base", reading or Reading())
    pairs.encode(pairs.missing(), encoders, lambda done, total: None)
    assert not pairs.missing()
    return pairs


def test_texts_and_pictures_are_encoded_once(folder, encoders):
    same = [GOOD, GOOD | {"target": "b2.png"}, GOOD | {"source": "b.png", "instruction": "cool"}]
    read(folder, "pairs.jsonl", lines(*same))
    pairs = encoded(folder, encoders, Reading(regime="blind"))
    assert sorted(encoders.clip.texts) == ["", "cool", "warm"]
    kinds = [path.name.split("-")[0] for path in (folder / "kept").iterdir()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"source": 2, "target": 2, "text": 3}
    tensors, options = pairs._kept(2)
    picture = torch.tensor([1, 90, 30]) / 255
    torch.testing.assert_close(tensors["source"][0, :, 0, 0] / 2 + 0.5, picture, atol=4e-3, rtol=0)
    assert set(options) == {"text", "silence"} and "text.cond" in tensors


def test_another_picture_under_the_same_name_is_encoded_anew(folder, encoders):
    read(folder, "pairs.jsonl", lines(GOOD, {"source": "b.png", "target": "b2.png", "instruction": "cool"}))
    before = encoded(folder, encoders)._kept(0)[0]["source"]
    picture(folder / "a.png", 200)
    assert not torch.equal(encoded(folder, encoders)._kept(0)[0]["source"], before)


def test_pictures_that_the_vae_makes_nothing_of_are_named_before_anything_is_encoded(folder, encoders):
    read(folder, "pairs.jsonl", lines(GOOD, {"source": "b.png", "target": "b2.png", "instruction": "cool"}))
    for name in ("b.png", "b2.png"):
        picture(folder / name, size=(1, 1))
    with pytest.raises(PairError, match="line 2: a picture is only 1 pixels wide or high"):
        encoded(folder, encoders)
    assert not (folder / "kept").exists()


def test_transparency_is_said_and_its_colour_tells_runs_apart(folder, caplog):
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(folder / "a.png")
    read(folder, "pairs.jsonl", lines(GOOD, {"source": "b.png", "target": "b2.png", "instruction": "cool"}))
    assert "1 pictures with transparency are laid over white (background)" in caplog.text
    white, black = (
        EncodedPairs(read_pairs(folder), folder, "base", Reading(background=name)) for name in ("white", "black")
    )
    assert white._latents(white.pairs[0]) != black._latents(black.pairs[0])
    assert white._texts(white.pairs[0]) == black._texts(black.pairs[0])


def test_a_base_is_known_by_its_bytes(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    data = torch.arange(5_000_000, dtype=torch.int32)
    first.write_bytes(data.numpy().tobytes())
    second.write_bytes(data.numpy().tobytes())
    assert base_files.fingerprint([first]) == base_files.fingerprint([second])
    data[3_000_000:3_040_000] += 1
    second.write_bytes(data.numpy().tobytes())
    assert base_files.fingerprint([first]) != base_files.fingerprint([second])
    assert pairs_of_folder.PairError is PairError


@pytest.mark.parametrize("size", [16, 64, 100, 512, 1024])
def test_shapes_of_a_size_hold_at_most_its_pixels_and_little_less(size):
    found = buckets.shapes(size)
    step = min(64, size // 8)
    assert len(set(found)) == len(found) >= 5
    for width, height in found:
        assert width % step == height % step == 0 and width * height <= size * size
        assert max(width, height) <= 2 * min(width, height)
        assert width * (height + step) > size * size
    assert buckets.nearest(size, 30, 30)[0] == buckets.nearest(size, 30, 30)[1]
    for width, height in found:
        assert buckets.nearest(size, 3 * width, 3 * height) == (width, height)
    widest = buckets.nearest(size, 900, 100)
    assert widest == max(found, key=lambda shape: shape[0] / shape[1])


def test_pictures_of_several_shapes_keep_them_in_buckets(folder, encoders):
    for name, size in (("a", (60, 40)), ("b", (20, 40))):
        picture(folder / f"{name}.png", size=size)
        picture(folder / f"{name}2.png", size=size)
    read(folder, "pairs.jsonl", lines(GOOD, {"source": "b.png", "target": "b2.png", "instruction": "cool"}))
    reading = Reading(size=32, buckets=True)
    pairs = EncodedPairs(read_pairs(folder, 32), folder / "kept", "base", reading)
    pairs.encode(pairs.missing(), encoders, lambda done, total: None)
    sides = []
    for index, (width, height) in enumerate(pairs.sizes()):
        tensors, _ = pairs._kept(index)
        assert tensors["source"].shape == tensors["target"].shape == (1, 3, height, width)
        sides.append(width / height)
    assert sides[0] > 1 > sides[1]
    square = EncodedPairs(pairs.pairs, folder / "kept", "base", Reading(size=32))
    assert square.sizes() == [(32, 32)] * 2 and square.missing() == [0, 1], "squares are other files"


def test_a_size_that_makes_an_empty_latent_is_named(folder, encoders):
    read(folder, "pairs.jsonl", lines(GOOD, {"source": "b.png", "target": "b2.png", "instruction": "cool"}))
    pairs = EncodedPairs(read_pairs(folder, 1), folder / "kept", "base", Reading(size=1))
    with pytest.raises(PairError, match="size 1 brings pictures to 1 pixels, .*empty latent. Give a larger size"):
        pairs.encode([0], encoders, lambda done, total: None)
    assert not (folder / "kept").exists()


def test_wordings_are_drawn_and_captions_dropped_for_the_base_alone(folder, encoders):
    several = GOOD | {"instruction": ["warm", "warmer please", "warm"]}
    read(folder, "pairs.jsonl", lines(several, {"source": "b.png", "target": "b2.png", "instruction": "cool"}))
    pairs = encoded(folder, encoders, Reading(caption_dropout=0.4))
    assert sorted(encoders.clip.texts) == ["", "cool", "warm", "warmer please"]
    assert pairs.pairs[0].wordings == ("warm", "warmer please")
    handle = memory.new_for(pocket.load_pocket_editor()[0], [_entry(pairs, 0, "text")], "instruction", seed=0)
    pairs.config = handle.config
    drawn = [pairs.sample(0, torch.Generator().manual_seed(seed)) for seed in range(200)]
    parts = ("text", "text1", "silence")
    words = {part: _entry(pairs, 0, part)[0] for part in parts}
    bases = [next(part for part in parts if torch.equal(words[part], s.conditioning[0])) for s in drawn]
    assert 0.3 < bases.count("silence") / len(bases) < 0.5
    conditions = [str(sample.condition.sum().item()) for sample in drawn]
    assert len(set(conditions)) == 2, "the generator reads each wording, and never silence"
    assert 70 < conditions.count(conditions[0]) < 130
    for base, condition in zip(bases, conditions, strict=True):
        if base != "silence":
            same = [c for b, c in zip(bases, conditions, strict=True) if b == base]
            assert set(same) == {condition}, "base and generator are told in the same words"
    again = pairs.sample(0, torch.Generator().manual_seed(7))
    assert torch.equal(again.condition, drawn[7].condition)


def _entry(pairs, index, part):
    return pairs_of_folder._entry(*pairs._kept(index), part, pairs.reading)
