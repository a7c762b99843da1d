"""What nodes show on themselves, as it is read in Chinese: in cards made by the real ways to them, no English is left."""

import dataclasses
import json
import re
from pathlib import Path

import comfy.model_management
import families
import pytest
import torch
from training_runs import interrupted_after, new, pairs, run

from hywu_core import InstanceLora, LoraFactor, knowledge
from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.host import cards, conditions, edit, generator_cards, memory, told
from hywu_core.host.folders import SHIPPED
from hywu_core.host.lora import apply, lora_cards, store
from hywu_core.host.training import evaluate, in_server, teach
from hywu_core.host.training.session import Progress
from hywu_core.training import SessionOptions
from study.methods import generator_config

ROOT = Path(__file__).resolve().parents[2]
CHINESE = json.loads((ROOT / "locales" / "zh" / "main.json").read_text(encoding="utf-8"))["hywuCards"]
PLACE = re.compile(r"{(\w+)}")
ENGLISH = re.compile(r"[A-Za-z]{2,}")
# names, units, choices by the words that workflows hold, and paths
SAME = {"HY", "WU", "LoRA", "ComfyUI", "HunyuanImage", "Flux", "PEFT", "diffusers", "stock", "told", "blind", "bypass"}
SAME |= {"Conditioning", "Concat", "GB", "MB", "kB"}
PATHS = re.compile(r"[\w.-]*/[\w./-]+|[\w-]+([._]\w+)+|pocket editor")  # and names of weights and bases
WORDS = "让画面更温暖"
LEARNED, UNKNOWN = ("亮", "暗", "暖", "冷"), "画一只红色的猫"


def text_of(said) -> str:
    """As web/cards.js makes it."""
    if isinstance(said, str):
        return said
    template = CHINESE.get(said["message"], said["message"])
    return PLACE.sub(lambda place: text_of(said["values"][place[1]]), template)


def english(card: cards.Card) -> list[str]:
    """The English words that are left of a card."""
    told = card.as_json()
    said = [told["title"], *(text for row in told["rows"] for text in row), *told["notes"]]
    texts = [text_of(one) for one in [*said, *(chart["title"] for chart in told["charts"])]]
    return [word for text in texts for word in ENGLISH.findall(PATHS.sub("", text)) if word not in SAME]


@pytest.fixture(scope="module")
def studio():
    with torch.inference_mode():
        return teach.Studio(*load_pocket_editor())


@pytest.fixture
def drawn(output, monkeypatch):
    """The cards that a node draws while it is at work."""
    found = []
    monkeypatch.setattr(cards, "of_this_node", lambda: found.append)
    return found


def test_english_would_be_seen():
    assert english(cards.Card("Saved", (("File", "a few words"),))) == ["few", "words"]
    assert english(cards.Card("Saved", (("No such row", "1"),))) == ["No", "such", "row"]
    assert english(cards.Card("Saved", (("File", "/some/where.safetensors"),))) == []


def test_a_lora_on_a_model():
    with torch.inference_mode():
        flux = families.flux()
        lora = families.random_lora(flux, 1).with_metadata(instruction=WORDS)
        extra = {f"not.there.{number}": LoraFactor(torch.ones(1, 4, 8), torch.ones(1, 8, 4)) for number in range(6)}
        extra |= {"text_encoders.q.proj": extra["not.there.0"]}
        for given in (lora, lora.changed(factors={**lora.factors, **extra})):
            for mode in ("bypass", "merge"):
                matches = apply.apply_lora(flux.model, given, 1.0, mode)[1]
                assert english(lora_cards.applied(given, matches, 1.0, mode)) == []
                assert english(lora_cards.applied(given, matches, 0.0, mode)) == []


def test_a_lora_that_is_merged_in_part():
    """Into a convolution's weight, and a bias."""
    with torch.inference_mode():
        flux = families.flux()
        lora = families.random_lora(flux, 1)
        state = store.for_the_host(lora) | {"diffusion_model.img_in.diff_b": torch.zeros(32)}
        matches = apply.apply_lora(flux.model, store.as_instance_lora(state))[1]
        assert "bias" in matches.kinds
        assert english(lora_cards.applied(lora, matches, 1.0, "auto")) == []


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("centred", [True, False])
def test_loras_looked_at(count, centred, tmp_path):
    lora = families.random_lora(families.flux(), count)
    for given in (lora, lora.with_metadata(instruction=WORDS, generator="x.safetensors")):
        assert english(lora_cards.inspected(given)) == []
        assert english(lora_cards.compared([given] * count, centred)) == []
        assert english(lora_cards.saved(given, tmp_path, None)) == []


def test_a_lora_saved_where_it_does_less():
    banks = InstanceLora({"a.experts": LoraFactor(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 8, 4))})
    for lora, dialect in (
        (banks, "stock"),
        (InstanceLora({}), "peft"),
        (InstanceLora({}, metadata={"base": "Flux"}), "peft"),
    ):
        remarks = store.remarks(lora, dialect)
        assert remarks and english(lora_cards.saved(lora, Path("/somewhere"), remarks)) == []


def knowing(name, studio, texts) -> memory.GeneratorHandle:
    """A shipped generator whose file says that it was trained on these instructions and on small pictures."""
    handle = memory.load(SHIPPED / f"{name}.safetensors")
    read = [studio.clip.encode_from_tokens(studio.clip.tokenize(text))[0] for text in (*LEARNED, *texts)]
    own = {key: value for key, value in handle.config.hywu.items() if key != knowledge.KEY}
    hywu = {**own, "instructions": list(texts)}
    hywu = knowledge.gathered(hywu, read, [(32, 32), (48, 32)])
    return handle._replace(config=dataclasses.replace(handle.config, hywu=hywu))


@pytest.mark.parametrize("name", ["pocket-generator", "pocket-generator-told"])
@pytest.mark.parametrize("texts", [(), (WORDS,), (WORDS,) * 9])
def test_a_generator(name, texts, studio, tmp_path):
    handle, file = knowing(name, studio, texts), tmp_path / "x.safetensors"
    file.touch()
    for card in (generator_cards.loaded(handle), generator_cards.made(handle), generator_cards.saved(handle, file)):
        assert english(card) == [], str(card)


@pytest.mark.parametrize("texts", [(), (WORDS,)])
def test_an_edit_far_from_what_was_learned(texts, studio):
    handle = knowing("pocket-generator", studio, texts)
    picture, said = edit.Picture(image=torch.rand(1, 16, 320, 3), vae=studio.vae), ""
    with torch.inference_mode():
        for words in (UNKNOWN, UNKNOWN * 9):
            asked = edit.Words(clip=studio.clip, instruction=words)
            done = edit.edit(studio.model, handle, asked, picture, edit.How())
            assert english(done.card) == [], str(done.card)
            said += str(done.card)
    assert all(words in said for words in ("is unlike those", "tokens, and none", "16 pixels, far"))


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("instruction", ["", WORDS])
def test_a_lora_that_was_written(more, instruction, studio):
    handle = knowing("pocket-generator", studio, ())
    ((tokens, _),) = studio.clip.encode_from_tokens_scheduled(studio.clip.tokenize(UNKNOWN))
    with torch.inference_mode():
        encoded = [[tokens, {"reference_latents": [torch.rand(1, 3, 32, 32)]}]]
        given = conditions.from_host(encoded, None, instruction)
        assert english(generator_cards.generate(handle, given, more=[given] * more).card) == []
    assert english(cards.Card("Saved", (("Time", generator_cards._time(0.5, False)),))) == []


@pytest.mark.parametrize("better", [True, False])
def test_a_generator_that_was_measured(better):
    losses = {name: torch.rand(6, 5) for name in evaluate.CONTROLS}
    losses[evaluate.MATCHED] = losses[evaluate.MATCHED] + (-2 if better else 2)
    card = evaluate.card(evaluate.Evaluation(losses, evaluate.LEVELS))
    assert card.level == (cards.GOOD if better else cards.NOTICE) and english(card) == []


@pytest.mark.parametrize("regime", ["blind", "told"])
def test_a_base_that_is_told_something_else(regime):
    drawn, read = [], torch.randn(1, 6, 16)
    watch = told.Watch(told._digest(read)[0], regime, drawn.append, cards.Card("The LoRA is on the model"))
    watch._look(read if regime == "blind" else read * 0, [0])
    assert len(drawn) == 1 and drawn[0].notes and english(drawn[0]) == []


def test_a_run_of_training(drawn):
    family = families.flux(channels=16)
    latents, positive = pairs(family)
    given = {"steps": 4, "options": {"held_out": 2, "validate_every": 1}}
    handle = new(family, positive)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        interrupted_after(2, lambda: run(family, handle, latents, positive, **given))
    drawn.append(run(family, handle, latents, positive, **given).card)
    drawn.append(run(family, handle, latents, positive, **{**given, "steps": 3}).card)
    said = "\n".join(map(str, drawn))
    for words in (
        "Getting ready",
        "Time left",
        "Held-out",
        "Last measured",
        "Stopped after",
        "goes on",
        "4 steps already",
    ):
        assert words in said
    assert [str(card) for card in drawn if english(card)] == []


def test_a_run_of_teaching(drawn, studio):
    config = generator_config(rank=2, width=32, blocks=1, instructions=[WORDS])
    options, source = SessionOptions(validate_every=0), torch.Generator().manual_seed(1)
    before = [torch.rand(1, 16, 16, 3, generator=source) for _ in range(2)]
    edit_ = teach.NewEdit(before, [picture / 2 for picture in before], [UNKNOWN])
    settings = teach.with_steps(teach.TEACH, steps=2, batch=2, memory_batch=2)
    handle = memory.new(config, 0)
    found = in_server.teach_on_server(studio, handle, edit_, (), (), settings, options, "run", teach.AS_TRAINED)
    assert "old instruction" in str(found.card) and "Distance, memory" in "".join(map(str, drawn))
    assert [str(card) for card in (*drawn, found.card) if english(card)] == []


@pytest.mark.parametrize("seconds", [5, 600, 9000])
def test_the_time_that_is_left(seconds):
    progress = Progress(1, 2, 0.5, seconds, (0.1, 0.2), None, {"loras": 0.5})
    assert english(cards.Card("Training", progress.rows())) == []
