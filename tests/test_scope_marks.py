"""What the words of a scope are in a model's tokens: turns of many chat templates, markers of any
number of tokens, thinking and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import add, language_model, one_line, refused_in_one_line, steer, warned
from tiny import tiny_tokenizer
from trimtab.model.explaining import scope_weights
from trimtab.model.marks import Marks
from trimtab.steering import Scope

#: Chat templates as models have them, in their own words.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "chatml with a system message of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thinks": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
        "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% elif loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{% if m.role == 'system' %}Today Date: 26 Jul 2024\n\n{% endif %}{{ m.content }}"
        "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
        "{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    ),
    "system in the user's turn": (
        "{{ bos_token }}{% set ns = namespace(before='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.before = m.content + '\n\n' %}{% else %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if loop.index0 < 2 and m.role == 'user' %}{{ ns.before }}{% endif %}{{ m.content }}"
        "<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "words": (
        "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    ),
}
NO_SYSTEM = ("inst", "system in the user's turn")
CHAT = [
    ("system", "Answer as a captain would."),
    ("user", "Where does the ship go?"),
    ("assistant", "It leaves the harbour."),
    ("user", "Was the wind good and the day long?"),
]


def tokenizer_with(template: str, *added: str) -> Any:
    """The tiny tokenizer with another template, and with tokens of its own for some markers."""
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    if added:
        tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def in_content(tokenizer: Any, chat: Sequence[tuple[str, str]], role: str) -> list[bool | None]:
    """Whether each token of the rendered chat is inside of what a role says, of the first role to
    the last; None where a token is in nobody's message, or on its edge."""
    messages = [{"role": name, "content": said} for name, said in chat]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found: list[bool | None] = [None] * len(made["input_ids"])
    for name, said in chat:
        start = text.index(said)
        for i, (first, last) in enumerate(made["offset_mapping"]):
            if first >= start and last <= start + len(said) and last > first:
                found[i] = name == role
    return found


def fires(marks: Marks, scope: str, ids: Sequence[int], prompt: int | None = None) -> list[bool]:
    lm = language_model("llama")
    one = steer(lm, ("layers.1.resid", add(48))).scoped(scope)
    end = len(ids) if prompt is None else prompt
    found = scope_weights(marks, one.scopes[0], ids, end)
    return [weight > 0 for weight in found]


def chat_ids(tokenizer: Any, chat: Sequence[tuple[str, str]]) -> list[int]:
    messages = [{"role": name, "content": said} for name, said in chat]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_where_the_messages_are(name: str, special: bool) -> None:
    """By where the text of each message stands, which the markers are not asked for."""
    markers = [
        "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|start_header_id|>",
        "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>",
    ]  # fmt: skip
    tokenizer = tokenizer_with(TEMPLATES[name], *(markers if special else ()))
    marks = Marks(tokenizer, name)
    chat = CHAT[1:] if name in NO_SYSTEM else CHAT
    ids = chat_ids(tokenizer, chat)
    roles = ("user", "assistant") if name in NO_SYSTEM else ("system", "user", "assistant")
    for role in roles:
        found, expected = fires(marks, role, ids), in_content(tokenizer, chat, role)
        pairs = zip(found, expected, strict=True)
        wrong = [i for i, (a, b) in enumerate(pairs) if b is not None and a is not b]
        assert not wrong, (role, [tokenizer.decode([ids[i]]) for i in wrong])
    # Of the user's turns the last one only, and what is written after them is the assistant's.
    last, every = fires(marks, "last_user", ids), in_content(tokenizer, chat[-1:], "user")
    assert sum(last) >= sum(value is True for value in every)
    assert last[: ids.index(ids[len(ids) // 2])] == [False] * ids.index(ids[len(ids) // 2])
    written = tokenizer("The day was long", add_special_tokens=False)["input_ids"]
    assert all(fires(marks, "assistant", [*ids, *written])[len(ids) - 1 :])
    # No two roles share a token.
    both = [fires(marks, role, ids) for role in roles]
    assert all(sum(row) <= 1 for row in zip(*both, strict=True))


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_a_template_without_a_turn_of_the_system_is_told(name: str) -> None:
    marks = Marks(tokenizer_with(TEMPLATES[name]), name)
    refused_in_one_line(lambda: marks.place(Scope.parse("user | system")), "no system messages, or")


def test_a_system_message_that_nobody_wrote_is_nobodys() -> None:
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    assert not any(fires(Marks(tokenizer, "x"), "system", chat_ids(tokenizer, CHAT[1:])))
    own = tokenizer_with(TEMPLATES["chatml with a system message of its own"])
    ids = chat_ids(own, CHAT[1:])
    found = fires(Marks(own, "x"), "system", ids)
    said = own.decode([token for token, fire in zip(ids, found, strict=True) if fire])
    assert "You are kind." in said
    assert "ship" not in said


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not mark where turns begin"),
        ("{{ messages[-1].content }}", "leaves messages out"),
        (
            "{% for m in messages %}<turn>{{ m.content }}</turn>{% endfor %}",
            "begin alike",
        ),
        ("{{ raise_exception('never') }}", "refuses the roles user, assistant, user: never"),
    ],
)
def test_what_cannot_tell_turns_apart_is_refused(template: str, says: str) -> None:
    marks = Marks(tokenizer_with(template), "this model")
    refused_in_one_line(lambda: marks.place(Scope.parse("user")), says)
    marks.place(Scope.parse("generated"))


# -- spans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "I <think>the map is old</think> know",
        "<think>\nthe map\n</think>\n\nknow",
        "a<think> the map </think>know",
        "<think><think>x</think></think> y",
    ],
)
def test_spans_are_where_their_text_is(text: str, special: bool) -> None:
    """Also where a marker is several tokens, which depend on what stands around them."""
    tokenizer = tokenizer_with("", *(("<think>", "</think>") if special else ()))
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = text.index("<think>") + len("<think>")
    end = text.index("</think>") + len("</think>")
    found = fires(Marks(tokenizer, "x"), 'between("<think>", "</think>")', list(made["input_ids"]))
    for fire, (first, last) in zip(found, made["offset_mapping"], strict=True):
        if first >= begin and last <= end - 1:
            assert fire
        elif last < begin or first >= end:
            assert not fire


def test_the_same_marker_on_both_sides() -> None:
    tokenizer = tokenizer_with("")
    ids = [57, 60, 58, 60, 59, 60, 61]
    found = fires(Marks(tokenizer, "x"), "between(60, 60)", ids)
    assert found == [False, True, True, False, False, True, True]


def test_thinking_and_the_answer_after_it() -> None:
    tokenizer = tokenizer_with(TEMPLATES["thinks"])
    marks, chat = Marks(tokenizer, "thinks"), CHAT[1:]
    prompt = chat_ids(tokenizer, chat)
    new = tokenizer("the map is old\n</think>\n\nYes", add_special_tokens=False)["input_ids"]
    ids = [*prompt, *new]
    thinking, answer = (fires(marks, word, ids, len(prompt)) for word in ("thinking", "answer"))
    assert thinking[len(prompt)]
    assert not any(thinking[: len(prompt) - 4])
    for i in range(len(ids)):
        assert answer[i] is (i >= len(prompt) and not thinking[i])
    said = tokenizer.decode([t for t, fire in zip(ids, answer, strict=True) if fire])
    assert "Yes" in said
    assert "map" not in said


def test_words_for_what_a_model_has_not() -> None:
    marks = Marks(tokenizer_with(TEMPLATES["chatml"]), "plain")
    for word, what in (("thinking", "marks thinking"), ("tool_call", "marks calls of tools")):
        refused_in_one_line(lambda word=word: marks.place(Scope.parse(word)), what)
    # All that such a model writes is its answer, which is said once.
    ids = chat_ids(marks.tokenizer, CHAT)
    for scope in ("answer", "generated & !thinking", "generated & (thinking | all)"):
        with pytest.warns(tt.TrimtabWarning, match="so that nothing is taken for it"):
            found = fires(marks, scope, [*ids, 57, 58], len(ids))
        assert found == [False] * len(ids) + [True] * 2
    assert not warned(lambda: marks.place(Scope.parse("answer")))
    tools = TEMPLATES["chatml"] + "{# <tool_call> </tool_call> #}"
    calls = Marks(tokenizer_with(tools), "calls")
    text = 'Yes <tool_call>{"name": 1}</tool_call> then'
    ids = calls.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = fires(calls, "tool_call", ids)
    said = calls.tokenizer.decode([t for t, fire in zip(ids, found, strict=True) if fire])
    assert "name" in said
    assert "Yes" not in said
    assert "then" not in said
    named = TEMPLATES["chatml"].replace("{{ m.content }}", (
        "{% if m.reasoning_content %}<muse>{{ m.reasoning_content }}</muse>{% endif %}"
        "{{ m.content }}"
    ))  # fmt: skip
    own = Marks(tokenizer_with(named), "muses")
    ids = own.tokenizer("<muse>the map</muse>Yes", add_special_tokens=False)["input_ids"]
    said = own.tokenizer.decode(
        [t for t, fire in zip(ids, fires(own, "thinking", ids), strict=True) if fire]
    )
    assert "the map" in said
    assert "Yes" not in said


# -- what will fire -------------------------------------------------------------------------------


def test_explain_shows_token_by_token_what_acts() -> None:
    lm = language_model("llama")
    one = steer(lm, ("layers.1.resid", add(48)), ("layers.2.resid", add(48)))
    one = one.scoped("assistant & last ~ 0.5")
    found = one.explain(lm, "Today I feel", max_new_tokens=3)
    (done,) = lm.generate(["Today I feel"], max_new_tokens=3, steering=one)
    assert found.ids[found.prompt :] == done.tokens
    assert found.fires[0].sites == ("layers.1.resid", "layers.2.resid")
    weights = found.fires[0].weights
    assert weights[: found.prompt - 1] == (0.0,) * (found.prompt - 1)
    assert weights[found.prompt - 1 :] == (1.0, 1.0, 0.5, 0.25)
    assert "are steered: 4 under 'assistant & last ~ 0.5'." in found.summary
    lines = str(found).splitlines()
    assert len(lines) == len(found.ids) + 2
    assert lines[-2].endswith("0.25")
    assert json.loads(json.dumps(found.as_json()))["fires"][0]["weights"] == list(weights)
    assert [each["generated"] for each in found.as_json()["tokens"]][-3:] == [True] * 3
    several = lm.explain([one.scoped("all"), one.scoped("prompt")], "Today", max_new_tokens=0)
    assert [each.scope for each in several.fires] == ["all", "prompt"]
    assert all(weight == 1 for each in several.fires for weight in each.weights)


def test_scopes_of_other_models_are_refused_where_they_do_not_fit() -> None:
    lm = language_model("llama")
    one = steer(lm, ("layers.1.resid", add(48)))
    for scope, says in (
        ("token(12345)", "it has no token 12345: its ids are 0 to"),
        ("between(3, 12345)", "it has no token 12345"),
        ("thinking", "neither its chat template nor its tokenizer marks thinking"),
    ):
        with pytest.raises(tt.TrimtabError, match=says) as caught:
            lm.logits(["Today I feel"], steering=one.scoped(scope))
        assert one_line(caught)
    # On a text without images nothing else is said of them.
    expected = lm.logits(["Today I feel"], steering=one.scoped("prompt"))
    found = lm.logits(["Today I feel"], steering=one.scoped("prompt & !image"))
    assert torch.equal(found, expected)


def test_scopes_that_nobody_asks_for_any_more_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of a server may think of ever new ones; those that are in use stay as they are."""
    monkeypatch.setattr("trimtab.model.marks._KEPT", 8, raising=False)
    marks = language_model("llama").marks
    used, first = marks.place(Scope.of("user")), marks.place(Scope.of(_between(0)))
    for i in range(40):
        marks.place(Scope.of(_between(i)))
        assert marks.place(Scope.of("user")) is used
        assert len(marks._known) <= 8
    assert marks.place(Scope.of(_between(0))).part == first.part


def _between(number: int) -> str:
    return f'between("<{number}>", "</{number}>")'
