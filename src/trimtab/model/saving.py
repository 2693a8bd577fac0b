"""Writes a model as a plain checkpoint with its tokenizer, whole or not at all.

Everything is written into a hidden work directory beside the target, read again, and moved into
place by renaming. A process that is killed leaves its work directory and its lock, which the system
opens when the process is gone; so the next one knows what nobody works at, removes it, and puts a
model back that was moved aside for a new one that never came.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from trimtab.anatomy import is_hooked
from trimtab.checkpoints import CARD, CheckpointError, read_model, some, write_baked
from trimtab.errors import TrimtabError, first_line, shown
from trimtab.files import open_as_usual, put_in_place
from trimtab.model.plain import is_plain, is_quantised, plain_copy
from trimtab.terminal import status

#: The files of a checkpoint, its tokenizer and processor, which a new one replaces all together.
_CHECKPOINT = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|processor_config|preprocessor_config|video_preprocessor_config"
    r"|chat_template|model\.safetensors\.index|trimtab)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|merges\.txt|chat_template\.jinja"
    # Sentencepiece's and tiktoken's files, by the names that tokenizers write.
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe|bpe)\.model|tokenizer\.tiktoken"
    # The model card is kept.
    r"|README\.md"
)


def save_checkpoint(
    model: Any,
    readers: Sequence[Any],
    name: str,
    directory: str | Path,
    overwrite: bool = False,
    baked: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write weights, configuration and what reads a model's inputs (its `readers`: a processor, and
    last the tokenizer) to a directory, which is returned, with a record of what was `baked`. A
    model card that is there is kept."""
    target = Path(directory)
    # transformers notes there which directory a model was read from.
    check_target(target, [str(getattr(model.config, "_name_or_path", ""))], overwrite)
    if is_hooked(model):
        raise TrimtabError(
            f"cannot save {name} while it is steered: the file would hold the unsteered model; "
            "save it after the block, or save what bake makes of it"
        )
    _refuse_quantised(model, name)
    if not is_plain(model):
        model = plain_copy(model, name)
    place = Path(os.path.realpath(target))
    try:
        with _work_directory(place) as work, status(f"writing {target}"):
            inside, old = work / "model", work / "old"
            model.save_pretrained(inside)
            for reader in readers:
                reader.save_pretrained(inside)
            write_baked(inside, baked, place.name, place / CARD)
            open_as_usual(inside)
            if not is_quantised(model):
                _check_written(model, inside)
            if place.exists():
                check_target(target, [], overwrite)  # others may have written there meanwhile
            put_in_place(inside, place, old)
    except CheckpointError as error:
        raise TrimtabError(f"cannot save {name} as a plain checkpoint: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TrimtabError(f"cannot write {target}: {reason}") from error
    return target


def _refuse_quantised(model: Any, name: str) -> None:
    """Refuse quantised weights that transformers does not write, or writes as others."""
    if not is_quantised(model):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        raise TrimtabError(
            f"cannot save {name}: its weights were quantised by another package than transformers, "
            "which cannot write them; save it as that package does"
        )
    # In memory its zero points have another meaning than in the files that would be written.
    if "gptq" in str(getattr(quantizer.quantization_config, "quant_method", "")).lower():
        raise TrimtabError(
            f"cannot save {name}: it is quantised by GPTQ, and what transformers writes of it "
            "would be read as another model; copy the files that it was read from"
        )


def check_target(target: Path, from_where: list[str], overwrite: bool) -> None:
    """Refuse a directory that is in the way, or whose files are not a checkpoint's alone.

    What a killed process left there is put in order first.
    """
    try:
        recover(target)
        place = Path(os.path.realpath(target))
        place.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        reason = getattr(error, "strerror", None) or error
        raise TrimtabError(f"cannot write {shown(target)}: {reason}") from error
    for source in map(Path, filter(None, from_where)):
        if source.is_dir():
            own = Path(os.path.realpath(source))
            if own == place or own in place.parents or place in own.parents:
                raise TrimtabError(
                    f"{target} is where the model came from ({source}), or inside it, or around "
                    "it: choose another directory"
                )
    if not place.exists():
        return
    if not overwrite:
        raise TrimtabError(f"{target} exists: choose another name, or overwrite (--overwrite)")
    if not place.is_dir():
        raise TrimtabError(f"{target} is not a directory: choose another name")
    if any(place.iterdir()) and not (place / "config.json").is_file():
        raise TrimtabError(f"{target} is not a model's directory: overwriting replaces only those")
    foreign = sorted(
        file.name for file in place.iterdir() if file.is_dir() or not _is_checkpoint(file.name)
    )
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise TrimtabError(
            f"{target} also holds {foreign[0]}{more}, which is no part of a checkpoint and would "
            "be lost: move it away, or choose another directory"
        )


def _is_checkpoint(name: str) -> bool:
    return _CHECKPOINT.fullmatch(name) is not None


def _check_written(model: Any, directory: Path) -> None:
    """Whether the files hold what the architecture of their configuration wants, and no more."""
    kind = type(model)
    # On the meta device nothing but names and shapes is read.
    _, found = read_model(kind, str(directory), device_map="meta", local_files_only=True)
    wrong = sorted(
        [*found.missing, *found.buffers, *found.unexpected, *(s[0] for s in found.sizes)]
    )
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of its tensors are not those of a {kind.__name__}: {some(wrong)}"
        )


# -- what killed processes leave ----------------------------------------------------------------


@contextmanager
def _work_directory(place: Path) -> Iterator[Path]:
    """A hidden directory beside the place, locked as long as this process works in it."""
    work = place.parent / f".{place.name}.partial-{uuid4().hex[:12]}"
    os.stat(place.parent)  # before the lock makes directories
    lock = FileLock(f"{work}.lock")
    with lock:
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Remove the work directories of killed processes for this directory, and put back a model that
    one of them had moved aside."""
    try:
        place = Path(os.path.realpath(directory))
        left = sorted(place.parent.glob(f".{escape(place.name)}.partial-*.lock"))
    except (OSError, ValueError):  # no name of a directory
        return
    for lock_file in left:
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # somebody works there, or it is not ours to touch
            continue
        try:
            work = lock_file.with_suffix("")
            if (work / "old").is_dir() and not place.exists():
                (work / "old").rename(place)
            shutil.rmtree(work, ignore_errors=True)
            lock_file.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            lock.release()
