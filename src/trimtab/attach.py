"""Puts steerings on a live model for the length of a `with` block.

Every forward pass inside it is steered, also a raw `model.generate(...)`, with or without KV
cache. Several steerings act in the order given. In a batch each row may have its own.

What `positions` means: `all` is every token of every pass. `prompt` is the tokens up to the end of
the prompt, `generated` those after it, `last` the prompt's last token and all after it, which are
the tokens that a next token is read from. A text that is only read, not continued, is all prompt.
With a KV cache a pass holds only the new tokens, without one it holds all of them again; both give
the same result, because positions count from the start of the sequence.

`attached` is for dials that are known, `attached_by` for dials that depend on what the model is
about to read, and `turned` for one steering at a tensor of dials, through which derivatives go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, Edit, Point
from trimtab.errors import TrimtabError
from trimtab.hooks import hooked
from trimtab.operators import Operator
from trimtab.steering import Positions, Steering

#: The steerings of one row of a batch, in the order in which they act.
RowSteerings = tuple[Steering, ...]


@dataclass
class Sequences:
    """Where the rows of the current forward pass stand between prompt and generated tokens."""

    start: int = 0  # position of the pass's first token
    length: int = 0
    prompt_end: list[int] = field(default_factory=list)  # one per row, or one for all
    #: Where the caller says that prompts end: for texts whose answer is read along with them.
    given_ends: list[int] | None = None
    generating: bool = False
    prompt_width: int = 0  # tokens that generate() was given, which may come in several passes
    #: The next pass begins new sequences, even where a cache is already filled.
    fresh: bool = True
    passes: int = 0
    #: The caller says that every text ended with its first token: none was left to steer.
    ended_at_once: bool = False
    #: Passes run as if nothing were attached.
    paused: bool = False

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Note what a pass of the transformer body is about to read; whether new sequences begin
        with it."""
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self.start = 0 if cache is None else int(cache.get_seq_length())
        self.length = tokens.shape[1]
        if self.given_ends is not None:
            self.prompt_end = self.given_ends
        begins = self.fresh or (self.start == 0 and not self.generating)
        if begins and self.given_ends is None:
            width = self.start + self.length
            whole = width >= self.prompt_width
            self.prompt_end = _ends(mask, width) if whole else [self.prompt_width]
        self.fresh = False
        return begins

    def mask(self, positions: Positions, device: torch.device) -> Tensor | bool:
        """Which tokens of the pass to steer: [rows, tokens], or one answer for all of them."""
        if positions == "all":
            return True
        stop = self.start + self.length
        ends = [end - 1 for end in self.prompt_end] if positions == "last" else self.prompt_end
        before = positions == "prompt"
        if max(ends) <= self.start:
            return not before
        if min(ends) >= stop:
            return before
        token = torch.arange(self.start, stop, device=device)
        after = token >= torch.tensor(ends, device=device)[:, None]
        return ~after if before else after


def _ends(mask: Any, width: int) -> list[int]:
    """Where each row's real tokens end, from a [rows, width] mask of ones; else the width."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return [width]
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    ends: list[int] = (columns * (mask != 0)).amax(-1).tolist()
    return ends


def _width_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens of prompt generate() was given, 0 where it was given none."""
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    return max((x.shape[1] for x in given if isinstance(x, Tensor) and x.dim() > 1), default=0)


@dataclass
class _Step:
    """One operator at one site, at one dial or one per row, on some of the rows."""

    operator: Operator
    positions: Positions
    dials: Sequence[float] | Tensor  # one per row of the batch, or one for all rows
    rows: list[bool]
    touched: int = 0  # passes in which it changed something
    #: The operator and the rows that it changes, for each device and number of rows.
    bound: dict[tuple[torch.device, int], tuple[Callable[[Tensor], Tensor], Tensor | None]] = field(
        default_factory=dict
    )

    def __call__(self, x: Tensor, sequences: Sequences) -> Tensor | None:
        mask = sequences.mask(self.positions, x.device)
        if mask is False:
            return None
        key = (x.device, x.shape[0])
        if key not in self.bound:
            # A plain pass with gradients may follow one in inference mode in the same block.
            with torch.inference_mode(False):
                self.bound[key] = self._bind(x)
        function, steered = self.bound[key]
        self.touched += 1
        changed = function(x)
        if isinstance(mask, Tensor):
            changed = torch.where(mask[..., None], changed, x)
        return changed if steered is None else torch.where(steered, changed, x)

    @property
    def same_for_all(self) -> bool:
        """Whether one dial, which stays, is for all rows."""
        return not isinstance(self.dials, Tensor) and len(self.dials) == 1

    def turn(self, dials: Tensor) -> None:
        """From now on other dials, one per row."""
        self.dials = dials
        self.bound.clear()

    def _bind(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        dials, rows = self.dials, self.rows
        if self.same_for_all:
            return self.operator.bind(float(dials[0]), x.device), None
        # Beams and several samples per prompt repeat each row in place.
        repeats, rest = divmod(x.shape[0], len(dials))
        if rest:
            raise TrimtabError(
                f"steerings were given for {len(dials)} rows, but the batch has {x.shape[0]}"
            )
        per_row = torch.as_tensor(dials).repeat_interleave(repeats)
        function = self.operator.bind(per_row[:, None], x.device)
        if all(rows) or self.operator.identity is not None:
            return function, None  # rows without this steering have the dial that does nothing
        steered = torch.tensor(rows).repeat_interleave(repeats)
        return function, steered[:, None, None].to(x.device)


def _same_for_all(step: _Step) -> Edit:
    """A step with one dial for all rows and tokens: only its first pass has anything to find out.

    These are most steerings, and every microsecond counts in a token's pass through 30 blocks.
    """
    function: Callable[[Tensor], Tensor] | None = None

    def edit(x: Tensor) -> Tensor:
        nonlocal function
        if function is None:
            step.touched = 1
            # A plain pass with gradients may follow one in inference mode in the same block.
            with torch.inference_mode(False):
                function = step.operator.bind(float(step.dials[0]), x.device)
        return function(x)

    return edit


def _steps(rows: Sequence[RowSteerings]) -> dict[str, list[_Step]]:
    """What to do at each site, in order; one step serves all rows that share an operator."""
    steps: dict[str, list[_Step]] = {}
    places: dict[tuple[int, int], list[tuple[int, Steering]]] = {}
    order: list[tuple[int, int]] = []
    for row, steerings in enumerate(rows):
        for rank, steering in enumerate(steerings):
            # at() shares the interventions, so that two dials of one steering meet here.
            key = (rank, id(steering.interventions))
            if key not in places:
                places[key] = []
                order.append(key)
            places[key].append((row, steering))
    for key in sorted(order, key=lambda key: key[0]):
        settings = {row: steering.setting for row, steering in places[key]}
        for intervention in places[key][0][1].interventions:
            idle = intervention.operator.identity
            if idle is not None and all(value == idle for value in settings.values()):
                continue
            nothing = 0.0 if idle is None else idle
            dials = [settings.get(row, nothing) for row in range(len(rows))]
            taking = [row in settings for row in range(len(rows))]
            step = _Step(intervention.operator, intervention.positions, dials, taking)
            steps.setdefault(intervention.site, []).append(step)
    return steps


@contextmanager
def attached(model: Any, anatomy: Anatomy, rows: Sequence[RowSteerings]) -> Iterator[Sequences]:
    """Steer the model: `rows` holds one entry for all rows of any batch, or one per row.

    Yields the `Sequences`, on which a caller that reads prompt and answer in one pass may set
    `given_ends`. A steering that touched nothing although the model ran is an error.
    """
    with _on_model(model, anatomy, _steps(rows)) as sequences:
        yield sequences


@contextmanager
def turned(model: Any, anatomy: Anatomy, steering: Steering, dials: Tensor) -> Iterator[Sequences]:
    """One steering on all rows of a batch, each at its own dial; `dials` [rows] may carry a
    derivative, which goes on through the model."""
    with _on_model(model, anatomy, _turned_steps(steering, dials)) as sequences:
        yield sequences


#: Says at which dial each row of a batch is steered, from where the pass stands and from the
#: positional and the named arguments of the transformer body.
Choose = Callable[[Sequences, tuple[Any, ...], dict[str, Any]], Tensor]


@contextmanager
def attached_by(
    model: Any, anatomy: Anatomy, steering: Steering, choose: Choose
) -> Iterator[Sequences]:
    """One steering at dials that `choose` finds, [rows], whenever the model begins new sequences.
    While it looks, it may run the model, which is not steered then."""
    steps = _turned_steps(steering, torch.zeros(2))
    with _on_model(model, anatomy, steps, choose) as sequences:
        yield sequences


def finds_dials(anatomy: Anatomy) -> bool:
    """Whether a block of `attached_by` is on the model, other than one that is looking now."""
    watching = (getattr(hook, "finds", None) for hook in anatomy.body._forward_pre_hooks.values())
    return any(sequences is not None and not sequences.paused for sequences in watching)


def _turned_steps(steering: Steering, dials: Tensor) -> dict[str, list[_Step]]:
    steps: dict[str, list[_Step]] = {}
    for intervention in steering.interventions:
        step = _Step(intervention.operator, intervention.positions, dials, [True])
        steps.setdefault(intervention.site, []).append(step)
    return steps


@contextmanager
def _on_model(
    model: Any, anatomy: Anatomy, steps: dict[str, list[_Step]], choose: Choose | None = None
) -> Iterator[Sequences]:
    """Take the steps at every pass of the model."""
    sequences = Sequences()

    def editor(site: str) -> Edit:
        chain = steps[site]
        first = chain[0]
        if len(chain) == 1 and first.positions == "all" and first.same_for_all:
            return _same_for_all(first)

        def edit(x: Tensor) -> Tensor | None:
            result = None
            if sequences.paused:
                return None
            for step in chain:
                changed = step(x if result is None else result, sequences)
                result = result if changed is None else changed
            return result

        return edit

    edits: dict[Point, Edit] = {anatomy.point(site): editor(site) for site in steps}

    positioned = any(step.positions != "all" for chain in steps.values() for step in chain)

    def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sequences.paused:
            return
        sequences.passes += 1
        if not (positioned or choose):
            return
        begins = sequences.observe(args, kwargs)
        if begins and choose:
            sequences.paused = True
            try:
                dials = choose(sequences, args, kwargs)
            finally:
                sequences.paused = False
            for chain in steps.values():
                for step in chain:
                    step.turn(dials)

    if not steps:
        yield sequences
        return
    observe.finds = sequences if choose else None  # type: ignore[attr-defined]
    watching = anatomy.body.register_forward_pre_hook(observe, with_kwargs=True)
    try:
        with _generate_observed(model, sequences), hooked(edits):
            yield sequences
    finally:
        watching.remove()
    idle = [
        site
        for site, chain in steps.items()
        for step in chain
        if not (step.touched or (step.positions == "generated" and sequences.ended_at_once))
    ]
    if sequences.passes and idle:
        raise TrimtabError(
            f"the steering touched nothing at {idle[0]}: the model ran {sequences.passes} times "
            "without a token at the steering's positions reaching that site"
        )


@contextmanager
def _generate_observed(model: Any, sequences: Sequences) -> Iterator[None]:
    """Know when a raw generate() begins and ends.

    Without a KV cache it reads prompt and generated tokens in one pass, and only the call itself
    tells that the prompt ended earlier.
    """
    original, previous = model.generate, vars(model).get("generate")

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        sequences.fresh = sequences.generating = True
        sequences.prompt_width = _width_given(args, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            sequences.generating, sequences.prompt_width = False, 0

    object.__setattr__(model, "generate", generate)
    try:
        yield
    finally:
        object.__delattr__(model, "generate")
        if previous is not None:
            object.__setattr__(model, "generate", previous)
