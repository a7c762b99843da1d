"""Training outside the server: scripts/train.py in one and in two processes, and what it says about bad input."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hywu_core import Generator, load_generator
from hywu_core.bases import pocket
from hywu_core.errors import CheckpointError, ConfigError, HywuError
from hywu_core.files.lora_files import save_lora
from hywu_core.host.model import StackError
from hywu_core.host.training import base_files
from hywu_core.host.training.in_script import GENERATOR, train_on_folder
from hywu_core.host.training.pairs_of_folder import Encoders, PairError, hold_out, read_pairs
from hywu_core.host.training.session import FINISH, StoppedError
from hywu_core.training import TrainingError
from hywu_core.training.distributed import Accelerated
from hywu_core.training.log import LOG, STATE, VALIDATION
from hywu_core.training.options import build_run

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
from pocket_run import PocketRun, sources  # noqa: E402

WORDS = ("brighten the picture", "darken the picture", "make it vivid", "make it gray")


def folder_of_pairs(folder, count=4, size=(16, 16)):
    """Random pictures with their edits, and the list that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(0)
    lines = []
    for index in range(count):
        pixels = torch.randint(256, (size[1], size[0], 3), generator=source).byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        Image.fromarray((pixels // 2).numpy()).save(folder / f"{index}_edited.png")
        lines.append({"source": f"{index}.png", "target": f"{index}_edited.png", "instruction": WORDS[index % 4]})
    write_list(folder, lines)
    return lines


def write_list(folder, lines):
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def options(tmp_path, **changes):
    """A short run for the pocket editor on four pairs."""
    values = {
        "cpu": True, "pocket": True, "pairs": str(tmp_path / "pairs"), "output": str(tmp_path / "out"), "steps": 4,
        "batch": 2, "warmup": 0, "save_every": 2, "validate_every": 2, "held_out_share": 0.25, "size": 16,
    }  # fmt: skip
    return values | changes


def start(values, tmp_path, processes=1, rank=0, port=0, threads=1):
    """scripts/train.py as a launcher starts it, without the launcher."""
    file = tmp_path / f"run-{rank}.json"
    file.write_text(json.dumps(values))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if processes > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        environment |= {name: str(value) for name, value in (places | address).items()}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(values, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(values, tmp_path, 2, rank, port) for rank in (0, 1)]


def finish(*processes):
    """Wait for them; returns their exit codes and what they said."""
    try:
        said = ["".join(process.communicate(timeout=300)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def wait_for_steps(folder, count, process):
    """Until a run has logged that many steps."""
    for _ in range(6000):
        if process.poll() is not None or ((folder / LOG).exists() and len((folder / LOG).read_text().split()) > count):
            return
        time.sleep(0.05)


def weights(folder):
    return load_file(folder / GENERATOR / "model.safetensors")


def run(tmp_path, stop=lambda: False, say=lambda text: None, encoders=None, **changes):
    """The same in this process."""
    config = build_run(options(tmp_path, **changes), PocketRun)
    given = sources(config)
    if encoders:
        base_of = given["base_of"]
        given["base_of"] = lambda run: base_of(run)._replace(encoders=lambda: encoders)
    return train_on_folder(config, Accelerated(cpu=True), stop, say, **given)


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


@pytest.fixture
def flux_files(tmp_path, monkeypatch):
    """A small Flux as the host's own loader reads it. The text encoders and the VAE that belong to it are too large for a
    test; the pocket editor's and pictures cut into 16 channels stand in.
    """
    config = families.comfy.supported_models.Flux(
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64,
            "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
            "txt_ids_dims": [],
        }
    )  # fmt: skip
    state = families.build(config).model.diffusion_model.state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "flux.safetensors")
    clip = pocket.load_pocket_editor()[1]
    monkeypatch.setattr(base_files.comfy.sd, "load_clip", lambda files, clip_type: clip)
    encode = staticmethod(lambda pixels: torch.nn.functional.pixel_unshuffle(pixels.movedim(-1, 1), 4)[:, :16])
    vae = {"encode": encode, "vae_encode_crop_pixels": staticmethod(lambda pixels: pixels)}
    monkeypatch.setattr(base_files, "_vae", lambda name: type("Vae", (), vae))
    for name in ("clip.safetensors", "vae.safetensors"):
        (tmp_path / name).touch()
    return {
        "pocket": False, "model": str(tmp_path / "flux.safetensors"), "generator": "",
        "vae": str(tmp_path / "vae.safetensors"),
        "text_encoders": [str(tmp_path / "clip.safetensors")], "targets": "img_attn.*", "stack": "double_blocks", "size": 0,
    }  # fmt: skip


def test_a_base_from_its_files_gets_a_new_generator(tmp_path, flux_files):
    folder_of_pairs(tmp_path / "pairs")
    generator = load_generator(run(tmp_path, **flux_files, rank=4))
    assert list(generator.config.pg_mapping) == ["img_attn.qkv", "img_attn.proj"]
    assert generator.config.hywu["training"]["base"] == "flux.safetensors"


def test_the_hosts_own_vae_without_a_file(tmp_path):
    pixels = torch.rand(1, 8, 8, 3)
    found = base_files._vae(base_files.PIXEL_SPACE).encode(pixels)
    torch.testing.assert_close(found.float(), pixels.movedim(-1, 1) * 2 - 1, atol=1e-2, rtol=0)


def test_a_quantised_base_gets_a_new_generator_and_is_trained_on(tmp_path, flux_files):
    folder_of_pairs(tmp_path / "pairs")
    state = load_file(flux_files["model"])
    for name in [name for name in state if name.endswith("img_attn.proj.weight")]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[name.replace(".weight", ".weight_scale")] = torch.ones(())
        text = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
        state[name.replace(".weight", ".comfy_quant")] = text
    save_file(state, flux_files["model"])
    trained = load_generator(run(tmp_path, **flux_files, rank=4))
    assert list(trained.config.pg_mapping) == ["img_attn.qkv", "img_attn.proj"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "nowhere.safetensors"}, CheckpointError, "nowhere.safetensors does not exist"),
        ({"vae": ""}, CheckpointError, "A run needs a base"),
        ({"clip_type": "fluxx"}, CheckpointError, "The host knows"),
        ({"model": "README.md"}, CheckpointError, "The host cannot load"),
        ({"targets": "no_such.*"}, StackError, "No linear layer"),
        ({"source": "thoughts"}, ConfigError, "source must be one of"),
        ({"generator": "nowhere.json", "targets": "", "stack": "largest"}, ConfigError, "nowhere.json cannot be read"),
        ({"generator": "nowhere.json"}, ConfigError, "stack has no effect with generator"),
        ({"suite": "all"}, ConfigError, "suite has no effect without the pictures that ship"),
        ({"pairs": ""}, ConfigError, "nothing to train on"),
        ({"buckets": True}, ConfigError, "buckets has no effect without size"),
        (
            {"caption_dropout": 0.1, "regime": "blind"},
            ConfigError,
            "caption_dropout has no effect with the regime blind",
        ),
        ({"caption_dropout": 1.0}, ConfigError, "caption_dropout must be at least 0 and below 1"),
    ],
)
def test_bad_bases_and_generators(tmp_path, flux_files, changes, error, said):
    folder_of_pairs(tmp_path / "pairs")
    with pytest.raises(error, match=said):
        run(tmp_path, **flux_files | changes)


def test_a_generator_for_another_base(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    config = families.generator_config(families.flux("single"))
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(HywuError, match="None of the LoRA's 6 targets is in this model"):
        run(tmp_path, generator=str(tmp_path / "config.json"))


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


LESSONS = {  # {name: options beside those of a run on pairs}
    "memory": {"memory": 0.5, "memory_batch": 3, "memory_schedule": "falling"},
    "a large teacher alone": {"memory": 1.0, "diffusion": 0.0, "held_out_share": 0.0, "validate_every": 0},
    "LoRA files beside the loss": {"loras": 1.0, "loras_batch": 3},
}


@pytest.mark.parametrize("name", LESSONS)
def test_lessons_in_weight_space_go_on_bit_for_bit(tmp_path, name):
    folder_of_pairs(tmp_path / "pairs")
    given = LESSONS[name]
    old = run(tmp_path, output=str(tmp_path / "old"), steps=2, rank=8, targets="img_attn.*")
    if "memory" in given:
        given = given | {"teacher": str(old)}
    else:
        generator = load_generator(old)
        lora = generator.generate(torch.randn(1, 8, generator.config.input_dim))
        lora = lora.map(lambda pair: type(pair)(pair.down, torch.randn(pair.up.shape) * 0.05))
        (tmp_path / "loras").mkdir()
        save_lora(lora.with_metadata(instruction="make it a dream"), tmp_path / "loras" / "dream.safetensors")
        given = given | {"lora_files": str(tmp_path / "loras")}
    given = given | {"rank": 4, "targets": "img_attn.*"}
    whole = run(tmp_path, output=str(tmp_path / "whole"), **given)
    asked = iter((False, True))
    with pytest.raises(StoppedError):
        run(tmp_path, lambda: next(asked), **given)
    again = run(tmp_path, **given)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    hywu = load_generator(whole).config.hywu
    assert len(hywu["lineage"]) == 1 and hywu["lineage"][0]["kind"] == "trained"
    assert ("make it a dream" in hywu["instructions"]) == ("loras" in given)
    assert set(WORDS) >= set(hywu["instructions"]) - {"make it a dream"}


WITHOUT = {  # {what is missing: (options, words of the error)}
    "a teacher": ({"memory": 1.0}, "needs a teacher"),
    "a weight": ({"old_instructions": "old.txt", "generator": "x"}, "old_instructions has no effect without memory"),
    "files": ({"loras": 1.0}, "need each other"),
    "anything": ({"diffusion": 0.0}, "nothing to train for"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_lessons_that_lack_something(tmp_path, name):
    changes, words = WITHOUT[name]
    with pytest.raises(ConfigError, match=words):
        build_run(options(tmp_path, **changes), PocketRun)


def test_the_command_teaches_and_learns(tmp_path):
    lines = folder_of_pairs(tmp_path / "pairs")
    run(tmp_path, output=str(tmp_path / "old"), steps=2, rank=4, targets="img_attn.*")
    write_list(tmp_path / "pairs", [line | {"instruction": "a new edit"} for line in lines])
    common = ["--pocket", "--cpu", "--generator", str(tmp_path / "old" / GENERATOR), "--steps", "2", "--batch", "2"]

    def command(*more):
        script = [sys.executable, str(ROOT / "scripts" / "teach.py"), *common, *more]
        return subprocess.run(script, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    taught = command("--pairs", str(tmp_path / "pairs"), "--output", str(tmp_path / "taught"))
    assert taught.returncode == 0, taught.stderr
    assert "memory: distance" in taught.stdout and "a new edit\t" in taught.stdout
    config = load_generator(tmp_path / "taught" / GENERATOR).config
    assert "a new edit" in config.hywu["instructions"] and set(WORDS) & set(config.hywu["instructions"])
    wrong = command("--loras", str(tmp_path / "nothing"), "--output", str(tmp_path / "learned"))
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and "is not a folder" in wrong.stderr


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
