"""A steering made of a contrast on a tiny model: what is chosen and on which rows, that the limit
of cost is kept, what is left in the directory, and work that is interrupted, edited or bounded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import trimtab as tt
from helpers import refused_in_one_line
from tiny import tiny_model, tiny_tokenizer
from trimtab.figures import Estimate
from trimtab.reading import plain_texts
from trimtab.wishes import asking, choosing, portfolio
from trimtab.wishes.choosing import Choice, Tried, dial_at
from trimtab.wishes.portfolio import Arm
from trimtab.wishes.work import Work

PLACES = ("ship", "map", "king", "sea", "house", "bird", "tree", "road", "book", "song", "lamp")
MAX_COST = 0.1


def arms(*_: Any) -> list[Arm]:
    """Few enough for a test of a second or two."""
    methods = [tt.CAA(layer=1), tt.CAA(layer=2), tt.Probe(layer=1, steer="lda"), tt.ITI(k=2),
               tt.AUSteer(locate="effect", k=16)]  # fmt: skip
    return [Arm(method) for method in methods]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.wishes.making.portfolio", arms)
        patch.setattr(asking, "PROMPTS", 2)
        patch.setattr(asking, "NEW_TOKENS", 4)
        patch.setattr("trimtab.evaluation.per_token.PROMPTS", 2)
        patch.setattr(choosing, "RUNGS", (3, 6))
        # Drawing takes longer than the rest.
        patch.setattr(Figure, "savefig", lambda self, target, **options: target.write(b""))
        yield


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return tt.wrap(tiny_model("llama"), tiny_tokenizer(), "tiny")


def parts(positive: str = " good and kind.", negative: str = " bad and cruel.") -> tt.Contrast:
    """Pairs with parts, and words for what their positive side does."""
    pairs = [(f"The {one} near the {other} is", positive, negative)
             for one in PLACES[:6] for other in PLACES[6:]]  # fmt: skip
    found = tt.Contrast.from_pairs(pairs, "places").split(0.3, 0.3)
    return replace(found, behaviour="speak well of things", opposite="speak badly of things")


@pytest.fixture(scope="module")
def done(lm: tt.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[tt.Made, Path]:
    """One run to the end."""
    room = tmp_path_factory.mktemp("made") / "well"
    return tt.make(lm, contrast=parts(), output=room), room


def same(found: dict[str, Any]) -> dict[str, Any]:
    """What of a result does not say when, how fast or where it was made."""
    said = {key: value for key, value in found.items() if key not in ("seconds", "plan", "files")}
    return {**said, "contrast": {**said["contrast"], "name": ""}}


# -- what is chosen -------------------------------------------------------------------------------


def test_figures_are_those_of_plain_loops(lm: tt.LanguageModel, done: tuple[tt.Made, Path]) -> None:
    made, room = done
    chosen = made.as_json()["chosen"]
    steering = tt.Steering.load(room / "steering.safetensors")
    assert steering.setting == chosen["dial"] == made.steering.setting  # type: ignore[union-attr]
    # Gain: log-odds of the test pairs, steered minus not, one forward pass for each text.
    test = parts().part("test")
    gains = tt.log_odds(lm, test, steering) - tt.log_odds(lm, test)
    assert chosen["gain"] == pytest.approx(float(gains.mean()), rel=1e-4)
    assert (chosen["n"], chosen["gain_ci95"][0] > 0) == (len(test), True)
    # Cost: nats per token of plain text, each text run whole.
    before, tokens = tt.cross_entropy(lm, plain_texts())
    after, _ = tt.cross_entropy(lm, plain_texts(), steering)
    cost = float(((after - before) * tokens).sum() / tokens.sum())
    assert chosen["cost"] == pytest.approx(cost, abs=1e-4)
    assert cost <= MAX_COST + 1e-6
    low, high = chosen["cost_ci95"]
    assert low <= chosen["cost"] <= high
    every = [one for one in made.tried if one.cost <= MAX_COST]
    assert chosen["validation"]["gain"] == max(one.gain.value for one in every)


def test_test_rows_choose_nothing(lm: tt.LanguageModel, done: tuple[tt.Made, Path]) -> None:
    """With the sides of the test rows exchanged the same is chosen, and found not to hold."""
    rows = tuple(
        replace(row, positive=row.negative, negative=row.positive) if row.part == "test" else row
        for row in parts().pairs
    )
    poisoned = tt.make(lm, contrast=replace(parts(), rows=rows))
    clean = done[0].as_json()
    found = poisoned.as_json()
    for key in ("methods", "front", "prompts", "unsteered"):
        assert found[key] == clean[key]
    assert poisoned.chosen is None
    assert poisoned.steering is None
    assert "does not hold on the" in poisoned.why[0]


def test_asking_is_on_the_same_axes(lm: tt.LanguageModel, done: tuple[tt.Made, Path]) -> None:
    made, _ = done
    found = made.as_json()["prompt_baseline"]
    assert found["part"] == "test"
    test = parts().part("test")
    words = made.baseline.asked.words  # type: ignore[union-attr]
    asked = replace(test, rows=tuple(
        replace(pair, prompt=put)
        for pair, put in zip(test.pairs, words.put(lm, [p.prompt for p in test.pairs]), strict=True)
    ))  # fmt: skip
    gains = tt.log_odds(lm, asked) - tt.log_odds(lm, test)
    assert found["gain"] == pytest.approx(float(gains.mean()), rel=1e-4)
    steered = made.as_json()["chosen"]["gain"]
    against = found["against_steering"]
    assert against["difference"] == pytest.approx(found["gain"] - steered, rel=1e-6)
    assert found["better"] == (against["ci95"][0] > 0)
    word = "does more" if found["better"] else "than just asking" if against["ci95"][1] < 0 else (
        "about as much"
    )  # fmt: skip
    assert word in found["says"]
    assert {one["name"] for one in made.as_json()["prompts"]} >= {"ask", "ladder, extremely"}


def test_nothing_works_where_sides_are_dealt_at_random(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    rows = tuple(
        replace(row, positive=row.negative, negative=row.positive) if i % 2 else row
        for i, row in enumerate(parts().pairs)
    )
    made = tt.make(lm, contrast=replace(parts(), rows=rows), output=tmp_path / "no")
    assert made.chosen is None
    assert "gain" in made.why[0]
    assert "caa" in made.why[0]
    assert any("--max-cost" in one for one in made.advice)
    assert "Nothing works" in made.summary
    there = {file.name for file in (tmp_path / "no").iterdir()}
    assert there >= {"report.html", "results.json", "next.md", "contrast.jsonl"}
    assert "steering.safetensors" not in there
    assert json.loads((tmp_path / "no" / "results.json").read_text())["chosen"] is None


# -- what is left ---------------------------------------------------------------------------------


def test_the_directory_is_ready_to_use(done: tuple[tt.Made, Path]) -> None:
    made, room = done
    assert all(Path(file).exists() for file in made.files)
    names = {Path(file).name for file in made.files}
    assert names == {"steering.safetensors", "README.md", "contrast.jsonl", "samples.md",
                     "next.md", "results.json", "report.html"}  # fmt: skip
    assert json.loads((room / "results.json").read_text()) == json.loads(json.dumps(made.as_json()))
    card = (room / "README.md").read_text()
    gain = made.chosen.tested.gain  # type: ignore[union-attr]
    assert f"| gain | {gain.difference:+.3g} |" in card
    assert "measured |" in card
    page = (room / "report.html").read_text()
    assert not re.search(r"(src|href|srcset)=.?https?:", page)
    assert made.baseline.verdict in page.replace("&#39;", "'")  # type: ignore[union-attr]
    samples = (room / "samples.md").read_text()
    assert [samples.count(f"**{name}**") for name in ("unsteered", "steered", "asked")] == [2] * 3
    lines = re.findall(r"```sh\n(.*)\n```", (room / "next.md").read_text())
    said = [line.split()[1] for line in lines]
    assert said == ["generate", "chat", "playground", "serve", "bake", "push", "evaluate"]
    assert all(str(room / "steering.safetensors") in line for line in lines)


def test_a_directory_of_somebody_else_is_left_alone(
    lm: tt.LanguageModel, tmp_path: Path, done: tuple[tt.Made, Path]
) -> None:
    (tmp_path / "README.md").write_text("mine")
    refused_in_one_line(
        lambda: tt.make(lm, contrast=parts(), output=tmp_path), "README.md.*another directory"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    other = done[1]
    refused_in_one_line(
        lambda: tt.make(lm, contrast=parts(), output=other, max_cost=0.2), "max_cost.*--overwrite"
    )


# -- interrupted, edited, bounded -----------------------------------------------------------------


class _Killed(Exception):  # noqa: N818, it is a signal and no error
    pass


def dying(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when so many figures have been found and kept."""
    real, count = Work.recall, [0]

    def recall(self: Work, key: str, find: Callable[[], Any]) -> Any:
        def find_or_die() -> Any:
            count[0] += 1
            if count[0] > after:
                raise _Killed
            return find()

        return real(self, key, find_or_die)

    monkeypatch.setattr(Work, "recall", recall)


def test_killed_at_five_points_it_ends_as_it_would_have(
    lm: tt.LanguageModel, tmp_path: Path, done: tuple[tt.Made, Path]
) -> None:
    room = tmp_path / "killed"
    for after in (1, 4, 18, 14, 22):  # each goes on where the one before it was killed
        with pytest.MonkeyPatch.context() as patch:
            dying(after, patch)
            with pytest.raises(_Killed):
                tt.make(lm, contrast=parts(), output=room)
        torn = room / "work.jsonl"
        torn.write_bytes(torn.read_bytes() + b'{"key": "cut o')
    made = tt.make(lm, contrast=parts(), output=room)
    assert same(made.as_json()) == same(done[0].as_json())
    first, second = (tt.Steering.load(each / "steering.safetensors") for each in (room, done[1]))
    assert (first.digest, first.setting) == (second.digest, second.setting)
    # A run that has ended is there again at once, and finds nothing anew.
    with pytest.MonkeyPatch.context() as patch:
        dying(0, patch)
        again = tt.make(lm, contrast=parts(), output=room)
    assert same(again.as_json()) == same(made.as_json())


def test_a_review_stops_before_anything_is_fitted(lm: tt.LanguageModel, tmp_path: Path) -> None:
    said: list[str] = []
    made = tt.make(lm, contrast=parts(), output=tmp_path / "r", review=True, say=said.append)
    assert (made.reviewed, made.chosen, made.rows) == (False, None, ())
    assert any(line.startswith("plan, in all about") for line in said)
    assert any("+ good and kind." in line for line in said)
    file = tmp_path / "r" / "contrast.jsonl"
    assert not (tmp_path / "r" / "results.json").exists()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    made = tt.make(lm, contrast=parts(), output=tmp_path / "r")
    assert made.reviewed
    assert sum(made.as_json()["contrast"]["parts"].values()) == len(lines) - 1
    file.write_text("".join(lines[2:]))
    refused_in_one_line(
        lambda: tt.make(lm, contrast=parts(), output=tmp_path / "r"), "was edited.*--overwrite"
    )
    # Overwritten it is made of what is given, the edited file itself too.
    made = tt.make(lm, contrast=file, output=tmp_path / "r", overwrite=True, review=True)
    assert sum(made.as_json()["contrast"]["parts"].values()) == len(lines) - 2


def test_minutes_bound_it_and_what_is_left_out_is_said(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    made = tt.make(lm, contrast=parts(), output=tmp_path / "m", minutes=1e-6)
    left = [row for row in made.rows if row.state == "left out"]
    assert len(left) == len(arms()) - 2
    assert left[0].name in made.left_out[0]
    assert made.as_json()["left_out"] == list(made.left_out)
    assert "Left out for lack of time" in (tmp_path / "m" / "report.html").read_text()
    assert len(made.tried) == 1  # one dial of the last round is tried in any case


def test_what_it_refuses(lm: tt.LanguageModel, tmp_path: Path) -> None:
    single = tt.Contrast.from_pairs([("a", " b", " c")], "one")
    unpaired = tt.Contrast.from_texts(["a good one"] * 12, ["a bad one"] * 12, "loose")
    for reason, given in {
        "say what is wished for": {},
        "unpaired": {"contrast": unpaired},
        "too few to hold some out": {"contrast": single},
        "max_cost must be above 0": {"contrast": "builtin:formality", "max_cost": 0.0},
        "minutes must be above 0": {"contrast": "builtin:formality", "minutes": math.nan},
        "is empty": {"wish": " . "},
    }.items():
        given = {"output": tmp_path / "x", **given}
        refused_in_one_line(lambda given=given: tt.make(lm, **given), reason)  # type: ignore[misc]
    assert not (tmp_path / "x").exists()


# -- pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "end"), [(1.0, 1e9), (1e-6, 1e9), (1e4, 1e9), (1e-3, 2.0)])
def test_a_dial_is_as_far_as_the_limit_allows(scale: float, end: float) -> None:
    limit = 0.1
    tried: list[float] = []

    def cost(dial: float) -> float:
        tried.append(dial)
        return scale * dial**2 + 0.1 * scale * dial**3

    found = dial_at(cost, limit, 1.0, end)
    assert found is not None
    assert found <= end
    assert cost(found) <= limit
    assert cost(found) >= 0.85 * limit or found == end
    assert len(tried) < 12


def test_a_dial_whose_every_step_costs_too_much() -> None:
    assert dial_at(lambda dial: 1.0, 0.1, 1.0, 10.0) is None
    assert dial_at(lambda dial: math.inf, 0.1, 1.0, 10.0) is None
    assert dial_at(lambda dial: -0.1, 0.1, 1.0, 500.0) == 500.0


def test_the_front_is_what_nothing_beats() -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(60, 2, generator=draw).tolist()
    tried = [Tried("a", 1.0, cost, Estimate(gain, gain, gain, 9)) for cost, gain in points]
    front = Choice((), tuple(tried), None).front
    beaten = [
        any(o.cost <= one.cost and o.gain.value >= one.gain.value and o is not one for o in tried)
        for one in tried
    ]
    assert set(front) == {one for one, lost in zip(tried, beaten, strict=True) if not lost}


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    work = Work(tmp_path, "one")
    assert work.recall("a", lambda: [1.5]) == [1.5]
    assert Work(tmp_path, "one").recall("a", lambda: [2.5]) == [1.5]
    refused_in_one_line(lambda: Work(tmp_path, "other"), "work.jsonl, line 1.*--overwrite")


def test_the_portfolio_fits_every_depth() -> None:
    for layers in (2, 30):
        model = tt.wrap(tiny_model("llama", num_hidden_layers=layers), tiny_tokenizer())
        found = portfolio.portfolio(model, 0, train=True)
        names = [arm.name for arm in found]
        assert len(set(names)) == len(names)
        assert sum(arm.trained for arm in found) == 3
        assert {arm.method.name for arm in found} >= {"caa", "probe", "iti", "austeer", "act"}
