"""Bad and damaged steering files: each is refused in one line or is a steering that works."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from steerings import INF, NAN, content_of, document_of, equal_steerings, some_steering
from trimtab.steering import Steering
from trimtab.steering.operators import apply

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
    "next version": (_edit("format", 4), "format 3: format"),
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
    "dial nan": (_edit("dial.default", NAN), "dial.default"),
    "dial inf": (_edit("dial.default", INF), "dial.default"),
    "dial as text": (_edit("dial.default", "8"), "dial.default"),
    "dial null": (_edit("dial.default", None), "dial.default"),
    "range nan": (_edit("dial.range.0", NAN), "dial.range"),
    "range inf": (_edit("dial.range.1", -INF), "dial.range"),
    "range backwards": (_edit("dial.range", [100, 0]), "range"),
    "range of three": (_edit("dial.range", [0, 1, 2]), "dial.range"),
    "range of one": (_edit("dial.range", [0]), "dial.range"),
    "value nan": (_edit("value", NAN), "value"),
    "value inf": (_edit("value", -INF), "value"),
    "value huge": (_edit("value", 10**400), "value"),
    "value as text": (_edit("value", "8"), "value"),
    "finding nan": (_edit("findings.trials.0.kl", NAN), "findings"),
    "finding inf": (_edit("findings.source_site", -INF), "findings"),
    "findings list": (_edit("findings", [1]), "findings"),
    "findings null": (_edit("findings", None), "findings"),
    "absolute as number": (_edit("interventions.0.fields.absolute", 1), "absolute of Scale"),
    "clamped and absolute": (
        lambda d, t: d["interventions"][0]["fields"].update(absolute=True, clamp_sign=True),
        "both clamp_sign and absolute",
    ),
    "hyperparameter nan": (_edit("hyperparameters.alpha", NAN), "hyperparameters"),
    "contrast inf": (_edit("contrast.rows", INF), "contrast"),
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
    "complex table": (_put("table.score", torch.full((3,), NAN * 1j)), "complex64"),
    "bool table": (_put("table.score", torch.ones(3, dtype=torch.bool)), "torch.bool"),
    "unit out of range": (_put("0.units", torch.tensor([3, 0, 48])), "0 to 47"),
    "negative unit": (_put("0.units", torch.tensor([3, -1, 47])), "0 to 47"),
    "unit twice": (_put("0.units", torch.tensor([3, 47, 47])), "twice"),
    "unit without gain": (_put("0.units", torch.tensor([3, 0])), "one length"),
    "units as matrix": (_put("0.units", torch.tensor([[3, 0, 47]])), "one length"),
    "vector as matrix": (_put("1.vector", torch.ones(6, 8)), r"\[6, 8\]"),
    "vector as number": (_put("1.vector", torch.tensor(1.0)), r"\[\]"),
    "vector of nothing": (_put("1.vector", torch.ones(0)), r"\[0\]"),
    "gain nan": (_put("0.gain", torch.tensor([1.0, NAN, 1.0])), "'0.gain' holds NaN"),
    "vector inf": (_put("1.vector", torch.full((48,), INF)), "'1.vector' holds NaN or inf"),
    "table nan": (_put("table.score", torch.tensor([NAN])), "'table.score' holds NaN"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_steering().at(12).save(tmp_path_factory.mktemp("good") / "good.safetensors")


@pytest.mark.parametrize("name", BAD)
def test_bad_document_or_tensor(tmp_path: Path, good: Path, name: str) -> None:
    edit, says = BAD[name]
    document, tensors = document_of(good), load_file(good)
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
    save_file(load_file(good), path, {"trimtab": json.dumps(document_of(good))})
    equal_steerings(Steering.load(path), Steering.load(good))


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
    header, data = content_of(good)
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
    document, tensors = document_of(good), load_file(good)
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
