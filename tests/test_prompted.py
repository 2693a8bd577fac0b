"""Words before prompts go where a steering goes: same rows, same decoding, same judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import language_model, steer_at
from test_compare import rows
from tiny import tiny_model, tiny_tokenizer
from trimtab.evaluation import Prompted, together_with
from trimtab.reading import cross_entropy, plain_texts
from trimtab.strength import Continuations, neutral
from trimtab.sweeps import TaskRows

#: Chat templates: one that writes system messages, one that refuses them, one that leaves them out.
ROLES = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant> "
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + ROLES
FORGETS = ROLES.replace("in messages %}", "in messages if m.role != 'system' %}")
CHAT = (("user", "What is on the map?"),)
ASK = Prompted("Please be kind.")


def chatting(template: str | None, **options: Any) -> tt.LanguageModel:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    lm = tt.wrap(tiny_model("llama"), tokenizer, "llama", **options)
    lm.model.generation_config.eos_token_id = None
    return lm


def put(template: str | None, prompted: Prompted, prompt: Any, **options: Any) -> Any:
    (found,) = prompted.put(chatting(template, **options), [prompt])
    return found


def test_a_system_message_where_the_template_has_one() -> None:
    asked = (("system", "Please be kind."), *CHAT)
    assert put(ROLES, ASK, CHAT) == asked
    own = (("system", "You know maps."), *CHAT)
    assert put(ROLES, ASK, own) == (("system", "You know maps.\n\nPlease be kind."), *CHAT)
    held = put(ROLES, ASK, CHAT, system="You know maps.")
    assert held == (("system", "You know maps.\n\nPlease be kind."), *CHAT)


@pytest.mark.parametrize("template", [REFUSES, FORGETS])
def test_else_before_what_the_user_says(template: str) -> None:
    assert put(template, ASK, CHAT) == (("user", "Please be kind.\n\nWhat is on the map?"),)


def test_text_as_it_is_has_the_words_before_it() -> None:
    for template in (ROLES, None):
        assert put(template, ASK, "On the map") == "Please be kind.\n\nOn the map"
    bos = tiny_tokenizer().bos_token
    assert put(None, ASK, f"{bos}On the map") == f"{bos}Please be kind.\n\nOn the map"


def test_examples_are_turns_or_text() -> None:
    shown = Prompted("Be kind.", (("Hello,", " dear."), ((("user", "Who?"),), " A friend.")))
    assert put(ROLES, shown, CHAT) == (
        ("system", "Be kind."), ("user", "Hello,"), ("assistant", "dear."), ("user", "Who?"),
        ("assistant", "A friend."), *CHAT,
    )  # fmt: skip
    assert put(None, shown, "So") == "Be kind.\n\nHello, dear.\n\nWho?\n A friend.\n\nSo"


def test_no_words_are_the_unsteered_model_to_the_bit() -> None:
    lm, contrast = language_model("llama"), tt.Contrast.builtin("warmth")
    found = tt.evaluate(lm, contrast, steering={"nothing": Prompted()}, limit=6)
    before, after = (
        [record["values"] for record in found.records if record["steering"] == name]
        for name in (None, "nothing")
    )
    assert before == after
    assert all(one.difference == 0 and one.wrong == 0 for one in found.comparisons)


def by_hand(lm: tt.LanguageModel, before: str, pair: Any) -> float:
    """Log-odds of a pair with words pasted before it, by a plain forward of transformers."""
    tokenizer, model = lm.tokenizer, lm.model
    template = isinstance(pair.prompt, tuple)
    start = before + pair.prompt if not template else ""
    if template:
        messages = [{"role": "system", "content": before}]
        messages += [{"role": role, "content": said} for role, said in pair.prompt]
        start = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    odds = 0.0
    for sign, side in ((1, pair.positive), (-1, pair.negative)):
        whole = tokenizer(start + side, add_special_tokens=not template)["input_ids"]
        first = len(tokenizer(start, add_special_tokens=not template)["input_ids"])
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        odds += sign * sum(float(log_p[i - 1, whole[i]]) for i in range(first, len(whole)))
    return odds


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_asked_is_what_one_pastes_by_hand(chat: bool) -> None:
    lm = chatting(ROLES)
    given = [(row["prompt"], row["positive"], row["negative"]) for row in rows("test", 0, 4)]
    if chat:
        given = [([{"role": "user", "content": p}], a, b) for p, a, b in given]
    contrast = tt.Contrast.from_pairs(given)
    found = tt.evaluate(lm, contrast, steering={"ask": ASK}, part="train", split=None)
    asked = [r["values"]["log_odds"] for r in found.records if r["steering"] == "ask"]
    before = ASK.text if chat else ASK.text + "\n\n"
    assert asked == pytest.approx([by_hand(lm, before, p) for p in contrast.pairs], abs=1e-3)
    plain = [r["prompt"] for r in found.records if r["steering"] == "ask"]
    assert plain == [r["prompt"] for r in found.records if r["steering"] is None]


def test_a_task_whose_answers_are_written(tmp_path: Path) -> None:
    path = tmp_path / "ask.jsonl"
    path.write_text('{"prompt": "What is on the map?"}\n{"prompt": "Who is the king?"}\n')
    lm = chatting(None)
    found = tt.evaluate(
        lm, f"coherence:{path}", steering={"ask": ASK}, max_new_tokens=5, batch_size=1
    )
    for record in (r for r in found.records if r["steering"] == "ask"):
        ((_, question),) = [tuple(message) for message in record["prompt"]]
        ids = lm.tokenizer(f"Please be kind.\n\n{question}\n", return_tensors="pt")["input_ids"]
        written = lm.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert record["output"] == lm.tokenizer.decode(written, skip_special_tokens=True)


def test_words_beside_a_steering_are_both(tmp_path: Path) -> None:
    lm = language_model("llama")
    pairs = [(row["prompt"], row["positive"], row["negative"]) for row in rows("test", 0, 4)]
    contrast = tt.Contrast.from_pairs(pairs)
    steering = tt.CAA(layer=1).fit(lm, contrast)
    both = Prompted("Please be kind.", steering=steering)
    found = tt.evaluate(lm, contrast, steering={"both": both}, part="train", split=None)
    asked = [(f"Please be kind.\n\n{p}", a, b) for p, a, b in pairs]
    pasted = tt.log_odds(lm, tt.Contrast.from_pairs(asked), steering)
    values = [r["values"]["log_odds"] for r in found.records if r["steering"] == "both"]
    assert values == pytest.approx(pasted.tolist(), abs=1e-4)


def test_plain_text_behind_words_is_scored_alone(tmp_path: Path) -> None:
    lm = language_model("llama")
    bench = TaskRows(lm, tt.Contrast.builtin("warmth"), limit=4)
    before, tokens = cross_entropy(lm, plain_texts())
    total = 0.0
    for text, count in zip(plain_texts(), tokens.tolist(), strict=True):
        (words,), (own,) = lm.encode(["Please be kind.\n\n"]), lm.encode([text])
        ids = [*words, *own[1:]] if own[0] == lm.bos else [*words, *own]
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(len(ids) - count, len(ids))
        total -= sum(float(log_p[i - 1, ids[i]]) for i in places)
    expected = (total - float((before * tokens).sum())) / float(tokens.sum())
    assert bench.plain.cost(ASK) == pytest.approx(expected, abs=1e-4)
    assert bench.plain.cost(Prompted()) == 0.0


# -- KL per generated token ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def continued() -> Continuations:
    lm = language_model("llama")
    return Continuations(lm, neutral(lm, chat=False)[:4], new_tokens=6)


def test_no_words_change_nothing(continued: Continuations) -> None:
    for nothing in (None, Prompted(), Prompted("")):
        found = continued.kl(nothing)
        assert (found.mean, found.worst5, found.tokens) == (0.0, 0.0, 24)


def test_kl_is_that_of_a_plain_loop(continued: Continuations) -> None:
    lm, every = continued.language_model, []
    for prompt, new in continued.texts:
        logs = []
        for text in (prompt, f"Please be kind.\n\n{prompt}"):
            (ids,) = lm.encode([text])
            with torch.no_grad():
                logits = lm.model(torch.tensor([[*ids, *new]])).logits[0]
            logs.append(logits[len(ids) - 1 : -1].double().log_softmax(-1))
        every.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    found = continued.kl(ASK)
    assert found.mean == pytest.approx(float(torch.cat(every).mean()), rel=1e-4)
    assert found.worst5 == pytest.approx(float(torch.cat(every).quantile(0.95)), rel=1e-4)


def test_what_is_kept_of_one_steering_shows_in_no_other(continued: Continuations) -> None:
    """Blocks below a steering run once; a fresh one, which kept nothing, finds the same."""
    lm = continued.language_model
    for layer, site in ((2, "resid"), (0, "ffn_out"), (1, "resid"), (2, "heads"), (2, "resid")):
        operator = "Scale" if site == "heads" else "Add"
        attached = steer_at(lm, site, operator, layer=layer)
        for one in (attached, attached.at(0.5), together_with(ASK, attached)):
            alone = Continuations(lm, neutral(lm, chat=False)[:4], new_tokens=6).kl(one)
            assert continued.kl(one).mean == pytest.approx(alone.mean, rel=1e-6)
            assert alone.mean > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_dial_is_found_that_changes_as_much(continued: Continuations, sign: int) -> None:
    lm = continued.language_model
    pairs = [(row["prompt"], row["positive"], row["negative"]) for row in rows("test", 0, 4)]
    steering = tt.CAA(layer=1, alpha=sign).fit(lm, tt.Contrast.from_pairs(pairs))
    turned, kl = continued.at_kl(steering, 0.05)
    assert kl.mean == pytest.approx(0.05, rel=0.01)
    assert continued.kl(turned).mean == kl.mean
    assert turned.setting * sign > 0


def test_what_no_dial_changes_is_refused(continued: Continuations) -> None:
    lm = continued.language_model
    pairs = [(row["prompt"], row["positive"], row["negative"]) for row in rows("test", 0, 4)]
    with pytest.raises(tt.TrimtabError, match="no dial changes nothing"):
        continued.at_kl(tt.SAS(theta=30).fit(lm, tt.Contrast.from_pairs(pairs)), 0.05)


def test_builtin_contrasts_say_what_they_are_about() -> None:
    from trimtab.contrasts import builtins

    for name in builtins():
        contrast = tt.Contrast.builtin(name)
        assert contrast.behaviour
        assert contrast.opposite
        assert contrast.part("test").behaviour == contrast.behaviour
        assert not contrast.behaviour.endswith(".")
