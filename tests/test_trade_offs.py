"""Searches for trade-offs: what a method does against what it changes, and the front of both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from commands import Command, home, trimtab, work
from helpers import language_model, plain_logits, refused_in_one_line, write_pairs
from trimtab.options import Search
from trimtab.reading import plain_texts
from trimtab.sweeps.baselines import Prompts, Row
from trimtab.sweeps.front import front, is_within, picked
from trimtab.sweeps.neutral import Neutral, neutral_texts
from trimtab.sweeps.result import Sweep, Trial
from trimtab.sweeps.space import Range, listed

__all__ = ["home", "trimtab", "work"]  # fixtures

TRIALS = 12
OPTIONS: dict[str, Any] = {
    "search": "pareto", "trials": TRIALS, "better": "less", "metric": "log_odds", "limit": 8,
    "test_limit": 6, "oracle": False, "kl_tokens": 3, "max_kl": 0.02,
    "fixed": {"kl": 1e9},  # so that the method unsearched finds a direction, too
}  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def search(lm: tt.LanguageModel, task: str, output: Path, **more: Any) -> Sweep:
    """A search without its page, whose pictures take longer than the trials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.sweeps.sweep_page.sweep_page", lambda *given: "")
        return tt.sweep(lm, "ablation", task, output=output, **{**OPTIONS, **more})


@pytest.fixture(scope="module")
def done(
    lm: tt.LanguageModel, task: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sweep, Path]:
    output = tmp_path_factory.mktemp("search") / "run"
    return search(lm, task, output), output


def figures(found: Sweep) -> Any:
    whole = found.as_json()
    for trial in (*whole["trials"], *whole["front"]):
        del trial["seconds"]
    del whole["seconds"], whole["samples"]
    return json.loads(json.dumps(whole))


def not_dominated(trials: list[dict[str, Any]]) -> set[int]:
    """By comparing each with each: less log-odds and less KL are better."""
    found = set()
    for one in trials:
        beaten = False
        for other in trials:
            no_worse = other["value"] <= one["value"] and other["kl"] <= one["kl"]
            better = other["value"] < one["value"] or other["kl"] < one["kl"]
            beaten |= no_worse and better
        if not beaten:
            found.add(one["number"])
    return found


def test_the_front_is_what_no_trial_beats(done: tuple[Sweep, Path]) -> None:
    found, output = done
    whole = json.loads((output / "results.json").read_text())
    trials = whole["trials"]
    assert len(trials) == TRIALS
    assert {trial["state"] for trial in trials} == {"complete"}
    assert {each["number"] for each in whole["front"]} == not_dominated(trials)
    assert [each["kl"] for each in whole["front"]] == sorted(e["kl"] for e in whole["front"])
    within = [trial for trial in trials if trial["kl"] <= 0.02 and trial["cost"] <= 0.3]
    best = min(within, key=lambda trial: trial["value"])
    assert whole["best"]["trial"] == best["number"]
    assert (whole["best"]["n"], whole["max_kl"]) == (6, 0.02)
    assert whole["best"]["ci95"] is not None
    assert set(whole["best"]["params"]) == {"layer", *(
        f"{part}_{name}" for part in ("attn", "ffn")
        for name in ("max", "position", "min", "distance")
    )}  # fmt: skip
    assert found.steering is not None
    assert len({each.weight for each in found.steering.interventions}) > 1
    assert tt.Steering.load(output / "best.safetensors").method == "ablation"


@pytest.mark.slow
def test_the_front_on_a_page(done: tuple[Sweep, Path], lm: tt.LanguageModel, task: str) -> None:
    _, output = done
    tt.sweep(lm, "ablation", task, output=output, **OPTIONS)  # what is finished is kept
    page = (output / "report.html").read_text()
    for said in ("Trade-offs: the Pareto front", "unsearched", "KL is measured at"):
        assert said in page
    assert list(output.glob("pictures/*front*.svg"))


def test_the_front_as_table_and_plot(done: tuple[Sweep, Path]) -> None:
    found, _ = done
    (table,) = [each for each in found.tables() if "front" in each.title]
    assert len(table.rows) == len(found.front) + (found.unsearched is not None)
    # A prompt stands among them with the KL that it has.
    ask = Row("ask", said="Please.", axis_kl=0.5)
    asked = replace(found, prompts=Prompts("be glad", (ask, Row("ladder", why="no words")), None))
    (beside,) = [each for each in asked.tables() if "front" in each.title]
    (row,) = beside.rows[len(table.rows) :]
    assert (row[1], row[2], row[-1]) == ("ask", "0.500", "above the limit")
    axes = found.plot()
    assert "Pareto front" in [line.get_label() for line in axes.lines]


def test_the_method_unsearched_is_measured_beside(
    done: tuple[Sweep, Path], lm: tt.LanguageModel, task: str
) -> None:
    found, _ = done
    contrast = tt.load_contrast(task.partition(":")[2]).with_parts("0.6,0.2,0.2")
    plain = tt.Ablation(kl=1e9).fit(lm, contrast, measure=False)
    assert found.unsearched is not None
    evaluated = tt.evaluate(lm, [task], steering=plain, limit=6)
    (expected,) = [
        r for r in evaluated.results if r.metric == "log_odds" and r.steering is not None
    ]
    assert found.unsearched.test == pytest.approx(expected.value, abs=1e-4)
    kept = tt.Steering.load(done[1] / "unsearched.safetensors")  # not to choose again
    assert kept.digest == plain.digest
    neutral = Neutral(lm, neutral_texts(contrast, None), 3)
    assert found.unsearched.kl == pytest.approx(neutral.kl(plain), rel=1e-4)


def test_kl_is_that_of_the_tokens_that_the_model_itself_writes(
    done: tuple[Sweep, Path], lm: tt.LanguageModel
) -> None:
    """By a loop over texts: greedy tokens one by one, then both distributions at each of them."""
    found, _ = done
    steering = found.steering
    assert steering is not None
    total, count, by_words = 0.0, 0, 0.0
    for text in plain_texts():
        ids = list(lm.encode([text])[0])
        start = len(ids)
        for _ in range(3):
            ids.append(int(plain_logits(lm.model, ids)[-1].argmax()))
        asked = [*lm.encode([f"Please.\n\n{text}"])[0], *ids[start:]]
        worded = plain_logits(lm.model, asked).double().log_softmax(-1)[-4:-1]
        before = plain_logits(lm.model, ids).double().log_softmax(-1)[start - 1 : -1]
        with lm.steered(steering):
            after = plain_logits(lm.model, ids).double().log_softmax(-1)[start - 1 : -1]
        total += float((before.exp() * (before - after)).sum())
        by_words += float((before.exp() * (before - worded)).sum())
        count += len(before)
    assert found.best is not None
    assert found.best.kl == pytest.approx(total / count, rel=1e-3)
    neutral = Neutral(lm, plain_texts(), 3)
    assert neutral.kl(steering.at(0)) == neutral.kl(tt.Prompted()) == 0
    assert neutral.kl(tt.Prompted("Please.")) == pytest.approx(by_words / count, rel=1e-3)


@pytest.mark.slow
def test_an_interrupted_search_goes_on(
    done: tuple[Sweep, Path], lm: tt.LanguageModel, task: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = []
    kl = Neutral.kl

    def counted(self: Neutral, steering: Any) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return kl(self, steering)

    with monkeypatch.context() as patch:
        patch.setattr(Neutral, "kl", counted)
        with pytest.raises(KeyboardInterrupt):
            search(lm, task, tmp_path / "run")
        found = search(lm, task, tmp_path / "run")
    # Five trials before, the others and the unsearched one after it.
    assert len(calls) == 6 + TRIALS - 5 + (found.unsearched is not None)
    assert figures(found) == figures(done[0])


def test_another_limit_or_a_number_chooses_from_what_is_finished(
    done: tuple[Sweep, Path], lm: tt.LanguageModel, task: str
) -> None:
    found, output = done
    other = found.front[-1]
    picked = search(lm, task, output, pick=other.number)
    assert picked.best is not None
    assert picked.best.number == other.number
    assert picked.best.test_n == 6
    strict = search(lm, task, output, max_kl=0.0)
    assert strict.best is None
    assert "no trial keeps the limits" in " ".join(strict.notes)
    refused_in_one_line(
        lambda: search(lm, task, output, pick=99),
        "no complete trial 99",
    )


def test_equal_trials_and_either_direction() -> None:
    trials = [
        Trial(i, {}, "complete", value=value, kl=kl)
        for i, (value, kl) in enumerate([(1, 0.5), (1, 0.5), (2, 0.5), (3, 0.9), (0, 0.1), (3, 1)])
    ]
    trials.append(Trial(6, {}, "failed"))
    assert [t.number for t in front(trials, maximise=True)] == [4, 2, 3]
    assert [t.number for t in front(trials, maximise=False)] == [4]
    assert [t.number for t in trials if is_within(t, 0.5, None)] == [0, 1, 2, 4]
    assert picked(trials, 3) == trials[3]


def test_one_pass_serves_all_layers_between_two(lm: tt.LanguageModel) -> None:
    ranges = {name: Range(*ends) for name, ends in tt.Ablation.ranges(30).items()}
    settings = listed(ranges)
    assert settings is not None
    layers = sorted({params["layer"] for params in settings})
    assert layers == pytest.approx([11.6, *range(12, 27), 26.1])
    assert len(settings) < 200


def test_which_texts_are_neutral(lm: tt.LanguageModel, tmp_path: Path) -> None:
    texts = tt.Contrast.from_texts(["Do it", "Say it"], ["Yes", "Never", "No"], "texts")
    rows = [
        replace(row, part="validation" if i > 1 else "train") for i, row in enumerate(texts.rows)
    ]
    assert neutral_texts(replace(texts, rows=tuple(rows)), None) == ["Yes", "Never", "No"]
    assert neutral_texts(texts, None) == list(plain_texts())
    (tmp_path / "own.txt").write_text("One\n\nTwo\n")
    assert neutral_texts(texts, str(tmp_path / "own.txt")) == ["One", "Two"]
    prompts = neutral_texts(texts, "builtin:formality")
    assert len(prompts) == len(set(prompts)) > 10
    refused_in_one_line(lambda: neutral_texts(texts, str(tmp_path / "no.txt")), "cannot read")


def test_other_searches_have_none_of_it(lm: tt.LanguageModel, task: str) -> None:
    with pytest.raises(tt.TrimtabError, match="--search pareto"):
        Search(pick=1)
    with pytest.raises(tt.TrimtabError, match="max_kl must be 0"):
        Search(search="pareto", max_kl=-1)
    found = tt.sweep(lm, "ablation", task, {"layer": (1, 2)}, limit=4, test_limit=4, oracle=False)
    assert "front" not in found.as_json()
    assert "kl" not in found.as_json()["trials"][0]


@pytest.mark.slow
def test_on_the_command_line(trimtab: Command, work: Path) -> None:
    write_pairs(work / "own.jsonl")
    line = (
        "sweep ablation --model model --task contrast:own.jsonl --search pareto --trials 3 "
        "--better less --limit 4 --test-limit 4 --no-oracle --kl-tokens 2 --layer 0.5:2 "
        "--project negative -o run"
    )
    found = trimtab(f"{line} --json").json
    assert set(found["trials"][0]["params"]) == {"layer"}
    assert all(0.5 <= trial["params"]["layer"] <= 2 for trial in found["trials"])
    said = trimtab(f"{line} --pick {found['front'][-1]['number']}").text
    assert "Trade-offs" in said
    # Nothing is fixed: the method unsearched finds no direction that leaves other text alone.
    assert found["unsearched"] is None
    assert "the method unsearched is not there" in " ".join(found["notes"])
    assert torch.isfinite(torch.tensor([trial["kl"] for trial in found["trials"]])).all()
