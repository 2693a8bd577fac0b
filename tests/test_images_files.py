"""A model that sees images as files, and on the command line: loaded with its processor, written
with it, and shown images by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForConditionalGeneration

import trimtab as tt
from commands import Command, home, refused, trimtab, work
from seeing import (
    about,
    inputs_alone,
    saved,
    seeing,
    seeing_model,
    seeing_processor,
    seeing_tokenizer,
    square,
)

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

NEW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers writes it, and pictures beside it."""
    place = tmp_path_factory.mktemp("seeing")
    seeing_model().save_pretrained(place / "model")
    seeing_processor().save_pretrained(place / "model")
    saved(place)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tt.LanguageModel:
    lm = tt.load(folder / "model", device="cpu")
    lm.model.generation_config.eos_token_id = None
    return lm


def test_a_checkpoint_is_loaded_with_its_eyes(loaded: tt.LanguageModel) -> None:
    assert type(loaded.model) is Gemma3ForConditionalGeneration
    assert type(loaded.processor).__name__ == "Gemma3Processor"
    prompt = about("What is this? ", square("red"))
    expected = seeing().generate([prompt], max_new_tokens=NEW)[0]
    assert loaded.generate([prompt], max_new_tokens=NEW)[0].tokens == expected.tokens


def test_it_is_written_with_its_processor(loaded: tt.LanguageModel, tmp_path: Path) -> None:
    place = loaded.save_pretrained(tmp_path / "again")
    assert (place / "processor_config.json").exists()
    again = tt.load(place, device="cpu")
    prompt = about("What is this? ", square("red"))
    assert torch.equal(again.logits([prompt]), loaded.logits([prompt]))
    loaded.save_pretrained(place, overwrite=True)  # its files are a checkpoint's, all of them
    assert (place / "processor_config.json").exists()


def test_the_template_of_a_processor_is_taken(folder: Path, tmp_path: Path) -> None:
    """Some checkpoints have it for their processor only."""
    shutil.copytree(folder / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    lm = tt.load(tmp_path / "model", device="cpu")
    assert lm.chats
    assert "<boi>" in lm.render(lm.prompts([about("What? ", square("red"))], True)[0])


def test_a_processor_where_the_tokenizer_is_wanted() -> None:
    model, processor = seeing_model(), seeing_processor()
    lm = tt.wrap(model, processor)
    assert lm.processor is processor
    assert lm.tokenizer is seeing_tokenizer()
    with pytest.raises(tt.TrimtabError, match="makes no inputs of texts with images: AutoProc"):
        tt.wrap(model, seeing_tokenizer(), processor=seeing_tokenizer())


@pytest.mark.parametrize("damage", ["gone", "broken"])
def test_without_its_processor_it_still_reads_text(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    if damage == "gone":
        file.unlink()
    else:
        file.write_text("{")
    lm = tt.load(tmp_path / "model", device="cpu")
    assert lm.processor is None
    assert lm.generate(["Today I feel"], max_new_tokens=NEW)
    said = {
        "gone": "there is no image processor among its files",
        "broken": "its processor cannot be loaded",
    }
    with pytest.raises(tt.TrimtabError, match=said[damage]) as caught:
        lm.generate([about("What? ", square("red"))])
    assert "\n" not in str(caught.value)


# -- the command line -----------------------------------------------------------------------------


def by_transformers(lm: tt.LanguageModel, prompt: Any) -> list[int]:
    given = inputs_alone(prompt)
    written = lm.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    tokens: list[int] = written[0, given["input_ids"].shape[1] :].tolist()
    return tokens


def generate(trimtab: Command, folder: Path, *words: str) -> Any:
    model, new = str(folder / "model"), str(NEW)
    return trimtab("generate", "--model", model, "--max-new-tokens", new, *words)


def test_an_image_is_given_by_name(
    trimtab: Command, folder: Path, loaded: tt.LanguageModel
) -> None:
    red, blue = str(folder / "red.png"), str(folder / "blue.png")
    found = generate(trimtab, folder, "What?", "--image", red, "--image", blue, "--json").json
    (output,) = found["outputs"]
    assert output["prompt"] == about(red, blue, "What?")
    assert output["tokens"] == by_transformers(loaded, about(red, blue, "What?"))
    shown = generate(trimtab, folder, "What?", "--image", red).text
    assert f"[image {red}] What?" in shown.replace("\n", "")


def test_a_file_of_prompts_names_images(
    trimtab: Command, folder: Path, loaded: tt.LanguageModel
) -> None:
    file = folder / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": about("What? ", "green.png")}))
    found = generate(trimtab, folder, "--prompts", str(file), "--json").json
    expected = by_transformers(loaded, about("What? ", str(folder / "green.png")))
    assert found["outputs"][0]["tokens"] == expected


def test_images_where_there_can_be_none(trimtab: Command, folder: Path) -> None:
    red, model = str(folder / "red.png"), str(folder / "model")
    for words, said in (
        (["What?", "--image", "no.png"], "--image: the image no.png cannot be read"),
        (["What?", "--image", "https://a.org/b.png"], "nothing is fetched"),
        (["What?", "--raw", "--image", red], "--raw takes prompts as they are"),
        (["--prompts", str(folder / "x.txt"), "--image", red], "names its own images"),
    ):
        assert said in refused(trimtab("generate", "--model", model, *words))


def pairs(folder: Path) -> str:
    file = folder / "pairs.jsonl"
    rows = [
        {"prompt": about("What is it? ", "red.png"), "positive": " good", "negative": " bad"},
        {"prompt": about("blue.png", "Well?"), "positive": " yes", "negative": " no"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_a_contrast_shows_its_images(trimtab: Command, folder: Path) -> None:
    file, red = pairs(folder), str(folder / "red.png")
    for command in ("show", "check"):
        shown = trimtab("contrast", command, file).text.replace("\n", "")
        assert f"prompt    user: 'What is it? ' [image {red}]" in shown
    found = trimtab("contrast", "show", file, "--json").json
    assert found["rows"][0]["prompt"] == about("What is it? ", red)
    found = trimtab("contrast", "check", file, "--model", str(folder / "model"), "--json").json
    assert found["lengths"]["prompt"]["least"] > 8


def test_a_steering_is_fitted_on_images(
    trimtab: Command, folder: Path, loaded: tt.LanguageModel, tmp_path: Path, measuring: None
) -> None:
    file, model = pairs(folder), str(folder / "model")
    output = str(tmp_path / "image.safetensors")
    words = ["--contrast", file, "--layer", "1", "--on", "image", "-o", output, "--split"]
    made = trimtab("fit", "caa", "--model", model, *words, "none", "--json").json
    assert [each["tokens"] for each in made["interventions"]] == ["image"]
    assert made["calibration"] is not None
    assert made["gain"]["n"] == 2
    assert [one["prompt"] for one in made["samples"]] == [
        f"What is it?  [image {folder / 'red.png'}]",
        f"[image {folder / 'blue.png'}] Well?",
    ]
    steering = tt.Steering.load(output)
    expected = tt.CAA(layer=1).fit(loaded, tt.Contrast.from_file(file), on="image")
    assert steering.digest == expected.digest
    red = str(folder / "red.png")
    found = generate(
        trimtab, folder, "What?", "--image", red, "--steer", f"{output}@20", "--json"
    ).json
    (by_hand,) = loaded.generate(
        [about(red, "What?")], max_new_tokens=NEW, steering=steering.at(20)
    )
    assert found["outputs"][0]["tokens"] == list(by_hand.tokens)
    assert "where it stands for an image" in trimtab("inspect", output).text


def test_a_text_model_says_that_it_sees_nothing(trimtab: Command, work: Path) -> None:
    square("red").save("red.png")
    said = refused(trimtab("generate", "--model", "model", "What?", "--image", "red.png"))
    assert "model takes no images: it has no image processor" in said
