"""Prompts beside methods: what is asked, what is chosen and on which rows, what it costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.multitest import multipletests

import trimtab as tt
from commands import Command, home, trimtab, work
from helpers import language_model, plain_logits
from test_compare import rows
from trimtab.evaluation import Prompted, Repeated, drifting, per_token
from trimtab.sweeps import TaskRows
from trimtab.sweeps.asking import LADDER, Behaviour, askings, write_prompt
from trimtab.sweeps.compare_methods import Candidate, compare
from trimtab.sweeps.comparison import Comparison

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

SAID = {"behaviour": "be glad", "opposite": "be sad."}
BUDGET = 0.01
ONE = (Candidate("caa", {"alpha": (2.0,)}, {"layer": 1}),)


def write(path: Path) -> str:
    lines = [*rows("train", 0, 8), *rows("validation", 8, 5), *rows("test", 13, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL on a few tokens, which is enough to see how it is asked for."""
    monkeypatch.setattr(per_token, "PROMPTS", 2)
    monkeypatch.setattr(per_token.Continuations.__init__, "__defaults__", (4,))


class Counted:
    """Which words were measured on which part, and how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, Any]] = []
        real = TaskRows.records

        def records(bench: TaskRows, attached: Any, part: Any, *rest: Any, **more: Any) -> Any:
            if isinstance(attached, Prompted) and attached.steering is None:
                self.asked.append((attached.text, part))
            return real(bench, attached, part, *rest, **more)

        monkeypatch.setattr(TaskRows, "records", records)


@pytest.fixture
def compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Comparison, Counted, str, Path]:
    pairs, counted = write(tmp_path / "pairs.jsonl"), Counted(monkeypatch)
    found = compare(
        language_model("llama"), ONE, f"contrast:{pairs}", max_cost=None, timed=False, kl=BUDGET,
        output=tmp_path / "run", written_prompt="Say it gladly.", **SAID,
    )  # fmt: skip
    return found, counted, pairs, tmp_path / "run"


@pytest.mark.usefixtures("undrawn")
def test_the_table(compared: tuple[Comparison, Counted, str, Path]) -> None:
    found, counted, pairs, run = compared
    prompts = found.prompts
    assert prompts is not None
    best = prompts.best
    names = ["ask", "ladder", "4 examples", "written prompt", "opposite ask", "caa"]
    assert [row.name for row in prompts.rows] == [*names, f"{best} + caa"]
    by_name = {row.name: row for row in prompts.rows}
    assert by_name["ask"].said == "Please be glad."
    assert by_name["opposite ask"].said == "Please be sad."
    # Every text once on validation rows, and on test rows only what was chosen there.
    on = {
        part: [text for text, one in counted.asked if one == part]
        for part in ("validation", "test")
    }
    assert len(on["validation"]) == len(set(on["validation"])) == len(LADDER) + 3
    assert len(on["test"]) == len(set(on["test"]))
    lm = language_model("llama")
    gains = {}
    for name, text in LADDER.items():
        asked = [
            replace(pair, prompt=f"{text.format(behaviour='be glad')}\n\n{pair.prompt}")
            for pair in tt.Contrast.from_jsonl(pairs).part("validation").pairs
        ]
        gains[name] = float(tt.log_odds(lm, tt.Contrast(tuple(asked))).mean())
    ladder = by_name["ladder"]
    assert ladder.rung == max(gains, key=lambda name: gains[name])
    assert {rung.name: rung.value for rung in ladder.rungs} == pytest.approx(gains, abs=1e-4)
    asks = [row for row in prompts.rows[:4] if row.validation is not None]
    assert best == max(asks, key=lambda row: row.validation.value).name  # type: ignore[union-attr]
    # p is corrected for all that is compared with the unsteered model.
    against = [row.against for row in prompts.rows if row.against is not None]
    plain = [one.p for one in against]
    assert [one.corrected_p for one in against] == pytest.approx(
        multipletests(plain, method="holm")[1]
    )
    assert found.rows[0].against == by_name["caa"].against
    (equal,) = prompts.at_kl
    assert equal.kl is not None
    assert equal.kl.mean == pytest.approx(prompts.kl, rel=0.01)
    base = [r["values"]["log_odds"] for r in found.rows[0].sweep.tested]  # type: ignore[union-attr]
    assert len(base) == 6
    kept = json.loads((run / "results.json").read_text())["prompts"]
    assert kept["best"] == best
    assert kept["rows"][0]["tokens"] > 0
    assert "Prompts beside methods" in (run / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_prompts_stand_at_the_budget_as_they_are(
    compared: tuple[Comparison, Counted, str, Path],
) -> None:
    """A prompt's place is the KL that it has at the next token, by plain passes over the prompts
    with and without it; p is corrected for methods and prompts together."""
    found, _, pairs, run = compared
    lm = language_model("llama")
    prompts = [str(pair.prompt) for pair in tt.Contrast.from_jsonl(pairs).part("validation").pairs]

    def expected(text: str) -> Any:
        return plain_logits(lm.model, lm.encode([text])[0])[-1].double().log_softmax(-1)

    moved = []
    for prompt in prompts:
        before, after = expected(prompt), expected(f"Please be glad.\n\n{prompt}")
        moved.append(float((before.exp() * (before - after)).sum()))
    kept = json.loads((run / "results.json").read_text())
    (at_budget,) = kept["at_budgets"]
    (method,), asked = at_budget["methods"], at_budget["prompts"]
    rows = {row["name"]: row for row in asked}
    best = kept["prompts"]["best"]
    assert set(rows) == {
        "ask", "ladder", "4 examples", "written prompt", "opposite ask", f"{best} + caa",
    }  # fmt: skip
    assert rows["ask"]["axis_kl"] == pytest.approx(statistics.median(moved), rel=1e-3)
    assert method["axis_kl"] == pytest.approx(BUDGET, rel=0.05)
    for row in asked:
        assert row["within"] is (row["axis_kl"] <= BUDGET)
    against = [one["against_unsteered"] for one in (method, *asked)]
    by_holm = multipletests([one["p"] for one in against], method="holm")[1]
    assert [one["corrected_p"] for one in against] == pytest.approx(by_holm)
    # Which methods beat the best prompt where they change as much is said beside it.
    beside = kept["prompts"]["at_kl"]
    clear = {
        name
        for name, one in beside["against_best"].items()
        if one["corrected_p"] < 0.05 and one["value"] > 0
    }
    assert set(beside["beat_best"]) == clear
    (table,) = [one for one in found.tables() if one.title.startswith("At an equal budget")]
    said = {row[0]: row[-1] for row in table.rows}
    assert "at its own" in said[best]


@pytest.mark.usefixtures("undrawn")
def test_what_is_kept_is_not_asked_again(
    compared: tuple[Comparison, Counted, str, Path],
) -> None:
    found, counted, pairs, run = compared
    counted.asked.clear()
    again = compare(
        language_model("llama"), ONE, f"contrast:{pairs}", max_cost=None, timed=False, kl=BUDGET,
        output=run, written_prompt="Say it gladly.", **SAID,
    )  # fmt: skip
    assert counted.asked == []
    assert again.prompts == found.prompts


@pytest.mark.usefixtures("undrawn")
def test_by_default_what_can_be_said_is(tmp_path: Path, trimtab: Command, work: Path) -> None:
    write(Path("pairs.jsonl"))
    line = "compare 'caa layer=1 alpha=2' --model model --task contrast:pairs.jsonl --untimed"
    plain = trimtab(f"{line} -o out --json").json
    assert plain["prompts"] is None
    assert len([note for note in plain["notes"] if "--behaviour" in note]) == 1
    examples = trimtab(f"{line} --baselines --json").json["prompts"]["rows"]
    assert next(row["name"] for row in examples if row["test"] is not None) == "4 examples"
    assert "--behaviour" in examples[0]["why"]
    said = trimtab(f"{line} --behaviour 'be glad'").text
    assert "Please be glad." in said
    assert "--opposite" in said
    # A run that was begun without prompts goes on without.
    assert trimtab(f"{line} -o out --json").json["prompts"] is None
    off = trimtab(f"{line} --behaviour 'be glad' --no-baselines --json").json
    assert off["prompts"] is None
    assert not [note for note in off["notes"] if "--behaviour" in note]


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_has_them_beside_its_best(trimtab: Command, work: Path) -> None:
    write(Path("pairs.jsonl"))
    line = "sweep caa --layer 1 --alpha 1,2 --model model --task contrast:pairs.jsonl --limit 4"
    found = trimtab(f"{line} --behaviour 'be glad' --max-cost inf -o out --json").json
    rows = {row["name"]: row for row in found["prompts"]["rows"]}
    assert rows["caa"]["test"] == found["best"]["test"]
    assert rows["ask"]["said"] == "Please be glad."
    assert rows[f"{found['prompts']['best']} + caa"]["kl"]["mean"] > 0
    assert trimtab(f"{line} --no-baselines --json").json["prompts"] is None


def test_a_method_is_not_called_as_a_prompt(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl")
    one = Candidate("caa", {"alpha": (2.0,)}, {"layer": 1}, "ask")
    with pytest.raises(tt.TrimtabError, match="name the method otherwise"):
        compare(language_model("llama"), [one], f"contrast:{pairs}", **SAID)


def test_examples_are_train_rows_alone(tmp_path: Path) -> None:
    contrast = tt.Contrast.from_jsonl(write(tmp_path / "pairs.jsonl"))
    shown = next(one for one in askings(Behaviour(), contrast) if "examples" in one.name)
    (prompted,) = shown.rungs.values()
    train = [(pair.prompt, pair.positive) for pair in contrast.train.pairs]
    assert len(prompted.examples) == 4
    assert all(example in train for example in prompted.examples)
    unpaired = tt.Contrast.from_texts(["glad"], ["sad"])
    assert "unpaired" in next(o for o in askings(Behaviour(), unpaired) if "examples" in o.name).why


def test_a_writer_sees_train_rows_alone(tmp_path: Path) -> None:
    contrast = tt.Contrast.from_jsonl(write(tmp_path / "pairs.jsonl"))
    seen: list[str] = []

    class Writer:
        name = "somebody"

        def ask(self, conversations: Sequence[Any]) -> list[str]:
            seen.extend(message["content"] for message in conversations[0])
            return [' "Answer gladly."\n']

    written = next(
        one for one in askings(Behaviour("be glad"), contrast, writer=Writer())
        if one.name == "written by somebody"
    )  # fmt: skip
    assert written.rungs[""].text == "Answer gladly."
    assert "be glad" in seen[0]
    for part, known in (("train", True), ("validation", False), ("test", False)):
        for pair in contrast.part(part).pairs:  # type: ignore[arg-type]
            assert (pair.positive in seen[1] and str(pair.prompt) in seen[1]) is known
    assert write_prompt(Writer(), contrast.train.pairs) == "Answer gladly."


def test_a_task_says_what_may_be_asked() -> None:
    from trimtab.evaluation import TASKS

    assert TASKS["copa"].behaviour
    contrast = tt.Contrast.from_pairs([("a", "b", "c")])
    assert [one.name for one in askings(Behaviour(TASKS["copa"].behaviour), contrast) if one.rungs]


@pytest.mark.slow
def test_the_opposite_ask_does_the_opposite(smollm2: Any) -> None:
    """On a real model, asking for formal answers makes them likelier, and for casual ones less."""
    contrast = tt.Contrast.builtin("formality")
    asks = {
        "ask": Prompted("Please write formally."),
        "opposite": Prompted("Please write casually."),
    }
    found = tt.evaluate(smollm2, contrast, steering=asks, limit=32)
    gains = {c.steering: c.difference for c in found.comparisons if c.metric == "log_odds"}
    assert gains["ask"] > 0 > gains["opposite"]


def test_what_lasts_over_turns_and_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drifting, "LONG", 8)
    monkeypatch.setattr(drifting, "STRETCHES", 2)
    lm, pairs = language_model("llama"), write(tmp_path / "pairs.jsonl")
    contrast = tt.Contrast.from_jsonl(pairs)
    steering = tt.CAA(layer=1).fit(lm, contrast)
    ask = Prompted("Please be glad.")
    bench = TaskRows(lm, f"contrast:{pairs}", limit=None)
    rows = Repeated(bench.task, bench.metric, True, lambda a, n: bench.records(a, "test", name=n))
    found = drifting.drift(lm, [rows], {"caa": steering, "ask": ask}, False, turns=(0, 1))
    (over,) = found.tasks
    assert list(over.gains["caa"]) == [0, 1]
    (_, paragraph), *_ = drifting._exchanges(lm, False, 1)
    test = contrast.part("test").pairs
    for name, words, one in (("caa", "", steering), ("ask", "Please be glad.\n\n", None)):
        before, after = (
            tt.log_odds(
                lm,
                tt.Contrast(
                    tuple(replace(p, prompt=f"{said}{paragraph}\n\n{p.prompt}") for p in test)
                ),
                who,
            )
            for said, who in (("", None), (words, one))
        )
        gain = float((after - before).mean())
        assert over.gains[name][1].difference == pytest.approx(gain, abs=1e-4)
        moved = over.gains[name][1].difference - over.gains[name][0].difference
        assert over.changes[name].difference == pytest.approx(moved, abs=1e-6)
    stretches = found.kl["ask"]
    assert list(stretches) == [(0, 4), (4, 8)]
    whole = per_token.Continuations(lm, per_token.neutral(lm, False), 8).kl(ask).mean
    assert sum(one.value for one in stretches.values()) / 2 == pytest.approx(whole, rel=1e-6)
    assert found.tables()[0].title.startswith("Gain behind")
    assert found.as_json()["gains"]["caa"][0]["turns"] == 0


@pytest.mark.usefixtures("undrawn")
def test_receipts_and_drift_beside_methods(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drifting, "LONG", 4)
    monkeypatch.setattr(drifting, "STRETCHES", 1)
    monkeypatch.setattr(drifting.drift, "__defaults__", ((0,),))
    write(Path("pairs.jsonl"))
    found = trimtab(
        "compare 'caa layer=1 alpha=2' --model model --task contrast:pairs.jsonl --untimed "
        "--behaviour 'be glad' --max-cost inf --drift --receipts --receipts-limit 1 --data . "
        "--json"
    ).json
    best = found["prompts"]["best"]
    assert list(found["drift"]["gains"]) == ["caa", best]
    receipts = {(one["task"], one["steering"]) for one in found["capability"]["results"]}
    assert {("writing", "caa"), ("plain text", best), ("plain text", None)} <= receipts
    assert any("mmlu" in note for note in found["capability"]["notes"])
