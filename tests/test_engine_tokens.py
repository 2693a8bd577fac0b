"""Which tokens a scope takes, as engines work it out of ids alone: the same as attached hooks do,
however the text is cut; and what travels with a request is checked before it is used."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import trimtab as tt
from helpers import language_model
from trimtab.engines import Acts, Wanted, extra_args, weights
from trimtab.engines.asking import FIELD, block_key, wanted_by
from trimtab.model import scope_weights
from trimtab.serving.placing import acts_of
from trimtab.steering import Scope

SCOPES = (
    "all", "prompt", "generated", "last", "generated[1:4]", "generated[2:]", "prompt[-3:]",
    "prompt[:-2]", "prompt[1:4][1:]", "!prompt[:2]", "generated ~ 0.9", "all[3:] ~ 0.5", "text",
    "prompt & !last | generated[:2]", "token(5, 9, 11)", "token(5, 9)[1:3]", "user", "assistant",
    "system", "user & prompt", "last_user", "last_user[1:3]", "(user | generated)[2:6]",
    "between(7, [9, 11])", "between(7, 7)", "!between([7, 9], 11) & generated",
)  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def some_text(lm: tt.LanguageModel, seed: int) -> tuple[list[int], int]:
    """A chat with markers strewn in, and how much of it is the prompt."""
    draw = random.Random(seed)
    turns = [("system", "be kind")] if draw.random() < 0.5 else []
    for turn in range(draw.randrange(1, 4)):
        turns.append(("user", f"why {turn}"))
        turns.append(("assistant", "so"))
    (ids,) = lm.encode([tuple(turns[:-1])])
    prompt = len(ids)
    more = [draw.choice([5, 7, 9, 11, 40, 41]) for _ in range(draw.randrange(1, 12))]
    ids = [*ids[:-2], *(draw.choice([5, 7, 9, 11, i]) for i in ids[-2:]), *more]
    return [*ids, *lm.encode([(("user", "and"),)])[0][:4]], prompt


@pytest.mark.filterwarnings("ignore::trimtab.TrimtabWarning")
def test_scopes_take_the_tokens_that_hooks_take(lm: tt.LanguageModel) -> None:
    took = dict.fromkeys(SCOPES, 0)
    for seed in range(5):
        ids, prompt = some_text(lm, seed)
        for text in SCOPES:
            scope = Scope.parse(text)
            wanted = scope_weights(lm.marks, scope, ids, prompt)
            acts = acts_of(lm, scope)
            assert Acts(**json.loads(json.dumps(acts.as_json()))) == acts
            # In pieces, of which each knows no token that comes after it, but for the prompt.
            cuts = [0, 3, 4, prompt - 1, prompt, prompt + 2, len(ids)]
            found: list[float] = []
            for first, stop in pairwise(cuts):
                known = ids[: max(stop, prompt)]
                found += weights(acts, known, prompt, first, stop).tolist()
            assert found == list(wanted), (text, seed)
            took[text] += sum(found) > 0
    assert all(took.values()), took


def test_a_request_comes_as_it_was_sent(lm: tt.LanguageModel) -> None:
    scopes = tuple(acts_of(lm, Scope.parse(text)) for text in ("user & prompt", "generated ~ 0.9"))
    sent = (Wanted("ab" * 32, -3.0, scopes, (1, 0, 1)), Wanted("cd" * 32, 2.5, scopes[:1]))
    assert wanted_by(SimpleNamespace(extra_args=extra_args(sent))) == sent
    assert wanted_by(SimpleNamespace(extra_args=None)) == ()
    assert wanted_by(SimpleNamespace()) == ()
    assert extra_args(()) is None


GOOD = {
    "steering": "ab" * 32,
    "dial": 1.0,
    "scopes": [{"tree": ["all"], "decay": None}],
    "of": [],
}
WRITTEN = json.dumps([GOOD])


def tree(*parts: Any) -> dict[str, Any]:
    return {**GOOD, "scopes": [{"tree": list(parts), "decay": None}]}


@pytest.mark.parametrize(
    "bad",
    [
        "[", "7", [GOOD] * 9, [7], [{**GOOD, "more": 1}], [{**GOOD, "dial": "1"}],
        WRITTEN.replace("1.0", "NaN"), WRITTEN.replace("1.0", "1e999"), [{**GOOD, "of": [1]}],
        [{**GOOD, "of": [True]}], [{**GOOD, "scopes": GOOD["scopes"] * 2}],
        [{**GOOD, "steering": "../x"}], [{**GOOD, "scopes": []}], [{**GOOD, "scopes": ["all"]}],
        [tree()], [tree("nowhere")], [tree("all", 1)], [tree("not")], [tree("and")],
        [tree("window", ["all"], 0.5, None)], [tree("token", [])], [tree("token", [True])],
        [tree("span", [[1]], [])], [tree("turn", {"role": "user"})], "[" * 5000,
        [{**GOOD, "scopes": [{"tree": ["all"], "decay": 1.5}]}],
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_in_a_line(bad: Any) -> None:
    text = bad if isinstance(bad, str) else json.dumps(bad)
    with pytest.raises(ValueError, match="cannot be read: .") as refused:
        wanted_by(SimpleNamespace(extra_args={FIELD: text}))
    assert "\n" not in str(refused.value)


def key(scope: str, ids: list[int], prompt: int, first: int, dial: float = 1.0) -> Any:
    acts = {"all": ["all"], "generated": ["generated"], "prompt": ["prompt"]}[scope]
    return block_key((Wanted("ab" * 32, dial, (Acts(acts),)),), ids, prompt, first, first + 4)


def test_a_block_is_known_by_what_its_tokens_saw() -> None:
    ids = list(range(12))
    # Blocks of the prompt are everybody's where only what is written is steered.
    assert key("generated", ids, 8, 0) == key("generated", ids, 8, 4) == []
    assert key("prompt", ids, 8, 8) == []
    # A block that is steered is shared with those that were steered alike, and with no others.
    assert key("prompt", ids, 8, 0) == key("all", ids, 8, 0) != []
    assert key("all", ids, 8, 0) == key("all", ids, 12, 0)
    assert key("all", ids, 8, 0) != key("all", ids, 8, 0, dial=2.0)
    # What was written under a steering is another's prompt, where that prompt is not steered alike.
    assert key("generated", ids, 8, 8) != key("generated", ids, 12, 8)
    # A block in which prompt and answer meet has a key of its own.
    parted = {str(key(scope, ids, 6, 4)) for scope in ("all", "prompt", "generated")}
    assert len(parted) == 3


def test_which_of_several_scopes_acts_is_in_the_key() -> None:
    here, nowhere = Acts(["all"]), Acts(["generated"])
    keys = [
        block_key((Wanted("ab" * 32, 1.0, scopes, of),), [1] * 4, 4, 0, 4)
        for scopes, of in (
            ((here,), ()),
            ((here, nowhere), (0, 1)),
            ((here, nowhere), (1, 0)),
            ((here, Acts(["prompt"])), (0, 1)),
        )
    ]
    assert len({str(one) for one in keys}) == 4
    both = [Wanted("ab" * 32, 1.0, (here,)), Wanted("cd" * 32, 1.0, (here,))]
    assert block_key(both, [1] * 4, 4, 0, 4) != block_key(both[::-1], [1] * 4, 4, 0, 4)
    assert np.all(weights(here, [], 4, 0, 4) == 1)
