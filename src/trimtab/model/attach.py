"""Puts steerings on a live model for the length of a `with` block.

Every forward pass inside it is steered, also a raw `model.generate(...)`, with or without KV
cache. Several steerings act in the order given. In a batch each row may have its own.

At which tokens an intervention acts its scope says (docs/scopes.md, spans.py). `all` is every token
of every pass, `prompt` the tokens up to the end of the prompt, `generated` those after it. A text
that is only read, not continued, is all prompt. With a KV cache a pass holds only the new tokens,
without one it holds all of them again; both give the same result, because a scope is a function of
what a row has read from its start on, which is known of caches too.

`attached` is for dials that are known, `attached_by` for dials that depend on what the model is
about to read, and `turned` for one steering at a tensor of dials, through which derivatives go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import current_thread
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, Edit, Point, exclusively, hooked, parse_site
from trimtab.errors import TrimtabError
from trimtab.model.gate_scores import score_prompts
from trimtab.model.gating import GateAtWork
from trimtab.model.marks import Marks, Placed
from trimtab.model.one_pass import Pass
from trimtab.model.passes import Choose, Sequences
from trimtab.model.running import ATTACHED, Attached, Block
from trimtab.steering import Operator, Steering

#: The steerings of one row of a batch, in the order in which they act.
RowSteerings = tuple[Steering, ...]


@dataclass
class _Step:
    """One operator at one site, at one dial or one per row, on some of the rows."""

    operator: Operator
    scope: Placed
    dials: Sequence[float] | Tensor  # one per row of the batch, or one for all rows
    rows: list[bool]
    #: What the dials that are found for the rows while it runs are multiplied by.
    weight: float = 1.0
    gate: GateAtWork | None = None
    touched: int = 0  # passes in which it changed something
    #: The operator and the rows that it changes, for each device and number of rows.
    bound: dict[Any, tuple[Callable[[Tensor], Tensor], Tensor | None]] = field(default_factory=dict)

    def __call__(self, x: Tensor, now: Pass | None) -> Tensor | None:
        """What becomes of an activation, None where nothing does; `now` is the pass that runs, as
        far as anybody needs to know."""
        if now is not None and self.scope.turns is not None:
            now.check_turns(self.scope, self.rows)
        mask = True if now is None else now.mask(self.scope, x.device)
        if mask is not False and self.gate is not None:
            assert now is not None
            mask = _both(mask, self.gate.decision(now).fires(x.device))
        if mask is False:
            return None
        found = None if now is None else now.found
        if now is not None and self.scope.decay is not None:
            return self._decayed(x, now, mask)
        bound = self.bound if found is None else found.bound
        key = (id(self), x.device, x.shape[0])
        if key not in bound:
            # A plain pass with gradients may follow one in inference mode in the same block.
            with torch.inference_mode(False):
                bound[key] = self._bind(x, self._own_dials(now))
        function, steered = bound[key]
        self.touched += 1
        changed = function(x)
        if isinstance(mask, Tensor):
            # Layers that read others' keys see a prompt's last token alone (Gemma 4's).
            changed = torch.where(mask[:, -x.shape[1] :, None], changed, x)
        return changed if steered is None else torch.where(steered, changed, x)

    def _own_dials(self, now: Pass | None) -> Sequence[float] | Tensor:
        """Those that were given, or that were found for the rows of the pass that runs."""
        found = None if now is None else now.found
        return self.dials if found is None else found.values * self.weight

    def _decayed(self, x: Tensor, now: Pass, mask: Tensor | bool) -> Tensor:
        """The operator at a dial of each token's own, which no two passes share."""
        assert self.scope.decay is not None
        self.touched += 1
        factors = now.factors(self.scope.decay, x.device)[:, -x.shape[1] :]
        with torch.inference_mode(False):
            dials = torch.as_tensor(self._own_dials(now))
            repeats = _repeats(x, len(dials))
            each = dials.to(x.device).repeat_interleave(repeats)[:, None] * factors
            changed = self.operator.bind(each, x.device)(x)
        if isinstance(mask, Tensor):
            changed = torch.where(mask[:, -x.shape[1] :, None], changed, x)
        return changed

    @property
    def everywhere(self) -> bool:
        """Whether it acts on all tokens of every pass."""
        return self.scope.everywhere and self.gate is None

    @property
    def same_for_all(self) -> bool:
        """Whether one dial, which stays, is for all rows."""
        return not isinstance(self.dials, Tensor) and len(self.dials) == 1

    def _bind(
        self, x: Tensor, dials: Sequence[float] | Tensor
    ) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        rows = self.rows
        if self.same_for_all:
            return self.operator.bind(float(dials[0]), x.device), None
        # Beams and several samples per prompt repeat each row in place.
        repeats = _repeats(x, len(dials))
        per_row = torch.as_tensor(dials).repeat_interleave(repeats)
        function = self.operator.bind(per_row[:, None], x.device)
        if all(rows) or self.operator.identity is not None:
            return function, None  # rows without this steering have the dial that does nothing
        steered = torch.tensor(rows).repeat_interleave(repeats)
        return function, steered[:, None, None].to(x.device)


@dataclass
class _Reader:
    """Hands what one condition of a gate reads to it."""

    gate: GateAtWork
    number: int

    def __call__(self, x: Tensor, now: Pass | None) -> None:
        assert now is not None
        self.gate.decision(now).read(self.number, x)


#: What is done at each site, in order.
_Chains = dict[str, list["_Step | _Reader"]]


def _both(mask: Tensor | bool, fired: Tensor | bool) -> Tensor | bool:
    """Tokens of a scope at which a gate fires."""
    if isinstance(mask, bool):
        return fired if mask else False
    if isinstance(fired, bool):
        return mask if fired else False
    # Layers that see some tokens of a prompt only give a gate that is there as many.
    return mask[:, -fired.shape[1] :] & fired if fired.shape[1] > 1 else mask & fired


def _repeats(x: Tensor, rows: int) -> int:
    """How often each row that a dial was given for is in an activation [rows, tokens, units]."""
    repeats, rest = divmod(x.shape[0], rows)
    if rest:
        raise TrimtabError(f"steerings were given for {rows} rows, but the batch has {x.shape[0]}")
    return repeats


def _same_for_all(step: _Step, sequences: Sequences) -> Edit:
    """A step with one dial for all rows and all tokens, which is what most steerings are.

    The general way asks at every pass which tokens to change and looks up what was bound for the
    number of rows; here both answers stay the same, so that the first pass binds the operator and
    later ones only call it. Every microsecond counts, because each token passes 30 blocks. That the
    step touched something is noted once, which is all that is asked of it.
    """
    function: Callable[[Tensor], Tensor] | None = None
    here = sequences.here

    def edit(x: Tensor) -> Tensor | None:
        nonlocal function
        if here.paused:
            return None
        if function is None:
            step.touched = 1
            # A plain pass with gradients may follow one in inference mode in the same block.
            with torch.inference_mode(False):
                function = step.operator.bind(float(step.dials[0]), x.device)
        return function(x)

    return edit


def _steps(rows: Sequence[RowSteerings], anatomy: Anatomy, marks: Marks) -> _Chains:
    """What to do at each site, in order; one step serves all rows that share an operator."""
    steps: _Chains = {}
    places: dict[tuple[int, int, int], dict[int, Steering]] = {}
    for row, steerings in enumerate(rows):
        for rank, steering in enumerate(steerings):
            # at() shares the interventions, so that two dials of one steering meet here.
            key = (rank, id(steering.interventions), id(steering.gate))
            places.setdefault(key, {})[row] = steering
    for (rank, *_), of_rows in sorted(places.items(), key=lambda place: place[0][0]):
        settings = {row: steering.setting for row, steering in of_rows.items()}
        first = next(iter(of_rows.values()))
        taking = [row in settings for row in range(len(rows))]
        gate = _at_work(first, anatomy, marks, steps, rank, taking)
        for intervention in first.interventions:
            if all(intervention.idle_at(setting) for setting in settings.values()):
                continue
            own = {row: intervention.dial_at(setting) for row, setting in settings.items()}
            nothing = intervention.operator.identity or 0.0
            dials = [own.get(row, nothing) for row in range(len(rows))]
            scope = marks.place(intervention.scope)
            step = _Step(intervention.operator, scope, dials, taking, gate=gate)
            steps.setdefault(intervention.site, []).append(step)
    return steps


def _at_work(
    steering: Steering,
    anatomy: Anatomy,
    marks: Marks,
    steps: _Chains,
    rank: int = 0,
    rows: Sequence[bool] = (True,),
) -> GateAtWork | None:
    """The gate of a steering, whose readers come before what the steering does at the same site."""
    if steering.gate is None:
        return None
    score = partial(score_prompts, anatomy, marks)
    work = GateAtWork(steering.gate, marks, score, rank=rank, rows=rows)
    if steering.gate.kind != "two-pass":
        for number, condition in enumerate(steering.gate.conditions):
            steps.setdefault(condition.site, []).append(_Reader(work, number))
    return work


def attached(
    anatomy: Anatomy,
    rows: Sequence[RowSteerings],
    marks: Marks,
    *,
    per_row: bool = False,
    pad: int | None = None,
    block: bool = True,
) -> AbstractContextManager[Sequences]:
    """Steer the model: `rows` holds one entry for all rows of any batch, or (`per_row`) one each.

    Yields the `Sequences`, on which a caller that reads prompt and answer in one pass may set
    `given_ends`. `marks` say what the words of scopes are in this model. `pad` is the padding
    token, by which padding is known that no mask tells. `block` is false where the model is held
    for one call only (see exclusive.py). A steering that touched nothing although the model ran is
    an error.
    """
    count = len(rows) if per_row else None
    labels = list(dict.fromkeys(steering.label for row in rows for steering in row))
    steps = _steps(rows, anatomy, marks)
    return _on_model(anatomy, steps, labels, rows=count, pad=pad, block=block)


def turned(
    anatomy: Anatomy, steering: Steering, marks: Marks, dials: Tensor
) -> AbstractContextManager[Sequences]:
    """One steering on all rows of a batch, each at its own dial; `dials` [rows] may carry a
    derivative, which goes on through the model. That no row has a token of its kind is no error:
    what it does to plain text is asked too. Nor does its gate count: a dial is measured where the
    steering acts."""
    steps = _turned_steps(replace(steering, gate=None), anatomy, marks, dials)
    return _on_model(anatomy, steps, [steering.label], rows=len(dials), may_miss_images=True)


def attached_by(
    anatomy: Anatomy, steering: Steering, marks: Marks, choose: Choose
) -> AbstractContextManager[Sequences]:
    """One steering at dials that `choose` finds, [rows], whenever the model begins new sequences.
    While it looks, it may run the model, which is not steered then."""
    steps = _turned_steps(steering, anatomy, marks, torch.zeros(0))
    return _on_model(anatomy, steps, [steering.label], choose=choose)


def finds_dials(anatomy: Anatomy) -> bool:
    """Whether a block of `attached_by` is on the model, other than one that is looking now."""
    on = ATTACHED.get(anatomy.body)
    return on is not None and any(
        block.finds and not block.sequences.here.paused for block in on.blocks
    )


def _turned_steps(steering: Steering, anatomy: Anatomy, marks: Marks, dials: Tensor) -> _Chains:
    steps: _Chains = {}
    gate = _at_work(steering, anatomy, marks, steps)
    for intervention in steering.interventions:
        scope, weight = marks.place(intervention.scope), intervention.weight
        step = _Step(intervention.operator, scope, dials * weight, [True], weight, gate)
        steps.setdefault(intervention.site, []).append(step)
    return steps


def _of_choice(chain: Sequence[_Step | _Reader]) -> list[_Step | _Reader]:
    """What is done to the scores by which a router chooses."""
    choices = [(step, step.operator.choice) for step in chain if isinstance(step, _Step)]
    return [replace(s, operator=choice, bound={}) for s, choice in choices if choice is not None]


def _editor(chain: Sequence[_Step | _Reader], sequences: Sequences) -> Edit:
    """What is done to the activation of one site."""
    first = chain[0]
    if len(chain) == 1 and isinstance(first, _Step) and first.everywhere and first.same_for_all:
        return _same_for_all(first, sequences)

    def edit(x: Tensor) -> Tensor | None:
        if sequences.here.paused:
            return None
        now, result = sequences.here.current, None
        for step in chain:
            changed = step(x if result is None else result, now)
            result = result if changed is None else changed
        return result

    return edit


@contextmanager
def _on_model(
    anatomy: Anatomy,
    steps: _Chains,
    labels: Sequence[str],
    *,
    rows: int | None = None,
    pad: int | None = None,
    choose: Choose | None = None,
    block: bool = True,
    may_miss_images: bool = False,
) -> Iterator[Sequences]:
    """Take the steps at every pass of the model."""
    with exclusively(anatomy.body, block):
        body: Any = anatomy.model.get_submodule(anatomy.body_path)
        if getattr(body, "_orig_mod", body) is not anatomy.body:
            raise TrimtabError(
                "the model's transformer body was replaced after it was wrapped: wrap it again"
            )
        if not steps:
            yield Sequences()
            return
        every = [step for chain in steps.values() for step in chain if isinstance(step, _Step)]
        # Also those whose steering does nothing at its dial: what they decide is asked.
        acting = [step.gate for chain in steps.values() for step in chain if step.gate is not None]
        gates = _numbered(list(dict.fromkeys(acting)), ATTACHED.get(anatomy.body))
        placed = bool(rows or choose or gates) or not all(step.everywhere for step in every)
        names = list(inspect.signature(anatomy.body.forward).parameters) if placed else []
        sequences = Sequences(
            names,
            rows=rows,
            pad=pad,
            choose=choose,
            scopes=[*(s.scope for s in every), *(s for gate in gates for s in gate.scopes)],
            gates=gates,
        )
        # Whoever holds the model for one call has looked at the texts of all of them.
        sequences.may_miss_images = may_miss_images or not block
        own = None if block else current_thread()
        opened = Block(sequences, placed, choose is not None, own, labels=labels)
        edits: dict[Point, Edit] = {
            anatomy.point(site): _editor(chain, sequences) for site, chain in steps.items()
        }
        for site, chain in steps.items():
            choosing = _of_choice(chain) if parse_site(site)[1] == "router" else []
            if choosing:
                edits[anatomy.choice_point(site)] = _editor(choosing, sequences)
        on = ATTACHED.get(anatomy.body)
        if on is None or not on.blocks:
            on = ATTACHED[anatomy.body] = Attached(anatomy.model, anatomy.body)
        on.open(opened)
        try:
            with hooked(anatomy.body, edits):
                yield sequences
        finally:
            on.close(opened)
            if not on.blocks:
                ATTACHED.pop(anatomy.body, None)
        if opened.refused is not None:
            raise TrimtabError(f"in another thread: {opened.refused}")
        if opened.running:
            raise TrimtabError(
                "the block ended while the model was still running in another thread: what that "
                "thread writes is no longer steered; wait for it (thread.join()) inside the block"
            )
        _refuse_untouched(steps, sequences)


def _numbered(gates: Sequence[GateAtWork], on: Attached | None) -> Sequence[GateAtWork]:
    """Gates that come onto a model, each with its number among those of the same gate."""
    before = [] if on is None else [w.gate for block in on.blocks for w in block.sequences.gates]
    for work in gates:
        work.number = before.count(work.gate)
        before.append(work.gate)
    return gates


def _refuse_untouched(steps: _Chains, sequences: Sequences) -> None:
    """A steering that does not act is an error."""
    for site, chain in steps.items():
        for step in chain:
            if isinstance(step, _Reader) or step.gate is not None:
                continue
            scope = step.scope
            over = sequences.in_part or (scope.only_generated and sequences.ended_at_once)
            over = over or (scope.only_images and sequences.may_miss_images)
            # Whether a text has a token of another scope it says itself.
            over = over or not scope.plain
            if sequences.passes and not step.touched and not over:
                raise TrimtabError(
                    f"the steering touched nothing at {site}: the model ran {sequences.passes} "
                    f"times without a token of the scope '{scope.text}' reaching that site"
                )
