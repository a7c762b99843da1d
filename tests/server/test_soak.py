"""Many different edits in one server: nothing grows, and what was asked for before comes from the disk."""

import json

from conftest import ROOT
from host_server import to_api_format
from soak import AGAIN, soak

COUNT, SETTLED, KEEP_GB = 40, 14, 0.05
GROWTH = 40_000  # bytes a prompt: one LoRA of these is 360,000


def test_many_edits_in_one_server(server):
    workflow = json.loads((ROOT / "workflows" / "the_long_way.json").read_text(encoding="utf-8"))
    records = soak(server, to_api_format(workflow, server.get("/object_info")), COUNT, KEEP_GB)
    assert [record.again for record in records].count(True) == COUNT // AGAIN
    assert all(record.generated != record.again for record in records)
    assert all(record.kept <= KEEP_GB * 1e9 for record in records)
    settled = [record.resident for record in records[SETTLED:]]
    half = len(settled) // 2
    grown = (min(settled[half:]) - min(settled[:half])) / half
    assert grown < GROWTH, f"{grown / 1e3:.0f} kB a prompt"
