"""What is in the cache is compared with what was put there, and nothing of a stranger's is run."""

# ruff: noqa: F401, F811  (fixtures are imported, and then named as arguments)

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_packs import (
    cache,
    only_pip,
    quick,
    tiny_gguf,
    wheels,
    write_tiny_llama,
)
from trimtab.checkpoints import packs
from trimtab.errors import TrimtabError, TrimtabWarning

IDS = torch.arange(24).reshape(2, 12)


def logits(home: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(home)(IDS).logits
    return found


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        content = json.loads((home / name).read_text())
        (home / name).write_text(json.dumps(content | changes))

    return edit


def cut(name: str, share: float) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        content = (home / name).read_bytes()
        (home / name).write_bytes(content[: int(len(content) * share)])

    return edit


def flip(name: str, place: int) -> Callable[[Path], None]:
    """One bit of a file, which keeps its size."""

    def edit(home: Path) -> None:
        content = bytearray((home / name).read_bytes())
        content[place] ^= 4
        (home / name).write_bytes(content)

    return edit


#: Ways to damage a converted model.
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "another rope_theta": edit_json(
        "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "a setting more": edit_json("generation_config.json", repetition_penalty=1.3),
    "half a template": cut("chat_template.jinja", 0.5),
    "half a tokenizer": cut("tokenizer.json", 0.5),
    "a token changed": flip("tokenizer.json", -300),
    "no tokenizer": lambda home: (home / "tokenizer.json").unlink(),
    "no template": lambda home: (home / "chat_template.jinja").unlink(),
    "no weights": lambda home: (home / "model.safetensors").unlink(),
    "half the weights": cut("model.safetensors", 0.5),
    "a weight changed": flip("model.safetensors", -10),
    "an adapter beside": lambda home: (home / "adapter_config.json").write_text("{}"),
    "a module beside": lambda home: (home / "modeling.py").write_text("raise SystemExit"),
    "a directory for a file": lambda home: (
        (home / "config.json").unlink() or (home / "config.json").mkdir()
    ),
    "list cut": cut("MANIFEST.json", 0.5),
    "list of nothing": lambda home: (home / "MANIFEST.json").write_text("{}"),
    "list of numbers": lambda home: (home / "MANIFEST.json").write_text('{"config.json": 3}'),
    "list that is none": lambda home: (home / "MANIFEST.json").write_text("[" * 100_000),
    "list not UTF-8": lambda home: (home / "MANIFEST.json").write_bytes(b"\xff\xfe"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file, and a cache in which it has been converted."""
    room = tmp_path_factory.mktemp("made")
    write_tiny_llama(room / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(room / "cache"))
        packs.gguf_cached(room / "tiny.gguf")
    return room / "tiny.gguf", room / "cache"


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The converted model in a cache of the test's own, with the dates that it was made with."""
    shutil.copytree(made[1], tmp_path / "own")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    (home,) = (path for path in (tmp_path / "own" / "gguf").iterdir() if path.is_dir())
    return home


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_made_again(
    name: str,
    made: tuple[Path, Path],
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    pristine = made[1] / copied.relative_to(copied.parents[1])
    monkeypatch.setattr(packs, "convert_gguf", lambda _, to: shutil.copytree(pristine, to))
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    DAMAGE[name](copied)
    assert packs.gguf_cached(made[0]) == copied
    said = [str(one.message) for one in recwarn if one.category is TrimtabWarning]
    assert len(said) == 1
    assert "was damaged" in said[0]
    assert said[0].isprintable()
    after = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert after.keys() == before.keys()
    # Dates apart it is the same again.
    assert all(after[name] == before[name] for name in before if name != packs.MANIFEST)
    assert sorted(path.name for path in copied.parent.iterdir() if path.suffix != ".lock") == [
        copied.name
    ]


def test_an_intact_model_is_not_made_again(
    made: tuple[Path, Path], copied: Path, quick: list[Path], recwarn: pytest.WarningsRecorder
) -> None:
    before = (copied / packs.MANIFEST).read_bytes()
    (copied / ".DS_Store").write_text("left by a file manager")
    assert packs.gguf_cached(made[0]) == copied
    assert quick == []
    assert (copied / packs.MANIFEST).read_bytes() == before
    assert not [one for one in recwarn if one.category is TrimtabWarning]


def test_weights_are_read_once_after_a_copy(
    made: tuple[Path, Path], copied: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in copied.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    read: list[str] = []
    real = packs.file_digest
    monkeypatch.setattr(packs, "file_digest", lambda path: read.append(path.name) or real(path))
    for expected in (1, 0):
        read.clear()
        packs.gguf_cached(made[0])
        assert read.count("model.safetensors") == expected
        assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(read)
    assert quick == []


def test_a_cache_that_cannot_be_written_is_read(
    made: tuple[Path, Path], copied: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in copied.iterdir():
        os.utime(path, ns=(10**18, 10**18))  # checked, and not to be noted

    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packs, "_write_manifest", read_only)
    monkeypatch.setattr(packs, "FileLock", read_only)
    assert packs.gguf_cached(made[0]) == copied
    flip("config.json", 30)(copied)
    with pytest.raises(TrimtabError, match=r"is damaged \(config\.json was changed\) and cannot"):
        packs.gguf_cached(made[0])
    assert quick == []


def test_a_model_from_before_there_were_lists(
    made: tuple[Path, Path], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(copied)
    (copied / packs.MANIFEST).unlink()
    edit_json("config.json", hidden_act="relu")(copied)  # nobody can know what it was

    def offline(*_: Any) -> None:
        raise TrimtabError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(packs, "convert_gguf", offline)
        with pytest.warns(TrimtabWarning, match=r"kept no checksums.*unchecked \(no network\)"):
            assert packs.gguf_cached(made[0]) == copied
        assert not torch.equal(logits(copied), expected)
    packs.gguf_cached(made[0])
    assert torch.equal(logits(copied), expected)


def test_packs_are_checked_too(
    wheels: Path, cache: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = packs.ensure("tiny")
    (home / "config.json").write_text('{"rope_theta": 1}')
    with pytest.warns(TrimtabWarning, match=r"config\.json has \d+ bytes, not 2"):
        packs.ensure("tiny")
    assert (home / "config.json").read_text() == "{}"
    (home / "TERMS.txt").unlink()
    shutil.rmtree(wheels)
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(TrimtabError, match=r"damaged \(TERMS\.txt is missing\).* cannot") as caught:
        packs.ensure("tiny")
    assert len(str(caught.value)) < 600
    assert (home / "config.json").is_file()  # what is there is left


# -- pip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, "", ":", ".", "nowhere:"])
def test_no_module_of_the_working_directory_is_run(
    path: str | None,
    only_pip: Path,
    cache: Path,
    quick: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trap = tmp_path / "downloads"
    trap.mkdir()
    for module in ("pip", "sitecustomize", "usercustomize", "json", "logging", "certifi"):
        (trap / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (trap / "requirements.txt").write_text("something-else\n")
    monkeypatch.chdir(trap)
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path)
    assert (packs.ensure("tiny") / "config.json").is_file()
    assert not (tmp_path / "ran").exists()
    assert len(list(trap.iterdir())) == 7


# -- where the cache is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("~nobody-of-this-name/cache", "no such home directory"),
        ("/tmp/\udcff\udc80", "not UTF-8"),
        ("/tmp/" + "x" * 300, "name too long"),
        ("/tmp/" + "\x1b[31m" + "y" * 300, "name too long"),
        ("/tmp" + "/deep" * 1000, "name too long"),
    ],
)
@pytest.mark.parametrize("name", ["TRIMTAB_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be(
    name: str, where: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "XDG_CACHE_HOME" and where.startswith("~"):
        return  # which is relative there, and counts as not set
    monkeypatch.delenv("TRIMTAB_CACHE", raising=False)
    monkeypatch.setenv(name, where)
    for use in (packs.ensure, packs.installed, packs.size_on_disk):
        with pytest.raises(TrimtabError, match=says) as caught:
            use("smollm2-135m-instruct")
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 300
        assert "TRIMTAB_CACHE" in message


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRIMTAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(TrimtabError, match="no such home directory; TRIMTAB_CACHE"):
        packs.cache_dir()


def test_an_empty_name_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packs.cache_dir() == tmp_path / "trimtab"
    monkeypatch.setenv("TRIMTAB_CACHE", "near")  # relative to where the user is
    monkeypatch.chdir(tmp_path)
    assert packs.cache_dir() == tmp_path / "near"


def test_wheels_of_nobody(wheels: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_WHEELS", "~nobody-of-this-name/wheels")
    with pytest.raises(TrimtabError, match="TRIMTAB_WHEELS names ~nobody-of-this-name/wheels"):
        packs.ensure("tiny")
