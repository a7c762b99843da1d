"""Generator and LoRA files: there and back, atomically, and what damaged ones say."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from hywu_core import (
    CheckpointError,
    Generator,
    GeneratorConfig,
    InstanceLora,
    LoraError,
    LoraFactor,
    SaveError,
    load_generator,
    save_generator,
)
from hywu_core.files.checkpoint import fingerprint, inspect_generator
from hywu_core.files.lora_files import from_state_dict, load_lora, save_lora, to_peft_state_dict, to_state_dict
from hywu_core.files.safetensors import write_safetensors


@pytest.fixture
def generator(fixtures_dir):
    return load_generator(fixtures_dir / "gen_2")


def sharded(folder, generator):
    """The released form: an index and shards."""
    folder.mkdir()
    state, names = generator.state_dict(), sorted(generator.state_dict())
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name].contiguous() for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(generator.config.to_json())
    return folder


@pytest.fixture(params=["single.safetensors", "folder", "sharded"])
def stored(request, tmp_path, generator):
    path = tmp_path / request.param
    return sharded(path, generator) if request.param == "sharded" else save_generator(generator, path)


def test_every_form_comes_back(stored, generator):
    back = load_generator(stored)
    assert back.config == generator.config and list(back.config.pg_mapping) == list(generator.config.pg_mapping)
    state = generator.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    assert inspect_generator(stored).dtype == torch.float32


def test_types_and_fingerprints(tmp_path, generator):
    half = save_generator(generator, tmp_path / "half.safetensors", torch.bfloat16)
    full = save_generator(generator, tmp_path / "full.safetensors")
    assert next(load_generator(half).parameters()).dtype == torch.float32
    assert next(load_generator(half, dtype=None).parameters()).dtype == torch.bfloat16
    before = inspect_generator(full).fingerprint
    assert before == inspect_generator(save_generator(generator, tmp_path / "same.safetensors")).fingerprint
    with torch.no_grad():
        generator.model.norm_final.weight[0] += 1
    assert inspect_generator(save_generator(generator, tmp_path / "other.safetensors")).fingerprint != before


def test_a_missing_shard_and_a_doubled_tensor_are_named(tmp_path, generator):
    folder = sharded(tmp_path / "shards", generator)
    second = folder / "model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match="lacks the shards model-00002-of-00002.safetensors"):
        load_generator(folder)
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(first, second)
    with pytest.raises(CheckpointError, match="is in both model-00001"):
        load_generator(folder)
    second.write_bytes(kept)
    said = r"index\.json(: not valid JSON|: expected a JSON object| is not a shard index)"
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"hidden_in.bias": 3}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            load_generator(folder)


def test_a_truncated_shard_is_named(tmp_path, generator):
    shard = sharded(tmp_path / "shards", generator) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00002.safetensors is not a readable.*probably truncated"
    ):
        load_generator(shard.parent)


def test_configuration_files_that_editors_and_downloads_leave(tmp_path, generator):
    config = save_generator(generator, tmp_path / "folder") / "config.json"
    text = config.read_text()
    config.write_text(text, encoding="utf-8-sig")
    assert load_generator(config.parent).config == generator.config
    config.write_text(text, encoding="utf-16")
    with pytest.raises(CheckpointError, match="config.json is not UTF-8 text"):
        load_generator(config.parent)


def test_a_long_list_of_problems_is_cut(tmp_path, generator):
    path = save_generator(generator, tmp_path / "folder")
    save_file({"other": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing hidden_in.weight \[64, 64\].*and \d+ more"):
        load_generator(path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.ckpt"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04anything")
    for read, error in ((load_generator, CheckpointError), (load_lora, LoraError)):
        with pytest.raises(error, match="pickle file, which could run any code"):
            read(tmp_path / name)


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        load_generator(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_generator(tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="has no generator configuration"):
        load_generator(tmp_path / "plain.safetensors")


def test_a_failed_write_leaves_what_was_there(tmp_path, generator, monkeypatch):
    path = save_generator(generator, tmp_path / "generator.safetensors")
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(SaveError, match="No space left on device.*Nothing was changed"):
        save_generator(generator, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, generator, monkeypatch):
    """Weights without their configuration, or beside another one's, would be offered to load."""
    path = save_generator(generator, tmp_path / "folder")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with torch.no_grad():
        generator.hidden_in.bias += 1
    real = os.replace

    def fails_at(name):
        def put(source, target):
            if Path(target).name == name:
                raise OSError(28, "No space left on device")
            real(source, target)

        return put

    monkeypatch.setattr("os.replace", fails_at("model.safetensors"))
    with pytest.raises(SaveError):
        save_generator(generator, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.fixture(params=[0o555, 0o000], ids=["read-only", "not even readable"])
def locked(request):
    """A folder that its user may not write to. Root may write to any, so the test is somebody else meanwhile."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(request.param)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert not left


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders are other ones there")
def test_a_folder_without_permission_to_write(locked, generator):
    with pytest.raises(SaveError, match="Permission denied.*Choose a folder that can be written to"):
        save_generator(generator, locked / "generator.safetensors")
    with pytest.raises(SaveError, match="Permission denied.*Choose a folder that can be written to"):
        save_lora(small_lora(), locked / "loras" / "lora.safetensors")


def test_a_folder_that_cannot_be_made(tmp_path, generator):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SaveError, match="Choose a folder that can be written to"):
        save_generator(generator, tmp_path / "taken" / "generator.safetensors")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(file, tensor, dtype):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("hywu_core.files.safetensors._write_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def small_lora(names=("b.0.q", "b.1.q"), scale=2.0):
    source = torch.Generator().manual_seed(0)
    return InstanceLora(
        {n: LoraFactor(torch.randn(1, 4, 6, generator=source), torch.randn(1, 8, 4, generator=source)) for n in names},
        scale,
        {"instruction": "make it warm"},
    )


def test_lora_files_come_back_with_their_metadata(tmp_path):
    lora = small_lora()
    back = load_lora(save_lora(lora, tmp_path / "lora.safetensors"))
    assert back.scale == 2.0 and back.names == lora.names
    assert back.metadata["instruction"] == "make it warm" and back.metadata["rank"] == 4
    assert all(
        torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(back.pairs, lora.pairs, strict=True)
    )


def test_metadata_of_another_tool_under_our_name_is_left_alone(tmp_path):
    for text in ("[1]", "{no json", '"text"'):
        save_file(to_state_dict(small_lora()), tmp_path / "lora.safetensors", {"hywu": text})
        assert load_lora(tmp_path / "lora.safetensors").names == small_lora().names


def test_damaged_lora_files_are_named(tmp_path):
    path = save_lora(small_lora(), tmp_path / "lora.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoraError, match="lora.safetensors is not a readable safetensors file.*probably truncated"):
        load_lora(path)
    save_file({"q.lora_A.weight": torch.zeros(4, 6), "q.lora_B.weight": torch.zeros(8, 5)}, path)
    with pytest.raises(LoraError, match=r"lora.safetensors: q: the factors \(1, 4, 6\) and \(1, 8, 5\) do not fit"):
        load_lora(path)
    with pytest.raises(LoraError, match="nothing.safetensors does not exist"):
        load_lora(tmp_path / "nothing.safetensors")


def test_peft_folds_the_scale():
    lora, back = small_lora(), from_state_dict(to_peft_state_dict(small_lora()))
    assert back.scale == 1.0
    torch.testing.assert_close(back.pairs[0].up, lora.pairs[0].up * 2.0)


def test_slices_of_one_weight_become_one_exact_pair():
    lora = small_lora(("b.0.qkv[0:8/24]", "b.0.qkv[16:24/24]"))
    back = from_state_dict(to_state_dict(lora))
    assert back.names == ("b.0.qkv",) and back.rank == 8 and back.scale == lora.scale
    first, second = (pair.up[0] @ pair.down[0] for pair in lora.pairs)
    expected = torch.cat((first, torch.zeros(8, 6), second))
    torch.testing.assert_close(back.pairs[0].up[0] @ back.pairs[0].down[0], expected)


def test_alphas_of_a_foreign_file_are_kept_per_target():
    state = {}
    for name, alpha in (("x", 4.0), ("y", 1.0)):
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = torch.ones(4, 6), torch.ones(8, 4)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    lora = from_state_dict(state)
    assert lora.scale == 1.0
    assert float(lora.factors["x"].up[0, 0, 0]) == 1.0 and float(lora.factors["y"].up[0, 0, 0]) == 0.25


def test_foreign_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LoraError, match="has no partner q.lora_B.weight"):
        from_state_dict({"q.lora_A.weight": torch.zeros(4, 6)})
    with pytest.raises(LoraError, match=r"experts \[0, 2\], expected all from 0 on"):
        from_state_dict(
            {f"m.experts.{e}.down_proj.{f}.weight": torch.zeros(4, 4) for e in (0, 2) for f in ("lora_A", "lora_B")}
        )
    with pytest.raises(LoraError, match="this LoRA holds 2"):
        pair = LoraFactor(torch.zeros(2, 4, 6), torch.zeros(2, 8, 4))
        save_lora(InstanceLora({"q": pair}), tmp_path / "x.safetensors")


@pytest.fixture
def before(request, tmp_path, generator):
    """A folder as it stands before a save."""
    path = tmp_path / "folder"
    if request.param == "plain":
        save_generator(generator, path)
    elif request.param == "sharded":
        sharded(path, generator)
    elif request.param == "index of one file":
        save_generator(generator, path)
        weights = dict.fromkeys(generator.state_dict(), "model.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return path


EVERY_FORM = pytest.mark.parametrize("before", ["nothing", "plain", "sharded", "index of one file"], indirect=True)


def changed(generator):
    """Other weights, and a configuration that only they belong to."""
    other = load_generator(Path(__file__).resolve().parents[1] / "fixtures" / "gen_2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    other.config = replace(generator.config, alpha=generator.config.alpha * 2)
    return other


def same(one, other):
    state = other.state_dict()
    return one.config == other.config and all(torch.equal(t, state[name]) for name, t in one.state_dict().items())


@EVERY_FORM
def test_a_folder_holds_one_generator_after_a_save(before, generator):
    other = changed(generator)
    assert same(load_generator(save_generator(other, before)), other)
    assert sorted(file.name for file in before.iterdir()) == ["config.json", "model.safetensors"]
    assert same(load_generator(before / "model.safetensors"), other)


CALLS = ("open", "replace", "unlink", "mkdir", "chmod", "fsync")


def killed_at(step, save) -> bool:
    """Do a save in a process that is gone before its nth call of the system; whether it was."""
    child = os.fork()
    if child == 0:
        calls = iter(range(step, -1, -1))
        for name in CALLS:
            real = getattr(os, name)

            def counted(*args, real=real, **more):
                if next(calls, 1) == 0:
                    os._exit(9)
                return real(*args, **more)

            setattr(os, name, counted)
        try:
            save()
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that is killed")
@EVERY_FORM
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_generator(before, tmp_path, generator):
    other, seen, step = changed(generator), [], 0
    pristine = tmp_path / "pristine"
    if before.exists():
        shutil.copytree(before, pristine)
    while True:
        shutil.rmtree(before, ignore_errors=True)
        if pristine.exists():
            shutil.copytree(pristine, before)
        if not killed_at(step, lambda: save_generator(other, before)):
            break
        if pristine.exists() or (before / "model.safetensors").exists():
            found = load_generator(before)
            assert same(found, generator) or same(found, other), f"step {step}"
            seen.append("new" if same(found, other) else "old")
        save_generator(other, before)
        left = {file.name for file in before.iterdir()} - {"config.json", "model.safetensors"}
        assert same(load_generator(before), other) and not [name for name in left if ".tmp" in name]
        step += 1
    assert step > 8 and "new" in seen and seen == sorted(seen, reverse=True)  # old, then new
    assert ("old" in seen) == pristine.exists()


def test_a_config_that_was_edited_after_a_save_counts(tmp_path, generator):
    path = save_generator(changed(generator), save_generator(generator, tmp_path / "folder"))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"alpha": 3}))
    assert load_generator(path).config.alpha == 3
    assert load_generator(path / "model.safetensors").config.alpha == 3


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from hywu_core.files.atomic import atomic_write
with atomic_write(Path({path!r})) as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_temporaries_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    path = tmp_path / "x[1].safetensors"
    code = KILLED.format(root=str(Path(__file__).resolve().parents[2]), path=str(path))
    command, pipes = [sys.executable, "-c", code], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline().strip() == b"writing"
    assert len(list(tmp_path.iterdir())) == 2
    writers[0].kill()
    writers[0].wait()
    write_safetensors(path, {"a": torch.zeros(1)})
    assert sorted(len(file.name) > len(path.name) for file in tmp_path.iterdir()) == [False, True]
    writers[1].communicate(b"")
    assert path.read_bytes() == b"half" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_folder(tmp_path, generator, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    for path in (tmp_path / "a" / "b" / "x.safetensors", tmp_path / "a" / "folder"):
        with pytest.raises(SaveError, match=r"No space left on device.*Nothing was changed\. Make room"):
            save_generator(generator, path)
    assert not list(tmp_path.iterdir())


class Copies(TorchDispatchMode):
    """Bytes of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(result.nbytes)
        return result


def test_what_is_saved_is_copied_one_tensor_at_a_time_if_at_all(tmp_path):
    tensors = {str(n): torch.randn(64, 64) for n in range(8)}
    with Copies() as plain:
        write_safetensors(tmp_path / "plain.safetensors", tensors)
    assert not plain.made
    with Copies() as cast:
        write_safetensors(tmp_path / "cast.safetensors", tensors, dtype=torch.bfloat16)
    assert cast.made == [64 * 64 * 2] * 8
    generator = Generator(two_target_config(), dtype=torch.float32).initialize()
    with Copies() as saved:
        save_generator(generator, tmp_path / "generator.safetensors")
    assert not saved.made


def two_target_config():
    return GeneratorConfig(
        d_model=16, head_dim=8, num_pg_layers=1, input_dim=8, output_dim=8, token_dim=8, rank=2, num_base_model_layers=2,
        alpha=4, dim_accumulation=2, pg_mapping={n: {"lora_A_dim": 6, "lora_B_dim": 10} for n in "ab"},
    )  # fmt: skip


def test_files_are_what_the_library_writes_and_reads(tmp_path):
    whole = torch.randn(6, 8)
    tensors = {
        "view": whole[2:4], "turned": whole.T, "same": whole, "again": whole, "number": torch.tensor(3.5),
        "none": torch.zeros(0, 4), "wide": torch.randn(3).double(), "truth": torch.tensor([True, False, True]),
        "small": torch.randn(5).to(torch.float8_e4m3fn), "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(), "whole numbers": torch.arange(5),
    }  # fmt: skip
    metadata = {"format": "pt", "words": "make it “warm” 编辑", "broken": "half a character \ud83d"}
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, tensors, metadata)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)))
    with safe_open(str(path), "pt") as handle:
        assert handle.metadata() == metadata | {"broken": "half a character ?"}
    assert all(found[name].data_ptr() % found[name].element_size() == 0 for name in found)
    before = path.read_bytes()
    write_safetensors(path, tensors, metadata)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, device="meta"), "a holds no numbers yet"),
        (torch.zeros(2, 2).to_sparse(), "a holds numbers of the kind torch.float32"),
        (torch.zeros(2, dtype=torch.complex64), "a holds numbers of the kind torch.complex64"),
    ],
)
def test_tensors_that_no_file_holds(tmp_path, tensor, said):
    with pytest.raises(SaveError, match=said):
        write_safetensors(tmp_path / "x.safetensors", {"a": tensor})
    assert not list(tmp_path.iterdir())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 1234\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
NOT_WEIGHTS = {
    "LFS pointer": (POINTER, r"Git LFS pointer.*git lfs pull"),
    "web page": (PAGE, r"is a web page.*Download the file"),
    "web page in capitals": (b"\n<HTML>", "is a web page"),
    "nothing": (b"", "is empty"),
    "zip": (b"PK\x03\x04archive/data.pkl", "is a pickle or a zip archive"),
    "pickle": (b"\x80\x02}q\x00", "is a pickle or a zip archive"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
    "noise": (bytes(range(256)), "damaged or probably truncated: it has 256 bytes"),
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_is_no_safetensors_file_is_called_what_it_is(tmp_path, generator, kind):
    content, said = NOT_WEIGHTS[kind]
    path = save_generator(generator, tmp_path / "folder") / "model.safetensors"
    path.write_bytes(content)
    for read, error in ((load_generator, CheckpointError), (load_lora, LoraError)):
        with pytest.raises(error, match=rf"model\.safetensors is not a readable safetensors file: .*{said}"):
            read(path)


def test_half_a_file_says_how_much_is_missing(tmp_path, generator):
    path = save_generator(generator, tmp_path / "x.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"it has {len(whole) // 2:,} of {len(whole):,} bytes"):
        load_generator(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(
        CheckpointError, match=f"it has {len(whole) + 4:,} bytes where its header describes {len(whole):,}"
    ):
        load_generator(path)


@pytest.mark.parametrize("kind", ["LFS pointer", "web page", "nothing"])
def test_what_is_no_configuration_is_called_what_it_is(tmp_path, generator, kind):
    content, said = NOT_WEIGHTS[kind]
    config = save_generator(generator, tmp_path / "folder") / "config.json"
    config.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{said}"):
        load_generator(config.parent)
    (config.parent / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"index\.json.*{said}"):
        load_generator(config.parent)


def test_fingerprints_do_not_depend_on_how_it_is_kept(tmp_path, generator):
    one = save_generator(generator, tmp_path / "one.safetensors")
    known = {
        inspect_generator(path).fingerprint
        for path in (one, save_generator(generator, tmp_path / "folder"), sharded(tmp_path / "shards", generator))
    }
    assert known == {fingerprint(generator.config, generator.state_dict())}
    half = load_generator(one, dtype=torch.bfloat16)
    assert fingerprint(half.config, half.state_dict()) not in known
