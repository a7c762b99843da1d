"""A generator quantised, saved, loaded again and applied, through the real server."""

import numpy as np
import pytest


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((found.astype(float) - expected.astype(float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize(("kind", "least"), [("int8", 45), ("fp8_e4m3fn", 32)])
def test_a_quantised_generator_is_saved_loaded_and_applied(studio, kind, least):
    expected = studio.picture(studio.quickstart())
    prompt = studio.quickstart(HYWULoadGenerator={"weight_dtype": kind})
    inputs = {"generator": [studio.node("HYWULoadGenerator"), 0], "filename": f"edits-{kind}", "dtype": kind}
    prompt["save"] = {"class_type": "HYWUSaveGenerator", "inputs": inputs}
    while_loading = studio.picture(prompt)
    options = studio.server.get("/object_info/HYWULoadGenerator")["HYWULoadGenerator"]["input"]["required"]["generator"]
    (saved,) = [name for name in options[1]["options"] if f"edits-{kind}" in name]
    from_file = studio.picture(studio.quickstart(HYWULoadGenerator={"generator": saved}))
    assert np.array_equal(from_file, while_loading)
    assert least < psnr(from_file, expected) < 90
    without = studio.picture(studio.quickstart(HYWUApplyLoRA={"strength": 0.0}))
    assert psnr(from_file, without) < 30, "the LoRA acts"
