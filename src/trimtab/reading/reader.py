"""What a model expects next after many texts, with nothing computed twice.

Texts of similar length share a batch, beginnings that many texts share (instructions, examples,
the question of several options) are run once and kept as a KV cache, what the blocks below a
steering put out can be kept for the next steering, and the LM head runs only at the positions that
are asked for. Batches are planned before anything runs and depend on the texts
alone, so that a run which was interrupted goes on with the very batches that it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.model import (
    UNKNOWN_END,
    Columns,
    Fired,
    LanguageModel,
    Sequences,
    SteeringArgument,
    are_sound,
    batches_by_length,
    frozen,
    has_two_pass,
    per_text,
    refuse_dropout,
    refuse_unseen,
    reported,
    row_steerings,
    unsound,
    watch,
    with_images,
)
from trimtab.reading.abilities import blocks_to_keep, shares_prefixes
from trimtab.reading.streams import StreamCache, run_prefix, run_upper
from trimtab.steering import Steering

#: A beginning is run by itself, once, where that saves at least this many tokens.
_WORTH_A_PASS = 64
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
    target in nats (float64; nothing where there were no targets). `sound` says whether all logits
    can choose a token; `gates` what the gates of the text's steerings decided of its prompt;
    `every` the log-probabilities of all tokens, [positions, vocabulary], where they were asked
    for."""

    best: Tensor
    log_p: Tensor
    sound: bool = True
    gates: tuple[Fired, ...] = ()
    every: Tensor | None = None


def prompt_reading(tokens: Sequence[int]) -> Reading:
    """A text that is all prompt, of which the token after it is asked for."""
    return Reading(frozen(tokens), (len(tokens) - 1,), len(tokens))


def whole_reading(tokens: Sequence[int]) -> Reading:
    """A text that is all prompt, of which every token but the first is scored. The last one is read
    too, because to a steering of the last token it is the one."""
    return Reading(frozen(tokens), tuple(range(len(tokens) - 1)), len(tokens), tuple(tokens)[1:])


@dataclass(frozen=True)
class PlannedBatch:
    """Readings (by their index) that run together; their first `shared` tokens are the same."""

    shared: int
    rows: tuple[int, ...]


def plan(readings: Sequence[Reading], batch_tokens: int, shares: bool = True) -> list[PlannedBatch]:
    """Batches of similar length, group by group of texts that share their beginning; texts with
    images are a group by themselves, and share nothing, nor do others without `shares`."""
    batches = []
    seeing = with_images([reading.tokens for reading in readings])
    plain = [i for i, sees in enumerate(seeing) if not sees]
    groups = [(0, plain)]
    if shares:
        groups = [
            (shared, [plain[i] for i in group])
            for shared, group in _groups([readings[i] for i in plain])
        ]
    groups.append((0, [i for i, sees in enumerate(seeing) if sees]))
    for shared, group in groups:
        order = sorted(group)
        lengths = [len(readings[i].tokens) - shared for i in order]
        for batch in batches_by_length(lengths, batch_tokens):
            batches.append(PlannedBatch(shared, tuple(order[i] for i in batch)))
    return batches


def next_tokens(
    language_model: LanguageModel,
    readings: Sequence[Reading],
    steering: SteeringArgument = None,
    *,
    missing: Callable[[int], bool] | None = None,
    kept: StreamCache | None = None,
    force: bool = False,
    whole: bool = False,
) -> Iterator[tuple[PlannedBatch, list[Next]]]:
    """What a model expects at the positions of readings, a batch at a time; of all tokens where
    the `whole` is asked for.

    `steering` is one for all texts, or a list with one per text. Batches without a reading that is
    `missing` (by its index) are left out, and the others are those that they would have been. With
    `kept` only the blocks from the steering's lowest on are run, on top of what is kept of the same
    texts. A model that is steered already runs as without: what it computes is not for later.
    """
    steerings = per_text(steering, len(readings))
    rows = [row_steerings(steering)] * len(readings) if steerings is None else steerings
    refuse_unseen(rows, [reading.tokens for reading in readings])
    batches = plan(readings, language_model.batch_tokens)
    # What comes later in a prompt is not known where only its beginning is read.
    ahead = any(scope.looks_ahead for row in rows for one in row for scope in one.scopes)
    if any(batch.shared for batch in batches) and (ahead or not shares_prefixes(language_model)):
        batches = plan(readings, language_model.batch_tokens, shares=False)
    if missing is not None:
        batches = [batch for batch in batches if any(map(missing, batch.rows))]
    if has_two_pass(rows):
        yield from _settled(language_model, readings, batches, rows, kept, force, whole)
        return
    if steerings is None:
        yield from run_batches(language_model, readings, batches, steering, kept, force, whole)
        return
    for batch in batches:
        # Texts that begin alike go apart from there on, when each has a steering of its own.
        alone, own = PlannedBatch(0, batch.rows), [steerings[i] for i in batch.rows]
        yield from run_batches(language_model, readings, [alone], own, kept, force, whole)


def _settled(
    language_model: LanguageModel,
    readings: Sequence[Reading],
    batches: Sequence[PlannedBatch],
    rows: Sequence[tuple[Steering, ...]],
    kept: StreamCache | None,
    force: bool,
    whole: bool,
) -> Iterator[tuple[PlannedBatch, list[Next]]]:
    """As `next_tokens` where two-pass gates say for each text whether it is steered."""
    for batch in batches:
        own = [rows[i] for i in batch.rows]
        prompts = [readings[i].tokens[: readings[i].prompt] for i in batch.rows]
        free, decided = language_model.settled(own, prompts, force)
        alone = PlannedBatch(0, batch.rows)
        for _, nexts in run_batches(language_model, readings, [alone], free, kept, force, whole):
            yield (
                batch,
                [
                    replace(each, gates=_in_order(own[row], row, decided, each.gates))
                    for row, each in enumerate(nexts)
                ],
            )


def _in_order(
    steerings: Sequence[Steering],
    row: int,
    decided: Mapping[tuple[int, int], Fired],
    others: Sequence[Fired],
) -> tuple[Fired, ...]:
    """What the gates of a row decided, those known before it ran and the others, in order."""
    left = iter(others)
    return tuple(
        decided[row, place] if (row, place) in decided else next(left)
        for place, one in enumerate(steerings)
        if one.gate is not None
    )


@torch.inference_mode()
def run_batches(
    language_model: LanguageModel,
    readings: Sequence[Reading],
    batches: Sequence[PlannedBatch],
    steering: SteeringArgument = None,
    kept: StreamCache | None = None,
    force: bool = False,
    whole: bool = False,
) -> Iterator[tuple[PlannedBatch, list[Next]]]:
    """Planned batches in order, under one steering; or one batch, with a list of one per row."""
    refuse_dropout(language_model.model)
    steerings = row_steerings(steering)
    refuse_idle(readings, steerings)
    if kept is not None and kept.language_model is not language_model:
        raise TrimtabError(f"what was kept is not of this {language_model.name}, but of another")
    below = 0
    if kept is not None:
        shared = any(batch.shared for batch in batches)
        below = blocks_to_keep(language_model, steerings, shared)
    kept = kept or StreamCache(language_model)  # where no block is below it keeps nothing
    start: tuple[int, ...] = ()
    cache = None
    with language_model.steered(steering, force=force) as sequences:
        sequences.may_miss_images = True
        watch(sequences.gates)
        for batch in batches:
            rows = [readings[i] for i in batch.rows]
            texts = [row.tokens for row in rows]
            # The tokens that all texts of a batch begin with run once, as a text of one row, and
            # leave a KV cache; each text then runs from there on, on a copy of it. To a steering
            # they are all prompt, because no position that is read is among them. The blocks
            # below the steering run apart, and what they put out is kept for the next one; hooks
            # further up see those passes too, but nothing reads what they make of them.
            sequences.given_ends = [UNKNOWN_END]
            streams = kept.run_lower(texts, below, batch.shared)
            if texts[0][: batch.shared] != start:
                start, cache = texts[0][: batch.shared], None
                if start:
                    stream = kept.run_lower([start], below)[0]
                    layers = language_model.anatomy.layers
                    cache = run_prefix(language_model, start, stream, below, layers)[1]
            sequences.given_ends = [row.prompt for row in rows]
            # What gates decide of the beginning that texts share is there for all batches of them.
            for gate in sequences.gates:
                gate.seen = [each for each in gate.seen if each.stop <= batch.shared]
            rests = [text[batch.shared :] for text in texts]
            hidden = run_upper(language_model, rests, streams, below, cache)
            columns = [[position - batch.shared for position in row.positions] for row in rows]
            targets = [row.targets or () for row in rows]
            nexts = read_columns(language_model, hidden, columns, targets, whole)
            refuse_unsound(language_model, nexts, batch.rows, steering)
            yield batch, _with_gates(nexts, rows, steering, sequences)


def _with_gates(
    nexts: list[Next],
    readings: Sequence[Reading],
    steering: SteeringArgument,
    sequences: Sequences,
) -> list[Next]:
    """With what gates decided of each text, where there are some."""
    if not sequences.gates:
        return nexts
    each_own = per_text(steering, len(nexts))
    found = []
    for row, (each, reading) in enumerate(zip(nexts, readings, strict=True)):
        steerings = row_steerings(steering) if each_own is None else each_own[row]
        at = Columns(0, reading.prompt, len(reading.tokens))
        own = reported(steerings, {}, sequences.gates, row, at)
        found.append(replace(each, gates=own))
    return found


def refuse_idle(readings: Sequence[Reading], steerings: Sequence[Steering]) -> None:
    """Refuse a steering of generated tokens for texts that are all prompt, which it leaves as they
    are. Hooks do not notice: to them the padding after a prompt is generated."""
    if not readings or any(reading.prompt < len(reading.tokens) for reading in readings):
        return
    for steering in steerings:
        for intervention in steering.interventions:
            acts = not intervention.idle_at(steering.setting)
            if acts and intervention.scope.only_generated:
                raise TrimtabError(
                    f"the steering touched nothing at {intervention.site}: it acts on generated "
                    f"tokens (scope '{intervention.scope}'), and these texts are only read"
                )


def read_columns(
    language_model: LanguageModel,
    hidden: Tensor,
    columns: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    whole: bool = False,
) -> list[Next]:
    """What comes after some columns of each row of what the final norm put out,
    [rows, columns, units]; `targets` are their tokens of each row, or none; `whole` keeps what is
    expected of every token.

    Only these columns are unembedded, as many at once as fit.
    """
    places = [(row, column) for row, asked in enumerate(columns) for column in asked]
    where = torch.tensor(places, device=hidden.device)
    scored = any(targets)
    wanted = torch.tensor(
        [t for asked, row in zip(columns, targets, strict=True) for t in row or [0] * len(asked)],
        device=hidden.device,
    )
    vocabulary = language_model.model.get_output_embeddings().weight.shape[0]
    best, log_p, sound, wholes = [], [], [], []
    for chunk in torch.arange(len(places), device=hidden.device).split(
        max(1, _LOGITS // vocabulary)
    ):
        row, column = where[chunk].T
        logits = language_model.unembed(hidden[row, column])
        best.append(logits.argmax(-1).cpu())
        sound.append(are_sound(logits).cpu())
        if whole:
            wholes.append(logits.log_softmax(-1).cpu())
        if scored:
            every = logits.log_softmax(-1)
            log_p.append(every.gather(-1, wanted[chunk, None]).squeeze(-1).cpu().double())
    counts = [len(asked) for asked in columns]
    bests, sounds = (torch.cat(parts).split(counts) for parts in (best, sound))
    log_ps = torch.cat(log_p).split(counts) if scored else [torch.zeros(0)] * len(columns)
    distributions = torch.cat(wholes).split(counts) if whole else [None] * len(columns)
    return [
        Next(tokens, values, bool(good.all()), every=some)
        for tokens, values, good, some in zip(bests, log_ps, sounds, distributions, strict=True)
    ]


def refuse_unsound(
    language_model: LanguageModel,
    nexts: Sequence[Next],
    indices: Sequence[int],
    steering: SteeringArgument,
) -> None:
    """Refuse logits that cannot choose a token, of the first text (by its index) that has some;
    `steering` is one for all of these texts, or a list with one per text."""
    bad = [place for place, each in enumerate(nexts) if not each.sound]
    if bad:
        first = min(bad, key=lambda place: indices[place])
        each_own = per_text(steering, len(nexts))
        row = row_steerings(steering) if each_own is None else each_own[first]
        labels = [each.label for each in row]
        raise unsound(f"text {indices[first] + 1}", labels, language_model.dtype)


def last_logits(
    language_model: LanguageModel,
    texts: Sequence[Sequence[int]],
    streams: Sequence[Tensor] = (),
    blocks: int = 0,
) -> Tensor:
    """Logits of the token after each text, [texts, vocabulary] in float32 or wider; `streams` are
    those after the first `blocks` blocks, as `run_lower` gives them."""
    hidden = run_upper(language_model, texts, streams, blocks)
    rows = torch.arange(len(texts), device=hidden.device)
    last = torch.tensor([len(text) - 1 for text in texts], device=hidden.device)
    return language_model.unembed(hidden[rows, last])


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
