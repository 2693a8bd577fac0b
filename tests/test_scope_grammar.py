"""The string of a scope: what it says, what is wrong with it, and that it comes back as it is."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import trimtab as tt
from helpers import add, language_model, one_line, refused_in_one_line, steer
from scopes_by_hand import OF_CHATS, SCOPES
from trimtab.methods import describe, explain
from trimtab.steering import (
    POSITIONS,
    WORDS,
    And,
    Between,
    Not,
    Or,
    Scope,
    TokenIs,
    Window,
    Word,
)
from trimtab.steering.scope_tree import SITUATIONS

ALL, PROMPT, GENERATED, LAST = map(Word, POSITIONS)

#: What strings are read as.
READ: dict[str, Scope] = {
    "all": Scope(ALL),
    " generated\n": Scope(GENERATED),
    "generated & !thinking": Scope(And((GENERATED, Not(Word("thinking"))))),
    "generated and not thinking": Scope(And((GENERATED, Not(Word("thinking"))))),
    "generated[:32]": Scope(Window(GENERATED, None, 32)),
    "generated [32 :]": Scope(Window(GENERATED, 32, None)),
    "prompt[-5:]": Scope(Window(PROMPT, -5, None)),
    "user[2:][:5]": Scope(Window(Window(Word("user"), 2, None), None, 5)),
    "user | system & all": Scope(Or((Word("user"), And((Word("system"), ALL))))),
    "(user | system) & all": Scope(And((Or((Word("user"), Word("system"))), ALL))),
    "!generated[:3]": Scope(Not(Window(GENERATED, None, 3))),
    "(!generated)[:3]": Scope(Window(Not(GENERATED), None, 3)),
    "!!all": Scope(Not(Not(ALL))),
    "token(13, 198)": Scope(TokenIs((13, 198))),
    'between("<think>", "</think>")': Scope(Between("<think>", "</think>")),
    "between('a\\n', [3, 4])": Scope(Between("a\n", (3, 4))),
    "between(3, 4) ~ 0.5": Scope(Between((3,), (4,)), 0.5),
    "generated ~ .95": Scope(GENERATED, 0.95),
}

#: What is no scope, and what is said of it.
WRONG = {
    "": "a scope is empty",
    "generated &": "character 11: something is missing after '&'",
    "& all": "character 1: '&' cannot stand at the beginning",
    "all & | all": "character 7: '|' cannot stand after '&'",
    "all all": "character 5: 'all' cannot follow 'all'",
    "(all": "character 5: '\\)' is expected, not the end",
    "all)": "character 4: '\\)' cannot follow 'all'",
    "generatd": "character 1: there is no word 'generatd': did you mean generated",
    "first": "there is no word 'first': known are all, prompt, generated",
    "all[:]": "this window takes all",
    "all[3]": "character 6: ':' is expected, not ']'",
    "all[-3:]": "only prompt takes numbers below 0",
    "generated[5:3]": "this window is empty",
    "generated[:0]": "this window is empty",
    "all[1.5:]": "a whole number of tokens, not 1.5",
    "token()": "'\\)' is no token id",
    "token(-1)": "-1 is no token id",
    "between(all, 3)": "'all' is no marker",
    'between("x, 3)': "character 9: the text that begins here has no end",
    'between(" ", 3)': "a marker must say something",
    "all ~ 1": "a factor between 0 and 1, not 1",
    "all ~": "the end is no factor of a decay",
    "(all ~ 0.5)": "'\\)' is expected, not '~'",
    "all $": "character 5: '\\$' means nothing here",
    "(" * 60 + "all": "more than 50 brackets",
    "!" * 60 + "all": "more than 50 brackets",
    "all | " * 300 + "all": "1000 are the most",
}


@pytest.mark.parametrize("text", READ)
def test_what_a_string_says(text: str) -> None:
    found = Scope.parse(text)
    assert found == READ[text]
    assert hash(found) == hash(READ[text])
    assert Scope.parse(str(found)) == found == Scope.of(text) == Scope.of(found)


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_scope_is_said_in_one_line(text: str) -> None:
    refused_in_one_line(lambda: Scope.parse(text), WRONG[text])
    lm = language_model("llama")
    steering = steer(lm, ("layers.1.resid", add(48)))
    refused_in_one_line(lambda: steering.scoped(text), WRONG[text])


def test_a_scope_is_a_value() -> None:
    scope = Scope.parse("generated & !thinking")
    with pytest.raises(FrozenInstanceError):
        scope.decay = 0.5  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(scope)) == scope
    refused_in_one_line(lambda: Scope.of(3), "3 is no scope")  # type: ignore[arg-type]


_IDS = st.lists(st.integers(0, 10**9), min_size=1, max_size=3).map(tuple)
_MARKS = st.text(min_size=1).filter(lambda text: text.strip() and text.isprintable()) | _IDS


def _windows(part: Any) -> Any:
    ends = st.integers(0, 99), st.integers(1, 99)
    return st.builds(
        lambda first, length, open_end: Window(part, first, None if open_end else first + length),
        *ends,
        st.booleans(),
    )


def _larger(parts: Any) -> Any:
    several = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return (
        parts.map(Not)
        | parts.flatmap(_windows)
        | several.map(And)
        | several.map(Or)
        | st.integers(1, 99).map(lambda count: Window(PROMPT, -count, None))
    )


_PARTS = st.recursive(
    st.sampled_from(WORDS).map(Word) | _IDS.map(TokenIs) | st.builds(Between, _MARKS, _MARKS),
    _larger,
    max_leaves=8,
)
_DECAYS = st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True)


@settings(deadline=None, max_examples=300)
@given(st.builds(Scope, _PARTS, _DECAYS))
def test_what_is_printed_is_read_as_the_same(scope: Scope) -> None:
    if len(str(scope)) <= 1000:
        assert Scope.parse(str(scope)) == scope
        assert str(Scope.parse(str(scope))) == str(scope)


_PIECES = st.sampled_from(
    [*WORDS, "token", "between", "and", "or", "not", *"&|!~()[]:,\"' -.", "0", "3", "0.5", "'a'"]
)


@settings(deadline=None, max_examples=600)
@given(st.text(max_size=40) | st.lists(_PIECES, max_size=12).map(" ".join))
def test_any_text_is_a_scope_or_an_error_of_one_line(text: str) -> None:
    said = ""
    try:
        found = Scope.parse(text)
    except tt.TrimtabError as error:
        found, said = Scope.parse("all"), str(error)
    assert said.isprintable()
    assert Scope.parse(str(found)) == found


@pytest.mark.parametrize("scope", [*SCOPES, *OF_CHATS])
def test_what_is_said_without_a_text_is_so_of_every_text(scope: str) -> None:
    """What holds of all tokens of a place, or of none, does in texts that were masked by hand."""
    weights, read = {**SCOPES, **OF_CHATS}[scope], Scope.parse(scope)
    ids = [1, 4, 204, 57, 293, 80, 2, 204, 5, 204, 159, 32, 60, 293, 61, 80, 62]
    found, end = weights(ids, 10), 10
    places = {"prompt": found[: end - 1], "end": found[end - 1 : end], "generated": found[end:]}
    for place, of_place in places.items():
        said = read.part.holds(next(s for s in _SITUATIONS if s.place == place))
        assert said is None or {bool(weight) for weight in of_place} == {said}
    assert read.everywhere is (set(found) == {1.0})
    assert not read.only_generated or not any(found[:end])


_SITUATIONS = [at for at in SITUATIONS if at.kind == "text"]


# -- in steerings and their files -----------------------------------------------------------------


def _steering() -> tt.Steering:
    return steer(language_model("llama"), ("layers.1.resid", add(48)), ("layers.2.heads", add(64)))


def test_a_scope_is_kept_in_the_file_and_told(tmp_path: Path) -> None:
    one = _steering().scoped('generated & !between("<a>", [3, 4]) ~ 0.9')
    again = tt.Steering.load(one.save(tmp_path / "one.safetensors"))
    assert again.scopes == one.scopes == (Scope.parse(str(one.scopes[0])),)
    assert again.digest == one.digest != _steering().digest
    assert describe(one)["scope"] == str(one.scopes[0])
    assert {each["scope"] for each in describe(one)["interventions"]} == {str(one.scopes[0])}
    assert all("positions" not in each for each in describe(one)["interventions"])
    assert any(str(one.scopes[0]) in line for line in explain(one))
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        document = json.loads(file.metadata()["trimtab"])
    assert document["format"] == 2
    assert document["interventions"][0]["scope"] == str(one.scopes[0])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("tokens", ["all", "text", "image"])
def test_files_without_scopes_mean_what_they_meant(
    positions: Any, tokens: Any, tmp_path: Path
) -> None:
    """What has a place and a kind of token only is written as it always was, and read again."""
    if tokens == "image" and positions in ("generated", "last"):
        refused_in_one_line(lambda: _steering().scoped(f"{positions} & image"), "never acts")
        return
    one = _steering().scoped(positions).on(tokens)
    path = one.save(tmp_path / "one.safetensors")
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["trimtab"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert document["format"] == 1
    described = {key: document["interventions"][0].get(key) for key in ("positions", "tokens")}
    assert described == {"positions": positions, "tokens": None if tokens == "all" else tokens}
    assert tt.Steering.load(path).scopes == one.scopes
    # The same said in the new words is the same scope, and the other way round.
    for each in document["interventions"]:
        each["scope"] = str(one.scopes[0])
        del each["positions"]
        each.pop("tokens", None)
    save_file(tensors, tmp_path / "two.safetensors", {"trimtab": json.dumps(document)})
    two = tt.Steering.load(tmp_path / "two.safetensors")
    assert (two.scopes, two.digest) == (one.scopes, one.digest)


def test_a_file_has_one_of_both_and_a_scope_that_can_be_read(tmp_path: Path) -> None:
    path = _steering().save(tmp_path / "one.safetensors")
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["trimtab"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for changed, says in (
        ({"scope": "all"}, "one of positions and scope"),
        ({"scope": "all &", "positions": None}, "something is missing after '&'"),
        ({"scope": "generated & prompt", "positions": None}, "never acts"),
    ):
        first = {**document["interventions"][0], **changed}
        bad = {**document, "interventions": [first, *document["interventions"][1:]]}
        save_file(tensors, tmp_path / "bad.safetensors", {"trimtab": json.dumps(bad)})
        with pytest.raises(tt.TrimtabError, match=says) as caught:
            tt.Steering.load(tmp_path / "bad.safetensors")
        assert "layers.1.resid" in one_line(caught)


def test_several_scopes_in_one_steering() -> None:
    first, second = _steering().interventions
    mixed = replace(
        _steering(),
        interventions=(first, replace(second, scope=Scope.parse("user"))),
    )
    assert list(map(str, mixed.scopes)) == ["all", "user"]
    assert describe(mixed)["scope"] is None
    assert list(map(str, mixed.on("text").scopes)) == ["text", "user & text"]
    assert list(map(str, mixed.on("text").on("all").scopes)) == ["all", "user"]
    assert mixed.scoped("all").digest == _steering().digest


@pytest.mark.parametrize("scope", ["prompt", "generated[:3]", "all ~ 0.5", "token(3)"])
def test_only_what_acts_everywhere_bakes(scope: str) -> None:
    lm = language_model("llama")
    one = _steering()
    refused_in_one_line(lambda: tt.bake(lm, one.scoped(scope)), "cannot bake test: it acts on")
    everywhere = tt.bake(lm, one.scoped("prompt | generated"))
    expected = lm.logits(["Today I feel"], steering=one)
    assert torch.allclose(everywhere.logits(["Today I feel"]), expected, atol=1e-4)


def test_methods_take_any_scope() -> None:
    method = tt.CAA(layer=1, positions="generated[:32]")
    refused_in_one_line(
        lambda: tt.CAA(positions="generated &"), "caa: positions is 'generated &': scope"
    )
    lm = language_model("llama")
    pairs = tt.Contrast.from_pairs([("I am", " good", " bad"), ("You are", " fine", " ill")])
    one = method.fit(lm, pairs, measure=False)
    assert list(map(str, one.scopes)) == ["generated[:32]"]
    assert one.hyperparameters["positions"] == "generated[:32]"
    measured = method.fit(lm, pairs)
    # As if the prompt's last token were one of those that it acts on.
    same = tt.CAA(layer=1, positions="last").fit(lm, pairs)
    assert measured.dial == same.dial
