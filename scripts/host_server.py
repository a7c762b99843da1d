"""A real ComfyUI server, started for the demo and the tests, and the few calls that they make to it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

START_SECONDS = 600  # a cold start on a slow disk, or on a machine that is busy with other things
RUN_SECONDS = 300
FRONTEND_ONLY = {"Note", "MarkdownNote"}  # nodes that the server never sees
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own
MUTED = 2  # a node's mode in saved workflows: it does not run, nor does what hangs on it
TEXT_MESSAGE = 3  # of the host's binary events
LAST_MESSAGES = {"execution_success", "execution_error", "execution_interrupted"}


@dataclass
class Run:
    """What the server said about one prompt, in order."""

    prompt_id: str
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # below nodes: (node, text)

    @property
    def outcome(self) -> str:
        """execution_success, execution_error or execution_interrupted."""
        return self.messages[-1][0]

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order."""
        return [data["node"] for kind, data in self.messages if kind == "executing" and data["node"]]

    @property
    def cached(self) -> set[str]:
        """Ids of the nodes whose earlier result was used."""
        return {node for kind, data in self.messages if kind == "execution_cached" for node in data["nodes"]}

    @property
    def error(self) -> str:
        """The message of the node that failed."""
        return next(data["exception_message"] for kind, data in self.messages if kind == "execution_error")

    def files(self, node: str) -> list[str]:
        """Pictures that an output node saved, relative to the output folder."""
        shown = [data["output"] for kind, data in self.messages if kind == "executed" and data["node"] == node]
        return [os.path.join(image["subfolder"], image["filename"]) for out in shown for image in out.get("images", ())]


class HostServer:
    """ComfyUI in a process of its own, with folders of its own below `folder`, and no node pack but this one.

    Use as a context manager. `log` is everything that it printed. `cpu` keeps it to the CPU, whatever the machine has.
    """

    def __init__(
        self,
        python: str | Path,
        host: Path,
        folder: Path,
        pack: str = "hywu",
        arguments: tuple[str, ...] = (),
        cpu: bool = True,
    ):
        self.folder, self.log = Path(folder).resolve(), Path(folder).resolve() / "server.log"
        self.input, self.output = self.folder / "input", self.folder / "output"
        for path in (self.input, self.output, self.folder / "user"):
            path.mkdir(parents=True, exist_ok=True)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(str(python), str(host / "main.py"), "--port", str(self.port)),
            *(("--cpu",) if cpu else ()),
            *("--input-directory", str(self.input), "--output-directory", str(self.output)),
            *("--temp-directory", str(self.folder), "--user-directory", str(self.folder / "user")),
            *("--database-url", "sqlite:///:memory:", "--disable-api-nodes"),
            *("--disable-all-custom-nodes", "--whitelist-custom-nodes", pack),
            *arguments,
        ]
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> HostServer:
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def resident(self) -> int:
        """Bytes of memory that the process takes now."""
        return psutil.Process(self._process.pid).memory_info().rss

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, data: dict | None = None) -> str:
        """Send JSON to a path, return the answer's text."""
        body, headers = json.dumps(data or {}).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers), timeout=60) as response:
            return response.read().decode()

    def run(
        self, prompt: dict, on_message: Callable[[str, dict], None] | None = None, seconds: float = RUN_SECONDS
    ) -> Run:
        """Queue an API-format prompt and follow it over the websocket to its end.

        Raises:
            RuntimeError: with the server's reasons, if it does not accept the prompt.
            TimeoutError: if it does not end in time.
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_message), seconds))

    async def _run(self, prompt: dict, on_message: Callable[[str, dict], None] | None) -> Run:
        client = os.urandom(8).hex()
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_:
                async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                    reply = await answer.json()
                    if answer.status != 200 or reply["node_errors"]:  # one valid output is enough for a status of 200
                        raise RuntimeError(f"The server refused the prompt: {json.dumps(reply)}")
                    run = Run(reply["prompt_id"])
                async for message in socket_:
                    if message.type != aiohttp.WSMsgType.TEXT:
                        run.texts += _text_of(message.data)
                        continue
                    kind, data = (content := json.loads(message.data))["type"], content["data"]
                    if data.get("prompt_id") != run.prompt_id:
                        continue
                    run.messages.append((kind, data))
                    if on_message:
                        on_message(kind, data)
                    if kind in LAST_MESSAGES:
                        return run
        raise RuntimeError(f"The server closed the connection; its log is {self.log}.")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI did not start; its log is {self.log}:\n{self.log.read_text()[-2000:]}")
            try:
                return self.get("/system_stats")
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"ComfyUI did not answer within {START_SECONDS} s; its log is {self.log}.")


def to_api_format(workflow: dict, object_info: dict) -> dict:
    """A workflow as the frontend saves it -> the prompt that it would queue.

    Covers what the shipped workflows use: links, widgets in their order, notes, muted nodes with all that hangs on them. No
    subgraphs, reroutes, bypassed nodes.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONTEND_ONLY or node.get("mode") == MUTED:
            continue
        inputs = _widget_inputs(object_info[node["type"]]["input"], list(node.get("widgets_values") or []))
        linked = {
            slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None
        }
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return prompt


def widgets_of(schema: dict, chosen: dict[str, Any]) -> Iterator[tuple[str, Any, dict]]:
    """(name, type, options) of every widget of a node, in the order in which their values are saved.

    Args:
        schema: "input" of /object_info.
        chosen: values so far, filled by the caller while this runs: a dynamic choice brings the inputs of its option.
    """
    yield from _widgets("", schema, chosen)


def _widgets(prefix: str, schema: dict, chosen: dict[str, Any]) -> Iterator[tuple[str, Any, dict]]:
    for name, (kind, *rest) in {**schema.get("required", {}), **schema.get("optional", {})}.items():
        options, name = rest[0] if rest else {}, prefix + name
        if kind == DYNAMIC_COMBO:
            yield name, kind, options
            key = chosen.get(name, options["options"][0]["key"])
            yield from _widgets(f"{name}.", next(o["inputs"] for o in options["options"] if o["key"] == key), chosen)
        elif (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput"):
            yield name, kind, options


def _text_of(message: bytes) -> list[tuple[str, str]]:
    """The text for a node in a binary message of the host's protocol; none in a preview picture."""
    kind, length = (int.from_bytes(message[start : start + 4], "big") for start in (0, 4))
    if kind != TEXT_MESSAGE:
        return []
    return [(message[8 : 8 + length].decode(), message[8 + length :].decode())]


def _widget_inputs(schema: dict, values: list) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, _, options in widgets_of(schema, inputs):
        if not values:
            # saved before the node had this widget: its default holds
            break
        inputs[name] = values.pop(0)
        if options.get("control_after_generate") or options.get("image_upload"):
            # "fixed", "randomize", ...; the upload button
            del values[:1]
    return inputs


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
