"""Vectors out to every tool's file and back: the same steering, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trimtab as tt
from exchanged import WRITTEN, added_by_hand, imported, logits, vector, what
from helpers import add, basis, language_model, one_line, scale, steer, warned
from trimtab.exchange import FORMATS, READERS, Request
from trimtab.steering.operators import Ablate, Add


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def refused(run: Any, *says: str) -> None:
    with pytest.raises(tt.TrimtabError) as caught:
        run()
    message = one_line(caught)
    assert len(message) < 500
    for part in says:
        assert part in message, message


@pytest.mark.parametrize("name", WRITTEN)
def test_one_vector_comes_back(name: str, lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer(lm, ("layers.1.resid", add(48, 1))).at(2.5)
    done = tt.export(lm, steering, name, tmp_path / WRITTEN[name])
    assert done.record["files"] == [str(tmp_path / WRITTEN[name])]
    assert done.exact
    assert not done.left_out
    assert str(tmp_path / WRITTEN[name]) in "".join(done.use)
    back = imported(tmp_path / WRITTEN[name], lm, format=name)
    assert what(back).keys() == {"layers.1.resid"}
    torch.testing.assert_close(what(back), what(steering), rtol=0, atol=0)
    torch.testing.assert_close(logits(lm, back), logits(lm, steering), rtol=0, atol=0)
    assert not torch.allclose(logits(lm, back), logits(lm), atol=0.1)


@pytest.mark.parametrize("name", WRITTEN)
def test_several_come_back(name: str, lm: tt.LanguageModel, tmp_path: Path) -> None:
    """Of two blocks, of two steerings at dials of their own, one with a weight."""
    last = "layers.1.resid" if name == "svec" else "layers.2.resid"
    first = "layers.1.resid" if name == "gguf" else "layers.0.resid"
    one = steer(lm, (first, add(48, 1))).at(-1.5)
    weighted = tt.Intervention(last, add(48, 2), weight=0.5)
    two = tt.Steering("test", {}, (weighted,), tt.Dial("alpha", 3.0, (-9, 9)), lm.identity)
    tt.export(lm, one + two, name, tmp_path / WRITTEN[name])
    back = imported(tmp_path / WRITTEN[name], lm, site="resid")
    torch.testing.assert_close(what(back), what(one) | what(two), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(lm, back), logits(lm, one + two), rtol=1e-4, atol=1e-5)


def test_vectors_at_one_site_are_added_up(lm: tt.LanguageModel, tmp_path: Path) -> None:
    one, two = (steer(lm, ("layers.1.resid", add(48, n))).at(n) for n in (1, 2))
    tt.export(lm, one + two, "gguf", tmp_path / "x.gguf")
    both = what(one)["layers.1.resid"] + what(two)["layers.1.resid"]
    found = what(imported(tmp_path / "x.gguf", lm))["layers.1.resid"]
    torch.testing.assert_close(found, both)


def test_the_dial_is_the_tools_own_where_it_has_one(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer(lm, ("layers.1.resid", add(48, 1))).at(-2.5)
    for name in ("lm-eval", "steering-lite", "vllm-lens"):
        tt.export(lm, steering, name, tmp_path / WRITTEN[name])
        back = imported(tmp_path / WRITTEN[name], lm)
        assert back.dial == tt.Dial("alpha", -2.5, (-20.0, 20.0))
        (each,) = back.interventions
        assert torch.equal(each.operator.added, add(48, 1).vector)
    tt.export(lm, steering, "gguf", tmp_path / "x.gguf")
    assert imported(tmp_path / "x.gguf", lm).dial == tt.Dial("alpha", 1.0, (-20.0, 20.0))


def test_what_an_imported_steering_knows(lm: tt.LanguageModel, tmp_path: Path) -> None:
    from trimtab.files import file_digest

    tt.export(lm, steer(lm, ("layers.1.resid", add(48, 1))), "gguf", tmp_path / "x.gguf")
    back = imported(tmp_path / "x.gguf", lm)
    assert back.method == "imported"
    assert back.contrast == {}
    digest = file_digest(tmp_path / "x.gguf")
    about = {"format": "gguf", "file": "x.gguf", "sha256": digest, "model_type": "llama"}
    assert back.hyperparameters == about
    assert back.model == lm.identity
    loaded = tt.Steering.load(back.save(tmp_path / "x.safetensors"))
    assert loaded.digest == back.digest
    assert loaded.hyperparameters == about


def test_the_dial_is_measured(lm: tt.LanguageModel, tmp_path: Path) -> None:
    tt.export(lm, steer(lm, ("layers.1.resid", add(48, 1))).at(4), "lm-eval", tmp_path / "x.pt")
    measured = tt.import_steering(tmp_path / "x.pt", lm)
    assert measured.setting == 4  # the file's own
    assert measured.calibration is not None
    assert measured.findings["measured"]["prompts"] == 8


@pytest.mark.parametrize("name", WRITTEN)
def test_an_output_that_exists_is_kept(name: str, lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering, path = steer(lm, ("layers.1.resid", add(48, 1))), tmp_path / WRITTEN[name]
    path.write_text("mine")
    refused(lambda: tt.export(lm, steering, name, path), "exists")
    assert path.read_text() == "mine"
    tt.export(lm, steering, name, path, overwrite=True)
    assert imported(path, lm).interventions
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
def test_a_real_model(smollm2: Any, tmp_path: Path) -> None:
    """Out and in again, SmolLM2 writes the same tokens."""
    steering = steer(smollm2, ("layers.12.resid", add(576, 1, size=2.0))).at(1.5)
    prompts = ["Today I feel", "The ship left the harbour"]
    expected = smollm2.generate(prompts, max_new_tokens=8, steering=steering)
    plain = smollm2.generate(prompts, max_new_tokens=8)
    assert [one.tokens for one in plain] != [one.tokens for one in expected]
    for name, file in WRITTEN.items():
        tt.export(smollm2, steering, name, tmp_path / file)
        back = imported(tmp_path / file, smollm2)
        assert what(back).keys() == {"layers.12.resid"}
        found = smollm2.generate(prompts, max_new_tokens=8, steering=back)
        assert [one.tokens for one in found] == [one.tokens for one in expected]


# -- what a format cannot carry -------------------------------------------------------------------


def test_only_vectors_go_out(lm: tt.LanguageModel, tmp_path: Path) -> None:
    for name, file in WRITTEN.items():

        def out(steering: tt.Steering, name: str = name, file: str = file) -> Any:
            return lambda: tt.export(lm, steering, name, tmp_path / file)

        refused(out(steer(lm, ("layers.1.heads", scale(64)))), "layers.1.heads", "trimtab bake")
        ablated = steer(lm, ("layers.1.resid", Ablate(basis(48, rows=1)[0])))
        refused(out(ablated), "Ablate adds no vector", "trimtab bake")
        kept = steer(lm, ("layers.1.resid", Add(vector(1), "always")))
        refused(out(kept), "keeps the norm", "trimtab attaches")
        prompt = steer(lm, ("layers.1.resid", add(48)), positions="prompt")
        refused(out(prompt), "acts on 'prompt'", "scoped('all')")
        refused(out(steer(lm, ("layers.1.resid", add(48))).at(0)), "does nothing")
        assert not list(tmp_path.iterdir())


def test_a_gate_is_not_left_aside(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer(lm, ("layers.1.resid", add(48)))
    object.__setattr__(steering, "gate", "where the text is about ships")  # it is frozen
    for name, file in WRITTEN.items():
        asked = Request(lm, (steering,), tmp_path / file)
        refused(lambda name=name, asked=asked: FORMATS[name](asked), "under a gate")


def test_a_dial_beyond_float32(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer(lm, ("layers.1.resid", Add(1e30 * vector(1))))
    steering = tt.Steering(**{**vars(steering), "value": 1e30})
    for name in WRITTEN:
        out = tmp_path / WRITTEN[name]
        refused(lambda name=name, out=out: tt.export(lm, steering, name, out), "beyond float32")


def test_blocks_that_a_format_does_not_know(lm: tt.LanguageModel, tmp_path: Path) -> None:
    def out(site: str, name: str) -> Any:
        steering = steer(lm, (site, add(48)))
        return lambda: tt.export(lm, steering, name, tmp_path / WRITTEN[name])

    refused(out("layers.0.resid", "gguf"), "nothing after block 0", "trimtab bake")
    for name in WRITTEN.keys() - {"svec", "lm-eval"}:
        refused(out("embed", name), "before the first block")
    refused(out("layers.2.resid", "svec"), "nothing after block 2")
    refused(out("embed", "lm-eval"), "no module puts this out")
    refused(out("layers.1.attn_out", "gguf"), "outputs of blocks")
    assert not list(tmp_path.iterdir())
    out("embed", "svec")()  # what layer 0 takes in
    assert what(imported(tmp_path / "vector.svec", lm)).keys() == {"embed"}


def test_the_part_that_fits(lm: tt.LanguageModel, tmp_path: Path) -> None:
    parts = [("layers.0.resid", add(48, 1)), ("layers.1.resid", add(48, 2))]
    steering = steer(lm, *parts, ("layers.1.heads", scale(64))).at(2)
    done = tt.export(lm, steering, "gguf", tmp_path / "x.gguf", split=True)
    assert [left.split(":")[0] for left in done.left_out] == ["layers.1.heads", "layers.0.resid"]
    assert what(imported(tmp_path / "x.gguf", lm)).keys() == {"layers.1.resid"}
    nothing = steer(lm, ("layers.1.heads", scale(64)))
    refused(lambda: tt.export(lm, nothing, "gguf", tmp_path / "y.gguf", split=True), "nothing is")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "phi3", "qwen3_moe"])
def test_what_a_block_ends_with_is_added_after_it(architecture: str, tmp_path: Path) -> None:
    """An FFN's output is the last that a block adds: a vector there is one after the block; not so
    where a norm stands between (Gemma)."""
    lm = language_model(architecture)
    steering = steer(lm, ("layers.1.ffn_out", add(lm.anatomy.hidden_size, 1))).at(2)
    if lm.anatomy.has("ffn_post_norm"):
        refused(lambda: tt.export(lm, steering, "gguf", tmp_path / "x.gguf"), "outputs of blocks")
        return
    tt.export(lm, steering, "gguf", tmp_path / "x.gguf")
    back = imported(tmp_path / "x.gguf", lm)
    assert what(back).keys() == {"layers.1.resid"}
    torch.testing.assert_close(logits(lm, back), logits(lm, steering), rtol=1e-4, atol=1e-5)


def test_lm_eval_writes_no_table(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer(lm, ("layers.1.resid", add(48)))
    refused(lambda: tt.export(lm, steering, "lm-eval", tmp_path / "x.csv"), ".pt", "autoencoders")


# -- bare vectors ---------------------------------------------------------------------------------


def _as_npy(path: Path, tensor: Any) -> Path:
    import numpy as np

    with path.with_suffix(".npy").open("wb") as file:
        np.save(file, tensor.numpy())
    return path.with_suffix(".npy")


def _as_pt(path: Path, tensor: Any) -> Path:
    torch.save(tensor, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def _as_safetensors(path: Path, tensor: Any) -> Path:
    save_file({"direction": tensor}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("saved", [_as_npy, _as_pt, _as_safetensors])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_bare_vector(saved: Any, dtype: Any, lm: tt.LanguageModel, tmp_path: Path) -> None:
    path = saved(tmp_path / "x", vector(1).to(dtype))
    refused(lambda: imported(path, lm), "48 units", "--site layers.12.resid")
    back = imported(path, lm, site="layers.1.resid")
    assert back.hyperparameters["format"] == "tensor"
    expected = added_by_hand(lm, {1: vector(1).to(dtype).float()})
    torch.testing.assert_close(logits(lm, back), expected, rtol=0, atol=0)
    assert what(imported(path, lm, site="embed")).keys() == {"embed"}
    refused(lambda: imported(path, lm, site="layers.3.resid"), "layer 3 is out of range")
    refused(lambda: imported(path, lm, site="resid"), "unknown site")
    refused(lambda: imported(path, lm, site="layers.1.heads"), "64 units", "48")


@pytest.mark.parametrize("saved", [_as_npy, _as_pt, _as_safetensors])
def test_a_row_for_each_layer(saved: Any, lm: tt.LanguageModel, tmp_path: Path) -> None:
    rows = torch.stack([vector(n) for n in range(3)])
    path = saved(tmp_path / "x", rows)
    refused(lambda: imported(path, lm), "3 rows", "--site")
    back = imported(path, lm, site=("layers.0.resid", "layers.2.resid"))
    expected = added_by_hand(lm, {0: rows[0], 2: rows[2]})
    torch.testing.assert_close(logits(lm, back), expected, rtol=0, atol=0)
    assert len(imported(path, lm, site="ffn_out").interventions) == 3
    refused(lambda: imported(path, lm, site="layers.7.resid"), "nothing for layers.7.resid")
    refused(lambda: imported(saved(tmp_path / "y", rows[:2]), lm, site="resid"), "2 rows")


def test_numbers_that_are_none(lm: tt.LanguageModel, tmp_path: Path) -> None:
    for number, bad in enumerate((float("nan"), float("inf"), 1e300)):
        tensor = vector(1).double()
        tensor[5] = bad
        path = _as_npy(tmp_path / f"{number}", tensor)
        refused(lambda path=path: imported(path, lm, site="layers.1.resid"), "NaN or infinity")
    zeros = _as_npy(tmp_path / "zeros", torch.zeros(48))
    refused(lambda: imported(zeros, lm, site="layers.1.resid"), "no vector but zeros")
    whole = _as_npy(tmp_path / "whole", torch.ones(48, dtype=torch.int64))
    refused(lambda: imported(whole, lm, site="layers.1.resid"), "int64")


# -- which format a file is of --------------------------------------------------------------------


def test_the_formats_have_their_names() -> None:
    assert WRITTEN.keys() <= FORMATS.keys()
    assert WRITTEN.keys() <= READERS.keys()


def test_another_format_is_refused(lm: tt.LanguageModel, tmp_path: Path) -> None:
    tt.export(lm, steer(lm, ("layers.1.resid", add(48))), "gguf", tmp_path / "x.gguf")
    for name in READERS.keys() - {"gguf", "repeng"}:
        refused(lambda name=name: imported(tmp_path / "x.gguf", lm, format=name), name)
    refused(lambda: imported(tmp_path / "x.gguf", lm, format="onnx"), "known are lora, gguf")
    refused(lambda: imported(tmp_path / "none.gguf", lm), "cannot read", "none.gguf")
    refused(lambda: imported(tmp_path, lm), "it is no file")
    refused(lambda: imported(Path("/dev/zero"), lm), "it is no file")
    refused(lambda: imported(tmp_path / ("x" * 5000), lm), "cannot read")
    refused(lambda: imported(tmp_path / "nul\0", lm), "cannot read")
    for text in ("", "hello", "a,b\n1,2\n", "{}", "[]", '{"vector": [1, 2]}', "null", "[" * 10**5):
        (tmp_path / "x").write_text(text)
        refused(lambda: imported(tmp_path / "x", lm), str(tmp_path / "x"))
    own = steer(lm, ("layers.1.resid", add(48))).save(tmp_path / "own.safetensors")
    refused(lambda: imported(own, lm), "already")


def test_a_model_of_another_kind_is_said(lm: tt.LanguageModel, tmp_path: Path) -> None:
    content = {"model_type": "gemma2", "directions": {"1": vector(1).tolist()}}
    (tmp_path / "x.svec").write_text(json.dumps(content))
    said = warned(lambda: imported(tmp_path / "x.svec", lm))
    assert len(said) == 1
    assert "made for gemma2" in said[0]
    tt.export(lm, steer(lm, ("layers.1.resid", add(48))), "svec", tmp_path / "y.svec")
    assert not warned(lambda: imported(tmp_path / "y.svec", lm))


@pytest.mark.filterwarnings("ignore:.*made for:trimtab.TrimtabWarning")
def test_sizes_that_do_not_fit(lm: tt.LanguageModel, tmp_path: Path) -> None:
    wide = language_model("phi3")
    for name in WRITTEN.keys() - {"persona-vectors"}:
        path = tmp_path / WRITTEN[name]
        tt.export(wide, steer(wide, ("layers.1.resid", add(64))), name, path)
        refused(lambda path=path: imported(path, lm), "48 units", "64")
    deep = language_model("gemma3")
    tt.export(deep, steer(deep, ("layers.3.resid", add(48))), "gguf", tmp_path / "deep.gguf")
    refused(lambda: imported(tmp_path / "deep.gguf", lm), "has 0 to 2")


# -- adapters of ours -----------------------------------------------------------------------------


def test_an_adapter_comes_back(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer(lm, ("layers.1.heads", scale(64))).at(2.5)
    tt.export(lm, steering, "lora", tmp_path / "adapter")
    back = imported(tmp_path / "adapter", lm)
    assert back.digest == steering.digest
    assert back.setting == 2.5
    torch.testing.assert_close(logits(lm, back), logits(lm, steering), rtol=0, atol=0)
    other = language_model("gemma2")
    refused(lambda: imported(tmp_path / "adapter", other), "sizes do not fit")
    refused(lambda: imported(tmp_path, lm, format="lora"), "no adapter's directory")
    two = steer(lm, ("layers.0.heads", scale(64)))
    tt.export(lm, steering + two, "lora", tmp_path / "two")
    refused(lambda: imported(tmp_path / "two", lm), "2 steerings together", "trimtab/")
