"""How models are opened: precision, devices, quantising, revisions, memory, the hub, messages."""

from __future__ import annotations

import importlib.util
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from commands import Command, home, refused, save_model, trimtab, work
from helpers import PROMPTS, relative, steer_at, warned
from tiny import tiny_model, tiny_tokenizer
from trimtab.checkpoints import Found, counted, weight_bytes
from trimtab.model import holding

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A checkpoint in half precision."""
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def refusal(run: Any) -> str:
    with pytest.raises(tt.TrimtabError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- precision and devices ---------------------------------------------------------------------


def test_dtypes(half: Path) -> None:
    for dtype in ("auto", None, "float32"):
        assert tt.load(half, device="cpu", dtype=dtype).dtype is torch.float32
    assert tt.load(half, device="cpu").dtype is torch.float32
    assert tt.load(half, device="cpu", dtype="checkpoint").dtype is torch.bfloat16
    # On a card the default is the checkpoint's own.
    card, cpu = torch.device("cuda"), torch.device("cpu")
    assert holding.precision_of("auto", holding.on_cpu(card, None)) == "auto"
    assert holding.precision_of("auto", holding.on_cpu(card, "auto")) == "auto"
    assert holding.precision_of(None, holding.on_cpu(card, {"": "cpu"})) is torch.float32
    assert holding.precision_of("auto", holding.on_cpu(cpu, "auto")) is torch.float32
    assert "known are auto, checkpoint, float32" in refusal(lambda: tt.load(half, dtype="int8"))
    assert "dtype is 8" in refusal(lambda: tt.load(half, dtype=8))  # type: ignore[arg-type]


def test_a_device_map(half: Path) -> None:
    plain = tt.load(half, device="cpu")
    spread = tt.load(half, device_map={"": "cpu"})
    steering = steer_at(plain, "ffn_out")
    one, other = (lm.logits(PROMPTS, steering=steering) for lm in (plain, spread))
    torch.testing.assert_close(one, other)
    assert "leave device out" in refusal(lambda: tt.load(half, device="cpu", device_map="auto"))
    assert "unknown device 'tpu-9'" in refusal(lambda: tt.load(half, device_map="tpu-9"))


def test_options_for_transformers(half: Path) -> None:
    lm = tt.load(half, device="cpu", attn_implementation="eager")
    assert lm.model.config._attn_implementation == "eager"
    said = refusal(lambda: tt.load(half, attn_implementation="owner/kernel"))
    assert "trust_remote_code" in said
    assert "cannot load" in refusal(lambda: tt.load(half, attn_implementation="nothing"))
    said = refusal(lambda: tt.load(half, quantization="4bit"))
    assert "no argument 'quantization', did you mean" in said
    assert "wrap(model, tokenizer)" in refusal(lambda: tt.load(half, rope_scaling={}))


def test_the_command_line_hands_them_on(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        raise tt.TrimtabError("enough")

    monkeypatch.setattr("trimtab.model.load", load)
    line = "generate --model o/n --revision v1 --quantise 8bit --attn-implementation eager Hi"
    refused(trimtab(line + """ --device-map '{"": "cpu"}'"""), "enough")
    wanted = {"name": "o/n", "revision": "v1", "quantise": "8bit", "attn_implementation": "eager"}
    assert wanted.items() <= asked.items()
    assert (asked["dtype"], asked["device"], asked["device_map"]) == ("auto", "auto", {"": "cpu"})
    refused(trimtab(f"{line} --device-map auto"), "enough")
    assert asked["device_map"] == "auto"
    refused(trimtab("generate --model o/n --quantise 3bit Hi"), "3bit", "4bit")


# -- quantising --------------------------------------------------------------------------------


def test_quantising_without_bitsandbytes(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "find_spec", lambda name: None)
    said = refusal(lambda: tt.load(half, quantise="4bit"))
    assert "pip install 'trimtab[quantised]'" in said
    assert "known are 4bit, 8bit" in refusal(lambda: tt.load(half, quantise="2bit"))  # type: ignore[arg-type]
    monkeypatch.setattr(holding, "find_spec", importlib.util.find_spec)


@pytest.mark.parametrize("quantise", ["4bit", "8bit"])
def test_quantised_models_are_steered_and_not_baked(quantise: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    whole = tt.load(tmp_path / "m", device="cpu")
    lm = tt.load(tmp_path / "m", device="cpu", quantise=quantise)
    assert lm.quantised
    steering = steer_at(whole, "ffn_out")  # of the original
    steered, plain = lm.logits(PROMPTS, steering=steering), lm.logits(PROMPTS)
    assert relative(steered, plain) > 1e-3
    assert relative(plain, whole.logits(PROMPTS)) < 0.5
    assert "is quantised" in refusal(lambda: tt.bake(lm, steering))
    config = holding.quantisation(quantise, torch.float32, True)
    both = {"quantise": quantise, "quantization_config": config}
    assert "not both" in refusal(lambda: tt.load(tmp_path / "m", **both))
    assert tt.load(tmp_path / "m", device="cpu", quantization_config=config).quantised


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, "60KB"])
def test_weights_are_counted_before_they_are_read(tmp_path: Path, shards: str | None) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    counts, quantised = counted(tmp_path)
    assert not quantised
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    assert weight_bytes(counts, None) == 2 * total
    assert weight_bytes(counts, 4) == 4 * total
    tables = sizes["model.embed_tokens.weight"] + sizes["lm_head.weight"]
    linear = sum(n for name, n in sizes.items() if name.endswith("proj.weight"))
    norms = total - tables - linear
    assert weight_bytes(counts, 4, "8bit") == 4 * (tables + norms) + linear


def test_much_memory_is_said_and_too_much_warned_about(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bytes_of = 4 * sum(p.numel() for p in tiny_model("llama").parameters())
    assert warned(lambda: tt.load(half, device="cpu")) == []
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(holding, "_LARGE", 1000)
    assert warned(lambda: tt.load(half, device="cpu")) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert f"take about {bytes_of / 1e9:.1f} GB in float32" in line
    assert "is free (cpu)" in line
    monkeypatch.setattr(holding, "free_bytes", lambda place: bytes_of - 1)
    (said,) = warned(lambda: tt.load(half, device="cpu"))
    assert "does not fit" in said
    assert "--dtype bfloat16" in said
    # In half precision it does.
    assert warned(lambda: tt.load(half, device="cpu", dtype="bfloat16")) == []


def test_free_memory_is_known() -> None:
    assert 1e6 < holding.free_bytes(torch.device("cpu")) < 1e15


# -- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's files with two revisions of a model, and no hub that answers."""
    cache = tmp_path / "hub"
    of_model = cache / "models--own--tiny"
    (of_model / "refs").mkdir(parents=True)
    for seed, name in enumerate(("main", "v1")):
        commit = f"{seed}" * 40
        save_model(of_model / "snapshots" / commit, name="llama", seed=seed)
        (of_model / "refs" / name).write_text(commit)

    def unreachable(self: Any, name: str, **options: Any) -> Any:
        assert 0 < options["timeout"] <= 10
        raise ConnectionError("no route to it")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    return cache


def test_revisions_of_a_model(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = tt.load("own/tiny", device="cpu", cache_dir=hub)
    tagged = tt.load("own/tiny", device="cpu", cache_dir=hub, revision="v1")
    assert (main.identity.name, tagged.identity.name) == ("own/tiny", "own/tiny@v1")
    assert main.identity.digest == tt.wrap(tiny_model("llama"), tiny_tokenizer()).identity.digest
    assert main.identity.digest != tagged.identity.digest
    by_name = tt.load("own/tiny@v1", device="cpu", cache_dir=hub)
    assert by_name.identity == tagged.identity
    assert "is taken from the cache" in capsys.readouterr().err
    said = refusal(lambda: tt.load("own/tiny@v1", revision="v2", cache_dir=hub))
    assert "give one of them" in said


def test_a_directory_has_no_revision(half: Path) -> None:
    assert "is not of the hub" in refusal(lambda: tt.load(half, revision="v1"))


def test_a_hub_that_cannot_be_reached(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    said = refusal(lambda: tt.load("own/other", cache_dir=hub))
    assert time.monotonic() - start < 5
    assert "the hub cannot be reached (no route to it)" in said
    assert "not in the cache" in said
    assert capsys.readouterr().err == "trimtab: looking for own/other on the hub\n"


def test_what_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from huggingface_hub import errors

    def answer(kind: Any) -> Any:
        def model_info(self: Any, name: str, **options: Any) -> Any:
            raise kind("no", response=SimpleNamespace(headers={}, request=None, status_code=404))

        return model_info

    for kind, words in (
        (errors.RepositoryNotFoundError, "the hub has no model of that name"),
        (errors.RevisionNotFoundError, "the hub has no revision v9"),
        (errors.GatedRepoError, "accept its terms"),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer(kind))
        said = refusal(lambda: tt.load("own/none", revision="v9", cache_dir=tmp_path))
        assert words in said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("smollm2", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("smolm2-135m-instruct", "smollm2-135m-instruct"),
        ("gemma3", "gemma3-270m"),
        ("gemma3-270", "gemma3-270m"),
    ],
)
def test_nearly_a_pack(trimtab: Command, typed: str, meant: str, monkeypatch: Any) -> None:
    def never(*given: Any) -> Found:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("trimtab.model.loading.find_on_hub", never)
    refused(trimtab(f"generate --model {typed} Hello"), f"did you mean {meant}?", "OWNER/NAME")


def test_other_names_are_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2", "own/smollm2-135m-instruct"):
        asked: list[str] = []

        def find(name: str, origin: Any, asked: list[str] = asked) -> Found:
            asked.append(name)
            raise tt.TrimtabError("enough")

        monkeypatch.setattr("trimtab.model.loading.find_on_hub", find)
        refusal(lambda name=name: tt.load(name))
        assert asked == [name]


# -- directories that are no models ------------------------------------------------------------


def test_a_directory_without_a_model(half: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refusal(lambda: tt.load(tmp_path / "empty"))
    assert "there is no config.json and no model.safetensors in it" in said
    assert "there is one in half/" in refusal(lambda: tt.load(tmp_path))
    (half / "config.json").rename(half / "c.json")
    assert "there is no config.json in it" in refusal(lambda: tt.load(half))
    (half / "c.json").rename(half / "config.json")
    for file in half.glob("tokenizer*"):
        file.unlink()
    assert "there is no tokenizer in it" in refusal(lambda: tt.load(half))
    shutil.rmtree(half)


def test_wrap_with_its_arguments_swapped() -> None:
    said = refusal(lambda: tt.wrap(tiny_tokenizer(), tiny_model("llama")))
    assert "the model first" in said


def test_a_plain_load_says_nothing(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", tt.TrimtabWarning)
        tt.load(half, device="cpu")
    assert capsys.readouterr() == ("", "")
