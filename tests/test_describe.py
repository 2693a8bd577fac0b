"""What is said of a steering: that the numbers in the sentences are those in the steering."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import trimtab as tt
from trimtab.methods import METHODS
from trimtab.methods.contents import describe, explain
from trimtab.steering import Dial, Intervention, ModelIdentity, Positions, Scope, Steering
from trimtab.steering.operators import Ablate, Add, Operator, Rotate, Scale, Turn

MODEL = ModelIdentity("tiny", "llama", 12, 8, "0123456789abcdef" * 4)
PLANE = torch.eye(8)[[1, 4]]


def made(
    method: Any,
    operators: dict[str, Operator],
    dial: Dial | None = None,
    positions: Positions = "all",
    **more: Any,
) -> Steering:
    """A steering as `method` makes it, at sites `layers.N.KIND`."""
    return Steering(
        method=method.name,
        hyperparameters=dict(vars(method)),
        interventions=tuple(
            Intervention(site, operator, Scope.of(positions))
            for site, operator in operators.items()
        ),
        dial=dial or Dial("alpha", 2.0, (-20.0, 20.0)),
        model=MODEL,
        contrast={"name": "mine", "digest": "ab", "rows": 7},
        date="2026-01-31T10:00:00+00:00",
        **more,
    )


def tables(**columns: list[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column) for name, column in columns.items()}


def units(gains: list[float], layers: list[int] | None = None) -> dict[str, torch.Tensor]:
    """AUSteer's tables of so many units; their scores go down from 90 %."""
    count = len(gains)
    scores = [0.9 - 0.1 * rank for rank in range(count)]
    return tables(
        layer=layers or [3] * count, unit=list(range(count)), score=scores, r_pos=scores,
        r_neg=[0.0] * count, gain=gains,
    )  # fmt: skip


def scale(width: int = 8) -> Scale:
    return Scale(torch.arange(width), torch.ones(width), width)


def text(steering: Steering) -> str:
    return " ".join(explain(steering))


# -- what all have ----------------------------------------------------------------------------


def test_the_last_lines_say_dial_and_origin() -> None:
    steering = made(tt.CAA(token="last"), {"layers.4.resid": Add(torch.ones(8))})
    assert explain(steering.at(-3.5))[-2:] == [
        "Dial alpha: -3.5 now, 2 as fitted, sensible from -20 to 20.",
        "Made for tiny (llama, 12 layers, 01234567) from 7 rows of mine on 2026-01-31.",
    ]
    degrees = replace(steering, dial=Dial("theta", 90.0, (-360.0, 360.0), "°"))
    assert "Dial theta: 90° now, 90° as fitted, sensible from -360° to 360°." in explain(degrees)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("all", "It acts on every token."),
        ("prompt", "It acts on the prompt's tokens only."),
        ("generated", "It acts on generated tokens only."),
        ("last", "It acts on the prompt's last token and the generated ones."),
    ],
)
@pytest.mark.parametrize("method", ["caa", "austeer", "ss", "mine"])
def test_positions_are_said_once_whatever_the_method(
    method: str, positions: Positions, words: str
) -> None:
    operators: dict[str, Operator] = {f"layers.{i}.attn_norm": Rotate(PLANE) for i in range(3)}
    known = {"gain": [1.0]} if method == "austeer" else {}
    more = {"tables": units(known["gain"])} if known else {"findings": {"source_site": "embed"}}
    steering = made(METHODS.get(method, METHODS["ss"])(), operators, positions=positions, **more)
    lines = explain(replace(steering, method=method))
    assert lines.count(words) == 1
    assert sum(line.startswith("It acts on") for line in lines) == 1


def test_an_unknown_method_is_described_by_its_operators() -> None:
    operators: dict[str, Operator] = {
        "layers.1.resid": Add(torch.tensor([1.0, 0.0] * 4)), "layers.2.heads": scale(),
    }  # fmt: skip
    steering = replace(made(tt.CAA(token="last"), operators), method="mine")
    assert explain(steering)[:2] == [
        "mine: Add on 4 units of layers.1.resid.",
        "mine: Scale on 8 units of layers.2.heads.",
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("findings", [{}, {"source_site": 3, "chosen": 5, "validation_gain": [1]}])
def test_a_file_with_only_a_methods_name_is_described_all_the_same(
    method: str, findings: dict[str, Any]
) -> None:
    steering = replace(
        made(tt.CAA(token="last"), {"layers.1.resid": Add(torch.ones(8))}, findings=findings),
        method=method,
        hyperparameters={},
    )
    if METHODS[method].columns:  # these have to say what they chose
        with pytest.raises(tt.TrimtabError, match=f"{method} steering does not say what it chose"):
            describe(steering)
    else:
        json.dumps(describe(steering), allow_nan=False)
    if not METHODS[method].columns or method == "sta":
        assert "Made for tiny" in text(steering)


def test_tables_of_several_lengths_are_refused() -> None:
    wrong = {**units([1.0, 2.0]), "gain": torch.ones(3)}
    steering = made(
        tt.AUSteer(site="ffn_out", k=16, direction="paper"),
        {"layers.3.ffn_out": scale()},
        tables=wrong,
    )
    for look in (describe, explain):
        with pytest.raises(tt.TrimtabError, match="several lengths"):
            look(steering)


# -- as plain data ----------------------------------------------------------------------------


def test_units_in_rank_order_with_gamma_at_the_dial() -> None:
    steering = made(
        tt.AUSteer(site="ffn_out", k=16, direction="paper"),
        {"layers.3.heads": scale(), "layers.5.heads": scale()},
        tables=units([0.5, -1.0], layers=[5, 3]),
    ).at(6)  # fmt: skip
    found = describe(steering)["units"]
    assert [(u["site"], u["layer"], u["unit"], u["gamma"]) for u in found] == [
        ("layers.5.heads", 5, 0, 3.0), ("layers.3.heads", 3, 1, -6.0),
    ]  # fmt: skip
    assert all(set(u) >= {"score", "r_pos", "r_neg"} and "gain" not in u for u in found)


def test_heads_and_features() -> None:
    own = tables(layer=[2, 1], head=[0, 3], accuracy=[0.9, 0.7], sigma=[1.5, 2.5])
    heads = describe(made(tt.ITI(), {"layers.2.heads": Add(torch.ones(8))}, tables=own))["heads"]
    assert heads[1] == {
        "site": "layers.1.heads", "layer": 1, "head": 3,
        "accuracy": pytest.approx(0.7), "sigma": 2.5,
    }  # fmt: skip
    own = tables(feature=[42, 7], amplitude=[0.5, -0.25], frequency=[3, -2])
    sta = describe(made(tt.STA("x"), {"layers.1.resid": Add(torch.ones(8))}, tables=own))
    assert sta["features"] == [
        {"feature": 42, "amplitude": 0.5, "frequency": 3},
        {"feature": 7, "amplitude": -0.25, "frequency": -2},
    ]


def test_sadis_gamma_is_the_dial() -> None:
    own = tables(layer=[1], unit=[5], score=[0.5])
    steering = made(tt.SADI("neuron"), {"layers.1.ffn_in": scale()}, tables=own).at(3)
    (unit,) = describe(steering)["units"]
    assert (unit["site"], unit["gamma"]) == ("layers.1.ffn_in", 3.0)


@pytest.mark.parametrize("operator", [Rotate(PLANE), Turn(PLANE), Turn(PLANE, adaptive=True)])
def test_the_plane_of_a_rotation(operator: Operator) -> None:
    sites = ["layers.4.attn_norm", "layers.2.ffn_norm", "layers.2.attn_norm"]
    findings = {"source_site": "layers.9.ffn_norm"}
    found = describe(made(tt.SS(), dict.fromkeys(sites, operator), findings=findings))
    assert found["layers"] == [2, 4]
    assert found["plane"] == {
        "source_site": "layers.9.ffn_norm", "basis_norms": [1.0, 1.0], "basis_dot": 0.0,
    }  # fmt: skip


def test_a_basis_is_measured_as_it_is_stored() -> None:
    crooked = PLANE.clone()
    crooked[0] *= 1.0005
    crooked[1, 1] = 0.0002
    plane = describe(made(tt.SS(), {"layers.1.attn_norm": Rotate(crooked)}))["plane"]
    assert plane["basis_norms"][0] == pytest.approx(1.0005, rel=1e-6)
    assert plane["basis_dot"] == pytest.approx(1.0005 * 0.0002, rel=1e-4)


# -- AUSteer ----------------------------------------------------------------------------------


def test_austeer() -> None:
    own = units([0.9, -0.8, 0.7, -0.1], layers=[2, 0, 2, 7])
    steering = made(
        tt.AUSteer("heads", k=4, direction="paper"), {"layers.2.heads": scale()}, tables=own
    ).at(5)
    lines = explain(steering)
    assert lines[0] == (
        "AUSteer changes 4 single units of heads, in layers 0 (1 of them), 2 (2), 7 (1): each "
        "activation x becomes (1 + gamma) x."
    )
    assert "in the same direction on 60% to 90% of the pairs." in lines[1]
    assert lines[2] == "2 are scaled up, 2 down."
    assert lines[3].startswith("1 have a gamma below -1")  # -0.8 * 5, not -0.1 * 5
    turned = explain(replace(steering, value=-5.0))
    assert turned[3].startswith("2 have a gamma below -1")
    assert explain(steering.at(0))[2] == "0 are scaled up, 0 down."
    assert "gamma below" not in text(steering.at(1))


@pytest.mark.parametrize(
    ("options", "words", "without"),
    [
        ({"clamp_sign": True}, ["(1 + gamma) x", "scaled up"], "gamma below"),
        ({"change": "absolute"}, ["x + gamma |x|", "1 are raised, 1 lowered"], "gamma below"),
        (
            {"change": "vector"},
            ["alpha times the mean difference", "1 are raised, 1 lowered"],
            "gamma",
        ),
        ({"locate": "difference"}, ["their mean differs most"], "% of the pairs"),
        ({"locate": "random"}, ["drawn at random"], "% of the pairs"),
        (
            {"choose": "least", "alpha": 0.5},
            ["shrinks 2 single units", "(1 - alpha) x", "least reliably", "80% to 90%"],
            "scaled up",
        ),
        ({"choose": "least", "alpha": 0.5, "locate": "random"}, ["drawn at random"], "least"),
    ],
)
def test_austeers_options_are_said(options: dict[str, Any], words: list[str], without: str) -> None:
    method = tt.AUSteer(**options)
    own = units([1.0, -1.0])
    said = text(made(method, {"layers.3.ffn_out": scale()}, tables=own))
    for word in (*words, "in layer 3:"):
        assert word in said
    assert without not in said


@pytest.mark.parametrize(
    ("method", "column", "words"),
    [
        (
            tt.AUSteer(k=0, site="ffn_out", direction="paper"),
            "unit",
            "AUSteer with k = 0: no unit is changed.",
        ),
        (tt.SADI(k=0), "head", "SADI with k = 0: nothing is changed."),
        (tt.ITI(k=0), "head", "ITI with k = 0: no head is changed."),
    ],
)
def test_nothing_chosen(method: Any, column: str, words: str) -> None:
    names = ("layer", "score", "r_pos", "r_neg", "gain", "accuracy", "sigma", column)
    steering = made(method, {}, tables={name: torch.tensor([]) for name in names})
    assert explain(steering)[0] == words
    assert describe(steering)[f"{column}s"] == []


# -- vectors ----------------------------------------------------------------------------------


def test_caa() -> None:
    vector = torch.tensor([3.0, 4.0] + [0.0] * 6)
    lines = explain(made(tt.CAA(token="last"), {"layers.4.resid": Add(vector)}))
    assert lines[:2] == [
        "CAA adds one vector (length 5.00 at alpha 1) to the residual stream after block 4.",
        "The vector is the mean activation of the positive texts, at the last token, minus that of "
        "the negative ones.",
    ]
    several = {f"layers.{i}.resid": Add((i + 1) * vector) for i in (1, 2, 3, 7)}
    lines = explain(made(tt.CAA(variant="pca", token=-2), {**several}))
    assert lines[:2] == [
        "CAA adds a vector to the residual stream after each of the blocks 1-3, 7 (length 10.00 to "
        "40.00 at alpha 1).",
        "Each vector is the direction in which the pairs differ most (PCA), at the token before "
        "the last.",
    ]
    lines = explain(made(tt.CAA(variant="random", token=-2), {"layers.4.resid": Add(vector)}))
    assert lines[1] == (
        "The vector is a direction by chance, as long as the mean difference, at the token before "
        "the last."
    )


@pytest.mark.parametrize(
    ("token", "words"),
    [("mean", "averaged over all tokens"), ("answer", "over the answer's tokens"),
     (-1, "at the last token"), (-5, "at token -5 (from the end)")],
)  # fmt: skip
def test_what_stands_for_a_text_is_said(token: Any, words: str) -> None:
    for method in (tt.CAA(token=token), tt.ActAdd(token=token), tt.ActAdd(token=token, pairs=4)):
        assert words in text(made(method, {"layers.4.resid": Add(torch.ones(8))}))


def test_caas_choice() -> None:
    gains = {"layers.1.resid": 0.25, "layers.2.resid": 1.5, "layers.3.resid": -2.0}
    said = text(
        made(
            tt.CAA(layer="validation", token="last"), {"layers.2.resid": Add(torch.ones(8))},
            findings={"site": "layers.2.resid", "validation_gain": gains},
        )
    )  # fmt: skip
    assert "chosen among 3 on validation rows" in said
    assert "by 1.50 nats" in said
    assert "after block 2." in said


def test_actadd() -> None:
    vectors = {"layers.2.resid": Add(torch.ones(8))}
    assert "of the first positive text, " in text(made(tt.ActAdd(), vectors))
    assert "of each side the first 3 are used" in text(made(tt.ActAdd(pairs=3), vectors))


def test_sta() -> None:
    own = tables(feature=[4], amplitude=[1.0], frequency=[2])
    found = {"autoencoder": "sae1", "features": 400, "kept": 37}
    said = text(made(tt.STA("x"), {"embed": Add(torch.ones(8))}, tables=own, findings=found))
    assert "before the first block" in said
    assert "the sum of 37 of 400 features" in said
    assert "averaged over the answer's tokens" in said


# -- heads ------------------------------------------------------------------------------------


def test_iti() -> None:
    own = tables(layer=[4, 4, 9], head=[0, 1, 0], accuracy=[0.96, 0.81, 0.7], sigma=[1.0, 1.0, 1.0])
    vectors = {"layers.4.heads": Add(torch.ones(8))}
    said = text(made(tt.ITI(), vectors, tables=own))
    assert "3 attention heads, in layers 4 (2 of them), 9 (1)" in said
    assert "from the mean of the negative texts to that of the positive ones" in said
    assert "alpha times the texts' standard deviation" in said
    assert "right on 70% to 96% of texts that it was not trained on" in said
    probe = text(made(tt.ITI(direction="probe", scale=False), vectors, tables=own))
    assert "where a classifier says that texts are positive and is alpha long" in probe


@pytest.mark.parametrize("setting", [-0.5, 0, 1, 3])
def test_sadi(setting: float) -> None:
    dial = Dial("delta", 1.0, (-1.0, 90.0))
    own = tables(layer=[1, 1], head=[2, 0], score=[0.5, 0.4])
    heads = made(tt.SADI(), {"layers.1.heads": scale()}, dial, tables=own).at(setting)
    factor = f"by 1 + delta (now {1 + setting:g}), in layer 1."
    assert explain(heads)[0] == f"SADI multiplies 2 attention heads {factor}"
    own = tables(layer=[1, 1], unit=[2, 0], score=[0.5, 0.4])
    neurons = made(tt.SADI("neuron"), {"layers.1.ffn_in": scale()}, dial, tables=own).at(setting)
    assert explain(neurons)[0] == f"SADI multiplies 2 single units of ffn_in {factor}"


# -- directions and planes --------------------------------------------------------------------

DIRECTION = Ablate(torch.eye(8)[2])


@pytest.mark.parametrize(
    ("where", "count", "words"),
    [
        ("writers", 25, "everything that is written to the residual stream (25 sites)"),
        ("norms", 24, "what attention and FFN read (24 sites)"),
        ("layer", 1, "the residual stream at one place:"),
    ],
)
def test_ablation(where: Any, count: int, words: str) -> None:
    operators: dict[str, Operator] = {
        f"layers.{i // 3}.{('attn_out', 'ffn_out', 'resid')[i % 3]}": DIRECTION
        for i in range(count)
    }
    found = {"source_site": "layers.4.resid", "token": -3}
    dial = Dial("amount", 1.0, (-1.0, 1.0))
    said = text(made(tt.Ablation(where=where), operators, dial, findings=found))
    assert words in said
    assert "read at layers.4.resid, at token -3 (from the end)" in said
    assert "at amount 1 nothing is left" in said
    assert "chosen among" not in said


def test_ablations_choice() -> None:
    chosen = {"layer": 5, "token": -1, "score": -3.25, "kl": 0.0625, "induced": 1.0}
    found = {"source_site": "layers.4.resid", "token": -1, "unsteered_score": 2.5,
             "chosen": chosen, "candidates": 9, "passed": 4}  # fmt: skip
    said = text(made(tt.Ablation(), {"embed": DIRECTION}, findings=found))
    assert "chosen among 9 on validation rows" in said
    assert "from 2.50 to -3.25" in said
    assert "0.062 nats" in said


@pytest.mark.parametrize(
    ("method", "operator", "name", "words"),
    [
        (tt.SAS(), Turn(PLANE), "Standard Angular Steering", "wherever it pointed before"),
        (tt.AAS(), Turn(PLANE, adaptive=True), "Adaptive Angular Steering", "but only where"),
        (tt.SS(), Rotate(PLANE), "Selective Steering", "lies in the plane by the dial's angle"),
    ],
)
def test_angular(method: Any, operator: Operator, name: str, words: str) -> None:
    sites = [f"layers.{i}.{kind}" for i in (3, 4, 5, 9) for kind in ("attn_norm", "ffn_norm")]
    operators = dict.fromkeys(sites[:-1], operator)
    found = {"source_site": "layers.4.ffn_norm", "mean_cosine": 0.3}
    said = text(made(method, operators, findings=found))
    assert f"{name} works in one plane, the same at 7 norms in blocks 3-5, 9." in said
    assert words in said
    read = "at" if method.candidates == "output" else "in what enters"
    assert f"as read {read} layers.4.ffn_norm;" in said
    assert ("on one side of zero" in said) is (method.name == "ss")


def test_ss_says_whether_whole_blocks_had_to_qualify() -> None:
    operators: dict[str, Operator] = {"layers.3.attn_norm": Rotate(PLANE)}
    found = {"source_site": "layers.4.ffn_norm"}
    for whole, words in ((True, "blocks all of whose norms see"), (False, "norms that see")):
        assert words in text(made(tt.SS(whole_blocks=whole), operators, findings=found))


def test_lengths_are_of_the_vector_at_dial_one() -> None:
    """Whatever the dial stands at: it is said beside."""
    steering = made(tt.CAA(token="last"), {"layers.4.resid": Add(torch.full((8,), 0.5))})
    length = f"length {math.sqrt(2):.2f} at alpha 1"
    assert length in text(steering)
    assert length in text(steering.at(7))
