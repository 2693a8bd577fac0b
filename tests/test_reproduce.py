"""Recipes: every file is whole, sizes bind to their studies, what is missing is said beforehand;
and what a run leaves."""

from __future__ import annotations

import inspect
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trimtab as tt
from helpers import language_model, plain_logits, token_ids
from trimtab.papers import recipe as recipes_file
from trimtab.papers.recipe import (
    SCALES,
    Recipe,
    billions_in,
    check_brought,
    check_data,
    check_needs,
    find_recipe,
    read_recipe,
    recipes,
    resolve,
)
from trimtab.papers.reproduction import Reproduction, beside_paper, reproduce
from trimtab.papers.result import contrast_of
from trimtab.papers.studies import WITHOUT_MODEL, StudyResult, Value, find_study, run_study
from trimtab.reading import plain_texts
from trimtab.sweeps.metering import Used

NAMES = [recipe.name for recipe in recipes()]
FEW = "builtin:formality first 6"

#: What a recipe must have, as the shortest one has it.
SHORT: dict[str, Any] = {
    "name": "austeer-table0",
    "paper": "a paper",
    "item": "Table 0",
    "shows": "Something.",
    "study": "theory",
    "scales": {"smoke": {}, "small": {}, "full": {}},
}


def recipe(**changed: Any) -> Recipe:
    return read_recipe(yaml.safe_dump({**SHORT, **changed}, sort_keys=False), "table0.yaml")


# -- the recipes that there are -------------------------------------------------------------------


def test_every_table_and_figure_has_a_recipe() -> None:
    # Counted in the papers: the tables of AUSteer and its figures; what is known of Selective
    # Steering; the figures of the strength paper but its first, a drawing.
    wanted = {f"austeer-table{n}" for n in range(1, 14)}
    wanted |= {f"austeer-fig{n}" for n in range(1, 14)}
    wanted |= {"ss-controllability", "ss-coherence", "ss-robustness", "ss-masks", "ss-plane"}
    wanted |= {"ss-layers", "ss-norms", "ss-dial", "ss-baselines"}
    wanted |= {f"strength-fig{n}" for n in range(2, 8)} | {"strength-figb1", "strength-training"}
    wanted |= {f"strength-figa{n}" for n in range(1, 14)}
    wanted |= {"strength-tablea1", "strength-tablea2"}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_whole(name: str) -> None:
    one = find_recipe(name)
    takes = inspect.signature(find_study(one.study))
    for scale in SCALES:
        parts = one.parts(scale)
        assert parts
        for args in parts.values():
            takes.bind(None, **args)  # raises TypeError where an argument is unknown or missing
        brought = set(re.findall(r"{(\w+)}", json.dumps(parts)))
        assert brought <= set(one.brings)
    assert one.published
    assert all(found.rows or found.says for found in one.published)
    assert one.study in WITHOUT_MODEL or one.needs or one.name == "strength-figa4"
    assert "Red" not in name
    assert one.shows.endswith(".")


def test_smoke_needs_no_file_of_the_user() -> None:
    for one in recipes():
        check_brought(one, "smoke", {})
        # Whatever is steered there comes with trimtab, or is a question with a right answer.
        assert "refusal:" not in json.dumps(one.parts("smoke")), one.name


def test_published_figures_are_those_of_the_paper() -> None:
    # Read off the paper's tables by eye.
    first = {one.model: one for one in find_recipe("austeer-table1").published}
    assert first["Gemma2-9B-it"].rows["AUSteer-FFN"]["COPA"] == 97.60
    assert first["LLaMA2-7B-Chat"].rows["Vanilla"]["MAWPS"] == 51.83
    averages = {
        ("LLaMA2-7B-Chat", "AUSteer-FFN"): 61.34,
        ("LLaMA2-7B-Chat", "SADI"): 59.49,
        ("Gemma2-9B-it", "AUSteer-Head"): 82.83,
        ("Gemma2-9B-it", "STA"): 81.86,
        ("Qwen3-8B", "AUSteer-Head"): 83.21,
        ("Qwen3-8B", "CAA"): 80.63,
    }
    for (model, row), average in averages.items():
        cells = first[model].rows[row]
        five = [float(cells[task]) for task in ("BoolQ", "COPA", "WinoG.", "SVAMP", "MAWPS")]
        assert sum(five) / 5 == pytest.approx(average, abs=0.006)  # printed beside them
    twelfth = find_recipe("austeer-table12").published[0].rows
    assert [row["value"] for row in twelfth.values()] == [
        70.8, 82.8, 77.2, 73.2, 70.8, 70.6, 70.4, 70.4,
    ]  # fmt: skip


def test_recipes_come_in_the_order_of_their_numbers() -> None:
    austeer = [name for name in NAMES if name.startswith("austeer")]
    assert austeer == [f"austeer-{kind}{n}" for kind in ("table", "fig") for n in range(1, 14)]
    assert NAMES.index("austeer-fig13") < NAMES.index("ss-dial") < NAMES.index("strength-fig2")


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"sizes": 3}, "sizes"),
        ({"scales": {"smoke": {}, "small": {}}}, "full"),
        ({"scales": {"smoke": {"rows": 3}, "small": {}, "full": {}}}, "rows"),
        ({"needs": [{"model": "M", "billions": "many", "gpu_gb": 1}]}, "billions"),
        ({"name": "Table 1"}, "name"),
        ({"published": [{"model": "M", "unit": "km"}]}, "unit"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_in_one_line(changed: dict[str, Any], word: str) -> None:
    with pytest.raises(tt.TrimtabError, match=word) as caught:
        recipe(**changed)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("table0.yaml")


@pytest.mark.parametrize("text", ["a: b: c", "[1, 2]", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(tt.TrimtabError, match="table0.yaml") as caught:
        read_recipe(text, "table0.yaml")
    assert "\n" not in str(caught.value)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(tt.TrimtabError, match="austeer-table12"):
        find_recipe("austeer-tabel12")
    with pytest.raises(tt.TrimtabError, match="--list"):
        find_recipe("qqqq")
    with pytest.raises(tt.TrimtabError, match="smoke, small, full"):
        recipe().scale("large")
    with pytest.raises(tt.TrimtabError, match="known are"):
        find_study("nothing")


def test_a_scale_has_the_last_word_and_takes_parts() -> None:
    one = recipe(
        args={"a": 1, "b": 1, "c": 1},
        each={"X": {"b": 2, "c": 2}, "Y": {}},
        scales={"smoke": {"only": ["X"], "args": {"c": 3}}, "small": {}, "full": {"only": ["Z"]}},
    )
    assert one.parts("smoke") == {"X": {"a": 1, "b": 2, "c": 3}}
    assert one.parts("small") == {"X": {"a": 1, "b": 2, "c": 2}, "Y": {"a": 1, "b": 1, "c": 1}}
    with pytest.raises(tt.TrimtabError, match="Z"):
        one.parts("full")


def test_places_are_as_deep_in_another_model() -> None:
    args = {"layer": "<27 of 32>", "list": ["<31 of 32>", 5], "head": "<head 7 of 32>"}
    found = resolve(args, {}, layers=30, heads=9)
    assert found == {"layer": 25, "list": [29, 5], "head": 1}  # floor of 27 / 32 * 30, and so on
    assert resolve("<27 of 32>", {}, layers=32) == 27
    assert resolve({"task": "refusal:{prompts}"}, {"prompts": "a.jsonl"}, 3) == {
        "task": "refusal:a.jsonl"
    }


# -- what a run needs -----------------------------------------------------------------------------

LARGE = [
    {"model": "Big-30B", "billions": 30.5, "gpu_gb": 66, "why": "16-bit weights"},
    {"model": "Big-70B", "billions": 70.6, "gpu_gb": 42, "why": "4-bit weights"},
]


class Card:
    """A graphics card with so much memory."""

    def __init__(self, gigabytes: float) -> None:
        self.total_memory = gigabytes * 1e9


def cards(monkeypatch: pytest.MonkeyPatch, *gigabytes: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gigabytes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gigabytes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Card(gigabytes[i]))


def test_a_large_model_needs_its_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    one = recipe(needs=LARGE)
    cards(monkeypatch)
    check_needs(one, "small", 0.1)  # a small one runs anywhere
    check_needs(one, "unknown", None)
    with pytest.raises(tt.TrimtabError, match="42 GB .*4-bit.*Big-70B.* 0 GB.*--force"):
        check_needs(one, "Llama-3.3-70B-Instruct", 70.0)
    with pytest.raises(tt.TrimtabError, match="66 GB"):
        check_needs(one, "Qwen3-30B-A3B", 30.0)
    check_needs(one, "Qwen3-30B-A3B", 30.0, force=True)
    cards(monkeypatch, 24, 24)
    check_needs(one, "Llama-3.3-70B-Instruct", 70.0)  # two cards together suffice
    with pytest.raises(tt.TrimtabError, match="48 GB"):
        check_needs(one, "Qwen3-30B-A3B", 30.0)
    cards(monkeypatch, 80)
    check_needs(one, "Qwen3-30B-A3B", 30.0)


def test_a_model_of_the_published_size_is_checked_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards(monkeypatch)
    small = recipe(
        study="footprint",
        args={"methods": [{"method": "sadi"}], "contrast": "builtin:formality"},
        needs=[{"model": "Tiny", "billions": 1e-6, "gpu_gb": 1}],
    )
    monkeypatch.setattr(recipes_file, "_every", lambda: {small.name: small})
    with pytest.raises(tt.TrimtabError, match="Tiny"):
        reproduce(language_model("llama"), small.name, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", 70),
        ("Qwen/Qwen3-30B-A3B", 30),
        ("google/gemma-2-9b-it", 9),
        ("Qwen2.5-1.5B", 1.5),
        ("smollm2-135m-instruct", None),
        ("gpt2", None),
    ],
)
def test_size_by_name(name: str, billions: float | None) -> None:
    assert billions_in(name) == billions


def test_size_by_directory(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(3000))
    (tmp_path / "b.safetensors").write_bytes(bytes(1000))
    assert billions_in(str(tmp_path)) == pytest.approx(2e-6)


def test_what_the_user_brings_is_asked_for(tmp_path: Path) -> None:
    one = find_recipe("ss-controllability")
    with pytest.raises(tt.TrimtabError, match="--prompts FILE"):
        check_brought(one, "full", {"prompts": None, "contrast": None})
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "Say hello."}\n', encoding="utf-8")
    with pytest.raises(tt.TrimtabError, match="--contrast FILE"):
        check_brought(one, "full", {"prompts": str(own)})
    with pytest.raises(tt.TrimtabError, match="no such file"):
        check_brought(one, "full", {"prompts": "nowhere.jsonl", "contrast": "builtin:formality"})
    check_brought(one, "full", {"prompts": str(own), "contrast": "builtin:formality"})


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    one = find_recipe("austeer-table12")
    with pytest.raises(tt.TrimtabError, match="austeer-table12 needs copa/test.jsonl"):
        check_data(one, "smoke", str(tmp_path))
    with pytest.raises(tt.TrimtabError, match="mmlu"):
        check_data(find_recipe("strength-figa6"), "smoke", str(tmp_path))
    check_data(find_recipe("strength-fig3"), "smoke", str(tmp_path))


# -- runs -----------------------------------------------------------------------------------------


class Text(HTMLParser):
    """The words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def labels_of(directory: Path) -> list[str]:
    """The text of every SVG picture of a run, each of which has some and comes as PNG too."""
    found = []
    for file in sorted((directory / "pictures").glob("*.svg")):
        text = " ".join(re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text(encoding="utf-8")))
        assert len(re.findall(r"[^\W\d_]{2,}", text)) >= 2, f"{file.name} has no labels"
        drawn = file.with_suffix(".png")
        assert drawn.stat().st_size > 3000
        found.append(text)
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("strength-fig2", ["next token", "capitals"]),
        ("strength-fig3", ["steering strength", "target"]),
        ("strength-fig4", ["steering strength", "Greek"]),
        ("strength-fig5", ["cross-entropy", "Theorem 3.8"]),
        ("strength-figb1", ["steering strength", "off-target"]),
    ],
)
def test_theory_figures(name: str, words: list[str], tmp_path: Path) -> None:
    done = reproduce(None, name, output=tmp_path)
    labels = labels_of(tmp_path)
    assert len(labels) == 1
    for word in words:
        assert word in labels[0]
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(done.as_json()))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing from the network
    assert find_recipe(name).item in " ".join(Text(page).words)


def test_training_reaches_the_entropy(tmp_path: Path) -> None:
    done = reproduce(None, "strength-training", output=tmp_path)
    # In closed form: V = 9 tokens, G = 3 concepts of s = 3, ε = 0.05.
    a, b = 0.95 / 3, 0.05 / 6
    entropy = -(3 * a * math.log(a) + 6 * b * math.log(b))
    assert float(done.values["entropy of the data"]["value"].value or 0) == pytest.approx(
        entropy, abs=1e-5
    )
    rows = beside_paper(done)[0].rows
    assert ["entropy of the data", "paper, the theory", 1.3317] in [list(row) for row in rows]
    assert ["entropy of the data", "ours, theory", f"{entropy:.5f}"] in [list(r) for r in rows]


def test_a_map_of_scores_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = recipe(
        name="austeer-fig0",
        study="scores",
        each={"formal": {"contrast": "builtin:formality first 6"}},
        published=[{"model": "Gemma2-9B-it", "says": "in the middle"}],
    )
    monkeypatch.setattr(recipes_file, "_every", lambda: {one.name: one})
    lm = language_model("llama")
    done = reproduce(lm, one.name, output=tmp_path)
    data = done.found["formal"].data
    assert data["sites"]["ffn_out"]["pairs"] == 6  # the first six pairs, and no more
    highest = max(max(row) for row in data["sites"]["ffn_out"]["scores"])
    value = done.values["ffn_out, highest score"]["formal"]
    assert value.value == pytest.approx(highest, abs=1e-4)
    assert all("layer" in text for text in labels_of(tmp_path))
    words = " ".join(Text((tmp_path / "report.html").read_text(encoding="utf-8")).words)
    assert "Gemma2-9B-it" in words
    assert "What it took" in words
    assert done.used["formal"].tokens > 0
    assert any("the paper's are Gemma2-9B-it" in note for note in done.notes)


def test_a_run_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    reproduce(None, "strength-fig5", output=tmp_path)
    first = (tmp_path / "pictures" / "figure-5.svg").read_bytes()
    reproduce(None, "strength-fig5", output=tmp_path)
    assert (tmp_path / "pictures" / "figure-5.svg").read_bytes() == first
    with pytest.raises(tt.TrimtabError, match="another configuration"):
        reproduce(None, "strength-fig4", output=tmp_path)
    stale = tmp_path / "parts" / "all" / "config.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}", encoding="utf-8")
    reproduce(None, "strength-fig4", output=tmp_path, overwrite=True)
    assert not stale.exists()
    assert {file.stem for file in (tmp_path / "pictures").iterdir()} == {"figure-4"}


def test_a_recipe_on_a_model_wants_one() -> None:
    with pytest.raises(tt.TrimtabError, match="name one"):
        reproduce(None, "austeer-fig1")


def test_ours_stand_beside_the_papers_in_its_unit() -> None:
    one = recipe(
        names={"unsteered": "Vanilla"},
        published=[
            {"model": "M-7B", "unit": "%", "rows": {"Vanilla": {"COPA": 70.8}, "STA": {"COPA": 8}}}
        ],
    )
    found = StudyResult({}, {"unsteered": Value(0.5, (0.25, 0.75), 12, True), "k": Value(8)})
    done = Reproduction(one, "full", {"name": "tiny"}, {"COPA": found}, {"COPA": Used()}, 0.0)
    table = beside_paper(done)[0]
    assert table.heads == ["", "whose", "COPA"]
    assert [list(row) for row in table.rows] == [
        ["Vanilla", "paper, M-7B", 70.8],
        ["Vanilla", "ours, tiny", "50 [25, 75]"],
        ["STA", "paper, M-7B", 8],
        ["k", "ours, tiny", "8"],
    ]
    same = Reproduction(one, "full", {"name": "org/m-7b-hf"}, {}, {}, 0.0)
    assert not any("the paper's are" in note for note in same.notes)


def test_sizes_of_the_data_sets(data_dir: Path) -> None:
    done = reproduce(None, "austeer-table6", data=data_dir)
    assert done.values["COPA"]["value"].value == "1000 / 500"
    lines = (data_dir / "mawps" / "test.jsonl").read_text(encoding="utf-8").count("\n")
    assert str(done.values["MAWPS"]["value"].value).endswith(f" / {lines}")


# -- studies that are not analyses ----------------------------------------------------------------


def test_the_first_pairs_of_a_contrast() -> None:
    every = tt.Contrast.builtin("formality").train.pairs
    assert contrast_of("builtin:formality first 3", None).pairs == every[:3]
    assert contrast_of("builtin:formality", None) == tt.Contrast.builtin("formality")


def test_activations_that_methods_change() -> None:
    methods = [
        {"method": "caa", "fixed": {"layer": 1}},
        {"name": "few", "method": "austeer", "fixed": {"k": 5}},
    ]
    found = run_study("footprint", language_model("llama"), {"methods": methods, "contrast": FEW})
    assert found.data["activations"] == {"caa": 48, "few": 5}  # the tiny model's width is 48


def test_austeer_step_by_step() -> None:
    found = run_study("overview", language_model("llama"), {"contrast": FEW, "k": 4, "alpha": 3.0})
    units = found.data["units"]
    assert len(units) == 4
    for unit in units:
        share = max(unit["r_pos"], unit["r_neg"])
        assert unit["score"] == pytest.approx(share)
        sign = 1 if unit["r_pos"] > unit["r_neg"] else -1
        assert unit["gamma"] == pytest.approx(3.0 * sign * share, abs=1e-5)


def test_coherence_of_what_is_written() -> None:
    lm = language_model("llama")
    args = {
        "methods": [{"name": "SS", "method": "ss", "fixed": {"whole_blocks": False}}],
        "contrast": FEW,
        "angles": [0.0, 180.0],
        "rows": 2,
        "max_new_tokens": 12,
    }
    found = run_study("coherence", lm, args)
    # At 0 degrees SS does nothing: the texts are the unsteered model's.
    prompts = [pair.prompt for pair in tt.Contrast.builtin("formality").train.pairs[:2]]
    repeated = []
    for one in lm.generate(prompts, max_new_tokens=12, chat=False):
        words = one.text.split()
        grams = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
        repeated.append((len(grams) - len(set(grams))) / len(grams) if grams else 0.0)
    unsteered, *turned = found.data["angles"]
    assert [(row["method"], row["angle"]) for row in found.data["angles"]] == [
        ("unsteered", None), ("SS", 0.0), ("SS", 180.0),
    ]  # fmt: skip
    for row in (unsteered, turned[0]):
        assert row["repetition_4gram"]["value"] == pytest.approx(sum(repeated) / 2)
    over = [row["repetition_4gram"]["value"] for row in turned]
    value = found.values["SS, repetition"]
    assert value.value == pytest.approx(sum(over) / 2)
    assert value.n == 2
    assert value.ci95 is not None
    assert value.ci95[0] <= sum(over) / 2 <= value.ci95[1]
    assert found.values["unsteered, repetition"].value == pytest.approx(sum(repeated) / 2)


def test_curves_at_several_depths() -> None:
    lm = language_model("llama")  # of three blocks
    args = {
        "contrast": FEW,
        "depths": [0.0, 0.5, 1.0],
        "span": [0.0, 2.0],
        "points": 5,
        "contexts": 1,
        "tokens": 2,
        "cost": {"span": [-1.0, 1.0], "points": 3, "tokens": 60},
    }
    found = run_study("curves", lm, args)
    assert [one["name"] for one in found.data["curves"]] == ["block 0", "block 1", "block 2"]
    last = found.data["curves"][2]
    # Unsteered probabilities without trimtab.
    text = " ".join(plain_texts()[0].split()[:60])
    p = torch.softmax(plain_logits(lm.model, token_ids(text))[-1].double(), -1)
    for token in last["curve"]["tokens"]:
        assert token["base_p"] == pytest.approx(float(p[token["id"]]), abs=1e-6)
        assert token["delta_p"][0] == pytest.approx(0.0, abs=1e-9)
    assert last["cost"]["dials"] == [-1.0, 0.0, 1.0]
    assert last["cost"]["delta_ce"][1] == 0.0
    shown = found.values["block 2, ΔCE, highest α"].value
    assert shown == pytest.approx(last["cost"]["delta_ce"][2])


def test_one_block_learns() -> None:
    args = {"steps": 40, "width": 32, "batch": 4, "text_tokens": 700, "points": 5, "contexts": 1}
    lm = language_model("llama")
    before = torch.get_rng_state()
    found = run_study("one-layer", lm, args)
    assert torch.equal(torch.get_rng_state(), before)  # the user's own draws are as they were
    loss = found.data["loss"]
    assert 0 < loss < math.log(len(lm.tokenizer)) - 0.5  # what a model that knows nothing loses


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_at_smoke_scale(
    name: str, smollm2: Any, data_dir: Path, tmp_path: Path
) -> None:
    one = find_recipe(name)
    lm = None if one.study in WITHOUT_MODEL else smollm2
    done = reproduce(lm, name, scale="smoke", data=data_dir, output=tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["recipe"] == name
    assert saved["parts"]
    assert all(saved["parts"].values())
    labels = labels_of(tmp_path)
    drawn = sum(len(found.pictures) for found in done.found.values())
    assert len(labels) == drawn
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == drawn
    words = " ".join(Text(page).words)
    assert one.item in words
    for note in one.differences:
        assert note in words
    assert ("The paper's figures and ours" in words) is any(each.rows for each in one.published)
