"""`trimtab fit` on a tiny model: every option of every method, many methods at once, kinds of
contrasts."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from commands import (
    EVERY,
    FIT,
    PAIRS,
    Command,
    failing,
    home,
    listing,
    refused,
    trimtab,
    warnings_of,
    work,
    write_rows,
)
from helpers import few_quick
from method_options import NEEDED, OPTIONS, REQUIRED
from trimtab.cli.fit import read_method
from trimtab.methods import METHODS

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

# -- fit ---------------------------------------------------------------------------------------


def test_fit_austeer(trimtab: Command, work: Path) -> None:
    found = trimtab(
        f"fit austeer {FIT} --site heads --k 7 --alpha 3 --direction signed --clamp-sign "
        "--layers 0,2 --positions last -o new.safetensors --json"
    ).json
    lm = tt.load("model", device="cpu")
    assert found["method"] == "austeer"
    assert found["hyperparameters"] == {
        "site": "heads",
        "k": 7,
        "alpha": 3.0,
        "direction": "signed",
        "locate": "momentum",
        "choose": "most",
        "change": "scale",
        "strength": "adaptive",
        "per_token": False,
        "first_token": True,
        "verify": 0,
        "average": False,
        "interaction": "none",
        "block": None,
        "basis": "units",
        "clamp_sign": True,
        "layers": [0, 2],
        "seed": 0,
        "positions": "last",
    }
    assert found["dial"] == {
        "name": "alpha",
        "unit": "",
        "default": 3.0,
        "range": [0.0, 100.0],
        "value": 3.0,
    }
    assert found["model"] == {
        "name": "model",
        "architecture": "llama",
        "layers": 3,
        "hidden_size": 48,
        "digest": lm.identity.digest,
        "plain_digest": lm.identity.plain_digest,
    }
    assert {i["operator"] for i in found["interventions"]} == {"Scale"}
    assert sum(i["size"] for i in found["interventions"]) == 7
    assert {i["site"] for i in found["interventions"]} <= {"layers.0.heads", "layers.2.heads"}
    assert len(found["units"]) == 7
    assert found["output"] == "new.safetensors"
    assert found["contrast"]["rows"] == 4

    # The same as in Python, and what was written is what was said.
    method = tt.AUSteer("heads", 7, 3.0, "signed", clamp_sign=True, layers=(0, 2), positions="last")
    expected = method.fit(lm, tt.Contrast.from_jsonl("pairs.jsonl"))
    saved = tt.Steering.load("new.safetensors")
    for name, table in expected.tables.items():
        assert torch.equal(saved.tables[name], table)
    assert trimtab("inspect new.safetensors --json").json["units"] == found["units"]


def test_fit_caa(trimtab: Command) -> None:
    found = trimtab(f"fit caa {FIT} --layer -1 --token mean --alpha 2 -o new.st --json").json
    assert found["method"] == "caa"
    assert found["hyperparameters"]["layer"] == -1
    assert found["dial"]["default"] == 2
    intervention = {"site": "layers.2.resid", "operator": "Add", "size": 48, "positions": "all"}
    assert found["interventions"] == [{**intervention, "scope": "all"}]
    assert "units" not in found
    lm = tt.load("model", device="cpu")
    expected = tt.CAA(-1, 2.0, "mean").fit(lm, tt.Contrast.from_jsonl("pairs.jsonl"))
    saved = tt.Steering.load("new.st").interventions[0].operator
    assert torch.equal(saved.vector, expected.interventions[0].operator.vector)


def test_every_option_is_listed() -> None:
    for name, method in METHODS.items():
        assert set(OPTIONS[name]) == {item.name for item in fields(method)}  # type: ignore[arg-type]


@pytest.mark.parametrize("method", few_quick(METHODS, "caa", "sae", "reps"))
def test_every_option_reaches_the_method(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    given: list[Any] = []
    monkeypatch.setattr("trimtab.cli.fit._one", lambda made, *rest: given.append(made))
    for option, values in OPTIONS[method].items():
        for text, value in values:
            wanted: dict[str, Any] = {**NEEDED.get((method, option), {}), option: value}
            wanted = REQUIRED.get(method, {}) | wanted
            expected = METHODS[method](**wanted)
            flag = f"--{option.replace('_', '-')}"
            if isinstance(value, bool):
                words = [flag if value else flag.replace("--", "--no-")]
            else:
                words = [flag, text]  # a value that begins with a minus is still a value
            more = [f"--{key}={wanted[key]}" for key in wanted if key != option]
            ran = trimtab("fit", method, *shlex.split(FIT), *words, *more, "-o", "new.st")
            assert ran.status == 0, ran.err
            assert given.pop() == expected
            if text.startswith("-"):
                joined = f"{flag}={text}"
                ran = trimtab("fit", method, *shlex.split(FIT), joined, *more, "-o", "new.st")
                assert ran.status == 0, ran.err
                assert given.pop() == expected
            # And as `fit many` reads it.
            rest = "".join(f" {key}={wanted[key]}" for key in wanted if key != option)
            assert read_method(f"{method} {option}='{text}'{rest}") == expected
    if method not in REQUIRED:
        assert trimtab("fit", method, *shlex.split(FIT), "-o", "new.st").text == ""
        assert given.pop() == METHODS[method]()


@pytest.mark.parametrize(
    ("words", "sites"),
    [
        ("--layer 1", ["layers.1.resid"]),
        ("--layer -1", ["layers.2.resid"]),
        ("--layer 0-1", ["layers.0.resid", "layers.1.resid"]),
        ("--layer 2,0", ["layers.2.resid", "layers.0.resid"]),
    ],
)
def test_fit_caa_at_layers(trimtab: Command, words: str, sites: list[str]) -> None:
    found = trimtab(f"fit caa {FIT} {words} -o new.st --json").json
    assert [intervention["site"] for intervention in found["interventions"]] == sites


def test_fit_chooses_on_validation_rows(trimtab: Command) -> None:
    parts = ["train", "train", "validation", "validation"]
    rows = [{**pair, "part": part} for pair, part in zip(PAIRS, parts, strict=True)]
    write_rows("parts.jsonl", rows)
    found = trimtab("fit caa -m model -c parts.jsonl --layer validation -o a.st --json").json
    gains = found["findings"]["validation_gain"]
    assert set(gains) == {f"layers.{layer}.resid" for layer in range(3)}
    assert found["interventions"][0]["site"] == max(gains, key=lambda site: gains[site])
    assert found["contrast"]["rows"] == 2
    options = "--kl 100 --depth 1 --tokens=-1,-2"
    found = trimtab(f"fit ablation -m model -c parts.jsonl {options} -o b.st --json").json
    chosen = found["findings"]["chosen"]
    assert chosen["token"] in (-1, -2)
    assert found["findings"]["candidates"] == 6


@pytest.mark.parametrize("method", EVERY)
def test_fit_of_every_method(trimtab: Command, home: Path, method: str) -> None:
    """With its options on the command line the same as in Python."""
    options = {
        "actadd": "--layer 1 --pairs 2",
        "caa": "--layer 0,2 --token last",
        "iti": "--k 3 --alpha 2",
        "sadi": "--variant neuron --k 4",
        "ablation": "--layer 1",
        "sas": "--theta 30",
        "aas": "--theta 30",
        "ss": "--theta 30 --no-whole-blocks",
        "austeer": "--site ffn_out --k 4 --direction paper",
        "act": "--site ffn_out --layer 1",
    }[method]
    found = trimtab(f"fit {method} {FIT} {options} -o new.st --json").json
    expected = trimtab(f"inspect every/{method}.safetensors --json").json
    for key in expected.keys() - {"contrast", "model", "date"}:  # these have other names here
        assert found[key] == expected[key], key
    assert found["model"]["digest"] == expected["model"]["digest"]
    assert found["contrast"]["digest"] == expected["contrast"]["digest"]
    saved, made = tt.Steering.load("new.st"), tt.Steering.load(f"every/{method}.safetensors")
    for one, other in zip(saved.interventions, made.interventions, strict=True):
        for name, value in vars(one.operator).items():
            same = getattr(other.operator, name)
            if torch.is_tensor(value):  # alone it reads fewer rows, in other batches
                torch.testing.assert_close(value, same)
            else:
                assert value == same


# -- fit many ----------------------------------------------------------------------------------


def test_what_is_gained_is_what_an_evaluation_finds(trimtab: Command, work: Path) -> None:
    rows = [{**PAIRS[i % len(PAIRS)], "prompt": f"On day {i} I felt"} for i in range(30)]
    (work / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "--model model --contrast own.jsonl --layer 1 --alpha 2"
    gain = trimtab(f"fit caa {line} -o own.st --json").json["gain"]
    task = "evaluate --model model --steer own.st --task contrast:own.jsonl --json"
    (found,) = [c for c in trimtab(task).json["comparisons"] if c["metric"] == "log_odds"]
    assert (gain["part"], gain["n"]) == ("test", 6)
    assert gain["value"] == pytest.approx(found["difference"], abs=1e-4)
    said = trimtab(f"fit caa {line} -o other.st").text
    assert f"the log-odds of the positive side change by {gain['value']:+.1f} nats" in said
    wrong = trimtab(f"fit caa {line.replace('alpha 2', 'alpha=-8')} -o wrong.st").text
    assert ("It pushes the wrong way" in wrong) == (gain["ci95"][0] > 0)
    assert trimtab(f"fit caa {line} --no-measure -o bare.st --json").json["gain"] is None


def test_fit_many(trimtab: Command) -> None:
    methods = ["caa layer=2", "austeer k=5 site=heads", "caa layer=0 --alpha=3", "sadi k=2"]
    names = ["caa", "austeer", "caa-2", "sadi"]
    arguments = ["fit", "many", *methods, *shlex.split(FIT), "-o", "all"]
    found = trimtab(*arguments, "--json").json
    assert set(found) == {"steerings", "samples"}
    assert set(found["samples"][0]["steered"]) == {f"{name}.safetensors" for name in names}
    paths = [f"all/{name}.safetensors" for name in names]
    assert [steering["output"] for steering in found["steerings"]] == paths
    assert sorted(str(path) for path in Path("all").iterdir()) == sorted(paths)
    for path, steering in zip(paths, found["steerings"], strict=True):
        shown = trimtab(f"inspect {path} --json").json
        assert {**shown, "output": path} == steering
    alone = trimtab(f"fit caa {FIT} --layer 0 --alpha 3 -o alone.st --json").json
    third = found["steerings"][2]
    assert alone.pop("gain")["part"] == "train"  # few pairs, of which none are held out
    assert [set(sample) for sample in alone.pop("samples")] == [
        {"prompt", "unsteered", "steered"}
    ] * 2
    assert {**alone, "date": 0, "output": 0} == {**third, "date": 0, "output": 0}
    vectors = [tt.Steering.load(path).interventions[0].operator for path in (paths[2], "alone.st")]
    assert torch.equal(vectors[0].vector, vectors[1].vector)  # type: ignore[attr-defined]
    # What is there stays, unless one says so; other files in the directory do not matter.
    before = listing(Path("all"))
    refused(trimtab(*arguments), "all/caa.safetensors exists", "--overwrite")
    assert listing(Path("all")) == before
    text = trimtab(*arguments, "--overwrite").text
    for words in (*paths, "CAA adds one vector", "AUSteer changes 5 single units of heads"):
        assert words in text
    assert trimtab("fit", "many", "iti k=1", *shlex.split(FIT), "-o", "all", "--json").json
    assert set(listing(Path("all"))) == {*before, "iti.safetensors"}


def test_fit_many_reads_the_texts_once(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    from trimtab.fitting import activations

    run = activations._run
    monkeypatch.setattr(
        activations, "_run", lambda lm, batch, picks: batches.append(1) or run(lm, batch, picks)
    )
    assert trimtab(f"fit caa {FIT} -o one.st").text
    once = len(batches)
    methods = ["caa", "caa token=mean", "austeer k=3", "sadi k=1"]
    assert trimtab("fit", "many", *methods, *shlex.split(FIT), "-o", "all").text
    assert len(batches) == 2 * once


def test_what_exists_is_refused_before_any_work(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "all").mkdir()
    (work / "all" / "sadi.safetensors").write_text("mine")
    monkeypatch.setattr("trimtab.cli.fit.open_model", failing(AssertionError("work")))
    refused(
        trimtab("fit", "many", "caa", "sadi", *shlex.split(FIT), "-o", "all"),
        "all/sadi.safetensors exists",
    )
    assert listing(work / "all").keys() == {"sadi.safetensors"}


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["magic"], ["'magic'", "austeer"]),
        (["caa layer"], ["caa", "'layer'", "OPTION=VALUE"]),
        (["caa depth=3"], ["caa", "'depth=3'", "unit_norm"]),
        (["caa", "austeer alpha=big"], ["austeer: alpha", "'big'", "number"]),
        (["caa unit_norm=perhaps"], ["caa: unit_norm", "yes or no", "'perhaps'"]),
        (["caa layer=x"], ["caa: layer", "x", "4,5,8-12", "validation"]),
        (["caa token=first"], ["caa: token", "'first'", "answer"]),
        (["actadd pairs=x"], ["actadd: pairs", "'x'", "whole number"]),
        (["iti k=1.5"], ["iti: k", "'1.5'", "whole number"]),
        (["austeer k=some"], ["austeer: k", "some"]),
        (["austeer layers="], ["austeer: layers"]),
        (["sta"], ["sta needs sae", "sae=..."]),
        (["sta sae="], ["sta", "autoencoder"]),
        (["ablation tokens=0"], ["ablation: tokens", "0"]),
        (["ss theta=inf"], ["ss: theta", "inf"]),
        (["caa 'layer=1"], ["METHOD OPTION=VALUE"]),
        ([""], ["METHOD OPTION=VALUE"]),
        ([], ["methods"]),
    ],
)
def test_bad_methods(trimtab: Command, work: Path, methods: list[str], words: list[str]) -> None:
    before = listing(work)
    refused(trimtab("fit", "many", *methods, *shlex.split(FIT), "-o", "all"), *words)
    assert listing(work) == before


@pytest.mark.parametrize(
    ("output", "words"),
    [("pairs.jsonl", ["pairs.jsonl is a file", "directory"]), ("no/all", ["no directory no"])],
)
def test_bad_folders_for_many(trimtab: Command, work: Path, output: str, words: list[str]) -> None:
    before = listing(work)
    refused(trimtab("fit", "many", "caa", *shlex.split(FIT), "-o", output), *words)
    assert listing(work) == before


def test_a_cache_saves_the_second_run(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trimtab(f"fit caa {FIT} --cache kept -o one.st").text
    assert trimtab("fit", "many", "sadi k=2", *shlex.split(FIT), "--cache", "kept", "-o", "a").text
    monkeypatch.setattr("trimtab.fitting.activations._run", failing(AssertionError("it ran again")))
    assert trimtab(f"fit caa {FIT} --cache kept -o two.st").text
    assert trimtab("fit", "many", "sadi k=1", "caa", *shlex.split(FIT), "--cache", "kept", "-o",
                   "b").text  # fmt: skip
    paths = ("one.st", "two.st", "b/caa.safetensors")
    vectors = [tt.Steering.load(path).interventions[0].operator for path in paths]
    for vector in vectors[1:]:
        assert torch.equal(vector.vector, vectors[0].vector)  # type: ignore[attr-defined]
    assert "it ran again" in trimtab(f"fit caa {FIT} --token mean --cache kept -o three.st").err


def test_a_cache_that_is_a_file(trimtab: Command) -> None:
    refused(trimtab(f"fit caa {FIT} --cache pairs.jsonl -o one.st"), "cache", "pairs.jsonl")


def test_fit_of_unpaired_and_builtin_contrasts(trimtab: Command) -> None:
    write_rows("texts.jsonl", [{"text": t, "label": t} for t in ("positive", "negative")])
    assert trimtab("fit caa --model model --contrast texts.jsonl -o a.st --json").json
    found = trimtab("fit caa --model model --contrast builtin:facts -o b.st --json").json
    assert found["contrast"]["name"] == "builtin:facts"
    # Only the train part is fitted on.
    assert found["contrast"]["rows"] == len(tt.Contrast.builtin("facts").train)


def test_fit_of_csv(trimtab: Command) -> None:
    rows = "".join(f'"{p["prompt"]}","{p["positive"]}","{p["negative"]}"\n' for p in PAIRS)
    Path("pairs.csv").write_text("prompt,positive,negative\n" + rows)
    one = trimtab("fit caa --model model --contrast pairs.csv -o a.st --json").json
    two = trimtab(f"fit caa {FIT} -o b.st --json").json
    assert one["contrast"]["digest"] == two["contrast"]["digest"]


def test_fit_in_words(trimtab: Command) -> None:
    text = trimtab(f"fit austeer {FIT} --k 5 -o new.st").text
    for words in ("AUSteer changes 5 single units of heads", "Dial alpha: 8 now", "new.st"):
        assert words in text
    text = trimtab(f"fit caa {FIT} -o new.st --overwrite").text
    assert "CAA adds one vector" in text
    assert "Saved as new.st" in text


def test_words_with_brackets_stay(trimtab: Command, work: Path) -> None:
    """Names may look like markup of the library that prints them."""
    (work / "pairs.jsonl").rename("p[bold]:smile:[x.jsonl")
    name = "a[bold]:smile:[x.st"
    arguments = ["--model", "model", "--contrast", "p[bold]:smile:[x.jsonl", "-o", name]
    text = trimtab("fit", "caa", *arguments).text
    assert f"Saved as {name}." in text
    assert "p[bold]:smile:[x.jsonl" in trimtab("inspect", name).text
    text = trimtab("bake", "--model", "model", "-s", name, "-o", "m[bold]:smile:").text
    assert 'from_pretrained("m[bold]:smile:")' in text


def test_long_rows_are_cut_with_a_warning(trimtab: Command) -> None:
    rows = [*PAIRS[1:], {**PAIRS[0], "prompt": "word " * 300}]
    write_rows("long.jsonl", rows)
    ran = trimtab("fit caa --model model --contrast long.jsonl -o new.st --json")
    assert json.loads(ran.out)["method"] == "caa"
    (warning,) = warnings_of(ran)
    assert "1 of 4 rows are longer than 256 tokens" in warning
