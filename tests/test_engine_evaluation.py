"""Evaluations through an engine: the records and figures are those of transformers, all subjects in
one continuous batch; what an engine cannot answer alike is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import Command, home, refused, trimtab, work, write_rows
from engine_stand_in import StandIn, stand_in
from evaluations import Scorer, chooser, content, data, strong, talker

__all__ = ["chooser", "data", "home", "stand_in", "talker", "trimtab", "work"]  # fixtures


@pytest.fixture(autouse=True)
def _more_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "most", 8)


def alike(found: Any, expected: Any) -> None:
    """All figures and records but seconds; numbers up to how passes round."""
    close(content(found.records), content(expected.records))
    close([asdict(one) for one in found.results], [asdict(one) for one in expected.results])
    close([asdict(one) for one in found.comparisons], [asdict(one) for one in expected.comparisons])
    assert found.notes == expected.notes


def close(one: Any, other: Any) -> None:
    if isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each, beside in zip(one, other, strict=True):
            close(each, beside)
    else:
        assert one == other


def subjects(lm: tt.LanguageModel) -> dict[str, Any]:
    steering = strong(lm)
    return {"strong": steering, "back": steering.at(-1), "words": tt.Prompted("Answer well.")}


def test_choices_pairs_and_texts(chooser: tt.LanguageModel, data: Path, tmp_path: Path) -> None:
    contrast = tt.Contrast.from_pairs(
        [(f"Today {i} I feel", " happy and glad", " sad") for i in range(6)]
    )
    write_rows(
        data / "texts.jsonl", [{"text": f"The ship {i} left the harbour."} for i in range(3)]
    )
    tasks = ["copa", contrast, f"perplexity:{data / 'texts.jsonl'}"]
    options: dict[str, Any] = {
        "steering": subjects(chooser), "data": str(data), "split": None, "part": "train",
        "limit": 9,
    }  # fmt: skip
    expected = tt.evaluate(chooser, tasks, **options)
    with tt.VLLM(chooser) as engine:
        found = tt.evaluate(chooser, tasks, **options, engine=engine)
        (inner,) = StandIn.opened
        # All subjects asked before the first answer came.
        assert len({str(one.wanted) for one in inner.asked[:40]}) > 2
    alike(found, expected)
    assert {one["steering"] for one in found.records} == {None, "strong", "back", "words"}
    assert expected.flips()  # steerings show


def test_written_answers(talker: tt.LanguageModel, data: Path) -> None:
    write_rows(data / "ask.jsonl", [{"prompt": f"How many are {i}?"} for i in range(4)])
    tasks = ["svamp", f"coherence:{data / 'ask.jsonl'}", "xstest"]
    options: dict[str, Any] = {
        "steering": subjects(talker), "data": str(data), "max_new_tokens": 9, "limit": 5,
    }  # fmt: skip
    expected = tt.evaluate(talker, tasks, **options)
    with tt.VLLM(talker) as engine:
        found = tt.evaluate(talker, tasks, **options, engine=engine)
    alike(found, expected)
    assert len({record["output"] for record in found.records}) > 5


def test_it_goes_on_in_a_run_directory(
    chooser: tt.LanguageModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steering": strong(chooser), "data": str(data)}
    expected = tt.evaluate(chooser, "copa", **options)
    steps = 0

    def step(self: StandIn, original: Any = StandIn.step) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return original(self)

    output = tmp_path / "run"
    with monkeypatch.context() as patch, tt.VLLM(chooser) as engine:
        patch.setattr(StandIn, "step", step)
        with pytest.raises(KeyboardInterrupt):
            tt.evaluate(chooser, "copa", **options, engine=engine, output=output)
    kept = (output / "records.jsonl").read_text().splitlines()
    assert 0 < len(kept) < 48
    with tt.VLLM(chooser) as engine:
        found = tt.evaluate(chooser, "copa", **options, engine=engine, output=output)
    alike(found, expected)
    assert len(StandIn.opened[-1].asked) == 48 - len(kept)
    assert json.loads((output / "config.json").read_text())["engine"] == "vllm"
    with pytest.raises(tt.TrimtabError, match="engine"):  # it was begun with vLLM
        tt.evaluate(chooser, "copa", **options, output=output)


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("detox", {"toxicity": Scorer()}, "samples its answers"),
        ("lm-eval:piqa", {}, "lm-eval:piqa"),
    ],
)
def test_what_is_not_answered_alike_is_refused(
    task: str, options: dict[str, Any], said: str, chooser: tt.LanguageModel, data: Path
) -> None:
    steering = strong(chooser)
    with tt.VLLM(chooser) as engine, pytest.raises(tt.TrimtabError, match=said):
        tt.evaluate(
            chooser, task, steering=steering, data=str(data), engine=engine, limit=2, **options
        )
    assert not StandIn.opened


@pytest.mark.slow
def test_drift_behind_turns(chooser: tt.LanguageModel, data: Path) -> None:
    options: dict[str, Any] = {
        "steering": subjects(chooser), "data": str(data), "limit": 4, "drift": True,
    }  # fmt: skip
    expected = tt.evaluate(chooser, "copa", **options)
    with tt.VLLM(chooser) as engine:
        found = tt.evaluate(chooser, "copa", **options, engine=engine)
    alike(found, expected)
    assert expected.drift is not None
    assert found.drift is not None
    close(found.drift.as_json(), expected.drift.as_json())


def test_the_command(trimtab: Command) -> None:
    rows = [{"prompt": f"Today {i}", "positive": " I love it", "negative": " no", "part": "test"}
            for i in range(4)]  # fmt: skip
    write_rows("parts.jsonl", [*rows, {**rows[0], "part": "train"}])
    steered = "--steer caa.safetensors --dial 2 --dial 5"
    command = f"evaluate --model model --task contrast:parts.jsonl {steered} --json"
    plain, found = trimtab(command).json, trimtab(f"{command} --engine vllm").json
    for one in (plain, found):
        del one["seconds"]
    close(found, plain)
    assert len(StandIn.opened) == 1
    refused(trimtab(f"{command} --vllm max_model_len=9"), "--vllm is for --engine vllm")


# -- sweeps ---------------------------------------------------------------------------------------

SPACE = {"layer": [0, 1, 2], "alpha": [0.5, 2.0, 1e30]}


def swept(lm: tt.LanguageModel, data: Path, **options: Any) -> tt.Sweep:
    return tt.sweep(
        lm, "caa", "copa", SPACE, data=str(data), limit=6, test_limit=6, baselines=False,
        fixed={"token": "last"}, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"oracle": False, "max_cost": None},
        pytest.param({"oracle": True}, marks=pytest.mark.slow),
        pytest.param({"search": "halving"}, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_finds_the_same(
    options: dict[str, Any], chooser: tt.LanguageModel, data: Path, tmp_path: Path
) -> None:
    expected = swept(chooser, data, **options)
    with tt.VLLM(chooser) as engine:
        found = swept(chooser, data, **options, engine=engine, output=tmp_path / "run")
        # Trials shared the batch: the first requests of many steerings came together.
        (inner,) = StandIn.opened
    without = ("seconds", "notes", "model")
    one, other = ({k: v for k, v in each.as_json().items() if k not in without}
                  for each in (found, expected))  # fmt: skip
    for each in (*one["trials"], *other["trials"]):
        each.pop("seconds", None)
        each.pop("why", None)
    close(one, other)
    assert {trial.state for trial in found.trials} >= {"complete"}
    assert len({trial.value for trial in expected.trials if trial.state == "complete"}) > 1
    assert len(inner.loads) == 3  # dials share what workers hold
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["engine"] == "vllm"


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Under how many different steerings requests were under way, at each step of an engine."""
    found: list[int] = []
    step = StandIn.step

    def counted(self: StandIn) -> Any:
        every = {(one.digest, one.dial) for ask, _ in self.waiting.values() for one in ask.wanted}
        found.append(len(every))
        return step(self)

    monkeypatch.setattr(StandIn, "step", counted)
    return found


def test_trials_of_a_grid_share_the_batch(
    chooser: tt.LanguageModel, data: Path, together: list[int]
) -> None:
    with tt.VLLM(chooser) as engine:
        swept(chooser, data, max_cost=None, oracle=False, engine=engine)
    assert max(together) == 9


def test_what_tpe_draws_at_random_shares_the_batch(
    chooser: tt.LanguageModel, data: Path, together: list[int]
) -> None:
    """The first ten trials hang on nothing; all are what they are one by one."""
    options: dict[str, Any] = {
        "data": str(data), "limit": 6, "test_limit": 6, "baselines": False, "max_cost": None,
        "fixed": {"token": "last"}, "search": "tpe", "trials": 12, "oracle": False,
    }  # fmt: skip
    space = {"layer": [0, 1, 2], "alpha": tt.Range(0.5, 3.0)}
    expected = tt.sweep(chooser, "caa", "copa", space, **options)
    with tt.VLLM(chooser) as engine:
        found = tt.sweep(chooser, "caa", "copa", space, **options, engine=engine)
    assert max(together) == 10
    assert [one.params for one in found.trials] == [one.params for one in expected.trials]
    values = [one.value for one in found.trials]
    assert values == pytest.approx([one.value for one in expected.trials])


METHODS = (
    tt.Candidate("caa", {"layer": (0, 1), "alpha": (0.5, 2.0)}, {"token": "last"}),
    tt.Candidate("iti", {"alpha": (1.0, 3.0)}, {"k": 2}),
)


@pytest.mark.slow
def test_a_comparison_finds_the_same(chooser: tt.LanguageModel, data: Path, tmp_path: Path) -> None:
    """With what stands beside the methods: prompts, a budget, other tasks."""
    options: dict[str, Any] = {
        "data": str(data), "limit": 6, "test_limit": 6, "kl": 0.01, "max_cost": None,
        "capability": ["copa"], "capability_limit": 4, "behaviour": "glad", "shots": 0,
    }  # fmt: skip
    expected = tt.compare(chooser, METHODS, "copa", **options, timed=False)
    with tt.VLLM(chooser) as engine:
        found = tt.compare(
            chooser, METHODS, "copa", **options, engine=engine, output=tmp_path / "run"
        )
        (inner,) = StandIn.opened
    one, other = without_times(found.as_json()), without_times(expected.as_json())
    assert "vllm answered the rows" in one["notes"].pop()
    close(one, other)
    assert len(one["methods"]) == len(one["at_budgets"][0]["methods"]) == 2
    assert one["prompts"]["rows"]
    # It was timed in the engine, where all that the sweeps read was counted.
    for row in found.rows:
        assert row.overhead is not None
        assert row.overhead.steered > 0
        assert row.overhead.peak_bytes is None
        assert row.swept is not None
        assert row.swept.tokens > 0
        assert row.swept.peak_bytes is None
    assert engine.read == sum(len(one.tokens) + one.new - 1 for one in inner.asked)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["engine"] == "vllm"
    assert json.loads((tmp_path / "run" / "caa" / "config.json").read_text())["engine"] == "vllm"


def without_times(found: Any) -> Any:
    """What a comparison says, but for how long it took, and in what memory and tokens."""
    if isinstance(found, dict):
        left = ("seconds", "overhead", "swept", "fit", "model")
        return {key: without_times(value) for key, value in found.items() if key not in left}
    return [without_times(one) for one in found] if isinstance(found, list | tuple) else found


def test_a_comparison_refuses_what_is_not_answered_alike_at_once(
    chooser: tt.LanguageModel, data: Path
) -> None:
    with tt.VLLM(chooser) as engine, pytest.raises(tt.TrimtabError, match="runs its own way"):
        tt.compare(
            chooser, METHODS, "copa", data=str(data), engine=engine, capability=["lm-eval:piqa"]
        )
    assert not StandIn.opened


@pytest.mark.slow
def test_the_command_compares(trimtab: Command, data: Path) -> None:
    command = (
        f'compare "caa layer=0,1 alpha=1,2" --model model --task copa --data {data} --limit 4 '
        "--test-limit 4 --no-baselines --json"
    )
    plain = trimtab(command).json
    found = trimtab(f"{command} --engine vllm --hook ffn_out").json
    assert found["methods"][0]["params"] == plain["methods"][0]["params"]
    assert len(StandIn.opened) == 1
    refused(trimtab(f"{command} --hook ffn_out"), "--hook is for --engine vllm")


@pytest.mark.slow
def test_the_command_sweeps(trimtab: Command, data: Path) -> None:
    command = (
        f"sweep caa --model model --task copa --data {data} --layer 0,1 --alpha 1,2 --limit 4 "
        "--test-limit 4 --no-baselines --json"
    )
    plain = trimtab(command).json
    found = trimtab(f"{command} --engine vllm --hook ffn_out").json
    assert found["best"]["params"] == plain["best"]["params"]
    assert len(StandIn.opened) == 1
    refused(trimtab(f"{command} --hook ffn_out"), "--hook is for --engine vllm")
    refused(trimtab(f"{command} --engine vllm --workers 2 -o runs"), "--workers")
