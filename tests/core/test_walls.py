"""The load-bearing walls of the design, held by reading the source: nothing here needs the host."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE, NODES, STUDY = ROOT / "hywu_core", ROOT / "nodes", ROOT / "study"
HOST_SIDES = (CORE / "host", CORE / "bases")
HOST_MODULES = {"folder_paths", "nodes", "node_helpers", "execution", "server", "latent_preview"}

# Every id that a saved workflow may hold. An id is never renamed and never removed.
NODE_IDS = {
    "HYWULoadGenerator",
    "HYWUCondition",
    "HYWUGenerateLoRA",
    "HYWUApplyLoRA",
    "HYWUSaveLoRA",
    "HYWULoadLoRA",
    "HYWUBlendLoRAs",
    "HYWUInspectLoRA",
    "HYWUCompareLoRAs",
    "HYWUNewGenerator",
    "HYWUTrainGenerator",
    "HYWUSaveGenerator",
    "HYWUEvaluateGenerator",
    "HYWUTeachGenerator",
    "HYWULearnFromLoRAs",
    "HYWULoadHunyuanImage3",
    "HYWUHunyuanImage3Edit",
    "HYWUHunyuanImage3Condition",
    "HYWUHunyuanImage3Reason",
    "HYWULoadPocketEditor",
    "HYWUEdit",
    "HYWUPickLoRA",
    "HYWULoRAByBlock",
    "HYWUHookLoRA",
    "HYWULoadEditPairs",
}


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module(path: Path) -> str:
    """ "hywu_core.host.memory" for its file, "hywu_core.host" for the package's own."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in sources(CORE, NODES, STUDY)}


def imports(path: Path) -> dict[str, int]:
    """{module: line} of everything that a file imports, wherever in it, whole names, relative ones resolved."""
    package = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
    found = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            whole = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:  # `from . import host` names a module, `from .host import x` a thing in one
                inner = f"{whole}.{alias.name}"
                found[inner if inner in MODULES or not whole else whole] = node.lineno
    return found


def imported(path: Path) -> set[str]:
    """Top-level names of every absolute import, wherever in the file it stands."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def is_of_the_host(module: str) -> bool:
    return module.startswith("comfy") or module in HOST_MODULES


FLOORS = ("hywu_core", "hywu_core.training", "hywu_core.host", "hywu_core.bases", "nodes", "study")


def floor(module: str) -> int:
    """How high a module stands: the core, then training, the host's side, bases, what users meet."""
    return max(i for i, name in enumerate(FLOORS) if module == name or module.startswith(f"{name}.") or i == 0)


@pytest.mark.parametrize("path", sources(CORE, NODES, STUDY), ids=name)
def test_imports_go_down_only(path):
    own = floor(module(path))
    higher = [
        f"{whole}, line {line}" for whole, line in imports(path).items() if whole in MODULES and floor(whole) > own
    ]
    assert not higher


def test_no_two_modules_need_each_other():
    needs = {name: imports(path).keys() & MODULES.keys() - {name} for name, path in MODULES.items()}
    # a package's face imports its rooms; they do not import it back
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in needs[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in needs:
        visit(name, ())


OPTIONAL = ("accelerate", "torch.utils.tensorboard", "pyarrow")  # packages that may be absent, looked for on use


@pytest.mark.parametrize("path", sources(CORE, NODES, STUDY), ids=name)
def test_imports_stand_at_the_top(path):
    """An import inside a function hides a circle, or what a file needs."""
    for function in ast.walk(tree(path)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    assert node.module.startswith(OPTIONAL), f"line {node.lineno}"
                elif isinstance(node, ast.Import):
                    assert all(alias.name.startswith(OPTIONAL) for alias in node.names), f"line {node.lineno}"


PURE = [path for path in sources(CORE) if not any(path.is_relative_to(side) for side in HOST_SIDES)]
BASES = sorted(folder.name for folder in (CORE / "bases").iterdir() if (folder / "__init__.py").exists())


@pytest.mark.parametrize("path", PURE, ids=name)
def test_the_core_does_not_know_the_host(path):
    assert not {name for name in imported(path) if is_of_the_host(name)}
    assert not {whole for whole in imports(path) if whole.startswith(("hywu_core.host", "hywu_core.bases"))}


@pytest.mark.parametrize("path", [path for path in sources(CORE) if CORE / "bases" not in path.parents], ids=name)
def test_only_a_base_knows_its_name(path):
    """Neither the core nor the host's side names a base in its code; what it says in prose is its own affair."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    for node in ast.walk(tree(path)):
        word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            word = node.value
        named = [base for base in BASES if word and base in word.lower().replace("-", "_")]
        assert not named, f"{named[0]} in line {node.lineno}"


@pytest.mark.parametrize("path", sources(CORE), ids=name)
def test_the_core_imports_itself_relatively(path):
    """It is imported as hywu_core and as custom_nodes.<folder>.hywu_core."""
    assert not imported(path) & {"hywu_core", "custom_nodes"}


@pytest.mark.parametrize("path", sources(NODES), ids=name)
def test_nodes_hold_no_tensor_arithmetic(path):
    assert not imported(path) & {"torch", "numpy", "math", "safetensors", "comfy"}
    arithmetic = (ast.Mult, ast.MatMult, ast.Div, ast.Pow, ast.Sub)
    found = [node for node in ast.walk(tree(path)) if isinstance(node, ast.BinOp) and isinstance(node.op, arithmetic)]
    assert not found, f"line {found[0].lineno}"


@pytest.mark.parametrize("path", sources(CORE, NODES), ids=name)
def test_nothing_is_placed_on_a_gpu_behind_the_hosts_back(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", f"line {node.lineno}"
            assert node.attr != "autocast" or path.parent.name == "training", f"line {node.lineno}"  # mixed precision
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith("cuda"), f"line {node.lineno}"


@pytest.mark.parametrize("path", sources(CORE), ids=name)
def test_layers_with_parameters_come_from_injected_operations(path):
    layers = {"Linear", "Embedding", "LayerNorm", "RMSNorm", "GroupNorm", "Conv1d", "Conv2d", "Conv3d"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in layers:
            assert ast.unparse(node.func.value) not in ("nn", "torch.nn"), f"line {node.lineno}"


@pytest.mark.parametrize("path", sources(CORE, NODES), ids=name)
def test_no_pickle_no_eval_and_cancelling_passes_through(path):
    assert not imported(path) & {"pickle", "subprocess", "requests", "urllib"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):  # the host cancels with a BaseException
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {""}
            reraised = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert reraised or not caught & {"", "BaseException"}, f"line {node.lineno}"


def node_ids() -> list[str]:
    calls = [node for path in sources(NODES) for node in ast.walk(tree(path)) if isinstance(node, ast.keyword)]
    return [call.value.value for call in calls if call.arg == "node_id"]


def test_node_ids_are_frozen():
    ids = node_ids()
    assert len(ids) == len(set(ids))
    assert set(ids) == NODE_IDS, (
        "a released node was renamed or removed, or a new one needs an id in NODE_IDS, for ever"
    )


def test_every_node_has_a_help_page():
    """As <node id>/<language>.md: the frontend asks for its own language there, and for no other."""
    pages = {page.parent.name for page in (ROOT / "web" / "docs").glob("*/en.md")}
    assert pages >= set(node_ids())
    assert not list((ROOT / "web" / "docs").glob("*.md"))


def test_there_is_one_folder_of_templates():
    """The host mounts several at one address, and looks into no sub-folders."""
    names = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in names if (ROOT / name).exists()] == ["workflows"]
    assert not [path for path in (ROOT / "workflows").iterdir() if path.is_dir()]


def test_what_is_published_starts_no_processes():
    """The registry flags a version whose files can, and flagged versions silently disappear from ComfyUI's manager."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--", "*.py"]
    files, kept_out = (
        set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")) - {""}
        for command in (listed, [*listed[:4], "--ignored", "--exclude-from=.comfyignore", *listed[4:]])
    )
    published = [ROOT / file for file in files - kept_out if (ROOT / file).exists()]
    assert ROOT / "nodes" / "lora.py" in published and ROOT / "tests" / "conftest.py" not in published
    assert not [name(path) for path in published if imported(path) & {"subprocess", "socket", "pickle"}]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the pack in a folder whose name is no name of a package."""
    checkout = tmp_path / "my-checkout of.hywu"
    for folder in ("nodes", "hywu_core"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(ROOT / "__init__.py", checkout)
    return checkout


def test_the_door_opens_outside_the_host_as_a_package_and_as_a_file(checkout):
    for package in ("[str(door.parent)]", "None"):
        code = (
            "import importlib.util, pathlib, sys; door = pathlib.Path('__init__.py').resolve()\n"
            f"spec = importlib.util.spec_from_file_location(door.parent.name, door, submodule_search_locations={package})\n"
            "pack = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(pack)\n"
            "print(pack.WEB_DIRECTORY, hasattr(pack, 'comfy_entrypoint'))"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120)
        assert result.stdout == "./web False\n", result.stderr


def test_tests_are_collected_without_the_host_whatever_the_folder_is_called(checkout):
    (checkout / "tests" / "core").mkdir(parents=True)
    for file in ("pyproject.toml", "tests/conftest.py", "tests/core/test_walls.py"):
        shutil.copy(ROOT / file, checkout / file)
    command = [sys.executable, "-m", "pytest", "--quiet", "-k", "node_ids_are_frozen"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout
