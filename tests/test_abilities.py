"""Clever ways of running a model are taken where they give what each text alone does.

The oracle is each text by itself, in plain transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from helpers import PROMPTS, few_quick, operator, refused_in_one_line, relative, steer, token_ids
from plain_sites import plain_capture, plain_edit, plain_sites
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab.contrasts import Contrast
from trimtab.fitting import Means, SignCounts, Want, collect
from trimtab.reading import Reading, StreamCache, next_tokens
from trimtab.reading.abilities import check_reads, packs, runs_in_parts, shares_prefixes
from trimtab.reading.likelihood import log_odds

PAIRS = [
    ("She looked at the map and asked where they were going.", " He said: I do not know.", " No."),
    ("The answer is", " yes", " no"),
    ("Today I feel", " happy.", " happy. I love this film, it was wonderful."),
    ("What is the capital of France?", " It is Paris, as everybody knows.", " It is Paris"),
    ("", "Sure, I love this film.", "I hate this film, and the actors were bad and boring."),
]

#: State-space layers, linear attention and convolutions carry a state from one side of a row to the
#: other; and several tokens on top of a state begin it anew in transformers.
STATES = {
    "falcon_h1",
    "granitemoehybrid",
    "granitemoehybrid_dense",
    "lfm2",
    "nemotron_h",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_wrapper",
    "qwen3_next",
}
#: ALiBi counts columns, and masks of four dimensions are none of it.
COLUMNS = {"bloom"}
#: The last layers read keys and values of layers below, which have to run along.
SHARED_KEYS = {"gemma4", "gemma4_wrapper"}

#: Those on which whole fits and figures are compared with loops.
CHECKED = (
    "qwen3_next",
    "falcon_h1",
    "lfm2",
    "nemotron_h",
    "granitemoehybrid",
    "bloom",
    "gemma4",
    "gpt_oss",
    "opt",
)


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return (tiny_model if name in TINY else curated_model)(name, dtype=dtype)


@cache
def _lm(name: str, dtype: torch.dtype = torch.float32) -> tt.LanguageModel:
    lm = tt.wrap(_model(name, dtype), tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    return lm


# -- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*TINY, *CURATED])
def test_each_model_answers_as_its_layers_say(name: str, dtype: torch.dtype) -> None:
    lm = _lm(name, dtype)
    every = range(1, lm.anatomy.layers)
    assert packs(lm) == (name not in STATES | COLUMNS)
    parts = [runs_in_parts(lm, blocks) for blocks in every]
    assert parts == [name not in SHARED_KEYS] * len(every)
    assert shares_prefixes(lm) == (name not in STATES)
    shares = [shares_prefixes(lm, blocks) for blocks in every]
    assert shares == [name not in STATES | SHARED_KEYS] * len(every)
    assert lm.pads("logits")
    assert lm.pads("generate")
    check_reads(lm)


@contextmanager
def _passes(lm: tt.LanguageModel) -> Iterator[list[int]]:
    """How many tokens each pass of the body has."""
    sizes: list[int] = []
    handle = lm.anatomy.body.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield sizes
    finally:
        handle.remove()


def test_each_question_is_asked_once_and_only_where_it_matters() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer())
    again = tt.wrap(lm.model, tiny_tokenizer())
    with _passes(lm) as sizes:
        lm.logits(PROMPTS[:1])
        lm.generate(PROMPTS[:1], max_new_tokens=1)
        assert len(sizes) == 2
        sizes.clear()
        assert packs(lm)
        asked = len(sizes)
        assert asked <= 6
        assert max(sizes) < 40
        assert packs(lm)
        assert packs(again)
        assert len(sizes) == asked


def test_models_of_one_configuration_are_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trimtab.anatomy.knowing.cache_dir", lambda: tmp_path)
    monkeypatch.setattr("trimtab.model.questions._ANSWERS", {})
    assert packs(tt.wrap(tiny_model("llama"), tiny_tokenizer()))
    assert not packs(tt.wrap(curated_model("bloom"), tiny_tokenizer()))
    monkeypatch.setattr("trimtab.reading.abilities.run_packed", lambda *a: pytest.fail("again"))
    for _ in range(2):
        assert packs(tt.wrap(tiny_model("llama", seed=1), tiny_tokenizer()))
        assert not packs(tt.wrap(curated_model("bloom", seed=1), tiny_tokenizer()))
        monkeypatch.setattr("trimtab.model.questions._ANSWERS", {})  # as in the next program
    # What somebody has put on a model may change it, and a file may hold anything.
    hooked = tt.wrap(tiny_model("llama"), tiny_tokenizer())
    hooked.model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1)
    with pytest.raises(pytest.fail.Exception):
        packs(hooked)
    for file in tmp_path.rglob("*.json"):
        file.write_text("{}x")
    monkeypatch.setattr("trimtab.model.questions._ANSWERS", {})
    with pytest.raises(pytest.fail.Exception):
        packs(tt.wrap(tiny_model("llama"), tiny_tokenizer()))


class _LeaksFar(nn.Module):
    """Adds to each token what stood so many columns before it, whatever the mask says."""

    def __init__(self, block: nn.Module, columns: int) -> None:
        super().__init__()
        self.block, self.columns = block, columns

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.block(x, *args, **kwargs)
        before = torch.zeros_like(x)
        before[:, self.columns :] = x[:, : -self.columns]
        return y + 0.3 * before


def test_a_model_that_reads_columns_does_not_pack() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer())
    lm.model.model.layers[1] = _LeaksFar(lm.model.model.layers[1], 3)
    # The list of blocks was taken before: it is the wrapped block that runs.
    lm.anatomy.blocks[1] = lm.model.model.layers[1]
    assert not packs(lm)


def test_a_window_that_packed_rows_do_not_know_is_no_packing() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer())
    lm.model.config.window_size = 256
    assert not packs(lm)


def test_windows_are_what_they_were_after_a_question() -> None:
    lm = tt.wrap(tiny_model("gemma3"), tiny_tokenizer())
    before = lm.model.config.sliding_window
    assert packs(lm)
    assert runs_in_parts(lm, 2)
    assert shares_prefixes(lm, 2)
    assert lm.model.config.sliding_window == before


def test_a_model_whose_rows_depend_on_each_other_is_refused() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "mixed")
    lm.model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + output.flip(0) if len(output) > 1 else output
    )
    refused_in_one_line(lambda: check_reads(lm), "texts cannot be read with mixed")


def test_a_steered_model_answers_as_the_plain_one() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer())
    add = operator("Add", lm.anatomy.width("layers.1.ffn_out"))
    with lm.steered(steer(lm, ("layers.1.ffn_out", add), positions="last")):
        assert packs(lm)
        assert lm.pads("generate")
        lm.logits(PROMPTS)


# -- fits equal a loop over single texts ------------------------------------------------------


def _read(name: str, site: str, texts: Sequence[str], token: str) -> Tensor:
    """Activations of each text by itself at a site, [texts, units] in float64."""
    found = []
    for text in texts:
        every = plain_capture(_lm(name).model, name, token_ids(text))[site].double()
        found.append(every[-1] if token == "last" else every.mean(0))
    return torch.stack(found)


def _sides(name: str, site: str, token: str) -> tuple[Tensor, Tensor]:
    return (
        _read(name, site, [prompt + answer for prompt, answer, _ in PAIRS], token),
        _read(name, site, [prompt + answer for prompt, _, answer in PAIRS], token),
    )


def _last(name: str, kind: str) -> tuple[str, int]:
    """The last site of a kind, and its layer."""
    site = [site for site in plain_sites(name) if site.endswith(f".{kind}")][-1]
    return site, int(site.split(".")[1])


def _contrast() -> Contrast:
    return Contrast.from_pairs(PAIRS, "mine")


@pytest.mark.parametrize("token", ["last", "mean"])
@pytest.mark.parametrize("name", CHECKED)
def test_caa_equals_a_loop(name: str, token: Any) -> None:
    site, layer = _last(name, "resid")
    vector = tt.CAA(layer=layer, token=token).fit(_lm(name), _contrast()).interventions[0]
    positive, negative = _sides(name, site, token)
    assert vector.site == site
    assert relative(vector.operator.vector, (positive - negative).mean(0)) < 1e-4  # type: ignore[union-attr]


#: Blocks with a branch without a site of its own: not all that writes the stream can be ablated.
UNNAMED_WRITERS = ("falcon_h1", "granitemoehybrid", "gemma4")


@pytest.mark.parametrize("name", [name for name in CHECKED if name not in UNNAMED_WRITERS])
def test_ablation_equals_a_loop(name: str) -> None:
    fitted = tt.Ablation(layer=2, tokens=(-1,)).fit(_lm(name), _contrast())
    positive, negative = _sides(name, "layers.1.resid", "last")
    expected = torch.nn.functional.normalize((positive - negative).mean(0), dim=0)
    found: Any = fitted.interventions[0].operator
    assert float((found.direction.double() @ expected).abs()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["heads", "ffn_in"])
@pytest.mark.parametrize("name", CHECKED)
def test_statistics_of_iti_and_austeer_equal_a_loop(name: str, kind: str) -> None:
    site, _ = _last(name, kind)
    positive, negative = _sides(name, site, "last")
    wants = [Want(site, "last", statistic) for statistic in (Means, SignCounts)]
    means, signs = collect(_lm(name), _contrast(), wants).values()
    assert relative(means.positive, positive.mean(0)) < 1e-4
    assert relative(means.negative, negative.mean(0)) < 1e-4
    telling = ((positive - negative).abs() > 1e-4 * positive.abs().max()).all(0)
    assert telling.any()
    larger = (positive > negative).sum(0)
    assert torch.equal(signs.larger[telling].long(), larger[telling])
    method: Any = tt.ITI(k=2) if kind == "heads" else tt.AUSteer(k=2, site="ffn_in")
    assert method.fit(_lm(name), _contrast()).interventions


# -- figures equal plain loops ----------------------------------------------------------------


def _steering(name: str) -> tt.Steering:
    site, _ = _last(name, "attn_out")
    made = operator("Add", _lm(name).anatomy.width(site), seed=1)
    return replace(steer(_lm(name), (site, made)), value=1.5)


def _log_p(name: str, ids: Sequence[int], steering: tt.Steering | None) -> Tensor:
    """The log-distribution after each token of one text, from plain hooks."""

    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = _lm(name).model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits.double().log_softmax(-1)

    if steering is None:
        return run()
    (one,) = steering.interventions
    vector: Any = one.operator
    change: Callable[[Tensor], Tensor] = lambda x: x + steering.setting * vector.vector  # noqa: E731
    with plain_edit(_lm(name).model, name, one.site, change):
        return run()


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("name", CHECKED)
def test_log_odds_equal_plain_loops(name: str, steered: bool) -> None:
    steering, pairs = _steering(name) if steered else None, PAIRS[:4]
    found = log_odds(_lm(name), Contrast.from_pairs(pairs, "mine"), steering)
    for (prompt, *answers), value in zip(pairs, found.tolist(), strict=True):
        start = len(token_ids(prompt))
        sums = []
        for answer in answers:
            ids = token_ids(prompt + answer)
            log_p = _log_p(name, ids, steering)
            sums.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
        assert value == pytest.approx(sums[0] - sums[1], abs=1e-3)


@pytest.mark.parametrize("name", CHECKED)
def test_next_tokens_equal_plain_loops_also_with_what_is_kept(name: str) -> None:
    lm, steering = _lm(name), _steering(name)
    beginning = token_ids(" ".join(PROMPTS))
    texts = [beginning + token_ids(prompt) for prompt in PROMPTS] + [token_ids(PROMPTS[0])]
    readings = [Reading(tuple(ids), (len(ids) - 2,), len(ids), (ids[-1],)) for ids in texts]
    kept = StreamCache(lm)
    for turned in (steering, replace(steering, value=-1.0)):
        for batch, scored in list(next_tokens(lm, readings, turned, kept=kept)):
            for i, each in zip(batch.rows, scored, strict=True):
                log_p = _log_p(name, texts[i], turned)[-2, texts[i][-1]]
                assert float(each.log_p[0]) == pytest.approx(float(log_p), abs=1e-3)


# -- padded batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURATED)
def test_padded_batches_equal_single_texts(name: str) -> None:
    lm = _lm(name)
    for prompt, logits in zip(PROMPTS, lm.logits(PROMPTS, at="all"), strict=True):
        assert (
            relative(logits.double().log_softmax(-1), _log_p(name, token_ids(prompt), None)) < 1e-4
        )
    together = lm.generate(PROMPTS, max_new_tokens=4)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        (alone,) = lm.generate([prompt], max_new_tokens=4)
        assert completion.tokens == alone.tokens


@pytest.mark.parametrize("name", few_quick(CHECKED, "lfm2"))
def test_a_model_that_does_not_pad_runs_texts_of_equal_length(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = _lm(name)
    expected = lm.logits(PROMPTS)
    monkeypatch.setattr(tt.LanguageModel, "pads", lambda self, how: False)
    with _passes(lm) as sizes:
        assert relative(lm.logits(PROMPTS), expected) < 1e-4
    assert sorted(sizes) == sorted(len(token_ids(prompt)) for prompt in PROMPTS)
    texts = [each.tokens for each in lm.generate([*PROMPTS, PROMPTS[0]], max_new_tokens=3)]
    assert texts[0] == texts[3]
    assert texts[1] == lm.generate([PROMPTS[1]], max_new_tokens=3)[0].tokens


def test_a_model_without_a_longest_text_takes_long_ones() -> None:
    lm = tt.wrap(curated_model("bloom"), tiny_tokenizer())
    del lm.anatomy.config.max_position_embeddings
    lm.tokenizer.model_max_length = int(1e30)
    assert lm.max_length >= 10**6
