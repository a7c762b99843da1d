"""Training outside the server: runs of scripts/train.py in one and in two processes, ended, resumed and extended."""

import csv
import os
import signal
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hywu_core import Generator, load_generator
from hywu_core.bases import pocket
from hywu_core.errors import HywuError
from hywu_core.host.training.in_script import GENERATOR
from hywu_core.host.training.pairs_of_folder import Encoders, PairError, hold_out, read_pairs
from hywu_core.host.training.session import FINISH, StoppedError
from hywu_core.training import TrainingError
from hywu_core.training.distributed import Accelerated
from hywu_core.training.log import LOG, STATE, VALIDATION

pytest.importorskip("accelerate")
from train_script import (
    finish,
    folder_of_pairs,
    options,
    run,
    start,
    start_two,
    wait_for_steps,
    weights,
    write_list,
)


def test_two_processes_equal_one_on_the_same_global_batch(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    values = options(tmp_path, batch=4)
    codes, said = finish(*start_two(values | {"output": str(tmp_path / "two")}, tmp_path))
    assert codes == [0, 0], said
    assert "2 processes" in said[0] and not said[1].count("saved")
    # in the parts that each process takes: sums in another order round elsewhere, and Adam makes much of it where a gradient
    # is small
    run(tmp_path, batch=4, micro_batch=2, output=str(tmp_path / "one"))
    run(tmp_path, batch=4, output=str(tmp_path / "undivided"))
    one, two, undivided = (weights(tmp_path / name) for name in ("one", "two", "undivided"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    untrained = Generator(load_generator(tmp_path / "one" / GENERATOR).config).initialize(0).state_dict()
    learned = sum(float((two[name] - untrained[name].float()).square().sum()) for name in two)
    assert learned > 0
    assert sum(float((two[name] - undivided[name]).square().sum()) for name in two) < 1e-6 * learned
    for name in (LOG, VALIDATION):
        rows = [list(csv.DictReader((tmp_path / run_name / name).open())) for run_name in ("one", "two")]
        assert len(rows[0]) == len(rows[1]) == (4 if name == LOG else 2)
        for row, other in zip(*rows, strict=True):
            assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)


def test_a_signal_to_one_of_two_processes_stops_both_and_the_run_goes_on_exactly(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    values = options(tmp_path, batch=4, steps=24, save_every=1000, validate_every=0)
    processes = start_two(values, tmp_path)
    wait_for_steps(tmp_path / "out", 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finish(*processes)
    assert codes == [130, 130], said
    assert "Stopped after step" in said[0] and "goes on" in said[0]
    assert (tmp_path / "out" / STATE).exists()
    left = load_generator(tmp_path / "out" / GENERATOR)
    assert 3 <= left.config.hywu["training"]["steps"] < 24
    codes, said = finish(*start_two(values, tmp_path))
    assert codes == [0, 0], said
    codes, said = finish(*start_two(values | {"output": str(tmp_path / "whole")}, tmp_path))
    assert codes == [0, 0], said
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, threads):
    """All runs with as many threads: a sum that is shared out among others is rounded in another place."""
    folder_of_pairs(tmp_path / "pairs")
    values = options(tmp_path, steps=24, ema=0.9, save_every=1000)
    process = start(values, tmp_path, threads=threads)
    wait_for_steps(tmp_path / "out", 3, process)
    process.send_signal(signal.SIGINT)
    codes, said = finish(process)
    assert codes == [130], said
    codes, said = finish(start(values, tmp_path, threads=threads))
    assert codes == [0] and "goes on after step" in said[0], said
    codes, said = finish(start(values | {"output": str(tmp_path / "whole")}, tmp_path, threads=threads))
    assert codes == [0], said
    for name in (LOG, VALIDATION):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_stopped_run_goes_on_in_the_same_process_too(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    with pytest.raises(StoppedError, match="after step 1"):
        run(tmp_path, stop=lambda: (tmp_path / "out" / LOG).exists())
    run(tmp_path)
    run(tmp_path, output=str(tmp_path / "whole"))
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_pictures_of_several_shapes_in_buckets_go_on_bit_for_bit(tmp_path):
    lines = folder_of_pairs(tmp_path / "pairs", count=6)
    for line, size in zip(lines, [(30, 20), (20, 30)] * 3, strict=True):
        for name in (line["source"], line["target"]):
            path = tmp_path / "pairs" / name
            Image.open(path).resize(size).save(path)
    write_list(tmp_path / "pairs", [line | {"instruction": [line["instruction"], "or so"]} for line in lines])
    given = {"buckets": True, "caption_dropout": 0.3, "steps": 6, "held_out_share": 0.3}
    whole = run(tmp_path, output=str(tmp_path / "whole"), **given)
    asked = iter((False, False, True))
    with pytest.raises(StoppedError):
        run(tmp_path, lambda: next(asked), **given)
    run(tmp_path, **given)
    one, other = weights(whole.parent), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = [load_file(file)["latent"].shape[-2:] for file in (tmp_path / "out" / "encoded").glob("target-*")]
    assert len(set(kept)) == 2
    for changes in ({"buckets": False}, {"caption_dropout": 0.0}):
        with pytest.raises(TrainingError, match="started with other (size|regime)"):
            run(tmp_path, **given | changes)


def test_the_saved_generator_says_how_it_was_trained(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    generator = load_generator(run(tmp_path, regime="blind", checkpoint_generator=True))
    trained = generator.config.hywu["training"]
    assert trained["steps"] == 4 and trained["regime"] == "blind" and trained["data"].startswith("4 pairs")
    again = load_generator(run(tmp_path, generator=str(tmp_path / "out" / GENERATOR), output=str(tmp_path / "more")))
    assert again.config.pg_mapping == generator.config.pg_mapping


def test_shipped_pictures_with_a_suite(tmp_path):
    generator = load_generator(
        run(
            tmp_path,
            pairs="",
            held_out="",
            suite="instance",
            size=16,
            variants=1,
            held_out_limit=4,
            checkpoint_stack="double_blocks",
        )
    )
    assert generator.config.hywu["training"]["data"] == "shipped pictures, suite instance"


def test_whole_pictures_are_held_out(tmp_path):
    lines = folder_of_pairs(tmp_path / "pairs")
    write_list(tmp_path / "pairs", [*lines, *({**line, "instruction": "again"} for line in lines)])
    train_pairs, held_out = hold_out(read_pairs(tmp_path / "pairs"), 0.25)
    assert (len(train_pairs), len(held_out)) == (6, 2)
    assert not {pair.source for pair in train_pairs} & {pair.source for pair in held_out}


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    lines = folder_of_pairs(tmp_path / "pairs")
    run(tmp_path)
    with pytest.raises(TrainingError, match="other learning_rate .*restart"):
        run(tmp_path, learning_rate=0.5)
    with pytest.raises(TrainingError, match="other generator"):
        run(tmp_path, rank=8, alpha=16.0)
    write_list(tmp_path / "pairs", lines[::-1])
    with pytest.raises(TrainingError, match="other pictures"):
        run(tmp_path)
    write_list(tmp_path / "pairs", [*lines[:3], lines[3] | {"instruction": "make it vivid"}])
    with pytest.raises(TrainingError, match="other instructions"):
        run(tmp_path)
    write_list(tmp_path / "pairs", lines)
    assert len(list(csv.DictReader((run(tmp_path, steps=6).parent / LOG).open()))) == 6


def test_other_pictures_under_the_same_names_are_another_run(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    run(tmp_path)
    for path in (tmp_path / "pairs").glob("*.png"):
        times = path.stat().st_atime, path.stat().st_mtime
        Image.open(path).rotate(90).save(path)
        os.utime(path, times)
    with pytest.raises(TrainingError, match="other pictures"):
        run(tmp_path)


def test_flags_of_a_new_generator_are_obeyed_for_the_shipped_pictures_too(tmp_path):
    trained = run(tmp_path, pairs="", rank=8, alpha=8.0, targets="img_attn.*", encoder_layers=2, steps=1, variants=1)
    config = load_generator(trained).config
    assert (config.rank, config.alpha, config.encoder_layers) == (8, 8.0, 2)
    assert list(config.pg_mapping) == ["img_attn.qkv", "img_attn.proj"]


def test_a_run_speaks_early_keeps_generators_and_can_be_finished(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    said = []
    (tmp_path / "out").mkdir()
    run(tmp_path, say=said.append, keep_every=3)
    steps = [line for line in said if line.startswith("step ")]
    assert steps[0].startswith("step 1/4: loss ") and "without a LoRA" in steps[0]
    assert load_generator(tmp_path / "out" / f"{GENERATOR}-000003").config.hywu["training"]["steps"] == 3
    (tmp_path / "out" / FINISH).touch()
    ended = run(tmp_path, steps=40)
    assert load_generator(ended).config.hywu["training"]["steps"] == 5


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    with pytest.raises(TrainingError, match="in step"):
        run(tmp_path, learning_rate=1e30, clip=0.0)
    state = load_file(tmp_path / "out" / STATE)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_text_encoder_that_gives_what_no_file_holds(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    clip = type(
        "Clip", (), {"tokenize": lambda *a, **k: 0, "encode_from_tokens": lambda *a, **k: {"hooks": object()}}
    )()
    with pytest.raises(PairError, match="hooks as object, which cannot be kept"):
        run(tmp_path, encoders=Encoders(clip, pocket.load_pocket_editor()[2]))


def test_without_accelerate_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(HywuError, match="pip install accelerate"):
        Accelerated(cpu=True)
