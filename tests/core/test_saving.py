"""What is saved is whole or not there, whatever happens on the way, and is what the library of the format reads."""

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
from made_files import sharded, small_lora
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from hywu_core import (
    Generator,
    GeneratorConfig,
    SaveError,
    load_generator,
    save_generator,
)
from hywu_core.files.lora_files import save_lora
from hywu_core.files.safetensors import write_safetensors


@pytest.fixture
def generator(fixtures_dir):
    return load_generator(fixtures_dir / "gen_2")


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
