"""The library as `pip install .` gives it: built into a wheel, unpacked elsewhere, and used from there."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "hywu_core", "nodes", "study", "scripts")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built offline, from a copy: a build leaves folders beside its sources."""
    pytest.importorskip("setuptools", "77", reason="setuptools is not installed (requirements-dev.txt)")
    copy, out = tmp_path_factory.mktemp("sources") / "pack", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(code: str, unpacked: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(unpacked)!r})\n{code}", *arguments]
    result = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_the_wheel_is_the_library_and_all_of_it(wheel, unpacked):
    packaged = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {path.parts[0] for path in packaged if not path.parts[0].endswith(".dist-info")} == {"hywu_core"}
    core = ROOT / "hywu_core"
    wanted = {path.relative_to(ROOT) for path in core.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert wanted <= packaged


def test_its_metadata_say_what_it_needs_and_may(unpacked):
    (file,) = unpacked.glob("*.dist-info/METADATA")
    metadata = Parser().parsestr(file.read_text(encoding="utf-8"))
    needs = [need.split(";")[0].strip() for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(need.split(">")[0] for need in needs) == ["numpy", "safetensors", "torch"]
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License"] is None
    assert {line.split(",")[0] for line in metadata.get_all("Project-URL")} >= {"Homepage", "Repository", "Issues"}


def test_node_managers_install_nothing():
    """They read requirements.txt; torch there would replace the one that ComfyUI runs with."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") for line in lines if line.strip())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "dependencies" not in project.get("dynamic", [])


def git(*arguments: str) -> list[str]:
    """Paths that git lists. Without git, or outside a checkout, the test is skipped."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "-c", "core.quotepath=off", "ls-files", "-z", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def published() -> set[str]:
    """What the registry packs: what git tracks, less .comfyignore."""
    return set(git("--cached")) - set(git("--cached", "--ignored", "--exclude-from=.comfyignore"))


def test_what_is_published_is_the_product(published, tmp_path):
    """In full, and nothing that only develops or tests it; at most 20 MB."""
    roots = {name.split("/")[0] for name in published}
    wanted = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE"}
    wanted |= {"docs", "hywu_core", "locales", "models", "nodes", "scripts", "web", "workflows"}
    assert roots - {"subgraphs"} == wanted
    for folder in ("hywu_core", "nodes", "web", "locales", "models", "workflows", "subgraphs"):
        assert set(git("--cached", "--", folder)) <= published, folder
    kinds = {Path(name).suffix for name in published if "/" in name}
    assert kinds <= {".py", ".md", ".json", ".jsonl", ".txt", ".safetensors", ".png", ".jpg", ".webp", ".js"}, kinds
    with zipfile.ZipFile(tmp_path / "pack.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(published):
            packed.write(ROOT / name, name)
    assert (tmp_path / "pack.zip").stat().st_size <= 20e6


def test_published_scripts_need_nothing_that_is_not_published(published):
    scripts = [ROOT / name for name in published if name.startswith("scripts/") and name.endswith(".py")]
    assert ROOT / "scripts" / "train.py" in scripts
    private = {path.stem for path in (ROOT / "scripts").glob("*.py") if path not in scripts} | {"study", "tests"}
    for path in scripts:
        needs = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not private & set(needs), path.name


def test_the_registry_reads_what_it_shows():
    """Pictures as it wants them, at addresses that exist in this tree; classifiers of its list: one wrong entry drops all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy, repository = project["tool"]["comfy"], project["project"]["urls"]["Repository"]
    address = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    sizes = {}
    for key in ("Icon", "Banner"):
        assert comfy[key].startswith(address)
        with Image.open(ROOT / comfy[key].removeprefix(address)) as picture:
            sizes[key] = picture.size
    assert sizes["Icon"][0] == sizes["Icon"][1] <= 400
    assert sizes["Banner"][0] * 9 == sizes["Banner"][1] * 21
    accelerators = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal"}
    named = [line for line in project["project"]["classifiers"] if line.startswith("Environment :: ")]
    assert named and {line.removeprefix("Environment :: GPU :: ") for line in named} <= accelerators
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    for model in comfy["Models"]:
        assert model["location"].split("/")[0] in ("hywu", "hunyuan_image3")
        assert model["model_url"].startswith("https://huggingface.co/tencent/")


def test_sources_can_be_printed_on_any_console(published):
    """A console of Windows holds cp1252; checks of other people ask for that."""
    for name in published:
        if name.endswith(".py"):
            (ROOT / name).read_text(encoding="utf-8").encode("cp1252")


def test_the_core_works_without_the_host(unpacked):
    code = """
import torch, hywu_core
from hywu_core import Generator, GeneratorConfig, load_generator, save_generator
config = GeneratorConfig.from_dict({"d_model": 16, "head_dim": 8, "num_pg_layers": 1, "input_dim": 8, "output_dim": 8,
    "token_dim": 8, "rank": 2, "num_base_model_layers": 1, "alpha": 4, "dim_accumulation": 2,
    "pg_mapping": {"b": {"lora_A_dim": 6, "lora_B_dim": 10}}})
save_generator(Generator(config).initialize(), "generator")
lora = load_generator("generator").generate(torch.randn(1, 5, 8))
print(hywu_core.__file__, any(name.split(".")[0] == "comfy" for name in sys.modules), lora.rank)
"""
    assert run(code, unpacked) == f"{unpacked / 'hywu_core' / '__init__.py'} False 2"


def test_the_pocket_editor_loads_with_the_hosts_path(unpacked, host_dir):
    code = """
host, sys.argv = sys.argv[1], ["test", "--cpu"]
sys.path.append(host)
import comfy.options
comfy.options.enable_args_parsing()
import torch, hywu_core
from hywu_core.bases import pocket
model, clip, vae = pocket.load_pocket_editor()
tokens = clip.encode_from_tokens(clip.tokenize("make it warmer"))
print(hywu_core.__file__, tokens.shape[0], tuple(vae.encode(torch.rand(1, 16, 16, 3)).shape))
"""
    assert run(code, unpacked, str(host_dir)) == f"{unpacked / 'hywu_core' / '__init__.py'} 1 (1, 3, 16, 16)"


def test_scripts_find_the_host_that_the_pack_lies_in(tmp_path, monkeypatch):
    """As a copy in custom_nodes and as a link there; without either, the error says what to do."""
    host = tmp_path / "My ComfyUI"
    (host / "comfy").mkdir(parents=True)
    (host / "custom_nodes").mkdir()
    (host / "comfy" / "sd.py").touch()
    (host / "comfy" / "__init__.py").touch()
    (host / "comfy" / "options.py").write_text("def enable_args_parsing():\n    print('host', __file__)\n")
    (host / "comfy" / "cli_args.py").touch()
    elsewhere = tmp_path / "a" / "checkout"
    for folder in (host / "custom_nodes" / "copied", elsewhere):
        (folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "in_host.py", folder / "scripts")
        (folder / "scripts" / "show.py").write_text("from in_host import enter_host\nenter_host()\n")
    (host / "custom_nodes" / "linked").symlink_to(elsewhere)
    monkeypatch.delenv("COMFYUI_DIR", raising=False)

    def called(folder):
        command = [sys.executable, str(folder / "scripts" / "show.py")]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    for name in ("copied", "linked"):
        assert called(host / "custom_nodes" / name).stdout == f"host {host / 'comfy' / 'options.py'}\n"
    lost = called(elsewhere)
    assert lost.returncode == 1 and "Put this folder into ComfyUI's custom_nodes, set COMFYUI_DIR" in lost.stderr
