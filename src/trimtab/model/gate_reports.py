"""What gates decided of texts: which rows fired, by which scores, and at how many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.model.gate_scores import score_pass, score_prompts
from trimtab.model.gating import Decision, GateAtWork
from trimtab.model.marks import Marks
from trimtab.steering import Gate, Steering


@dataclass(frozen=True)
class Fired:
    """What the gate of one steering decided of one text.

    `scores` are those of its conditions, at the prompt's last token where the gate decides token by
    token; `thresholds` what they were compared with. Of a token gate `prompt_tokens` and
    `new_tokens` say at how many tokens it fired, and `fired` whether at any; of another they are
    None.
    """

    steering: str
    kind: str
    fired: bool
    scores: tuple[float | None, ...]
    thresholds: tuple[float, ...]
    prompt_tokens: int | None = None
    new_tokens: int | None = None

    @property
    def summary(self) -> str:
        """For people: whether it fired, and the scores."""
        pairs = zip(self.scores, self.thresholds, strict=True)
        said = ", ".join(f"{_number(score)} against {limit:.3g}" for score, limit in pairs)
        where = ""
        if self.prompt_tokens is not None:
            where = f" at {self.prompt_tokens} tokens of the prompt"
            if self.new_tokens is not None:
                where += f" and {self.new_tokens} new ones"
        return f"gate {'fired' if self.fired else 'did not fire'}{where} (score {said})"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _number(score: float | None) -> str:
    return "none" if score is None else f"{score:.3g}"


def _numbers(scores: Sequence[float]) -> tuple[float | None, ...]:
    return tuple(None if score != score else score for score in scores)


def _fired(steering: Steering, fired: bool, scores: Sequence[float], **tokens: Any) -> Fired:
    gate = steering.gate
    assert gate is not None
    return Fired(
        steering.label,
        gate.kind,
        fired,
        _numbers(scores),
        tuple(each.threshold for each in gate.conditions),
        **tokens,
    )


def fired_by(
    steering: Steering, scores: Tensor, tokens: int | None = None, new: int | None = None
) -> Fired:
    """What the gate of a steering decided of one text whose activations somebody else read: scores
    of its conditions, [conditions]; of a token gate those at the prompt's last token, and at how
    many `tokens` of the prompt it fired, and `new` ones."""
    assert steering.gate is not None
    if tokens is None:
        fired = bool(steering.gate.decide(list(scores[:, None]))[0])
        return _fired(steering, fired, scores.tolist())
    fired = bool(tokens or new)
    return _fired(steering, fired, scores.tolist(), prompt_tokens=tokens, new_tokens=new)


Rows = Sequence[tuple[Steering, ...]]


def has_two_pass(rows: Rows) -> bool:
    """Whether a steering among some has a gate that decides before the model reads."""
    return any(
        each.gate is not None and each.gate.kind == "two-pass" for row in rows for each in row
    )


def settled(
    anatomy: Anatomy, marks: Marks, rows: Rows, prompts: Sequence[Sequence[int]]
) -> tuple[list[tuple[Steering, ...]], dict[tuple[int, int], Fired]]:
    """The steerings of rows whose prompts (token ids) are known, without those whose two-pass gate
    does not fire, and the others of such gates free of them; and what these gates decided, by row
    and place."""
    asked: dict[int, tuple[Gate, list[tuple[int, int]]]] = {}
    for row, steerings in enumerate(rows):
        for place, steering in enumerate(steerings):
            if steering.gate is not None and steering.gate.kind == "two-pass":
                found = asked.setdefault(id(steering.gate), (steering.gate, []))
                found[1].append((row, place))
    decided: dict[tuple[int, int], Fired] = {}
    for gate, places in asked.values():
        scores = score_prompts(anatomy, marks, gate, [prompts[row] for row, _ in places])
        fires = gate.decide(list(scores)).tolist()
        for at, fired, own in zip(places, fires, scores.T.tolist(), strict=True):
            decided[at] = _fired(rows[at[0]][at[1]], fired, own)
    if not asked:
        return [tuple(row) for row in rows], {}
    # One free copy of each steering, so that rows that share one still do.
    free: dict[int, Steering] = {}
    kept = []
    for row, steerings in enumerate(rows):
        own_row = []
        for place, steering in enumerate(steerings):
            at = (row, place)
            if at not in decided:
                own_row.append(steering)
            elif decided[at].fired:
                own_row.append(free.setdefault(id(steering), replace(steering, gate=None)))
        kept.append(tuple(own_row))
    return kept, decided


@dataclass(frozen=True)
class Columns:
    """Where a text stands in its batch: the columns of its first token and of the end of its
    prompt, and up to which column it was read (None: not known, as of beams)."""

    start: int
    end: int
    stop: int | None


def decided_by(
    steerings: Sequence[Steering], decided: Mapping[int, Fired], gates: Sequence[GateAtWork]
) -> list[Fired | GateAtWork | None]:
    """By what it is decided of each of a row's steerings whether it acts: what was `decided` before
    the model ran, by place, or a gate that is at work while it does; None where it has no gate."""
    found: list[Fired | GateAtWork | None] = []
    rank = 0
    for place, steering in enumerate(steerings):
        early = decided.get(place)
        if early is not None or steering.gate is None:
            found.append(early)
        else:
            works = (each for each in gates if each.gate is steering.gate and each.rank == rank)
            found.append(next(works))
        rank += early is None or early.fired  # `settled` leaves the others out
    return found


def reported(
    steerings: Sequence[Steering],
    decided: Mapping[int, Fired],
    gates: Sequence[GateAtWork],
    row: int,
    at: Columns,
) -> tuple[Fired, ...]:
    """What the gates of a row's steerings decided, in order: those of `decided`, by place, and
    those that were watched while the model ran."""
    places = zip(steerings, decided_by(steerings, decided, gates), strict=True)
    return tuple(
        by if isinstance(by, Fired) else _watched(steering, by, row, at)
        for steering, by in places
        if by is not None
    )


def _watched(steering: Steering, work: GateAtWork, row: int, at: Columns) -> Fired:
    """What a gate that was watched while the model ran decided of a row."""
    if work.gate.kind != "token":
        last = work.seen[-1]
        return _fired(steering, bool(last.fired[row]), last.scores[:, row].tolist())
    fired, scores = token_by_token(work, row)
    of_prompt = int(fired[at.start : at.end].sum())
    new = None if at.stop is None else int(fired[at.end : at.stop].sum())
    return _fired(
        steering,
        bool(of_prompt or new),
        scores[:, at.end - 1].tolist(),
        prompt_tokens=of_prompt,
        new_tokens=new,
    )


def token_by_token(work: GateAtWork, row: int) -> tuple[Tensor, Tensor]:
    """Where a gate fired, [columns], and its scores, [conditions, columns]; of a column that was
    read again (after a guess that was wrong) what was decided last."""
    columns = max(each.stop for each in work.seen)
    fired = torch.zeros(columns, dtype=torch.bool)
    scores = torch.full((len(work.gate.conditions), columns), torch.nan)
    for each in work.seen:
        first = each.stop - each.fired.shape[1]
        own = row if len(each.fired) > 1 else 0  # a beginning that texts share is one row
        fired[first : each.stop] = each.fired[own].cpu()
        scores[:, first : each.stop] = each.scores[:, own].float().cpu()
    return fired, scores


def watch(gates: Sequence[GateAtWork]) -> None:
    """Have gates keep what they decide from here on, for `reported`."""
    for work in gates:
        work.watched = True
        work.seen.clear()


def decisions(
    anatomy: Anatomy, marks: Marks, gate: Gate, prompts: Sequence[Sequence[int]]
) -> list[Fired]:
    """What a gate decides of prompts (token ids) that are only read."""
    limits = tuple(each.threshold for each in gate.conditions)
    if gate.kind == "token":
        return [
            _of_tokens(score_pass(anatomy, marks, gate, [p], [len(p)]), limits) for p in prompts
        ]
    scores = score_prompts(anatomy, marks, gate, prompts)
    fires = gate.decide(list(scores)).tolist()
    return [
        Fired("", gate.kind, fired, _numbers(own), limits)
        for fired, own in zip(fires, scores.T.tolist(), strict=True)
    ]


def _of_tokens(decision: Decision, limits: tuple[float, ...]) -> Fired:
    """What a token gate decided of one prompt that was read alone."""
    tokens = int(decision.fired.sum())
    scores = [float(each[0, -1]) for each in decision.scores_in_order()]
    return Fired("", "token", tokens > 0, _numbers(scores), limits, tokens)
