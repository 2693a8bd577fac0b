"""Steerings and figures that would mean nothing are refused: sides that are equal to the model,
activations, logits and dials that are not finite, vectors of zeros."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

import trimtab as tt
from helpers import PROMPTS, add, language_model, refused_in_one_line, steer
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.cli.app import main
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Want, collect
from trimtab.fitting.method import Method
from trimtab.fitting.statistics import Means
from trimtab.reading.likelihood import cross_entropy, log_odds, preference, side_readings
from trimtab.reading.reader import plan, prompt_reading, run_batches
from trimtab.steering import Steering

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong, and left!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")

#: Every method that reads both sides of any contrast.
METHODS: list[Method] = [
    tt.ActAdd(),
    tt.CAA(token="last"),
    tt.CAA(variant="pca", token="last"),
    tt.ITI(k=3),
    tt.SADI(k=3),
    tt.SADI(variant="neuron"),
    tt.Ablation(layer=1),
    tt.SAS(),
    tt.AAS(),
    tt.SS(whole_blocks=False),
    tt.AUSteer(k=3, site="ffn_out", direction="paper"),
]


def _ids(method: Method) -> str:
    return f"{method.name}-{getattr(method, 'variant', '')}"


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return language_model(name)


# -- sides that are equal to the model ----------------------------------------------------------


def _normalising() -> tt.LanguageModel:
    """A model whose tokenizer puts texts into NFC before it cuts them into tokens."""

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tt.wrap(tiny_model("llama"), tokenizer, "normalising")


#: One word with its accent as one character, and as two.
COMPOSED, TAKEN_APART = " caf\u00e9", " cafe\u0301"


@pytest.mark.parametrize("method", METHODS, ids=_ids)
def test_texts_that_a_tokenizer_makes_equal(method: Method) -> None:
    equal = [("She went to the", COMPOSED, TAKEN_APART)]
    contrast = Contrast.from_pairs([*PAIRS[:2], *equal, PAIRS[3], *equal * 2], "mine")
    lm = _normalising()
    refused_in_one_line(
        lambda: method.fit(lm, contrast),
        "mine, row 3: the two sides are the same tokens to normalising, as in 2 other rows: ",
    )
    one = Contrast.from_pairs([*PAIRS[:2], *equal], "mine")
    refused_in_one_line(lambda: method.fit(lm, one), "row 3: the .* to normalising: change their")
    # A tokenizer that leaves them as they are tells them apart.
    if method.name in ("caa", "austeer"):
        assert method.fit(_lm(), contrast).interventions


def test_figures_of_equal_sides_are_refused_too() -> None:
    contrast = Contrast.from_pairs([PAIRS[0], ("She went to the", COMPOSED, TAKEN_APART)], "mine")
    for read in (log_odds, preference, side_readings):
        refused_in_one_line(lambda: read(_normalising(), contrast), "mine, row 2: the two sides")


def _dropping_system() -> tt.LanguageModel:
    """A model whose chat template leaves out what the system says."""

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}{% endfor %}"
    )
    return tt.wrap(tiny_model("llama"), tokenizer, "dropping")


def _told(how: str) -> list[list[dict[str, str]]]:
    return [
        [{"role": "system", "content": how}, {"role": "user", "content": prompt}]
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name != "austeer" and "pca" not in _ids(m)], ids=_ids
)
def test_messages_that_a_template_drops(method: Method) -> None:
    contrast = Contrast.from_texts(_told("Be glad."), _told("Be sad."), "moods")
    refused_in_one_line(
        lambda: method.fit(_dropping_system(), contrast),
        "moods: the two sides do not differ: positive and negative texts are the same tokens",
    )
    # In another order and twice as often they are the same texts still.
    more = Contrast.from_texts(_told("Be glad.")[::-1] * 2, _told("Be sad."), "moods")
    refused_in_one_line(lambda: method.fit(_dropping_system(), more), "do not differ")
    assert method.fit(_lm(), contrast).interventions  # a template that says what is told


def test_texts_that_are_cut_until_they_are_equal() -> None:
    ending = " and then they said that they would rule together"
    contrast = Contrast.from_texts(["The king" + ending], ["The ship" + ending], "mine")
    method = tt.CAA(token="last")
    assert method.fit(_lm(), contrast).interventions
    with pytest.warns(tt.TrimtabWarning, match="2 of 2 rows are longer"):
        refused_in_one_line(
            lambda: method.fit(_lm(), contrast, max_length=8), "the two sides do not differ"
        )


def test_the_same_texts_in_other_shares_are_a_contrast() -> None:
    """A text may stand on both sides, if it is more often on one."""
    one, other = PROMPTS[:2]
    contrast = Contrast.from_texts([one, one, other], [one, other, other], "mine")
    (intervention,) = tt.CAA(token="last").fit(_lm(), contrast).interventions
    assert intervention.operator.vector.any()  # type: ignore[attr-defined]


# -- zeros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_token_at_which_the_sides_are_equal(name: str) -> None:
    """Two tokens of one answer each: five from the end is the prompt's, which both sides share."""
    contrast = Contrast.from_pairs([("She said that it was not", " a", " b")], "mine")
    methods: list[Method] = [
        tt.CAA(token=-5),
        tt.CAA(token=-5, layer=(0, 2)),
        tt.ActAdd(token=-5),
        tt.Ablation(layer=1, tokens=(-5,)),
    ]
    for method in methods:
        refused_in_one_line(lambda m=method: m.fit(_lm(name), contrast), "do not differ at")


def test_what_asks_for_nothing_may_be_nothing() -> None:
    for method in (tt.ITI(k=0), tt.SADI(k=0), tt.AUSteer(k=0, site="ffn_out", direction="paper")):
        assert method.fit(_lm(), CONTRAST).interventions == ()


# -- activations that are not finite -------------------------------------------------------------


def _overflowing(name: str = "llama", dtype: torch.dtype = torch.float16) -> tt.LanguageModel:
    """A model whose second FFN writes more than float16 holds where the text has a "!"."""
    model: Any = tiny_model(name, dtype=dtype)
    (mark,) = tiny_tokenizer().encode("!", add_special_tokens=False)
    with torch.no_grad():
        if name == "gpt2":
            model.transformer.wte.weight[mark] = 60000
            model.transformer.h[1].mlp.c_proj.weight *= 3000
        else:
            model.model.embed_tokens.weight[mark] = 60000
            model.model.layers[1].mlp.down_proj.weight *= 3000
    return tt.wrap(model, tiny_tokenizer(), "overflowing")


#: The "!" is in one side of the third row alone.
MARKED = Contrast.from_pairs(
    [
        (prompt, yes, " wrong, and left!" if i == 2 else " wrong.")
        for i, (prompt, yes, _) in enumerate(PAIRS)
    ],
    "marked",
)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS, ids=_ids)
def test_activations_beyond_float16(method: Method, name: str, tmp_path: Path) -> None:
    lm = _overflowing(name)
    says = r"marked, row 3: the activation at layers\.[12]\.\w+ is not finite in float16: load the"
    if method.name in ("actadd", "caa"):
        method = replace(method, layer=1, **({"pairs": 3} if method.name == "actadd" else {}))
    elif method.name == "ablation":
        method = replace(method, layer=2)
    refused_in_one_line(lambda: method.fit(lm, MARKED), says)
    refused_in_one_line(lambda: method.fit(lm, MARKED, cache=tmp_path), says)  # and then from it:
    refused_in_one_line(lambda: method.fit(lm, MARKED, cache=tmp_path), says)
    # bfloat16 reaches as far as float32, and so all is well there.
    if (method.name, name) != ("ss", "gpt2"):  # which finds no site that discriminates
        assert method.fit(_overflowing(name, torch.bfloat16), MARKED).interventions


def test_rows_that_are_not_read_may_be_anything() -> None:
    assert tt.ActAdd(layer=1, pairs=2).fit(_overflowing(), MARKED).interventions
    assert (
        tt.CAA(layer=0, token="last").fit(_overflowing(), MARKED).interventions
    )  # below the overflow
    wants = [Want("layers.1.resid", "mean", Means, rows=frozenset({0, 4}))]
    assert collect(_overflowing(), MARKED, wants)[wants[0]].difference.isfinite().all()


def test_weights_that_are_not_numbers() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "damaged")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    refused_in_one_line(
        lambda: tt.CAA(layer=1, token="last").fit(lm, CONTRAST),
        r"mine, row \d: the activation at layers\.1\.resid is not finite in float32: its weights",
    )


# -- logits that are not finite ------------------------------------------------------------------


def _pushed(lm: tt.LanguageModel, dial: float) -> Steering:
    return replace(steer(lm, ("layers.1.resid", add(48, size=10.0))), value=dial)


#: At the larger one activations are infinite. At the smaller one only their squares are, of which
#: a norm makes zeros, so that all tokens are equally probable.
@pytest.mark.parametrize("far", [3e38, 1e25])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_log_odds_of_a_dial_that_overflows(name: str, far: float) -> None:
    lm = _lm(name)
    at = re.escape(f"={far:g}")
    says = rf"text 1 are not finite, or all equal, in float32 with \S+ \w+{at}: turn the dial tow"
    pushed, near = _pushed(lm, far), _pushed(lm, 0.1)
    refused_in_one_line(lambda: log_odds(lm, CONTRAST, pushed), says)
    refused_in_one_line(lambda: preference(lm, CONTRAST, pushed), says)
    refused_in_one_line(lambda: cross_entropy(lm, PROMPTS, pushed), says)
    some: list[Any] = [None, near, near + pushed, *[near] * 6]
    refused_in_one_line(
        lambda: log_odds(lm, CONTRAST, some),
        rf"text 3 are .* in float32 with \S+ \w+=0\.1 and \S+ \w+{at}: turn",
    )
    assert log_odds(lm, CONTRAST, near).isfinite().all()


@pytest.mark.parametrize("far", [3e38, 1e25])
@pytest.mark.parametrize("scored", [True, False])
def test_next_tokens_of_a_dial_that_overflows(scored: bool, far: float) -> None:
    lm = _lm()
    if scored:
        readings = side_readings(lm, CONTRAST)
    else:
        readings = [prompt_reading(tokens) for tokens in lm.encode(PROMPTS)]
    batches = plan(readings, 512)
    says = rf"not finite, or all equal, in float32 with \S+ \w+{re.escape(f'={far:g}')}: turn"
    refused_in_one_line(lambda: list(run_batches(lm, readings, batches, _pushed(lm, far))), says)
    assert list(run_batches(lm, readings, batches, _pushed(lm, 1.0)))


def test_logits_beyond_float16() -> None:
    lm = _overflowing()
    says = r"text 3 are not finite, or all equal, in float16 .*: load the model in float32"
    refused_in_one_line(lambda: log_odds(lm, MARKED), says)
    readings = [prompt_reading(tokens) for tokens in lm.encode([PAIRS[0][0], PAIRS[0][0] + "!"])]
    refused_in_one_line(
        lambda: list(run_batches(lm, readings, plan(readings, 512))),
        "are not finite, or all equal, in float16.*: load the model in float32",
    )
    assert log_odds(_overflowing(dtype=torch.bfloat16), MARKED).isfinite().all()


# -- numbers that overflow -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e300, -1e300, 3.5e38, float("inf"), float("nan"), 10**400])
@pytest.mark.parametrize(
    ("method", "option"),
    [
        (tt.ActAdd, "alpha"),
        (tt.CAA, "alpha"),
        (tt.ITI, "alpha"),
        (tt.SADI, "delta"),
        (functools.partial(tt.STA, sae="none"), "alpha"),
        (functools.partial(tt.SAE, sae="none"), "strength"),
        (tt.Ablation, "amount"),
        (tt.Ablation, "kl"),
        (tt.SAS, "theta"),
        (tt.AAS, "theta"),
        (tt.SS, "theta"),
        (tt.AUSteer, "alpha"),
    ],
)
def test_dials_beyond_float32(method: Callable[..., Any], option: str, value: float) -> None:
    refused_in_one_line(
        lambda: method(**{option: value}), f"{option} must be a finite number, .* at most 3.4e38"
    )
    assert getattr(method(**{option: 3e38}), option) == 3e38


def test_the_command_line_refuses_them_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = _lm()
    model = tmp_path / "model"
    lm.save_pretrained(model)
    texts = tmp_path / "pairs.jsonl"
    rows = [dict(zip(("prompt", "positive", "negative"), pair, strict=True)) for pair in PAIRS]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "a.safetensors"
    capsys.readouterr()
    command = ["fit", "caa", "--model", model, "--contrast", texts, "-o", output]
    for alpha, status in (("1e300", 2), ("1e-3", 0)):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, command), "--alpha", alpha])
        assert ended.value.code == status
        assert output.exists() is (status == 0)
        said = capsys.readouterr().err.strip()
        assert status == 0 or re.fullmatch(r"trimtab: .*alpha.*1e\+300.*", said)
