"""The artifact: what a file holds, that it comes back whole, and that no write leaves half of
one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from helpers import CALIBRATION, refused_in_one_line
from steerings import INF, MODEL, NAN, content_of, document_of, equal_steerings, some_steering
from tiny import tiny_model, tiny_tokenizer
from trimtab.steering import Steering
from trimtab.steering.operators import Ablate, Add, Operator, Rotate, Scale, Turn, apply

# -- save and load ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 3, -2.5, 0.0])
def test_round_trip(tmp_path: Path, value: float | None) -> None:
    steering = some_steering()
    if value is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # -2.5 is out of this dial's range
            steering = steering.at(value)
    path = steering.save(tmp_path / "one.safetensors")
    assert path == tmp_path / "one.safetensors"
    loaded = Steering.load(path)
    equal_steerings(steering, loaded)
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
    steering = some_steering(interventions=(*ten, *operators), tables={})
    equal_steerings(steering, Steering.load(steering.save(tmp_path / "file.safetensors")))


def test_one_vector_at_several_sites(tmp_path: Path) -> None:
    vector = torch.randn(96)
    operators = [Add(vector[:48]), Add(vector[:48]), Add(vector[::2])]
    steering = some_steering(
        interventions=tuple(tt.Intervention("layers.0.resid", operator) for operator in operators)
    )
    equal_steerings(steering, Steering.load(steering.save(tmp_path / "file.safetensors")))


def test_unusual_text(tmp_path: Path) -> None:
    model = replace(MODEL, name='a "name"\n\u2028 漢字')
    steering = some_steering(model=model, contrast={"name": "\\ é 🙂", "rows": 10**30})
    equal_steerings(steering, Steering.load(steering.save(tmp_path / "sub .safetensors")))


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
    steering = some_steering(interventions=(tt.Intervention("layers.0.ffn_in", made),))
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
    steering = some_steering(findings=findings)
    loaded = Steering.load(steering.save(tmp_path / "file.safetensors"))
    assert json.dumps(loaded.findings, sort_keys=True) == json.dumps(findings, sort_keys=True)
    assert loaded.at(3).findings == findings


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, {"deep": x}]], ids=["bare", "deep"])
def test_findings_that_are_no_numbers_are_not_saved(
    tmp_path: Path, value: float, wrap: Callable[[float], Any]
) -> None:
    with pytest.raises(tt.TrimtabError, match=r"this steering .*: findings:"):
        some_steering(findings={"score": wrap(value)}).save(tmp_path / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_from_before_findings_and_absolute_load(tmp_path: Path) -> None:
    """Both came later: a file without them means no findings, and plain scaling."""
    path = some_steering(findings={}).save(tmp_path / "new.safetensors")
    document = document_of(path)
    del document["findings"]
    del document["interventions"][0]["fields"]["absolute"]
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {"trimtab": json.dumps(document)})
    equal_steerings(Steering.load(old), Steering.load(path))
    (first, _) = Steering.load(old).interventions
    assert isinstance(first.operator, Scale)
    assert first.operator.absolute is False
    assert Steering.load(old).findings == {}
    # Saved again it is a file like any other of today.
    assert Steering.load(old).save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "method",
    [tt.AUSteer(k=5, alpha=4, site="ffn_out", direction="paper"), tt.CAA(layer=1, token="mean")],
)
def test_what_a_method_makes(tmp_path: Path, method: Any) -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "tiny")
    contrast = tt.Contrast.from_pairs([(f"The {i}", " yes", " no") for i in range(5)], "mine")
    steering = method.fit(lm, contrast)
    path = steering.save(tmp_path / "file.safetensors")
    loaded = Steering.load(path)
    equal_steerings(steering, loaded)
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with lm.steered(steering):
        expected = lm.model(torch.tensor([[1, 20, 30]])).logits
    with lm.steered(loaded):
        assert torch.equal(lm.model(torch.tensor([[1, 20, 30]])).logits, expected)


# -- what is in the file ----------------------------------------------------------------------


def test_metadata_says_where_it_came_from(tmp_path: Path) -> None:
    document = document_of(some_steering().save(tmp_path / "file.safetensors"))
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
    path = some_steering().save(tmp_path / "file.safetensors")
    header, data = content_of(path)
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
    path = some_steering().save(tmp_path / "file.safetensors")
    Steering.load(path)
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())


# -- the dial ---------------------------------------------------------------------------------


def test_at_turns_a_copy() -> None:
    steering = some_steering()
    turned = steering.at(12)
    assert (steering.setting, steering.value) == (8, None)
    assert turned.setting == turned.value == 12
    assert turned is not steering
    # Shared, so that one hook serves two dials of one steering.
    assert turned.interventions is steering.interventions
    assert turned.at(3).setting == 3
    assert (steering.label, turned.label) == ("austeer alpha=8", "austeer alpha=12")
    degrees = some_steering(method="ss", dial=tt.Dial("theta", 90, (0, 360), "°"))
    assert degrees.label == "ss theta=90°"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_at_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(tt.TrimtabError, match="the dial alpha cannot be"):
        some_steering().at(value)


def test_at_warns_out_of_range() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (0, 100, 50.5):
            some_steering().at(value)
    for value in (-0.1, 100.1):
        with pytest.warns(tt.TrimtabWarning, match=rf"alpha = {value} .* 0 to 100") as caught:
            assert some_steering().at(value).setting == value
        assert caught[0].filename == __file__


# -- calibration ------------------------------------------------------------------------------


def test_a_calibrated_dial_by_its_budget() -> None:
    steering = some_steering(calibration=CALIBRATION, dial=tt.Dial("alpha", 8.0, (-100.0, 100.0)))
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
    steering = some_steering(calibration=CALIBRATION)
    one_sided = some_steering(
        calibration=replace(CALIBRATION, negative=(), negative_worst5=(), positive=(None,) * 3)
    )
    other: Any = "both"
    for action, says in (
        (lambda: steering.at(kl=1.1), "calibrated up to 1 nats, not to 1.1"),
        (lambda: steering.at(kl=0.2, median=True), "calibrated up to 0.1 nats"),
        (lambda: one_sided.at(kl=0.1, side="negative"), "no dials of the negative side"),
        (lambda: one_sided.at(kl=0.1, median=True), "no dials of the positive side"),
        (lambda: steering.at(kl=0.1, side=other), "side is 'both'"),
        (lambda: some_steering().at(kl=0.1), "austeer steering is not calibrated.* 0.1 nats"),
        (lambda: steering.at(3, kl=0.1), "a dial, or kl="),
        (lambda: steering.at(), "a dial, or kl="),
        *((lambda kl=kl: steering.at(kl=kl), "above 0 nats") for kl in (0.0, -1.0, NAN, INF)),
    ):
        refused_in_one_line(action, says)
    assert one_sided.at(kl=0.1).setting == 4.0


def test_a_calibration_comes_back(tmp_path: Path) -> None:
    for calibration in (CALIBRATION, replace(CALIBRATION, negative=(), negative_worst5=()), None):
        path = some_steering(calibration=calibration).save(
            tmp_path / "c.safetensors", overwrite=True
        )
        loaded = Steering.load(path)
        assert loaded.calibration == calibration
        again = loaded.save(tmp_path / "again.safetensors", overwrite=True)
        assert again.read_bytes() == path.read_bytes()


def test_files_from_before_calibrations_load(tmp_path: Path) -> None:
    path = some_steering().save(tmp_path / "new.safetensors")
    document = document_of(path)
    assert document.pop("calibration") is None
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {"trimtab": json.dumps(document)})
    equal_steerings(Steering.load(old), Steering.load(path))
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
    path = some_steering(calibration=CALIBRATION).save(tmp_path / "good.safetensors")
    document = document_of(path)
    document["calibration"] |= damage
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(path), bad, {"trimtab": json.dumps(document)})
    refused_in_one_line(lambda: Steering.load(bad), rf"bad\.safetensors.*{says}")


def test_read_with_a_budget(tmp_path: Path) -> None:
    path = some_steering(calibration=CALIBRATION).save(tmp_path / "c.safetensors")
    plain = some_steering().save(tmp_path / "plain.safetensors")
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


# -- writing ----------------------------------------------------------------------------------


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_text("precious")
    with pytest.raises(tt.TrimtabError, match=r"exists.*--overwrite"):
        some_steering().save(path)
    with pytest.raises(tt.TrimtabError, match="not a steering, and overwriting replaces only"):
        some_steering().save(path, overwrite=True)
    assert path.read_text() == "precious"
    path.unlink()
    some_steering().save(path)
    assert some_steering().save(path, overwrite=True) == path
    equal_steerings(Steering.load(path), replace(some_steering(), date=Steering.load(path).date))
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    path = some_steering().save(tmp_path / "file.safetensors")
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
        some_steering().save(path)
    before = path.read_bytes() if existing else b""
    _no_replace(monkeypatch, error)
    with pytest.raises(expected) as caught:
        some_steering().save(path, overwrite=True)
    if expected is tt.TrimtabError:
        assert f"cannot write {path}: " in str(caught.value)
        assert str(caught.value).endswith(("No space left on device", "something else"))
    assert [file.name for file in tmp_path.iterdir()] == (["file.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == before


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    # A limit on the size of files fails as a full disk does: in the middle of a write.
    steering = some_steering()
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
        some_steering().save(tmp_path / "missing" / "file.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(tt.TrimtabError, match="cannot write"):
        some_steering().save(tmp_path / "folder", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "change",
    [
        {"interventions": (tt.Intervention("layers.0.resid", Add(torch.tensor([NAN] * 48))),)},
        {"interventions": (tt.Intervention("layers.0.mlp", Add(torch.ones(48))),)},
        {"tables": {"score": torch.tensor([INF])}},
        {"dial": tt.Dial("alpha", NAN, (0, 1))},
        {"hyperparameters": {"alpha": NAN}},
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(tt.TrimtabError):
        some_steering(**change).save(path)
    assert list(tmp_path.iterdir()) == []
