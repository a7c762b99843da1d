"""Every reader answers damaged files with a typed error: a few thousand of them, always the same."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPTS / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fuzz", module)
    spec.loader.exec_module(module)
    return module


def test_5000_damaged_files(fuzz, tmp_path):
    escapes = fuzz.run(5000, seed=0, seconds=10, keep=tmp_path)
    assert not escapes, "\n".join(map(str, escapes))


def test_an_escape_is_found_and_kept(fuzz, tmp_path, capsys):
    def stumble(content):
        {}[content]

    reader = fuzz.Reader("stumbling", (b"x",), lambda chance, given: given * chance.randrange(1, 9), stumble)
    escapes = fuzz._run_reader(reader, 50, fuzz.random.Random(0), 5, tmp_path)
    assert sum(escapes.values()) == 50 and next(iter(escapes)).kind == "KeyError"
    assert (tmp_path / "stumbling-0").read_bytes() == b"x"


def test_what_takes_too_long_is_an_escape(fuzz):
    def endless(content):
        while True:
            pass

    reader = fuzz.Reader("endless", (b"x",), lambda chance, given: given, endless)
    assert [escape.kind for escape in fuzz._run_reader(reader, 1, fuzz.random.Random(0), 0.05, None)] == [
        "TooLongError"
    ]
