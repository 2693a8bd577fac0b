"""Contrasts by generation: texts that a model writes about a concept, against texts that it does
not.

The setting of "Towards Understanding Steering Strength" (Taimeskhanov et al. 2026, section 4 and
appendix A). Positives answer a fixed request to define a concept and then to speak as it.
Negatives are what the model that is to be steered writes from nothing but its
beginning-of-sequence token (`empty`), or answers to the same request for the concept's opposite
(`contrastive`). All are sampled, 500 of 300 tokens a side, with the end of text disabled.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trimtab.contrasts import Contrast, Conversation, Prompt, in_words
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation import ChatEndpoint
from trimtab.files import Journal, check_output, write_whole
from trimtab.model import LanguageModel
from trimtab.options import Sampling, flat
from trimtab.terminal import progress

#: The paper's concepts. Any other is a word or a phrase of the user's.
CONCEPTS = (
    "apathetic",
    "depression",
    "evil",
    "humorous",
    "impolite",
    "joy",
    "lying",
    "optimistic",
)

Negatives = Literal["empty", "contrastive"]
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)
#: Who writes about a concept: a chat model that is loaded here, or one behind an endpoint.
Writer = LanguageModel | ChatEndpoint

#: The paper's request (appendix A), word for word.
SYSTEM = "You are an assistant."
REQUEST = (
    "Describe the concept: {concept}. Begin with a one-sentence definition. "
    "Then give several natural first-person examples that demonstrate the concept in an "
    "unmistakable way. "
    "Write as if you are the concept itself. Your examples must make the concept obvious through "
    "what you say or do "
    "— for example, if the concept is *lying*, give clearly false statements (e.g., claiming "
    "impossible facts or events). "
    "Do not use third-person references. Do not explain anything. "
    "After the definition, output only the examples as simple first-person sentences that fully "
    "embody the concept."
)

#: So many times the texts that are wanted are sampled at most, where some are equal or empty.
_MOST_SAMPLES = 4
#: After so many batches in which no text is new, none is expected to come.
_BARREN = 3


def _check(sampling: Sampling) -> None:
    if sampling.max_new_tokens < 1 or sampling.batch_size < 1:
        raise TrimtabError("max_new_tokens and batch_size must be 1 or more")
    if not (math.isfinite(sampling.temperature) and sampling.temperature > 0):
        raise TrimtabError(
            f"temperature must be above 0, not {sampling.temperature}: without chance all texts "
            "would be equal"
        )
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise TrimtabError("top_k must be 0 or more, top_p above 0 and at most 1")


@dataclass(frozen=True)
class _Side:
    """The texts of one label: who writes them, in answer to what."""

    label: Literal["positive", "negative"]
    writer: Writer
    prompt: Prompt


def request(concept: str) -> Conversation:
    """The paper's request for texts of a concept, as messages (role, content)."""
    name = " ".join(concept.split())
    if not name:
        raise TrimtabError("the concept is empty: name one, as in joy")
    return (("system", SYSTEM), ("user", REQUEST.format(concept=name)))


@flat
def generate_contrast(
    language_model: LanguageModel,
    concept: str,
    *,
    negatives: Negatives = "empty",
    count: int = 500,
    writer: Writer | None = None,
    sampling: Sampling = Sampling(),
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Contrast:
    """`count` positive and `count` negative texts of a concept, as an unpaired contrast.

    `writer` writes the positives, and the `contrastive` negatives: another chat model, an endpoint,
    or (None) `language_model` itself. `empty` negatives are always `language_model`'s own. Where a
    model is loaded here, a text has exactly `max_new_tokens` tokens; an endpoint's may end before
    (and takes no `top_k`, except by its `extra`). Texts that are empty, or equal to another but for
    white space, are sampled again; a warning says how many there are where too few are new.

    With `output` the contrast is a JSONL file. Until it is whole, finished batches are in
    OUTPUT.part: an interrupted call that is repeated goes on with the very texts that it would have
    had. (A service need not heed a seed: there, answers come from the endpoint's cache.)

    Errors: a writer without chat template; OUTPUT exists; OUTPUT.part is damaged, or of other
    settings (`overwrite` replaces both).
    """
    _check(sampling)
    if count < 1:
        raise TrimtabError(f"count must be 1 or more, not {count}")
    sides = _sides(language_model, concept, negatives, language_model if writer is None else writer)
    settings = _settings(concept, negatives, count, sampling, sides)
    target = None if output is None else Path(output)
    if target is not None:
        if target.is_dir():
            raise TrimtabError(f"{target} is a directory: name a file")
        check_output(target, overwrite)
    work = _Work(target, settings, overwrite)

    texts: dict[str, list[str]] = {}
    seen: set[str] = set()
    with progress("writing texts", 2 * count) as advance:
        for side in sides:
            texts[side.label] = _collect(side, count, sampling, work, seen, advance)
    work.check_used()
    for side in sides:
        _check_number(side, len(texts[side.label]), count)

    if target is None:
        return Contrast.from_texts(texts["positive"], texts["negative"], f"generated:{concept}")
    rows = [{"text": text, "label": side.label} for side in sides for text in texts[side.label]]
    write_whole(target, "".join(map(_line, rows)).encode(), overwrite)
    work.remove()
    return Contrast.from_jsonl(target)


# -- who writes what --------------------------------------------------------------------------


def _sides(
    language_model: LanguageModel, concept: str, negatives: str, writer: Writer
) -> tuple[_Side, _Side]:
    if negatives not in NEGATIVES:
        raise TrimtabError(f"negatives {negatives!r} is none of {', '.join(NEGATIVES)}")
    positive = _Side("positive", writer, request(concept))
    _check_writer(positive)
    if negatives == "empty":
        return positive, _Side("negative", language_model, _beginning(language_model))
    return positive, _Side("negative", writer, request(f"the opposite of {concept}"))


def _check_writer(side: _Side) -> None:
    """Whether a model can be asked; also that its template takes a system message."""
    writer = side.writer
    if isinstance(writer, ChatEndpoint):
        return
    if not isinstance(writer, LanguageModel):
        raise TrimtabError(f"a writer is a LanguageModel or a ChatEndpoint, not {writer!r}")
    if not writer.chats:
        raise TrimtabError(
            f"{writer.name} has no chat template, so it cannot be asked to write about a concept: "
            "give another writer, a chat model or an endpoint"
        )
    try:
        writer.render(side.prompt)
    except TrimtabError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise TrimtabError(
            f"the chat template of {writer.name} refuses a system message and a question "
            f"({reason}): give another writer"
        ) from error


def _beginning(language_model: LanguageModel) -> str:
    """The text of the token with which a model's texts begin: BOS, or where a model has none, the
    token that separates its texts, EOS."""
    tokenizer, config = language_model.tokenizer, language_model.anatomy.config
    token: str | None = tokenizer.bos_token
    if token is None and isinstance(getattr(config, "bos_token_id", None), int):
        token = tokenizer.convert_ids_to_tokens(config.bos_token_id)
    token = token or tokenizer.eos_token
    if token is None or len(language_model.encode([token])[0]) != 1:
        raise TrimtabError(
            f"{language_model.name} has no token with which a text begins (BOS or EOS), so nothing "
            "can be sampled from an empty prompt: take negatives='contrastive'"
        )
    return token


def _write(side: _Side, count: int, seed: int, sampling: Sampling) -> list[str]:
    """One batch of texts."""
    if isinstance(side.writer, ChatEndpoint):
        assert not isinstance(side.prompt, str)
        fields = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
        }
        messages = [{"role": role, "content": in_words(text)} for role, text in side.prompt]
        seeds = [{**fields, "seed": seed + number} for number in range(count)]
        return side.writer.ask([messages] * count, seeds)
    completions = side.writer.generate(
        [side.prompt] * count,
        chat=False,  # messages are rendered all the same, and BOS is taken as it is
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=seed,
        batch_size=count,
    )
    return [completion.text for completion in completions]


def batch_seed(seed: int, label: str, number: int) -> int:
    """A seed of each batch, so that a batch is the same whatever was sampled before it.

    31 bits, because services take no more; each text of a service adds its place in the batch.
    """
    digest = hashlib.sha256(f"{seed}/{label}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# -- collecting -------------------------------------------------------------------------------


def _collect(
    side: _Side,
    count: int,
    sampling: Sampling,
    work: _Work,
    seen: set[str],
    advance: Callable[[int], object],
) -> list[str]:
    """New texts of one side, batch by batch: first the batches that are there already."""
    kept: list[str] = []
    number = samples = barren = 0
    while len(kept) < count and samples < _MOST_SAMPLES * count and barren < _BARREN:
        size = min(sampling.batch_size, count - len(kept))
        batch = work.next_batch(side.label, number, size)
        if batch is None:
            batch = _write(side, size, batch_seed(sampling.seed, side.label, number), sampling)
            work.append(side.label, number, batch)
        new = _new(batch, seen)
        kept += new
        number, samples, barren = number + 1, samples + size, 0 if new else barren + 1
        advance(len(new))
    return kept


def _new(texts: Sequence[str], seen: set[str]) -> list[str]:
    """Those that are neither empty nor seen before, but for white space, which are seen now."""
    new = []
    for text in texts:
        plain = " ".join(text.split())
        if plain and plain not in seen:
            seen.add(plain)
            new.append(text.strip())
    return new


def _check_number(side: _Side, found: int, count: int) -> None:
    if found == count:
        return
    what = f"{found} of {count} {side.label} texts by {side.writer.name} are new and not empty"
    hint = "raise temperature or max_new_tokens, or ask for fewer (count)"
    if not found:
        raise TrimtabError(f"{what}: {hint}")
    # Past generate_contrast and what `flat` makes of it, to who called it.
    warnings.warn(f"only {what}: {hint}", TrimtabWarning, stacklevel=4)


# -- unfinished work --------------------------------------------------------------------------


def _settings(
    concept: str, negatives: str, count: int, sampling: Sampling, sides: Sequence[_Side]
) -> dict[str, Any]:
    """Everything that decides what the texts are."""
    asked: dict[str, Any] = {"concept": concept, "negatives": negatives, "count": count}
    for side in sides:
        asked[f"{side.label} writer"] = _described(side.writer)
        asked[f"{side.label} prompt"] = side.prompt
    settings: dict[str, Any] = json.loads(json.dumps(asked | asdict(sampling)))
    return settings  # as they come back from a file


def _described(writer: Writer) -> dict[str, Any]:
    if isinstance(writer, ChatEndpoint):
        return {"url": writer.url, "model": writer.model, "extra": dict(writer.extra)}
    identity = writer.identity
    chat = {} if writer.chat_form.plain else {"chat": writer.chat_form.as_json()}
    return {"model": identity.name, "digest": identity.digest, "dtype": str(writer.dtype), **chat}


class _Work:
    """The batches that are there already, and the journal beside the output that keeps them.

    Its first line has the settings, each other one a batch. Without an output there is no file.
    """

    def __init__(self, output: Path | None, settings: dict[str, Any], overwrite: bool) -> None:
        self.settings = settings
        self._begun = False
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()  # line number, batch
        self._journal: Journal | None = None
        if output is None:
            return
        path = output.with_name(output.name + ".part")
        self._journal = Journal(path, remedy="delete it, or pass overwrite")
        try:
            self._read(self._journal)
        except TrimtabError:
            if not overwrite:  # else the first batch replaces the file
                raise

    def _read(self, journal: Journal) -> None:
        lines = journal.read()
        if lines is None:
            return
        if not lines:
            journal.refuse("it has no settings")
        known = lines[0]
        keys = known.keys() | self.settings.keys()
        differing = sorted(k for k in keys if known.get(k) != self.settings.get(k))
        if differing:
            raise TrimtabError(
                f"{journal.path} holds unfinished work with other settings, which differ in "
                f"{', '.join(differing)}: choose another output, delete it, or pass overwrite"
            )
        self._waiting.extend(enumerate(lines[1:], 2))
        self._begun = True

    def next_batch(self, label: str, number: int, size: int) -> list[str] | None:
        """The texts of the batch that comes next, or None where it has to be written."""
        if not self._waiting or self._journal is None:
            return None
        line, batch = self._waiting.popleft()
        texts = batch.get("texts")
        if (batch.get("label"), batch.get("batch")) != (label, number) or not _texts(texts, size):
            self._journal.refuse(f"it is not batch {number} of the {label} texts", line)
        return list(texts or ())

    def append(self, label: str, number: int, texts: Sequence[str]) -> None:
        """Keep a batch."""
        batch = {"label": label, "batch": number, "texts": list(texts)}
        if self._journal is None:
            return
        if self._begun:
            self._journal.append([batch])
        else:
            self._journal.replace([self.settings, batch])
            self._begun = True

    def check_used(self) -> None:
        """More batches than the texts take are not this run's."""
        if self._waiting and self._journal is not None:
            self._journal.refuse("it is a batch too many", self._waiting[0][0])

    def remove(self) -> None:
        if self._journal is not None:
            self._journal.path.unlink(missing_ok=True)


def _texts(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(isinstance(t, str) for t in value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
