"""What an artist can get wrong is one clear error in the node where it is wrong, and the next run is right."""

import pytest

WRONG_GENERATORS = {
    "truncated/": ("HYWULoadGenerator", ["model.safetensors", "truncated"]),
    "empty/": ("HYWULoadGenerator", ["neither model.safetensors nor"]),
    "pickle/": ("HYWULoadGenerator", ["pytorch_model.bin", "pickles, which are refused"]),
    "no-config/weights.safetensors": ("HYWULoadGenerator", ["no generator configuration", "config.json"]),
    "renamed.safetensors": (
        "HYWULoadGenerator",
        ["missing model.blocks.0.norm1.weight [128]", "unexpected model.blocks.0.norm1.weight_ [128]"],
    ),
    "integer.safetensors": ("HYWULoadGenerator", ["model.blocks.0.norm1.weight is stored as I32", "floating-point"]),
    "rank.safetensors": ("HYWULoadGenerator", ["rank 3 must be divisible by dim_accumulation 2"]),
    "nan.safetensors": ("HYWUGenerateLoRA", ["not finite", "layer"]),
    "narrow.safetensors": ("HYWUGenerateLoRA", ["(1, 32, 64)", "32)"]),
    "other-base.safetensors": ("HYWUApplyLoRA", ["None of the LoRA's 16 targets", "transformer_blocks.0"]),
}


@pytest.mark.parametrize("name", WRONG_GENERATORS)
def test_wrong_generators(studio, name):
    kind, expected = WRONG_GENERATORS[name]
    before = sorted(studio.server.output.rglob("*"))
    run = studio.run(studio.quickstart(HYWULoadGenerator={"generator": name}, KSampler={"seed": 1234}))
    assert run.outcome == "execution_error"
    assert run.messages[-1][1]["node_id"] == studio.node(kind)
    for words in expected:
        assert words in run.error
    after = [path for path in sorted(studio.server.output.rglob("*")) if path not in before]
    assert all(path.name.startswith("test") for path in after)  # the source picture, saved before the error


def test_the_run_after_an_error_is_right(studio):
    studio.run(studio.quickstart(HYWULoadGenerator={"generator": "nan.safetensors"}))
    assert studio.run(studio.quickstart()).outcome == "execution_success"


def save_lora(studio, prefix: str) -> dict:
    prompt = studio.quickstart()
    save = {"lora": [studio.node("HYWUGenerateLoRA"), 0], "filename_prefix": prefix, "format": "stock"}
    prompt["save"] = {"class_type": "HYWUSaveLoRA", "inputs": save | {"dtype": "as generated"}}
    return prompt


def test_an_output_folder_that_cannot_be_written_to(studio):
    blocked = studio.server.output / "blocked"
    blocked.write_text("a file where a folder should be")  # permissions would not stop root
    run = studio.run(save_lora(studio, "blocked/lora"))
    assert run.outcome == "execution_error"
    assert run.messages[-1][1]["node_id"] == "save"
    assert str(blocked) in run.error
    assert blocked.read_text() == "a file where a folder should be"
    blocked.unlink()


def test_a_saved_lora_is_one_whole_file(studio):
    run = studio.run(save_lora(studio, "loras/kept"))
    assert run.outcome == "execution_success"
    (file,) = (studio.server.output / "loras").glob("*kept*")
    assert file.suffix == ".safetensors"


def test_a_generator_that_is_not_there_is_refused_before_anything_runs(studio):
    with pytest.raises(RuntimeError, match="value_not_in_list"):
        studio.run(studio.quickstart(HYWULoadGenerator={"generator": "../../secret.safetensors"}))


def test_a_damaged_lora_file_is_named(studio):
    assert studio.run(save_lora(studio, "loras/damaged")).outcome == "execution_success"
    (file,) = (studio.server.output / "loras").glob("damaged_*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    prompt = studio.quickstart(HYWUApplyLoRA={"lora": ["load", 0]})
    prompt["load"] = {"class_type": "HYWULoadLoRA", "inputs": {"lora": file.name}}
    run = studio.run(prompt)
    assert run.outcome == "execution_error"
    assert run.messages[-1][1]["node_id"] == "load"
    assert str(file) in run.error and "truncated" in run.error
