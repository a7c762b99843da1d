"""Generated LoRAs on the disk: exact, bounded, and shared by processes that write and remove at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import cache_worker
import pytest
import torch
from cache_worker import ROOM, lora, same

from hywu_core import InstanceLora
from hywu_core.files.lora_cache import SUFFIX, LoraCache, key_of


def refuse() -> InstanceLora:
    raise AssertionError("it should have been read")


@pytest.mark.parametrize("batch", [1, 3])
def test_what_was_kept_is_read_bit_for_bit(tmp_path, batch):
    cache = LoraCache(tmp_path, 10**9)
    made = cache.get("a", lambda: lora(1, batch))
    assert same(cache.get("a", refuse), made)
    (file,) = tmp_path.iterdir()
    file.unlink()
    assert same(cache.get("a", lambda: lora(1, batch)), made)


def test_of_several_only_those_that_are_missing_are_made(tmp_path):
    cache, asked = LoraCache(tmp_path, 10**9), []

    def make(places):
        asked.append(places)
        return [lora(place) for place in places]

    assert same(cache.get("b", lambda: lora(1)), lora(1))
    for _ in range(2):
        found = cache.get_all(["a", "b", "c"], make)
        assert all(same(one, lora(place)) for place, one in enumerate(found))
    assert asked == [[0, 2]]


def test_a_key_knows_every_bit_and_every_setting():
    tokens = torch.randn(1, 5, 8)
    other = tokens.clone()
    other[0, 0, 0] = torch.nextafter(other[0, 0, 0], torch.tensor(9.0))
    keys = [key_of(tokens, "g", 1), key_of(other, "g", 1), key_of(tokens, "h", 1), key_of(tokens, "g", 2)]
    keys += [key_of(tokens.view(1, 8, 5), "g", 1), key_of(tokens.bfloat16(), "g", 1)]
    assert len(set(keys)) == len(keys) and key_of(tokens.clone(), "g", 1) == keys[0]


def test_the_least_recently_used_leave(tmp_path):
    size = LoraCache(tmp_path, 10**9).get("0", lambda: lora(0)) and next(tmp_path.iterdir()).stat().st_size
    cache = LoraCache(tmp_path, 3 * size + 10)
    for number in (1, 2):
        cache.get(str(number), lambda number=number: lora(number))
    for age, name in enumerate("012"):
        os.utime(tmp_path / f"{name}{SUFFIX}", (1000 + age, 1000 + age))
    cache.get("0", refuse)  # used again: now the newest
    cache.get("3", lambda: lora(3))
    assert {path.name.removesuffix(SUFFIX) for path in tmp_path.iterdir()} == {"0", "2", "3"}


@pytest.mark.parametrize("content", [b"", b"\x00" * 9, b"not a file of tensors at all"])
def test_a_damaged_entry_is_made_anew(tmp_path, content):
    cache = LoraCache(tmp_path, 10**9)
    cache.get("a", lambda: lora(1))
    (tmp_path / f"a{SUFFIX}").write_bytes(content)
    assert same(cache.get("a", lambda: lora(1)), lora(1))
    assert same(cache.get("a", refuse), lora(1))


def test_one_that_is_too_large_or_cannot_be_written_is_only_made(tmp_path):
    assert same(LoraCache(tmp_path, 100).get("a", lambda: lora(1)), lora(1))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("no folder")
    assert same(LoraCache(tmp_path / "file", 10**9).get("a", lambda: lora(1)), lora(1))


def test_processes_share_a_folder(tmp_path):
    command = [sys.executable, cache_worker.__file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    workers = [subprocess.Popen([*command, str(seed)], env=environment) for seed in range(2)]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    assert {path.name.endswith(SUFFIX) for path in tmp_path.iterdir()} == {True}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= ROOM + 20_000


def test_what_a_killed_process_left_half_written_leaves_after_a_day(tmp_path):
    old, young = tmp_path / ".a.lora.safetensors.host.7.tmp", tmp_path / ".b.lora.safetensors.host.7.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    LoraCache(tmp_path, 10**9).get("0", lambda: lora(0))
    assert young.exists() and not old.exists()
