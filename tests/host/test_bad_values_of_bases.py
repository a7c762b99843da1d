"""Every bad value that a reader of HunyuanImage-3's files was found to stumble over: one typed error, soon."""

import json

import hunyuan_tiny as tiny
import pytest
import torch
from bounded import bounded

from hywu_core.bases.hunyuan_image3.config import BaseConfig
from hywu_core.bases.hunyuan_image3.files import inspect_base, read_system_prompt
from hywu_core.bases.hunyuan_image3.quantised import read_mark
from hywu_core.bases.pocket import editor, text
from hywu_core.bases.pocket.editor import load_editor
from hywu_core.bases.pocket.text import load_text_encoder
from hywu_core.errors import CheckpointError
from hywu_core.files.safetensors import write_safetensors

VALUES = json.loads((tiny.FIXTURES / "base_tiny" / "config.json").read_text())
CONFIGS = {
    "vae that is a list": ({"vae": [1]}, "vae must be an object"),
    "vit that is text": ({"vit": "x"}, "vit must be an object"),
    "vit_processor that is a number": ({"vit_processor": 3}, "vit_processor must be an object"),
    "rope_scaling that is a list": ({"rope_scaling": [1.0]}, "rope_scaling must be an object"),
    "rope_scaling with a word": ({"rope_scaling": {"factor": "x"}}, "rope_scaling .* is not implemented"),
    "heads that are a list": ({"num_attention_heads": [4]}, "num_attention_heads must be a whole number"),
    "heads of -0.0": ({"num_key_value_heads": -0.0}, "num_key_value_heads must be a whole number"),
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers must be a whole number from 1 to 512"),
    "a million experts": ({"num_hidden_layers": 512, "num_experts": 4096}, "are more than 65,536"),
    "odd heads": ({"attention_head_dim": 15}, "attention_head_dim 15 is odd"),
    "a head of 2^63": ({"attention_head_dim": 2**63}, "attention_head_dim must be"),
    "shared experts of none": ({"num_shared_expert": "1"}, "num_shared_expert must be"),
    "lists in a list": ({"num_experts": [[4], [4]]}, "num_experts must be"),
    "patch_embed_hidden_dim of 33": ({"patch_embed_hidden_dim": 33}, "no multiple of 32"),
    "a size of 1": ({"image_base_size": 1}, "image_base_size must be a whole number from 16"),
    "an epsilon of none": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
    "cfg_distilled of 1": ({"cfg_distilled": 1}, "cfg_distilled must be true or false"),
    "act that is unknown": ({"vit": VALUES["vit"] | {"hidden_act": "relu7"}}, "hidden_act 'relu7' is none of"),
    "act that is a list": ({"vit": VALUES["vit"] | {"hidden_act": ["gelu"]}}, "vit.hidden_act must be text"),
    "channels of 3": ({"vae": VALUES["vae"] | {"block_out_channels": [3] * 5}}, "multiples of 32"),
    "channels of 0": ({"vae": VALUES["vae"] | {"block_out_channels": [0] * 5}}, "multiples of 32"),
    "no channels": ({"vae": VALUES["vae"] | {"block_out_channels": []}}, "multiples of 32"),
    "a million channels": ({"vae": VALUES["vae"] | {"block_out_channels": [32] * 10**6}}, "a list of 1 to 16"),
    "a million layers in a block": ({"vae": VALUES["vae"] | {"layers_per_block": 10**6}}, "layers_per_block must be"),
    "a million layers of the tower": (
        {"vit": VALUES["vit"] | {"num_hidden_layers": 10**6}},
        "vit.num_hidden_layers must",
    ),
    "patches of no square": ({"vit": VALUES["vit"] | {"num_patches": 17}}, "num_patches 17 is not a square"),
    "patches of -4": ({"vit": VALUES["vit"] | {"num_patches": -4}}, "num_patches must be"),
    "heads of the tower": ({"vit": VALUES["vit"] | {"num_attention_heads": 3}}, "no multiple of its 3 heads"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(tmp_path, case):
    change, said = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(VALUES | change))
    with bounded(), pytest.raises(CheckpointError, match=rf"config\.json.*{said}") as error:
        inspect_base(tmp_path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 50_000, "nested too deep|not valid JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deep"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"", "is empty"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, said):
    (tmp_path / "config.json").write_bytes(content)
    with bounded(), pytest.raises(CheckpointError, match=said):
        inspect_base(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"flow_shift": 0}, "generation_config.flow_shift"), ({"max_length": "x"}, "max_length"), ({"top_p": 7}, "top_p")],
)
def test_sampling(change, said):
    with pytest.raises(CheckpointError, match=said):
        BaseConfig.from_dict(VALUES, change)


def test_lists_of_equal_sizes_are_read():
    assert BaseConfig.from_dict(VALUES | {"num_experts": [4, 4, 4], "moe_topk": [2, 2, 2]}, {}).num_experts == 4


PROMPTS = {
    "text that is not UTF-8": ("system_prompt.txt", b"\xff\xfe\xfd", "is not UTF-8 text"),
    "text that is a pointer": ("system_prompt.txt", b"version https://git-lfs\n", "is a Git LFS pointer"),
    "half a character": ("system_prompt.py", b'unified_system_prompt_en = "a \\ud800"', "holds half a character"),
    "a chain of operators": ("system_prompt.py", b"x = " + b"1+" * 100_000 + b"1\n", "cannot be parsed"),
    "signs": ("system_prompt.py", b"x = " + b"-" * 100_000 + b"1\n", "cannot be parsed"),
    "brackets": ("system_prompt.py", b"x = " + b"(" * 100_000, "cannot be parsed"),
    "NUL": ("system_prompt.py", b"x = 1\0", "cannot be parsed"),
    "source that is not UTF-8": ("system_prompt.py", b"x = '\xff'", "is not UTF-8 text"),
    "two million characters": ("system_prompt.py", b"#" * 2_000_000, "has 2,000,000 characters"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_system_prompts(tmp_path, case):
    name, content, said = PROMPTS[case]
    (tmp_path / name).write_bytes(content)
    with bounded(), pytest.raises(CheckpointError, match=rf"{name}.*{said}"):
        read_system_prompt(tmp_path)


@pytest.mark.parametrize(
    "told",
    [
        torch.tensor(2**62),
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.full((10_000,), 91, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
    ],
    ids=["a number", "floats", "a matrix", "long", "empty"],
)
def test_marks_of_quantised_weights(told):
    with bounded(), pytest.raises(CheckpointError, match="x.comfy_quant is damaged"):
        read_mark("x.comfy_quant", told)


@pytest.mark.parametrize(
    "told",
    [
        "{",
        "[]",
        "{}",
        '{"axes_dim": 3, "words": 3}',
        '{"axes_dim": [1], "words": [], "x": 1}',
        '{"before": 65}',
        '{"width": "x"}',
    ],
)
@pytest.mark.parametrize("read", [load_editor, load_text_encoder])
def test_configurations_of_the_pocket_editor(tmp_path, told, read):
    path = tmp_path / "x.safetensors"
    write_safetensors(
        path, {"a": torch.zeros(1)}, {editor.CONFIG_KEY: told, text.CONFIG_KEY: told, text.WORDS_KEY: "a"}
    )
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read(path)
