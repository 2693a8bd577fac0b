"""What a model expects next after many texts, with nothing computed twice.

Texts of similar length share a batch, beginnings that many texts share (instructions, examples,
the question of several options) are run once and kept as a KV cache, what the blocks below a
steering put out can be kept for the next steering, and the LM head runs only at the positions that
are asked for. Batches are planned before anything runs and depend on the texts
alone, so that a run which was interrupted goes on with the very batches that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trimtab.anatomy import is_hooked
from trimtab.errors import TrimtabError
from trimtab.model import BATCH_ROWS, LanguageModel, are_sound, refuse_dropout, unsound
from trimtab.reading.streams import Kept, beginning, blocks_below, resume
from trimtab.steering import Steering, Steerings, together

#: A beginning is run by itself, once, where that saves at least this many tokens.
_WORTH_A_PASS = 64
#: Later than any token: a shared beginning is all prompt.
_FAR = 1 << 40
#: Logits in float32 that are held at once.
_LOGITS = 1 << 26


@dataclass(frozen=True)
class Reading:
    """One text, the positions (in order) whose next token is asked for, and which tokens those
    might be.

    `targets` are the tokens whose probability is asked, one for each position; the same position
    may be asked about several. `prompt` is how many of the tokens are prompt, for steerings that
    tell prompt from answer.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    prompt: int
    targets: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Next:
    """At each position that was asked for: the most probable token, and the log-probability of the
    target in nats (float64; nothing where there were no targets)."""

    best: Tensor
    log_p: Tensor


def after(tokens: Sequence[int]) -> Reading:
    """What comes after a text that is all prompt."""
    return Reading(tuple(tokens), (len(tokens) - 1,), len(tokens))


@dataclass(frozen=True)
class Batch:
    """Readings (by their index) that run together; their first `shared` tokens are the same."""

    shared: int
    rows: tuple[int, ...]


def plan(readings: Sequence[Reading], batch_tokens: int) -> list[Batch]:
    """Batches of similar length, group by group of texts that share their beginning."""
    batches = []
    for shared, group in _groups(readings):
        waiting = sorted(group, key=lambda i: (-len(readings[i].tokens), i))
        while waiting:
            longest = len(readings[waiting[0]].tokens) - shared
            count = max(1, min(BATCH_ROWS, batch_tokens // longest))
            batches.append(Batch(shared, tuple(waiting[:count])))
            waiting = waiting[count:]
    return batches


@torch.inference_mode()
def next_tokens(
    language_model: LanguageModel,
    readings: Sequence[Reading],
    batches: Sequence[Batch],
    steering: Steering | Steerings | None = None,
    *,
    kept: Kept | None = None,
    force: bool = False,
) -> Iterator[tuple[Batch, list[Next]]]:
    """Run planned batches in order. `steering` is one for all texts.

    With `kept` only the blocks from the steering's lowest on are run, on top of what is kept of
    the same texts. A model that is steered already runs as without: what it computes is not for
    later.
    """
    refuse_dropout(language_model.model)
    _refuse_idle(readings, steering)
    if kept is not None and kept.language_model is not language_model:
        raise TrimtabError(f"what was kept is not of this {language_model.name}, but of another")
    below = 0
    if kept is not None and not is_hooked(language_model.model):
        below = blocks_below(language_model.anatomy, together(steering))
    streams_of = (kept or Kept(language_model)).after  # where no block is below it keeps nothing
    start: tuple[int, ...] = ()
    cache = None
    with language_model.steered(steering, force=force) as sequences:
        for batch in batches:
            rows = [readings[i] for i in batch.rows]
            texts = [row.tokens for row in rows]
            # What texts begin with is all prompt. The other blocks that run here are below the
            # steering: to its hooks above, which see rows that nobody reads, it is all one.
            sequences.given_ends = [_FAR]
            streams = streams_of(texts, below, batch.shared)
            if texts[0][: batch.shared] != start:
                start, cache = texts[0][: batch.shared], None
                if start:
                    stream = streams_of([start], below)[0]
                    layers = language_model.anatomy.layers
                    cache = beginning(language_model, start, stream, below, layers)[1]
            sequences.given_ends = [row.prompt for row in rows]
            rests = [text[batch.shared :] for text in texts]
            hidden = resume(language_model, rests, streams, below, cache)
            found, sound = _read(rows, hidden, batch.shared, language_model)
            if not all(sound):
                labels = [one.label for one in together(steering)]
                text = f"text {batch.rows[sound.index(False)] + 1}"
                raise unsound(text, labels, language_model.dtype)
            yield batch, found


def _refuse_idle(readings: Sequence[Reading], steering: Steering | Steerings | None) -> None:
    """Refuse a steering of generated tokens for texts that are all prompt, which it leaves as they
    are. Hooks do not notice: to them the padding after a prompt is generated."""
    if not readings or any(reading.prompt < len(reading.tokens) for reading in readings):
        return
    for one in together(steering):
        for intervention in one.interventions:
            acts = intervention.operator.identity != one.setting
            if acts and intervention.positions == "generated":
                raise TrimtabError(
                    f"the steering touched nothing at {intervention.site}: it acts on generated "
                    "tokens, and these texts are only read"
                )


def _read(
    rows: Sequence[Reading], hidden: Tensor, shared: int, language_model: LanguageModel
) -> tuple[list[Next], list[bool]]:
    """Unembeds only the positions that are asked for, as many at once as fit. Also whether all
    logits of each row are sound."""
    places = [(i, position - shared) for i, row in enumerate(rows) for position in row.positions]
    asked = torch.tensor(places, device=hidden.device)
    scored = any(row.targets for row in rows)
    targets = [target for row in rows for target in row.targets or [0] * len(row.positions)]
    wanted = torch.tensor(targets, device=hidden.device)
    vocabulary = language_model.model.get_output_embeddings().weight.shape[0]
    best, log_p, choosing = [], [], []
    for some in torch.arange(len(places), device=hidden.device).split(
        max(1, _LOGITS // vocabulary)
    ):
        row_of, column = asked[some].T
        logits = language_model.unembed(hidden[row_of, column])
        best.append(logits.argmax(-1).cpu())
        choosing.append(are_sound(logits).cpu())
        if scored:
            every = logits.log_softmax(-1)
            log_p.append(every.gather(-1, wanted[some, None]).squeeze(-1).cpu().double())
    counts = [len(row.positions) for row in rows]
    bests = torch.cat(best).split(counts)
    log_ps = torch.cat(log_p).split(counts) if scored else [torch.zeros(0)] * len(rows)
    sound = [bool(each.all()) for each in torch.cat(choosing).split(counts)]
    return [Next(*pair) for pair in zip(bests, log_ps, strict=True)], sound


# -- which texts share their beginning ------------------------------------------------------------


def _groups(readings: Sequence[Reading]) -> list[tuple[int, list[int]]]:
    """Readings by shared beginning: (how many tokens they share, which they are).

    In sorted order neighbours share most. Neighbours that share at least half of their tokens stay
    together, if that saves enough; the others are one group, which shares what all of it shares.
    """
    if not readings:
        return []
    order = sorted(range(len(readings)), key=lambda i: readings[i].tokens)
    runs = [[order[0]]]
    for previous, current in pairwise(order):
        first, second = readings[previous].tokens, readings[current].tokens
        together = 2 * _common(first, second) >= min(len(first), len(second))
        runs[-1].append(current) if together else runs.append([current])
    by_all = _shared(readings, order)
    groups, others = [], []
    for run in runs:
        shared = _shared(readings, run)
        if (shared - by_all) * (len(run) - 1) >= _WORTH_A_PASS:
            groups.append((shared, run))
        else:
            others += run
    if others:
        shared = _shared(readings, others)
        groups.append((shared if shared * (len(others) - 1) >= _WORTH_A_PASS else 0, others))
    return groups


def _shared(readings: Sequence[Reading], group: Sequence[int]) -> int:
    """How many tokens all of a group begin with; a position that is read is not among them, nor
    the last token of a prompt."""
    first, last = (choose(readings[i].tokens for i in group) for choose in (min, max))
    ends = (min(readings[i].positions[0], readings[i].prompt - 1) for i in group)
    return max(0, min(_common(first, last), *ends))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))
