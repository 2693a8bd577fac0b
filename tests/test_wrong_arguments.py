"""What stands in the wrong place, or is no list, is refused in a line that says what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import trimtab as tt
from helpers import language_model, steer_at


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def steering(lm: tt.LanguageModel) -> tt.Steering:
    return steer_at(lm, "resid", seed=2)


@pytest.fixture(scope="module")
def contrast() -> tt.Contrast:
    return tt.Contrast.builtin("formality").part("train").take(4)


METHOD = tt.CAA(layer=1)
#: What is called with a model, a steering and a contrast, and what the line says.
WRONG: dict[str, tuple[Callable[[Any, Any, Any], object], str]] = {
    "a method that is no list": (lambda m, s, c: tt.fit(METHOD, m, c), "write [method]"),
    "a method by name": (lambda m, s, c: tt.fit(["caa"], m, c), "'caa' is not a method"),
    "exchanged in fit": (lambda m, s, c: METHOD.fit(c, m), "Contrast stands where the model"),
    "a contrast by name": (lambda m, s, c: METHOD.fit(m, "builtin:facts"), "load_contrast(...)"),
    "rows for a contrast": (
        lambda m, s, c: METHOD.fit(m, [("a", "b", "c")]),
        "Contrast.from_pairs",
    ),
    "a model that is not wrapped": (lambda m, s, c: METHOD.fit(m.model, c), "wrap(model, "),
    "a model by name": (lambda m, s, c: METHOD.fit("gpt2", c), "'gpt2' is a name, not a model"),
    "exchanged in bake": (lambda m, s, c: tt.bake(s, m), "Steering stands where the model"),
    "a file in bake": (lambda m, s, c: tt.bake(m, "s.safetensors"), "Steering.load(FILE)"),
    "nothing in bake": (lambda m, s, c: tt.bake(m, None), "None is not a steering"),
    "a method in bake": (lambda m, s, c: tt.bake(m, METHOD), "is not a steering"),
    "exchanged in export": (lambda m, s, c: tt.export(s, m, "lora", "x"), "stands where the model"),
    "a file in export": (lambda m, s, c: tt.export(m, "s", "lora", "x"), "is not a steering"),
    "exchanged in evaluate": (lambda m, s, c: tt.evaluate(["copa"], m), "stands where the model"),
    "exchanged in compare": (lambda m, s, c: tt.compare(["caa"], m, "copa"), "stands where"),
    "a method that is no list in compare": (
        lambda m, s, c: tt.compare(m, "caa", "copa"),
        "write [method]",
    ),
    "exchanged in sweep": (lambda m, s, c: tt.sweep("caa", m, "copa"), "'caa' is a name"),
    "exchanged in make": (lambda m, s, c: tt.make("be brief", m), "is a name, not a model"),
    "exchanged in log_odds": (lambda m, s, c: tt.log_odds(c, m), "Contrast stands where"),
    "a contrast by name in log_odds": (lambda m, s, c: tt.log_odds(m, "x.jsonl"), "load it with"),
    "a text that is no list": (lambda m, s, c: tt.cross_entropy(m, "It rains."), "write [text]"),
    "exchanged in a curve": (lambda m, s, c: tt.strength.curve(s, m, ["a"]), "stands where"),
    "exchanged in a budget": (lambda m, s, c: tt.strength.budget(s, m, ["a"], kl=1), "where the"),
    "exchanged in monitor": (lambda m, s, c: tt.monitor(s, m, []), "Steering stands where"),
    "a number for chats": (lambda m, s, c: tt.monitor(m, s, 3), "chats must be a list"),
    "exchanged in fit_monitor": (lambda m, s, c: tt.fit_monitor(s, m, c), "where the model"),
    "exchanged in fit_gate": (lambda m, s, c: tt.fit_gate(c, m), "Contrast stands where"),
    "a dial that is a list": (lambda m, s, c: s.at([1.0]), "takes a number, not [1.0]"),
    "a number for a contrast": (lambda m, s, c: tt.load_contrast(3), "int stands where"),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_in_a_line(
    name: str, lm: tt.LanguageModel, steering: tt.Steering, contrast: tt.Contrast
) -> None:
    call, words = WRONG[name]
    with pytest.raises(tt.TrimtabError) as raised:
        call(lm, steering, contrast)
    line = str(raised.value)
    assert words in line
    assert "\n" not in line


def test_methods_of_a_mapping_are_a_list(lm: tt.LanguageModel, contrast: tt.Contrast) -> None:
    (fitted,) = tt.fit({"one": METHOD}.values(), lm, contrast, measure=False)  # type: ignore[arg-type]
    assert fitted.method == "caa"


def test_a_contrast_is_loaded_by_its_path(tmp_path: Any, contrast: tt.Contrast) -> None:
    file = contrast.to_jsonl(tmp_path / "pairs.jsonl")
    assert tt.load_contrast(file).digest == contrast.digest
