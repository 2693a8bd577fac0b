"""AxBench's table of steering: a judge that was made up gives the table that was planted, an
interrupted run goes on, and the offline judge is what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import language_model, plain_logits, token_ids
from trimtab.evaluation import ChatRater, offline_rater, overall
from trimtab.model import Completion
from trimtab.papers.steering_table import steering_table

CAA = {"name": "mean", "method": "caa", "fixed": {"layer": 1, "token": "answer"}}
METHODS = [{"name": "Prompt", "method": "prompt"}, {**CAA, "factors": [1.0, 2.0]}]
SIZES = {"train_texts": 3, "instructions": 4, "new_tokens": 5}
RUNGS = ("slightly", "as it is", "very", "extremely")

#: By method and factor, of each of four instructions the ratings: concept, instruct, fluency. The
#: first and third are those that factors are chosen on.
PLANTED: dict[str, dict[str, list[tuple[int, int, int]]]] = {
    "unsteered": {"": [(0, 2, 2), (0, 2, 2), (0, 2, 2), (1, 2, 2)]},
    "Prompt": {
        "slightly": [(1, 1, 1), (2, 2, 2), (1, 1, 1), (2, 2, 2)],
        "as it is": [(2, 2, 2), (1, 1, 2), (1, 2, 2), (0, 2, 2)],
        "very": [(2, 2, 2), (2, 2, 2), (0, 2, 2), (2, 2, 2)],
        "extremely": [(0, 0, 0)] * 4,
    },
    "mean": {
        "1": [(1, 1, 1), (0, 1, 1), (1, 1, 1), (1, 1, 1)],
        "2": [(1, 2, 2), (2, 1, 1), (1, 1, 1), (2, 2, 1)],
    },
}


def write_set(directory: Path, concepts: int = 1) -> str:
    """A set of AxBench's columns; held-out instructions are others than those that are trained
    on."""
    (directory / "axbench").mkdir()
    for end in ("train", "eval"):
        rows = []
        for concept in range(concepts):
            for i in range(6):
                shown = {"output_concept": "the sea.", "concept_id": concept}
                words = ("wave ship tide", "sums plus seven")[concept]
                row = {"input": f"Say {end} {concept} {i}", "output": f"{words} {i}"}
                rows.append({**row, **shown, "category": "positive"})
                if end == "eval":
                    plain = {"input": f"Ask {concept} {i}", "output": f"door chair lamp {i}"}
                    rows.append({**plain, **shown, "category": "negative"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "axbench" / f"tiny_{end}.jsonl").write_text(text, encoding="utf-8")
    return str(directory)


@dataclass
class MadeUp:
    """A judge with known ratings, given in the order in which it is asked."""

    planted: Sequence[tuple[int, int, int]]
    name: str = "made up"
    seen: list[Any] = field(default_factory=list)
    fails_after: int = 10**9

    def ask(self, conversations: Sequence[Any]) -> list[str]:
        if len(self.seen) + len(conversations) > self.fails_after:
            raise tt.TrimtabError("the judge is away")
        first = len(self.seen) // 3
        self.seen += conversations
        rows = self.planted[first : first + len(conversations) // 3]
        return [f"Rating: {one}" for row in rows for one in row]


def planted(*names: str) -> list[tuple[int, int, int]]:
    return [row for name in names for rows in PLANTED[name].values() for row in rows]


def harmonic(*ratings: int) -> float:
    return 0.0 if 0 in ratings else 3 / sum(1 / one for one in ratings)


def test_the_table_is_that_which_was_planted(tmp_path: Path) -> None:
    data = write_set(tmp_path)
    judge = MadeUp(planted("unsteered", "Prompt", "mean"))
    lm = language_model("llama")
    found = steering_table(lm, METHODS, texts_of="tiny", sizes=SIZES, judge=judge, data=data)
    (concept,) = found.data["concepts"]
    assert concept["concept"] == "the sea."
    # By hand: "as it is" has 2 and 1.5 on the first half, "very" 2 and 0; factor 2 has 1.5 and 1.
    wanted = {
        "unsteered": ("", [(0, 2, 2), (1, 2, 2)]),
        "Prompt": ("as it is", [(1, 1, 2), (0, 2, 2)]),
        "mean": ("2", [(2, 1, 1), (2, 2, 1)]),
    }
    for name, (factor, reported) in wanted.items():
        one = concept["methods"][name]
        assert one["factor"] == factor
        for place, rating in enumerate(("concept", "instruct", "fluency")):
            assert one[rating] == sum(row[place] for row in reported) / 2
        score = sum(harmonic(*row) for row in reported) / 2
        assert one["overall"] == pytest.approx(score)
        assert found.values[name].value == pytest.approx(score)
    chosen_on = concept["methods"]["Prompt"]["chosen_on"]
    assert [chosen_on[one] for one in RUNGS] == pytest.approx([1, 1.75, 1, 0])
    assert [row[0] for row in found.tables[0].rows] == ["unsteered", "Prompt", "mean"]
    assert found.notes == ["ratings are those of made up, in trimtab's wording"]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    data = write_set(tmp_path)
    lm = language_model("llama")
    asked: dict[str, Any] = {"texts_of": "tiny", "sizes": SIZES, "data": data}
    whole = steering_table(
        lm, METHODS, judge=MadeUp(planted("unsteered", "Prompt", "mean")), **asked
    )
    first = MadeUp(planted("unsteered", "Prompt"), fails_after=3 * (4 + 16))
    run = tmp_path / "run"
    with pytest.raises(tt.TrimtabError, match="the judge is away"):
        steering_table(lm, METHODS, judge=first, output=run, **asked)
    again = MadeUp(planted("mean"))
    resumed = steering_table(lm, METHODS, judge=again, output=run, **asked)
    assert resumed.data == whole.data
    assert len(again.seen) == 3 * 8  # what was rated is not asked again
    done = steering_table(lm, METHODS, judge=MadeUp([]), output=run, **asked)
    assert done.data == whole.data
    # A line that was cut off at the end is made again, and nothing else is.
    journal = run / "records.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    mended = steering_table(lm, METHODS, judge=MadeUp(planted("mean")), output=run, **asked)
    assert mended.data == whole.data


def test_answers_without_a_rating_are_left_out_and_counted(tmp_path: Path) -> None:
    class Silent(MadeUp):
        def ask(self, conversations: Sequence[Any]) -> list[str]:
            said = super().ask(conversations)
            return ["I cannot say" if place == 4 else one for place, one in enumerate(said)]

    data = write_set(tmp_path)
    judge = Silent(planted("unsteered", "mean"))
    found = steering_table(
        language_model("llama"), METHODS[1:], texts_of="tiny", sizes=SIZES, judge=judge, data=data
    )
    methods = found.data["concepts"][0]["methods"]
    assert methods["unsteered"]["unclear"] == 1
    assert methods["unsteered"]["overall"] == pytest.approx(harmonic(1, 2, 2))
    assert "2 of 12 answers got no three ratings, and are left out" in found.notes


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("2", 2.0), ("Rating: 1", 1.0), ("[[0]]", 0.0), ("1.", 1.0), ("1.5", None), ("3", None),
     ("0 or 1", None), ("0, 1 or 2", None), ("good", None), ("10", None), ("", None)],
)  # fmt: skip
def test_a_reply_is_a_number_or_nothing(reply: str, rating: float | None) -> None:
    class Says:
        name = "says"

        def ask(self, conversations: Sequence[Any]) -> list[str]:
            return [reply] * len(conversations)

    (found,) = ChatRater(Says()).ratings("joy", ["Why?"], [Completion("Why?", "So.", (1,))])
    assert list(found.values()) == [rating] * 3
    assert overall(found) == (rating if rating is None else pytest.approx(rating))


def test_the_judge_is_shown_what_it_rates_and_no_more() -> None:
    judge = MadeUp([(0, 1, 2)])
    answer = Completion("Why is {it} so?", "Be{cause}.", (1,))
    (found,) = ChatRater(judge).ratings("the sea", ["Why is {it} so?"], [answer])
    assert found == {"concept": 0.0, "instruct": 1.0, "fluency": 2.0}
    concept, instruct, fluency = (one[1]["content"] for one in judge.seen)
    assert ["the sea" in one for one in (concept, instruct, fluency)] == [True, False, False]
    assert ["Why is {it} so?" in one for one in (instruct, concept, fluency)] == [
        True,
        False,
        False,
    ]
    assert all("Be{cause}." in one for one in (concept, instruct, fluency))


def nats(lm: tt.LanguageModel, prompt: str, answer: Sequence[int]) -> float:
    """-ln p a token, by a plain pass."""
    ids = token_ids(prompt) + list(answer)
    log_p = plain_logits(lm.model, ids).log_softmax(-1)
    start = len(ids) - len(answer)
    return -sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))) / len(answer)


def test_the_offline_judge() -> None:
    lm = language_model("llama")
    prompts = ["Say one", "Ask two", "Tell three", "Give four"]
    about = [f"wave ship tide {i}" for i in range(8)]
    others = [f"door chair lamp {i}" for i in range(8)]
    plain = lm.generate(prompts, max_new_tokens=6, temperature=1.0, seed=0, chat=False)
    rater = offline_rater(lm, about, others, prompts, plain)
    assert rater.auroc == 1.0
    own = sum(nats(lm, p, a.tokens) for p, a in zip(prompts, plain, strict=True)) / 4
    assert rater.own == pytest.approx(own, abs=1e-4)
    texts = ["wave ship tide", "chair or ship", "stone", "", "the tide or a wave", "ship tide"]
    ids = [tuple(token_ids(text)[1:]) for text in texts]
    asked = [prompts[i % 4] for i in range(len(texts))]
    answers = [Completion(p, t, i) for p, t, i in zip(asked, texts, ids, strict=True)]
    found = rater.ratings("the sea", asked, answers)
    assert [one["concept"] for one in found[:5]] == [2.0, 0.0, 0.0, 0.0, 1.0]
    assert set(found[3].values()) == {0.0}  # nothing was written
    for one, prompt, tokens in zip(found, asked, ids, strict=True):
        if not tokens:
            continue
        mine = nats(lm, prompt, tokens)
        beaten = sum(nats(lm, p, tokens) > mine for p in prompts if p != prompt)
        assert one["instruct"] == {3: 2.0, 2: 1.0}.get(beaten, 0.0)
        above = mine - own
        assert one["fluency"] == (2.0 if above <= 0.5 else 1.0 if above <= 1.5 else 0.0)
    loop = "ship tide " * 10
    (looping,) = rater.ratings(
        "the sea", prompts[:1], [Completion(prompts[0], loop, tuple(token_ids(loop)[1:]))]
    )
    assert looping["fluency"] == 0.0
    assert looping["concept"] == 1.0
    assert overall(looping) == 0.0


def test_without_a_judge_it_is_said_whose_figures_they_are(tmp_path: Path) -> None:
    data = write_set(tmp_path, concepts=2)
    run = tmp_path / "run"
    asked: dict[str, Any] = {"texts_of": "tiny", "sizes": SIZES, "data": data, "output": run}
    found = steering_table(language_model("llama"), METHODS[1:], **asked)
    assert "its figures are not the paper's" in found.notes[0]
    assert "AUROC of 1.00 to 1.00" in found.notes[0]
    assert steering_table(language_model("llama"), METHODS[1:], **asked).notes == found.notes
    assert found.values["mean (offline judge)"].n == 2
    scores = [one["methods"]["mean"]["overall"] for one in found.data["concepts"]]
    assert found.values["mean (offline judge)"].value == pytest.approx(sum(scores) / 2)
    assert all(0 <= one <= 2 and math.isfinite(one) for one in scores)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda asked: asked.update(texts_of="other"), "there is no axbench/other_train.jsonl"),
        (lambda asked: asked.update(methods=[CAA]), "method mean has no factors to choose from"),
        (
            lambda asked: asked.update(sizes={**SIZES, "instructions": 1}),
            "concept 0 has 1 held-out instructions",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    asked: dict[str, Any] = {"methods": METHODS, "texts_of": "tiny", "sizes": SIZES}
    asked["data"] = write_set(tmp_path)
    change(asked)
    with pytest.raises(tt.TrimtabError, match=says) as caught:
        steering_table(language_model("llama"), **asked)
    assert "\n" not in str(caught.value)
    assert torch.is_grad_enabled()
