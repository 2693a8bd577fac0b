"""Packed, padded batches give every token the hidden state that it has in its text alone."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor

import trimtab as tt
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.reading.packing import Packed, batches, encode_contrast, encode_texts, model_inputs

PAIRS = [
    # Long enough to leave a window of 8 tokens, with sides of very different lengths.
    ("She looked at the map and asked where they were going.", " He said: I do not know.", " No."),
    ("The answer is", " yes", " no"),
    # One side's tokens are a prefix of the other's.
    ("Today I feel", " happy.", " happy. I love this film, it was wonderful."),
    ("What is the capital of France?", " It is Paris, as everybody knows.", " It is Paris"),
    ("Nothing more to say", "", ", and so nothing more was said."),
    # The prompt's last token merges with the answer's first letters.
    ("When the rain ca", "me, the children ran into the house", "n be heard, the king is old"),
    (
        "",
        "Sure, I love this film.",
        "I hate this film, and the actors were bad and boring and old.",
    ),
    (
        [{"role": "user", "content": "What is the best way to learn a language?"}],
        "Read, write, listen and speak every day.",
        "I cannot help you with that request.",
    ),
]
TEXTS = [prompt + answer for prompt, *answers in PAIRS[:6] for answer in answers]

#: Tiny models, and the windows and masks that they do not have by default.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY},
    "mistral, window": ("mistral", {"sliding_window": 6}),
    "phi3, window": ("phi3", {"sliding_window": 6}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "gemma2, eager": ("gemma2", {"attn_implementation": "eager"}),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
}


def _language_model(name: str) -> Any:
    architecture, overrides = MODELS[name]
    return tt.wrap(tiny_model(architecture, **overrides), tiny_tokenizer())


def _without_bos(language_model: Any) -> None:
    """The same tokenizer without BOS, like GPT-2's: two texts may then begin differently."""
    tokenizer = copy.deepcopy(language_model.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.bos_token = None
    language_model.tokenizer = tokenizer


def _alone(language_model: Any, tokens: Sequence[int]) -> Tensor:
    """Hidden states of one text through plain transformers: [layers + 1, tokens, hidden]."""
    model = language_model.model
    with torch.no_grad():
        output = model(torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
    return torch.stack(output.hidden_states)[:, 0]


def _packed(language_model: Any, rows: list[Packed], max_tokens: int) -> dict[int, list[Tensor]]:
    """Hidden states of each row's texts from packed batches: [layers + 1, tokens, hidden]."""
    states: dict[int, list[Tensor]] = {}
    for batch in batches(rows, max_tokens):
        with torch.no_grad():
            inputs = model_inputs(batch, language_model)
            output = language_model.anatomy.body(**inputs, output_hidden_states=True)
        hidden = torch.stack(output.hidden_states)  # [layers + 1, rows, columns, hidden]
        for i, row in enumerate(batch.rows):
            places = [side[side >= 0] for side in batch.place[i]]
            assert [batch.tokens[i, place].tolist() for place in places] == row.texts()
            states[row.index] = [hidden[:, i, place] for place in places]
    return states


def _plain_tokens(language_model: Any, prompt: Any, answer: str) -> list[int]:
    """A text's tokens by the tokenizer alone."""
    tokenizer = language_model.tokenizer
    if isinstance(prompt, str):
        return tokenizer(prompt + answer).input_ids
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + answer, add_special_tokens=False).input_ids


def _check_states(language_model: Any, rows: list[Packed], max_tokens: int) -> None:
    states = _packed(language_model, rows, max_tokens)
    assert sorted(states) == [row.index for row in rows]
    for row in rows:
        for found, tokens in zip(states[row.index], row.texts(), strict=True):
            expected = _alone(language_model, tokens)
            assert found.shape == expected.shape
            scale = expected.abs().max()
            assert (found - expected).abs().max() < 1e-5 * max(1, scale), row


# -- the same hidden states -------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("name", MODELS)
def test_pairs(name: str, bos: bool) -> None:
    language_model = _language_model(name)
    if not bos:
        _without_bos(language_model)
    rows = encode_contrast(language_model, Contrast.from_pairs(PAIRS), None)
    for row, (prompt, *answers) in zip(rows, PAIRS, strict=True):
        assert row.texts() == [_plain_tokens(language_model, prompt, a) for a in answers]
    # What this test is about is really there: sharing, padding, a side without tokens of its own,
    # a text longer than the window, and (without BOS) a pair that shares no token.
    assert all(row.common > 1 for row in rows[:6])
    assert any(0 in row.sides for row in rows)
    assert {row.common for row in rows} >= ({0} if not bos else set())
    assert len(next(batches(rows, 3000)).rows) == len(rows)
    assert max(len(text) for row in rows for text in row.texts()) > 25
    _check_states(language_model, rows, 3000)


@pytest.mark.parametrize("name", MODELS)
def test_single_texts(name: str) -> None:
    language_model = _language_model(name)
    rows = encode_texts(language_model, TEXTS)
    assert [row.texts() for row in rows] == [[tiny_tokenizer()(text).input_ids] for text in TEXTS]
    _check_states(language_model, rows, 1536)
    unpaired = Contrast.from_texts(TEXTS[::2], TEXTS[1::2])
    again = encode_contrast(language_model, unpaired, None)
    assert [row.tokens for row in again] == [
        rows[i].tokens for i in (*range(0, 12, 2), *range(1, 12, 2))
    ]


@pytest.mark.parametrize("max_tokens", [1, 40, 100, 10_000])
def test_any_batch_size(max_tokens: int) -> None:
    language_model = _language_model("gemma3")
    rows = encode_contrast(language_model, Contrast.from_pairs(PAIRS), None)
    sizes = [batch.tokens.shape for batch in batches(rows, max_tokens)]
    assert sum(size[0] for size in sizes) == len(rows)
    assert all(size[0] == 1 or size.numel() <= max_tokens for size in sizes)
    _check_states(language_model, rows, max_tokens)


def test_batches_hold_rows_of_similar_length() -> None:
    language_model = _language_model("llama")
    words = ["happy"] * 40
    texts = [" ".join(words[: i % 40 + 1]) for i in range(200)]
    random.Random(0).shuffle(texts)
    rows = encode_texts(language_model, texts)
    made = list(batches(rows, 4000))
    assert sorted(row.index for batch in made for row in batch.rows) == list(range(200))
    assert max(len(batch.rows) for batch in made) == 64
    padded = sum(batch.tokens.numel() for batch in made)
    assert sum(len(row.tokens) for row in rows) > 0.75 * padded
    # Longest first, so that a text too large for the memory shows at once.
    lengths = [batch.tokens.shape[1] for batch in made]
    assert lengths == sorted(lengths, reverse=True)


def test_sides_do_not_see_each_other() -> None:
    language_model = _language_model("llama")
    contrast = Contrast.from_pairs(PAIRS[:1])
    batch = next(batches(encode_contrast(language_model, contrast, None)))
    row = batch.rows[0]
    first = slice(row.common, row.common + row.sides[0])
    second = slice(row.common + row.sides[0], len(row.tokens))
    assert not batch.visible[0, second, first].any()
    assert not batch.visible[0, first, second].any()
    assert batch.visible[0, second, : row.common].all()
    assert batch.positions[0, first][0] == batch.positions[0, second][0] == row.common


# -- BOS --------------------------------------------------------------------------------------


def test_bos_is_never_doubled() -> None:
    language_model = _language_model("llama")
    bos = language_model.bos
    talk = [{"role": "user", "content": "Hello"}]
    pairs = [(talk, "Yes", "No"), ("Hello", " yes", " no"), ("<s>Hello", " yes", " no")]
    for row in encode_contrast(language_model, Contrast.from_pairs(pairs), None):
        for text in row.texts():
            assert text[0] == bos
            assert text.count(bos) == 1
    for row in encode_texts(language_model, [(("user", "Hello"),), "Hello", "<s>Hello"]):
        assert row.tokens.count(bos) == 1


# -- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_where_answers_begin(bos: bool) -> None:
    language_model = _language_model("llama")
    if not bos:
        _without_bos(language_model)
    for row, (prompt, *answers) in zip(
        encode_contrast(language_model, Contrast.from_pairs(PAIRS), None), PAIRS, strict=True
    ):
        start = _plain_tokens(language_model, prompt, "")
        for begin, text, answer in zip(row.answers, row.texts(), answers, strict=True):
            assert text[:begin] == start[:begin]
            rest = language_model.tokenizer.decode(text[begin:])
            # Where prompt and answer merge into one token, the answer begins with that token.
            assert rest.endswith(answer)
            assert rest == answer or begin != len(start)


# -- long texts -------------------------------------------------------------------------------

LONG = "The ship left the harbour in the morning, and the captain stood at the wheel. " * 3


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
def test_long_prompts_are_cut_on_the_left(bos: bool) -> None:
    language_model = _language_model("llama")
    if not bos:
        _without_bos(language_model)
    pairs = [
        (LONG + "The answer is", " yes, it is so.", " no"),
        ("Today I feel", " happy", " sad"),
        (LONG, "Yes.", "It is false that the sun goes around the earth."),
    ]
    limit = 32
    with pytest.warns(tt.TrimtabWarning, match=r"2 of 3 rows .*32 tokens.*left") as caught:
        rows = encode_contrast(language_model, Contrast.from_pairs(pairs, name="mine"), limit)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("mine")
    for row, (prompt, *answers) in zip(rows, pairs, strict=True):
        whole = [_plain_tokens(language_model, prompt, answer) for answer in answers]
        excess = max(0, max(map(len, whole)) - limit)
        kept = 1 if bos else 0
        assert row.texts() == [text[:kept] + text[kept + excess :] for text in whole]
        assert [text[0] == tiny_tokenizer().bos_token_id for text in row.texts()] == [bos, bos]
        for begin, text, answer in zip(row.answers, row.texts(), answers, strict=True):
            # A space before the answer may be one token with its first word.
            assert language_model.tokenizer.decode(text[begin:]).lstrip() == answer.lstrip()
    assert max(len(text) for row in rows for text in row.texts()) == limit
    _check_states(language_model, rows, 1536)


def test_long_single_texts_are_cut_on_the_left() -> None:
    language_model = _language_model("gpt2")
    contrast = Contrast.from_texts([LONG, "short"], ["shorter", LONG + "end"])
    with pytest.warns(tt.TrimtabWarning, match="2 of 4 rows"):
        rows = encode_contrast(language_model, contrast, 20)
    for row, text in zip(rows, [LONG, "short", "shorter", LONG + "end"], strict=True):
        whole = tiny_tokenizer()(text).input_ids
        expected = whole if len(whole) <= 20 else [whole[0], *whole[-19:]]
        assert row.texts() == [expected]
    _check_states(language_model, rows, 1536)


def test_nothing_is_said_where_all_fits() -> None:
    language_model = _language_model("llama")
    contrast = Contrast.from_pairs(PAIRS)
    longest = max(
        len(t) for r in encode_contrast(language_model, contrast, None) for t in r.texts()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_contrast(language_model, contrast, longest)
    with pytest.warns(tt.TrimtabWarning, match="1 of 8 rows"):
        encode_contrast(language_model, contrast, longest - 1)


@pytest.mark.parametrize(
    ("pair", "limit"),
    [
        (("Yes?", LONG, " no"), 30),
        (("Yes?", " yes", LONG), 30),
        ((LONG, " It is false that the sun goes around the earth.", " no"), 12),
        # No prompt, so nothing may be cut.
        (("", "It is false that the sun goes around the earth.", "No"), 12),
        # The answer and BOS fit, with no room for any of the prompt.
        ((LONG.strip(), " yes and yes and yes", " no"), 9),
    ],
)
def test_an_answer_that_does_not_fit_is_an_error(pair: tuple[str, str, str], limit: int) -> None:
    language_model = _language_model("llama")
    contrast = Contrast.from_pairs([("Today", "a", "b"), pair], name="mine")
    with pytest.raises(tt.TrimtabError, match=rf"^mine, row 2: the answer .* {limit} tokens"):
        encode_contrast(language_model, contrast, limit)


def test_one_token_of_the_prompt_is_enough() -> None:
    language_model = _language_model("llama")
    contrast = Contrast.from_pairs([(LONG.strip(), " yes and yes and yes", " no")])
    with pytest.warns(tt.TrimtabWarning, match="1 of 1 rows"):
        row = encode_contrast(language_model, contrast, 10)[0]
    positive = language_model.tokenizer(". yes and yes and yes").input_ids
    assert row.texts()[0] == positive
    assert (row.common, row.answers, len(positive)) == (2, (2, 2), 10)


def test_the_models_own_limit_holds() -> None:
    # GPT-2 has 256 learned positions and none beyond, whatever maximum the caller names.
    language_model = _language_model("gpt2")
    contrast = Contrast.from_pairs([(LONG * 3, " yes", " no")])
    for limit in (None, 256, 1000):
        with pytest.warns(tt.TrimtabWarning, match="1 of 1 rows are longer than 256 tokens"):
            rows = encode_contrast(language_model, contrast, limit)
        assert max(len(text) for text in rows[0].texts()) == 256
    _check_states(language_model, rows, 1536)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_of_no_tokens_is_an_error(limit: int) -> None:
    with pytest.raises(tt.TrimtabError, match=f"maximum length.*{limit}"):
        encode_contrast(_language_model("llama"), Contrast.from_pairs(PAIRS), limit)


def test_a_text_without_tokens_is_an_error() -> None:
    # Only a tokenizer that adds no BOS makes nothing of an empty text.
    language_model = _language_model("gpt2")
    _without_bos(language_model)
    empty = Contrast((*Contrast.from_pairs(PAIRS).pairs, tt.contrasts.Pair("", "", "no")), "mine")
    with pytest.raises(tt.TrimtabError, match=r"^mine, row 9: .*no tokens"):
        encode_contrast(language_model, empty, None)
