"""What every method's steering has in common, on every architecture: one body of tests.

A new method gets all of it with its defaults, and with other settings by being listed in
`SETTINGS`. The oracle for what a steering does is
`reference.py`, with the operators applied by hand at their sites.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, by_hand, language_model, operator, relative, steer, token_ids
from reference import reference
from tiny import TINY
from trimtab.contrasts import Pair, Text
from trimtab.fitting.method import Method
from trimtab.methods import METHODS
from trimtab.methods.contents import describe, explain

PAIRS = [
    ("Today I feel", " happy and light.", " sad."),
    ("The answer to the question is", " yes", " not known"),
    ("I think that this film was", " wonderful.", " boring and long."),
    ("She said that the day was", " good", " bad"),
    ("The captain stood at the wheel and", " sang.", " slept."),
    ("It is", " true", " false"),
    ("The king had three daughters, and they were", " kind", " old"),
    ("When the rain came, the children", " ran into the house", " cried"),
    ("What is the best way to learn a language?", " Read and speak.", " I do not know."),
]
#: The last three are for what a method chooses itself.
PAIRED = tt.Contrast(
    tuple(
        Pair(*pair, part="validation" if number > 5 else "train")
        for number, pair in enumerate(PAIRS)
    ),
    "pairs",
)
UNPAIRED = tt.Contrast(
    tuple(
        Text(prompt + answer, label, part="validation" if number > 5 else "train")
        for number, (prompt, *answers) in enumerate(PAIRS)
        for answer, label in zip(answers, ("positive", "negative"), strict=True)
    ),
    "texts",
)

EVERY = frozenset(TINY)
NONE: frozenset[str] = frozenset()
#: A norm stands between a branch and the residual stream.
POST_NORM = frozenset({"gemma2", "gemma3", "olmo2"})
#: Their FFN can be given a bias, as its own (GPT-2), by configuration, or by becoming a Llama.
FFN_BIAS = frozenset({"llama", "mistral", "qwen2", "gpt2"})
#: Of the attention's output projection only Phi-3's cannot.
ATTENTION_BIAS = EVERY - {"phi3"}


@dataclass(frozen=True)
class Setting:
    """A method with its options, and what is to be expected of it."""

    make: Callable[[str], Method]  # from the architecture's name
    bakes: frozenset[str] | None  # the architectures whose weights can take it; None: any or none
    reason: str = ""  # what the refusal says elsewhere
    contrast: tt.Contrast = PAIRED
    identity: float | None = 0.0  # the dial at which it does nothing


def _always(method: Method, *rest: Any, **more: Any) -> Setting:
    return Setting(lambda name: method, *rest, **more)


_NO_FFN_BIAS = "no bias|cannot be given one|a norm stands between"
_POST = "a norm writes it straight into the residual stream"
_STREAM = "divide by its length"

#: Every method, with settings for each kind of site and of operator that it can make.
SETTINGS: dict[str, dict[str, Setting]] = {
    "actadd": {
        "one pair": _always(tt.ActAdd(alpha=2), FFN_BIAS, _NO_FFN_BIAS),
        "texts": _always(
            tt.ActAdd(layer=-1, pairs=3, token=-2), FFN_BIAS, _NO_FFN_BIAS, contrast=UNPAIRED
        ),
    },
    "caa": {
        "answer": _always(tt.CAA(layer=0, token="answer"), FFN_BIAS, _NO_FFN_BIAS),
        "layers": _always(
            tt.CAA(layer=(0, 2), variant="pca", token="last"), FFN_BIAS, _NO_FFN_BIAS
        ),
        "validation": _always(
            tt.CAA(layer="validation", alpha=2, token="last"), FFN_BIAS, _NO_FFN_BIAS
        ),
        "last": _always(tt.CAA(alpha=-1, positions="last", token="last"), NONE, "'last' positions"),
    },
    "iti": {
        "mean": _always(tt.ITI(k=5, alpha=4), ATTENTION_BIAS, "takes no bias|no bias at"),
        "last": _always(
            tt.ITI(k=3, direction="probe", scale=False, positions="last"), NONE, "'last' positions"
        ),
    },
    "sadi": {
        "head": _always(tt.SADI(k=3), EVERY),
        "neuron": _always(tt.SADI("neuron", k=40, delta=2), EVERY),
    },
    "sta": {
        "autoencoder": Setting(
            lambda name: tt.STA(sae=_autoencoder(_wrapped(name).anatomy.hidden_size)),
            FFN_BIAS,
            _NO_FFN_BIAS,
        ),
    },
    "ablation": {
        "writers": _always(tt.Ablation(layer=1), EVERY - POST_NORM, _POST),
        "norms": _always(tt.Ablation(layer=2, where="norms", amount=-1), EVERY),
        "layer": _always(tt.Ablation(layer=1, where="layer"), NONE, _STREAM),
        "embed": _always(tt.Ablation(layer=0, where="layer", amount=0.5), EVERY),
        "validation": _always(
            tt.Ablation(kl=100, depth=1, tokens=(-1, -2, -3)), EVERY - POST_NORM, _POST
        ),
    },
    "sas": {
        "input": _always(tt.SAS(theta=30), NONE, "absolute angle", identity=None),
        "post norms": _always(
            tt.SAS(theta=-70, ss_compat=True), NONE, "absolute angle", identity=None
        ),
    },
    "aas": {
        "output": _always(
            tt.AAS(theta=120, candidates="output"), NONE, "absolute angle", identity=None
        ),
    },
    "ss": {
        "sites": _always(tt.SS(theta=50, whole_blocks=False), EVERY),
        "post norms": _always(
            tt.SS(theta=-40, whole_blocks=False, ss_compat=True, selection="norm"),
            EVERY - POST_NORM,
            _POST,
        ),
        "prompt": _always(
            tt.SS(theta=180, whole_blocks=False, positions="prompt"), NONE, "'prompt' positions"
        ),
    },
    "austeer": {
        "ffn_out": _always(tt.AUSteer(k=12, alpha=4, site="ffn_out", direction="paper"), EVERY),
        "heads": _always(tt.AUSteer("heads", k=20, alpha=3, direction="signed"), EVERY),
        "ffn_in": _always(
            tt.AUSteer("ffn_in", k=30, alpha=3, clamp_sign=True, direction="paper"), EVERY
        ),
        "resid": _always(tt.AUSteer("resid", k=6, alpha=2, direction="paper"), NONE, _STREAM),
        "absolute": _always(
            tt.AUSteer(k=12, change="absolute", alpha=2, site="ffn_out", direction="paper"),
            NONE,
            "multiple of |x|",
        ),
        "vector": _always(
            tt.AUSteer(k=40, change="vector", site="ffn_out", direction="paper"),
            FFN_BIAS,
            _NO_FFN_BIAS,
        ),
    },
}

for _name, _method in METHODS.items():
    SETTINGS.setdefault(_name, {"default": Setting(lambda name, made=_method: made(), None)})

CASES = [f"{method}: {name}" for method, own in SETTINGS.items() for name in own]


def _setting(case: str) -> Setting:
    method, _, name = case.partition(": ")
    if method == "sta":
        pytest.importorskip("sae_lens")
    return SETTINGS[method][name]


@cache
def _wrapped(name: str, **options: Any) -> tt.LanguageModel:
    return language_model(name, **options)


@cache
def _fitted(case: str, name: str) -> tt.Steering:
    setting = _setting(case)
    return setting.make(name).fit(_wrapped(name), setting.contrast)


@cache
def _plain(name: str) -> Tensor:
    """Logits after each of the prompts without steering."""
    logits: Tensor = _wrapped(name).logits(PROMPTS)
    return logits


@cache
def _alone(case: str, name: str) -> Tensor:
    """Steered logits after the first prompt, run by itself: the shorter ones are padded beside."""
    logits: Tensor = _wrapped(name).logits(PROMPTS[:1], steering=_fitted(case, name))[0]
    return logits


#: Kept, because they are deleted when nobody holds them.
_ROOMS: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _autoencoder(width: int) -> str:
    """A random sparse autoencoder of the stream after block 1, in a directory of its own."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    config = TopKTrainingSAEConfig(
        d_in=width, d_sae=200, k=20, dtype="float32", device="cpu", metadata=metadata
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = TopKTrainingSAE(config)
    room = tempfile.TemporaryDirectory()
    _ROOMS.append(room)
    autoencoder.save_inference_model(room.name)
    return room.name


def _edits(steerings: list[tt.Steering], tokens: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What the steerings do to a text of so many tokens, all of them prompt, as plain formulas."""
    chains: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for steering in steerings:
        for intervention in steering.interventions:
            change = by_hand(intervention.operator, steering.setting)
            # Of a prompt, `last` is its last token, and all and `prompt` the whole.
            first = tokens - 1 if intervention.positions == "last" else 0

            def at_positions(x: Tensor, change: Any = change, first: int = first) -> Tensor:
                return torch.cat((x[:first], change(x[first:])))

            chains.setdefault(intervention.site, []).append(at_positions)

    def chained(chain: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            for change in chain:
                x = change(x)
            return x

        return edit

    return {site: chained(chain) for site, chain in chains.items()}


def _expected(name: str, steerings: list[tt.Steering], prompt: str = PROMPTS[0]) -> Tensor:
    """Logits after a prompt, by hand in float64."""
    ids = token_ids(prompt)
    _, logits = reference(name, _wrapped(name).model, ids, _edits(steerings, len(ids)))
    return logits[-1]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("case", CASES)
class TestConformance:
    def test_fit_and_file(self, case: str, name: str, tmp_path: Path) -> None:
        steering = _fitted(case, name)
        assert steering.method == case.partition(":")[0]
        assert steering.interventions
        path = steering.save(tmp_path / "one.safetensors")
        loaded = tt.Steering.load(path)
        assert path.read_bytes() == loaded.save(tmp_path / "two.safetensors").read_bytes()
        assert loaded.label == steering.label
        assert describe(loaded) == describe(steering)
        assert explain(loaded) == explain(steering)
        assert loaded.tables.keys() == steering.tables.keys()
        assert all(torch.equal(loaded.tables[key], steering.tables[key]) for key in loaded.tables)
        logits = _wrapped(name).logits(PROMPTS[:1], steering=loaded)[0]
        assert torch.equal(logits, _alone(case, name))

    def test_attached_is_the_formula_by_hand(self, case: str, name: str) -> None:
        logits = _alone(case, name)
        assert relative(logits, _expected(name, [_fitted(case, name)])) < 1e-4
        assert relative(logits, _plain(name)[0]) > 1e-3

    def test_the_identity_is_bit_identical(self, case: str, name: str) -> None:
        lm, steering, dial = _wrapped(name), _fitted(case, name), _setting(case).identity
        plain = _plain(name)
        if dial is None:
            assert not torch.equal(lm.logits(PROMPTS, steering=steering.at(0)), plain)
            return
        assert torch.equal(lm.logits(PROMPTS, steering=steering.at(dial)), plain)
        # Beside rows that are steered it is computed, and still nothing changes. (Experts add up
        # in another order when the rows beside choose others.)
        both = lm.logits(PROMPTS, steering=[steering, steering.at(dial), steering])
        if name == "qwen3_moe":
            assert relative(both[1], plain[1]) < 1e-5
        else:
            assert torch.equal(both[1], plain[1])
        assert not torch.equal(both[0], plain[0])

    def test_padding_and_rows(self, case: str, name: str) -> None:
        """In a batch each row is what it is alone, with its own steering or without one."""
        lm, steering, alone = _wrapped(name), _fitted(case, name), _alone(case, name)
        turned = steering.at(steering.setting / 2)
        together = lm.logits(PROMPTS, steering=steering)
        assert relative(together[0], alone) < 1e-4
        mixed = lm.logits(PROMPTS, steering=[steering, None, turned])
        assert relative(mixed[0], alone) < 1e-4
        assert relative(mixed[1], _plain(name)[1]) < 1e-4
        assert relative(mixed[2], lm.logits(PROMPTS[2:], steering=turned)[0]) < 1e-4
        assert relative(mixed[2], together[2]) > 1e-3

    def test_generation_with_and_without_cache(self, case: str, name: str) -> None:
        """A row of a padded batch with a cache writes what the text alone does without one."""
        lm, steering = _wrapped(name), _fitted(case, name)
        ids = token_ids(PROMPTS[1])
        with lm.steered(steering):
            whole = lm.model.generate(
                torch.tensor([ids]), max_new_tokens=3, do_sample=False, use_cache=False
            )
        done = lm.generate(PROMPTS[:2], max_new_tokens=3, chat=False, steering=[None, steering])
        assert list(done[1].tokens) == whole[0, len(ids) :].tolist()
        assert done[1].steering == (steering.label,)

    def test_bfloat16(self, case: str, name: str) -> None:
        steering = _fitted(case, name)  # made in float32: the signs of weights are the same
        half = _wrapped(name, dtype=torch.bfloat16).logits(PROMPTS, steering=steering)
        expected = _wrapped(name).logits(PROMPTS, steering=steering)
        errors = [relative(one, other) for one, other in zip(half, expected, strict=True)]
        # The median, because rounding may take one text past a threshold: to another expert, or
        # to the other side of AAS's condition.
        assert sorted(errors)[1] < 0.15

    def test_bake(self, case: str, name: str) -> None:
        lm, steering, setting = _wrapped(name), _fitted(case, name), _setting(case)
        if setting.bakes is None:
            with suppress(tt.TrimtabError):
                baked = tt.bake(lm, steering).logits(PROMPTS[:1])[0]
                assert relative(baked, _alone(case, name)) < 1e-4
            return
        if name not in setting.bakes:
            with pytest.raises(tt.TrimtabError, match=setting.reason) as caught:
                tt.bake(lm, steering)
            assert "attach" in str(caught.value)
            return
        baked = tt.bake(lm, steering).logits(PROMPTS[:1])[0]
        assert relative(baked, _alone(case, name)) < 1e-4

    def test_together_with_another(self, case: str, name: str) -> None:
        """a + b and b + a at one site, each in its order."""
        lm, a = _wrapped(name), _fitted(case, name)
        site = a.interventions[0].site
        b = steer(lm, (site, operator("Add", lm.anatomy.width(site))), alpha=0.5)
        for both in (a + b, b + a):
            logits = lm.logits(PROMPTS[:1], steering=both)[0]
            assert relative(logits, _expected(name, list(both))) < 1e-4

    def test_another_model_is_refused(self, case: str, name: str) -> None:
        steering, other = _fitted(case, name), _wrapped(name, seed=1)
        with pytest.raises(tt.TrimtabError, match="force"):
            other.logits(PROMPTS[:1], steering=steering)
        with pytest.raises(tt.TrimtabError, match="force"):
            tt.bake(other, steering)
        with other.steered(steering, force=True):
            pass
        smaller = _wrapped(name, num_hidden_layers=2)
        with pytest.raises(tt.TrimtabError, match="sizes do not fit"):
            smaller.logits(PROMPTS[:1], steering=steering, force=True)


def test_force_steers_another_model() -> None:
    """What it does there is the same formula."""
    name, case = "llama", "caa: answer"
    other = _wrapped(name, seed=1)
    found = other.logits(PROMPTS[:1], steering=_fitted(case, name), force=True)[0]
    ids = token_ids(PROMPTS[0])
    _, logits = reference(name, other.model, ids, _edits([_fitted(case, name)], len(ids)))
    assert relative(found, logits[-1]) < 1e-4
