"""Contrasts by generation: what is asked and how it is sampled.

Sampling is compared with a loop of its own over a plain transformers model, fitting with sums over
activations that a plain hook reads.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from generated_texts import SHORT, lm, other, own_surroundings, roomy, texts_of
from helpers import language_model, read_sites, refused_in_one_line
from trimtab.errors import TrimtabWarning
from trimtab.writing import concepts
from trimtab.writing.concepts import CONCEPTS, generate_contrast, request
from trimtab.writing.writers import batch_seed

__all__ = ["lm", "other", "own_surroundings"]  # fixtures, which pytest finds by their names here


def sampled_by_hand(
    lm: tt.LanguageModel,
    ids: Sequence[int],
    rows: int,
    seed: int,
    new: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> list[str]:
    """The sampling that the paper describes: one forward pass a token, no cache, no end of text."""
    torch.manual_seed(seed)
    sequence = torch.tensor([list(ids)] * rows)
    for _ in range(new):
        with torch.no_grad():
            logits = lm.model(sequence, use_cache=False).logits[:, -1].float()
        logits[:, lm.model.generation_config.eos_token_id] = -torch.inf
        logits = logits / temperature
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        ordered, places = logits.softmax(-1).sort(descending=True)
        # A token stays while those before it have less than top_p together.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits[beyond.scatter(1, places, beyond)] = -torch.inf
        sequence = torch.cat([sequence, torch.multinomial(logits.softmax(-1), 1)], 1)
    decoded = lm.tokenizer.batch_decode(sequence[:, len(ids) :], skip_special_tokens=True)
    return [text.strip() for text in decoded]


# -- what is asked -------------------------------------------------------------------------------


def test_the_paper_has_eight_concepts() -> None:
    named = "apathetic depression evil humorous impolite joy lying optimistic"
    assert " ".join(CONCEPTS) == named


def test_the_request_is_the_papers() -> None:
    (system, about), (user, text) = request(" modest \n pride ")
    assert (system, about, user) == ("system", "You are an assistant.", "user")
    # Characters and the two ends, from the appendix; `{` would show a field that was not filled.
    assert text.startswith("Describe the concept: modest pride. Begin with a one-sentence def")
    assert "what you say or do — for example, if the concept is *lying*, give clearly" in text
    assert "(e.g., claiming impossible facts or events). Do not use third-person ref" in text
    assert text.endswith("as simple first-person sentences that fully embody the concept.")
    assert len(text) == len("modest pride") + 562
    assert "{" not in text
    assert "  " not in text


def test_braces_in_a_concept_stay() -> None:
    assert "the concept: a {b} c." in request("a {b} c")[1][1]


# -- how it is sampled ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_empty_negatives_are_sampled_from_one_bos(name: str) -> None:
    model = roomy(name)
    # So many tokens end a text that without care each would.
    model.model.generation_config.eos_token_id = [model.tokenizer.eos_token_id, *range(50, 300)]
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.7}
    contrast = generate_contrast(
        model, "joy", count=5, max_new_tokens=8, batch_size=3, seed=4, **options
    )
    bos = [model.tokenizer.bos_token_id]
    expected = []
    for number, rows in enumerate((3, 2)):
        seed = batch_seed(4, "negative", number)
        expected += sampled_by_hand(model, bos, rows, seed, 8, **options)
    assert texts_of(contrast, "negative") == expected


@pytest.mark.parametrize("negatives", ["empty", "contrastive"])
def test_the_writer_is_asked_through_its_template(
    negatives: Any, lm: tt.LanguageModel, other: tt.LanguageModel
) -> None:
    contrast = generate_contrast(
        lm, "joy", negatives=negatives, count=3, max_new_tokens=6, writer=other
    )
    protocol = (6, 0.9, 50, 0.95)  # the defaults
    for label, concept in (("positive", "joy"), ("negative", "the opposite of joy")):
        messages = [{"role": role, "content": text} for role, text in request(concept)]
        ids = other.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        writer = other
        if label == "negative" and negatives == "empty":
            writer, ids = lm, [lm.tokenizer.bos_token_id]
        expected = sampled_by_hand(writer, ids, 3, batch_seed(0, label, 0), *protocol)
        assert texts_of(contrast, label) == expected
    assert contrast.name == "generated:joy"


def test_without_a_writer_the_model_writes_itself(
    lm: tt.LanguageModel, other: tt.LanguageModel
) -> None:
    own = generate_contrast(lm, "joy", **SHORT)
    assert own == generate_contrast(lm, "joy", writer=lm, **SHORT)
    by_other = generate_contrast(lm, "joy", writer=other, **SHORT)
    assert texts_of(own, "negative") == texts_of(by_other, "negative")
    assert not set(texts_of(own, "positive")) & set(texts_of(by_other, "positive"))


def test_the_global_random_state_is_left_alone(lm: tt.LanguageModel) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = generate_contrast(lm, "joy", **SHORT)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert generate_contrast(lm, "joy", **SHORT) == first


def test_each_batch_and_each_seed_has_texts_of_its_own(lm: tt.LanguageModel) -> None:
    drawn = [
        texts_of(generate_contrast(lm, "joy", seed=seed, **SHORT), "negative") for seed in (0, 1)
    ]
    assert len({text for texts in drawn for text in texts}) == 10
    seeds = {
        batch_seed(s, label, n)
        for s in range(4)
        for label in ("positive", "negative")
        for n in range(50)
    }
    assert len(seeds) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)


class _Recorded(Exception):  # noqa: N818, it is a signal and no error
    pass


def test_the_defaults_are_the_papers(lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def generate(**options: Any) -> None:
        seen.update(options)
        raise _Recorded

    monkeypatch.setattr(lm.model, "generate", generate)
    with pytest.raises(_Recorded):
        generate_contrast(lm, "joy")
    settings = vars(seen["generation_config"])
    wanted = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95}
    rows, width = seen["input_ids"].shape
    wanted |= {"max_length": width + 300, "min_length": width + 300}
    assert {name: settings[name] for name in wanted} == wanted
    assert rows == 16


# -- models without this or that -----------------------------------------------------------------


def without(lm: tt.LanguageModel, **changed: Any) -> tt.LanguageModel:
    tokenizer = copy.deepcopy(lm.tokenizer)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return tt.wrap(lm.model, tokenizer, "bare")


def test_a_model_without_a_template_needs_a_writer(lm: tt.LanguageModel) -> None:
    bare = without(lm, chat_template=None)
    refused_in_one_line(lambda: generate_contrast(bare, "joy", **SHORT), "bare has no chat templ")
    refused_in_one_line(
        lambda: generate_contrast(lm, "joy", writer=bare, **SHORT), "bare has no chat templ"
    )
    contrast = generate_contrast(bare, "joy", writer=lm, **SHORT)
    assert contrast == generate_contrast(lm, "joy", **SHORT)


def test_a_template_without_a_system_message_is_named(lm: tt.LanguageModel) -> None:
    picky = without(lm, chat_template="{{ raise_exception('System role\nnot supported') }}")
    refused_in_one_line(
        lambda: generate_contrast(picky, "joy", **SHORT),
        r"template of bare refuses .*\(System role not supported\): give another writer",
    )


def test_a_tokenizer_without_bos_begins_as_the_model_does(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Qwen has it: the model's configuration names a token, the tokenizer does not.
    plain = without(lm, chat_template=None, bos_token=None)
    plain.tokenizer._tokenizer.post_processor = None
    contrast = generate_contrast(plain, "joy", writer=lm, **SHORT)
    assert contrast == generate_contrast(lm, "joy", **SHORT)
    monkeypatch.setattr(lm.model.config, "bos_token_id", None)
    from_eos = generate_contrast(plain, "joy", writer=lm, **SHORT)
    expected = sampled_by_hand(
        lm, [lm.tokenizer.eos_token_id], 2, batch_seed(0, "negative", 0), 6, 0.9, 50, 0.95
    )
    assert texts_of(from_eos, "negative")[:2] == expected
    plain.tokenizer.eos_token = None
    refused_in_one_line(
        lambda: generate_contrast(plain, "joy", writer=lm, **SHORT), "no token with which a text"
    )


def test_a_model_with_little_room_says_so() -> None:
    small = language_model("llama")  # 256 tokens; the request alone has more
    refused_in_one_line(lambda: generate_contrast(small, "joy", **SHORT), "exceed the 256 tokens")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"negatives": "random"}, "negatives 'random' is none of empty, contrastive"),
        ({"concept": " \n"}, "the concept is empty"),
        ({"count": 0}, "count must be 1 or more"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
        ({"batch_size": 0}, "must be 1 or more"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"writer": "gemma"}, "a writer is a LanguageModel or a ChatEndpoint, not 'gemma'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], says: str, lm: tt.LanguageModel, tmp_path: Path
) -> None:
    asked = {"concept": "joy", "output": tmp_path / "joy.jsonl"} | SHORT | options
    refused_in_one_line(lambda: generate_contrast(lm, asked.pop("concept"), **asked), says)
    assert not list(tmp_path.glob("joy*"))


# -- equal and empty texts -----------------------------------------------------------------------


def written(monkeypatch: pytest.MonkeyPatch, *batches: list[str]) -> list[int]:
    """What is written instead, batch by batch; the sizes that were asked for."""
    sizes: list[int] = []

    def write(side: Any, count: int, seed: int, sampling: Any) -> list[str]:
        sizes.append(count)
        texts = batches[min(len(sizes), len(batches)) - 1]
        assert len(texts) == count or len(sizes) > len(batches)
        return texts[:count]

    monkeypatch.setattr(concepts, "_write", write)
    return sizes


def test_equal_and_empty_texts_are_sampled_again(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = written(
        monkeypatch,
        *(["a b", " a\n b ", ""], ["c", "  "], ["\ta  b"], ["d"]),
        *(["e", "c", "f"], ["g"]),  # a text of the other side is not new either
    )
    contrast = generate_contrast(lm, "joy", count=3, batch_size=3)
    assert texts_of(contrast, "positive") == ["a b", "c", "d"]
    assert texts_of(contrast, "negative") == ["e", "f", "g"]
    assert sizes == [3, 2, 1, 1, 3, 1]


def test_too_few_new_texts_are_a_warning_with_their_number(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = written(
        monkeypatch, ["a", "b"], ["a", "b"], ["b", "a"], ["", "a"], ["c", "d"], ["e", "f"]
    )
    with pytest.warns(
        TrimtabWarning, match="only 2 of 4 positive texts by llama-0 are new"
    ) as all_:
        contrast = generate_contrast(lm, "joy", count=4, batch_size=2)
    assert sizes == [2] * 6  # four in vain, two for the other side
    assert [len(texts_of(contrast, label)) for label in ("positive", "negative")] == [2, 4]
    assert all_[0].filename == __file__


def test_sampling_again_has_an_end_though_some_are_new(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ["x"] * 9
    sizes = written(
        monkeypatch,
        ["x", *old],
        *([f"{i}", *old][: 9 - i] for i in range(4)),
        [f"other {i}" for i in range(10)],
    )
    with pytest.warns(TrimtabWarning, match="only 5 of 10 positive"):
        generate_contrast(lm, "joy", count=10, batch_size=10)
    # Forty samples are allowed; then it is the other side's turn.
    assert sizes[:6] == [10, 9, 8, 7, 6, 10]


def test_no_text_at_all_is_an_error(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written(monkeypatch, [" ", ""])
    refused_in_one_line(
        lambda: generate_contrast(lm, "joy", count=2, output=tmp_path / "joy.jsonl"),
        "0 of 2 positive texts by llama-0 are new and not empty: raise temperature",
    )
    assert not (tmp_path / "joy.jsonl").exists()


def test_texts_of_one_token_are_distinct(lm: tt.LanguageModel) -> None:
    # Of 60 one-token texts many are equal.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        contrast = generate_contrast(lm, "joy", count=20, max_new_tokens=1, batch_size=20)
    plain = [" ".join(str(row.text).split()) for row in contrast.texts]
    assert len(set(plain)) == len(plain)
    assert all(plain)


# -- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_steering_is_the_difference_of_the_mean_texts(name: str, tmp_path: Path) -> None:
    model, path = roomy(name), tmp_path / "joy.jsonl"
    generate_contrast(model, "joy", output=path, **SHORT)
    steering = tt.CAA(layer=1, token="mean").fit(model, tt.Contrast.from_jsonl(path))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    means = []
    for label in ("positive", "negative"):
        texts = [row["text"] for row in rows if row["label"] == label]
        # Over all tokens of a text, BOS among them; then over the texts.
        found = read_sites(model.model, "resid", texts, model.tokenizer)
        means.append(torch.stack([activations[1].mean(0) for activations in found]).mean(0))
    (intervention,) = steering.interventions
    assert intervention.site == "layers.1.resid"
    vector = intervention.operator.vector.double()  # type: ignore[union-attr]
    assert torch.allclose(vector, means[0] - means[1], atol=1e-6, rtol=1e-4)
    assert vector.norm() > 0.01


@pytest.mark.slow
def test_a_real_model_writes_what_it_is_asked_for(smollm2: Any) -> None:
    contrast = generate_contrast(smollm2, "joy", count=3, max_new_tokens=16, batch_size=3)
    positive = " ".join(texts_of(contrast, "positive")).lower()
    negative = " ".join(texts_of(contrast, "negative")).lower()
    assert positive.count("joy") > negative.count("joy")
    for text in (*texts_of(contrast, "positive"), *texts_of(contrast, "negative")):
        assert "<|im" not in text
