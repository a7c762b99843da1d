"""The pocket editor's pictures, edits, tasks and report, and that what ships really edits."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hywu_core import load_generator
from hywu_core.bases import pocket
from hywu_core.condition import patches
from hywu_core.lora import cosine
from study import edits, evaluation, figures, methods, pictures, report
from study.task import Case, EditingTask, from_latent, to_latent

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clip():
    return pocket.load_pocket_editor()[1]


def task(clip, regime="told", suite="all", count=48):
    found, names = pictures.compose("test", 32)
    return EditingTask(clip, found[:count], names[:count], edits.SUITES[suite], methods.generator_config(), regime)


def test_splits_share_no_kind_and_no_photograph():
    kinds = {}
    for split in pictures.SPLITS:
        names = pictures.split_names(split)
        assert len(names) == len(set(names)) >= 64
        kinds[split] = {name.rpartition("-")[0] if name.startswith("photo/") else name.split("/")[0] for name in names}
    assert not kinds["train"] & kinds["test"] and not kinds["train"] & kinds["validation"]
    assert not kinds["validation"] & kinds["test"]


def test_pictures_are_composed_the_same_from_the_same_seed():
    first, names = pictures.compose("validation", 32, seed=1)
    assert first.shape == (len(names), 3, 32, 32) and 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, pictures.compose("validation", 32, seed=1)[0])
    assert not torch.equal(first, pictures.compose("validation", 32, seed=2)[0])


def test_a_folder_of_pictures(tmp_path):
    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (20, 50), 128).save(tmp_path / "a.jpg")
    found, names = pictures.read_folder(tmp_path, 16)
    assert names == ["a.jpg", "b.png"] and found.shape == (2, 3, 16, 16)
    assert found[1].flatten(1).mean(1).tolist() == [1, 0, 0]
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(pictures.PictureError, match="c.png cannot be read"):
        pictures.read_folder(tmp_path, 16)
    with pytest.raises(pictures.PictureError, match="holds no pictures"):
        pictures.read_folder(tmp_path / "nowhere", 16)


def test_edits_do_what_they_say():
    grey = torch.full((1, 3, 8, 8), 0.5)
    by_name = {edit.name: edit for edit in edits.SUITES["all"]}
    assert by_name["brighten"](grey).mean() == pytest.approx(0.725)
    assert by_name["darken"](grey).mean() == pytest.approx(0.275)
    assert by_name["warm"](grey)[0, :, 0, 0].tolist() == pytest.approx([0.7, 0.5, 0.3])
    found = pictures.compose("validation", 32)[0]
    for edit in by_name.values():
        changed = edit(found)
        assert changed.shape == found.shape and 0 <= changed.min() and changed.max() <= 1, edit.name
        assert (changed - found).abs().mean() > 0.005, edit.name
    back = by_name["hue-back"](by_name["hue-forth"](found))
    torch.testing.assert_close(back, found)


@pytest.mark.parametrize("name", ["even", "neutral", "warm-bright", "invert-dark"])
def test_the_instance_suite_depends_on_the_picture(name):
    edit = next(edit for edit in edits.INSTANCE if edit.name == name)
    found = pictures.compose("test", 32)[0]
    changes = (edit(found) - found).mean((2, 3))
    assert float(changes.std(0).max()) > 0.02


def test_every_edit_has_its_own_words_and_its_opposite_beside_it(clip):
    for suite in edits.SUITES.values():
        words = [wording for edit in suite for wording in edit.wordings]
        assert len(words) == len(set(words))
        for index in range(len(suite)):
            assert edits.opposite(suite, edits.opposite(suite, index)) == index != edits.opposite(suite, index)
    vocabulary = set(clip.tokenizer.pocket.tokenizer.words)
    for edit in edits.SUITES["all"]:
        assert {word for wording in edit.wordings for word in wording.split()} <= vocabulary, edit.name


def test_in_the_blind_regime_only_the_generator_reads_the_instruction(clip):
    one, other = Case(0, 0), Case(0, 1)
    blind, told = task(clip, "blind"), task(clip, "told")
    assert torch.equal(blind.conditioning([one])[0][0], blind.conditioning([other])[0][0])
    assert not torch.equal(told.conditioning([one])[0][0], told.conditioning([other])[0][0])
    assert torch.equal(blind.condition([one]), told.condition([one]))
    assert not torch.equal(blind.condition([one]), blind.condition([other]))
    assert not torch.equal(blind.condition([one]), blind.condition([Case(1, 0)]))


def test_a_pair_is_what_the_edit_makes_of_the_picture(clip):
    told = task(clip)
    pair = told.pair(Case(3, 1, 2))
    assert pair.key.endswith("darken")
    torch.testing.assert_close(from_latent(pair.latent), 0.55 * told.pictures[3])
    torch.testing.assert_close(pair.conditioning[1]["reference_latents"][0], to_latent(told.pictures[3:4]))
    assert len({(c.picture, c.edit) for c in told.balanced_cases(48)}) == 48


@pytest.mark.parametrize("count", [8, 12])
def test_no_case_comes_twice_however_few_pictures_there_are(clip, count):
    few = EditingTask(clip, torch.rand(count, 3, 8, 8), [str(i) for i in range(count)], edits.SUITES["eight"])
    for asked in (8, 40, 64, 500):
        cases = few.balanced_cases(asked)
        assert len(set(cases)) == len(cases) == min(asked, count * 8)
        asked_of = [case.edit for case in cases]
        assert {asked_of.count(edit) for edit in range(8)} == {len(cases) // 8}


def test_patches_are_rows_of_the_picture():
    latent = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    found = patches(latent, 2)
    assert found.shape == (1, 6, 8)
    assert found[0, 1].view(2, 2, 2).equal(latent[0, :, :2, 2:4])
    assert patches(latent, 4).shape == (1, 2, 32)  # padded to whole patches
    assert torch.equal(patches(latent.unsqueeze(2), 2), found)


@pytest.mark.parametrize(("regime", "suite", "suffix"), [("blind", "eight", ""), ("told", "all", "-told")])
def test_what_ships_edits_held_out_pictures(clip, regime, suite, suffix):
    model = pocket.load_pocket_editor()[0]
    generator = load_generator(ROOT / "models" / f"pocket-generator{suffix}.safetensors")
    measured = task(clip, regime, suite)
    cases = measured.balanced_cases(48)
    shuffled = dict(zip(cases, evaluation.control_cases(measured, cases)["shuffled"], strict=True))

    def mean_psnr(lora_of):
        return float(evaluation.score(model, measured, cases, lora_of).mean())

    matched = mean_psnr(lambda part: evaluation.write(generator, measured, part))
    assert matched > mean_psnr(lambda part: None) + 4
    assert matched > mean_psnr(lambda part: evaluation.write(generator, measured, [shuffled[c] for c in part])) + 5


def test_the_averaged_control_is_the_mean_of_the_products(clip):
    generator = load_generator(ROOT / "models" / "pocket-generator.safetensors")
    measured = task(clip, suite="eight")
    cases = measured.balanced_cases(8)
    mean = evaluation.averaged(generator, measured, cases, per_edit=1)
    loras = evaluation.write(generator, measured, cases)
    name = mean.names[0]
    dense = torch.stack([loras.scale * p.up[0] @ p.down[0] for p in (loras.select(i).factors[name] for i in range(8))])
    pair = mean.factors[name]
    torch.testing.assert_close(mean.scale * pair.up[0] @ pair.down[0], dense.mean(0), rtol=1e-4, atol=1e-5)
    assert float(cosine(mean, mean)) == pytest.approx(1)


def setting(matched, shared, base=15.0, cases=40):
    noise = torch.randn(3, cases, generator=torch.Generator().manual_seed(0))

    def runs(mean, **more):
        return [{"psnr": {"matched": (row + mean).tolist()}, **more} for row in noise]

    generated = runs(matched, geometry={"centred": {"purity": 1.0}})
    for run in generated:
        for control, loss in {"words": 0.5, "other_image": 1, "averaged": 8, "shuffled": 10, "opposite": 12}.items():
            run["psnr"][control] = [value - loss for value in run["psnr"]["matched"]]
    return {
        "base": [float(base)] * cases,
        "methods": {"generator": generated, "shared": runs(shared, opposite_gradient_cosine=[-0.5, -0.3])},
    }


def test_the_report_says_who_wins_and_which_gates_hold():
    results = {"blind-eight": setting(24, 15), "told-eight": setting(24, 23.5), "told-sixteen": setting(20, 24)}
    assert all(gate.holds for gate in report.gates(results))
    verdicts = {name: report.findings(value)[0].verdict for name, value in results.items()}
    assert verdicts == {"blind-eight": "wins", "told-eight": "ties", "told-sixteen": "loses"}
    assert "24.0" in report.markdown(results) and "loses" in report.summary(results)
    results["blind-eight"] = setting(18, 15, base=15)
    failed = [gate.claim for gate in report.gates(results) if not gate.holds]
    assert failed == ["R1, 8 edits: matched - base, dB"]


def test_the_kept_results_pass_their_gates():
    results = json.loads((ROOT / "results" / "pocket.json").read_text())
    assert results.keys() == report.SETTINGS.keys()
    for gate in report.gates(results):
        assert gate.holds, gate
    for value in results.values():
        assert len(value["base"]) >= 128
        compared = [runs for name, runs in value["methods"].items() if name not in report.VARIANTS]
        assert {len(runs) for runs in compared} == {3}


def test_figures_are_drawn():
    sheet = figures.contact_sheet([("warm\nit", torch.rand(3, 3, 16, 16))], ("a", "b", "c"), "title")
    assert sheet.width > 3 * figures.CELL and sheet.height > figures.CELL
    drawn = figures.lora_map(torch.randn(6, 2), [0, 0, 1, 1, 2, 2], ("x", "y", "z"), "map")
    assert len(drawn.getcolors(100_000)) > 4
