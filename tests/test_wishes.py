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
from trimtab.evaluation import looping
from trimtab.figures import Estimate
from trimtab.options import Making, WishTexts
from trimtab.reading import plain_texts
from trimtab.wishes import asking, choosing, portfolio
from trimtab.wishes.choosing import Choice, Chooser, Hold, Row, Tried, dial_at
from trimtab.wishes.failing import of_contrast
from trimtab.wishes.holding import LOOPS, Held, held_together
from trimtab.wishes.pace import Pace, Speed
from trimtab.wishes.plan import cut_to_time, less_text, plan_for
from trimtab.wishes.portfolio import Arm
from trimtab.wishes.texts import given_contrast, say_contrast
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
    asked = found["prompt_baseline"]
    assert asked["part"] == "test"
    assert asked["gain_ci95"][0] < 0
    assert any(f"asking ({asked['said']}) gains" in said for said in poisoned.why)
    assert "take a model that does it when it is asked" in poisoned.advice


def test_a_contrast_that_the_model_did_not_write_as_told_is_named() -> None:
    counts = {"written": 84, "dropped": {"exchanged": 35}}
    told = of_contrast(replace(parts(), made={"counts": counts}))
    assert any("35 of 84 pairs that the model wrote" in said for said in told)
    counts["dropped"] = {"exchanged": 10}
    assert not any(
        "told" in said for said in of_contrast(replace(parts(), made={"counts": counts}))
    )
    assert not any("told" in said for said in of_contrast(parts()))


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
    """Without any time the one setting that is measured is all that is done."""
    made = tt.make(lm, contrast=parts(), output=tmp_path / "m", minutes=1e-6)
    said = " ".join(made.left_out)
    left = [row for row in made.rows if row.state == "left out"]
    assert len(left) == len(arms()) - 1
    assert left[0].name in said
    for what in (
        "validation pairs",
        "prompts",
        "dials of",
        "hold together",
        "samples",
        "KL",
        "range",
    ):
        assert what in said or made.chosen is None
    assert (made.asked, made.baseline, made.together, made.held) == ((), None, None, None)
    assert made.as_json()["left_out"] == list(made.left_out)
    assert "Left out for lack of time" in (tmp_path / "m" / "report.html").read_text()
    assert len(made.tried) == 1  # one dial of one setting is tried in any case


class _Ticking:
    """A clock on which each look takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


def test_what_there_is_time_for_is_decided_once(tmp_path: Path) -> None:
    work = Work(tmp_path, "one")
    with pytest.MonkeyPatch.context() as patch:
        clock = _Ticking(10.0)
        patch.setattr("trimtab.wishes.pace.time", clock)
        pace = Pace(1.0, work)
        pace.begin(Speed(100.0, 50.0))
        assert pace.speed.seconds(200, 50) == pytest.approx(3.0)
        assert pace.allows("a", 5.0)
        # What took four times as long as was believed weighs more and more.
        with pace.reading(100.0):
            work.recall("b", lambda: 1)
        assert pace.speed.reads == pytest.approx((100.0 * 4 + 100) / (4 + 10))
        with pace.reading(100.0):
            work.recall("b", lambda: 1)  # which was found before, and says nothing
        assert pace.speed.reads == pytest.approx(500 / 14)
        assert not pace.allows("c", 5.0)
        assert Pace(None, work).allows("d", 1e9)
    again = Pace(1.0, Work(tmp_path, "one"))
    assert (again.allows("a", 1e9), again.allows("c", 0.0)) == (True, False)


def test_texts_and_pairs_are_cut_to_the_time() -> None:
    """Never below what makes a contrast, and by as little as will do."""
    whole = WishTexts()
    fast, slow = Speed(1e6, 1e6), Speed(1.0, 1.0)
    assert less_text(whole, fast, 60) == whole
    least = less_text(whole, slow, 60)
    assert (least.pairs, least.questions, least.max_new_tokens) == (1, 28, 24)
    between = [less_text(whole, Speed(400.0, 100.0), seconds) for seconds in (20, 60, 120, 400)]
    sizes = [one.pairs * one.questions * one.max_new_tokens for one in between]
    assert sizes == sorted(sizes)
    own = less_text(replace(whole, questions=12, max_new_tokens=8), slow, 1)
    assert (own.questions, own.max_new_tokens) == (12, 8)
    big = tt.Contrast.builtin("formality")
    cuts = []
    for reads in (1e6, 400.0, 100.0, 1.0):
        plan = plan_for(Speed(reads, 100.0), arms(), Making(), whole, big)
        cuts.append(cut_to_time(plan, big, 60.0))
    assert cuts[0] == big.sizes
    assert cuts[-1] == {"train": 30, "validation": 9, "test": 15}  # 15 % of each
    few = cut_to_time(plan_for(slow, arms(), Making(), whole, parts()), parts(), 1.0)
    assert few == {"train": parts().sizes["train"], "validation": 8, "test": parts().sizes["test"]}
    assert [cut["train"] for cut in cuts] == sorted((cut["train"] for cut in cuts), reverse=True)


def test_that_a_contrast_is_cut_is_said(tmp_path: Path) -> None:
    pairs = [(f"Row {n}", f" good {n}", f" bad {n}") for n in range(600)]
    contrast = tt.Contrast.from_pairs(pairs, "many").split(0.2, 0.3)
    given = given_contrast(contrast, None)
    assert given.contrast is not None
    assert given.contrast.sizes == {"train": 120, "validation": 40, "test": 100}
    sizes = contrast.sizes
    assert given.taken == (
        f"of the 600 pairs of many 260 are taken: 120 of {sizes['train']} train, 40 of "
        f"{sizes['validation']} validation, 100 of {sizes['test']} test"
    )
    said: list[str] = []
    say_contrast(given.contrast, given.taken, said.append)
    assert said[0] == given.taken
    made = tt.Made("", given.contrast, {}, 0.1, 1.0, why=("no",), taken=given.taken)
    assert f"{given.taken[0].upper()}{given.taken[1:]}." in made.notes()
    assert made.as_json()["taken"] == given.taken
    assert given_contrast(parts(), None).taken == ""


# -- answers that fall apart ----------------------------------------------------------------------


def test_loops_are_seen() -> None:
    for text in ("1. 1.1.1.1", "ha" * 30, "the cat sat on the mat and " * 4, "!!!!!!!!!!!!!!!!!!"):
        assert looping(text) > LOOPS, text
    whole = "No. It is not so, since a boat that leaks sinks, and a boat that is dry floats."
    for text in ("", "You can fall asleep faster by using the moon.", "- one\n- two", whole):
        assert looping(text) < LOOPS, text
    good, bad = "A short and plain answer.", "1. 1.1.1.1.1"
    assert held_together([good] * 12, [good] * 12).holds
    assert held_together([bad] * 2 + [good] * 10, [good] * 12).holds
    assert not held_together([bad] * 3 + [good] * 9, [good] * 12).holds
    assert held_together([bad] * 9 + [good] * 3, [bad] * 8 + [good] * 4).holds  # it always did
    found = held_together([bad, good], [good, good]).as_json()
    assert found["fall_apart"] == {"steered": 1, "unsteered": 0, "n": 2}
    assert found["repetition"]["steered"] == pytest.approx((looping(bad) + looping(good)) / 2)


def test_what_falls_apart_is_set_aside(done: tuple[tt.Made, Path], lm: tt.LanguageModel) -> None:
    """The next best is chosen, and where all of the best fall apart that of which fewest do."""
    tried = sorted(done[0].tried, key=lambda one: -one.gain.value)
    tried = [one for one in tried if one.cost <= MAX_COST and one.gain.low > 0]
    assert len(tried) > 1
    rows = {one.arm: Row(one.arm, "caa", {}, "tried", one) for one in tried}

    def chooser() -> Chooser:
        nothing: Any = None
        return Chooser((), nothing, nothing, nothing, nothing, MAX_COST, 1.0, float,
                       lambda text: None, _rows=dict(rows))  # fmt: skip

    def hold(shares: list[int]) -> Hold:
        return lambda name, find: Held(12, shares.pop(0), 0, 0.0, 0.0)

    best, held = chooser()._holding(tried, hold([0]))
    assert (best, held) == (tried[0], Held(12, 0, 0, 0.0, 0.0))
    own = chooser()
    best, held = own._holding(tried, hold([7, 2]))
    assert best == tried[1]
    assert held is not None
    assert held.holds
    if tried[0].arm != tried[1].arm:
        assert own._rows[tried[0].arm].state == "set aside"
        assert "7 of 12 answers repeat" in own._rows[tried[0].arm].why
    few = tried[:2]
    best, held = chooser()._holding(few, hold([7, 5]))
    assert best == few[1]
    assert held is not None
    assert not held.holds
    made = tt.Made("x", None, {}, 0.1, 1.0, why=("no",), held=held)
    assert any("fall apart" in line and "5 of 12" in line for line in made.notes())


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
