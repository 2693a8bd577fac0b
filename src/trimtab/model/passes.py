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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from trimtab.errors import TrimtabError
from trimtab.steering import Positions, Tokens


@dataclass(eq=False)
class FoundDials:
    """Dials that were found when the model began to read, [rows]; steps keep here what they make
    of them."""

    values: Tensor
    bound: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Pass:
    """One forward pass: its first token's position, its number of tokens, where prompts end."""

    start: int
    length: int
    ends: list[int]  # one per row, or one for all
    found: FoundDials | None = None
    #: Which tokens stand for images, [rows, tokens]; None where nobody asks.
    images: Tensor | None = None
    _masks: dict[Any, Tensor | bool] = field(default_factory=dict)

    def mask(self, positions: Positions, tokens: Tokens, device: torch.device) -> Tensor | bool:
        """Which tokens of the pass to steer: [rows, tokens], or one answer for all of them."""
        if positions == tokens == "all":
            return True
        key = (positions, tokens, device)
        if key not in self._masks:
            with torch.inference_mode(False):  # the backward pass may come back to it
                placed = self._placed(positions, device)
                self._masks[key] = _both(placed, self._of_kind(tokens, device))
        return self._masks[key]

    def _of_kind(self, tokens: Tokens, device: torch.device) -> Tensor | bool:
        if tokens == "all":
            return True
        assert self.images is not None
        if not self.images.any():
            return tokens == "text"
        return (self.images if tokens == "image" else ~self.images).to(device)

    def _placed(self, positions: Positions, device: torch.device) -> Tensor | bool:
        if positions == "all":
            return True
        stop = self.start + self.length
        ends = [end - 1 for end in self.ends] if positions == "last" else self.ends
        before = positions == "prompt"
        if max(ends) <= self.start:
            return not before
        if min(ends) >= stop:
            return before
        token = torch.arange(self.start, stop, device=device)
        after = token >= torch.tensor(ends, device=device)[:, None]
        return ~after if before else after


def _both(one: Tensor | bool, other: Tensor | bool) -> Tensor | bool:
    """Where two masks hold."""
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    return one & other


@dataclass
class _Generation:
    """One call of `generate`: how wide its prompt is (0: not known yet), its ids and its mask."""

    width: int
    rows: int | None
    ids: Tensor | None
    mask: Tensor | None
    guided: bool
    ends: list[int] | None = None
    found: FoundDials | None = None
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
    because the caller has seen to it that others have some.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        rows: int | None = None,
        pad: int | None = None,
        choose: Choose | None = None,
        positions: Collection[Positions] = (),
        image_tokens: Collection[int] | None = None,
    ) -> None:
        self.given_ends: list[int] | None = None
        self.ended_at_once = False
        self.may_miss_images = False
        self.passes = 0
        self._arguments = arguments  # names of the body's, for those given by place
        self._rows, self._pad, self._choose = rows, pad, choose
        self._positions = frozenset(positions) - {"all"}
        #: The tokens that stand for images, where a step asks for tokens of a kind.
        self._image_tokens = image_tokens
        self.here = _Local()
        #: The dials of texts that are in a KV cache.
        self._found: WeakKeyDictionary[Cache, FoundDials] = WeakKeyDictionary()

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
        if generation.guided and self._positions:
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
        ends, found = self._known(cache, start, generation)
        if self.given_ends is not None:
            ends = self.given_ends
        begins = ends is None or bool(self._choose and found is None)
        if ends is None:
            if not generation:
                _refuse_packed(arguments, start, length)
            ends = [start + length]
            if self._positions:
                ends = self._ends_by(generation, arguments, tokens, start)
        if begins and self._choose:
            found = FoundDials(self._chosen(arguments, tokens, start, generation))
        if generation:
            generation.ends, generation.found = ends, found
            if not generation.nested and not generation.begun:
                generation.begun, generation.cache = True, cache
        if cache is not None:
            self._note(cache, ends, found)
        repeats = max(1, rows // len(ends))
        each = [end for end in ends for _ in range(repeats)] if len(ends) > 1 else ends
        self.here.current = Pass(start, length, each, found, self._images(ids))

    def _images(self, ids: Any) -> Tensor | None:
        """Which tokens of a pass stand for images, [rows, tokens]; None where nobody asks."""
        if self._image_tokens is None:
            return None
        if not isinstance(ids, Tensor):
            raise TrimtabError(
                "the model was run without input_ids, so the steering cannot tell which tokens "
                "are text and which stand for images: give input_ids, or steer all tokens"
            )
        with torch.inference_mode(False):
            return torch.isin(ids, torch.tensor(sorted(self._image_tokens), device=ids.device))

    def finish(self, output: Any) -> None:
        """A pass has run: what it put into a cache of its own goes on from where it stands."""
        current = self.here.current
        if current is None:
            return
        values = output.values() if isinstance(output, Mapping) else output
        for value in values if not isinstance(values, Tensor) else ():
            if isinstance(value, Cache) and _noted_ends(value) is None:
                self._note(value, current.ends, current.found)

    def _note(self, cache: Cache, ends: list[int], found: FoundDials | None) -> None:
        """Where the prompts end of the texts in a cache, unless only this caller says so."""
        if self.given_ends is None and (self._positions or self._choose):
            setattr(cache, _ENDS, ends)
        if found is not None:
            self._found[cache] = found

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
    ) -> tuple[list[int] | None, FoundDials | None]:
        """Where prompts end and at which dials they are, as far as that is known from before."""
        if generation:
            return generation.ends, generation.found
        ends = _noted_ends(cache)
        # A cache that was cut inside of the prompt goes on with another one.
        if cache is None or ends is None or start < max(ends):
            return None, None
        return ends, self._found.get(cache)

    def _ends_by(
        self,
        generation: _Generation | None,
        arguments: Mapping[str, Any],
        tokens: Tensor,
        start: int,
    ) -> list[int]:
        """Where the prompts end of texts that begin with this pass."""
        mask, width = arguments.get("attention_mask"), start + tokens.shape[1]
        plain = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if generation:
            width = generation.width or width
            if generation.mask is not None:
                return _last_ones(generation.mask)
            # generate makes a mask itself where it was given padding and none.
            if plain is not None and plain.shape[1] >= width:
                return _last_ones(plain[:, :width])
            return [width]
        if start and tokens.shape[1] == 1:
            raise TrimtabError(
                "the model goes on with a KV cache that no steered pass has filled, so the "
                "steering cannot tell where the prompt ended: run the prompt inside a block, too, "
                "or steer at all positions"
            )
        if plain is not None:
            return _last_ones(plain)
        if mask is not None:
            raise TrimtabError(
                "the attention_mask does not say where texts end, because it has more than a "
                "number for each token: give one of shape [rows, tokens], or steer at all positions"
            )
        # Where all that is read is prompt, padding after it reaches nothing.
        if self._positions != {"prompt"}:
            _refuse_padding(arguments.get("input_ids"), self._pad)
        return [width]

    def _chosen(
        self,
        arguments: dict[str, Any],
        tokens: Tensor,
        start: int,
        generation: _Generation | None,
    ) -> Tensor:
        assert self._choose is not None
        width = (generation.width if generation else 0) or tokens.shape[1]
        mask = arguments.get("attention_mask")
        if generation and generation.mask is not None:
            repeats = tokens.shape[0] // generation.mask.shape[0]
            mask = generation.mask.repeat_interleave(repeats, dim=0)
        ids = arguments.get("input_ids")
        beginning = Beginning(
            None if ids is None else ids[:, :width],
            mask[:, :width] if isinstance(mask, Tensor) and mask.dim() == 2 else mask,
            start == 0 and tokens.shape[1] >= width,
        )
        self.here.paused = True
        try:
            return self._choose(beginning)
        finally:
            self.here.paused = False


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


#: The attribute of a KV cache that says where the prompts of its texts end.
_ENDS = "_trimtab_prompt_ends"


def _noted_ends(cache: Cache | None) -> list[int] | None:
    ends: list[int] | None = getattr(cache, _ENDS, None)
    return ends


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


def _last_ones(mask: Tensor) -> list[int]:
    """Where the last token of each row ends that is not padding, from a mask [rows, tokens]."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    ends: list[int] = (columns * (mask != 0)).amax(-1).tolist()
    return ends


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
