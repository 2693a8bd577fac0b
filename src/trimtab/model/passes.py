"""Where the rows of a forward pass stand: which of its tokens are prompt, which are generated.

A pass of the transformer body tells its tokens, its padding mask and its KV cache, but not where
the prompt ended. That is known from how the pass came about:

- inside `model.generate(...)` the prompt is what generate was given, whatever a pass holds of it
  (parts of it, or guesses of what comes after it, as in assisted decoding); what a logits processor
  runs on the side, with another cache or on another text, is a text of its own;
- a pass that goes on with a KV cache goes on with the texts that the cache was filled with, which
  is noted on the cache itself: a copy of it goes on with them too;
- any other pass begins new texts, which end with the last token that is not padding.

The cache is known by what it is: transformers has called its argument `past_key_values`, `cache`
and `cache_params`. What cannot be known (several texts packed into a row, a cache of another kind,
padding that no mask tells, a token that goes on with a cache that no block has seen) is an error
where it matters.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from trimtab.errors import TrimtabError
from trimtab.model.gating import GateAtWork
from trimtab.model.marks import Placed
from trimtab.model.one_pass import FoundDials, Pass
from trimtab.model.standing import UNKNOWN_END, Prompts, Standing
from trimtab.model.trails import (
    Trail,
    dials_of,
    latches_of,
    note_dials,
    note_prompts,
    note_trail,
    prompts_of,
    trail_of,
)


@dataclass
class _Generation:
    """One call of `generate`: how wide its prompt is (0: not known yet), its ids and its mask."""

    width: int
    rows: int | None
    ids: Tensor | None
    mask: Tensor | None
    guided: bool
    prompts: Prompts | None = None
    found: FoundDials | None = None
    #: What two-pass gates have decided of its rows, by gate.
    prepared: dict[Any, Any] = field(default_factory=dict)
    passes: int = 0
    begun: bool = False  # whether a pass of its own has run, and with which cache
    cache: Cache | None = None
    nested: int = 0  # calls of generate inside of it that guess how its text goes on

    def begins(self, ids: Any) -> bool:
        """Whether token ids begin with its prompt; beams and samples of it do."""
        own = self.ids
        if own is None or not isinstance(ids, Tensor) or ids.shape[1] < own.shape[1]:
            return False
        start = ids[:, : own.shape[1]]
        if len(own) > 1 and len(start) % len(own) == 0:
            own = own.repeat_interleave(len(start) // len(own), dim=0)
        return own.shape[0] in (1, len(start)) and bool((start == own.to(start.device)).all())

    def runs(self, cache: Cache | None, ids: Any) -> bool:
        """Whether a pass is this call's own, by its cache; without one by what it reads."""
        if self.nested or not self.begun:
            return True
        if self.cache is not None or cache is not None:
            return cache is self.cache
        return self.ids is None or self.begins(ids)


@dataclass(frozen=True)
class Beginning:
    """The texts that a model begins to read, for whoever chooses their dials: token ids
    [rows, tokens] of the prompts, and the padding mask of the same shape where there is one."""

    tokens: Tensor | None
    mask: Any
    whole: bool  # whether these are all tokens of the prompts


def texts_begun(beginning: Beginning, who: str) -> list[tuple[int, ...]]:
    """The token ids that the model begins to read, without padding; `who` asks for them."""
    tokens, mask = beginning.tokens, beginning.mask
    if tokens is None or not beginning.whole:  # some ways to generate read a prompt in parts
        raise TrimtabError(
            f"{who} needs whole prompts of tokens: give the model input_ids, all of them in its "
            "first pass, or generate with generate()"
        )
    if mask is None:
        return [tuple(row) for row in tokens.tolist()]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise TrimtabError(
            f"{who} needs to know which tokens are padding: give the model an attention_mask of "
            "one number for each token"
        )
    return [tuple(row[keep].tolist()) for row, keep in zip(tokens, mask.bool(), strict=True)]


#: Says at which dial each row of a batch is steered, [rows].
Choose = Callable[[Beginning], Tensor]


class _Local(threading.local):
    """What each thread that runs the model does at the moment."""

    #: The calls of generate that are under way, the innermost one last.
    generations: tuple[_Generation, ...] = ()
    #: The pass that runs, None where nobody needs to know where it stands.
    current: Pass | None = None
    #: Whether passes run as if nothing were attached.
    paused: bool = False


class Sequences:
    """The passes of a model inside a block, and what its caller says about them.

    `given_ends` says where the prompt of each row ends (or of all rows), for texts whose answer is
    read along with them. `ended_at_once` says that every text ended with its first token, so that
    none was left to steer. `may_miss_images` says that passes without an image are no mistake,
    because the caller has seen to it that others have some. `in_part` says that other passes of
    the same texts run in other blocks.

    `scopes` are those of all steps, so that nothing is noted that none of them asks for.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        rows: int | None = None,
        pad: int | None = None,
        choose: Choose | None = None,
        scopes: Collection[Placed] = (),
        gates: Sequence[GateAtWork] = (),
    ) -> None:
        self.given_ends: list[int] | None = None
        self.ended_at_once = False
        self.may_miss_images = False
        self.in_part = False
        self.passes = 0
        self._arguments = arguments  # names of the body's, for those given by place
        self._rows, self._pad, self._choose = rows, pad, choose
        self.gates = gates
        #: Whether a scope asks where prompts end, or what the texts say.
        self._placed = bool(gates) or any(scope.placed for scope in scopes)
        self._reads = any(scope.reads for scope in scopes)
        latches = any(work.gate.kind != "token" for work in gates)
        self._counts = latches or any(scope.counts for scope in scopes)
        self._looks_ahead = any(scope.looks_ahead for scope in scopes)
        #: Whether padding after a prompt may be taken for something else.
        self._after_prompts = latches or any(scope.after_prompts for scope in scopes)
        self.here = _Local()

    # -- generate -----------------------------------------------------------------------------

    def begin_generation(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> bool:
        """Note what `generate` was given; False inside another one whose text it goes on with
        (assisted decoding by the model itself), because the prompt is the outer one's."""
        if self.here.paused:
            return False
        generation = _generation(args, kwargs, config)
        outer = self.here.generations
        if outer and outer[-1].begins(generation.ids):
            outer[-1].nested += 1
            return False
        if self._rows and generation.rows not in (None, self._rows):
            raise TrimtabError(
                f"steerings were given for {self._rows} rows, but generate() has {generation.rows}"
            )
        if generation.guided and self._placed:
            raise TrimtabError(
                "guidance_scale makes generate() read texts beside the prompt, which the steering "
                "cannot tell from it: steer at all positions, or leave guidance_scale out"
            )
        self.here.generations = (*outer, generation)
        return True

    def end_generation(self) -> int:
        """How many passes the call of `generate` has run."""
        *outer, generation = self.here.generations
        self.here.generations = tuple(outer)
        return generation.passes

    def end_nested(self) -> None:
        """A call of generate has ended for which `begin_generation` was False."""
        if self.here.generations and not self.here.paused:
            self.here.generations[-1].nested -= 1

    # -- passes -------------------------------------------------------------------------------

    def count(self) -> None:
        """Another pass runs."""
        self.passes += 1
        for generation in self.here.generations:
            generation.passes += 1

    def observe(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        around: Mapping[str, Any] | None = None,
    ) -> None:
        """Note what a pass of the transformer body is about to read; `around` are arguments of the
        model around it, which has put images in their places and says what the tokens were."""
        arguments = {**dict(zip(self._arguments, args, strict=False)), **kwargs, **(around or {})}
        ids = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if ids is None else ids
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise TrimtabError(
                "the model was run without input_ids or inputs_embeds of shape [rows, tokens], so "
                "the steering cannot tell where its positions are: steer at all positions"
            )
        rows, length = tokens.shape[:2]
        cache = _known_cache(arguments)
        start = 0 if cache is None else int(cache.get_seq_length())
        generation = self.here.generations[-1] if self.here.generations else None
        if generation and not generation.runs(cache, ids):
            generation = None
        self._check_rows(rows, generation)
        prompts, found = self._known(cache, start, generation)
        if self.given_ends is not None:
            prompts = Prompts.ending(self.given_ends)
        begins = prompts is None or bool(self._choose and found is None)
        if not generation and (prompts is None or self._counts):
            _refuse_packed(arguments, start, length)
        if prompts is None:
            prompts = Prompts.ending([start + length])
            if self._placed:
                prompts = self._prompts_by(generation, arguments, tokens, start)
        if begins and self._choose:
            found = FoundDials(self._chosen(arguments, tokens, start, generation))
        latched = self._latched(prompts, arguments, tokens, start, cache, generation)
        if generation:
            generation.prompts, generation.found = prompts, found
            if not generation.nested and not generation.begun:
                generation.begun, generation.cache = True, cache
        trail, why_not = None, _NO_IDS
        if self._reads and isinstance(ids, Tensor):
            trail, why_not = self._read(ids, arguments, start, cache, generation), _NOT_SEEN
        standing = prompts.repeated(rows)
        if cache is not None:
            self._note(cache, standing, found, trail)
        whole = self._whole(generation, start + length, rows) if self._looks_ahead else None
        kept = None if cache is None else weakref.ref(cache)
        self.here.current = Pass(
            start, length, standing, found, trail, why_not, whole, latched, kept
        )

    def _latched(
        self,
        prompts: Prompts,
        arguments: dict[str, Any],
        tokens: Tensor,
        start: int,
        cache: Cache | None,
        generation: _Generation | None,
    ) -> Mapping[Any, Any]:
        """What gates have decided of the rows of a pass before it, by gate; two-pass gates read
        prompts that begin here."""
        latched = dict(latches_of(cache)) if cache is not None and start else {}
        kept = generation.prepared if generation else {}
        begins = prompts.last_end < UNKNOWN_END and (start < prompts.last_end or not start)
        for work in self.gates:
            if work.gate.kind != "two-pass":
                continue
            if work.key in kept:
                latched[work.key] = kept[work.key]
            elif begins or work.key not in latched:
                if prompts.last_end >= UNKNOWN_END:  # nobody asks for what comes of it
                    continue
                rows = self._begun(arguments, tokens, start, generation)
                latched[work.key] = kept[work.key] = work.prepare(rows)
        return latched

    def _begun(
        self,
        arguments: dict[str, Any],
        tokens: Tensor,
        start: int,
        generation: _Generation | None,
    ) -> list[tuple[int, ...]]:
        """The token ids of the prompts that a pass begins."""
        rows = texts_begun(self._beginning(arguments, tokens, start, generation), "a two-pass gate")
        if self.given_ends is None:
            return rows
        ends = self.given_ends * (len(rows) // len(self.given_ends))
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def _whole(self, generation: _Generation | None, stop: int, rows: int) -> Trail | None:
        """The whole prompt of a call of generate, of which a pass reads a part that ends at
        `stop`."""
        if not generation or generation.ids is None or generation.ids.shape[1] <= stop:
            return None
        mask = generation.mask
        prompt = Trail(generation.ids, None if mask is None else mask != 0)
        return prompt.cut(generation.ids.shape[1], rows)

    def _read(
        self,
        ids: Tensor,
        arguments: Mapping[str, Any],
        start: int,
        cache: Cache | None,
        generation: _Generation | None,
    ) -> Trail | None:
        """What the rows of a pass have read, with it; None where nobody saw what its cache has."""
        (rows, length), mask = ids.shape, arguments.get("attention_mask")
        real = None
        plain = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= start + length
        if not plain and generation and generation.mask is not None:
            mask = generation.mask.repeat_interleave(rows // len(generation.mask), dim=0)
            plain = mask.shape[1] >= start + length
        # A token that is read by itself is no padding, and asking would wait for the device.
        if plain and (length > 1 or start == 0):
            assert isinstance(mask, Tensor)
            new = mask[:, start : start + length] != 0
            real = None if bool(new.all()) else new
        with torch.inference_mode(False):
            if start == 0:
                return Trail(ids, real)
            before = trail_of(cache)
            if before is None or before.columns < start:
                if not generation or generation.ids is None or generation.ids.shape[1] < start:
                    return None
                padding = generation.mask
                before = Trail(generation.ids, None if padding is None else padding != 0)
            return before.cut(start, rows).with_new(ids, real)

    def finish(self, output: Any) -> None:
        """A pass has run: what it put into a cache of its own goes on from where it stands."""
        current = self.here.current
        if current is None:
            return
        given = None if current.cache is None else current.cache()
        values = output.values() if isinstance(output, Mapping) else output
        made = [] if isinstance(values, Tensor) else [x for x in values if isinstance(x, Cache)]
        for value in made:
            if prompts_of(value) is None:
                self._note(value, current.prompts, current.found, current.trail)
        for work in self.gates:
            work.note(current, [given] if given is not None else made)

    def _note(
        self, cache: Cache, prompts: Prompts, found: FoundDials | None, trail: Trail | None
    ) -> None:
        """Where the prompts end of the texts in a cache, unless only this caller says so, and what
        they say."""
        if self.given_ends is None and (self._placed or self._choose):
            note_prompts(cache, prompts)
        if trail is not None:
            note_trail(cache, trail)
        if found is not None:
            note_dials(cache, self, found)

    def _check_rows(self, rows: int, generation: _Generation | None) -> None:
        """Rows are repeated, in place, for the beams and samples of generate, and nowhere else."""
        if not self._rows or rows == self._rows:
            return
        if generation is None or rows % self._rows:
            raise TrimtabError(
                f"steerings were given for {self._rows} rows, but the batch has {rows}: give one "
                "for each row"
            )

    def _known(
        self, cache: Cache | None, start: int, generation: _Generation | None
    ) -> tuple[Prompts | None, FoundDials | None]:
        """Where prompts end and at which dials they are, as far as that is known from before."""
        if generation:
            return generation.prompts, generation.found
        prompts = prompts_of(cache)
        # A cache that was cut inside of the prompt goes on with another one.
        if cache is None or prompts is None or start < prompts.last_end:
            return None, None
        return prompts, dials_of(cache, self)

    def _prompts_by(
        self,
        generation: _Generation | None,
        arguments: Mapping[str, Any],
        tokens: Tensor,
        start: int,
    ) -> Prompts:
        """Where the prompts are of texts that begin with this pass."""
        mask, width = arguments.get("attention_mask"), start + tokens.shape[1]
        plain = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if generation:
            width = generation.width or width
            if generation.mask is not None:
                return _unpadded(generation.mask)
            # generate makes a mask itself where it was given padding and none.
            if plain is not None and plain.shape[1] >= width:
                return _unpadded(plain[:, :width])
            return Prompts.ending([width])
        if start and tokens.shape[1] == 1:
            raise TrimtabError(
                "the model goes on with a KV cache that no steered pass has filled, so the "
                "steering cannot tell where the prompt ended: run the prompt inside a block, too, "
                "or steer at all positions"
            )
        if plain is not None:
            return _unpadded(plain)
        if mask is not None:
            raise TrimtabError(
                "the attention_mask does not say where texts end, because it has more than a "
                "number for each token: give one of shape [rows, tokens], or steer at all positions"
            )
        # Where all that is read is prompt, padding after it reaches nothing.
        if self._after_prompts:
            _refuse_padding(arguments.get("input_ids"), self._pad)
        return Prompts.ending([width])

    def _chosen(
        self,
        arguments: dict[str, Any],
        tokens: Tensor,
        start: int,
        generation: _Generation | None,
    ) -> Tensor:
        assert self._choose is not None
        beginning = self._beginning(arguments, tokens, start, generation)
        # What is in a cache already was not read at the dial that is to be found.
        beginning = replace(beginning, whole=beginning.whole and start == 0)
        self.here.paused = True
        try:
            return self._choose(beginning)
        finally:
            self.here.paused = False

    def _beginning(
        self,
        arguments: dict[str, Any],
        tokens: Tensor,
        start: int,
        generation: _Generation | None,
    ) -> Beginning:
        """The texts that a pass begins; inside of `generate` they are known whole, also where they
        are read in parts."""
        width = (generation.width if generation else 0) or tokens.shape[1]
        mask, ids = arguments.get("attention_mask"), arguments.get("input_ids")
        if generation and generation.mask is not None:
            repeats = tokens.shape[0] // generation.mask.shape[0]
            mask = generation.mask.repeat_interleave(repeats, dim=0)
        whole = start == 0 and tokens.shape[1] >= width
        if generation and generation.ids is not None and ids is not None:
            repeats = tokens.shape[0] // generation.ids.shape[0]
            ids, whole = generation.ids.repeat_interleave(repeats, dim=0), True
        return Beginning(
            None if ids is None else ids[:, :width],
            mask[:, :width] if isinstance(mask, Tensor) and mask.dim() == 2 else mask,
            whole,
        )


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The KV cache among the arguments of a body, whatever its name is."""
    return next((value for value in values if isinstance(value, Cache)), None)


def _known_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The KV cache; one of another kind is refused: it does not tell where a text stands."""
    cache = find_cache(arguments.values())
    for name, value in arguments.items() if cache is None else ():
        holds = ("cache" in name or "past" in name) and not isinstance(value, bool | int | Tensor)
        if holds and value is not None:
            raise TrimtabError(
                f"the model was run with a KV cache of a kind ({type(value).__name__}) that does "
                "not tell where a text stands: steer at all positions, or generate with generate()"
            )
    return cache


_NO_IDS = (
    "the model was run without input_ids, so the steering cannot tell what its texts say (which "
    "tokens are text and which stand for images among it): give input_ids, or steer all tokens"
)
_NOT_SEEN = (
    "the model goes on with a KV cache that no pass under this steering has filled, so its scope "
    "cannot tell what was read before: run the prompt inside the block, too, or steer all tokens"
)


def _generation(args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> _Generation:
    """What a call of `generate` was given: [rows, width] of its prompt."""
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    shapes = [x.shape for x in given if isinstance(x, Tensor) and x.dim() > 1]
    mask = kwargs.get("attention_mask")
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    scales = (kwargs, vars(kwargs.get("generation_config") or config))
    guided = any(scale.get("guidance_scale") not in (None, 1) for scale in scales)
    ids = [x for x in given[:3] if isinstance(x, Tensor) and not x.is_floating_point()]
    return _Generation(
        width=max((shape[1] for shape in shapes), default=0),
        rows=shapes[0][0] if shapes else None,
        ids=ids[0] if ids and ids[0].dim() == 2 else None,
        mask=mask if plain else None,
        guided=guided,
    )


def _refuse_padding(ids: Any, pad: int | None) -> None:
    """Refuse rows that end with padding and come without a mask."""
    if pad is not None and isinstance(ids, Tensor) and len(ids) > 1 and (ids[:, -1] == pad).any():
        raise TrimtabError(
            "a row ends with the padding token, and no attention_mask says whether it is padding: "
            "give one, or steer at all positions"
        )


def _unpadded(mask: Tensor) -> Prompts:
    """Where each row's prompt stands that is not padding, from a mask [rows, tokens]; what comes
    after it comes after the padding."""
    width = mask.shape[1]
    real = mask != 0
    columns = torch.arange(1, width + 1, device=mask.device)
    ends = (columns * real).amax(-1).tolist()
    starts = real.long().argmax(-1).tolist()
    return Prompts(tuple(Standing(a, b, width) for a, b in zip(starts, ends, strict=True)))


def _refuse_packed(arguments: Mapping[str, Any], start: int, length: int) -> None:
    """Refuse rows that hold several texts: positions begin anew, or lengths are given."""
    packed = any(
        value is not None and name.startswith(("cu_seq", "seq_idx"))
        for name, value in arguments.items()
    )
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if not packed and isinstance(positions, Tensor) and positions.dim() == 2 and length > 1:
        jumps = positions[:, 1:] != positions[:, :-1] + 1
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
            real = mask[:, mask.shape[1] - length :] != 0
            jumps = jumps & real[:, 1:] & real[:, :-1]
        packed = bool(jumps.any())
    if packed:
        raise TrimtabError(
            "this pass has several texts in a row (its position_ids begin anew), and the steering "
            "cannot tell where each begins and its prompt ends: steer all texts alike at all "
            "positions, or give each text a row of its own"
        )
