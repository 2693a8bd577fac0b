"""Gates on a running model: conditions are read while a pass goes by, and the steps above ask.

In a pass a gate has one `Decision`. Readers at its sites hand it activations, it scores them, and
what a gate steers asks it at which rows and tokens it fires. What a latched gate has decided, and
the sums of what it has read so far, stay with the KV cache and follow its rows; a text that is read
again without a cache is decided again, from the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.model.marks import Marks, Placed
from trimtab.model.one_pass import Pass
from trimtab.model.trails import note_latch
from trimtab.steering import READS_LAST, Gate

#: The scores of prompts (token ids) under a gate, [conditions, prompts].
Score = Callable[[Gate, Sequence[Sequence[int]]], Tensor]


@dataclass(eq=False)
class Latched:
    """What a latched or two-pass gate knows of the rows in a cache: whether it fires, [rows], the
    scores by which it was decided, [conditions, rows], and of a mean the sum and the count of what
    was read so far, with the column up to which that goes."""

    fired: Tensor
    scores: Tensor
    sums: list[Tensor | None] = field(default_factory=list)
    counts: list[Tensor | None] = field(default_factory=list)
    columns: int = 0

    def read_so_far(self, number: int, start: int) -> tuple[Tensor | None, Tensor | None]:
        """Sum and count of a condition, where all before the column `start` is in them."""
        if start != self.columns:
            return None, None
        return self.sums[number], self.counts[number]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Latched:
        """For rows in another order, repeated or chosen."""
        return Latched(
            move(self.fired),
            move(self.scores.T).T,
            [None if each is None else move(each) for each in self.sums],
            [None if each is None else move(each) for each in self.counts],
            self.columns,
        )


class Seen(NamedTuple):
    """What a gate decided in a pass that ended before the column `stop`: of a token gate where it
    fired, [rows, tokens], and the scores, [conditions, rows, tokens]; of another without tokens."""

    stop: int
    fired: Tensor
    scores: Tensor


@dataclass(eq=False)
class GateAtWork:
    """A gate while a block is open; `reads` are its conditions' scopes in the model's tokens, None
    where that is the prompt's last token. `score` reads prompts in a pass that is not steered.

    Where it is `watched`, `seen` has what a token gate decided, pass by pass, and of another what
    it decided last.
    """

    gate: Gate
    marks: Marks
    score: Score
    reads: list[Placed | None] = field(init=False)
    watched: bool = False
    seen: list[Seen] = field(default_factory=list)
    #: Whose it is: its steering's place among those of a row, and which rows have that.
    rank: int = 0
    rows: Sequence[bool] = (True,)
    #: How many steerings under the same gate come before, on the same model: each decides for
    #: itself, because it may see what those before it did.
    number: int = 0

    def __post_init__(self) -> None:
        conditions = self.gate.conditions
        self.reads = [
            None if each.reads == READS_LAST else self.marks.place(each.reads)
            for each in conditions
        ]

    @property
    def key(self) -> tuple[Gate, int]:
        """By what is kept what it has decided."""
        return self.gate, self.number

    @property
    def scopes(self) -> list[Placed]:
        """The scopes that its conditions read."""
        return [] if self.gate.kind == "token" else [s for s in self.reads if s is not None]

    def decision(self, now: Pass) -> Decision:
        """What it decides in a pass."""
        made: Decision = now.once(("gate", id(self)), lambda: Decision(self, now))
        return made

    def note(self, now: Pass, caches: Sequence[Any]) -> None:
        """A pass has run: what was decided of its rows is kept with its caches."""
        decision, stop = self.decision(now), now.start + now.length
        if self.gate.kind == "token":
            if self.watched:
                scores = torch.stack(decision.scores_in_order())
                self.seen.append(Seen(stop, decision.fired, scores))
            return
        if self.watched or caches:
            latched = decision.latched()
            self.seen = [Seen(stop, latched.fired, latched.scores)]
            for cache in caches:
                note_latch(cache, self.key, latched)

    def prepare(self, prompts: Sequence[Sequence[int]]) -> Latched:
        """What a two-pass gate decides of prompts (token ids)."""
        scores = self.score(self.gate, prompts)
        return Latched(self.gate.decide(list(scores)), scores)


@dataclass(eq=False)
class Decision:
    """What one gate decides in one pass."""

    work: GateAtWork
    now: Pass
    scores: dict[int, Tensor] = field(default_factory=dict)
    #: What the scores are those of, where each text is read as one, [rows, units] in float64.
    activations: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)
    _fired: Tensor | None = None
    _answers: dict[Any, Tensor | bool] = field(default_factory=dict)

    # -- what readers hand over ---------------------------------------------------------------

    def read(self, number: int, x: Tensor) -> None:
        """The activations of a pass, [rows, tokens, units], at the site of a condition."""
        with torch.inference_mode(False), torch.no_grad():
            x = x.detach()
            condition = self.work.gate.conditions[number]
            if self.work.gate.kind == "token":
                self.scores[number] = condition.scores(x)
                return
            placed = self.work.reads[number]
            if placed is not None:
                self.now.check_turns(placed, self.work.rows)
            read = self._last(x) if placed is None else self._mean(number, x, placed)
            self.activations[number] = read
            self.scores[number] = condition.scores(read)

    def _last(self, x: Tensor) -> Tensor:
        """The activation of each prompt's last token, [rows, units]; of a prompt that does not end
        in this pass any one, which nobody asks for."""
        ends = self.now.prompts.column("end", x.device).expand(len(x), 1)
        first = self.now.start + self.now.length - x.shape[1]
        place = (ends - 1 - first).clamp(0, x.shape[1] - 1)
        return x.take_along_dim(place[:, :, None], 1)[:, 0].double()

    def _mean(self, number: int, x: Tensor, placed: Placed) -> Tensor:
        """The mean activation of what is read of each prompt, [rows, units] in float64; NaN where
        there is no token of it."""
        now = self.now
        if x.shape[1] != now.length:
            raise TrimtabError(
                f"{self.work.gate.conditions[number].site} sees some tokens of a prompt only, in "
                "this model: let the condition read 'last', or a lower site"
            )
        columns = torch.arange(now.start, now.start + now.length, device=x.device)
        starts, ends, resumes = (
            now.prompts.column(of, x.device).expand(len(x), 1) for of in ("start", "end", "resumes")
        )
        real = (columns >= starts) & ((columns < ends) | (columns >= resumes))
        wanted = real & torch.as_tensor(now.mask(placed, x.device), device=x.device)
        if now.trail is not None and now.trail.real is not None:
            wanted = wanted & now.trail.real[:, now.start :].to(x.device)
        wide, (total, count) = x.double(), self._before(number, x)
        of_prompt = wanted & (columns < ends)
        sums = total + _sum(wide, of_prompt)
        counts = count + of_prompt.sum(1)
        # For a prompt that goes on after what is written now, which a cache may be used for.
        self.sums[number] = total + _sum(wide, wanted)
        self.counts[number] = count + wanted.sum(1)
        return sums / counts[:, None]

    def _before(self, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum and the count of what was read in the passes before."""
        nothing = x.new_zeros(len(x), x.shape[2], dtype=torch.float64), x.new_zeros(len(x))
        if self.now.start == 0:
            return nothing
        known = self._known()
        decided = self._decided_before(x.device)
        total, count = (None, None) if known is None else known.read_so_far(number, self.now.start)
        if total is None or count is None:
            if bool(decided.all()):  # nobody asks for the mean any more
                return nothing[0] * torch.nan, nothing[1]
            raise TrimtabError(
                "the model goes on with a KV cache in the middle of a prompt whose beginning no "
                "pass under this gate has read as it is, so that the mean over it is not known: "
                "read the whole prompt inside the block, or let the condition read 'last'"
            )
        return _of_rows(total, len(x)).to(x.device), _of_rows(count, len(x)).to(x.device)

    # -- what steps ask -----------------------------------------------------------------------

    def fires(self, device: torch.device) -> Tensor | bool:
        """Where it fires, [rows, tokens] or [rows, 1]; one answer where it is one for all and that
        costs nothing to know."""
        if device not in self._answers:
            fired = self.fired
            fired = fired if fired.dim() > 1 else fired[:, None]
            if fired.device.type == "cpu" and not bool(fired.any()):
                self._answers[device] = False
            elif fired.device.type == "cpu" and bool(fired.all()):
                self._answers[device] = True
            else:
                self._answers[device] = fired.to(device)
        return self._answers[device]

    @property
    def fired(self) -> Tensor:
        """[rows, tokens] of a token gate, [rows] of the others."""
        if self._fired is None:
            with torch.inference_mode(False), torch.no_grad():
                self._fired = self._decide()
        return self._fired

    def _decide(self) -> Tensor:
        gate = self.work.gate
        if gate.kind == "two-pass":
            return self._prepared().fired
        missing = [i for i in range(len(gate.conditions)) if i not in self.scores]
        if missing:
            raise TrimtabError(
                f"the gate's condition at {gate.conditions[missing[0]].site} comes after what it "
                "is to decide in this model: fit it at a lower site, or make it two-pass"
            )
        decided = gate.decide(self.scores_in_order())
        if gate.kind == "token":
            return decided
        before = self._decided_before(decided.device)
        known = self._known()
        if known is None:
            # Where a prompt has ended in an earlier pass, somebody must have decided then.
            if self.now.start and bool(before.any()):
                raise _not_seen()
            return decided & self._ends_here(decided.device)
        old = _of_rows(known.fired, len(decided)).to(decided.device)
        return torch.where(before, old, decided & self._ends_here(decided.device))

    def scores_in_order(self) -> list[Tensor]:
        """The scores of its conditions, on one device."""
        if self.work.gate.kind == "two-pass":
            return list(self._prepared().scores)
        first = self.scores[0]
        return [self.scores[i].to(first.device) for i in range(len(self.work.gate.conditions))]

    def _prepared(self) -> Latched:
        found: Latched | None = self.now.latched.get(self.work.key)
        if found is None:
            raise _not_seen()
        return found

    def _decided_before(self, device: torch.device) -> Tensor:
        """Of which rows the prompt has ended in an earlier pass, [rows] or [1]."""
        return self.now.prompts.column("end", device)[:, 0] <= self.now.start

    def _ends_here(self, device: torch.device) -> Tensor:
        ends = self.now.prompts.column("end", device)[:, 0]
        return (ends > self.now.start) & (ends <= self.now.start + self.now.length)

    def _known(self) -> Latched | None:
        """What is kept of the rows in the cache."""
        return None if self.now.start == 0 else self.now.latched.get(self.work.key)

    def latched(self) -> Latched:
        """What is to be kept of a gate that looks back."""
        if self.work.gate.kind == "two-pass":
            return self._prepared()
        scores = torch.stack(self.scores_in_order())
        known = self._known()
        if known is not None:
            before = self._decided_before(scores.device).expand(scores.shape[1])
            old = known.scores.to(scores.device)
            old = _of_rows(old.T, scores.shape[1]).T
            scores = torch.where(before, old, scores)
        numbers = range(len(self.work.gate.conditions))
        return Latched(
            self.fired,
            scores,
            [self.sums.get(i) for i in numbers],
            [self.counts.get(i) for i in numbers],
            self.now.start + self.now.length,
        )


def _sum(x: Tensor, wanted: Tensor) -> Tensor:
    """The sum over some tokens; the others may be no numbers, as padding is in some models."""
    return torch.where(wanted[:, :, None], x, 0.0).sum(1)


def _of_rows(kept: Tensor, rows: int) -> Tensor:
    """What is kept of some rows for so many, each repeated in place."""
    return kept if len(kept) == rows else kept.repeat_interleave(rows // len(kept), dim=0)


def _not_seen() -> TrimtabError:
    return TrimtabError(
        "the model goes on with a KV cache that no pass under this gate has filled, so that what "
        "it decided of the prompt is not known: run the prompt inside the block, too"
    )
