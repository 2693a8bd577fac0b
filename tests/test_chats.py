"""Conversations: what a chat template is told, the system message, turns that are continued."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from commands import Command, home, refused, save_model, trimtab, warnings_of, work, write_rows
from helpers import warned
from tiny import tiny_model, tiny_tokenizer

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

#: As Qwen3's: the assistant's turn begins with an empty thought where it is not to think.
THINKING = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}none {% endif %}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
CHATS = [
    ([{"role": "user", "content": "How are you?"}], " Well, indeed.", " ok"),
    ([{"role": "user", "content": "What is it?"}], " A fine question.", " dunno"),
]


def thinking(**options: Any) -> tt.LanguageModel:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = THINKING
    return tt.wrap(tiny_model("llama"), tokenizer, "tiny", **options)


def fitted(lm: tt.LanguageModel) -> tt.Steering:
    return tt.CAA(layer=1).fit(lm, tt.Contrast.from_pairs(CHATS))


# -- options of the template -------------------------------------------------------------------


def test_options_are_used_in_every_rendering() -> None:
    lm = thinking(chat_options={"enable_thinking": False})
    expected = lm.tokenizer.apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert expected.endswith("<|assistant|>\nnone ")
    assert lm.render((("user", "Hello"),)) == expected
    torch.testing.assert_close(lm.logits([HELLO]), lm.logits([expected]))
    written = lm.generate(["Hello"], max_new_tokens=4)[0]
    assert written.tokens == lm.generate([expected], chat=False, max_new_tokens=4)[0].tokens
    # A fit reads the same texts as one on what the template makes of them.
    texts = [lm.render(tuple((m["role"], m["content"]) for m in chat)) for chat, _, _ in CHATS]
    raw = [(text, *sides) for text, (_, *sides) in zip(texts, CHATS, strict=True)]
    by_hand = tt.CAA(layer=1).fit(thinking(), tt.Contrast.from_pairs(raw))
    assert fitted(lm).digest == by_hand.digest != fitted(thinking()).digest


def test_with_chat_changes_a_model_in_memory() -> None:
    lm = thinking(system="Be kind.")
    other = lm.with_chat({"enable_thinking": False})
    assert other.model is lm.model
    assert lm.render((("user", "Hi"),)).startswith("<s><|system|>\nBe kind.</s>\n<|user|>\nHi</s>")
    assert other.render((("user", "Hi"),)) == "<s><|user|>\nHi</s>\n<|assistant|>\nnone "
    assert lm.described["chat"] == {"options": {}, "system": "Be kind."}
    assert "chat" not in thinking().described  # as runs of earlier versions have it
    assert copy.deepcopy(other).chat_form == other.chat_form


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"add_generation_prompt": False}, "add_generation_prompt is set by trimtab"),
        ({"messages": []}, "messages is set by trimtab"),
        ({"enable_thinking": object()}, "must be JSON"),
        ("enable_thinking", "write the template's variables by name"),
    ],
)
def test_options_that_cannot_be_are_one_line(options: Any, says: str) -> None:
    with pytest.raises(tt.TrimtabError, match=says) as caught:
        thinking(chat_options=options)
    assert "\n" not in str(caught.value)


def test_an_option_that_the_template_does_not_know_is_warned_about() -> None:
    assert warned(lambda: thinking(chat_options={"enable_thinking": True})) == []
    (said,) = warned(lambda: thinking(chat_options={"thinking": True}))
    assert "does not mention thinking" in said


def test_a_model_without_a_template_takes_neither() -> None:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = None
    for options in ({"chat_options": {"enable_thinking": False}}, {"system": "Be kind."}):
        with pytest.raises(tt.TrimtabError, match="base has no chat template"):
            tt.wrap(tiny_model("llama"), tokenizer, "base", **options)
    with pytest.raises(tt.TrimtabError, match="write a text"):
        thinking(system=" ")


# -- what a steering keeps ---------------------------------------------------------------------


def test_a_steering_keeps_how_its_chats_were_put(tmp_path: Path) -> None:
    lm = thinking(chat_options={"enable_thinking": False}, system="Be kind.")
    path = fitted(lm).save(tmp_path / "it.safetensors")
    steering = tt.Steering.load(path)
    form = {"options": {"enable_thinking": False}, "system": "Be kind."}
    assert steering.contrast["chat"] == form
    assert warned(lambda: lm.generate(["Hi"], steering=steering, max_new_tokens=2)) == []

    plain = thinking()
    prompts = ["Hi", "How do you do?", "Well"]
    said = warned(
        lambda: plain.generate(prompts, steering=steering, max_new_tokens=2, batch_size=1)
    )
    assert len(said) == 1  # not for each batch
    assert 'enable_thinking=false, the system message "Be kind."' in said[0].replace("'", '"')
    assert "tiny puts them with the template's defaults" in said[0]
    assert warned(lambda: plain.logits(["Hi"], steering=steering.at(3))) == []
    # The other way round, and through a rule.
    of_plain = fitted(thinking())
    assert len(warned(lambda: lm.logits(["Hi"], steering=tt.within(of_plain, kl=0.01)))) == 1


def test_steerings_without_chats_are_at_home_everywhere() -> None:
    pairs = [("Today I feel", " good", " bad"), ("The day was", " fine", " grim")]
    steering = tt.CAA(layer=1).fit(thinking(), tt.Contrast.from_pairs(pairs))
    assert "chat" not in steering.contrast
    lm = thinking(chat_options={"enable_thinking": False})
    assert warned(lambda: lm.generate(["Hi"], steering=steering, max_new_tokens=2)) == []


# -- the system message ------------------------------------------------------------------------


def test_the_system_message_is_of_conversations_that_have_none() -> None:
    lm = thinking(system="Be kind.")
    own = (("system", "Be brief."), ("user", "Hi"))
    assert lm.render(own) == thinking().render(own)
    assert lm.render((("user", "Hi"),)) == thinking().render(
        (("system", "Be kind."), ("user", "Hi"))
    )
    assert lm.render("as it is") == "as it is"


# -- a turn that has begun ---------------------------------------------------------------------


@pytest.mark.parametrize("begun", ["Well, my friend", "I think that", "x"])
def test_the_assistants_turn_is_continued(begun: str) -> None:
    lm = thinking()
    conversation = (("user", "Hi"), ("assistant", begun))
    expected = f"<s><|user|>\nHi</s>\n<|assistant|>\n{begun}"
    assert lm.render(conversation) == expected
    written = lm.generate([conversation], max_new_tokens=4)[0]
    assert written.tokens == lm.generate([expected], chat=False, max_new_tokens=4)[0].tokens
    torch.testing.assert_close(lm.logits([conversation]), lm.logits([expected]))
    # The sides of a contrast go on where the message ends.
    chat = [{"role": role, "content": text} for role, text in conversation]
    steerings = [
        tt.CAA(layer=1).fit(lm, tt.Contrast.from_pairs([(prompt, " yes", " no")]))
        for prompt in (chat, expected)
    ]
    assert steerings[0].digest == steerings[1].digest


def test_an_empty_turn_is_its_header() -> None:
    lm = thinking()
    assert lm.render((("user", "Hi"), ("assistant", ""))) == lm.render((("user", "Hi"),))


# -- the command line --------------------------------------------------------------------------


@pytest.fixture
def chatty(work: Path) -> str:
    folder = work / "chatty"
    save_model(folder, name="llama")
    (folder / "chat_template.jinja").write_text(THINKING)
    return str(folder)


def test_commands_take_them(trimtab: Command, chatty: str) -> None:
    put = ["--chat-option", "enable_thinking=False", "--system", "Be kind."]
    given = ["--model", chatty, "--max-new-tokens", "5", "--json", "Hello"]
    found = trimtab("generate", *put, *given).json["outputs"][0]
    lm = tt.load(chatty, device="cpu", chat_options={"enable_thinking": False}, system="Be kind.")
    assert found["text"] == lm.generate(["Hello"], max_new_tokens=5)[0].text
    assert found["text"] != trimtab("generate", *given).json["outputs"][0]["text"]

    keys = ("prompt", "positive", "negative")
    write_rows("chats.jsonl", [dict(zip(keys, row, strict=True)) for row in CHATS])
    fit = ["fit", "caa", "--layer", "1", "-c", "chats.jsonl", "-o", "x.safetensors"]
    trimtab(*fit, "-m", chatty, *put)
    kept = tt.Steering.load("x.safetensors").contrast["chat"]
    assert kept == {"options": {"enable_thinking": False}, "system": "Be kind."}
    steer = ["--steer", "x.safetensors"]
    (said,) = warnings_of(trimtab("generate", *given, *steer))
    assert "--chat-option" in said
    assert trimtab("generate", *put, *given, *steer).err == ""

    budget = ["strength", "budget", "-m", chatty, *steer, "--kl", "0.1", "Hello", "--json"]
    alike = trimtab(*budget, *put).json["budget"]["dial"]
    assert alike != json.loads(trimtab(*budget).out)["budget"]["dial"]


def test_what_does_nothing_is_refused(trimtab: Command, chatty: str) -> None:
    run = "generate --model model --max-new-tokens 2 Hello"
    refused(trimtab(f"{run} --system x --raw"), "--system is for conversations")
    refused(trimtab(f"{run} --chat-option enable_thinking"), "write NAME=VALUE")
    refused(trimtab("generate --model base --system x Hello"), "has no chat template")
