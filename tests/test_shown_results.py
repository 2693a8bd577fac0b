"""How results show themselves: in a line, in a sentence, in a notebook, drawn."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import trimtab as tt
from autoencoders import CONTRAST
from helpers import PROMPTS, language_model
from trimtab import strength, terminal
from trimtab.figures import Difference, Estimate, Result
from trimtab.papers.result import StudyResult
from trimtab.reports import Table, summarise
from trimtab.strength import ConceptCurve
from trimtab.sweeps.comparison import Compared, Comparison
from trimtab.sweeps.metering import Used
from trimtab.sweeps.result import Sweep, Trial

matplotlib.use("agg")

LONGEST = 300


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def steering(lm: tt.LanguageModel) -> tt.Steering:
    return tt.CAA(layer=1).fit(lm, CONTRAST)


@pytest.fixture(scope="module")
def curve(lm: tt.LanguageModel, steering: tt.Steering) -> strength.Curve:
    return strength.curve(lm, steering, PROMPTS, points=9, tokens=3, span=(-4, 4))


@pytest.fixture(scope="module")
def cost(lm: tt.LanguageModel, steering: tt.Steering) -> strength.CostCurve:
    return strength.cost_curve(lm, steering, [" ".join(PROMPTS) * 3], [-4, -1, 0, 1, 4], block=16)


@pytest.fixture(scope="module")
def budget(lm: tt.LanguageModel, steering: tt.Steering) -> strength.Budget:
    return strength.budget(lm, steering, PROMPTS, kl=0.05)


def rows(steering: str | None, right: int, task: str = "copa") -> list[dict[str, Any]]:
    """Forty records of which so many are right."""
    return [
        {"task": task, "protocol": "trimtab", "steering": steering, "index": i, "id": str(i)}
        | {"values": {"accuracy": float(i < right)}, "seconds": 0.1}
        for i in range(40)
    ]


EVALUATION = summarise([*rows(None, 10), *rows("runs/joy.safetensors@2", 30)], {"name": "tiny"})
UNSTEERED = {
    part: Result("copa", "trimtab", "accuracy", 0.25, 40, (0.142, 0.402), None)
    for part in ("validation", "test")
}
GAIN = Difference(0.5, (0.35, 0.65), 40, p=2e-6, gained=20, lost=0)


def a_sweep(**space: tuple[Any, ...]) -> Sweep:
    values: list[dict[str, Any]] = [{}]
    for name, own in space.items():
        values = [{**each, name: value} for each in values for value in own]
    trials = tuple(
        Trial(i, params, "complete", 0.3 + i / 20, 40, (0.2, 0.6), 0.5, 40, (0.3, 0.7), 0.1)
        for i, params in enumerate(values)
    )
    best, found = trials[-1], {"test": 0.75, "test_ci95": (0.6, 0.86)}
    best = Trial(**{**vars(best), **found})
    return Sweep(
        "caa", "copa", "accuracy", True, dict(space), trials, best, best, UNSTEERED, GAIN, 0.01,
        None, (), {"name": "tiny"}, 1.0,
    )  # fmt: skip


SWEEP = a_sweep(layer=(1, 2), alpha=(1.0, 2.0))
COMPARISON = Comparison(
    "copa", "accuracy", True, UNSTEERED, 20.0,
    (
        Compared("caa", SWEEP, Result("copa", "", "accuracy", 0.75, 40, (0.6, 0.86), "caa"),
                 GAIN, 2.0, 48, 0.12, 21.0),
        Compared("iti", SWEEP, Result("copa", "", "accuracy", 0.275, 40, (0.16, 0.43), "iti"),
                 Difference(0.025, (-0.05, 0.1), 40, p=1.0, corrected_p=1.0), 2.0, 48, 0.01, 20.1),
    ),
    (), {("caa", "iti"): GAIN}, Used(), None, {"name": "tiny"}, 1.0,
)  # fmt: skip


def everything(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A result of every kind that has tables."""
    steering = request.getfixturevalue("steering")
    three = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    concept = ConceptCurve(
        steering, "lexicon", three, three, three - 0.05, three + 0.05, torch.tensor([9, 9, 9]),
        0, False, ({"text": "long " * 500},),
    )  # fmt: skip
    found = {name: request.getfixturevalue(name) for name in ("curve", "cost", "budget")}
    return {**found, "concept": concept, "evaluation": EVALUATION, "sweep": SWEEP} | {
        "comparison": COMPARISON
    }


# -- in a line ------------------------------------------------------------------------------------


def test_everything_public_prints_in_a_line(
    request: pytest.FixtureRequest, lm: tt.LanguageModel, steering: tt.Steering
) -> None:
    completion = lm.generate(PROMPTS[:1], max_new_tokens=60, steering=steering)[0]
    units = tt.AUSteer(k=5).fit(lm, CONTRAST)
    study = StudyResult({"data": [0.5] * 999}, {}, [Table("T", ["a"], [[1]] * 99)], title="Mine")
    curve = request.getfixturevalue("curve")
    for one in (
        lm, steering, units, steering + units, completion, study, curve.tokens[0],
        units.interventions[0], steering.interventions[0], tt.SS(theta=3), steering.dial,
        EVALUATION.results[0], EVALUATION.comparisons[0], SWEEP.trials[0], COMPARISON.rows[0],
        tt.within(steering, kl=0.1), tt.Range(0, 1), tt.Candidate("caa", {"layer": (1, 2)}),
        SWEEP.best,
        strength.read(curve), *everything(request).values(),
    ):  # fmt: skip
        said = repr(one)
        assert "\n" not in said, said
        assert "tensor(" not in said
        assert len(said) <= (900 if isinstance(one, Compared | strength.Reading) else LONGEST), said


def test_a_steering_says_method_dial_sites_and_model(
    lm: tt.LanguageModel, steering: tt.Steering
) -> None:
    assert repr(steering.at(3)) == "<Steering: caa alpha=3 at layers.1.resid, for llama>"
    many = tt.CAA(layer=(0, 1, 2)).fit(lm, CONTRAST)
    assert "at 3 sites (resid in blocks 0 to 2), for llama" in repr(many)
    both = repr(steering + many)
    assert both.startswith("<Steerings: caa alpha=1 at layers.1.resid, then caa alpha=1 at 3 sites")
    assert repr(lm) == "<LanguageModel llama: llama, 3 layers of 48, float32 on cpu>"


def test_printing_takes_no_matplotlib() -> None:
    """Where nobody draws, a second of importing is saved."""
    code = (
        "import sys, trimtab as tt; tt.Steering, tt.CAA, tt.load, tt.fit; "
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- in a sentence --------------------------------------------------------------------------------


def test_an_evaluation_in_a_sentence() -> None:
    assert EVALUATION.summary == (
        "With joy.safetensors@2 accuracy on copa is 75.0 %, unsteered 25.0 %: +50.0 points "
        f"[{100 * EVALUATION.comparisons[0].ci95[0]:.1f}, "
        f"{100 * EVALUATION.comparisons[0].ci95[1]:.1f}], clear of chance, n = 40."
    )
    alone = summarise(rows(None, 10), {})
    assert alone.summary == "Without steering accuracy on copa is 25.0 % [14.2, 40.2], n = 40."
    several = summarise([*rows(None, 10), *rows("a", 11), *rows("b", 12)], {})
    assert several.summary.startswith("Of 2 steerings b does best: with it accuracy on copa is")
    assert "no more than chance makes" in several.summary
    tasks = summarise(
        [*rows(None, 10), *rows("a", 30), *rows(None, 9, "boolq"), *rows("a", 9, "boolq")], {}
    )
    assert tasks.summary.startswith("With a: accuracy on copa +50.0 points")
    assert "; accuracy on boolq +0.0 points [0.0, 0.0], no more than chance makes." in tasks.summary


def test_a_sweep_and_a_comparison_in_a_sentence() -> None:
    assert SWEEP.summary == (
        "Of 4 settings of caa layer=2 alpha=2 does best on the validation rows: on the test rows "
        "accuracy on copa is 75.0 %, unsteered 25.0 %: +50.0 points [35.0, 65.0], clear of chance, "
        "n = 40."
    )
    none = Sweep(**{**vars(SWEEP), "best": None})
    assert none.summary == "Of 4 settings of caa none can be chosen."
    assert COMPARISON.summary == (
        "Of 2 methods caa moves accuracy on copa most: +50.0 points [35.0, 65.0], clear of chance, "
        "n = 40, for +0.12 nats per token of plain text; 1 of 2 differ clearly from the unsteered "
        "model."
    )


def test_strengths_in_a_sentence(
    curve: strength.Curve, cost: strength.CostCurve, budget: strength.Budget
) -> None:
    token = max(curve.tokens, key=lambda one: float(one.delta_p.abs().max()))
    place = int(token.delta_p.abs().argmax())
    points = f"{100 * float(token.delta_p[place]):+.1f} points"
    assert curve.summary.startswith(f"From alpha -4 to 4, {token.token!r} changes most: {points}")
    assert f"at {float(curve.dials[place]):.4g}, where KL is" in curve.summary
    assert f"{float(cost.delta[0]):+.3g} [" in cost.summary
    assert cost.summary.endswith(f"over {cost.tokens} tokens of text.")
    assert budget.other is not None
    for one in (budget, budget.other):
        allowed = f"a dial of {one.dial:.3g} for half of the prompts and {one.worst5_dial:.3g} for"
        assert allowed in budget.summary


# -- in a notebook --------------------------------------------------------------------------------


class _Cells(HTMLParser):
    def __init__(self, content: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open = 0
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("td", "th"):
            self.cells.append("")
            self.open = 1

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.cells[-1] += data


def test_a_notebook_shows_the_sentence_and_the_tables(request: pytest.FixtureRequest) -> None:
    for one in everything(request).values():
        shown = one._repr_html_()
        cells = _Cells(shown).cells
        assert one.tables()
        for table in one.tables():
            assert str(escape(table.title)) in shown
            assert set(map(str, table.heads)) <= set(cells)
            for row in table.rows:
                assert set(map(str, row)) <= set(cells)
        assert "<script" not in shown


def test_a_notebook_shows_a_steering_as_text(steering: tt.Steering) -> None:
    hostile = tt.Steering(**{**vars(steering), "method": "<script>alert(1)</script>"})
    shown = hostile._repr_html_()
    assert "<script>" not in shown
    assert "layers.1.resid" in _Cells(shown).cells


def test_a_notebook_shows_a_model_as_text() -> None:
    lm = language_model("llama")
    lm.name = "<script>alert(1)</script>"
    lm.baked = ({"label": "<b>caa</b> alpha=2", "digest": "0"},)
    shown = lm._repr_html_()
    assert "<script" not in shown
    assert "<b>" not in shown
    said = _Cells(shown).cells
    assert {"<script>alert(1)</script>", "<b>caa</b> alpha=2"} <= set(said)
    assert "float32 on cpu" in said
    assert f"{lm.anatomy.name}, {lm.anatomy.layers} layers of {lm.anatomy.hidden_size}" in said


# -- drawn ----------------------------------------------------------------------------------------


def test_each_draws_itself_on_given_axes_or_its_own(request: pytest.FixtureRequest) -> None:
    for name, one in everything(request).items():
        axes = Figure().subplots()
        assert one.plot(axes) is axes, name
        assert axes.has_data(), name
        assert axes.get_xlabel(), name
        own = one.plot()
        assert isinstance(own, Axes)
        matplotlib.pyplot.close(own.figure)


def test_sweeps_of_one_and_of_three_hyperparameters_draw_themselves() -> None:
    line = a_sweep(alpha=(1.0, 2.0, 4.0)).plot(Figure().subplots())
    assert line.get_xlabel() == "alpha"
    three = a_sweep(layer=(1, 2), alpha=(1.0, 2.0), token=("last", "mean"))
    assert three.plot(Figure().subplots()).get_xlabel() == "trial"


@pytest.mark.parametrize(
    "method",
    [tt.AUSteer(k=5), tt.ITI(k=3), tt.SADI("neuron", k=4), tt.CAA(layer=(0, 2)), tt.SAS()],
)
def test_a_steering_draws_where_it_acts(lm: tt.LanguageModel, method: Any) -> None:
    steering = method.fit(lm, CONTRAST)
    axes = steering.plot(Figure().subplots())
    places = [point for each in axes.collections for point in each.get_offsets().tolist()]
    if method.name in ("austeer", "iti", "sadi"):
        key = "head" if method.name == "iti" else "unit"
        assert sorted(places) == sorted(
            [float(layer), float(number)]
            for layer, number in zip(
                steering.tables["layer"].tolist(), steering.tables[key].tolist(), strict=True
            )
        )
    else:
        assert len(places) == len(steering.interventions)


def test_a_figure_has_its_interval_where_it_is_drawn() -> None:
    axes = EVALUATION.plot(Figure().subplots())
    drawn = [
        segment for each in axes.collections for segment in each.get_segments() if len(segment) == 2
    ]
    found = sorted((round(a[0], 6), round(b[0], 6)) for a, b in drawn)
    assert found == sorted(
        (round(r.ci95[0], 6), round(r.ci95[1], 6)) for r in EVALUATION.results if r.ci95
    )
    assert isinstance(EVALUATION.results[0].estimate, Estimate)


# -- progress -------------------------------------------------------------------------------------


def test_a_notebook_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a kernel, whose standard error is no terminal; without widgets it is text."""
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    with terminal.progress("reading \x1b[2J", 4) as advance, terminal.progress("within", 2) as more:
        advance(3)
        more(1)
    said = capsys.readouterr().err
    assert "reading \\x1b[2J" in said
    assert "within" in said
    assert "/4" in said


@pytest.mark.parametrize("shell", [None, SimpleNamespace(get_ipython=lambda: None)])
def test_elsewhere_a_pipe_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: Any
) -> None:
    if shell is None:
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "IPython", shell)
    with terminal.progress("reading", 4) as advance:
        advance(3)
    assert capsys.readouterr().err == ""
