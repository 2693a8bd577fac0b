"""A model that sees images: what it writes and reads is what transformers alone makes of the same
messages, in batches with and without images, and under steerings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from seeing import (
    IMAGE_LENGTH,
    about,
    by_hand,
    inputs_alone,
    saved,
    seeing,
    seeing_processor,
    seeing_tokenizer,
    square,
)
from tiny import tiny_model, tiny_tokenizer
from trimtab.contrasts import Image
from trimtab.dials import Turning
from trimtab.evaluation.metrics.coherence import perplexities
from trimtab.fitting.activations import Want, collect
from trimtab.fitting.statistics import Means
from trimtab.model import ImageText, frozen
from trimtab.reading import (
    StreamCache,
    cross_entropy,
    log_odds,
    next_tokens,
    prompt_reading,
    run_lower,
    run_upper,
    side_readings,
)
from trimtab.steering import Add, Dial, Intervention, Scope, Steering

NEW = 6


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return seeing()


def messages() -> list[Any]:
    """With one image, none, two, and one again."""
    return [
        about("What is this? ", square("red")),
        [{"role": "user", "content": "Today I feel"}],
        about(square("green"), square("blue", (40, 10)), " She looked at the map and asked"),
        about(square("white"), "What is the answer?"),
    ]


def steering(
    lm: tt.LanguageModel, size: float = 4.0, layer: int = 1, scope: str = "all"
) -> Steering:
    generator = torch.Generator().manual_seed(3)
    vector = torch.randn(lm.anatomy.hidden_size, generator=generator)
    added = Intervention(f"layers.{layer}.resid", Add(vector), Scope.parse(scope))
    return Steering("test", {}, (added,), Dial("alpha", size, (-9.0, 9.0)), lm.identity)


def alone(lm: tt.LanguageModel, prompt: Any, layer: int | None = None, change: Any = None) -> Any:
    """Greedy tokens, by transformers and perhaps a plain hook."""
    given = inputs_alone(prompt)
    width = given["input_ids"].shape[1]
    if layer is None:
        written = lm.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    else:
        with by_hand(lm.model, layer, change):
            written = lm.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    return tuple(written[0, width:].tolist())


def plain_logits(lm: tt.LanguageModel, prompt: Any, after: str = "") -> Tensor:
    with torch.no_grad():
        logits: Tensor = lm.model(**inputs_alone(prompt, after), use_cache=False).logits[0]
    return logits


# -- generating -----------------------------------------------------------------------------------


def test_a_batch_writes_what_each_writes_alone(lm: tt.LanguageModel) -> None:
    found = lm.generate(messages(), max_new_tokens=NEW)
    expected = [alone(lm, prompt) for prompt in messages()]
    assert [completion.tokens for completion in found] == expected
    assert len(set(expected)) == len(expected)  # images and texts make a difference


def test_another_image_another_text(lm: tt.LanguageModel) -> None:
    prompts = [about("What is this? ", square(colour)) for colour in ("red", "green", "blue")]
    texts = [completion.tokens for completion in lm.generate(prompts, max_new_tokens=NEW)]
    assert len(set(texts)) == 3


def test_streams_and_samples(lm: tt.LanguageModel) -> None:
    prompt = messages()[0]
    (whole,) = lm.generate([prompt], max_new_tokens=NEW)
    assert "".join(lm.stream(prompt, max_new_tokens=NEW)) == whole.text
    drawn = [
        lm.generate([prompt] * 2, max_new_tokens=NEW, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    tokens = [[completion.tokens for completion in run] for run in drawn]
    assert tokens[0] == tokens[1] != tokens[2]
    beams = lm.generate([prompt], max_new_tokens=3, num_beams=3)[0].tokens
    given = inputs_alone(prompt)
    by_hand = lm.model.generate(**given, max_new_tokens=3, num_beams=3, do_sample=False)
    assert beams == tuple(by_hand[0, given["input_ids"].shape[1] :].tolist())


def test_a_prompt_is_as_long_as_its_images_are(lm: tt.LanguageModel) -> None:
    (found,) = lm.encode([(("user", ("What? ", *_read(lm, square("red")))),)])
    assert isinstance(found, ImageText)
    assert found.count(seeing_tokenizer().image_token_id) == IMAGE_LENGTH
    assert list(found) == inputs_alone(about("What? ", square("red")))["input_ids"][0].tolist()


def _read(lm: tt.LanguageModel, image: Any) -> tuple[Image, ...]:
    ((_, content),) = lm.prompts([about(image)], True)[0]
    return tuple(piece for piece in content if isinstance(piece, Image))


@pytest.mark.parametrize("at", ["last", "all"])
def test_logits_are_those_of_transformers(lm: tt.LanguageModel, at: Any) -> None:
    found = lm.logits(messages(), at=at)
    for prompt, logits in zip(messages(), found, strict=True):
        expected = plain_logits(lm, prompt)
        expected = expected[-1] if at == "last" else expected
        assert torch.allclose(logits, expected, atol=1e-4)


def test_half_precision_takes_images_too() -> None:
    own = seeing()
    half = tt.wrap(own.model.to(torch.bfloat16), seeing_processor())
    prompt = messages()[0]
    given = inputs_alone(prompt)
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        expected = half.model(**given, use_cache=False).logits[0, -1].float()
    assert torch.equal(half.logits([prompt])[0], expected)


# -- steered --------------------------------------------------------------------------------------


def test_a_steering_acts_on_images_as_a_plain_hook_does(lm: tt.LanguageModel) -> None:
    one = steering(lm)
    added = 4.0 * one.interventions[0].operator.added  # type: ignore[operator]
    found = lm.generate(messages(), max_new_tokens=NEW, steering=one)
    for prompt, completion in zip(messages(), found, strict=True):
        expected = alone(lm, prompt, 1, lambda hidden, ids: hidden + added)
        assert completion.tokens == expected
        assert expected != alone(lm, prompt)


def test_each_row_has_its_own_steering(lm: tt.LanguageModel) -> None:
    one, other = steering(lm), steering(lm, -3.0, layer=0)
    rows = [one, None, other, one]
    found = lm.generate(messages(), max_new_tokens=NEW, steering=rows)
    for prompt, row, completion in zip(messages(), rows, found, strict=True):
        (expected,) = lm.generate([prompt], max_new_tokens=NEW, steering=row)
        assert completion.tokens == expected.tokens


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_positions_count_the_tokens_of_images(lm: tt.LanguageModel, positions: Any) -> None:
    one = steering(lm, scope=positions)
    added = 4.0 * one.interventions[0].operator.added  # type: ignore[operator]
    for prompt in messages():
        end = inputs_alone(prompt)["input_ids"].shape[1]
        seen = 0

        def change(hidden: Tensor, ids: Tensor) -> Tensor:
            nonlocal seen
            place = torch.arange(seen, seen + hidden.shape[1])
            seen += hidden.shape[1]
            here = {"prompt": place < end, "generated": place >= end, "last": place >= end - 1}
            return torch.where(here[positions][:, None], hidden + added, hidden)

        (found,) = lm.generate([prompt], max_new_tokens=NEW, steering=one)
        assert found.tokens == alone(lm, prompt, 1, change)
    batch = lm.generate(messages(), max_new_tokens=NEW, steering=one)
    singly = [lm.generate([p], max_new_tokens=NEW, steering=one)[0] for p in messages()]
    assert [x.tokens for x in batch] == [x.tokens for x in singly]


def test_a_raw_call_of_the_model_is_steered_at_positions_too(lm: tt.LanguageModel) -> None:
    """The whole model hands on embeddings and masks of its own, which say neither where texts end
    nor which tokens they are."""
    one = steering(lm, scope="last")
    given = inputs_alone(messages()[0])
    with lm.steered(one), torch.no_grad():
        found = lm.model(**given).logits[0, -1]
    assert torch.allclose(found, lm.logits([messages()[0]], steering=one)[0], atol=1e-4)


def test_a_budget_is_kept_on_images(lm: tt.LanguageModel) -> None:
    prompts = [messages()[0], messages()[2]]
    one = steering(lm)
    base = lm.logits(prompts).double().log_softmax(-1)
    found = lm.generate(prompts, max_new_tokens=1, steering=tt.within(one, kl=0.1))
    dials = [float(completion.steering[0].partition("=")[2]) for completion in found]
    assert dials[0] != dials[1]
    for i, dial in enumerate(dials):
        steered = lm.logits([prompts[i]], steering=one.at(dial)).double().log_softmax(-1)[0]
        kl = float((base[i].exp() * (base[i] - steered)).sum())
        assert kl == pytest.approx(0.1, rel=0.05)


# -- reading --------------------------------------------------------------------------------------


def contrast(folder: Path) -> tt.Contrast:
    red, green, blue, white = saved(folder)
    return tt.Contrast.from_pairs(
        [
            (about("What is this? ", red), " good.", " a bad one"),
            (about(green, blue, "The answer is"), " yes", " no, it was not"),
            ("Today I feel", " happy.", " sad."),
            (about(white, " Today I feel"), " happy and strong", " sad"),
        ]
    )


def sides(pair: Any) -> list[tuple[Any, str, dict[str, Tensor]]]:
    return [
        (pair.prompt, answer, _inputs(pair.prompt, answer))
        for answer in (pair.positive, pair.negative)
    ]


def _inputs(prompt: Any, answer: str) -> dict[str, Tensor]:
    if isinstance(prompt, str):
        return dict(seeing_tokenizer()([prompt + answer], return_tensors="pt"))
    raw = [
        {
            "role": role,
            "content": [
                {"type": "image", "image": piece.path}
                if isinstance(piece, Image)
                else {"type": "text", "text": piece}
                for piece in content
            ],
        }
        for role, content in prompt
    ]
    return inputs_alone(raw, answer)


@pytest.mark.parametrize("token", ["last", "mean", "answer", -2])
def test_activations_are_those_of_each_side_alone(
    lm: tt.LanguageModel, tmp_path: Path, token: Any
) -> None:
    pairs = contrast(tmp_path)
    want = Want("layers.1.resid", token, Means)
    found = collect(lm, pairs, [want], cache=tmp_path / "cache")[want]
    total = [torch.zeros(lm.anatomy.hidden_size, dtype=torch.float64) for _ in range(2)]
    for pair in pairs.pairs:
        for side, (prompt, _, given) in enumerate(sides(pair)):
            states = _hidden(lm, given)
            start = _inputs(prompt, "")["input_ids"].shape[1]
            taken = {"last": states[-1:], "mean": states, "answer": states[start:]}
            chosen = states[-2:-1] if token == -2 else taken[token]
            total[side] += chosen.double().mean(0) / len(pairs)
    assert torch.allclose(found.positive.double(), total[0], atol=1e-4)
    assert torch.allclose(found.negative.double(), total[1], atol=1e-4)
    again = collect(lm, pairs, [want], cache=tmp_path / "cache")[want]  # from the files
    assert torch.equal(again.positive, found.positive)


def _hidden(lm: tt.LanguageModel, given: dict[str, Tensor]) -> Tensor:
    """The output of block 1, [tokens, units], by transformers."""
    given = {**given}
    with torch.no_grad():
        states = lm.model(**given, output_hidden_states=True, use_cache=False).hidden_states
    found: Tensor = states[2][0]
    return found


def test_log_odds_are_those_of_each_side_alone(lm: tt.LanguageModel, tmp_path: Path) -> None:
    pairs = contrast(tmp_path)
    expected = []
    for pair in pairs.pairs:
        scores = []
        for prompt, _, given in sides(pair):
            start = _inputs(prompt, "")["input_ids"].shape[1]
            with torch.no_grad():
                log_p = lm.model(**given, use_cache=False).logits[0].double().log_softmax(-1)
            ids = given["input_ids"][0]
            places = torch.arange(start - 1, len(ids) - 1)
            scores.append(log_p[places, ids[start:]].sum())
        expected.append(float(scores[0] - scores[1]))
    assert log_odds(lm, pairs).tolist() == pytest.approx(expected, abs=1e-3)
    readings = side_readings(lm, pairs)
    scored = torch.zeros(len(readings), dtype=torch.float64)
    for batch, found in next_tokens(lm, readings):
        for i, one in zip(batch.rows, found, strict=True):
            scored[i] = one.log_p.sum()
    assert (scored[0::2] - scored[1::2]).tolist() == pytest.approx(expected, abs=1e-3)


def test_log_odds_with_a_steering_for_each_pair(lm: tt.LanguageModel, tmp_path: Path) -> None:
    pairs, one = contrast(tmp_path), steering(lm)
    rows = [one, None, one.at(1), one.at(-2)]
    found = log_odds(lm, pairs, rows)
    for i, row in enumerate(rows):
        single = tt.Contrast((pairs.pairs[i],))
        assert float(found[i]) == pytest.approx(float(log_odds(lm, single, row)[0]), abs=1e-4)


def test_unpaired_texts_with_images(lm: tt.LanguageModel, tmp_path: Path) -> None:
    red, green, *_ = saved(tmp_path)
    texts = tt.Contrast.from_texts([about("What? ", red), "It is good"], [about("What? ", green)])
    found = collect(lm, texts, [want := Want("layers.1.resid", "last", Means)])[want]
    by_hand = _hidden(lm, inputs_alone(about("What? ", green)))[-1]
    assert torch.allclose(found.negative.float(), by_hand, atol=1e-4)
    nll, counts = cross_entropy(lm, [text.text for text in texts.texts])
    logits = plain_logits(lm, about("What? ", red)).double().log_softmax(-1)
    ids = inputs_alone(about("What? ", red))["input_ids"][0]
    expected = -logits[:-1].gather(-1, ids[1:, None]).mean()
    assert float(nll[0]) == pytest.approx(float(expected), abs=1e-3)
    assert int(counts[0]) == len(ids) - 1


def test_blocks_below_run_once(lm: tt.LanguageModel) -> None:
    """What is kept of the blocks below is kept by what images hold."""
    one = steering(lm)
    texts = [
        frozen(tokens)
        for tokens in lm.encode(lm.prompts([about("What? ", square(c)) for c in COLOURS_2], True))
    ]
    assert tuple(texts[0]) == tuple(texts[1])  # the same ids, other images
    assert texts[0] != texts[1]
    kept = StreamCache(lm)
    readings = [prompt_reading(text) for text in texts]
    for dial in (1.0, 4.0):
        best = [torch.zeros(1)] * len(texts)
        for batch, found in next_tokens(lm, readings, one.at(dial), kept=kept):
            for i, each in zip(batch.rows, found, strict=True):
                best[i] = each.best
        prompts = [about("What? ", square(c)) for c in COLOURS_2]
        expected = lm.logits(prompts, steering=one.at(dial)).argmax(-1)
        assert torch.cat(best).tolist() == expected.tolist()
    for blocks in (1, 2):
        streams = run_lower(lm, texts, blocks)
        hidden = run_upper(lm, texts, streams, blocks)
        whole = run_upper(lm, texts, [], 0)
        assert torch.allclose(hidden, whole, atol=1e-4)


COLOURS_2 = ("red", "blue")


def test_a_dial_is_turned_on_texts_with_and_without_images(lm: tt.LanguageModel) -> None:
    one = steering(lm)
    tokens = lm.fitting(lm.prompts(messages(), True))
    turning = Turning(lm, one, tokens)
    places = list(range(len(tokens)))
    base = lm.logits(messages()).log_softmax(-1)
    assert torch.allclose(turning.base, base, atol=1e-4)
    found: dict[int, Tensor] = {}
    for some, log_p in turning.log_p(places, [2.0] * len(places)):
        found |= dict(zip(some, log_p, strict=True))
    expected = lm.logits(messages(), steering=one.at(2)).log_softmax(-1)
    assert torch.allclose(torch.stack([found[i] for i in places]), expected, atol=1e-4)


def test_a_steering_is_fitted_and_measured_on_images(
    lm: tt.LanguageModel, tmp_path: Path, measuring: None
) -> None:
    pairs = contrast(tmp_path)
    fitted = tt.CAA(layer=1, token="last").fit(lm, pairs)
    difference = torch.zeros(lm.anatomy.hidden_size, dtype=torch.float64)
    for pair in pairs.pairs:
        first, second = (_hidden(lm, given)[-1].double() for _, _, given in sides(pair))
        difference += (first - second) / len(pairs)
    added = fitted.interventions[0].operator.added
    assert added is not None
    cosine = torch.cosine_similarity(added.double(), difference, dim=0)
    assert float(cosine) > 0.9999
    assert fitted.calibration is not None
    assert fitted.contrast["digest"] == pairs.digest
    gained = log_odds(lm, pairs, fitted.at("strong")) - log_odds(lm, pairs)
    assert float(gained.mean()) > 0


def test_perplexity_of_what_was_written_after_images(lm: tt.LanguageModel) -> None:
    prompts = lm.prompts(messages(), True)
    written = [one.tokens for one in lm.generate(messages(), max_new_tokens=NEW)]
    found = perplexities(lm, prompts, written)
    for prompt, tokens, one in zip(messages(), written, found, strict=True):
        given = inputs_alone(prompt)
        start = given["input_ids"].shape[1]
        more = torch.tensor([tokens])
        for name, value in (("input_ids", more), ("attention_mask", torch.ones_like(more))):
            given[name] = torch.cat([given[name], value], 1)
        if "token_type_ids" in given:
            given["token_type_ids"] = torch.cat([given["token_type_ids"], 0 * more], 1)
        with torch.no_grad():
            log_p = lm.model(**given, use_cache=False).logits[0].double().log_softmax(-1)
        scored = log_p[start - 1 : -1].gather(-1, more[0, :, None])
        assert one == pytest.approx(float((-scored.mean()).exp()), rel=1e-4)


def test_a_task_of_prompts_and_a_contrast_are_evaluated(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    saved(tmp_path)
    rows = [{"prompt": about("What? ", "red.png")}, {"prompt": "Today I feel"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    tt.evaluate(lm, [f"refusal:{file}"], output=run, max_new_tokens=NEW)
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    expected = lm.generate([about("What? ", square("red")), "Today I feel"], max_new_tokens=NEW)
    by_index = {record["index"]: record["output"] for record in records}
    assert [by_index[0], by_index[1]] == [one.text for one in expected]
    pairs = tmp_path / "pairs.jsonl"
    contrast(tmp_path).to_jsonl(pairs)
    found = tt.evaluate(lm, [f"contrast:{pairs}"], part="train")
    (value,) = (one.value for one in found.results if one.metric == "log_odds")
    assert value == pytest.approx(float(log_odds(lm, contrast(tmp_path)).mean()), abs=1e-3)


# -- what is refused ------------------------------------------------------------------------------


def test_a_model_without_a_processor_takes_no_images(lm: tt.LanguageModel) -> None:
    text = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "tiny-llama")
    bare = tt.wrap(lm.model, seeing_tokenizer(), "bare")
    assert text.processor is None
    for one in (text, bare):
        with pytest.raises(tt.TrimtabError, match="takes no images: it has no image processor"):
            one.generate([messages()[0]])


def test_image_tokens_without_an_image_are_refused(lm: tt.LanguageModel) -> None:
    for run in (
        lambda: lm.generate(["What is <img>?"], chat=False),
        lambda: lm.logits(["What is <img>?"]),
        lambda: tt.cross_entropy(lm, ["What is <img>?"]),
        lambda: log_odds(lm, tt.Contrast.from_pairs([("<img>", " a", " b")])),
    ):
        with pytest.raises(tt.TrimtabError, match="stand for an image") as caught:
            run()
        assert "\n" not in str(caught.value)


def test_what_processor_and_template_refuse_is_one_line(lm: tt.LanguageModel) -> None:
    with pytest.raises(tt.TrimtabError, match="the processor of see refuses .image 24x20"):
        lm.generate([about("One <boi> too many", square("red"))])
    tokenizer = copy.copy(seeing_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    blind = tt.wrap(lm.model, tokenizer, "blind", processor=seeing_processor())
    with pytest.raises(tt.TrimtabError, match="blind") as caught:
        blind.generate([messages()[0]])
    assert "\n" not in str(caught.value)


def test_a_text_with_images_is_never_cut(lm: tt.LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(tt.TrimtabError, match="row 2: its text and images have .. tokens, and 30"):
        tt.CAA(layer=1).fit(lm, contrast(tmp_path), max_length=30)
    (text,) = lm.encode(lm.prompts([messages()[0]], True))
    assert text[:] == text
    assert text[:0] == ()
    with pytest.raises(tt.TrimtabError, match="cannot be read in part"):
        text[:-1]
