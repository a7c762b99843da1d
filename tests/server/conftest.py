"""One real ComfyUI server for all tests in this folder, over HTTP and the websocket, with its own folders."""

import copy
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SAVED = ROOT / "tests" / "fixtures" / "workflows_0_1"  # the templates of 0.1.0, as artists have saved them
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

from bad_generators import write_bad_generators  # noqa: E402
from demo import PICTURE, draw_picture  # noqa: E402
from host_server import HostServer, Run, to_api_format  # noqa: E402
from hunyuan_tiny import FIXTURES, make_folder  # noqa: E402


class Studio:
    """What a test does with the server: run the quickstart, changed a little, and look at what came out."""

    def __init__(self, server: HostServer, quickstart: dict):
        self.server = server
        self._quickstart = quickstart
        self._names = itertools.count()

    def quickstart(self, **changes: dict) -> dict:
        """The quickstart as a prompt; changes are `NodeClass={"input": value}`. Its picture is always saved anew."""
        prompt = copy.deepcopy(self._quickstart)
        for kind, inputs in changes.items():
            prompt[self.node(kind)]["inputs"] |= inputs
        for node in prompt.values():
            if node["class_type"] == "SaveImage":
                node["inputs"]["filename_prefix"] = f"test{next(self._names)}"
        return prompt

    def node(self, kind: str) -> str:
        """The id of the quickstart's last node of a class."""
        return [name for name, node in self._quickstart.items() if node["class_type"] == kind][-1]

    def run(self, prompt: dict, on_message=None) -> Run:
        return self.server.run(prompt, on_message)

    def picture(self, prompt: dict) -> np.ndarray:
        """Run a prompt to its end and read the picture that its last SaveImage wrote: (H, W, 3), uint8."""
        run = self.run(prompt)
        assert run.outcome == "execution_success", run.messages[-1]
        return np.asarray(Image.open(self.server.output / run.files(self.node("SaveImage"))[0]))


@pytest.fixture(scope="session")
def server(host_dir, tmp_path_factory) -> HostServer:
    folder = tmp_path_factory.mktemp("server")
    generators = folder / "more models" / "hywu"
    write_bad_generators(ROOT / "models" / "pocket-generator.safetensors", generators)
    shutil.copytree(FIXTURES / "pg_tiny", generators / "tiny")
    make_folder(generators.parent / "hunyuan_image3" / "tiny")
    paths = folder / "extra_model_paths.yaml"
    kinds = {kind: kind for kind in ("hywu", "hunyuan_image3")}
    paths.write_text(json.dumps({"elsewhere": {"base_path": str(generators.parent), **kinds}}))
    pack = os.environ.get("HYWU_PACK_NAME", "hywu")
    with HostServer(sys.executable, host_dir, folder, pack, ("--extra-model-paths-config", str(paths))) as server:
        draw_picture(server.input / PICTURE)
        yield server


@pytest.fixture(scope="session")
def studio(server) -> Studio:
    workflow = json.loads((SAVED / "quickstart.json").read_text(encoding="utf-8"))
    return Studio(server, to_api_format(workflow, server.get("/object_info")))
