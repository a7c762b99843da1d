"""Saving and loading as Windows has it, played on Linux: the system calls refuse what they refuse there.

os.fsync        a descriptor that is open for reading only
os.replace      onto a file that this process has mapped or open, or from one that is open
os.unlink       a file that is mapped or open
os.rename       onto anything that is there
names           devices, forbidden characters, paths of 260 characters; upper and lower case are one
"""

import builtins
import errno
import fcntl
import gc
import io
import ntpath
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hywu_core import (
    Generator,
    GeneratorConfig,
    InstanceLora,
    LoraFactor,
    SaveError,
    load_generator,
    save_generator,
)
from hywu_core.files.atomic import atomic_write
from hywu_core.files.lora_files import load_lora, save_lora
from hywu_core.files.names import below
from hywu_core.training import GeneratorTrainable, RunLog, Sample, StepReport, TrainConfig, Trainer

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc to know what is mapped and open"
)
ROOT = Path(__file__).resolve().parents[2]
ACCESS_DENIED, SHARING_VIOLATION, BAD_NAME, TOO_LONG, MAPPED = 5, 32, 123, 206, 1224


def refusal(code: int, path) -> OSError:
    """What Python raises there for a code of Windows."""
    kind = PermissionError if code in (ACCESS_DENIED, SHARING_VIOLATION) else OSError
    number = {ACCESS_DENIED: errno.EACCES, SHARING_VIOLATION: errno.EACCES}.get(code, errno.EINVAL)
    error = kind(number, f"[WinError {code}]", str(path))
    error.winerror = code
    return error


def is_mapped(path) -> bool:
    with REAL["io.open"]("/proc/self/maps") as maps:
        return any(line.rstrip("\n").endswith(f" {os.path.realpath(path)}") for line in maps)


def is_open(path) -> bool:
    real = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}") == real:
                return True
        except OSError:
            continue
    return False


def check_name(path) -> None:
    if not isinstance(path, str | os.PathLike):
        return
    text = os.fspath(path)
    if not isinstance(text, str) or text.startswith(("/proc", "/dev")):
        return
    if len(os.path.abspath(text)) > 259:
        raise refusal(TOO_LONG, text)
    name = os.path.basename(text)
    if set(name) & set('<>:"|?*') or any(ord(character) < 32 for character in name):
        raise refusal(BAD_NAME, text)
    if ntpath.isreserved(name) if hasattr(ntpath, "isreserved") else Path(name).stem.upper() in ("CON", "NUL", "AUX"):
        raise refusal(ACCESS_DENIED, text)


def in_any_case(path) -> str:
    """The path as it is spelled on the disk."""
    folder, name = os.path.split(os.fspath(path))
    try:
        return next((os.path.join(folder, n) for n in os.listdir(folder) if n.lower() == name.lower()), os.fspath(path))
    except OSError:
        return os.fspath(path)


REAL = {
    "os.fsync": os.fsync, "os.replace": os.replace, "os.unlink": os.unlink, "os.rename": os.rename, "os.mkdir": os.mkdir,
    "os.open": os.open, "io.open": io.open, "os.path.exists": os.path.exists,
}  # fmt: skip


def fsync(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    REAL["os.fsync"](descriptor)


def replace(source, target, **more):
    check_name(target)
    target = in_any_case(target)
    for path, code in ((source, SHARING_VIOLATION), (target, SHARING_VIOLATION)):
        if is_open(path):
            raise refusal(code, path)
    if is_mapped(target):
        raise refusal(MAPPED, target)
    REAL["os.replace"](source, target, **more)


def unlink(path, **more):
    if is_mapped(path) or is_open(path):
        raise refusal(ACCESS_DENIED, path)
    REAL["os.unlink"](path, **more)


def rename(source, target, **more):
    check_name(target)
    if REAL["os.path.exists"](in_any_case(target)):
        raise FileExistsError(errno.EEXIST, "[WinError 183]", str(target))
    if is_open(source):
        raise refusal(SHARING_VIOLATION, source)
    REAL["os.rename"](source, target, **more)


def mkdir(path, *args, **more):
    check_name(path)
    REAL["os.mkdir"](path, *args, **more)


def os_open(path, *args, **more):
    check_name(path)
    return REAL["os.open"](path, *args, **more)


def io_open(path, *args, **more):
    check_name(path)
    return REAL["io.open"](path, *args, **more)


@pytest.fixture
def windows(monkeypatch):
    """The calls of the system as they are there. Those made by compiled code stay as they are."""
    for name, played in (("fsync", fsync), ("replace", replace), ("unlink", unlink), ("remove", unlink),
                         ("rename", rename), ("mkdir", mkdir), ("open", os_open)):  # fmt: skip
        monkeypatch.setattr(os, name, played)
    monkeypatch.setattr(io, "open", io_open)
    monkeypatch.setattr(builtins, "open", io_open)
    monkeypatch.setattr(os.path, "exists", lambda path: REAL["os.path.exists"](in_any_case(path)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def config():
    return GeneratorConfig(
        d_model=16, head_dim=8, num_pg_layers=1, input_dim=8, output_dim=8, token_dim=8, rank=2, num_base_model_layers=2,
        alpha=4, dim_accumulation=2, pg_mapping={"q": {"lora_A_dim": 6, "lora_B_dim": 10}},
    )  # fmt: skip


def generator(seed=0):
    return Generator(config()).initialize(seed)


def equal(one, other):
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def lora():
    return InstanceLora({"b.0.q": LoraFactor(torch.randn(1, 2, 6), torch.randn(1, 10, 2))}, 2.0)


def test_the_emulation_refuses_what_windows_refuses(windows, tmp_path):
    (tmp_path / "file").write_text("x")
    with open(tmp_path / "file", "rb") as handle, pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(handle.fileno())
    save_lora(lora(), tmp_path / "a.safetensors")
    mapped = load_file(tmp_path / "a.safetensors")
    assert mapped
    with pytest.raises(OSError, match="WinError 1224"):
        os.replace(tmp_path / "file", tmp_path / "A.safetensors")
    with pytest.raises(OSError, match="WinError 123"):
        open(tmp_path / "a:b", "w")


@pytest.mark.parametrize("name", ["one.safetensors", "folder"])
def test_generators_are_saved_and_replaced(windows, tmp_path, name):
    first, second = generator(0), generator(1)
    path = save_generator(first, tmp_path / name)
    assert equal(load_generator(path), first)
    save_generator(second, path)
    assert equal(load_generator(path), second)
    assert not [file for file in tmp_path.rglob("*") if "tmp" in file.name or "new" in file.name]


@pytest.mark.parametrize("name", ["one.safetensors", "folder"])
def test_a_generator_that_is_in_use_stays_and_the_new_one_is_kept(windows, tmp_path, name):
    path = save_generator(generator(0), tmp_path / name)
    weights = path if path.is_file() else path / "model.safetensors"
    kept = weights.with_name(weights.name.replace(".safetensors", ".new.safetensors"))
    before, used = weights.read_bytes(), load_generator(path)
    with pytest.raises(SaveError, match=rf"Cannot replace .*1224.*holds it open.*kept as {kept.name}"):
        save_generator(generator(1), path)
    assert weights.read_bytes() == before and equal(load_generator(path), generator(0)) and equal(used, generator(0))
    del used
    gc.collect()
    os.replace(kept, weights)  # what the message advises
    assert equal(load_generator(path), generator(1))
    save_generator(generator(2), path)
    assert equal(load_generator(path), generator(2))


def test_a_file_that_another_program_has_open_for_a_moment_is_waited_for(windows, tmp_path, monkeypatch):
    path, opened = tmp_path / "x.txt", []
    path.write_text("old")
    opened.append(open(path))
    monkeypatch.setattr(time, "sleep", lambda seconds: [opened.pop().close() for _ in list(opened)])
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_loras_are_saved_and_read_back(windows, tmp_path):
    path, written = tmp_path / "sub" / "lora.safetensors", lora()
    back = load_lora(save_lora(written, path))
    assert torch.equal(back.pairs[0].up, written.pairs[0].up)
    with pytest.raises(SaveError, match=r"kept as lora\.new\.safetensors"):
        save_lora(lora(), path)
    with pytest.raises(SaveError, match=r"kept as lora\.new-2\.safetensors"):
        save_lora(lora(), path)


class Pairs:
    def __len__(self):
        return 4

    def sample(self, index, source):
        condition = torch.randn(5, 8, generator=torch.Generator().manual_seed(index))
        return Sample(torch.randn(3, generator=source), index, condition, f"pair {index}")


class Quadratic:
    def backward(self, written, draws, share):
        losses = sum((pair.up @ pair.down - 1).square().mean((1, 2)) for pair in written.pairs)
        (losses.sum() * share).backward()
        return losses.detach()


def trainer(steps=6):
    how = TrainConfig(steps=steps, batch=2, warmup=0, ema=0.5)
    return Trainer(GeneratorTrainable(generator()), Quadratic(), Pairs(), how)


def test_a_run_saves_resumes_and_saves_again(windows, tmp_path):
    """A resumed run that kept anything memory-mapped could never replace its own state."""
    path, whole = tmp_path / "run" / "state.safetensors", trainer()
    whole.run()
    first = trainer()
    for _ in range(3):
        first.step()
    first.save(path)
    second = trainer()
    second.resume(path)
    assert not is_mapped(path)
    second.run(save_to=path, save_every=1)
    assert all(torch.equal(p, second.parameters[name]) for name, p in whole.parameters.items())
    third = trainer()
    third.resume(path)
    assert third.done == 6
    log = RunLog(path.parent)
    log.step(StepReport(0, 1.0, 1e-3, 0.5))
    assert RunLog(path.parent, 1).losses == [1.0]


@pytest.mark.parametrize(
    "name", ["CON", "nul.txt", "Com1", "a:b", "a?", "dots...", "a\tb", "a\0b", "sub/LPT9", "x" * 201]
)
def test_names_that_windows_cannot_hold_are_refused_everywhere(tmp_path, name):
    with pytest.raises(SaveError, match="is no name for a run"):
        below(tmp_path, name, "a run")
    if "/" not in name and len(name) < 200:
        with pytest.raises(SaveError, match="Nothing was changed"):
            save_lora(lora(), tmp_path / f"{name.rstrip('.')}.{'safetensors' if '...' not in name else ''}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["console", "com10", "my edits", "Ünïcode 编辑", "a.b", "sub\\x", ".hidden"])
def test_other_names_are_welcome(windows, tmp_path, name):
    path = below(tmp_path, name, "a run")
    assert path == tmp_path.joinpath(*name.split("\\"))
    save_lora(lora(), path.with_name(path.name + ".safetensors"))


def test_a_path_that_is_too_long_says_so(windows, tmp_path):
    folder = tmp_path / ("f" * 120) / ("g" * 120)
    with pytest.raises(SaveError, match=r"Nothing was changed\. The path has \d+ characters"):
        save_lora(lora(), folder / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_says_so(tmp_path):
    with pytest.raises(SaveError, match="it has 312 bytes, and 255 are allowed"):
        save_lora(lora(), tmp_path / ("x" * 300 + ".safetensors"))
    deep = tmp_path.joinpath(*["d" * 200] * 25)
    with pytest.raises(SaveError, match=r"The path has \d+ characters\. Choose a shorter name"):
        save_lora(lora(), deep / "lora.safetensors")
    assert not list(tmp_path.iterdir())


CONSOLE = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from hywu_core import Generator, GeneratorConfig, HywuError, load_generator, save_generator
from hywu_core.files.names import below
config = GeneratorConfig.from_json(Path({config!r}).read_text(encoding="utf-8"))
root = Path({folder!r})
generator = Generator(config).initialize(0)
try:
    path = below(root, "caf\\u00e9-\\u7f16", "a generator")
    saved = save_generator(generator, path.with_name(path.name + ".safetensors"))
    load_generator(saved)
    print("saved")
except HywuError as error:
    print("refused", ascii(str(error)))
generator.config.hywu["base"] = "caf\\u00e9-\\u7f16"
plain = save_generator(generator, root / "plain")
assert load_generator(plain).config.hywu["base"] == "caf\\u00e9-\\u7f16"
print("plain")
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}, "saved"), ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "refused")],
    ids=["cp1252 console", "C locale"],
)
def test_consoles_and_locales_that_are_not_utf_8(tmp_path, environment, said):
    (tmp_path / "config").write_text(config().to_json(), encoding="utf-8")
    code = CONSOLE.format(root=str(ROOT), config=str(tmp_path / "config"), folder=str(tmp_path / "made"))
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    lines = run.stdout.decode("cp1252").splitlines()
    assert lines[0].startswith(said) and lines[-1] == "plain"
    if said == "refused":
        assert "cannot be written in this system" in lines[0] and "PYTHONUTF8=1" in lines[0]


def test_a_script_says_names_that_its_console_lacks():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import in_host; print('saved \u7f16')"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120, check=False)
    assert run.returncode == 0 and run.stdout.strip() == b"saved \\u7f16"
