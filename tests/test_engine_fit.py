"""Fitting through an engine: the activations that it hands over make the steerings of transformers;
methods that need more than activations are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from autoencoders import CONTRAST, autoencoder, tiny_lm
from commands import Command, home, refused, trimtab, work
from engine_stand_in import StandIn, stand_in
from helpers import language_model, steer_at
from trimtab.engines import Read, ReadingOf
from trimtab.engines.asking import read_key, reading_args, reading_by
from trimtab.fitting import Means, Pooled, Samples, Token, UnitLength, Want, collect
from trimtab.reading import Stretch
from trimtab.steering import to_tensors

__all__ = ["autoencoder", "home", "stand_in", "trimtab", "work"]  # fixtures


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


PAIRS = tt.Contrast.from_pairs(
    [(f"Today {i} I feel", " happy and glad" * (1 + i % 3), f" sad{' so' * i}") for i in range(7)]
    + [("", "Glad again", "Sad")]
)
TEXTS = tt.Contrast.from_texts([f"I am glad {i}" for i in range(5)], ["No", "I hate it all"])


def of_a_text(lm: tt.LanguageModel, tokens: Any, site: str) -> Tensor:
    """All activations of a text at a site, by a hook of torch's own, [tokens, units]."""
    found: list[Tensor] = []
    point = lm.anatomy.point(site)
    assert point.side == "output"
    handle = point.module.register_forward_hook(
        lambda module, given, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.inference_mode():
            lm.model(torch.tensor([list(tokens)]), use_cache=False)
    finally:
        handle.remove()
    return found[0].reshape(-1, found[0].shape[-1])


def test_what_is_handed_over(lm: tt.LanguageModel) -> None:
    texts = lm.encode(["A", "She looked at the map and", "The ship left the harbour at"])
    sites = ["layers.1.ffn_out", "layers.0.resid"]
    asked = [
        (text, [Stretch(site, first, stop, whole) for site in sites
                for first, stop in ((0, len(text)), (len(text) - 1, len(text)))
                for whole in (True, False)])
        for text in texts
    ]  # fmt: skip
    with tt.VLLM(lm) as engine:
        found = dict(engine.activations(asked))
        assert engine.read == sum(map(len, texts))
    for place, (text, wanted) in enumerate(asked):
        for one, got in zip(wanted, found[place], strict=True):
            every = of_a_text(lm, text, one.site)[one.first : one.stop]
            expected = every if one.whole else every.double().sum(0)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contrast", [PAIRS, TEXTS])
def test_every_rule_of_tokens(lm: tt.LanguageModel, contrast: tt.Contrast) -> None:
    rules: list[Token | Pooled] = ["last", "mean", -1]
    pools: tuple[Any, ...] = ("max", "mean", "sum")
    rules += [Pooled(pool, over) for pool in pools for over in ("all", "rest")]
    if contrast.paired:
        rules += ["answer", *(Pooled(pool, "answer") for pool in pools)]
    wants = [
        Want(site, token, statistic, read=read)
        for site in ("layers.1.resid", "layers.2.heads")
        for token in rules
        for statistic, read in ((Means, None), (Samples, None), (Means, UnitLength()))
    ]
    wants.append(Want("layers.0.resid", -2, Means, rows=frozenset({0, 6})))
    expected = collect(lm, contrast, wants)
    with tt.VLLM(lm) as engine:
        found = collect(lm, contrast, wants, engine=engine)
    for want in wants:
        one, other = found[want], expected[want]
        if want.statistic is Samples:
            for got, wanted in zip(one.texts(), other.texts(), strict=True):
                torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-3, atol=1e-4)
        else:
            torch.testing.assert_close(one.positive, other.positive, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.negative, other.negative, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        tt.CAA(layer=1), tt.CAA(layer=2, token="mean", variant="pca"), tt.ITI(k=2),
        tt.AUSteer(k=8, site="heads"), tt.ActAdd(layer=1, pairs=3), tt.SADI(k=5),
        tt.AcT(layer=1, causal=False), tt.Ablation(layer=1),
    ],
    ids=lambda method: method.name,
)  # fmt: skip
def test_methods_make_the_same(method: Any, lm: tt.LanguageModel) -> None:
    expected = method.fit(lm, PAIRS, measure=False)
    with tt.VLLM(lm) as engine:
        found = method.fit(lm, PAIRS, measure=False, engine=engine)
    alike(found, expected)


def alike(found: tt.Steering, expected: tt.Steering) -> None:
    for one, other in zip(found.interventions, expected.interventions, strict=True):
        assert one.site == other.site
        got, wanted = (to_tensors(each.operator)[0] for each in (one, other))
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_features_are_read_of_what_is_handed_over(autoencoder: Callable[..., Path]) -> None:
    """Those of an autoencoder, before tokens are averaged."""
    lm, sae = tiny_lm(), str(autoencoder())
    for method in (tt.STA(sae=sae), tt.SAE(sae=sae, k=3)):
        expected = method.fit(lm, CONTRAST, measure=False)
        with tt.VLLM(lm) as engine:
            found = method.fit(lm, CONTRAST, measure=False, engine=engine)
        alike(found, expected)


def test_a_probe_reads_its_validation_rows_there_too(lm: tt.LanguageModel) -> None:
    parts = PAIRS.split(0.4, 0.2)
    method = tt.Probe(layer=(1, 2), token="last")
    expected = method.fit(lm, parts, measure=False)
    with tt.VLLM(lm) as engine:
        found = method.fit(lm, parts, measure=False, engine=engine)
        (inner,) = StandIn.opened
    alike(found, expected)
    assert len(inner.asked) == 2 * (parts.sizes["train"] + parts.sizes["validation"])


def test_the_dial_is_measured_beside(lm: tt.LanguageModel) -> None:
    expected = tt.CAA(layer=1).fit(lm, PAIRS)
    with tt.VLLM(lm) as engine:
        found = tt.CAA(layer=1).fit(lm, PAIRS, engine=engine)
    assert found.dial.default == pytest.approx(expected.dial.default, rel=1e-3)
    assert found.dial.range == pytest.approx(expected.dial.range, rel=1e-3)


def test_a_cache_is_the_engine_s_own(lm: tt.LanguageModel, tmp_path: Path) -> None:
    expected = tt.CAA(layer=1).fit(lm, PAIRS, measure=False, cache=tmp_path)
    asked = []
    for layer in (1, 1, 2):
        with tt.VLLM(lm) as engine:
            found = tt.CAA(layer=layer).fit(lm, PAIRS, measure=False, engine=engine, cache=tmp_path)
            if layer == 1:
                alike(found, expected)
        asked.append(len(StandIn.opened[-1].asked) if StandIn.opened else 0)
        StandIn.opened.clear()
    assert asked == [2 * len(PAIRS), 0, 2 * len(PAIRS)]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (tt.CAA(layer="effect"), "caa goes by gradients here, which vllm does not give"),
        (tt.AUSteer(k=4, locate="effect"), "austeer goes by gradients here"),
        (tt.BiPO(layer=1), "bipo runs the model itself as it is fitted"),
        (tt.AcT(), "act runs the model itself as it is fitted"),
        (tt.SAS(theta=30), "vllm does not read what sas is fitted on: .*attn_norm_in"),
        (tt.SADI(k=5, variant="neuron"), "vllm does not read what sadi is fitted on: .*ffn_act"),
    ],
)
def test_what_is_no_activation_is_refused(method: Any, said: str, lm: tt.LanguageModel) -> None:
    with tt.VLLM(lm) as engine, pytest.raises(tt.TrimtabError, match=said):
        tt.fit([tt.CAA(layer=1), method], lm, PAIRS, engine=engine)
    assert not StandIn.opened


def test_what_was_not_hooked_and_what_is_steered(lm: tt.LanguageModel) -> None:
    with tt.VLLM(lm) as engine:
        engine.generate(["A"], chat=False, max_new_tokens=1)
        with pytest.raises(tt.TrimtabError, match=r"not started with layers.1.resid: say hooks"):
            tt.CAA(layer=1).fit(lm, PAIRS, engine=engine)
        with lm.steered(steer_at(lm, "resid")), pytest.raises(tt.TrimtabError, match="is steered"):
            collect(lm, PAIRS, [Want("layers.1.resid", "last", Means)], engine=engine)
    with tt.VLLM(lm, max_model_len=6) as engine, pytest.raises(tt.TrimtabError, match="do not go"):
        tt.CAA(layer=1).fit(lm, PAIRS, engine=engine)


def test_blocks_that_are_read_are_in_no_cache() -> None:
    """Those before the first token that is read are shared with everybody."""
    reading = ReadingOf("0" * 32, (Read("a", tokens=(40, 42)), Read("b", tokens=(41, 50))))
    keys = [bool(read_key(reading, first, first + 16)) for first in range(0, 80, 16)]
    assert keys == [False, False, True, True, False]
    assert read_key(reading, 32, 48) == [("trimtab_reading", "0" * 32)]
    assert not read_key(None, 32, 48)
    assert not read_key(ReadingOf("0" * 32, (Read("a"),)), 32, 48)  # of which a salt keeps them
    params = type("Params", (), {"extra_args": reading_args(reading)})
    assert reading_by(params) == reading


@pytest.mark.parametrize(
    "tokens", [[3], [2, 2], [-1, 2], [0, 1.0], "ab", [True, 2], None, [0, 10**9]]
)
def test_what_travels_is_checked(tokens: Any) -> None:
    read = {"site": "a", "scope": None, "whole": True, "tokens": tokens}
    text = json.dumps({"name": "0" * 32, "reads": [read]})
    params = type("Params", (), {"extra_args": {"trimtab_reading": text}})
    with pytest.raises(ValueError, match="cannot be read"):
        reading_by(params)


@pytest.mark.slow
def test_the_command_fits(trimtab: Command) -> None:
    command = "fit many 'caa layer=1' 'iti k=2' --model model --contrast pairs.jsonl --json"
    rows = [{"prompt": f"Day {i}, I feel", "positive": " glad", "negative": " so sad"}
            for i in range(9)]  # fmt: skip
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _ = trimtab(f"{command} -o plain").json
    _ = trimtab(f"{command} -o vllm --engine vllm").json
    for name in ("caa", "iti"):
        one, other = (
            tt.Steering.load(f"{place}/{name}.safetensors") for place in ("vllm", "plain")
        )
        alike(one, other)
    assert len(StandIn.opened) == 1
    refused(trimtab(f"{command} -o no --vllm max_model_len=9"), "--vllm is for --engine vllm")
    refused(trimtab(f"{command} -o no --engine vllm --device cuda"), "vLLM places the model itself")
