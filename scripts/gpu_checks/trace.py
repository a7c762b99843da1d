"""What a device did while something ran, out of the profiler's trace."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # beginnings: each of them has variants
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


class Profile:
    """Watches a device from `start` to `stop`. On a CPU there is nothing to see."""

    def __init__(self, device: Any):
        self.device = device
        self._profile: Any = None
        self._began = 0.0

    def start(self) -> None:
        import torch

        if self.device.type != "cuda":
            return
        torch.accelerator.synchronize(self.device)
        # without the CPU's own operators, which nothing here is about: the trace is ten times smaller
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()
        self._began = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """See `numbers_of`; nothing on a CPU, or if it was never started."""
        import torch

        if self._profile is None:
            return {}
        torch.accelerator.synchronize(self.device)
        wall = time.perf_counter() - self._began
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        self._profile = None
        return numbers_of(events, wall)


def numbers_of(events: Iterable[dict[str, Any]], wall: float) -> dict[str, float]:
    """Of a trace's events: launches, waits, copies to the device, and which share of the wall time kernels, copies and both
    at once took.
    """
    found = {"launches": 0, "waits": 0, "copies_to_device": 0, "copied_gb": 0.0}
    kernels, copies = [], []
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in ("cuda_runtime", "cuda_driver"):
            found["launches"] += name.startswith(LAUNCHES)
            found["waits"] += name in WAITS
        elif kind == "kernel":
            kernels.append((event["ts"], event["ts"] + event["dur"]))
        elif kind == "gpu_memcpy" and "HtoD" in name:
            copies.append((event["ts"], event["ts"] + event["dur"]))
            found["copies_to_device"] += 1
            found["copied_gb"] += event.get("args", {}).get("bytes", 0) / 1e9
    computing, copying, either = (covered(part) / 1e6 / wall for part in (kernels, copies, kernels + copies))
    return found | {"busy": computing, "copying": copying, "both_at_once": computing + copying - either}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what spans cover together."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
