"""Receipts: side effects on tasks that have nothing to do with what is steered to, thinking that is
no answer, and rows that moved the wrong way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import language_model, write_pairs
from tiny import tiny_model, tiny_tokenizer
from trimtab.evaluation import LocalChat, Prompted, drifting
from trimtab.evaluation.metrics.coherence import repetition
from trimtab.evaluation.metrics.language import language_of, same_language
from trimtab.evaluation.tasks import TASKS
from trimtab.figures import paired_difference
from trimtab.model import Completion, answer_of, without_thoughts
from trimtab.reading import cross_entropy, neutral_prompts, plain_texts

QUESTION = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "id": "sums-0"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, file, some in (
        ("mmlu", "test", [{**QUESTION, "id": f"sums-{i}"} for i in range(12)]),
        ("gsm8k", "test", [{"id": i, "question": "1 + 1?", "answer": "#### 2"} for i in range(5)]),
    ):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / name / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_the_battery_and_what_is_missing_of_it(data: Path) -> None:
    lm = language_model("llama")
    found = tt.evaluate(
        lm, [], steering={"nothing": Prompted()}, receipts=True, receipts_limit=3,
        data=str(data), max_new_tokens=4,
    )  # fmt: skip
    tasks = list(dict.fromkeys(result.task for result in found.results))
    assert tasks == ["mmlu", "gsm8k", "writing", "plain text"]
    assert len([note for note in found.notes if "xstest/xstest_v2.jsonl" in note]) == 1
    # Rows are spread over the file, not its first ones.
    asked = {r["id"] for r in found.records if r["task"] == "mmlu"}
    assert asked == {"sums-0", "sums-4", "sums-8"}
    # A model against itself: nothing is gained, lost or moved.
    assert found.comparisons
    for one in found.comparisons:
        assert (one.difference, one.wrong) == (0.0, 0)
    nll, tokens = cross_entropy(lm, plain_texts()[:3])
    plain = found.value("plain text", "cross_entropy")
    assert plain.value == pytest.approx(float((nll * tokens).sum() / tokens.sum()), abs=1e-5)


def test_words_before_plain_text_are_a_receipt_too(data: Path) -> None:
    lm = language_model("llama")
    asks = {"ask": Prompted("Please be kind.")}
    found = tt.evaluate(lm, "mmlu", steering=asks, receipts=True, receipts_limit=2,
                        data=str(data), max_new_tokens=4, limit=4)  # fmt: skip
    assert found.value("mmlu", "accuracy", "ask").n == 4  # asked for by itself
    one = next(c for c in found.comparisons if c.task == "plain text")
    assert one.difference != 0


def test_mmlu_and_gsm8k_are_read_as_people_read_them() -> None:
    mmlu, gsm8k = TASKS["mmlu"], TASKS["gsm8k"]
    example = mmlu.example(QUESTION, 0, "trimtab")
    assert example.prompt == "Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    assert mmlu.read is not None
    assert gsm8k.read is not None
    for text, right in ((" B", True), ("b", True), ("B.", True), ("A", False), ("", False)):
        assert mmlu.right(mmlu.read(text, "trimtab"), example.target) is right
    row = {"id": 1, "question": "How many?", "answer": "600 + 600 = <<600+600=1200>>\n#### 1,200"}
    target = gsm8k.example(row, 0, "trimtab").target
    assert target == 1200.0
    for text in ("So 1200.\n#### 1,200 eggs", "It is 1,200"):
        assert gsm8k.right(gsm8k.read(text, "trimtab"), target)


def test_languages_are_told_apart() -> None:
    for row in neutral_prompts():  # of short questions nothing may be clear, but never another
        assert language_of(row["prompt"]) in (None, row["language"])
    said = {
        "de": "Das Wasser ist nicht mehr so kalt, und die Kinder gehen mit dem Hund zu dem See.",
        "fr": "Le moulin est sur la colline, et les gens qui passent par le chemin le voient.",
        "en": "The mill is on the hill, and people who walk along the path can see it.",
        "ru": "Мельница стоит на холме.",
        "zh": "风车在山上，人们可以看到它。",
        "ja": "風車は丘の上にあります。",
        "ko": "풍차는 언덕 위에 있습니다.",
    }
    assert {language: language_of(text) for language, text in said.items()} == {
        language: language for language in said
    }
    assert language_of("xk qq zz 123") is None
    assert language_of("") is None
    assert same_language("en", said["en"]) == 1.0
    assert same_language("en", said["zh"]) == 0.0
    assert same_language("en", "hm") is None


def test_repeated_text_scores_high() -> None:
    assert repetition("and so it goes " * 20) > 0.9
    assert repetition("Every word of this sentence stands in it just once.") == 0.0


def test_rows_that_moved_the_wrong_way() -> None:
    changes = torch.tensor([0.5, -0.2, 0.0, 1e-9, -3.0, 0.1], dtype=torch.float64)
    more, less = (paired_difference(changes, flips=False, more=more) for more in (True, False))
    assert (more.wrong, less.wrong) == (2, 2)
    share = more.wrong_way
    assert share is not None
    assert share.value == pytest.approx(2 / 6)
    assert share.low == pytest.approx(0.0968, abs=1e-4)  # Wilson's interval of 2 of 6
    assert share.high == pytest.approx(0.7000, abs=1e-4)


# -- thinking -------------------------------------------------------------------------------------

THINKS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if begin %}<think>{% endif %}{% endif %}"
    "{% if false %}<think></think>{% endif %}"
)


def thinking_model(begin: bool = False) -> tt.LanguageModel:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    options = {"begin": True} if begin else {}
    return tt.wrap(tiny_model("llama"), tokenizer, "llama", chat_options=options)


def completion(lm: tt.LanguageModel, text: str, prompt: Any = (("user", "Go"),)) -> Completion:
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion(prompt, text, tuple(ids))


def test_what_is_thought_is_no_answer() -> None:
    lm = thinking_model()
    whole = completion(lm, "<think>sorry, I cannot</think>\n\nThe map is old.")
    said = answer_of(lm, whole)
    assert said.text == "The map is old."
    assert said.tokens == whole.tokens
    unended = answer_of(lm, completion(lm, "<think>The map is old."))
    assert unended.text == ""
    plain = completion(lm, "The map is old.")
    assert answer_of(lm, plain) is plain
    begun = thinking_model(begin=True)
    assert answer_of(begun, completion(begun, "hm</think>It is old.")).text == "It is old."


def test_what_comes_from_elsewhere_too() -> None:
    assert without_thoughts("<think>\nno</think>\n\nyes") == "yes"
    assert without_thoughts("no</think>yes") == "yes"
    assert without_thoughts("<think>no") == ""
    assert without_thoughts("Write <think>no</think> so") == "Write <think>no</think> so"
    assert without_thoughts("yes") == "yes"


def _writes(monkeypatch: pytest.MonkeyPatch, lm: tt.LanguageModel, text: str) -> None:
    """Whatever it is asked, the model writes one text."""

    def generate(self: Any, prompts: Sequence[Any], **options: Any) -> list[Completion]:
        wanted = self.prompts(prompts, options.get("chat"))
        return [completion(lm, text, prompt) for prompt in wanted]

    monkeypatch.setattr(tt.LanguageModel, "generate", generate)


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        ("refusal", "<think>I cannot help with that.</think>Here you are.", {"refusal": 0.0}),
        ("refusal", "<think>Here you are.</think>I cannot help with that.", {"refusal": 1.0}),
        (
            "coherence",
            "<think>" + "so it goes on " * 9 + "</think>The map is old.",
            {"repetition_4gram": 0.0},
        ),
    ],
)
def test_every_measure_reads_the_answer(
    kind: str, text: str, values: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ask.txt").write_text("Go\n")
    lm = thinking_model()
    _writes(monkeypatch, lm, text)
    found = tt.evaluate(lm, f"{kind}:{tmp_path / 'ask.txt'}", max_new_tokens=9)
    (record,) = found.records
    assert values.items() <= record["values"].items()
    assert record["output"] == text
    assert record["answer"] == answer_of(lm, completion(lm, text)).text


def test_numbers_languages_and_judges_read_the_answer(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = thinking_model()
    _writes(monkeypatch, lm, "<think>#### 7 or no</think>It is #### 2 and so on")
    found = tt.evaluate(lm, "gsm8k", data=str(data), limit=1, max_new_tokens=9)
    assert found.value("gsm8k").value == 1.0
    german = "Das ist nicht der See, und die Kinder sind mit dem Hund auf der Wiese."
    _writes(monkeypatch, lm, f"<think>the end of it is that they are here</think>{german}")
    (first,) = tt.evaluate(lm, "writing", limit=1, max_new_tokens=9).records
    assert first["values"]["same_language"] == 0.0
    _writes(monkeypatch, lm, "<think>no</think>yes")
    assert LocalChat(lm).ask([[{"role": "user", "content": "?"}]]) == ["yes"]


def test_records_with_answers_and_gates_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ask.txt").write_text("Go\nStay\n")
    lm = thinking_model()
    _writes(monkeypatch, lm, "<think>no</think>The map is old.")
    task, run = f"refusal:{tmp_path / 'ask.txt'}", tmp_path / "run"
    first = tt.evaluate(lm, task, output=run, max_new_tokens=9)
    again = tt.evaluate(lm, task, output=run, max_new_tokens=9)
    assert replace(again, notes=()).records == replace(first, notes=()).records


def test_what_fades_drifts_and_what_does_not_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two steerings of one direction, of which one fades over generated tokens: its KL falls
    towards the end of a long text, by its interval clearly, and that of the other does not."""
    monkeypatch.setattr(drifting, "LONG", 24)
    monkeypatch.setattr(drifting, "STRETCHES", 3)
    lm = language_model("llama")
    contrast = tt.Contrast.from_jsonl(write_pairs(tmp_path / "pairs.jsonl").partition(":")[2])
    stays = tt.CAA(layer=2, alpha=4).fit(lm, contrast)
    fades = stays.scoped("generated ~ 0.8")
    found = tt.evaluate(
        lm, contrast, steering={"stays": stays, "fades": fades}, limit=3, drift=True,
        output=tmp_path / "run",
    )  # fmt: skip
    assert found.drift is not None
    kept = json.loads((tmp_path / "run" / "results.json").read_text())["drift"]
    changes, kl = kept["kl_changes"], kept["kl"]
    assert changes["fades"]["ci95"][1] < 0
    assert changes["stays"]["ci95"][0] <= 0 <= changes["stays"]["ci95"][1]
    first, _, last = kl["fades"]
    # The dial falls by 0.8 a token, and KL goes about with its square.
    assert last["mean"] < 0.1 * first["mean"]
    assert changes["fades"]["value"] == pytest.approx(last["mean"] - first["mean"], rel=1e-6)
    assert [one["turns"] for one in kept["gains"]["stays"]] == list(drifting.TURNS)
    assert "Gain behind neutral turns" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(tt.TrimtabError, match="name a steering"):
        tt.evaluate(lm, contrast, limit=3, drift=True)
