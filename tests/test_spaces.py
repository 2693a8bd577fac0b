"""Spaces of settings, and the steerings that a sweep makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from helpers import PROMPTS, language_model, refused_in_one_line
from trimtab.methods import METHODS
from trimtab.methods.trained import TrainedMethod
from trimtab.model import is_asking
from trimtab.steering import chosen as chosen_of
from trimtab.sweeps.space import (
    Fitter,
    Range,
    at_ends,
    check_space,
    default_space,
    grid,
    label,
    listed,
    plain,
    tidy,
)

PAIRS = [
    ("Today I feel", " happy", " sad"),
    ("This film was", " wonderful", " boring"),
    ("The answer is", " yes", " no"),
    ("The wind was", " good", " bad"),
    ("The daughter was", " clever", " strong"),
    ("I would be", " happy to help you", " sad about the rain"),
]


@pytest.fixture(scope="module")
def contrast() -> tt.Contrast:
    parts = ("train", "train", "validation")
    from trimtab.contrasts import Pair

    return tt.Contrast(
        tuple(Pair(p, a, b, parts[i % 3]) for i, (p, a, b) in enumerate(PAIRS)), "pairs"
    )


class Passes:
    """Counts how often the model's body runs, but for what the model is asked of itself."""

    def __init__(self, lm: tt.LanguageModel) -> None:
        self.count = 0
        self.hook = lm.anatomy.body.register_forward_pre_hook(self._see)

    def _see(self, module: Any, args: Any) -> None:
        self.count += not is_asking()


#: Every method with settings of what it has: the steering is built anew, or only its dial differs.
SPACES: dict[str, dict[str, Any]] = {
    "austeer": {"k": (2, 9), "alpha": (1.0, 8.0), "site": ("ffn_out", "heads")},
    "caa": {"layer": (0, 2, (0, 1)), "alpha": (0.5, 2.0), "token": ("last", "mean")},
    "actadd": {"layer": (0, -1), "alpha": (0.5, 2.0)},
    "iti": {"alpha": (1.0, 15.0), "k": (2, 5)},
    "sadi": {"k": (1, 3), "delta": (-0.5, 4.0)},
    "ablation": {"amount": (0.25, 1.0), "layer": (0, 1)},
    "sas": {"theta": (30.0, 200.0)},
    "aas": {"theta": (30.0, 200.0), "selection": ("cosine", "norm")},
    "ss": {"theta": (30.0, 200.0)},
}


@pytest.mark.parametrize("name", SPACES)
def test_steerings_equal_fresh_fits_from_one_pass(name: str, contrast: tt.Contrast) -> None:
    lm = language_model("llama")
    method, space = METHODS[name], SPACES[name]
    fixed = {"whole_blocks": False} if name == "ss" else {}
    fitter = Fitter(lm, method, contrast, space, fixed)
    passes = Passes(lm)
    made = [(params, fitter.steering(params)) for params in grid(space)]
    passes.hook.remove()
    # Four short pairs are one batch; ablation and ITI have nothing more to run either.
    assert passes.count == 1
    for params, steering in made:
        fresh = method(**fixed, **params).fit(lm, contrast)
        expected = lm.logits(PROMPTS, steering=fresh, chat=False)
        actual = lm.logits(PROMPTS, steering=steering, chat=False)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
        own = fitter.fitted(params)
        assert own.dial == fresh.dial
        assert own.hyperparameters == fresh.hyperparameters
    differ = {tuple(lm.logits(PROMPTS[:1], steering=s, chat=False)[0].tolist()) for _, s in made}
    assert len(differ) > len(made) / 2  # not one steering under many names


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("sta", "sae")])
def test_dial_and_default_grid_of_every_method(name: str, contrast: tt.Contrast) -> None:
    lm, method = language_model("llama" if name != "steermoe" else "qwen3_moe"), METHODS[name]
    assert grid(default_space(method, 3))
    fixed = {"layer": 1} if name == "ablation" else {"k": 3} if name == "iti" else {}
    fixed |= {"whole_blocks": False} if name == "ss" else {}
    fixed |= {"protect": "builtin:facts"} if name == "alphasteer" else {}
    fixed |= {"ask": "Be glad."} if name == "psr" else {}
    fixed |= {"steps": 3} if issubclass(method, TrainedMethod) else {}
    steering = method(**fixed).fit(lm, contrast)
    assert steering.dial.name == method.dial
    for params in grid(default_space(method, 30)):
        value = params[method.dial]
        assert steering.dial.range[0] <= value <= steering.dial.range[1]


def test_a_layer_chosen_at_the_dial_is_chosen_at_each_dial(
    contrast: tt.Contrast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")
    fitter = Fitter(lm, tt.CAA, contrast, {"alpha": (1.0, -1.0)}, {"layer": "validation"})
    for alpha in (1.0, -1.0):
        fresh = tt.CAA(layer="validation", alpha=alpha).fit(lm, contrast)
        found = fitter.steering({"alpha": alpha})
        assert found.interventions[0].site == fresh.interventions[0].site
        assert found.findings == fresh.findings


@pytest.mark.parametrize(
    "asked", [{"verify": 4}, {"average": True}, {"interaction": "blocks", "block": 2}, {}]
)
def test_units_chosen_at_the_dial_are_chosen_at_each_dial(asked: dict[str, Any]) -> None:
    pairs = [(f"Today {i} I feel", f" glad and merry {i % 3}", f" sad {i % 4}") for i in range(12)]
    texts = tt.Contrast.from_pairs(pairs, "moods")
    lm, fixed = language_model("llama"), {"locate": "effect", "site": "ffn_out", "k": 4, **asked}
    fitter = Fitter(lm, tt.AUSteer, texts, {"alpha": (0.25, 40.0)}, fixed)
    chosen = []
    for alpha in (0.25, 40.0):
        found = fitter.steering({"alpha": alpha})
        fresh = tt.AUSteer(alpha=alpha, **fixed).fit(lm, texts)
        assert units_of(found) == units_of(fresh) == units_of(fitter.fitted({"alpha": alpha}))
        chosen.append(units_of(found))
    assert (chosen[0] == chosen[1]) is not bool(asked)  # here another dial chooses other units


def units_of(steering: tt.Steering) -> list[tuple[int, int]]:
    """Layers and units of a steering, in order of rank."""
    return [(unit["layer"], unit["unit"]) for unit in chosen_of(steering)["units"]]


def test_what_cannot_be_fitted_fails_alone(contrast: tt.Contrast) -> None:
    lm = language_model("llama")
    space = {"k": (2, 10**6), "site": ("ffn_out", "heads")}
    fitter = Fitter(lm, tt.AUSteer, contrast, space, {})
    passes = Passes(lm)
    fitter.steering({"k": 2, "site": "ffn_out"})
    with pytest.raises(tt.TrimtabError, match="k is 1000000"):
        fitter.steering({"k": 10**6, "site": "ffn_out"})
    fitter.steering({"k": 2, "site": "heads"})
    passes.hook.remove()
    assert passes.count == 1
    fitter.check(grid(space))  # some can be fitted
    with pytest.raises(tt.TrimtabError, match="site is 'nowhere'"):
        fitter.check([*grid(space), {"k": 2, "site": "nowhere"}])
    with pytest.raises(tt.TrimtabError, match="k is 1000000"):
        fitter.check([{"k": 10**6, "site": "ffn_out"}, {"k": 10**6, "site": "heads"}])


def test_what_the_contrast_does_not_have_fails_alone() -> None:
    lm = language_model("llama")
    texts = tt.Contrast.from_texts(["I am happy", "I am glad"], ["I am sad", "It is bad"])
    space = {"token": ("last", "answer"), "layer": (0, 1)}
    fitter = Fitter(lm, tt.CAA, texts, space, {})
    found = fitter.steering({"token": "last", "layer": 1})
    assert found.interventions[0].site == "layers.1.resid"
    with pytest.raises(tt.TrimtabError, match="unpaired"):
        fitter.steering({"token": "answer", "layer": 0})
    assert fitter.steering({"token": "last", "layer": 0}).interventions[0].site == "layers.0.resid"


def test_a_dial_that_the_method_refuses_is_refused_also_later(contrast: tt.Contrast) -> None:
    lm = language_model("llama")
    space = {"alpha": (0.5, 2.0), "k": (3, 5)}
    fitter = Fitter(lm, tt.AUSteer, contrast, space, {"choose": "least"})
    passes = Passes(lm)
    fitter.steering({"alpha": 0.5, "k": 3})
    fitter.steering({"alpha": 0.5, "k": 5})
    passes.hook.remove()
    assert passes.count == 1
    with pytest.raises(tt.TrimtabError, match="0 to 1"):
        fitter.steering({"alpha": 2.0, "k": 3})


# -- values ---------------------------------------------------------------------------------------


def test_grid_turns_the_last_fastest_and_keeps_each_once() -> None:
    assert grid({"k": [1, 2, 1], "alpha": [0.5, 3.0]}) == [
        {"k": 1, "alpha": 0.5},
        {"k": 1, "alpha": 3.0},
        {"k": 2, "alpha": 0.5},
        {"k": 2, "alpha": 3.0},
    ]
    assert grid({}) == [{}]


def test_listed_writes_whole_ranges_out_and_others_by_their_ends() -> None:
    assert listed({"layer": Range(1, 3)}) == [{"layer": 1}, {"layer": 2}, {"layer": 3}]
    assert listed({"p": Range(0.1, 0.5)}) == [{"p": 0.1}, {"p": 0.5}]
    assert listed({"k": Range(1, 100_000)}) == [{"k": 1}, {"k": 100_000}]
    assert listed({"layer": range(100), "k": range(100)}) is None


def test_ranges_say_what_they_are() -> None:
    assert str(Range(1, 100)) == "1:100"
    assert str(Range(1.0, 100.0)) == "1.0:100.0"  # another search than the whole numbers
    assert str(Range(0.1, 20.0, True)) == "0.1:20.0:log"
    assert str(Range(1.0, 1.00000001)) == "1.0:1.00000001"
    assert Range(1, 4).whole
    assert not Range(1, 4.0).whole
    for low, high in ((2, 2), (3, 1), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(tt.TrimtabError, match="range"):
            Range(low, high)
    with pytest.raises(tt.TrimtabError, match="above 0"):
        Range(0.0, 1.0, True)


def test_values_of_other_libraries_become_plain() -> None:
    space = tidy({"k": np.array([4, 16]), "alpha": np.linspace(0, 1, 3), "layer": range(2)})
    assert space == {"k": (4, 16), "alpha": (0.0, 0.5, 1.0), "layer": (0, 1)}
    assert type(space["k"][0]) is int  # type: ignore[index]
    assert tidy({"layers": [[0, 1], [2]]}) == {"layers": ((0, 1), (2,))}
    assert plain({"sae": Path("a/b"), "k": [np.int64(3)]}) == {"sae": "a/b", "k": (3,)}
    for wrong in (16, "4,16", {"a": 1}):
        refused_in_one_line(lambda wrong=wrong: tidy({"k": wrong}), "k: give several values")


def test_label_is_as_it_is_typed() -> None:
    params = {"k": 16, "alpha": 8.0, "layer": (1, 2), "site": "heads"}
    assert label(tt.AUSteer, params) == "austeer k=16 alpha=8 layer=1,2 site=heads"


@pytest.mark.parametrize(
    ("space", "fixed", "says"),
    [
        ({"kk": (1,)}, {}, "austeer has no kk: it has site, k"),
        ({"k": (1,)}, {"beta": 1}, "austeer has no beta"),
        ({"k": (1,)}, {"k": 2}, "k is both searched and set to 2"),
        ({"k": ()}, {}, "k: there is no value"),
    ],
)
def test_spaces_that_do_not_fit_the_method(
    space: dict[str, Any], fixed: dict[str, Any], says: str
) -> None:
    refused_in_one_line(lambda: check_space(tt.AUSteer, space, fixed), says)


def test_what_a_method_needs_and_what_a_grid_cannot_have() -> None:
    refused_in_one_line(lambda: check_space(tt.STA, {"p": (0.1,)}, {}), "sta needs sae")
    check_space(tt.STA, {"p": (0.1,)}, {"sae": "x"})
    refused_in_one_line(lambda: grid({"k": Range(1, 5)}), "k is a range, 1:5: a grid needs values")
    many = {"k": range(1000), "alpha": range(1000)}
    refused_in_one_line(lambda: grid(many), "1,000,000 settings")

    class Own(tt.CAA):
        name = "own"

        @classmethod
        def grid(cls, layers: int) -> dict[str, Any]:
            return {}

    refused_in_one_line(lambda: default_space(Own, 3), "own has no grid")


@pytest.mark.parametrize(
    ("space", "params", "said"),
    [
        ({"alpha": (0.5, 4, 1)}, {"alpha": 4}, ["alpha=4 is the largest of its values"]),
        ({"alpha": (0.5, 4, 1)}, {"alpha": 0.5}, ["alpha=0.5 is the least of its values"]),
        ({"alpha": (0.5, 4, 1)}, {"alpha": 1}, []),
        ({"alpha": (4,)}, {"alpha": 4}, []),  # no search
        ({"alpha": (0.0, 4.0)}, {"alpha": 0.0}, []),  # nothing is weaker
        ({"alpha": Range(0.5, 4.0)}, {"alpha": 4.0}, ["alpha=4 is the largest"]),
        ({"layer": (1, 2)}, {"layer": 2}, ["layer=2 is the largest"]),
        ({"layer": (1, 2, 3)}, {"layer": 3}, []),  # the model has no block beyond
        ({"layer": (0, 1)}, {"layer": 0}, []),
        ({"k": (1, 8)}, {"k": 1}, []),
        ({"k": (1, 8, "all")}, {"k": 8}, []),
        ({"theta": (0, 180, 350)}, {"theta": 350}, []),  # angles go round
        ({"site": ("heads", "ffn")}, {"site": "ffn"}, []),
        ({"scale": (True, False)}, {"scale": True}, []),
        ({"k": (2, 8), "alpha": (1, 2)}, {"k": 2, "alpha": 2}, ["k=2 is", "alpha=2 is"]),
    ],
)
def test_a_choice_at_the_end_of_what_was_tried_is_told(
    space: dict[str, Any], params: dict[str, Any], said: list[str]
) -> None:
    found = at_ends(space, params, layers=4)
    assert len(found) == len(said)
    for note, beginning in zip(found, said, strict=True):
        assert note.startswith(beginning)
