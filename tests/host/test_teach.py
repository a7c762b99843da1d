"""A memory that grows: one new edit taught while old ones are kept, LoRA files learned from, a larger generator copied."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from families import flux

from hywu_core import Generator, HywuError, MatchError, knowledge
from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.config import GeneratorConfig
from hywu_core.errors import ConfigError
from hywu_core.files.lora_files import load_lora, save_lora
from hywu_core.host import conditions, memory
from hywu_core.host.lora.matching import match
from hywu_core.host.training import in_server, lessons, lora_lessons, teach
from hywu_core.host.training.pair_lists import PairError
from hywu_core.lineage import INSTRUCTIONS
from hywu_core.lineage import instructions as as_kept
from hywu_core.lora import truncate
from hywu_core.training import SessionOptions, TrainingError
from hywu_core.training.weight_space import likeness
from study.methods import generator_config

OLD = ("make it darker", "warmer tones", "blur the picture")
NEW = "more contrast"


@pytest.fixture(autouse=True)
def output(output, monkeypatch):
    """Its LoRAs, too."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(output / "loras")], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    return output


@pytest.fixture(scope="module")
def studio():
    return teach.Studio(*load_pocket_editor())


def handle(seed=0, texts=OLD, width=32, rank=4, strength=0.05, **hywu):
    """A small generator for the pocket editor that writes something else for everything it reads."""
    config = generator_config(
        rank=rank, width=width, blocks=1, **({"instructions": list(texts)} if texts else {}), **hywu
    )
    made = memory.new(config, seed)
    with torch.no_grad():
        weight = made.generator.model.proj_out_B.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * strength)
    return memory.from_state(config, made.generator.state_dict(), f"generator {seed}")


def new_edit(count=4, side=16, wordings=(NEW,)):
    source = torch.Generator().manual_seed(5)
    before = [torch.rand(1, side, side, 3, generator=source) for _ in range(count)]
    return teach.NewEdit(before, [(0.5 + 2 * (picture - 0.5)).clamp(0, 1) for picture in before], wordings)


def settings(steps=6, **changes):
    return teach.with_steps(teach.TEACH, **{"steps": steps, "batch": 2, "memory_batch": 3, **changes})


def taught(studio, given, name="run", new=None, old=(), pictures=(), config=None, **options):
    options = SessionOptions(validate_every=0, **options)
    return in_server.teach_on_server(
        studio, given, new or new_edit(), old, pictures, config or settings(), options, name, teach.AS_TRAINED
    )


def same(one, other):
    states = [value.generator.state_dict() for value in (one, other)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def interrupted_after(steps, work):
    """Press Cancel after some steps."""
    show = in_server.ServerFront.show

    def pressing(self, progress):
        if progress.done == steps:
            comfy.model_management.interrupt_current_processing()
        show(self, progress)

    in_server.ServerFront.show = pressing
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            work()
    finally:
        in_server.ServerFront.show = show
        comfy.model_management.interrupt_current_processing(False)


def test_taught_saved_loaded_and_used(studio, output):
    given = handle()
    first = {name: tensor.clone() for name, tensor in given.generator.state_dict().items()}
    found = taught(studio, given, new=new_edit(wordings=(NEW, "make it punchy")))
    assert all(torch.equal(tensor, first[name]) for name, tensor in given.generator.state_dict().items())
    lines = found.report.splitlines()
    assert lines[0].startswith("new edit") and lines[1].startswith(NEW)
    assert {line.split("\t")[0] for line in lines[4:]} == set(OLD)
    assert (output / "output" / "hywu" / "run" / "report.txt").read_text(encoding="utf-8") == found.report
    path = memory.save(found.handle, "taught")
    again = memory.load(path)
    assert again.config.hywu["instructions"] == [*OLD, NEW, "make it punchy"]
    (step,) = again.config.hywu["lineage"]
    assert step["kind"] == "taught" and step["from"] == given.fingerprint and step["named"][0] == NEW
    assert step["steps"] == 6 and len(step["begun"]) == 10
    more = taught(studio, again, "more", new_edit(wordings=("add a vignette",)))
    assert [step["kind"] for step in more.handle.config.hywu["lineage"]] == ["taught", "taught"]
    words = conditions.from_host(
        [[studio.clip.encode_from_tokens(studio.clip.tokenize(NEW)),
          {"reference_latents": [studio.picture(new_edit().before[0]).latent]}]]
    )  # fmt: skip
    assert memory.generate(again, words).batch == 1


def test_a_card_shows_what_changed_most_and_the_report_all(studio):
    found = taught(studio, handle(texts=[f"make it {word}" for word in "abcdefghij"]), old=())
    report, shown = found.report.splitlines(), str(found.card).splitlines()
    assert len(report) == 14 and "and 5 that changed less: see report.txt" in str(found.card)
    assert set(report[:9]) <= set(shown) and not set(report[9:]) & set(shown)


def test_as_many_old_instructions_as_the_measured_default_go_with_a_batch():
    usual = teach.with_steps(teach.TEACH)
    assert usual == teach.TEACH and usual.memory_batch == usual.prediction_batch == usual.batch
    assert teach.with_steps(teach.TEACH, batch=4, steps=50).memory_batch == 4
    assert teach.with_steps(teach.TEACH, batch=4, memory_batch=3).memory_batch == 3


def test_progress_shows_old_and_new_side_by_side(studio, output, monkeypatch):
    said = []
    monkeypatch.setattr(in_server.ServerFront, "show", lambda self, progress: said.append(str(progress)))
    taught(studio, handle())
    assert all("loss" in line and "memory: distance" in line for line in said) and len(said) == 6
    with open(output / "output" / "hywu" / "run" / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["memory"]) < 1e-6 < float(rows[-1]["memory"]), "it begins as the teacher, and leaves it"


def test_memory_keeps_what_plain_training_loses(studio):
    """The report's distance of old edits, after the same steps with a strong memory and next to none."""

    def distance(weight, name):
        config = settings(40, memory=weight, prediction=0.0, learning_rate=3e-3, memory_batch=6)
        report = taught(studio, handle(), name, config=config).report
        return [float(line.split("\t")[1]) for line in report.splitlines()[4:]]

    with_memory, without = distance(3.0, "with"), distance(1e-9, "without")
    assert max(with_memory) < 0.5 * min(without), (with_memory, without)


def test_predictions_are_held_where_they_were(studio, output):
    """How far the base's predictions with old LoRAs have moved, after the same steps with a strong hold and next to none."""

    def moved(weight, name):
        config = settings(40, memory=1e-9, prediction=weight, learning_rate=3e-3, prediction_batch=6)
        taught(studio, handle(), name, config=config)
        with open(output / "output" / "hywu" / name / "log.csv", newline="", encoding="utf-8") as file:
            return [float(row["prediction"]) for row in csv.DictReader(file)]

    held, free = moved(20.0, "held"), moved(1e-9, "free")
    assert held[0] == free[0] == 0, "it begins as the teacher"
    assert sum(held[-10:]) < 0.5 * sum(free[-10:]), (held, free)


def test_without_predictions_nothing_of_them_is_made(studio, output):
    pairs = teach.prepare_teaching(studio, handle(), new_edit(), config=settings(prediction=0.0))[0]
    assert pairs.recall is None and "prediction" not in settings(prediction=0.0).identity()
    taught(studio, handle(), config=settings(2, prediction=0.0))
    assert (
        (output / "output" / "hywu" / "run" / "log.csv").read_text().startswith("step,loss,rate,gradient_norm,memory\n")
    )


def test_one_run_or_two_with_a_pause_teach_the_same(studio):
    whole = taught(studio, handle(), "whole")
    interrupted_after(3, lambda: taught(studio, handle(), "paused"))
    again = taught(studio, handle(), "paused")
    assert same(whole.handle, again.handle) and again.steps == 6
    assert whole.report == again.report
    assert whole.losses["loss"] == pytest.approx(again.losses["loss"], rel=1e-5)


def test_a_run_is_extended_or_taken_as_it_is(studio):
    """Its warm-up follows from its steps, which may change."""
    interrupted_after(3, lambda: taught(studio, handle(), config=settings(20)))
    assert taught(studio, handle(), config=settings(3)).steps == 3
    longer = taught(studio, handle(), config=settings(30))
    assert longer.steps == 30 and len(longer.losses["loss"]) == 30


def test_other_old_instructions_under_one_name_are_refused(studio):
    taught(studio, handle())
    with pytest.raises(TrainingError, match="old_instructions"):
        taught(studio, handle(), old=OLD[:2])


def test_what_is_given_comes_before_what_the_file_names(studio):
    pictures = [torch.rand(1, 24, 16, 3), torch.rand(1, 16, 16, 3)]
    report = taught(studio, handle(), old=("less light please", " ", "less light please"), pictures=pictures).report
    assert [line.split("\t")[0] for line in report.splitlines()[4:]] == ["less light please"]


def unlike(new):
    return new._replace(after=[picture[:, 1:] for picture in new.after])


REFUSED = {  # {name: (how to call, error, words of it)}
    "no old instructions": (lambda s: taught(s, handle(texts=())), lessons.LessonError, "names none"),
    "the new one is old": (
        lambda s: taught(s, handle(), new=new_edit(wordings=("Warmer tones",))),
        lessons.LessonError,
        "'Warmer tones' is among the old instructions",
    ),
    "no instruction": (lambda s: taught(s, handle(), new=new_edit(wordings=(" ",))), PairError, "has no instruction"),
    "one pair": (lambda s: taught(s, handle(), new=new_edit(1)), PairError, "one pair of the new edit"),
    "sizes": (lambda s: taught(s, handle(), new=unlike(new_edit())), PairError, "Pair 1 is 16 x 16 before and 16 x 15"),
    "counts": (
        lambda s: taught(s, handle(), new=new_edit()._replace(after=new_edit().after[1:])),
        PairError,
        "4 pictures before the edit but 3 after",
    ),
    "nothing edited": (
        lambda s: taught(s, handle(), new=new_edit()._replace(after=new_edit().before)),
        PairError,
        "nothing is edited",
    ),
    "no memory": (lambda s: taught(s, handle(), config=settings(memory=0.0)), lessons.LessonError, "would be forgotten"),
    "another base": (
        lambda s: taught(s._replace(model=flux(channels=16).model), handle()),
        MatchError,
        r"another base \(pocket editor\); load the base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_clear_error_and_nothing_is_made(studio, output, name):
    work, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        work(studio)
    assert not (output / "output" / "hywu").exists() or not list((output / "output" / "hywu").rglob("*"))


def test_the_lists_of_a_file_are_bounded_and_checked():
    assert as_kept(["a ", "", "a", "b"]) == ("a", "b")
    many = as_kept(f"edit {number}" for number in range(1000))
    assert len(many) == INSTRUCTIONS and many[0] == "edit 0" and len(set(many)) == INSTRUCTIONS
    values = generator_config().to_dict()
    for name, value in {
        "instructions": ("text", ["a"] * 257, ["a" * 1001], [""], [3]),
        "lineage": ({}, [{}] * 3, ["a"], [{"kind": "taught"}] * 65, [{"kind": 3}],
                    [{"kind": "taught", "of": {"nested": 1}}], [{"kind": "x", "named": ["y" * 3000]}]),
    }.items():  # fmt: skip
        for wrong in value:
            with pytest.raises(ConfigError, match=f"hywu.{name}"):
                GeneratorConfig.from_dict(values | {"hywu": values["hywu"] | {name: wrong}})


# LoRA files


def files(folder, studio, count=3, rank=None):
    """LoRAs as files, one for each old instruction, written by some generator; and the generator."""
    folder.mkdir(parents=True, exist_ok=True)
    author = handle(seed=7)
    picture = studio.picture(new_edit().before[0])
    asked = lessons.ask(OLD[:count], [picture], studio.encoding(), author.config)
    for number, text in enumerate(OLD[:count]):
        lora = author.generator.generate(asked[number].condition.unsqueeze(0))
        lora = truncate(lora, rank) if rank and number == 0 else lora
        save_lora(lora.with_metadata(instruction=text), folder / f"{number}.safetensors")
    return folder


def learned(studio, given, name="run", steps=6, config=None, pictures=None, **changes):
    config = config or teach.with_steps(teach.LEARN, **{"steps": steps, "batch": 2, "loras_batch": 3, **changes})
    pictures = new_edit(2).before if pictures is None else pictures
    options = SessionOptions(validate_every=0)
    return in_server.learn_on_server(studio, given, ".", pictures, config, options, name)


def test_a_generator_learns_from_files_of_several_ranks(studio, output):
    files(output / "loras", studio, rank=2)
    found = learned(studio, handle(texts=(), strength=0.0), steps=150, learning_rate=3e-3)
    lines = [line.split("\t") for line in found.report.splitlines()[1:]]
    assert {line[0] for line in lines} == set(OLD)
    assert all(float(line[1]) < 0.3 and float(line[2]) > 0.8 for line in lines), found.report
    losses = found.losses["loss"]
    assert losses[0] == pytest.approx(1.0, abs=1e-4) and losses[-1] < 0.3
    assert found.handle.config.hywu["instructions"] == list(OLD)
    assert found.handle.config.hywu["lineage"][-1]["kind"] == "learned from LoRAs"


def test_what_the_base_reads_stays_known_after_learning_from_files(studio, output):
    files(output / "loras", studio)
    before = handle(strength=0.0, training={"regime": "blind"})
    assert knowledge.reads(before.config.hywu) == "blind"
    assert knowledge.reads(learned(studio, before).handle.config.hywu) == "blind"


def test_learning_from_files_goes_on_bit_for_bit(studio, output):
    files(output / "loras", studio)
    whole = learned(studio, handle(seed=1), "whole")
    interrupted_after(2, lambda: learned(studio, handle(seed=1), "paused"))
    again = learned(studio, handle(seed=1), "paused")
    assert same(whole.handle, again.handle)
    (output / "loras" / "2.safetensors").unlink()
    with pytest.raises(TrainingError, match="loras_learned"):
        learned(studio, handle(seed=1), "paused")


def test_a_file_is_brought_onto_the_weights_of_a_generator(studio, output):
    """Through the base: what a file changes is what is wanted, also where rows are fused, cut, or left alone."""
    folder = files(output / "loras", studio)
    config, base = handle().config, studio.model.model
    whole = load_lora(folder / "0.safetensors")
    aligned = lora_lessons.aligned(whole, base, config, "0")
    assert likeness(aligned, whole).distance < 1e-9
    width = whole.factors["double_blocks.0.img_attn.qkv"].down.shape[-1]
    mapping = {
        f"img_attn.qkv[{width}:{2 * width}/{3 * width}]": {"lora_A_dim": width, "lora_B_dim": width},
        "txt_attn.proj": {"lora_A_dim": width, "lora_B_dim": width},
    }
    part = lora_lessons.aligned(whole, base, dataclasses.replace(config, pg_mapping=mapping), "0")
    for layer in range(config.num_base_model_layers):
        module = f"double_blocks.{layer}."
        full, cut = whole.factors[module + "img_attn.qkv"], part.factors[f"{module}{next(iter(mapping))}"]
        dense = whole.scale * full.up @ full.down
        torch.testing.assert_close(part.scale * cut.up @ cut.down, dense[:, width : 2 * width])
        assert not part.factors[module + "txt_attn.proj"].up.any()
    assert len(match(whole, base).matched) == len(whole.names)


def test_instructions_come_from_a_list_a_text_file_or_the_metadata(studio, output):
    folder = files(output / "loras", studio)
    (folder / "1.txt").write_text("golden light\n\nwarm it up\n", encoding="utf-8")
    found = {c.path.name: c.instructions for c in lora_lessons.collect(folder, studio.model.model, handle().config)}
    assert found == {
        "0.safetensors": (OLD[0],), "1.safetensors": ("golden light", "warm it up"), "2.safetensors": (OLD[2],)
    }  # fmt: skip
    rows = [{"file": "0.safetensors", "instruction": "dark, please"}, {"file": "0", "instruction": "night"}]
    (folder / "loras.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (first, *_) = lora_lessons.collect(folder, studio.model.model, handle().config)
    assert first.instructions == ("dark, please", "night")
    (folder / "loras.jsonl").unlink()
    (folder / "loras.csv").write_text('file,instruction\n0,"dark, please"\n', encoding="utf-8")
    (first, *_) = lora_lessons.collect(folder, studio.model.model, handle().config)
    assert first.instructions == ("dark, please",)


def write(folder, name, data):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def spoil(folder, change):
    lora = load_lora(folder / "1.safetensors")
    save_lora(lora.map(change), folder / "1.safetensors")


def of_another_base(folder):
    lora = load_lora(folder / "1.safetensors")
    renamed = {name.replace("double_blocks", "layers"): pair for name, pair in lora.factors.items()}
    save_lora(type(lora)(renamed, lora.scale, {"instruction": "x"}), folder / "1.safetensors")


BAD_FILES = {  # {name: (what to do to the folder, words of the error)}
    "no instruction": (lambda f: save_lora(load_lora(f / "1.safetensors").with_metadata(instruction=""),
                                           f / "1.safetensors"), "1.safetensors: it has no instruction"),
    "not a LoRA": (lambda f: write(f, "3.safetensors", b"x" * 40) or write(f, "3.txt", "x"), "3.safetensors"),
    "another base": (of_another_base, "None of the LoRA's"),
    "other shapes": (lambda f: spoil(f, lambda p: type(p)(p.down[..., :8], p.up)), "changes a weight of shape"),
    "NaN": (lambda f: spoil(f, lambda p: type(p)(p.down * float("nan"), p.up)), "NaN"),
    "nothing": (lambda f: spoil(f, lambda p: type(p)(p.down, p.up * 0)), "changes nothing"),
    "list names what is not there": (lambda f: write(f, "loras.jsonl", '{"file": "9", "instruction": "x"}'), "no 9 beside"),
    "list is no JSON": (lambda f: write(f, "loras.jsonl", "[" * 100000), "line 1: not valid JSON"),
    "list lacks a column": (lambda f: write(f, "loras.csv", "name,text\n0,x\n"), "expected file and instruction"),
    "two lists": (lambda f: [write(f, name, "") for name in lora_lessons.LISTS], "Keep the one"),
    "text is not UTF-8": (lambda f: write(f, "0.txt", b"\xff\xfe\xfa"), "is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_clear_error(studio, output, name):
    folder = files(output / "loras", studio)
    change, words = BAD_FILES[name]
    change(folder)
    with pytest.raises(HywuError, match=words):
        learned(studio, handle())
    assert not (output / "output").exists()


def test_folders_that_are_not_there_and_pictures_that_are_missing(studio, output):
    with pytest.raises(lessons.LessonError, match="no folder"):
        learned(studio, handle())
    files(output / "loras", studio)
    assert in_server.lora_folders() == ["."]
    with pytest.raises(lessons.LessonError, match="reads a picture"):
        learned(studio, handle(), pictures=())
    with pytest.raises(lessons.LessonError, match="without a VAE"):
        learned(studio._replace(vae=None), handle())


# another generator as the teacher


def test_a_generator_of_another_size_and_rank_teaches(studio):
    large, small = handle(seed=3, width=64, rank=8), handle(seed=4, texts=())
    asked = lessons.ask(OLD, [studio.picture(p) for p in new_edit(2).before], studio.encoding(), small.config)
    found = lessons.remembering(large, small.config, asked, settings(), "float32")
    before = lessons.kept(asked, found.lesson.teacher, found.lesson.teacher)
    assert max(abs(value.distance) for value in before) < 1e-5
    assert min(abs(value.cosine) for value in before) > 1 - 1e-5
    pupil = Generator(small.config).requires_grad_(False)
    pupil.load_state_dict(small.generator.state_dict())
    other = lessons.kept(asked, lessons.GeneratorTrainable(pupil), found.lesson.teacher)
    assert min(value.distance for value in other) > 0.1


def test_a_generator_for_other_weights_does_not_teach(studio):
    given = handle()
    mapping = {name: dims for name, dims in given.config.pg_mapping.items() if "mlp" not in name}
    other = memory.new(dataclasses.replace(given.config, pg_mapping=mapping), 0)
    with pytest.raises(MatchError, match="other weights"):
        lessons.check_teacher(other, given.config)
    part = [{"kind": "conditioning", "width": given.config.input_dim}]
    reads = memory.new(dataclasses.replace(given.config, hywu={"condition": part}), 0)
    with pytest.raises(MatchError, match="same condition_source"):
        lessons.check_teacher(reads, given.config)


# the same beside ordinary training


def trained(studio, given, name="trained", remember=None, **changes):
    pictures = [studio.picture(pixels).latent for pixels in new_edit(3).before]
    words = lessons.encode_text(studio.clip, NEW)
    positive = [[[words[0], words[1] | {"reference_latents": [latent]}]] for latent in pictures]
    return in_server.train_on_lists(
        studio.model,
        given,
        [{"samples": latent * 0.5} for latent in pictures],
        positive,
        None,
        settings(3, **changes),
        SessionOptions(validate_every=0),
        name,
        instructions=(NEW,),
        remember=remember,
    )


def test_training_remembers_where_memory_has_a_weight(studio, output):
    found = trained(studio, handle(), remember=in_server.Remember(studio.clip), memory=1.0, memory_schedule="falling")
    assert found.handle.config.hywu["instructions"] == [*OLD, NEW]
    with open(output / "output" / "hywu" / "trained" / "log.csv", newline="", encoding="utf-8") as file:
        assert [float(row["memory"]) >= 0 for row in csv.DictReader(file)] == [True] * 3
    plain = trained(studio, handle(), "plain", memory=0.0)
    assert plain.handle.config.hywu["instructions"] == [*OLD, NEW] and not same(found.handle, plain.handle)


def test_training_drops_nothing_that_memory_needs_in_silence(studio):
    with pytest.raises(lessons.LessonError, match="Wire clip"):
        trained(studio, handle(), memory=1.0)
    with pytest.raises(lessons.LessonError, match="no effect with a memory of 0"):
        trained(studio, handle(), remember=in_server.Remember(studio.clip), memory=0.0)


def test_folders_of_one_name_in_two_roots_are_both_there(studio, output, monkeypatch):
    roots = [str(output / "models" / "loras"), str(output / "output" / "loras")]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", (roots, {".safetensors"}))
    for root in roots:
        files(Path(root), studio)
    folder_paths.filename_list_cache.pop("loras", None)
    assert in_server.lora_folders() == [".", "output/loras"]
    assert [str(in_server.lora_folder(name)) for name in (".", "output/loras")] == roots


def test_an_older_file_put_into_a_folder_and_one_taken_out_are_noticed(studio, output):
    files(output / "loras", studio)
    found = [in_server.fingerprint(".")]
    old = output / "loras" / "older.safetensors"
    old.write_bytes((output / "loras" / "2.safetensors").read_bytes())
    os.utime(old, (1000, 1000))
    found.append(in_server.fingerprint("."))
    (output / "loras" / "2.safetensors").unlink()
    found.append(in_server.fingerprint("."))
    assert len(set(found)) == 3
