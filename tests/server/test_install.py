"""Clean installs: what is published, unpacked or cloned into a fresh ComfyUI by names that people give it, works there."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import pytest
from demo import PICTURE, draw_picture
from host_server import HostServer, to_api_format

ROOT = Path(__file__).resolve().parents[2]
SERVED, UNSERVED = True, False


def git(*arguments: str, cwd: Path = ROOT) -> str:
    command = ["git", "-c", "core.quotepath=off", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def unpack_package(folder: Path) -> None:
    """As the registry packs it and a node manager unpacks it: what git tracks, less .comfyignore."""
    left_out = set(git("ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore").split("\0"))
    package = folder.parent.parent / "package.zip"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(set(git("ls-files", "-z", "--cached").split("\0")) - left_out):
            packed.write(ROOT / name, name)
    zipfile.ZipFile(package).extractall(folder)


def clone(folder: Path) -> None:
    git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder))


@pytest.mark.parametrize(
    ("install", "name", "served"),
    [
        pytest.param(unpack_package, "hywu", SERVED, id="package"),
        pytest.param(clone, "ComfyUI_HY-WU", SERVED, id="clone"),
        pytest.param(unpack_package, "HY WU (1)", UNSERVED, id="package unpacked by hand, twice"),
    ],
)
def test_a_fresh_host_runs_the_quickstart(tmp_path, host_dir, install, name, served):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    install(tmp_path / "custom_nodes" / name)
    with HostServer(sys.executable, host_dir, tmp_path, name, ("--base-directory", str(tmp_path))) as server:
        draw_picture(server.input / PICTURE)
        nodes = server.get("/object_info")
        modules = {node["python_module"] for key, node in nodes.items() if key.startswith("HYWU")}
        assert modules == {f"custom_nodes.{name}"}
        workflow = json.loads((ROOT / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
        run = server.run(to_api_format(workflow, nodes))
        assert run.outcome == "execution_success", run.messages[-1]
        assert list(server.output.rglob("*.png"))
        for kind in ("hywu", "hunyuan_image3"):
            assert (tmp_path / "models" / kind / "put_files_here.txt").is_file()
        for path in (f"/extensions/{name}/docs/HYWUApplyLoRA/en.md", f"/api/workflow_templates/{name}/quickstart.json"):
            assert is_found(server.url + urllib.parse.quote(path)) == served
        assert ("Rename the folder to hywu" in server.log.read_text(encoding="utf-8")) != served


def is_found(url: str) -> bool:
    try:
        return urllib.request.urlopen(url).status == 200
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return False
