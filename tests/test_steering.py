"""The artifact: what a file holds, that it comes back whole, that nothing bad gets in or out."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from helpers import (
    CALIBRATION,
    PROMPTS,
    by_hand,
    language_model,
    operator,
    refused_in_one_line,
    relative,
    steer,
    token_ids,
)
from reference import reference
from tiny import tiny_model, tiny_tokenizer
from trimtab.contrasts import Pair
from trimtab.reading.likelihood import cross_entropy, log_odds
from trimtab.steering.artifact import ModelIdentity, Steering, Steerings
from trimtab.steering.operators import Ablate, Add, Operator, Rotate, Scale, Turn, apply

_NAN, _INF = float("nan"), float("inf")
MODEL = ModelIdentity("tiny", "llama", 3, 48, "0123456789abcdef" * 4)


def _steering(**changes: Any) -> Steering:
    """Two interventions, tables, and all that a method may put in."""
    units = torch.tensor([3, 0, 47])
    interventions = (
        tt.Intervention("layers.1.ffn_out", Scale(units, torch.tensor([0.5, -1.0, 0.25]), 48)),
        tt.Intervention("layers.2.resid", Add(torch.linspace(-1, 1, 48)), "generated"),
    )
    given: dict[str, Any] = {
        "method": "austeer",
        "hyperparameters": {"site": "ffn_out", "k": 3, "alpha": 8, "layers": [1], "note": None},
        "interventions": interventions,
        # A whole number, as people write it.
        "dial": tt.Dial("alpha", 8, (0, 100)),
        "model": MODEL,
        "contrast": {"name": "pairs.jsonl", "digest": "ab" * 32, "rows": 100},
        "tables": {"unit": units, "score": torch.tensor([0.9, 0.8, 0.7])},
        "findings": {"source_site": "layers.1.resid", "trials": [{"kl": 0.5, "layer": 1}]},
    }
    return Steering(**{**given, **changes})


def _equal(a: Steering, b: Steering) -> None:
    names = ("method", "hyperparameters", "dial", "model", "contrast", "findings", "value")
    for name in (*names, "versions"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.date, a.setting, a.label) == (b.date, b.setting, b.label)
    assert a.tables.keys() == b.tables.keys()
    assert all(torch.equal(a.tables[name], b.tables[name]) for name in a.tables)
    assert len(a.interventions) == len(b.interventions)
    x = torch.randn(2, 5, 48)
    for one, other in zip(a.interventions, b.interventions, strict=True):
        assert (one.site, one.positions) == (other.site, other.positions)
        assert type(one.operator) is type(other.operator)
        assert torch.equal(apply(one.operator, x, 2.0), apply(other.operator, x, 2.0))


# -- save and load ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 3, -2.5, 0.0])
def test_round_trip(tmp_path: Path, value: float | None) -> None:
    steering = _steering()
    if value is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # -2.5 is out of this dial's range
            steering = steering.at(value)
    path = steering.save(tmp_path / "one.safetensors")
    assert path == tmp_path / "one.safetensors"
    loaded = Steering.load(path)
    _equal(steering, loaded)
    assert loaded.value == value
    again = loaded.save(tmp_path / "two.safetensors")
    assert path.read_bytes() == again.read_bytes()
    assert steering.save(tmp_path / "three.safetensors").read_bytes() == path.read_bytes()


def test_clamped_and_empty_and_many(tmp_path: Path) -> None:
    clamped = Scale(torch.tensor([1]), torch.tensor([-1.0]), 48, clamp_sign=True)
    nothing = Scale(torch.tensor([], dtype=torch.long), torch.tensor([]), 48)
    # Twelve, because tensors are told apart by number: 1 is not the beginning of 11.
    sites = [tt.Intervention(f"layers.{i % 3}.resid", Add(torch.full((48,), i))) for i in range(10)]
    ten = [replace(one, operator=Add(one.operator.vector.float())) for one in sites]
    operators = [tt.Intervention("layers.0.heads", op, "last") for op in (clamped, nothing)]
    steering = _steering(interventions=(*ten, *operators), tables={})
    _equal(steering, Steering.load(steering.save(tmp_path / "file.safetensors")))


def test_one_vector_at_several_sites(tmp_path: Path) -> None:
    vector = torch.randn(96)
    operators = [Add(vector[:48]), Add(vector[:48]), Add(vector[::2])]
    steering = _steering(
        interventions=tuple(tt.Intervention("layers.0.resid", operator) for operator in operators)
    )
    _equal(steering, Steering.load(steering.save(tmp_path / "file.safetensors")))


def test_unusual_text(tmp_path: Path) -> None:
    model = replace(MODEL, name='a "name"\n\u2028 漢字')
    steering = _steering(model=model, contrast={"name": "\\ é 🙂", "rows": 10**30})
    _equal(steering, Steering.load(steering.save(tmp_path / "sub .safetensors")))


_BASIS = torch.linalg.qr(torch.randn(48, 2, generator=torch.Generator().manual_seed(0))).Q.T


@pytest.mark.parametrize(
    "made",
    [
        Scale(torch.tensor([5, 2]), torch.tensor([0.5, -2.0]), 48, clamp_sign=True),
        Scale(torch.tensor([5, 2]), torch.tensor([0.5, -2.0]), 48, absolute=True),
        Add(torch.linspace(-1, 1, 48)),
        Ablate(_BASIS[0].contiguous()),
        Rotate(_BASIS.contiguous()),
        Turn(_BASIS.contiguous()),
        Turn(_BASIS.contiguous(), adaptive=True),
    ],
    ids=["clamped", "absolute", "add", "ablate", "rotate", "turn", "adaptive"],
)
def test_every_operator_comes_back(tmp_path: Path, made: Operator) -> None:
    steering = _steering(interventions=(tt.Intervention("layers.0.ffn_in", made),))
    (loaded,) = Steering.load(steering.save(tmp_path / "file.safetensors")).interventions
    assert type(loaded.operator) is type(made)
    for name, value in vars(made).items():
        found = getattr(loaded.operator, name)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found is value
    x = torch.randn(3, 48)
    assert torch.equal(apply(loaded.operator, x, 50.0), apply(made, x, 50.0))


@pytest.mark.parametrize(
    "findings",
    [
        {},
        {"source_site": "embed", "token": -3, "none": None, "yes": True, "deep": [[{"é": 1e-300}]]},
        {"gains": {"layers.1.resid": -0.1, "layers.2.resid": 10.0**15}, "count": 10**17},
    ],
)
def test_findings_come_back(tmp_path: Path, findings: dict[str, Any]) -> None:
    steering = _steering(findings=findings)
    loaded = Steering.load(steering.save(tmp_path / "file.safetensors"))
    assert json.dumps(loaded.findings, sort_keys=True) == json.dumps(findings, sort_keys=True)
    assert loaded.at(3).findings == findings


@pytest.mark.parametrize("value", [_NAN, _INF, -_INF])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, {"deep": x}]], ids=["bare", "deep"])
def test_findings_that_are_no_numbers_are_not_saved(
    tmp_path: Path, value: float, wrap: Callable[[float], Any]
) -> None:
    with pytest.raises(tt.TrimtabError, match=r"this steering .*: findings:"):
        _steering(findings={"score": wrap(value)}).save(tmp_path / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_from_before_findings_and_absolute_load(tmp_path: Path) -> None:
    """Both came later: a file without them means no findings, and plain scaling."""
    path = _steering(findings={}).save(tmp_path / "new.safetensors")
    document = _document(path)
    del document["findings"]
    del document["interventions"][0]["fields"]["absolute"]
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {"trimtab": json.dumps(document)})
    _equal(Steering.load(old), Steering.load(path))
    (first, _) = Steering.load(old).interventions
    assert isinstance(first.operator, Scale)
    assert first.operator.absolute is False
    assert Steering.load(old).findings == {}
    # Saved again it is a file like any other of today.
    assert Steering.load(old).save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", [tt.AUSteer(k=5, alpha=4), tt.CAA(layer=1, token="mean")])
def test_what_a_method_makes(tmp_path: Path, method: Any) -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "tiny")
    contrast = tt.Contrast.from_pairs([(f"The {i}", " yes", " no") for i in range(5)], "mine")
    steering = method.fit(lm, contrast)
    path = steering.save(tmp_path / "file.safetensors")
    loaded = Steering.load(path)
    _equal(steering, loaded)
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with lm.steered(steering):
        expected = lm.model(torch.tensor([[1, 20, 30]])).logits
    with lm.steered(loaded):
        assert torch.equal(lm.model(torch.tensor([[1, 20, 30]])).logits, expected)


# -- what is in the file ----------------------------------------------------------------------


def _content(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file by its specification; nothing may be left over."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _document(path: Path) -> dict[str, Any]:
    header, _ = _content(path)
    # A file that a test wrote has no checksum, as those from before there was one.
    assert {"trimtab"} <= set(header["__metadata__"]) <= {"trimtab", "trimtab_sha256"}
    document: dict[str, Any] = json.loads(header["__metadata__"]["trimtab"])
    return document


def test_metadata_says_where_it_came_from(tmp_path: Path) -> None:
    document = _document(_steering().save(tmp_path / "file.safetensors"))
    assert document["format"] == 1
    assert document["method"] == "austeer"
    assert document["hyperparameters"]["k"] == 3
    assert document["dial"] == {"name": "alpha", "default": 8, "range": [0, 100], "unit": ""}
    assert [(i["site"], i["positions"], i["operator"]) for i in document["interventions"]] == [
        ("layers.1.ffn_out", "all", "Scale"),
        ("layers.2.resid", "generated", "Add"),
    ]
    assert document["model"] == vars(MODEL)
    assert document["contrast"]["digest"] == "ab" * 32
    names = ("trimtab", "torch", "transformers")
    assert document["versions"] == {name: version(name) for name in names}
    assert document["date"].startswith("20")
    assert document["date"].endswith("+00:00")


def test_tensors_are_plain(tmp_path: Path) -> None:
    path = _steering().save(tmp_path / "file.safetensors")
    header, data = _content(path)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"F32", "I64"}
    assert len(data) == max(entry["data_offsets"][1] for entry in tensors.values())
    assert set(tensors) == {
        "0.units", "0.gain", "1.vector", "table.unit", "table.score",
    }  # fmt: skip
    assert torch.equal(load_file(path)["1.vector"], torch.linspace(-1, 1, 48))


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle")

    for module, names in (
        (pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")),
        (torch, ("save", "load")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    path = _steering().save(tmp_path / "file.safetensors")
    Steering.load(path)
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())


# -- the dial ---------------------------------------------------------------------------------


def test_at_turns_a_copy() -> None:
    steering = _steering()
    turned = steering.at(12)
    assert (steering.setting, steering.value) == (8, None)
    assert turned.setting == turned.value == 12
    assert turned is not steering
    # Shared, so that one hook serves two dials of one steering.
    assert turned.interventions is steering.interventions
    assert turned.at(3).setting == 3
    assert (steering.label, turned.label) == ("austeer alpha=8", "austeer alpha=12")
    degrees = _steering(method="ss", dial=tt.Dial("theta", 90, (0, 360), "°"))
    assert degrees.label == "ss theta=90°"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_at_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(tt.TrimtabError, match="the dial alpha cannot be"):
        _steering().at(value)


def test_at_warns_out_of_range() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (0, 100, 50.5):
            _steering().at(value)
    for value in (-0.1, 100.1):
        with pytest.warns(tt.TrimtabWarning, match=rf"alpha = {value} .* 0 to 100") as caught:
            assert _steering().at(value).setting == value
        assert caught[0].filename == __file__


# -- calibration ------------------------------------------------------------------------------


def test_a_calibrated_dial_by_its_budget() -> None:
    steering = _steering(calibration=CALIBRATION, dial=tt.Dial("alpha", 8.0, (-100.0, 100.0)))
    at = steering.at
    assert [at(kl=kl).setting for kl in (0.01, 0.1, 1.0)] == pytest.approx([1.0, 4.0, 9.0])
    assert at(kl=0.1, median=True).setting == pytest.approx(6.0)
    assert at(kl=0.1, side="negative").setting == pytest.approx(-5.0)
    assert at(kl=0.1, side="negative", median=True).setting == pytest.approx(-9.0)
    # Halfway in log KL is halfway in the log of the dial: sqrt(1 * 4) and sqrt(4 * 9).
    assert at(kl=10**-1.5).setting == pytest.approx(2.0)
    assert at(kl=10**-0.5).setting == pytest.approx(6.0)
    assert at(kl=10**-1.5, side="negative").setting == pytest.approx(-(10**0.5))
    # Below the smallest one KL goes with the square: a quarter of the nats is half the dial.
    assert at(kl=0.0025).setting == pytest.approx(0.5)
    assert at(kl=0.0025, side="negative", median=True).setting == pytest.approx(-1.5)
    assert at(kl=0.1).calibration is CALIBRATION
    assert steering.value is None
    sizes = [at(kl=0.002 * 1.3**i).setting for i in range(23)]
    assert sizes == sorted(sizes)


def test_budgets_that_no_calibration_knows() -> None:
    steering = _steering(calibration=CALIBRATION)
    one_sided = _steering(
        calibration=replace(CALIBRATION, negative=(), negative_worst5=(), positive=(None,) * 3)
    )
    other: Any = "both"
    for action, says in (
        (lambda: steering.at(kl=1.1), "calibrated up to 1 nats, not to 1.1"),
        (lambda: steering.at(kl=0.2, median=True), "calibrated up to 0.1 nats"),
        (lambda: one_sided.at(kl=0.1, side="negative"), "no dials of the negative side"),
        (lambda: one_sided.at(kl=0.1, median=True), "no dials of the positive side"),
        (lambda: steering.at(kl=0.1, side=other), "side is 'both'"),
        (lambda: _steering().at(kl=0.1), "austeer steering is not calibrated.* 0.1 nats"),
        (lambda: steering.at(3, kl=0.1), "a dial, or kl="),
        (lambda: steering.at(), "a dial, or kl="),
        *((lambda kl=kl: steering.at(kl=kl), "above 0 nats") for kl in (0.0, -1.0, _NAN, _INF)),
    ):
        refused_in_one_line(action, says)
    assert one_sided.at(kl=0.1).setting == 4.0


def test_a_calibration_comes_back(tmp_path: Path) -> None:
    for calibration in (CALIBRATION, replace(CALIBRATION, negative=(), negative_worst5=()), None):
        path = _steering(calibration=calibration).save(tmp_path / "c.safetensors", overwrite=True)
        loaded = Steering.load(path)
        assert loaded.calibration == calibration
        again = loaded.save(tmp_path / "again.safetensors", overwrite=True)
        assert again.read_bytes() == path.read_bytes()


def test_files_from_before_calibrations_load(tmp_path: Path) -> None:
    path = _steering().save(tmp_path / "new.safetensors")
    document = _document(path)
    assert document.pop("calibration") is None
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {"trimtab": json.dumps(document)})
    _equal(Steering.load(old), Steering.load(path))
    assert Steering.load(old).calibration is None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"kl": []}, "budgets must rise from above 0"),
        ({"kl": [0.1, 0.01, 1.0]}, "budgets must rise"),
        ({"kl": [0.0, 0.1, 1.0]}, "budgets must rise"),
        ({"kl": [0.01, 0.1]}, "has 2 budgets, positive differs"),
        ({"kl": "0.1"}, "calibration.kl"),
        ({"positive": [1.0]}, "has 3 budgets, positive differs"),
        ({"positive_worst5": [1.0, -4.0, 9.0]}, "positive_worst5 has a dial of the other side"),
        ({"negative": [-1.0, 0.0, None]}, "negative has a dial of the other side"),
        ({"negative": [-1.0, "a", None]}, "calibration.negative"),
        ({"prompts": -1}, "calibration.prompts"),
        ({"digest": None}, "calibration.digest"),
        ({"more": 1}, "calibration.more"),
    ],
)
def test_damaged_calibrations_are_refused(
    tmp_path: Path, damage: dict[str, Any], says: str
) -> None:
    path = _steering(calibration=CALIBRATION).save(tmp_path / "good.safetensors")
    document = _document(path)
    document["calibration"] |= damage
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(path), bad, {"trimtab": json.dumps(document)})
    refused_in_one_line(lambda: Steering.load(bad), rf"bad\.safetensors.*{says}")


def test_read_with_a_budget(tmp_path: Path) -> None:
    path = _steering(calibration=CALIBRATION).save(tmp_path / "c.safetensors")
    plain = _steering().save(tmp_path / "plain.safetensors")
    assert Steering.read(f"{path}@kl=0.1").setting == pytest.approx(4.0)
    assert Steering.read(f"{path}@0.1").setting == 0.1
    for argument, says in (
        (f"{path}@kl=much", "'much' is no number; write FILE@DIAL"),
        (f"{path}@kl=", "'' is no number"),
        (f"{path}@kl=7", "calibrated up to 1 nats"),
        (f"{path}@kl=-1", "above 0 nats"),
        (f"{path}@kl=nan", "above 0 nats"),
        (f"{plain}@kl=0.1", "is not calibrated"),
    ):
        refused_in_one_line(lambda argument=argument: Steering.read(argument), says)
    named = path.rename(tmp_path / "c@kl=0.1")  # a file of that very name
    assert Steering.read(str(named)).value is None


# -- several steerings ------------------------------------------------------------------------

A, B, C = (_steering(method=name) for name in "abc")


def test_sums_are_flat_and_in_order() -> None:
    for both, expected in (
        (A + B, (A, B)),
        (B + A, (B, A)),
        (A + A, (A, A)),
        ((A + B) + C, (A, B, C)),
        (A + (B + C), (A, B, C)),
        ((A + B) + (C + A), (A, B, C, A)),
        (A + Steerings(), (A,)),
        (Steerings() + A, (A,)),
    ):
        assert isinstance(both, Steerings)
        assert len(both) == len(expected)
        assert all(one is other for one, other in zip(both, expected, strict=True))
    assert (A + B.at(3)).label == "a alpha=8 + b alpha=3"
    assert A.value is None


@pytest.mark.parametrize("wrong", [3, None, "caa", [A], (A,), {"a": A}], ids=lambda x: type(x))
def test_only_steerings_are_summed(wrong: Any) -> None:
    for one in (A, A + B):
        with pytest.raises(TypeError):
            one + wrong
    with pytest.raises(TypeError):
        wrong + A


_PAIRS = tt.Contrast(
    (Pair("The answer is", " yes", " no"), Pair("Today I feel", " happy", " sad and tired"))
)


def _two(lm: tt.LanguageModel) -> tuple[Steering, Steering]:
    """Two steerings of one site that do not commute, and the first one also a site later."""
    scale, rotate, add = (operator(kind, 48) for kind in ("Scale", "Rotate", "Add"))
    a = steer(lm, ("layers.1.ffn_out", scale), ("layers.2.attn_norm", rotate), alpha=2.0)
    return a, steer(lm, ("layers.1.ffn_out", add))


def test_the_earlier_one_acts_first() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    ids = token_ids(PROMPTS[0])
    found = []
    for both in (a + b, b + a):
        chains: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        for steering in both:
            for i in steering.interventions:
                chains.setdefault(i.site, []).append(by_hand(i.operator, steering.setting))
        edits = {
            site: (lambda x, chain=chain: chain[-1](chain[0](x) if len(chain) > 1 else x))
            for site, chain in chains.items()
        }
        _, expected = reference("llama", lm.model, ids, edits)
        with lm.steered(both):
            logits = lm.model(torch.tensor([ids])).logits[0]
        assert relative(logits, expected) < 1e-5
        found.append(logits)
    assert relative(found[0], found[1]) > 1e-2


_USES: dict[str, Callable[[tt.LanguageModel, Any], Any]] = {
    "logits": lambda lm, given: lm.logits(PROMPTS[:2], steering=given),
    "log_odds": lambda lm, given: log_odds(lm, _PAIRS, given),
    "cross_entropy": lambda lm, given: cross_entropy(lm, PROMPTS[:2], given)[0],
}


@pytest.mark.parametrize("name", _USES)
def test_a_sum_goes_wherever_one_steering_goes(name: str) -> None:
    lm, use = language_model("llama"), _USES[name]
    a, b = _two(lm)
    plain = use(lm, None)
    with lm.steered(a, b):
        expected = use(lm, None)
    for both in (a + b, [a + b, a + b], [[a, b], (a, b)], [Steerings((a,)) + b, [a + b]]):
        assert relative(use(lm, both), expected) < 1e-5
    for other in (b + a, a, b):
        assert relative(use(lm, other), expected) > 1e-3
    # In a list it is one row's, beside others.
    mixed = use(lm, [a + b, None])
    assert relative(mixed[0], expected[0]) < 1e-5
    assert relative(mixed[1], plain[1]) < 1e-5


def test_a_sum_steers_a_block() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    expected = lm.logits(PROMPTS, steering=a + b)
    for arguments in ((a + b,), (a, b), (Steerings((a,)), b), ([a + b] * 3,)):
        with lm.steered(*arguments):
            assert relative(lm.logits(PROMPTS), expected) < 1e-5


def test_a_sum_generates_and_is_named() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    options: dict[str, Any] = {"max_new_tokens": 5, "chat": False}
    with lm.steered(a, b):
        expected = [one.tokens for one in lm.generate(PROMPTS[:2], **options)]
    assert expected != [one.tokens for one in lm.generate(PROMPTS[:2], **options)]
    done = lm.generate(PROMPTS[:2], steering=a + b.at(1), **options)
    assert [one.tokens for one in done] == expected
    assert done[0].steering == ("test alpha=2", "test alpha=1")
    mixed = lm.generate(PROMPTS[:2], steering=[None, a + b], **options)
    assert mixed[1].tokens == expected[1]
    assert [len(one.steering) for one in mixed] == [0, 2]


def test_a_sum_is_baked() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    for baked, expected in (
        (tt.bake(lm, a + b), a + b),
        (tt.bake(lm, b + a), b + a),
        (tt.bake(lm, b, Steerings((a, b))), b + a + b),
    ):
        logits = lm.logits(PROMPTS, steering=expected)
        assert relative(baked.logits(PROMPTS), logits) < 1e-4
        assert baked.name == f"llama + {expected.label}"


def test_every_one_of_a_sum_has_to_fit() -> None:
    lm, other = language_model("llama"), language_model("llama", seed=1)
    both = _two(lm)[0] + _two(other)[1]
    for use in (lambda: lm.logits(PROMPTS, steering=both), lambda: tt.bake(lm, both)):
        with pytest.raises(tt.TrimtabError, match="force"):
            use()
    lm.logits(PROMPTS, steering=both, force=True)
    tt.bake(lm, both, force=True)


def test_an_empty_sum_does_nothing() -> None:
    lm = language_model("llama")
    assert Steerings().label == ""
    assert torch.equal(lm.logits(PROMPTS, steering=Steerings()), lm.logits(PROMPTS))


# -- bad files --------------------------------------------------------------------------------

DELETE = object()


def _edit(path: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """An edit of the JSON document: `dial.range.0` is document["dial"]["range"][0]."""

    def edit(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        inner: Any = document
        for step in way:
            inner = inner[step]
        if value is DELETE:
            del inner[last]
        else:
            inner[last] = value

    return edit


def _put(name: str, tensor: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if tensor is DELETE:
            del tensors[name]
        else:
            tensors[name] = tensor

    return edit


#: Name -> an edit of a good file's document and tensors, and what the message must say.
BAD: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "next version": (_edit("format", 2), "format 1: format"),
    "old version": (_edit("format", 0), "format"),
    "version as text": (_edit("format", "1"), "format"),
    "no version": (_edit("format", DELETE), "format"),
    "unknown operator": (_edit("interventions.0.operator", "Shear"), "ffn_out: .*operator 'Shear'"),
    "operator of another": (_edit("interventions.0.operator", "Add"), "Add needs vector"),
    "operator not text": (_edit("interventions.0.operator", 3), "operator"),
    "unknown site": (_edit("interventions.0.site", "layers.1.mlp"), "unknown site 'layers.1.mlp'"),
    "site without layer": (_edit("interventions.0.site", "resid"), "unknown site"),
    "site negative": (_edit("interventions.0.site", "layers.-1.resid"), "unknown site"),
    "site not text": (_edit("interventions.0.site", 1), "site"),
    "site huge": (_edit("interventions.0.site", f"layers.{'9' * 5000}.resid"), "site"),
    "layer beyond": (_edit("interventions.0.site", "layers.3.ffn_out"), "layer 3.* 0 to 2"),
    "unknown positions": (_edit("interventions.1.positions", "first"), "positions"),
    "positions null": (_edit("interventions.1.positions", None), "positions"),
    "no positions": (_edit("interventions.1.positions", DELETE), "positions"),
    "extra field": (_edit("license", "free"), "license"),
    "extra field of an intervention": (_edit("interventions.0.note", "x"), "note"),
    "extra field of the dial": (_edit("dial.step", 1), "step"),
    "extra field of the model": (_edit("model.size", 1), "size"),
    "extra field of an operator": (_edit("interventions.0.fields.power", 2), "Scale needs"),
    "missing field": (_edit("model", DELETE), "model"),
    "missing field of an operator": (_edit("interventions.0.fields.width", DELETE), "Scale needs"),
    "field for a tensor": (_edit("interventions.0.fields.units", [1]), "units of Scale .* type"),
    "width as text": (_edit("interventions.0.fields.width", "48"), "width of Scale .* type"),
    "width as bool": (_edit("interventions.0.fields.width", True), "width of Scale .* type"),
    "width as float": (_edit("interventions.0.fields.width", 48.0), "width of Scale .* type"),
    "clamp as number": (_edit("interventions.0.fields.clamp_sign", 1), "clamp_sign of Scale"),
    "width too small": (_edit("interventions.0.fields.width", 47), "0 to 46"),
    "width negative": (_edit("interventions.0.fields.width", -1), "width"),
    "interventions as text": (_edit("interventions", "all"), "interventions"),
    "one intervention less": (
        lambda d, t: d["interventions"].pop(),
        "unexpected tensor '1.vector'",
    ),
    "dial nan": (_edit("dial.default", _NAN), "dial.default"),
    "dial inf": (_edit("dial.default", _INF), "dial.default"),
    "dial as text": (_edit("dial.default", "8"), "dial.default"),
    "dial null": (_edit("dial.default", None), "dial.default"),
    "range nan": (_edit("dial.range.0", _NAN), "dial.range"),
    "range inf": (_edit("dial.range.1", -_INF), "dial.range"),
    "range backwards": (_edit("dial.range", [100, 0]), "range"),
    "range of three": (_edit("dial.range", [0, 1, 2]), "dial.range"),
    "range of one": (_edit("dial.range", [0]), "dial.range"),
    "value nan": (_edit("value", _NAN), "value"),
    "value inf": (_edit("value", -_INF), "value"),
    "value huge": (_edit("value", 10**400), "value"),
    "value as text": (_edit("value", "8"), "value"),
    "finding nan": (_edit("findings.trials.0.kl", _NAN), "findings"),
    "finding inf": (_edit("findings.source_site", -_INF), "findings"),
    "findings list": (_edit("findings", [1]), "findings"),
    "findings null": (_edit("findings", None), "findings"),
    "absolute as number": (_edit("interventions.0.fields.absolute", 1), "absolute of Scale"),
    "clamped and absolute": (
        lambda d, t: d["interventions"][0]["fields"].update(absolute=True, clamp_sign=True),
        "both clamp_sign and absolute",
    ),
    "hyperparameter nan": (_edit("hyperparameters.alpha", _NAN), "hyperparameters"),
    "contrast inf": (_edit("contrast.rows", _INF), "contrast"),
    "hyperparameters list": (_edit("hyperparameters", []), "hyperparameters"),
    "layers negative": (_edit("model.layers", -3), "layers"),
    "layers as float": (_edit("model.layers", 3.5), "layers"),
    "layers as huge": (_edit("model.hidden_size", 10**5000 // 3), "JSON|hidden_size"),
    "versions of numbers": (_edit("versions.torch", 2.13), "versions"),
    "method null": (_edit("method", None), "method"),
    "extra tensor": (_put("weight", torch.ones(3)), "unexpected tensor 'weight'"),
    "tensor of nobody": (_put("2.vector", torch.ones(48)), "unexpected tensor '2.vector'"),
    "extra tensor of an operator": (_put("1.bias", torch.ones(48)), "Add needs vector"),
    "missing tensor": (_put("0.gain", DELETE), "Scale needs units, gain"),
    "float units": (_put("0.units", torch.tensor([3.0, 0.0, 47.0])), "int64"),
    "int32 units": (
        _put("0.units", torch.tensor([3, 0, 47], dtype=torch.int32)),
        "int32, not float32 or int64",
    ),
    "int gains": (_put("0.gain", torch.ones(3, dtype=torch.int64)), "float32"),
    "float16 gains": (_put("0.gain", torch.ones(3).half()), "float16"),
    "float64 vector": (_put("1.vector", torch.ones(48).double()), "float64"),
    "bfloat16 table": (_put("table.score", torch.ones(3).bfloat16()), "bfloat16"),
    "float8 table": (_put("table.score", torch.ones(3).to(torch.float8_e4m3fn)), "float8"),
    "complex table": (_put("table.score", torch.full((3,), _NAN * 1j)), "complex64"),
    "bool table": (_put("table.score", torch.ones(3, dtype=torch.bool)), "torch.bool"),
    "unit out of range": (_put("0.units", torch.tensor([3, 0, 48])), "0 to 47"),
    "negative unit": (_put("0.units", torch.tensor([3, -1, 47])), "0 to 47"),
    "unit twice": (_put("0.units", torch.tensor([3, 47, 47])), "twice"),
    "unit without gain": (_put("0.units", torch.tensor([3, 0])), "one length"),
    "units as matrix": (_put("0.units", torch.tensor([[3, 0, 47]])), "one length"),
    "vector as matrix": (_put("1.vector", torch.ones(6, 8)), r"\[6, 8\]"),
    "vector as number": (_put("1.vector", torch.tensor(1.0)), r"\[\]"),
    "vector of nothing": (_put("1.vector", torch.ones(0)), r"\[0\]"),
    "gain nan": (_put("0.gain", torch.tensor([1.0, _NAN, 1.0])), "'0.gain' holds NaN"),
    "vector inf": (_put("1.vector", torch.full((48,), _INF)), "'1.vector' holds NaN or inf"),
    "table nan": (_put("table.score", torch.tensor([_NAN])), "'table.score' holds NaN"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _steering().at(12).save(tmp_path_factory.mktemp("good") / "good.safetensors")


@pytest.mark.parametrize("name", BAD)
def test_bad_document_or_tensor(tmp_path: Path, good: Path, name: str) -> None:
    edit, says = BAD[name]
    document, tensors = _document(good), load_file(good)
    edit(document, tensors)
    path = tmp_path / "bad.safetensors"
    # json.dumps writes a number of 5,000 digits by way of text, which has a limit of its own.
    text = json.dumps(document) if name != "layers as huge" else _huge(document)
    save_file(tensors, path, {"trimtab": text})
    _refused(path, says)


def _huge(document: dict[str, Any]) -> str:
    document["model"]["hidden_size"] = 0
    return json.dumps(document).replace('"hidden_size": 0', '"hidden_size": ' + "9" * 5000)


def _refused(path: Path, says: str) -> None:
    with pytest.raises(tt.TrimtabError, match=says) as caught:
        Steering.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_good_file_is_good(good: Path, tmp_path: Path) -> None:
    # Written again the way the bad ones are, so that those fail for their own fault alone.
    path = tmp_path / "again.safetensors"
    save_file(load_file(good), path, {"trimtab": json.dumps(_document(good))})
    _equal(Steering.load(path), Steering.load(good))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "object|dictionary"),
        ("null", "object|dictionary"),
        ("3", "object|dictionary"),
        ("NaN", "object|dictionary|JSON"),
        ('"text"', "object|dictionary"),
        ("{}", "format"),
        ("[" * 10_000, "JSON"),
        ('{"format": 1} {}', "JSON"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file({"0.vector": torch.ones(3)}, path, {"trimtab": text})
    _refused(path, says)


@pytest.mark.parametrize(
    "shape",
    [[2**63, 0], [2**64 - 1, 0], [0, 2**40, 2**40], [2**62, 4, 0], [-1, 0], [0] * 65, [0] * 9, []],
    ids=str,
)
@pytest.mark.parametrize("name", ["table.more", "1.vector", "0.units"])
def test_impossible_shapes(tmp_path: Path, good: Path, shape: list[int], name: str) -> None:
    header, data = _content(good)
    dtype = "I64" if name == "0.units" else "F32"
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data)]}
    raw = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    _refused(path, "not a safetensors file|has shape")


def _as_file(content: bytes) -> Callable[[Path, Path], None]:
    return lambda path, good: path.write_bytes(content) and None


BAD_FILES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "missing": (lambda path, good: None, "no such"),
    "folder": (lambda path, good: path.mkdir(), "no such steering file|not a file"),
    "empty": (_as_file(b""), "not a safetensors file"),
    "text": (_as_file(b'{"prompt": "not a steering"}' * 10), "not a safetensors file"),
    "pickle": (_as_file(pickle.dumps({"vector": [1.0]})), "not a safetensors file"),
    "cut in the data": (lambda p, g: p.write_bytes(g.read_bytes()[:-1]), "truncated"),
    "cut in the header": (lambda p, g: p.write_bytes(g.read_bytes()[:100]), "truncated"),
    "cut in the length": (lambda p, g: p.write_bytes(g.read_bytes()[:7]), "truncated"),
    "too long": (lambda p, g: p.write_bytes(g.read_bytes() + b"\0"), "not a safetensors file"),
    "foreign": (lambda p, g: save_file({"w": torch.ones(2)}, p), "not a trimtab steering"),
    "foreign metadata": (
        lambda p, g: save_file({"w": torch.ones(2)}, p, {"format": "pt"}),
        "not a trimtab steering",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path: Path, good: Path, name: str) -> None:
    write, says = BAD_FILES[name]
    path = tmp_path / "bad.safetensors"
    write(path, good)
    _refused(path, says)


def test_a_torch_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    torch.save({"vector": torch.ones(3)}, path)
    _refused(path, "not a safetensors file")


# -- damage at random -------------------------------------------------------------------------


def _load_or_refuse(path: Path) -> None:
    """Whatever the file holds: a steering that works and can be saved again, or a TrimtabError."""
    try:
        loaded = Steering.load(path)
    except tt.TrimtabError as error:
        message = str(error)
    else:
        message = ""
        _use(loaded, path.with_name("again.safetensors"))
    assert "\n" not in message


def _use(loaded: Steering, path: Path) -> None:
    for intervention in loaded.interventions:
        operator = intervention.operator
        operator.check()
        if operator.width < 10_000:
            assert apply(operator, torch.zeros(1, operator.width), loaded.setting).dim() == 2
    assert loaded.label
    assert Steering.load(loaded.save(path, overwrite=True)).label == loaded.label


fuzz = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(st.data())
def test_damaged_bytes(tmp_path: Path, good: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    # Half of the flips in the header, where they do most.
    places = st.one_of(st.integers(0, header + 7), st.integers(0, len(content) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 4)) == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    _load_or_refuse(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def _places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value in a JSON document."""
    found = [way] if way else []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += _places(inner, (*way, key))
    return found


@fuzz
@given(st.data())
def test_damaged_document(tmp_path: Path, good: Path, data: st.DataObject) -> None:
    document, tensors = _document(good), load_file(good)
    for _ in range(data.draw(st.integers(1, 2))):
        places = _places(document)
        *way, last = data.draw(st.sampled_from(places))
        inner: Any = document
        for step in way:
            inner = inner[step]
        inner[last] = data.draw(_JSON)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, {"trimtab": json.dumps(document)})
    _load_or_refuse(path)


# -- writing ----------------------------------------------------------------------------------


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_text("precious")
    with pytest.raises(tt.TrimtabError, match=r"exists.*--overwrite"):
        _steering().save(path)
    with pytest.raises(tt.TrimtabError, match="not a steering, and overwriting replaces only"):
        _steering().save(path, overwrite=True)
    assert path.read_text() == "precious"
    path.unlink()
    _steering().save(path)
    assert _steering().save(path, overwrite=True) == path
    _equal(Steering.load(path), replace(_steering(), date=Steering.load(path).date))
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    path = _steering().save(tmp_path / "file.safetensors")
    (tmp_path / "plain").write_text("x")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def _no_replace(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tt.TrimtabError),
        (OSError("something else"), tt.TrimtabError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
    existing: bool,
) -> None:
    path = tmp_path / "file.safetensors"
    if existing:
        _steering().save(path)
    before = path.read_bytes() if existing else b""
    _no_replace(monkeypatch, error)
    with pytest.raises(expected) as caught:
        _steering().save(path, overwrite=True)
    if expected is tt.TrimtabError:
        assert f"cannot write {path}: " in str(caught.value)
        assert str(caught.value).endswith(("No space left on device", "something else"))
    assert [file.name for file in tmp_path.iterdir()] == (["file.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == before


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    # A limit on the size of files fails as a full disk does: in the middle of a write.
    steering = _steering()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(tt.TrimtabError, match=r"cannot write .*File too large"):
            steering.save(tmp_path / "file.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(tt.TrimtabError, match=r"cannot write .*No such file or directory"):
        _steering().save(tmp_path / "missing" / "file.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(tt.TrimtabError, match="cannot write"):
        _steering().save(tmp_path / "folder", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "change",
    [
        {"interventions": (tt.Intervention("layers.0.resid", Add(torch.tensor([_NAN] * 48))),)},
        {"interventions": (tt.Intervention("layers.0.mlp", Add(torch.ones(48))),)},
        {"tables": {"score": torch.tensor([_INF])}},
        {"dial": tt.Dial("alpha", _NAN, (0, 1))},
        {"hyperparameters": {"alpha": _NAN}},
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(tt.TrimtabError):
        _steering(**change).save(path)
    assert list(tmp_path.iterdir()) == []
