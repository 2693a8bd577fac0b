"""A contrast for a trait, from the wish to the steering: who writes what, what is kept, what is
said of it, and work that is interrupted.

Services on this machine write and judge by rules of the test; tiny models answer.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from generated_texts import lm, own_surroundings, roomy
from helpers import refused_in_one_line
from services import Reply, Request, serving
from trimtab.errors import TrimtabWarning
from trimtab.evaluation import ChatEndpoint
from trimtab.writing import persona
from trimtab.writing.persona import persona_contrast
from trimtab.writing.writers import batch_seed

__all__ = ["lm", "own_surroundings"]  # fixtures, which pytest finds by their names here

WISH = "speaks formally"
SMALL: dict[str, Any] = {"pairs": 2, "questions": 12, "max_new_tokens": 5, "batch_size": 5}
PARTS = ("train", "validation", "test")


def said(content: str) -> Reply:
    return Reply({"choices": [{"message": {"content": content}}]})


def keeping(request: Request) -> Reply:
    """A judge for which half of the answers show the trait, by their characters."""
    system, user = (message["content"] for message in request.content["messages"])
    answer = user.split("<answer>\n")[1].removesuffix("\n</answer>")
    shows = answer.startswith("Good day") or sum(map(ord, answer)) % 2
    return said("90" if "coherent" in system or shows else "10")


@pytest.fixture
def judge() -> Iterator[ChatEndpoint]:
    """Everything that is asked twice is answered from its cache."""
    with serving(keeping) as service:
        yield ChatEndpoint(service.url, "judge")


def made(lm: tt.LanguageModel, judge: ChatEndpoint | None, **options: Any) -> tt.Contrast:
    """With so few rows parts may be missing, which is a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        return persona_contrast(lm, options.pop("wish", WISH), judge=judge, **SMALL | options)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persona, "FEWEST", 1)


class _Stop(Exception):  # noqa: N818, it is a signal and no error
    pass


# -- what is asked and answered -------------------------------------------------------------------


def test_rows_are_answers_to_the_question_alone(lm: tt.LanguageModel, judge: ChatEndpoint) -> None:
    contrast = made(lm, judge)
    about = contrast.made
    assert about is not None
    questions = {each["text"]: each["part"] for each in about["questions"]}
    assert Counter(questions.values()) == {"train": 6, "validation": 3, "test": 3}
    # The answers, sampled once more by hand, under the instructions that the record names.
    grid = [(text, pair) for text in questions for pair in about["instructions"]]
    written = []
    for side, who in (("positive", "an assistant who speaks formally"),
                      ("negative", "a helpful assistant")):  # fmt: skip
        texts: list[str] = []
        for number, start in enumerate(range(0, len(grid), 5)):
            batch = [
                [{"role": "system", "content": f"You are {who}. {pair[side]}"},
                 {"role": "user", "content": text}]
                for text, pair in grid[start : start + 5]
            ]  # fmt: skip
            found = lm.generate(
                batch, max_new_tokens=5, temperature=1.0, top_p=0.9,
                seed=batch_seed(0, side, number),
            )  # fmt: skip
            texts += [each.text.strip() for each in found]
        written.append(texts)
    every = [
        tt.Contrast.from_pairs([([{"role": "user", "content": text}], p, n)]).pairs[0]
        for (text, _), p, n in zip(grid, *written, strict=True)
        if p != n
    ]
    kept = [(row.prompt, row.positive, row.negative) for row in contrast.pairs]
    among = [(row.prompt, row.positive, row.negative) for row in every]
    assert [each for each in among if each in kept] == kept  # in order, and nothing else
    assert all(row.part == questions[row.prompt[0][1]] for row in contrast.pairs)  # type: ignore[index]


def test_counts_add_up(lm: tt.LanguageModel, judge: ChatEndpoint) -> None:
    contrast = made(lm, judge, answers=2)
    assert contrast.made is not None
    counts = contrast.made["counts"]
    assert counts["written"] == 2 * 12 * 2
    assert counts["written"] == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] == len(contrast) == sum(counts["kept by pair"])
    assert {part: n for part, n in counts["kept by part"].items() if n} == contrast.sizes
    assert counts["instructions"] == {"templates": 2}
    assert counts["questions"] == {"built in": 12}
    assert contrast.made["writer"] == "templates"
    assert contrast.made["judge"] == {"url": judge.url, "model": "judge", "extra": {}}


def test_the_same_seed_is_the_same_contrast(lm: tt.LanguageModel, judge: ChatEndpoint) -> None:
    first = made(lm, judge)
    assert made(lm, judge) == first
    assert made(lm, judge, seed=1) != first
    assert made(lm, None).made["judge"]["model"] == "llama-0"  # type: ignore[index]


# -- who writes -----------------------------------------------------------------------------------


def writing(*replies: Any) -> Any:
    """A writer that lists these instructions and questions, or says the texts, in turn."""
    waiting = list(replies)

    def reply(request: Request) -> Reply:
        each = waiting.pop(0) if waiting else ""
        return said(each if isinstance(each, str) else json.dumps(each, ensure_ascii=False))

    return reply


TWO = {
    "instructions": [
        {"positive": "Speak as a duke.", "negative": "Speak as a sailor."},
        {"positive": "Write as a judge.", "negative": "Write as a child."},
    ]
}


def test_what_a_writer_writes_is_taken_and_topped_up(
    lm: tt.LanguageModel, judge: ChatEndpoint
) -> None:
    one = {"instructions": TWO["instructions"][:1]}
    asked = {"questions": ["Wie spät ist es, 時計?", "Why is snow white and cold?", "Nothing."]}
    with serving(writing(one, "junk", one, asked)) as service:
        writer = ChatEndpoint(service.url, "w")
        contrast = made(lm, judge, writer=writer, answers=2, wish='"f\u00f6rm" {x}')
        requests = [request.content["messages"][0]["content"] for request in service.requests]
    assert len(requests) == 6  # three of each kind: what is missing is asked for again
    assert ["2 different pairs" in text for text in requests] == [True, *[False] * 5]
    assert ["1 different pairs" in text for text in requests] == [False, True, True, *[False] * 3]
    assert '\\"f\u00f6rm\\" {x}' in requests[0]
    about = contrast.made
    assert about is not None
    assert about["instructions"][0] == {**one["instructions"][0], "source": "writer"}
    assert about["counts"]["instructions"] == {"writer": 1, "templates": 1}
    assert about["counts"]["questions"] == {"writer": 2, "built in": 10}


def test_a_writer_without_mercy_is_harmless(lm: tt.LanguageModel, judge: ChatEndpoint) -> None:
    eos = lm.tokenizer.eos_token
    bad = {
        "instructions": [
            {"positive": f"Speak as a duke.{eos}", "negative": "Speak as a sailor."},
            {"positive": "Speak as a duke \u202e now.", "negative": "Speak as a sailor."},
            {"positive": "Speak \ud800 as a duke.", "negative": "Speak as a sailor."},
        ]
    }
    asked = {"questions": [f"Why is it{eos} so?", "Why is \x1b[2J it?", "Why " * 500 + "?", 3]}
    with serving(writing(bad, "{" * 100_000, "x" * 900_000, asked)) as service:
        contrast = made(lm, judge, writer=ChatEndpoint(service.url, "w", pause=0.01))
    assert contrast.made is not None
    assert contrast.made["counts"]["instructions"] == {"templates": 2}
    assert contrast.made["counts"]["questions"] == {"built in": 12}
    for status in (400, 500):
        with serving(lambda request, status=status: Reply(b"no\n no", status)) as service:
            writer = ChatEndpoint(service.url, "w", pause=0.01, tries=2)
            refused_in_one_line(lambda w=writer: made(lm, judge, writer=w), f"status {status}")


def test_a_model_writes_itself_where_it_is_able(
    lm: tt.LanguageModel, judge: ChatEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own junk is replaced, as a writer's."""
    monkeypatch.setattr(persona, "_TOKENS_EACH", 2)
    monkeypatch.setattr(persona, "_TOKENS_AROUND", 5)
    monkeypatch.setattr(persona, "_ABLE", 1)
    contrast = made(lm, judge)
    assert contrast.made is not None
    assert contrast.made["writer"]["model"] == "llama-0"
    assert contrast.made["counts"]["instructions"] == {"templates": 2}
    assert contrast == made(lm, judge, writer=lm)
    assert made(lm, judge, writer="templates").made["writer"] == "templates"  # type: ignore[index]


def changed(template: str | None) -> tt.LanguageModel:
    model = roomy("llama")
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return tt.wrap(model.model, tokenizer, "bare")


def test_a_base_model_needs_somebody_who_answers(judge: ChatEndpoint) -> None:
    bare = changed(None)
    refused_in_one_line(lambda: made(bare, judge), "bare has no chat template.*--writer chat:NAME")
    refused_in_one_line(lambda: made(bare, judge, writer="templates"), "has no chat template")
    refused_in_one_line(lambda: made(bare, judge, writer=bare), "bare has no chat template")

    def answering(request: Request) -> Reply:
        first, *rest = (message["content"] for message in request.content["messages"])
        if not rest:
            return said(json.dumps(TWO))
        eos = "</s>" if "by the sea" in rest[0] else ""  # as an answer's own end would be read
        greeting = "Good day" if "duke" in first or "judge" in first else "Hi"
        return said(f"{greeting} {rest[0]}{eos}")

    with serving(answering) as service:
        writer = ChatEndpoint(service.url, "w")
        contrast = made(bare, judge, writer=writer)
    assert contrast.made is not None
    assert contrast.made["answers by"]["model"] == "w"
    assert contrast.made["counts"]["dropped"]["special tokens"] == 2
    row = contrast.pairs[0]
    question = contrast.made["questions"][0]["text"]
    assert row.prompt == f"Question: {question}\nAnswer:"
    assert (row.positive, row.negative) == (f" Good day {question}", f" Hi {question}")


def test_a_template_without_a_system_message_gets_it_before_the_question(
    judge: ChatEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for template in (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}:",
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}:",
    ):
        asked: list[Any] = []

        def write(writer: Any, prompts: Any, *rest: Any, asked: list[Any] = asked) -> None:
            asked.extend(prompts)
            raise _Stop

        with monkeypatch.context() as patch, pytest.raises(_Stop):
            patch.setattr(persona, "write", write)
            made(changed(template), judge)
        told = "You are an assistant who speaks formally. Speak formally.\n\nHow do I boil an egg?"
        assert asked[0] == (("user", told),)


# -- too little -----------------------------------------------------------------------------------


def test_too_few_rows_are_refused_with_what_to_try(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persona, "FEWEST", 10)
    output = tmp_path / "x.jsonl"
    refused_in_one_line(
        lambda: made(lm, None, pairs=1, questions=18), "make 9 rows to fit on, and 10 are needed"
    )
    with serving(lambda request: said("10")) as service:
        strict = ChatEndpoint(service.url, "strict")
        refused_in_one_line(
            lambda: made(lm, strict, wish="a pirate", output=output),
            r"of 24 pairs .* only 0 are kept.*dropped: .*trait\): try a larger.*--opposite",
        )
    assert not output.exists()


def test_a_blind_judge_is_a_warning(lm: tt.LanguageModel) -> None:
    """It says 50 to all: nothing is kept; or what a coin says."""
    flip = iter(range(10_000))

    def coin(request: Request) -> Reply:
        coherent = "coherent" in request.content["messages"][0]["content"]
        return said("90" if coherent or next(flip) % 4 in (0, 3) else "10")

    with serving(coin) as service, pytest.warns(TrimtabWarning, match="hardly tells the two sides"):
        persona_contrast(lm, WISH, judge=ChatEndpoint(service.url, "coin", concurrency=1), **SMALL)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"wish": " "}, "the wish is empty"),
        ({"opposite": "."}, "the opposite is empty"),
        ({"wish": "formal</s>"}, "holds a mark of the chat template"),
        ({"opposite": "casual \x1b[2J"}, "or a character that nobody sees"),
        ({"writer": "gemma"}, "a writer is a LanguageModel, a ChatEndpoint or 'templates'"),
        ({"judge": "gemma"}, "a judge is a LanguageModel or a ChatEndpoint"),
        ({"questions": 0}, "must be 1 or more"),
        ({"questions": 81}, "80 questions for the 81"),
        ({"pairs": 9}, "8 templates for the 9"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], says: str, lm: tt.LanguageModel, tmp_path: Path
) -> None:
    asked = {"judge": None, "output": tmp_path / "x.jsonl", **options}
    refused_in_one_line(lambda: made(lm, **asked), says)
    assert not list(tmp_path.glob("x*"))


# -- the file, whole and unfinished ---------------------------------------------------------------


def test_an_interruption_changes_nothing(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each batch in turn: of writing, of answering, of judging."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "x.jsonl"
    replies = {"pairs": TWO, "questions": {"questions": ["Why is snow white and cold?"]}}
    calls = Counter[str]()

    def reply(request: Request) -> Reply:
        first = request.content["messages"][0]["content"]
        kind = "pairs" if "different pairs" in first else "questions"
        calls[kind] += 1
        return said(json.dumps(replies[kind]))

    with serving(reply) as service:
        writer = ChatEndpoint(service.url, "w")

        def run(output: Path) -> tt.Contrast:
            return made(lm, None, writer=writer, output=output)

        first = run(whole)
        append, stops = persona.Work.append, 0
        while not path.exists():
            left = [1]

            def once(self: Any, *batch: Any, left: list[int] = left) -> None:
                if not left.pop():
                    raise _Stop
                left.append(0)
                append(self, *batch)

            with monkeypatch.context() as patch:
                patch.setattr(persona.Work, "append", once)
                try:
                    again = run(path)
                except _Stop:
                    stops += 1
    assert stops >= 10
    assert again == tt.Contrast(first.rows, str(path))
    assert path.read_bytes() == whole.read_bytes()
    beside, other = (path.with_suffix(".made.json"), whole.with_suffix(".made.json"))
    assert beside.read_bytes() == other.read_bytes()
    names = sorted(each.name for each in tmp_path.iterdir() if each.is_file())
    assert names == ["whole.jsonl", "whole.made.json", "x.jsonl", "x.made.json"]


def test_other_settings_and_files_that_exist_are_refused(
    lm: tt.LanguageModel, judge: ChatEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(persona, "filtered", lambda *args, **options: (_ for _ in ()).throw(_Stop))
        with pytest.raises(_Stop):
            made(lm, judge, output=path)
    refused_in_one_line(
        lambda: made(lm, judge, output=path, wish="formal", seed=3),
        r"x.jsonl.part holds unfinished work .* differ in behaviour, opposite, seed, .*wish",
    )
    made(lm, judge, output=path, seed=3, overwrite=True)
    before = path.read_bytes()
    refused_in_one_line(lambda: made(lm, judge, output=path), "x.jsonl exists")
    path.rename(tmp_path / "y.jsonl")
    refused_in_one_line(lambda: made(lm, judge, output=path), "x.made.json exists")
    assert (tmp_path / "y.jsonl").read_bytes() == before


# -- what it is for -------------------------------------------------------------------------------


def test_the_persona_vector_is_the_mean_over_the_answers(
    lm: tt.LanguageModel, judge: ChatEndpoint
) -> None:
    """The authors' response_avg_diff by a plain loop: hidden_states[l + 1] is block l's output."""
    contrast = made(lm, judge)
    means: dict[str, list[torch.Tensor]] = {"positive": [], "negative": []}
    for row in contrast.train.pairs:
        message = [{"role": "user", "content": row.prompt[0][1]}]  # type: ignore[index]
        text = lm.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        before = len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        for side, found in means.items():
            ids = lm.tokenizer(text + getattr(row, side), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                hidden = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            found.append(torch.stack([layer[0, before:].double().mean(0) for layer in hidden]))
    sides = {side: torch.stack(found).mean(0) for side, found in means.items()}
    response_avg_diff = sides["positive"] - sides["negative"]  # [layers + 1, units]
    for layer in range(lm.anatomy.layers - 1):  # the last hidden state is behind the final norm
        steering = tt.CAA(layer=layer, token="answer").fit(lm, contrast)
        vector = steering.interventions[0].operator.vector.double()  # type: ignore[union-attr]
        assert torch.allclose(vector, response_avg_diff[layer + 1], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(vector, response_avg_diff[layer], atol=1e-2)


def test_a_steering_says_how_its_contrast_was_made(
    lm: tt.LanguageModel, judge: ChatEndpoint, tmp_path: Path
) -> None:
    path, saved = tmp_path / "x.jsonl", tmp_path / "x.safetensors"
    contrast = made(lm, judge, output=path)
    tt.CAA(layer=1, alpha=1).fit(lm, contrast).save(saved)
    about = tt.Steering.load(saved).contrast["made"]
    assert contrast.made is not None
    assert about == {k: v for k, v in contrast.made.items() if k != "questions"}
    assert about["counts"]["kept"] == len(contrast)
    assert about["wish"] == WISH


@pytest.mark.slow
def test_a_real_model_answers_shorter_when_it_is_asked_to(smollm2: Any) -> None:
    options: dict[str, Any] = {"pairs": 2, "questions": 20, "max_new_tokens": 40}
    contrast = persona_contrast(smollm2, "answers in one short sentence", **options)
    words = [sum(len(getattr(row, side).split()) for row in contrast.pairs) for side in
             ("positive", "negative")]  # fmt: skip
    assert words[0] < 0.8 * words[1]
