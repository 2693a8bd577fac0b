"""Contrasts by generation: their file, work that was interrupted or damaged, and endpoints that
write.

The service is one on this machine that answers by the seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from generated_texts import SHORT, lm, other, own_surroundings, texts_of
from helpers import refused_in_one_line
from services import Reply, Request, serving
from trimtab.errors import TrimtabWarning
from trimtab.evaluation.endpoint import ChatEndpoint
from trimtab.writing import concepts
from trimtab.writing.concepts import generate_contrast, request
from trimtab.writing.writers import batch_seed

__all__ = ["lm", "other", "own_surroundings"]  # fixtures, which pytest finds by their names here

# -- the file, whole and unfinished --------------------------------------------------------------


def test_the_file_is_the_contrast(lm: tt.LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "joy.jsonl"
    contrast = generate_contrast(lm, "joy", output=path, **SHORT)
    assert contrast == tt.Contrast.from_jsonl(path)
    assert contrast.digest == generate_contrast(lm, "joy", **SHORT).digest
    assert [row.label for row in contrast.texts] == ["positive"] * 5 + ["negative"] * 5
    assert list(tmp_path.iterdir()) == [path]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"text", "label"} for row in rows)


def interrupted(
    monkeypatch: pytest.MonkeyPatch, batches: int, lm: tt.LanguageModel, **options: Any
) -> None:
    """A call in which Ctrl-C comes after so many batches."""
    write, left = concepts._write, [batches]

    def until(*args: Any) -> list[str]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(concepts, "_write", until)
        generate_contrast(lm, "joy", **SHORT | options)


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stops", [(0,), (1,), (4,), (2, 1, 0, 1)])
def test_an_interruption_changes_nothing(
    stops: tuple[int, ...],
    lm: tt.LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "joy.jsonl"
    generate_contrast(lm, "joy", output=whole, **SHORT)
    for batches in stops:
        interrupted(monkeypatch, batches, lm, output=path)
        assert not path.exists()
        assert path.with_name("joy.jsonl.part").exists() == (sum(stops) > 0)
    written_now: list[str] = []
    write = concepts._write
    with monkeypatch.context() as patch:
        patch.setattr(
            concepts,
            "_write",
            lambda side, *rest: written_now.append(side.label) or write(side, *rest),
        )
        generate_contrast(lm, "joy", output=path, **SHORT)
    assert path.read_bytes() == whole.read_bytes()
    # Three batches a side, and none of them twice.
    assert len(written_now) == 6 - sum(stops)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["joy.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_was_cut_off_is_written_again(
    cut: int, lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "joy.jsonl"
    generate_contrast(lm, "joy", output=whole, **SHORT)
    interrupted(monkeypatch, 3, lm, output=path)
    part = tmp_path / "joy.jsonl.part"
    part.write_bytes(part.read_bytes()[:-cut])
    interrupted(monkeypatch, 1, lm, output=path)  # goes on behind the cut
    assert len(part.read_bytes().splitlines()) == 4
    generate_contrast(lm, "joy", output=path, **SHORT)
    assert path.read_bytes() == whole.read_bytes()


def test_half_a_character_at_the_end_is_cut_off_too(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, part = tmp_path / "joy.jsonl", tmp_path / "joy.jsonl.part"
    interrupted(monkeypatch, 1, lm, output=path)
    part.write_bytes(part.read_bytes() + '{"texts": ["é'.encode()[:-1])
    generate_contrast(lm, "joy", output=path, **SHORT)
    assert texts_of(tt.Contrast.from_jsonl(path), "positive") == texts_of(
        generate_contrast(lm, "joy", **SHORT), "positive"
    )


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"count": 6, "top_p": 0.9}, "count, top_p"),
        ({"temperature": 1.0, "top_k": 3}, "temperature, top_k"),
        ({"max_new_tokens": 7, "batch_size": 3}, "batch_size, max_new_tokens"),
        ({"negatives": "contrastive"}, "negative prompt, negatives"),
        ({"concept": "evil"}, "concept, positive prompt"),
        ({"writer": "other"}, "positive writer"),
        ({"lm": "other"}, "negative writer, positive writer"),
    ],
)
def test_unfinished_work_of_other_settings_is_kept(
    changed: dict[str, Any],
    named: str,
    lm: tt.LanguageModel,
    other: tt.LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, part = tmp_path / "joy.jsonl", tmp_path / "joy.jsonl.part"
    interrupted(monkeypatch, 2, lm, output=path)
    before = part.read_bytes()
    asked = {"lm": lm, "concept": "joy", "output": path} | SHORT | changed
    asked |= {name: other for name in ("writer", "lm") if asked.get(name) == "other"}

    def again(**more: Any) -> tt.Contrast:
        options = asked | more
        return generate_contrast(options.pop("lm"), options.pop("concept"), **options)

    refused_in_one_line(again, f"part holds unfinished .* differ in {named}: choose another")
    assert part.read_bytes() == before
    contrast = again(overwrite=True)
    assert contrast.digest == again(output=None).digest
    assert not part.exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: [b"not ours\n"], "line 1 is damaged: it is not JSON"),
        (lambda lines: [b"no line end"], "it has no settings"),
        (lambda lines: [], "it has no settings"),
        (lambda lines: [b"\xff\xfe\n"], "codec can't decode"),
        (lambda lines: [lines[0], b"{\n", lines[2]], "line 2 is damaged: it is not JSON"),
        (lambda lines: [lines[0], b"[]\n", lines[2]], "line 2 is damaged: it is not a JSON object"),
        (
            lambda lines: [lines[0], lines[2]],
            "line 2 is damaged: it is not batch 0 of the positive texts",
        ),
        (
            lambda lines: [*lines[:2], lines[1]],
            "line 3 is damaged: it is not batch 1 of the positive texts",
        ),
        (
            lambda lines: [lines[0], lines[1][:-3] + b', ""]}\n'],
            "line 2 is damaged: it is not batch 0",
        ),
        (
            lambda lines: [lines[0], lines[1].replace(b'["', b'[0, "')],
            "line 2 is damaged: it is not batch 0",
        ),
        (lambda lines: [*lines, lines[2]], "line 8 is damaged: it is a batch too many"),
    ],
)
def test_damaged_work_is_kept_and_named(
    damage: Any,
    says: str,
    lm: tt.LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, part = tmp_path / "joy.jsonl", tmp_path / "joy.jsonl.part"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Interrupted when all six batches are there, before the file is.
        patch.setattr(concepts.Work, "check_used", interrupt)
        generate_contrast(lm, "joy", output=path, **SHORT)
    part.write_bytes(b"".join(damage(part.read_bytes().splitlines(keepends=True))))
    before = part.read_bytes()
    refused_in_one_line(
        lambda: generate_contrast(lm, "joy", output=path, **SHORT),
        f"part.*{says}.*; delete it, or pass overwrite",
    )
    assert part.read_bytes() == before
    assert not path.exists()


def test_an_output_that_exists_is_not_replaced_unasked(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "joy.jsonl"
    path.write_text("mine")
    refused_in_one_line(lambda: generate_contrast(lm, "joy", output=path, **SHORT), "jsonl exists")
    interrupted(monkeypatch, 5, lm, output=path, overwrite=True)
    assert path.read_text() == "mine"
    contrast = generate_contrast(lm, "joy", output=path, overwrite=True, **SHORT)
    assert contrast == tt.Contrast.from_jsonl(path)


def test_an_output_that_cannot_be_is_refused_before_the_work(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concepts, "_write", lambda *args: pytest.fail("work was done"))
    for output, says in ((tmp_path, "is a directory"), (tmp_path / "no" / "x", "no directory")):
        refused_in_one_line(lambda o=output: generate_contrast(lm, "joy", output=o, **SHORT), says)


# -- an endpoint ---------------------------------------------------------------------------------


def by_seed(request: Request) -> Reply:
    """A text that names the seed and the concept."""
    asked = request.content
    about = asked["messages"][-1]["content"].split(".")[0].removeprefix("Describe the concept: ")
    answer = {"message": {"content": f" I am {about}, {asked['seed']}.\u2028\n"}}
    return Reply({"choices": [answer], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


def writer_at(url: str, **options: Any) -> ChatEndpoint:
    return ChatEndpoint(url + "/v1", "writer-1", pause=0.01, **options)


def test_an_endpoint_is_asked_with_another_seed_each_time(lm: tt.LanguageModel) -> None:
    with serving(by_seed) as service:
        writer = writer_at(service.url, extra={"top_k": 50}, concurrency=1)
        contrast = generate_contrast(
            lm, "joy", negatives="contrastive", writer=writer, temperature=0.7, **SHORT
        )
    assert len(service.requests) == 10
    for label, concept, sent in (
        ("positive", "joy", service.requests[:5]),
        ("negative", "the opposite of joy", service.requests[5:]),
    ):
        starts = [batch_seed(0, label, number) for number in range(3)]
        seeds = [starts[0], starts[0] + 1, starts[1], starts[1] + 1, starts[2]]
        assert texts_of(contrast, label) == [f"I am {concept}, {seed}." for seed in seeds]
        for seed, request_ in zip(seeds, sent, strict=True):
            assert request_.content == {
                "model": "writer-1",
                "messages": [{"role": r, "content": text} for r, text in request(concept)],
                "temperature": 0.7,
                "top_p": 0.95,
                "top_k": 50,
                "max_tokens": 6,
                "seed": seed,
            }


def test_what_an_endpoint_wrote_is_not_asked_for_again(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    with serving(by_seed) as service:
        writer = writer_at(service.url)
        path = tmp_path / "joy.jsonl"
        first = generate_contrast(lm, "joy", writer=writer, output=path, **SHORT)
        assert len(service.requests) == 5
        again = generate_contrast(lm, "joy", writer=writer, **SHORT)
        assert (again.digest, len(service.requests)) == (first.digest, 5)
        generate_contrast(lm, "joy", writer=writer_at(service.url, extra={"n": 1}), **SHORT)
        assert len(service.requests) == 10
    assert texts_of(first, "negative") == texts_of(
        generate_contrast(lm, "joy", **SHORT), "negative"
    )


def test_an_endpoint_that_always_says_the_same_is_soon_given_up(lm: tt.LanguageModel) -> None:
    reply = Reply({"choices": [{"message": {"content": "Joy."}}]})
    with (
        serving(lambda request: reply) as service,
        pytest.warns(TrimtabWarning, match="only 1 of 200 positive texts by writer-1 at http"),
    ):
        contrast = generate_contrast(
            lm, "joy", writer=writer_at(service.url), count=200, max_new_tokens=3, batch_size=2
        )
    assert texts_of(contrast, "positive") == ["Joy."]
    assert len(service.requests) == 8


def test_an_endpoint_that_fails_leaves_what_there_is(lm: tt.LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "joy.jsonl"
    up = [True]
    sent: list[int] = []

    def sometimes(request: Request) -> Reply:
        sent.append(request.content["seed"])
        return by_seed(request) if len(sent) <= 4 or not up[0] else Reply(b"", 400)

    with serving(sometimes) as service:
        writer = writer_at(service.url, cache=tmp_path / "answers")
        refused_in_one_line(
            lambda: generate_contrast(lm, "joy", writer=writer, output=path, **SHORT), "status 400"
        )
        assert (tmp_path / "joy.jsonl.part").exists()
        up[0] = False
        contrast = generate_contrast(lm, "joy", writer=writer, output=path, **SHORT)
    assert len(sent) == 6
    assert len(texts_of(contrast, "positive")) == 5


def test_fields_of_a_question_are_part_of_it() -> None:
    conversation = [{"role": "user", "content": "Describe the concept: joy."}]
    with serving(by_seed) as service:
        writer = writer_at(service.url)
        fields: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "temperature": 0.5}, {"seed": 1}]
        answers = writer.ask([conversation] * 3, fields)
        assert [answer.strip() for answer in answers] == [f"I am joy, {n}." for n in (1, 2, 1)]
        writer.ask([conversation], [{"seed": 2, "temperature": 0.6}])
    sent = {(r.content["seed"], r.content["temperature"]) for r in service.requests}
    assert sent == {(1, 0), (2, 0.5), (2, 0.6)}
    assert len(service.requests) == 3
