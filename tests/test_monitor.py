"""Monitors: projections by a plain loop, which tokens are an answer, thresholds, kinds of chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, refused_in_one_line
from method_settings import PAIRED
from test_gate_fit import planted
from trimtab.contrasts import Contrast
from trimtab.fitting import rare_threshold

CHAT = [
    {"role": "user", "content": "How was the ship"},
    {"role": "assistant", "content": "The captain sang"},
    {"role": "user", "content": "And the map?"},
    {"role": "assistant", "content": "She looked at it and was happy."},
]
SHORT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def lm() -> Any:
    return language_model("llama")


@pytest.fixture(scope="module")
def caa(lm: Any) -> Any:
    return tt.CAA(layer=1).fit(lm, PAIRED)


def along(lm: Any, vector: Tensor, ids: Any) -> list[float]:
    """What each token of a text, read alone, is along a vector of length 1 after block 1."""
    with torch.no_grad():
        seen = lm.model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    unit = vector.double() / vector.double().norm()
    return (seen[2][0].double() @ unit).tolist()


def by_hand(lm: Any, vector: Tensor, messages: Any, turn: int) -> tuple[float, list[float]]:
    """At the prompt's last token, and at those of the answer, of one turn of a chat."""
    place = 2 * turn + 1
    prompt = lm.tokenizer.apply_chat_template(
        messages[:place], tokenize=False, add_generation_prompt=True
    )
    answer = messages[place]["content"] if place < len(messages) else ""
    start, ids = (
        lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt, prompt + answer)
    )
    assert ids[: len(start)] == start
    found = along(lm, vector, ids)
    return found[len(start) - 1], found[len(start) :]


def test_projections_are_those_of_a_plain_loop_and_answers_have_no_markers(
    lm: Any, caa: Any
) -> None:
    found = tt.monitor(lm, caa, [CHAT, SHORT])
    vector = caa.interventions[0].operator.added
    assert [(turn.chat, turn.number) for turn in found.turns] == [(0, 0), (0, 1), (1, 0)]
    for turn, (messages, number) in zip(
        found.turns, ((CHAT, 0), (CHAT, 1), (SHORT, 0)), strict=True
    ):
        prompt, tokens = by_hand(lm, vector, messages, number)
        assert turn.text.strip() == messages[2 * number + 1]["content"]
        assert turn.prompt == pytest.approx(prompt, abs=1e-4)
        assert turn.projections == pytest.approx(tokens, abs=1e-4)
        assert turn.mean == pytest.approx(sum(tokens) / len(tokens), abs=1e-4)


def test_neighbours_and_batches_change_nothing(
    lm: Any, caa: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = tt.monitor(lm, caa, [CHAT, SHORT, "The ship was happy."]).turns
    monkeypatch.setattr("trimtab.model.language_model.BATCH_TOKENS", 1)
    alone = tt.monitor(lm, caa, [CHAT, SHORT, "The ship was happy."]).turns
    for one, other in zip(together, alone, strict=True):
        assert one.ids == other.ids
        assert one.projections == pytest.approx(other.projections, abs=1e-4)
        assert one.prompt == (
            None if other.prompt is None else pytest.approx(other.prompt, abs=1e-4)
        )


def test_cut_chats_empty_answers_texts_and_completions(lm: Any, caa: Any) -> None:
    vector = caa.interventions[0].operator.added
    empty = [*CHAT[:1], {"role": "assistant", "content": ""}]
    done = lm.generate(["Hi"], max_new_tokens=2)
    done = [tt.Completion(done[0].prompt, "yes", ())]
    found = tt.monitor(
        lm, caa, [CHAT[:3], empty, "The ship was", tt.Answered("It is", " so"), *done]
    )
    cut, nothing, text, answered, completed = (
        [turn for turn in found.turns if turn.chat == chat] for chat in range(5)
    )
    assert [turn.mean is None for turn in cut] == [False, True]
    assert cut[1].prompt == pytest.approx(by_hand(lm, vector, CHAT[:3], 1)[0], abs=1e-4)
    assert [turn.mean for turn in nothing] == [None]
    assert nothing[0].prompt == pytest.approx(cut[0].prompt, abs=1e-4)
    ids = lm.tokenizer("The ship was")["input_ids"]
    assert text[0].prompt is None
    assert text[0].projections == pytest.approx(along(lm, vector, ids)[1:], abs=1e-4)
    start, ids = (lm.tokenizer(text)["input_ids"] for text in ("It is", "It is so"))
    assert answered[0].ids == tuple(ids[len(start) :])
    (short,) = tt.monitor(lm, caa, [SHORT]).turns
    assert completed[0].projections == pytest.approx(short.projections, abs=1e-4)
    assert "alarm" not in found.summary


def test_a_template_that_forgets_is_read_turn_by_turn(caa: Any) -> None:
    """As those that drop earlier thoughts: each answer is read after the prompt it was given to."""
    other = language_model("llama")
    template = other.tokenizer.chat_template
    try:
        other.tokenizer.chat_template = (
            "{% for m in messages[-2:] %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        found = tt.monitor(other, caa, [CHAT]).turns
        vector = caa.interventions[0].operator.added
        for number, turn in enumerate(found):
            prompt, tokens = by_hand(other, vector, CHAT, number)
            assert turn.projections == pytest.approx(tokens, abs=1e-4)
            assert turn.prompt == pytest.approx(prompt, abs=1e-4)
    finally:
        other.tokenizer.chat_template = template


def test_the_threshold_is_the_lowest_that_few_are_above() -> None:
    scores = torch.randn(57, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.0, 0.01, 0.1, 0.29, 0.5):
        found = rare_threshold(scores, share)
        fits = [
            float(t)
            for t in scores
            if sum(float(s) > float(t) for s in scores) <= share * 57 + 1e-9
        ]
        assert found == min(fits)
    assert rare_threshold(torch.arange(100.0), 0.29) == 70.0
    refused_in_one_line(lambda: rare_threshold(scores, 1.0), "rate of false alarms")


def test_a_monitor_counts_hits_and_false_alarms_on_test_turns(lm: Any, tmp_path: Path) -> None:
    contrast = planted().with_parts()
    steering = tt.Probe(layer=1, read="lda").fit(lm, contrast)
    watch = tt.fit_monitor(lm, steering, contrast, false_alarms=0.2)
    reader = steering.condition().direction
    values: dict[str, dict[str, list[float]]] = {}
    for part in ("train", "validation", "test"):
        sides: dict[str, list[float]] = {"positive": [], "negative": []}
        for row in contrast.part(part).texts:  # type: ignore[arg-type]
            found = along(lm, reader, lm.tokenizer(row.text)["input_ids"])[1:]
            sides[row.label].append(sum(found) / len(found))
        values[part] = sides
    usual, limit = torch.tensor(values["train"]["negative"]), watch.condition.threshold
    assert watch.baseline.mean == pytest.approx(float(usual.mean()), abs=1e-4)
    assert watch.baseline.sd == pytest.approx(float(usual.std(correction=0)), abs=1e-4)
    assert watch.baseline.n == len(usual)
    negative = values["validation"]["negative"]
    assert limit == pytest.approx(sorted(negative)[::-1][int(0.2 * len(negative))], abs=1e-4)
    for side, own in values["test"].items():
        said = watch.findings["test"][side]
        fired = [value > limit + (1e-4 if value < limit else -1e-4) for value in own]
        assert said["fired"] == pytest.approx(sum(fired) / len(fired))
        assert (said["n"], said["ci95"][0] <= said["fired"] <= said["ci95"][1]) == (len(own), True)
    assert watch.findings["test"]["positive"]["fired"] > 0.5
    watch.save(tmp_path / "watch.safetensors")
    again = tt.Monitor.load(tmp_path / "watch.safetensors")
    assert again.as_json() == watch.as_json()
    texts = [row.text for row in contrast.part("test").texts]
    seen, other = (tt.monitor(lm, one, texts) for one in (watch, again))
    assert seen.as_json() == other.as_json()
    right = [row.label == "positive" for row in contrast.part("test").texts]
    assert sum(map(seen.alarms, seen.turns)) == len(seen.alarming)
    agree = sum(seen.alarms(turn) == is_it for turn, is_it in zip(seen.turns, right, strict=True))
    assert agree > 0.7 * len(right)
    assert seen.score(seen.turns[0]) == pytest.approx(
        (seen.turns[0].mean - watch.baseline.mean) / watch.baseline.sd  # type: ignore[operator]
    )


def test_a_monitor_of_prompts_is_a_gate_that_decides_before_the_answer(lm: Any) -> None:
    contrast = planted(last=True)
    steering = tt.Probe(layer=1).fit(lm, contrast.with_parts())
    watch = tt.fit_monitor(lm, steering, contrast, at="prompt", threshold="f1")
    texts = [row.text for row in contrast.with_parts().part("test").texts]
    found = tt.monitor(lm, watch, [tt.Answered(text, "") for text in texts])
    acting = tt.CAA(layer=1, positions="generated").fit(lm, PAIRED).gated(watch.gate)
    written = lm.generate(texts, chat=False, steering=acting, max_new_tokens=2)
    assert [found.alarms(turn) for turn in found.turns] == [each.gates[0].fired for each in written]
    assert len({found.alarms(turn) for turn in found.turns}) == 2


def test_an_alarm_below_and_a_baseline_of_plain_texts(lm: Any) -> None:
    contrast = planted().with_parts()
    turned = Contrast(
        tuple(
            type(row)(row.text, "negative" if row.label == "positive" else "positive", row.part)
            for row in contrast.texts
        ),
        "turned",
    )
    steering = tt.Probe(layer=1).fit(lm, contrast)
    above = tt.fit_monitor(lm, steering, contrast, threshold="f1")
    below = tt.fit_monitor(
        lm, steering, turned, threshold="f1", fires="below", baseline=["The day was", "The map"]
    )
    assert below.baseline.n == 2
    assert above.findings["test"]["auroc"] == pytest.approx(below.findings["test"]["auroc"])
    assert below.findings["test"]["f1"] > 0.6
    assert below.alarms(below.condition.threshold - 1)
    assert not below.alarms(None)
    with pytest.warns(tt.TrimtabWarning, match="let it fire above"):
        tt.fit_monitor(lm, steering, contrast, fires="below")


def test_pictures_and_tables(lm: Any, caa: Any) -> None:
    watch = tt.fit_monitor(
        lm, tt.Probe(layer=1).fit(lm, planted().with_parts()), planted(), false_alarms=0.2
    )
    found = tt.monitor(lm, watch, [CHAT, CHAT[:3], "please"])
    axes = found.plot()
    assert axes.get_ylabel() == "answer's mean"
    assert len(found.tables()[0].rows) == 5
    assert "alarms" in found.summary
    assert "chat,turn" in found.to_csv()


def test_mistakes(lm: Any, caa: Any) -> None:
    watch = tt.fit_monitor(lm, tt.Probe(layer=1).fit(lm, planted()), planted(), false_alarms=0.2)
    gate = tt.fit_gate(lm, planted(), sites=["layers.1.resid"], chat=False)
    late = [{"role": "assistant", "content": "Hello"}, *CHAT]
    for act, says in (
        (lambda: tt.monitor(lm, caa, "text"), "must be a list"),
        (lambda: tt.monitor(lm, caa, []), "no chat to read"),
        (lambda: tt.monitor(lm, "caa.st", [CHAT]), "neither a monitor nor a steering"),  # type: ignore[arg-type]
        (lambda: tt.monitor(lm, caa, [CHAT, late]), "chat 2 begins with the assistant"),
        (lambda: tt.monitor(lm, caa, [[{"role": "user"}]]), "chat 1: a message must be"),
        (lambda: tt.monitor(lm, caa, ["ship " * 5000]), "chat 1 has"),
        (lambda: tt.monitor(lm, watch, [CHAT], site="layers.1.resid"), "has its site"),
        (lambda: tt.monitor(lm, caa, [CHAT], site="layers.0.resid"), "no direction at"),
        (lambda: tt.monitor(language_model("qwen2"), watch, [CHAT]), "made for"),
        (lambda: tt.Monitor.of_gate(gate), "is a gate and no monitor"),
        (lambda: tt.Monitor.of_gate(~watch.gate), "is a gate and no monitor"),
        (lambda: tt.fit_monitor(lm, caa, PAIRED, at="prompt"), "share their prompt"),
        (lambda: tt.fit_monitor(lm, caa, planted(), at="end"), "known are"),  # type: ignore[arg-type]
        (lambda: tt.fit_monitor(lm, caa, planted(), false_alarms=-1), "rate of false alarms"),
        (lambda: tt.fit_monitor(lm, caa, planted().take(3)), "too few texts"),
    ):
        refused_in_one_line(act, says)
