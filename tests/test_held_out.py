"""Which rows of a contrast are held out: by one rule, wherever rows are measured that nothing was
fitted on; and what is said where a steering knows them."""

from __future__ import annotations

import json
import random
import time
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import Command, refused, save_model, trimtab
from helpers import language_model, refused_in_one_line
from trimtab.contrasts import PARTS, Contrast, Pair
from trimtab.options import Evaluated, Rows, Split

__all__ = ["trimtab"]  # a fixture, which pytest finds by its name here

WORDS = ("glad", "calm", "kind", "warm", "fine", "good", "nice", "bright", "gentle", "happy")
shared = cache(language_model)


def own(count: int = 30, name: str = "own") -> Contrast:
    """Pairs without parts, of as many prompts."""
    return Contrast.from_pairs(
        [
            (f"On day {i} I felt", f" {WORDS[i % 10]} again", f" rather {WORDS[i * 3 % 10][::-1]}")
            for i in range(count)
        ],
        name=name,
    )


def ids(found: Any) -> list[str]:
    return [record["id"] for record in found.records if record["steering"] is None]


def held_out(contrast: Contrast, part: str) -> list[str]:
    return [str(n) for n, row in enumerate(contrast.rows, 1) if row.part == part]


# -- the split ------------------------------------------------------------------------------------


def test_a_split_is_written_as_it_is_read() -> None:
    for text in ("0.6,0.2,0.2", "0.5,0.2,0.3:7", "0.8,0,0.2"):
        assert str(Split.read(text)) == text
        assert Split.read(Split.read(text)) == Split.read(text)
    assert Split.read((0.5, 0.25, 0.25)) == Split(0.25, 0.25)
    assert Split.read("none") is Split.read("0") is Split.read(None) is None
    assert Split.read("1,0,0") is None
    third = Split(1 / 3, 1 / 3)
    assert Split.read(str(third)) == Split.read(str(Split.read(str(third))))
    assert Rows(split=Split(0.25, 0.25, 3)).split == "0.5,0.25,0.25:3"
    for bad in ("0.6,0.2", "0.6,0.2,0.3", "a,b,c", "0.6,0.2,0.2:x", "0.6,0.2,0.2:-1", "0,0.5,0.5"):
        refused_in_one_line(lambda bad=bad: Evaluated(split=bad), "split")


def test_thirty_pairs_are_enough_and_nineteen_are_not() -> None:
    assert own(30).with_parts().sizes == {"train": 18, "validation": 6, "test": 6}
    assert own(36).with_parts().sizes == {"train": 22, "validation": 7, "test": 7}
    few = own(19)
    assert few.with_parts() is few
    assert few.too_few == "19 different prompts are too few to hold some out (20 are the least)"
    assert few.split().sizes == {"train": 11, "validation": 4, "test": 4}  # where it is asked for
    assert own(30).with_parts(None).sizes == {}
    named = own(30).split(0.5, 0.1, seed=4)
    assert named.with_parts("0.2,0.4,0.4") is named  # rows that name their parts keep them
    again = Contrast(tuple(reversed(own(30).rows)))
    assert again.with_parts("0.6,0.2,0.2:1").sizes == own(30).with_parts().sizes


@pytest.mark.parametrize("seed", range(4))
def test_no_prompt_is_on_two_sides_whatever_its_blanks_and_capitals(seed: int) -> None:
    draw = random.Random(seed)
    pairs = []
    for i in range(60):
        text = f"Say  hello to person {i // 2}"
        text = draw.choice([text, text.upper(), f" {text}\n", text.replace(" ", "  ")])
        asked: Any = [{"role": "user", "content": text}] if i % 4 < 2 else text
        pairs.append((asked, f"a{i}", f"b{i}"))
    split = Contrast.from_pairs(pairs).split(seed=seed)
    parts: dict[int, set[str | None]] = {}
    for i, row in enumerate(split.rows):
        parts.setdefault(i // 2, set()).add(row.part)
    assert all(len(found) == 1 for found in parts.values())
    assert split.sizes == {"train": 36, "validation": 12, "test": 12}


def test_pairs_without_a_prompt_go_by_their_sides() -> None:
    rows = [("", f"happy {i // 2}", f"sad {i}") for i in range(40)]  # two and two share a side
    split = Contrast.from_pairs(rows).with_parts()
    assert split.sizes == {"train": 24, "validation": 8, "test": 8}
    assert all(split.rows[i].part == split.rows[i + 1].part for i in range(0, 40, 2))


def test_thousands_of_rows_of_one_prompt_take_no_time() -> None:
    started = time.process_time()
    many = Contrast.from_pairs([(f"p {i % 40}", f"a {i}", f"b {i}") for i in range(20_000)])
    assert many.with_parts().sizes == {"train": 12_000, "validation": 4_000, "test": 4_000}
    assert time.process_time() - started < 20


def test_a_chain_of_shared_sides_is_one_group() -> None:
    chain = Contrast.from_pairs([("", f"t {i}", f"t {i + 1}") for i in range(25)])
    assert chain.too_few == "1 prompt is too few to hold some out (20 are the least)"


def test_each_label_of_unpaired_texts_is_dealt_out() -> None:
    texts = Contrast.from_texts([f"good {i}" for i in range(10)], [f"bad {i}" for i in range(50)])
    for part, sizes in (("train", (6, 30)), ("validation", (2, 10)), ("test", (2, 10))):
        labels = [row.label for row in texts.with_parts().part(part).texts]  # type: ignore[arg-type]
        assert (labels.count("positive"), labels.count("negative")) == sizes
    few = Contrast.from_texts([f"good {i}" for i in range(9)], [f"bad {i}" for i in range(50)])
    assert few.with_parts() is few
    assert few.too_few.startswith("9 texts of a label are too few")


# -- what a steering was fitted on ----------------------------------------------------------------


def test_the_rows_that_a_steering_was_fitted_on_are_found_again() -> None:
    lm, contrast = shared("llama"), own()
    rows = contrast.rows
    method = tt.CAA(layer=1)
    for given, expected in (
        (contrast, rows),
        (contrast.split(), contrast.split().train.rows),
        (contrast.split(0.1, 0.3, 5), contrast.split(0.1, 0.3, 5).train.rows),
    ):
        fitted = method.fit(lm, given).contrast
        assert fitted["rows"] == len(expected)
        found = contrast.fitted_rows(fitted)
        assert {replace(row, part=None) for row in found} == {
            replace(row, part=None) for row in expected
        }
    assert own(29).fitted_rows(method.fit(lm, contrast).contrast) == ()
    assert contrast.fitted_rows({"digest": "x", "split": ["no", {"split": 1}]}) == ()
    assert contrast.fitted_rows({"digest": 3, "split": 5}) == ()


def test_an_honest_figure_is_said_to_be_one_and_another_is_not() -> None:
    lm, contrast = shared("llama"), own()
    clean = tt.CAA(layer=1).fit(lm, contrast.with_parts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tt.evaluate(lm, contrast, steering=clean)
    assert ids(found) == held_out(contrast.with_parts(), "test")
    assert list(found.notes) == [
        "own names no parts: 18 train, 6 validation, 6 test pairs were drawn (split 0.6,0.2,0.2)"
    ]
    for given, count in ((contrast, 6), (contrast.split(seed=9), None)):
        known = tt.CAA(layer=1).fit(lm, given)
        trained = {replace(row, part=None) for row in given.train.rows}
        tested = contrast.with_parts().part("test").rows
        count = count or sum(replace(row, part=None) in trained for row in tested)
        assert count
        with pytest.warns(tt.TrimtabWarning, match=f"was fitted on {count} of the 6 test pairs"):
            found = tt.evaluate(lm, contrast, steering=known)
        assert any(f"fitted on {count} of the 6" in note for note in found.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(tt.evaluate(lm, contrast, steering=clean, part="train")) == held_out(
            contrast.with_parts(), "train"
        )


def test_a_file_that_has_changed_since_is_said_to_have() -> None:
    lm = shared("llama")
    fitted = tt.CAA(layer=1).fit(lm, own(30).with_parts())
    with pytest.warns(tt.TrimtabWarning, match="was fitted on other rows of own than those that"):
        tt.evaluate(lm, own(36), steering=fitted)
    unnamed = tt.CAA(layer=1).fit(lm, own(30, "contrast").with_parts())
    for contrast in (own(36, "contrast"), own(36).split(seed=3), own(36, "another")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if contrast.name == "own":  # parts that the file names are its writer's matter
                contrast = replace(contrast, drawn=None)
                tt.evaluate(lm, contrast, steering=fitted)
            else:
                tt.evaluate(lm, contrast, steering=unnamed)


def test_another_split_holds_out_other_rows(tmp_path: Path) -> None:
    lm, contrast = shared("llama"), own()
    found = tt.evaluate(lm, contrast, split="0.4,0.2,0.4:3", output=tmp_path / "run")
    assert ids(found) == held_out(contrast.split(0.2, 0.4, 3), "test")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tasks"] == [
        {
            "task": "contrast:own",
            "rows": 12,
            "sha256": contrast.split(0.2, 0.4, 3).part("test").digest,
            "split": "0.4,0.2,0.4:3",
        }
    ]
    with pytest.raises(tt.TrimtabError, match="differs in tasks"):
        tt.evaluate(lm, contrast, split="0.4,0.2,0.4:4", output=tmp_path / "run")
    with pytest.raises(tt.TrimtabError, match="differs in tasks"):  # the same name, other texts
        tt.evaluate(lm, own(29), split="0.4,0.2,0.4:3", output=tmp_path / "run")
    again = tt.evaluate(lm, contrast, split=Split(0.2, 0.4, 3), output=tmp_path / "run")
    assert again.records == found.records


def test_what_is_too_small_says_so() -> None:
    lm = shared("llama")
    refused_in_one_line(
        lambda: tt.evaluate(lm, own(8)),
        "own has no test rows, and 8 different prompts are too few to hold some out",
    )
    refused_in_one_line(lambda: tt.evaluate(lm, own(), split=None), "there is no split")
    assert ids(tt.evaluate(lm, own(8), part="train")) == [str(n) for n in range(1, 9)]
    assert len(ids(tt.evaluate(lm, own(), part="train", split=None))) == 30


# -- contrasts where names are taken --------------------------------------------------------------


def test_several_tasks_of_which_some_are_contrasts() -> None:
    lm = shared("llama")
    other = "contrast:builtin:formality"
    found = tt.evaluate(lm, [own(), other], limit=2)
    assert list(dict.fromkeys(r["task"] for r in found.records)) == ["contrast:own", other]
    refused_in_one_line(
        lambda: tt.evaluate(lm, [own(30), own(29)]), "two tasks are called 'contrast:own'"
    )


def test_a_contrast_is_swept_and_compared_on() -> None:
    lm, contrast = shared("llama"), own()
    parted = contrast.with_parts()
    swept = tt.sweep(lm, "caa", contrast, {"alpha": [1.0, 4.0]}, fixed={"layer": 1})
    assert swept.task == "contrast:own"
    assert swept.steering is not None
    assert swept.steering.contrast["digest"] == parted.train.digest
    assert [record["id"] for record in swept.tested] == held_out(parted, "test")
    by_parts = tt.sweep(lm, "caa", parted, {"alpha": [1.0, 4.0]}, fixed={"layer": 1})
    assert [t.value for t in by_parts.trials] == [t.value for t in swept.trials]
    one = tt.Candidate("caa", {"alpha": [1.0, 4.0]}, {"layer": 1})
    compared = tt.compare(lm, [one], contrast, timed=False)
    assert compared.task == "contrast:own"
    assert compared.rows[0].sweep is not None
    assert compared.rows[0].sweep.best == swept.best or compared.rows[0].test is not None
    # The same contrast named once more, without parts, is fitted on its train rows too.
    again = tt.sweep(lm, "caa", contrast, {"alpha": [1.0]}, fixed={"layer": 1}, contrast=own())
    assert again.steering is not None
    assert again.steering.contrast["digest"] == parted.train.digest


def test_another_contrast_that_has_the_test_rows_is_warned_about() -> None:
    lm, contrast = shared("llama"), own()
    more = Contrast((*contrast.rows, Pair("So", " it", " was")), "more")
    with pytest.warns(tt.TrimtabWarning, match="6 of the 6 test rows of contrast:own are among"):
        tt.sweep(lm, "caa", contrast, {"alpha": [1.0]}, fixed={"layer": 1}, contrast=more)


def test_an_analysis_takes_a_contrast() -> None:
    from trimtab.papers import ANALYSES

    found = ANALYSES["count"](shared("llama"), own(), ks=[1, 4], alpha=1.0, limit=None)
    assert found.data["task"] == "contrast:own"
    assert found.title.endswith("on contrast:own")


# -- from the command line ------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "model", name="llama")
    monkeypatch.chdir(tmp_path)
    own().to_jsonl("own.jsonl")
    own(8).to_jsonl("few.jsonl")
    return tmp_path


FIT = "fit caa --model model --layer 1"


def test_fit_holds_out_what_evaluate_asks(trimtab: Command, work: Path) -> None:
    said = trimtab(f"{FIT} -c own.jsonl -o own.safetensors").text
    assert (
        "Fitted on 18 of 30 pairs; 6 validation and 6 test pairs are held out (split 0.6,0.2,0.2; "
        "--split none fits on all)." in " ".join(said.split())
    )
    run = "evaluate --model model --task contrast:own.jsonl --json --steer"
    found = trimtab(f"{run} own.safetensors").json  # nothing is said on standard error
    assert {result["n"] for result in found["results"]} == {6}
    assert found["notes"] == [
        "own.jsonl names no parts: 18 train, 6 validation, 6 test pairs were drawn (split "
        "0.6,0.2,0.2)"
    ]
    train = trimtab(f"{run} own.safetensors --part train").json
    assert {result["n"] for result in train["results"]} == {18}
    whole = trimtab(f"{FIT} -c own.jsonl --split none -o all.safetensors --json").json
    assert whole["contrast"]["rows"] == 30
    assert "split" not in whole["contrast"]
    leaking = trimtab(f"{run} all.safetensors")
    assert "was fitted on 6 of the 6 test pairs of contrast:own.jsonl" in leaking.err
    assert "was fitted on 6 of the 6 test pairs" in json.loads(leaking.out)["notes"][1]


def test_another_split_is_the_same_in_both(trimtab: Command, work: Path) -> None:
    split = "--split 0.5,0.2,0.3:7"
    fitted = trimtab(f"{FIT} -c own.jsonl {split} -o own.safetensors --json").json["contrast"]
    assert (fitted["rows"], fitted["split"]) == (15, "0.5,0.2,0.3:7")
    run = f"evaluate --model model --task contrast:own.jsonl --steer own.safetensors {split} --json"
    assert {result["n"] for result in trimtab(run).json["results"]} == {9}
    refused(trimtab(f"{FIT} -c own.jsonl --split 0.5,0.2 -o b.safetensors"), "TRAIN,VALIDATION")
    assert not Path("b.safetensors").exists()


def test_fit_says_that_a_small_file_is_taken_whole(trimtab: Command, work: Path) -> None:
    said = " ".join(trimtab(f"{FIT} -c few.jsonl -o few.safetensors").text.split())
    assert "Fitted on all 8 pairs: 8 different prompts are too few to hold some out" in said
    run = "evaluate --model model --task contrast:few.jsonl --steer few.safetensors --json"
    refused(trimtab(run), "few.jsonl has no test rows")
    assert {r["n"] for r in trimtab(f"{run} --part train").json["results"]} == {8}


def test_a_method_that_chooses_on_validation_rows_has_some(trimtab: Command, work: Path) -> None:
    line = "fit caa --model model --layer validation -o v.safetensors --json -c"
    assert trimtab(f"{line} own.jsonl").json["contrast"]["rows"] == 18
    refused(trimtab(f"{line} few.jsonl --overwrite"), "has none: name parts", "--split")


@pytest.mark.slow
def test_one_file_serves_sweep_compare_and_analyse(trimtab: Command, work: Path) -> None:
    own_rows = "--model model --task contrast:own.jsonl --json"
    swept = trimtab(f"sweep caa {own_rows} --layer 1 --alpha 1,4").json
    assert swept["best"]["test"] is not None
    assert swept["trials"][0]["n"] == 6
    compared = trimtab(f"compare 'caa layer=1 alpha=1' {own_rows} --untimed").json
    assert compared["unsteered"]["test"]["n"] == 6
    counted = trimtab(f"analyse count {own_rows} --ks 1,4 --alpha 1 -o count").json
    assert counted["task"] == "contrast:own.jsonl"
    config = json.loads(Path("count", "config.json").read_text())
    assert config["task"]["test"]["split"] == "0.6,0.2,0.2"
    assert "split" not in config["options"]
    drawn = trimtab(f"sweep caa {own_rows} --layer 1 --alpha 1 --split 0.4,0.3,0.3:2").json
    assert drawn["trials"][0]["n"] == 9


def test_curves_are_of_the_rows_that_were_fitted_on(trimtab: Command, work: Path) -> None:
    trimtab(f"{FIT} -c own.jsonl -o own.safetensors").text  # noqa: B018
    line = (
        "strength curve --model model --steer own.safetensors --raw So --points 3 --range -1:1 "
        "--top 2 --json --contrast"
    )
    own().with_parts().to_jsonl("parts.jsonl")
    found = trimtab(f"{line} own.jsonl").json
    assert found["curve"] == trimtab(f"{line} parts.jsonl").json["curve"]


def test_parts_that_the_file_names_are_kept(trimtab: Command, work: Path) -> None:
    named = own().split(0.1, 0.5, seed=3)
    named.to_jsonl("named.jsonl")
    fitted = trimtab(f"{FIT} -c named.jsonl -o named.safetensors --json").json["contrast"]
    assert fitted == {"name": "named.jsonl", "digest": named.train.digest, "rows": 12}
    assert set(PARTS) == set(named.sizes)


def test_one_pair_is_warned_about(trimtab: Command, work: Path) -> None:
    own(1).to_jsonl("one.jsonl")
    said = trimtab(f"{FIT} -c one.jsonl -o one.safetensors --json")
    assert said.status == 0
    assert "one.jsonl: there is one pair to fit on" in said.err
    quiet = trimtab("fit actadd --model model --layer 1 -c one.jsonl -o two.safetensors --json")
    assert quiet.err == ""  # it takes one pair, whatever there is


@pytest.mark.slow
def test_a_recipe_takes_a_contrast(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = tt.reproduce(shared("llama"), "ss-norms", scale="full", contrast=own(), output=run)
    assert found.values
    config = json.loads((run / "config.json").read_text())
    assert {"name": "own", "digest": own().digest} in [
        part["contrast"] for part in config["parts"].values()
    ]
    refused_in_one_line(
        lambda: tt.reproduce(
            shared("llama"), "ss-norms", scale="full", contrast=own(29), output=run
        ),
        "differs in parts",
    )
