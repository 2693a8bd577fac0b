"""Which side of a pair a model prefers, as a task: equal to a plain loop over whole texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from commands import Command, refused, save_model, trimtab
from helpers import add, by_hand, language_model, refused_in_one_line, steer, steer_at
from tiny import tiny_tokenizer
from trimtab.evaluation.answering import Settings
from trimtab.evaluation.evaluation import evaluate
from trimtab.evaluation.jobs import Judging, PreferenceJob, Wanted, find_job
from trimtab.reading.likelihood import log_odds
from trimtab.reading.streams import StreamCache
from trimtab.steering import POSITIONS, Positions

__all__ = ["trimtab"]  # a fixture, which pytest finds by its name here

#: Sides of one token and of several, prompts of different lengths, twins that share a prompt.
PAIRS = [
    ("She looked at the map", " and asked where they were going.", "."),
    ("Today I feel", " good.", " old."),
    ("Today I feel", " happy because of the rain and the fire.", " old."),
    ("The answer is", " yes", " no"),
    ("What is the best way to learn a language? Read, write and", " speak every day.", " sit."),
    ("The ship left the harbour in the morning, and the captain", " stood.", " was not known."),
    ("It is", " right", " wrong, and other people think that it is right."),
]
PARTS = ("train", "test", "validation", "test", "test", "validation", "test")

#: For tests that leave the model as it is.
shared = cache(language_model)


def pairs_file(folder: Path, parts: Any = PARTS) -> str:
    rows = [
        {"prompt": prompt, "positive": positive, "negative": negative}
        | ({} if part is None else {"part": part})
        for (prompt, positive, negative), part in zip(PAIRS, parts, strict=True)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def plainly(
    lm: tt.LanguageModel, pair: tuple[str, str, str], edit: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Log-odds of one pair from two whole texts; `edit` changes the output of block 1."""
    prompt, *sides = (tiny_tokenizer()(text).input_ids for text in (pair[0], *_whole(pair)))
    # A prompt's last token may merge with one side: both are scored from where all agree.
    start = min(
        next((i for i, (a, b) in enumerate(zip(prompt, side, strict=False)) if a != b), len(prompt))
        for side in sides
    )
    found = []
    for ids in sides:
        handle = lm.model.model.layers[1].register_forward_hook(
            lambda m, a, out: edit(out) if edit else out
        )
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0].double()
        handle.remove()
        log_p = logits.log_softmax(-1)
        found.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
    return found[0] - found[1]


def _whole(pair: tuple[str, str, str]) -> tuple[str, str]:
    return pair[0] + pair[1], pair[0] + pair[2]


def job(path: str, part: Any = "test", limit: int | None = None) -> PreferenceJob:
    found = find_job(f"contrast:{path}", Wanted(part=part, limit=limit), Judging())
    assert isinstance(found, PreferenceJob)
    return found


def records(
    lm: tt.LanguageModel, of: PreferenceJob, steering: Any = None, kept: StreamCache | None = None
) -> list[dict[str, Any]]:
    found = [r for some in of.run(lm, steering, set(), Settings(kept=kept)) for r in some]
    return sorted(found, key=lambda record: record["index"])


# -- the figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_each_pair_is_what_a_plain_loop_finds(name: str, tmp_path: Path) -> None:
    lm = shared(name)
    operator = add(lm.anatomy.hidden_size, 3, 1.0)
    edits = {None: None, 1.0: by_hand(operator), -2.0: by_hand(operator, -2.0)}
    steering = steer(lm, ("layers.1.resid", operator))
    wanted = [i for i, part in enumerate(PARTS) if part == "test"]
    kept = StreamCache(lm)
    signs = set()
    for dial, edit in edits.items():
        steered = None if dial is None else steering.at(dial)
        for keeping in (None, kept):
            found = records(lm, job(pairs_file(tmp_path)), steered, keeping)
            assert [record["index"] for record in found] == list(range(len(wanted)))
            for record, i in zip(found, wanted, strict=True):
                odds = plainly(lm, PAIRS[i], edit)
                assert record["values"]["log_odds"] == pytest.approx(odds, abs=1e-4)
                assert record["values"]["prefers"] == (odds > 0)
                assert record["id"] == str(i + 1)  # the row of the file
                assert record["prompt"] == PAIRS[i][0]
                assert record["target"] == PAIRS[i][1]
                assert record["output"] == PAIRS[i][1 if odds > 0 else 2]
                signs.add(odds > 0)
    assert signs == {True, False}


@pytest.mark.parametrize("positions", POSITIONS)
def test_each_pair_is_what_log_odds_says(positions: Positions, tmp_path: Path) -> None:
    lm = shared("llama")
    contrast = tt.Contrast.from_pairs([PAIRS[i] for i in range(7) if PARTS[i] == "test"])
    kept = StreamCache(lm)
    for kind, layer in (("ffn_out", 2), ("heads", 1)):
        steering = steer_at(lm, kind, layer=layer, positions=positions)
        expected = log_odds(lm, contrast, steering).tolist()
        for keeping in (None, kept):
            found = records(lm, job(pairs_file(tmp_path)), steering, keeping)
            odds = [record["values"]["log_odds"] for record in found]
            assert odds == pytest.approx(expected, abs=1e-4)


def test_parts_and_other_orders_are_the_same_pairs(tmp_path: Path) -> None:
    lm = shared("llama")
    whole = job(pairs_file(tmp_path))
    expected = {record["id"]: record["values"] for record in records(lm, whole)}
    order = [2, 0, 3, 1]
    shuffled = whole.shuffled(order)
    ids = [record["id"] for record in records(lm, shuffled)]
    assert ids == [str((2, 4, 5, 7)[i]) for i in order]
    for start, stop in ((0, 4), (0, 1), (1, 3), (3, 4)):
        found = records(lm, shuffled.part(start, stop))
        assert [record["index"] for record in found] == list(range(stop - start))
        assert [record["id"] for record in found] == ids[start:stop]
        for record in found:
            assert record["values"] == pytest.approx(expected[record["id"]], abs=1e-4)
    assert (whole.rows, shuffled.part(1, 3).rows) == (4, 2)


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    lm = language_model("llama")
    of = job(pairs_file(tmp_path))
    seen: list[int] = []
    lm.anatomy.body.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    done = {("", 0), ("", 2), ("", 3)}
    found = [r for some in of.run(lm, None, done, Settings()) for r in some]
    assert [record["index"] for record in found] == [1]
    assert seen
    seen.clear()
    assert list(of.run(lm, None, {("", i) for i in range(4)}, Settings())) == []
    assert seen == []


@pytest.mark.slow
def test_a_real_model_on_a_builtin_contrast(smollm2: tt.LanguageModel) -> None:
    """Conversations through the template, BOS once, merges at the seam."""
    for source in ("builtin:formality", "builtin:facts"):
        of = job(source, limit=2)
        contrast = tt.Contrast(of.pairs)
        found = [record["values"]["log_odds"] for record in records(smollm2, of)]
        assert found == pytest.approx(log_odds(smollm2, contrast).tolist(), abs=1e-4)
        for pair, odds in zip(of.pairs, found, strict=True):
            scores = []
            for side in (pair.positive, pair.negative):
                start, ids = (
                    row[0] for row in (smollm2.encode([pair.prompt]), _joined(smollm2, pair, side))
                )
                assert ids[: len(start)] == start  # no merge here, or this loop would be wrong
                with torch.no_grad():
                    log_p = smollm2.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(len(start), len(ids))))
            assert odds == pytest.approx(scores[0] - scores[1], abs=1e-3)


def _joined(lm: tt.LanguageModel, pair: Any, side: str) -> list[list[int]]:
    return lm.encode([pair.prompt], [side])


# -- in an evaluation -----------------------------------------------------------------------------


def test_an_evaluation_has_both_metrics_with_intervals(tmp_path: Path) -> None:
    lm = shared("llama")
    task = f"contrast:{pairs_file(tmp_path)}"
    steering = steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size, 3, 1.0)))
    found = evaluate(lm, task, steering={"s": steering.at(10.0)}, output=tmp_path / "run")
    for name in (None, "s"):
        rows = [record for record in found.records if record["steering"] == name]
        odds = [record["values"]["log_odds"] for record in rows]
        result = found.value(task, "log_odds", name)
        assert (result.value, result.n) == (pytest.approx(sum(odds) / 4), 4)
        assert result.ci95 is not None
        assert result.ci95[0] <= sum(odds) / 4 <= result.ci95[1]
        share = found.value(task, "prefers", name)
        assert (share.value, share.n) == (sum(value > 0 for value in odds) / 4, 4)
    compared = {c.metric: c for c in found.comparisons}
    assert compared["log_odds"].p is None
    gained, lost = compared["prefers"].gained, compared["prefers"].lost
    flips = found.flips()  # of what is preferred: nats do not flip
    assert len(flips) == (gained or 0) + (lost or 0) > 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for text in ("log-odds, nats", "prefers", "What flipped", f"{len(flips)} of {len(flips)}"):
        assert text in page
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tasks"][0]["rows"] == 4


def test_limit_and_part(tmp_path: Path) -> None:
    lm = shared("llama")
    task = f"contrast:{pairs_file(tmp_path)}"
    found = evaluate(lm, task, part="validation")
    assert [record["id"] for record in found.records] == ["3", "6"]
    assert [record["id"] for record in evaluate(lm, task, limit=3).records] == ["2", "4", "5"]


def test_other_pairs_are_another_run(tmp_path: Path) -> None:
    lm = shared("llama")
    options: dict[str, Any] = {"output": tmp_path / "run"}
    task = f"contrast:{pairs_file(tmp_path)}"
    evaluate(lm, task, **options)
    pairs_file(tmp_path, ("test", "train", *PARTS[2:]))  # other rows in the test part
    refused_in_one_line(lambda: evaluate(lm, task, **options), "differs in tasks")


# -- what is refused ------------------------------------------------------------------------------


def test_what_is_no_task(tmp_path: Path) -> None:
    lm = shared("llama")
    unmarked = pairs_file(tmp_path, [None] * 7)
    refused_in_one_line(lambda: evaluate(lm, f"contrast:{unmarked}"), "has no test rows")
    missing = str(tmp_path / "none.jsonl")
    refused_in_one_line(lambda: evaluate(lm, f"contrast:{missing}"), "cannot read the contrast")
    refused_in_one_line(lambda: evaluate(lm, "contrast:builtin:none"), "no builtin contrast 'none'")
    refused_in_one_line(lambda: evaluate(lm, "contrast:"), "cannot read the contrast")
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": f"So {i}", "label": ("positive", "negative")[i % 2]} for i in range(4)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused_in_one_line(lambda: evaluate(lm, f"contrast:{texts}"), "texts.jsonl is unpaired")
    refused_in_one_line(lambda: evaluate(lm, "cupa"), "unknown task 'cupa': .*contrast:SOURCE")


# -- from the command line ------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own directory to work in, with a model."""
    save_model(tmp_path / "model", name="llama")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_the_command_line(trimtab: Command, work: Path) -> None:
    run = "evaluate --model model --task contrast:builtin:formality --limit 4 -o run --json"
    result = trimtab(run)
    assert result.status == 0, result.err
    figures = {found["metric"]: found for found in json.loads(result.out)["results"]}
    assert set(figures) == {"log_odds", "prefers"}
    assert figures["log_odds"]["n"] == 4
    file = work / "run" / "records.jsonl"
    first = file.read_text(encoding="utf-8").split("\n")[0]
    file.write_text(first + "\n", encoding="utf-8")
    again = json.loads(trimtab(run).out)
    assert again["results"] == json.loads(result.out)["results"]
    assert "contrast:SOURCE" in trimtab("evaluate --list").out
    refused(trimtab("evaluate --model model --task contrast:none.jsonl"), "cannot read")
