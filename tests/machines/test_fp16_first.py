"""A device on which the host would rather compute in float16, as on NVIDIA cards: what was trained in bfloat16
overflows there.
"""

import hunyuan_tiny as tiny
import pytest
import torch
from second_device import Machine, host_on

from hywu_core.bases.hunyuan_image3 import files, loader
from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.host import memory

TURING = (torch.bfloat16,)  # has no bfloat16
SOME_FP8 = [torch.float8_e4m3fn]


@pytest.mark.parametrize(
    ("stored", "lacks", "computed"),
    [
        ("fp8_e4m3fn", (), torch.bfloat16),
        ("bfloat16", (), torch.bfloat16),
        ("float16", (), torch.float16),
        ("float32", (), torch.float32),
        ("fp8_e4m3fn", TURING, torch.float32),
        ("bfloat16", TURING, torch.float32),
    ],
)
def test_a_generator(fixtures_dir, stored, lacks, computed):
    with host_on(Machine(lacks), fp16_first=True):
        assert memory.load(fixtures_dir / "gen_2", memory.WEIGHT_DTYPES[stored]).compute_dtype is computed


@pytest.mark.parametrize(("lacks", "computed"), [((), torch.bfloat16), (TURING, torch.float32)])
def test_hunyuan_image3(lacks, computed):
    with host_on(Machine(lacks), fp16_first=True):
        folder = files.inspect_base(tiny.FIXTURES / "base_tiny")
        for stored in (torch.bfloat16, *SOME_FP8):
            model = loader.load_model(folder.folder, stored)
            assert model.model.get_dtype_inference() is computed
            assert loader.load_tower(folder, stored)[1] is computed


def test_the_pocket_editor_says_what_it_can_compute_in():
    with host_on(Machine(), fp16_first=True):
        assert load_pocket_editor()[0].model.get_dtype_inference() is torch.bfloat16
