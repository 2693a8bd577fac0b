"""Text as it is written: the pieces are the text of `generate`, whole characters, and nothing more
runs than is asked for."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

import trimtab as tt
from commands import GENERATE, Command, home, trimtab, work
from helpers import PROMPTS, language_model, refused_in_one_line, steer_at
from tiny import tiny_tokenizer
from trimtab.cli import generate as cli_generate
from trimtab.model.streaming import Growing, Pieces, iterated

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here


def streamed(lm: tt.LanguageModel, prompts: Any = PROMPTS, **options: Any) -> list[list[str]]:
    """The pieces of each prompt; the texts that `generate` returns are those of a call without."""
    pieces: list[list[str]] = [[] for _ in prompts]
    done = lm.generate(prompts, on_text=lambda i, piece: pieces[i].append(piece), **options)
    plain = lm.generate(prompts, **options)
    assert [str(one) for one in done] == [str(one) for one in plain]
    assert ["".join(own) for own in pieces] == [str(one) for one in plain]
    return pieces


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 2},
        {"temperature": 1.5, "seed": 3},
        {"stop": "[ae] ?."},
        {"repetition_penalty": 1.3},
        {"chat": False},
    ],
)
def test_pieces_are_the_text(options: dict[str, Any]) -> None:
    lm = language_model("llama")
    steering = [steer_at(lm, "resid"), None, steer_at(lm, "ffn_in", "Scale").at(3)]
    pieces = streamed(lm, steering=steering, max_new_tokens=12, **options)
    if not {"stop", "temperature"} & options.keys():
        assert all(len(own) > 4 for own in pieces)  # piece by piece, not at the end


def test_a_text_that_ends_by_itself_is_streamed_to_its_end() -> None:
    lm = language_model("llama")
    written = lm.generate(PROMPTS, max_new_tokens=12)
    # From now on a token that comes in the middle of a text ends it.
    lm.model.generation_config.eos_token_id = written[0].tokens[4]
    pieces = streamed(lm, max_new_tokens=12)
    assert len(lm.generate(PROMPTS, max_new_tokens=12)[0].tokens) == 4
    assert "".join(pieces[0]) != str(written[0])


def test_budgets_find_each_prompts_dial_first() -> None:
    lm = language_model("llama")
    rule = tt.within(steer_at(lm, "resid"), kl=0.05)
    streamed(lm, steering=rule, max_new_tokens=6)
    text = "".join(lm.stream(PROMPTS[0], steering=rule, max_new_tokens=6))
    assert text == str(lm.generate(PROMPTS[:1], steering=rule, max_new_tokens=6)[0])


@pytest.mark.parametrize("text", ["naïve 中文 🙂 done", "ends broken: 🙂"])
def test_no_piece_has_part_of_a_character(text: str) -> None:
    """A character outside ASCII is several tokens of this tokenizer."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    end = tokenizer.eos_token_id
    if text.startswith("ends"):
        tokens = tokens[:-1]  # the last byte does not come
    whole = tokenizer.decode(tokens)
    said: list[str] = []
    pieces = Pieces(tokenizer, [7], lambda place, piece: said.append(f"{place}{piece}"))
    pieces.begin({end}, lambda row: False)
    pieces.put(torch.zeros(1, 4, dtype=torch.long))  # the prompt
    for token in [*tokens, end, 65, 66]:  # what follows the end is padding
        pieces.put(torch.tensor([token]))
    before = list(said)
    pieces.finish(0, whole)
    assert "".join(said).replace("7", "") == whole
    assert not any("\N{REPLACEMENT CHARACTER}" in one for one in before)
    assert "7🙂" in said or text.startswith("ends")
    assert len(before) > 5


def test_refusals() -> None:
    lm = language_model("llama")
    beams = "beams are compared when they are whole"
    refused_in_one_line(lambda: lm.generate(PROMPTS, num_beams=2, on_text=print), beams)
    refused_in_one_line(lambda: next(lm.stream(PROMPTS[0], num_beams=2)), beams)
    said: Any = "print"
    refused_in_one_line(lambda: lm.generate(PROMPTS, on_text=said), "on_text must be a function")


def test_what_the_callers_function_raises_goes_through() -> None:
    lm = language_model("llama")

    def fail(place: int, piece: str) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        lm.generate(PROMPTS, on_text=fail, repetition_penalty=1.2)
    assert str(lm.generate(PROMPTS[:1])[0])  # nothing is left on the model


# -- the iterator ---------------------------------------------------------------------------------


def test_an_iterator_gives_the_same_text_alone_and_in_a_block() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions="generated")
    wanted = str(lm.generate(PROMPTS[:1], steering=steering, max_new_tokens=8)[0])
    assert "".join(lm.stream(PROMPTS[0], steering=steering, max_new_tokens=8)) == wanted
    with lm.steered(steering):
        pieces = list(lm.stream(PROMPTS[0], max_new_tokens=8))
    assert "".join(pieces) == wanted != str(lm.generate(PROMPTS[:1], max_new_tokens=8)[0])
    assert len(pieces) > 4


def test_it_works_only_while_it_is_waited_for() -> None:
    done: list[int] = []

    def write(say: Any) -> None:
        for i in range(5):
            done.append(i)
            say(str(i))

    found = iterated(write)
    assert done == []
    assert next(found) == "0"
    assert done == [0]
    assert list(found) == ["1", "2", "3", "4"]


def test_it_ends_where_the_loop_is_left() -> None:
    lm = language_model("llama")
    before = threading.active_count()
    plain = str(lm.generate(PROMPTS[:1], max_new_tokens=4)[0])
    for _ in lm.stream(PROMPTS[0], steering=steer_at(lm, "resid"), max_new_tokens=200):
        # Its steering is on the model: whoever else runs that is told so.
        refused_in_one_line(lambda: lm.generate(PROMPTS[:1]), "a stream that is not at its end")
        break
    for _ in lm.stream(PROMPTS[0], max_new_tokens=200):
        assert str(lm.generate(PROMPTS[:1], max_new_tokens=4)[0]) == plain
        break
    gc.collect()
    assert threading.active_count() == before
    assert str(lm.generate(PROMPTS[:1], max_new_tokens=4)[0]) == plain


def test_an_error_comes_out_of_the_iterator() -> None:
    lm = language_model("llama")
    refused_in_one_line(
        lambda: next(lm.stream(PROMPTS[0], max_new_tokens=0)),
        "max_new_tokens and batch_size must be 1 or more",
    )


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As if standard output were a terminal; the list has each call that streams."""
    calls: list[Any] = []
    stream = cli_generate._stream

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        stream(*arguments)

    monkeypatch.setattr(cli_generate, "is_terminal", lambda _: True)
    monkeypatch.setattr(cli_generate, "_stream", counted)
    return calls


def test_a_terminal_shows_the_text_as_it_comes(
    trimtab: Command, looked_at: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{GENERATE} 'Today I feel' --steer au.safetensors@40"
    at_once = trimtab(f"{line} --no-stream").text
    assert looked_at == []
    assert trimtab(line).text == at_once
    assert len(looked_at) == 1
    budget = trimtab(f"{GENERATE} 'Today I feel' --raw --steer au.safetensors --kl 0.05").text
    assert budget.splitlines()[2].startswith("austeer alpha=")  # the dial that was found
    for more in ("--compare", "--json", "'Another prompt'"):
        trimtab(f"{line} {more}")
    assert len(looked_at) == 2
    monkeypatch.setattr(cli_generate, "is_terminal", lambda _: False)
    assert trimtab(line).text == at_once
    assert len(looked_at) == 2


def test_what_may_still_change_is_kept_back() -> None:
    growing = Growing(stops=["END", "\n\n"])
    texts = ["a", "a\ufffd", "aé E", "aé EN", "aé ENT", "aé ENT\n", "aé ENT\n!"]
    pieces = [growing.more(text) for text in texts]
    assert pieces == ["a", "", "é ", "", "ENT", "", "\n!"]
    assert growing.rest("aé ENT\n! E") == " E"
