"""Many texts through an engine at once, each under steerings of its own: what comes is what
transformers gives, whatever shares the batch; what is not carried is refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from commands import Command, home, refused, trimtab, work, write_rows
from engine_stand_in import StandIn, stand_in
from helpers import language_model, steer, steer_at
from operator_formulas import ALL, random_operator
from test_batches import GIVEN, ROWS
from trimtab.reading import Reading, next_tokens, prompt_reading
from trimtab.serving import queueing

__all__ = ["home", "stand_in", "trimtab", "work"]  # fixtures, found by their names here

PROMPTS = ["Today I feel", "The ship", "She looked at the map and", "A", "I think that"]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> list[tt.Steering]:
    """Operators at sites of several kinds, each in a scope of its own."""
    kinds = ("resid", "heads", "ffn_out", "attn_norm")
    scopes = ("all", "generated", "prompt", "last", "prompt[-2:]", "!prompt[:1]")
    made = []
    for number, name in enumerate(name for name in ALL if name != "Unbound"):
        site = f"layers.{number % 3}.{kinds[number % len(kinds)]}"
        operator = random_operator(name, number + 30, lm.anatomy.width(site))
        dial = 90.0 if name in ("Turn", "Rotate", "Adaptive") else 2.0
        made.append(steer(lm, (site, operator), alpha=dial).scoped(scopes[number % len(scopes)]))
    return made


def test_texts_are_those_of_transformers(
    lm: tt.LanguageModel, steerings: list[tt.Steering]
) -> None:
    acting = [None, *steerings, steerings[:3], steerings[2::-1]]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(acting))]
    options: dict[str, Any] = {"chat": False, "max_new_tokens": 7}
    expected = lm.generate(prompts, steering=acting, **options)
    with tt.VLLM(lm, steerings) as engine:
        found = engine.generate(prompts, steering=acting, **options)
        again = engine.generate(prompts[::-1], steering=acting[::-1], **options)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.steering for one in found] == [one.steering for one in expected]
    assert [one.tokens for one in again[::-1]] == [one.tokens for one in expected]
    assert len({one.tokens for one in found}) > len(PROMPTS)
    (inner,) = StandIn.opened
    assert len(set(inner.loads)) == len(inner.loads) == len(steerings)


def test_where_texts_end(lm: tt.LanguageModel) -> None:
    """With a stop pattern, an end token, and where too few tokens are there to end."""
    plain = lm.generate(PROMPTS, chat=False, max_new_tokens=12)
    stop = plain[0].text[2:4]
    ends = [one.tokens[3] for one in plain[1:3]]
    lm.model.generation_config.eos_token_id = ends
    try:
        with tt.VLLM(lm) as engine:
            for options in ({"stop": tt_escape(stop)}, {}, {"min_new_tokens": 6}):
                given: dict[str, Any] = {"chat": False, "max_new_tokens": 12, **options}
                expected = lm.generate(PROMPTS, **given)
                assert engine.generate(PROMPTS, **given) == expected
                assert "min_new_tokens" in given or min(len(one.tokens) for one in expected) < 12
            assert StandIn.opened[0].left  # what nobody waited for was left
            assert not StandIn.opened[0].waiting
    finally:
        lm.model.generation_config.eos_token_id = None


def tt_escape(text: str) -> str:
    return "".join(f"\\{char}" if not char.isalnum() else char for char in text)


def readings(lm: tt.LanguageModel) -> list[Reading]:
    """Prompts whose next token is asked for; texts that are scored, some of which are answers from
    somewhere on, with and without their last token."""
    made = [prompt_reading(tokens) for tokens in lm.encode(PROMPTS)]
    for number, tokens in enumerate(lm.encode([f"{one} and more" for one in PROMPTS])):
        start, text = 1 + number % 3, tuple(tokens)
        asked = tuple(range(start - 1, len(text) - 1))
        made.append(Reading(text[:-1], asked, start, text[start:]))
        made.append(Reading(text, asked, start, text[start:]))
    return made


def test_what_is_next_and_how_likely_texts_are(
    lm: tt.LanguageModel, steerings: list[tt.Steering]
) -> None:
    asked = readings(lm)
    acting: list[Any] = [None, *steerings, steerings[:3]]
    rows = [(one, attached) for attached in acting for one in asked if reached(one, attached)]
    texts, each = [one for one, _ in rows], [attached for _, attached in rows]
    expected = of_all(next_tokens(lm, texts, each), len(texts))
    with tt.VLLM(lm, steerings) as engine:
        found = of_all(engine.next_tokens(texts, each), len(texts))
        few = of_all(engine.next_tokens(texts, each, missing=lambda i: i % 5 == 2), len(texts))
    for number, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        assert one.best.tolist() == wanted.best.tolist()
        if texts[number].targets is not None:
            torch.testing.assert_close(one.log_p, wanted.log_p, rtol=1e-5, atol=2e-5)
    assert [i for i, one in enumerate(few) if one is not None] == list(range(2, len(texts), 5))
    values = {round(float(one.log_p.sum()), 3) for one in expected if len(one.log_p)}
    assert len(values) > len(texts) / 3


def reached(reading: Reading, acting: Any) -> bool:
    """Whether a steering of generated tokens finds some."""
    each = acting if isinstance(acting, list) else [] if acting is None else [acting]
    return reading.prompt < len(reading.tokens) or not any(
        scope.only_generated for one in each for scope in one.scopes
    )


def of_all(batches: Any, count: int) -> list[Any]:
    found: list[Any] = [None] * count
    for planned, some in batches:
        for place, one in zip(planned.rows, some, strict=True):
            found[place] = one
    return found


def test_work_in_turns_shares_the_batch(lm: tt.LanguageModel) -> None:
    """Whoever asks in turns is given nothing for a while, and all ask before the first step."""
    prompts = [prompt_reading(tokens) for tokens in lm.encode(PROMPTS)]
    steering = steer_at(lm, "resid")
    with tt.VLLM(lm, [steering]) as engine:
        works = [engine.next_tokens(prompts, one, in_turns=True) for one in (None, steering)]
        assert [next(work)[0].rows for work in works] == [(), ()]
        assert not StandIn.opened
        rows: list[int] = []
        while works:
            for work in list(works):
                given = next(work, None)
                if given is None:
                    works.remove(work)
                else:
                    rows += given[0].rows
        assert sorted(rows) == sorted([*range(5), *range(5)])
        # One that is left takes its requests along.
        left = engine.next_tokens(prompts, steering, in_turns=True)
        next(left), next(left)
        left.close()
        assert not StandIn.opened[0].waiting
        assert len(of_all(engine.next_tokens(prompts), 5)) == 5


def test_more_steerings_than_workers_hold(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queueing, "_HELD", 2)
    each = [steer_at(lm, "resid", seed=seed) for seed in range(5)]
    acting = [each[i % 5] for i in range(20)] + [[each[1], each[4]]]
    prompts = [PROMPTS[i % 3] for i in range(21)]
    expected = lm.generate(prompts, chat=False, max_new_tokens=4, steering=acting)
    with tt.VLLM(lm, each) as engine:
        found = engine.generate(prompts, chat=False, max_new_tokens=4, steering=acting)
    assert found == expected
    assert len(StandIn.opened[0].loads) > 5


def test_what_is_not_carried_is_refused(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer_at(lm, "resid", layer=1)
    gate = tt.Gate((steer_at(lm, "resid", layer=0).condition(),), kind="token")
    with pytest.raises(tt.TrimtabError, match="does not carry .* gate .* another stage"):
        tt.VLLM(lm, [steering.gated(gate)], pipeline_parallel_size=2)
    with pytest.raises(tt.TrimtabError, match="model is for trimtab|dtype is for trimtab"):
        tt.VLLM(lm, dtype="float32")
    with tt.VLLM(lm, [steering]) as engine:
        with pytest.raises(tt.TrimtabError, match="rule"):
            engine.generate(PROMPTS, steering=tt.within(steering, kl=0.1))
        with pytest.raises(tt.TrimtabError, match="does not take num_beams"):
            engine.generate(PROMPTS, num_beams=2)
        with pytest.raises(tt.TrimtabError, match="temperature"):
            engine.generate(PROMPTS, temperature=-1)
        with pytest.raises(tt.TrimtabError, match="do not go into"):
            engine.generate(["word " * 3000], chat=False)
        assert not StandIn.opened
        engine.generate(PROMPTS[:1], max_new_tokens=1)
        with pytest.raises(tt.TrimtabError, match="--hook ffn_out"):
            engine.generate(PROMPTS, steering=steer_at(lm, "ffn_out", layer=1))
        with pytest.raises(tt.TrimtabError, match="not finite"):
            engine.generate(PROMPTS, steering=steering.at(1e38))
    with pytest.raises(tt.TrimtabError, match="open another"):
        engine.generate(PROMPTS)


# -- trimtab generate --engine vllm ---------------------------------------------------------------

ENGINE = f"{GIVEN.replace(' --batch-size 2', '')} --input rows.jsonl --engine vllm"


def test_a_file_through_the_engine(trimtab: Command) -> None:
    rows = [*ROWS, {"prompt": "The sea", "steer": "caa.safetensors@1e38"}]
    write_rows("rows.jsonl", rows)
    assert trimtab(f"{GIVEN} --input rows.jsonl --output plain.jsonl").status == 2
    assert trimtab(f"{ENGINE} --output out.jsonl").status == 2  # of the row that overflows
    made, plain = (Path(name).read_text().splitlines() for name in ("out.jsonl", "plain.jsonl"))
    assert [json.loads(line).get("text") for line in made] == [
        json.loads(line).get("text") for line in plain
    ]
    assert made[:7] == plain[:7]
    assert "not finite" in json.loads(made[7])["error"]
    refused(trimtab(f"{ENGINE.replace('--engine vllm', '')} --output out.jsonl"), "engine")


def test_it_goes_on_after_an_interruption(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows("rows.jsonl", ROWS)
    trimtab(f"{ENGINE} --output whole.jsonl")
    steps = 0

    def step(self: StandIn, original: Any = StandIn.step) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "step", step)
        stopped = trimtab(f"{ENGINE} --output out.jsonl")
    assert (stopped.status, stopped.err) == (130, "trimtab: interrupted\n")
    assert 0 < len(Path("out.jsonl").read_text().splitlines()) < 7
    assert trimtab(f"{ENGINE} --output out.jsonl").status == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--batch-size 3", "--batch-size"),
        ("--option num_beams=2", "num_beams"),
        ("--device cuda", "places the model itself"),
        ("--vllm dtype=float16", "dtype"),
        ("--vllm steerings=2", "no such argument"),
        ("--vllm max_model_len=9", "line 1"),
    ],
)
def test_options_that_it_does_not_have(options: str, said: str, trimtab: Command) -> None:
    write_rows("rows.jsonl", ROWS)
    refused(trimtab(f"{ENGINE} --output out.jsonl {options}"), said)
    assert not Path("out.jsonl").exists()
    assert not StandIn.opened
