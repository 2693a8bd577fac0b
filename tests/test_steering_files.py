"""Steering files that mean nothing: refused in one short line, or read as what they are, and never
as something else."""

from __future__ import annotations

import gc
import json
import random
import struct
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab as tt
from helpers import CALIBRATION, basis, language_model
from steering_documents import LARGEST, MODEL, as_of_old, content, document_of, every, good, refused
from trimtab.anatomy.sites import BLOCK_KINDS, parse_site
from trimtab.steering import Steering
from trimtab.steering.calibration import Calibration
from trimtab.steering.operators import Ablate, Add, Scale

__all__ = ["good"]  # fixtures, which pytest finds by their names here

# -- what means nothing -------------------------------------------------------------------------

NOTHING: dict[str, tuple[Any, ...]] = {
    "no intervention": (),
    "a vector of zeros": (tt.Intervention("layers.0.resid", Add(torch.zeros(48))),),
    "no unit": (
        tt.Intervention("layers.0.resid", Scale(torch.tensor([]).long(), torch.tensor([]), 48)),
    ),
    "gains of zero": (
        tt.Intervention("layers.0.resid", Scale(torch.tensor([1, 2]), torch.zeros(2), 48)),
        tt.Intervention("layers.1.resid", Add(torch.zeros(48))),
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_is_no_file(name: str, tmp_path: Path) -> None:
    nothing = replace(every(), interventions=NOTHING[name])
    assert not nothing.acts
    refused(lambda: nothing.save(tmp_path / "x.safetensors"), "this steering does nothing")
    assert list(tmp_path.iterdir()) == []
    # Beside one that acts it may stand.
    some = replace(nothing, interventions=(*nothing.interventions, every().interventions[2]))
    assert some.acts
    path = some.save(tmp_path / "some.safetensors")
    document, tensors = document_of(path), load_file(path)
    count = len(document["interventions"]) - 1
    del document["interventions"][count], tensors[f"{count}.vector"]
    bad = as_of_old(tmp_path / "bad.safetensors", document, tensors)
    refused(lambda: Steering.load(bad), r"bad\.safetensors does nothing")


@pytest.mark.parametrize(
    "method", [tt.AUSteer(k=0, site="ffn_out", direction="paper"), tt.ITI(k=0), tt.SADI(k=0)]
)
def test_the_model_as_it_is_may_be_tried_but_not_saved(method: Any, tmp_path: Path) -> None:
    lm = language_model("llama")
    contrast = tt.Contrast.from_pairs([(f"The {i}", " yes", " no") for i in range(5)])
    refused(
        lambda: method.fit(lm, contrast).save(tmp_path / "x.safetensors"), "steering does nothing"
    )


def test_operators_that_always_act() -> None:
    for one in every().interventions:
        assert replace(every(), interventions=(one,)).acts


@pytest.mark.parametrize("number", [1e300, -1e300, 3.5e38, 1.7e308])
@pytest.mark.parametrize(
    "way",
    ["dial.default", "dial.range.0", "dial.range.1", "value", "calibration.kl.2",
     "calibration.positive.1", "calibration.negative_worst5.0"],
)  # fmt: skip
def test_numbers_beyond_float32(way: str, number: float, good: Path, tmp_path: Path) -> None:
    document = document_of(good)
    *steps, last = [int(step) if step.isdigit() else step for step in way.split(".")]
    inner: Any = document
    for step in steps:
        inner = inner[step]
    inner[last] = number
    bad = as_of_old(tmp_path / "bad.safetensors", document, load_file(good))
    refused(lambda: Steering.load(bad), rf"{way}: .*beyond float32")


@pytest.mark.parametrize(
    "change",
    [
        {"dial": tt.Dial("alpha", 1e300, (0, 1))},
        {"dial": tt.Dial("alpha", 1.0, (0, 3.5e38))},
        {"dial": tt.Dial("alpha", 1.0, (-1e39, 1))},
        {"dial": tt.Dial("alpha", 1.0, (2, 1))},
        {"dial": tt.Dial("alpha" * 100, 1.0, (0, 1))},
        {"value": 1e39},
        {"value": float("nan")},
        {"method": "x" * 1000},
        {"model": replace(MODEL, layers=0)},
        {"model": replace(MODEL, hidden_size=0)},
        {"model": replace(MODEL, name="caf\udce9")},
        {"hyperparameters": {"path": Path("x")}},
        {"findings": {"set": {1, 2}}},
    ],
    ids=str,
)
def test_what_means_nothing_is_not_saved(change: dict[str, Any], tmp_path: Path) -> None:
    refused(lambda: replace(every(), **change).save(tmp_path / "x.safetensors"), "this steering")
    assert list(tmp_path.iterdir()) == []


def test_the_largest_numbers_are_numbers(tmp_path: Path) -> None:
    far = replace(every(), dial=tt.Dial("alpha", 0.0, (-LARGEST, LARGEST)), value=LARGEST)
    loaded = Steering.load(far.save(tmp_path / "x.safetensors"))
    assert (loaded.dial.range, loaded.value) == ((-LARGEST, LARGEST), LARGEST)


@pytest.mark.parametrize(("default", "value"), [(101.0, None), (0.0, -100.5), (500.0, 200.0)])
def test_a_dial_outside_its_range_is_said(
    default: float, value: float | None, tmp_path: Path
) -> None:
    """A method takes any strength, so a file may hold one; whoever loads it hears of it."""
    steering = replace(every(), dial=tt.Dial("alpha", default, (-100.0, 100.0)), value=value)
    path = steering.save(tmp_path / "x.safetensors")
    with pytest.warns(tt.TrimtabWarning, match="outside the sensible range of this austeer"):
        assert Steering.load(path).setting == steering.setting
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where another dial is named at once, it is not
        assert Steering.read(f"{path}@3").setting == 3


# -- sites and operators ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "site",
    ["layers.٠.resid", "layers.007.resid", "layers.00.resid", "layers.+1.resid", "layers.１.resid",
     "layers. 1.resid", "layers.1.resid\n", "layers.1.resid ", "Layers.1.resid", "layers.1.RESID",
     "layers.1_0.resid", "layers.-0.resid", "layers.².resid", "layers.100000.resid",
     "layers.1.rеsid", "layers.1.resid.", "embed ", "layers.1.", "layers..resid", "", "layers.1"],
)  # fmt: skip
def test_each_site_has_one_spelling(site: str, good: Path, tmp_path: Path) -> None:
    refused(lambda: parse_site(site), "unknown site")
    document = document_of(good)
    document["interventions"][0]["site"] = site
    bad = as_of_old(tmp_path / "bad.safetensors", document, load_file(good))
    refused(lambda: Steering.load(bad), "unknown site")


def test_every_site_that_is_written_is_read() -> None:
    for layer in (0, 1, 9, 10, 99, 12345):
        for kind in BLOCK_KINDS:
            assert parse_site(f"layers.{layer}.{kind}") == (layer, kind)
    assert parse_site("embed") == (None, "embed")


#: Fields of each operator by its number in `every`, and whether older files lack it.
FIELDS = [
    (number, name, name == "absolute")
    for number, names in enumerate(
        [["width", "clamp_sign", "absolute"], ["width", "clamp_sign", "absolute"],
         [], [], [], ["adaptive"], ["adaptive"]]
    )
    for name in names
]  # fmt: skip


@pytest.mark.parametrize(("number", "name", "older"), FIELDS)
def test_no_operator_becomes_another_for_lack_of_a_field(
    number: int, name: str, older: bool, good: Path, tmp_path: Path
) -> None:
    document = document_of(good)
    del document["interventions"][number]["fields"][name]
    bad = as_of_old(tmp_path / "bad.safetensors", document, load_file(good))
    if older:
        made: Any = Steering.load(bad).interventions[number].operator
        assert made.absolute is False
    else:
        refused(lambda: Steering.load(bad), rf"needs .*{name}")
    # And in a file of today the checksum tells.
    header, data = content(good)
    header["__metadata__"]["trimtab"] = json.dumps(document)
    raw = json.dumps(header).encode()
    bad.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    refused(lambda: Steering.load(bad), "is damaged" if older else rf"needs .*{name}")


@pytest.mark.parametrize("width", [0, -1, 10**9, 2**62, 10**30])
def test_widths_of_no_model(width: int, good: Path, tmp_path: Path) -> None:
    document = document_of(good)
    document["interventions"][0]["fields"]["width"] = width
    bad = as_of_old(tmp_path / "bad.safetensors", document, load_file(good))
    refused(lambda: Steering.load(bad), "Scale has a width of")


@pytest.mark.parametrize(
    "name", ["table", "0", "00.gain", "99.vector", "", ".", "٠.gain", "tables.x"]
)
def test_tensors_of_nobody(name: str, good: Path, tmp_path: Path) -> None:
    tensors = {**load_file(good), name: torch.ones(3)}
    bad = as_of_old(tmp_path / "bad.safetensors", document_of(good), tensors)
    refused(lambda: Steering.load(bad), f"unexpected tensor '{name}'")


# -- calibrations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"positive_worst5": (4.0, 1.0, 9.0)}, "positive_worst5 does not rise"),
        ({"positive": (6.0, 2.0, None)}, "positive does not rise"),
        ({"negative": (-9.0, None, -3.0)}, "negative does not rise"),
        ({"positive": (0.5, 6.0, None)}, "positive_worst5 allows more than positive"),
        ({"positive": ()}, "positive or positive_worst5, but not both"),
        ({"negative_worst5": ()}, "negative or negative_worst5, but not both"),
        ({"prompts": 0}, "on 0 prompts"),
        (dict.fromkeys(("positive", "positive_worst5", "negative", "negative_worst5"), ()),
         "neither side"),
        ({"kl": (0.1, 0.1, 1.0)}, "budgets must rise"),
        ({"kl": (-0.1, 0.1, 1.0)}, "budgets must rise"),
    ],
)  # fmt: skip
def test_calibrations_that_mean_nothing(damage: dict[str, Any], says: str) -> None:
    refused(lambda: replace(CALIBRATION, **damage), says)


def test_dials_that_fall_are_raised() -> None:
    """By hand: what keeps to a smaller budget keeps to a larger one."""
    made = Calibration.rising(
        kl=[0.1, 0.2, 0.3, 0.4],
        prompts=9,
        digest="",
        positive=(3.0, 2.0, None, 5.0),
        positive_worst5=(1.0, 2.5, 2.0, None),
        negative=(-1.0, None, -0.5, -4.0),
        negative_worst5=(-1.0, -2.0, -0.1, -0.2),
    )
    assert made.positive == (3.0, 3.0, None, 5.0)
    assert made.positive_worst5 == (1.0, 2.5, 2.5, None)
    assert made.negative_worst5 == (-1.0, -2.0, -2.0, -2.0)
    assert made.negative == (-1.0, None, -2.0, -4.0)  # the median allows what 95 % allow
    dials = [made.dial(0.01 * i) for i in range(1, 30)]
    assert all(b > a * (1 - 1e-12) for a, b in pairwise(dials))


def test_old_files_whose_dials_fall_load_with_a_word(good: Path, tmp_path: Path) -> None:
    document = document_of(good)
    document["calibration"]["positive_worst5"] = [4.0, 1.0, 9.0]
    old = as_of_old(tmp_path / "old.safetensors", document, load_file(good))
    with pytest.warns(tt.TrimtabWarning, match=r"old\.safetensors.*did not rise"):
        loaded = Steering.load(old)
    assert loaded.calibration is not None
    assert loaded.calibration.positive_worst5 == (4.0, 4.0, 9.0)
    assert loaded.calibration.positive == (4.0, 6.0, None)


@pytest.mark.parametrize("kl", [(5e-324, 1.0, 1e30), (1.0, 1.0000000000000002, 1e38)])
def test_budgets_far_from_each_other_and_close(kl: tuple[float, ...]) -> None:
    one = replace(CALIBRATION, kl=kl)
    for budget in (kl[0], kl[1], (kl[1] + kl[2]) / 2, kl[2]):
        assert 0 < one.dial(budget) <= 9.0


# -- the checksum -------------------------------------------------------------------------------


def test_every_bit_counts(good: Path, tmp_path: Path) -> None:
    """One bit of the data, or of the document, is never another steering."""
    header, data = content(good)
    start = len(good.read_bytes()) - len(data)
    rng, bad = random.Random(0), tmp_path / "bad.safetensors"
    for at in rng.sample(range(start, start + len(data)), 300):
        raw = bytearray(good.read_bytes())
        raw[at] ^= 1 << rng.randrange(8)
        bad.write_bytes(raw)
        refused(lambda: Steering.load(bad), "bad.safetensors")
    text = header["__metadata__"]["trimtab"]
    for old, new in (("pairs", "parts"), ("austeer", "austear"), ("12.0", "13.0"), (": 3", ": 4")):
        assert old in text
        meta = {**header["__metadata__"], "trimtab": text.replace(old, new, 1)}
        raw_header = json.dumps({**header, "__metadata__": meta}).encode()
        bad.write_bytes(struct.pack("<Q", len(raw_header)) + raw_header + data)
        refused(lambda: Steering.load(bad), "damaged")


def test_tensors_that_changed_places(good: Path, tmp_path: Path) -> None:
    header, data = content(good)
    one, other = header["3.direction"], header["2.vector"]
    header["4.basis"], header["5.basis"] = header["5.basis"], header["4.basis"]
    assert one["shape"] == other["shape"]
    raw = json.dumps(header).encode()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    refused(lambda: Steering.load(bad), "is damaged")


def test_files_without_a_checksum_load(good: Path, tmp_path: Path) -> None:
    old = as_of_old(tmp_path / "old.safetensors", document_of(good), load_file(good))
    again = Steering.load(old).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == good.read_bytes()


def test_one_steering_is_one_file(good: Path, tmp_path: Path) -> None:
    """Byte by byte, in whatever order safetensors writes what is beside the tensors."""
    assert all(
        every().save(tmp_path / f"{i}.safetensors").read_bytes() == good.read_bytes()
        for i in range(20)
    )
    assert load_file(good).keys() == load_file(tmp_path / "0.safetensors").keys()
    (length,) = struct.unpack("<Q", good.read_bytes()[:8])
    assert length % 8 == 0  # so that what follows lies where numbers may be read in place


# -- many interventions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one",
    [
        Scale(torch.tensor([1]), torch.tensor([0.5]), 48),
        Ablate(basis(48, rows=1)[0]),
    ],
)
@pytest.mark.slow
def test_many_interventions_take_no_longer_each(one: Any, tmp_path: Path) -> None:
    """Tensors are found by their names, not by a search through all of them."""
    lm = language_model("llama")

    def seconds(count: int) -> float:
        steering = replace(
            every(),
            interventions=tuple(
                tt.Intervention(f"layers.{i % 3}.resid", one) for i in range(count)
            ),
            model=lm.identity,
        )
        path = tmp_path / "many.safetensors"
        gc.collect()  # what other tests left is none of this one's work
        began = time.process_time()
        loaded = Steering.load(steering.save(path, overwrite=True))
        loaded.check_fits(lm.anatomy, lm.identity)
        assert len(loaded.interventions) == count
        return time.process_time() - began

    seconds(10)
    # Ten times as many took 56 times as long when each looked through all tensors.
    assert seconds(5000) < 30 * max(seconds(500) for _ in range(3))
