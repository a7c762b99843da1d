"""Model folders as people have them, and what is saved below the host's folders."""

import logging
import os

import comfy.utils
import folder_paths
import pytest
import torch

from hywu_core import CheckpointError, InstanceLora, LoraFactor, SaveError, load_generator, save_generator
from hywu_core.bases.hunyuan_image3 import model_folder
from hywu_core.bases.hunyuan_image3.files import Shards
from hywu_core.files.shards import Header
from hywu_core.host import folders, memory, pack
from hywu_core.host.lora import store
from hywu_core.host.training import in_server

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """models/hywu of a user, as extra_model_paths.yaml leaves it."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))  # and not what lies in the host's
    root = tmp_path / "hywu"
    root.mkdir()
    for kind in ("hywu", "hunyuan_image3"):
        folder_paths.folder_names_and_paths[kind] = ([str(root)], set())
    folders.register()
    model_folder.register()
    return root


def own(names):
    """Without what ships with the pack."""
    shipped = {path.name for path in folders.SHIPPED.glob("*.safetensors")}
    return [name for name in names if name not in shipped]


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_the_folders_are_made_at_the_first_start_and_say_what_goes_there(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    for register, names, kind, words in (
        (folders.register, folders.generator_names, "hywu", "huggingface.co/tencent/HY-WU "),
        (model_folder.register, model_folder.names, "hunyuan_image3", "tencent/HunyuanImage-3.0-Instruct "),
    ):
        folder_paths.folder_names_and_paths.pop(kind, None)
        register()
        readme = tmp_path / "models" / kind / folders.README
        assert words in readme.read_text(encoding="utf-8")
        assert own(names()) == []
        readme.unlink()  # what somebody threw away does not come back
        register()
        assert not readme.exists()


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    (tmp_path / "models").write_bytes(b"")  # a file: nothing can be made below it, as whoever runs the test
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    with caplog.at_level(logging.INFO):
        folders.register()
    assert "hywu was not made" in caplog.text
    assert own(folders.generator_names()) == []


@pytest.mark.parametrize("name", ["hywu", "ComfyUI_HY-WU", "hywu-main", "hywu(1)"])
def test_folders_of_these_names_are_served(name, caplog):
    pack.warn_if_not_served(name)
    assert not caplog.text


@pytest.mark.parametrize("name", ["HY WU (1)", "hywu-0.1.0", "hywu@latest", "超网络", "hy%20wu", "hywu#2"])
def test_folders_of_other_names_are_warned_of(name, caplog):
    pack.warn_if_not_served(name)
    assert "Rename the folder to hywu" in caplog.text and repr(name) in caplog.text


def test_each_kind_is_announced_by_its_owner_and_keeps_the_paths_of_others(models):
    for kind, path in (("hywu", folders.generator_path), ("hunyuan_image3", model_folder.path)):
        roots = folder_paths.get_folder_paths(kind)
        assert roots[0] == str(models) and os.path.join(folder_paths.models_dir, kind) in roots
        with pytest.raises(CheckpointError, match="There is no"):
            path("nothing")
    before = folder_paths.get_folder_paths("hunyuan_image3")
    model_folder.register()
    assert folder_paths.get_folder_paths("hunyuan_image3") == before
    assert str(folders.SHIPPED) in folder_paths.get_folder_paths("hywu")


def test_loops_of_links_end(models):
    make(models, "a.safetensors", "sub/b.safetensors", "sub/deep/c.safetensors", "base/config.json")
    for link, to in (
        ("sub/up", models),
        ("sub/deep/top", models),
        ("again", models / "sub"),
        ("itself", models / "itself"),
    ):
        os.symlink(to, models / link)
    os.symlink(models / "base", models / "sub" / "base")
    names = own(folders.generator_names())
    assert len(names) == 4 and "a.safetensors" in names
    assert {os.path.basename(name.rstrip("/")) for name in names} == {
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
        "base",
    }
    assert len(model_folder.names()) == 1


def test_a_link_to_another_disk_is_followed(models, tmp_path):
    make(tmp_path / "disk", "edits/config.json", "x.safetensors")
    os.symlink(tmp_path / "disk", models / "disk")
    assert own(folders.generator_names()) == ["disk/edits/", "disk/x.safetensors"]
    assert folders.generator_path("disk/x.safetensors") == models / "disk" / "x.safetensors"


def test_a_drive_that_is_gone_is_said_and_the_others_are_listed(models, caplog, monkeypatch):
    make(models, "a.safetensors", "share/b.safetensors")
    scan = os.scandir

    def scandir(path="."):
        if os.fspath(path).endswith("share"):
            raise OSError(64, "The specified network name is no longer available", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with caplog.at_level(logging.WARNING):
        assert own(folders.generator_names()) == ["a.safetensors"]
    assert "share is not listed: The specified network name is no longer available" in caplog.text


def test_names_of_windows_are_found(models):
    make(models, "sub/x.safetensors", "base/one/config.json")
    assert folders.generator_path("sub\\x.safetensors") == models / "sub" / "x.safetensors"
    assert model_folder.path("base\\one") == models / "base" / "one"
    with pytest.raises(CheckpointError, match="There is no generator"):
        folders.generator_path("..\\hywu\\..\\output")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
def test_names_that_cannot_be_are_not_there(models, name):
    with pytest.raises(CheckpointError, match="There is no generator"):
        folders.generator_path(name)


def test_when_a_folder_changed_is_told_whatever_lies_in_it(models):
    make(models, "base/config.json")
    os.symlink(models / "nowhere", models / "base" / "dead")
    before = folders.modified(models / "base")
    os.utime(models / "base" / "config.json", (before + 100, before + 100))
    assert folders.modified(models / "base") == before + 100
    assert folders.modified(models / "gone.safetensors") == 0.0


NAMES = ["CON", "a:b", "dots.", "a\0b", "a\nb", "sub/NUL.x", "what?", "x" * 300, "../up", "", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_some_system_cannot_hold_are_refused_by_everything_that_saves(models, fixtures_dir, name):
    handle = memory.load(fixtures_dir / "gen_2")
    lora = InstanceLora({"q": LoraFactor(torch.zeros(1, 2, 4), torch.zeros(1, 4, 2))})
    with pytest.raises(SaveError, match="is no name for a generator"):
        memory.save(handle, name)
    with pytest.raises(SaveError, match="is no name for a run"):
        in_server.run_folder(name)
    with pytest.raises(SaveError, match="is no name for LoRA files|Cannot save"):
        store.save_to_output(lora, name, "stock", None)
    assert not list(models.iterdir()) and not (models.parent / "output").exists()


def test_a_full_disk_leaves_no_folder_for_loras(models, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    lora = InstanceLora({"q": LoraFactor(torch.zeros(1, 2, 4), torch.zeros(1, 4, 2))})
    with pytest.raises(SaveError, match="No space left"):
        store.save_to_output(lora, "new\\folder/lora", "stock", None)
    assert not (models.parent / "output" / "new").exists()


def test_the_same_weights_have_the_same_hash_wherever_they_are(models, fixtures_dir, tmp_path):
    stored = memory.load(fixtures_dir / "gen_2")
    generator = load_generator(fixtures_dir / "gen_2")
    in_memory = memory.from_state(generator.config, generator.state_dict(), "mine")
    saved = memory.load(memory.save(in_memory, "mine"))
    assert stored.fingerprint == in_memory.fingerprint == saved.fingerprint
    others = [memory.load(fixtures_dir / "gen_2", dtype).fingerprint for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    assert len({stored.fingerprint, *others}) == 3
    half = save_generator(generator, tmp_path / "half.safetensors", torch.bfloat16)
    assert memory.load(half).fingerprint == others[0]


def test_a_generator_is_inspected_once(fixtures_dir, monkeypatch):
    asked, inspect = [], memory.inspect_generator

    def counted(path):
        asked.append(path)
        return inspect(path)

    monkeypatch.setattr(memory, "inspect_generator", counted)
    memory.load(fixtures_dir / "gen_2")
    assert len(asked) == 1


def mapped(path) -> bool:
    with open("/proc/self/maps") as maps:
        return any(line.rstrip("\n").endswith(str(path)) for line in maps)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="tells what is mapped")
@pytest.mark.parametrize("disabled", [False, True])
def test_the_hosts_disable_mmap_is_obeyed(fixtures_dir, tmp_path, monkeypatch, disabled):
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", disabled)
    path = save_generator(load_generator(fixtures_dir / "gen_2"), tmp_path / "x.safetensors")
    handle = memory.load(path)
    assert mapped(path) != disabled
    with Shards() as shards:
        tensor = shards.tensor("hidden_in.bias", Header((64,), "F32", path))
    assert mapped(path) != disabled
    assert torch.equal(tensor, handle.generator.hidden_in.bias)
