"""What comes with the pocket editor can be chosen like files of one's own, and a file of that name goes before it."""

import folder_paths
import pytest
from safetensors.torch import load_file

from hywu_core.bases.pocket import WEIGHTS, extras
from hywu_core.host.lora import store
from hywu_core.host.training import pairs_in_server
from hywu_core.host.training.pair_lists import PairError
from hywu_core.host.training.pairs_of_folder import read_pairs

SHARED, PAIRS = "HY-WU pocket-shared.safetensors", "HY-WU example pairs"


@pytest.fixture(autouse=True)
def announced():
    extras.register()


@pytest.fixture
def loras(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_the_shared_lora_is_listed_behind_those_of_the_folders(loras):
    (loras / "mine.safetensors").write_bytes((WEIGHTS / "shared-told.safetensors").read_bytes())
    assert store.names() == ["mine.safetensors", SHARED]
    assert store.modified(SHARED) == (WEIGHTS / "shared.safetensors").stat().st_mtime
    lora = store.load(SHARED)
    assert lora.batch == 1 and len(lora.names) * 2 <= len(load_file(WEIGHTS / "shared.safetensors"))


def test_a_file_of_the_same_name_goes_first(loras):
    (loras / SHARED).write_bytes((WEIGHTS / "shared-told.safetensors").read_bytes())
    assert store.names() == [SHARED]
    assert store.modified(SHARED) == (loras / SHARED).stat().st_mtime


def test_a_name_that_nobody_has_is_refused(loras):
    with pytest.raises(FileNotFoundError):
        store.modified("nobody.safetensors")


def test_the_example_pairs_are_the_first_folder_and_hold_pairs():
    assert pairs_in_server.names()[0] == PAIRS
    folder = pairs_in_server.folder_of(PAIRS)
    pairs = read_pairs(folder)
    assert len(pairs) == 48 and {pair.size for pair in pairs} == {(64, 64)}
    assert {pair.instruction for pair in pairs} == {"darken the picture", "brighten the picture"}
    assert pairs_in_server.fingerprint(PAIRS) == pairs_in_server.fingerprint(PAIRS)


def test_other_folders_are_still_those_below_input():
    with pytest.raises(PairError, match="no folder 'elsewhere'"):
        pairs_in_server.folder_of("elsewhere")
