"""What is known of the rows of a KV cache: what they have read (their token ids, which scopes that
look at a text need), where their prompts stand, at which dials they are, what gates have decided.

All of it is kept with the cache and follows it: when beam search puts its rows in another order,
when rows are repeated or chosen, when it is cut or copied. So a token that is written with a cache
sees the same text before it as one pass over the whole text does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.model.standing import Prompts

#: The attributes of a cache that have its trail, where prompts stand, at which dials the rows are,
#: and what gates have decided of them.
_TRAIL, _PROMPTS = "_trimtab_trail", "_trimtab_prompts"
_FOUND, _LATCHES = "_trimtab_found", "_trimtab_latches"


@dataclass(frozen=True, eq=False)
class Trail:
    """Token ids [rows, columns] from the first column of a text on, and which of them are no
    padding, of the same shape; None where all are."""

    ids: Tensor
    real: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.ids.shape[1]

    def cut(self, columns: int, rows: int) -> Trail:
        """The first columns only, each row repeated in place until there are so many."""
        ids, real = self.ids[:, :columns], None if self.real is None else self.real[:, :columns]
        times = rows // len(ids)
        if times > 1:
            ids = ids.repeat_interleave(times, dim=0)
            real = None if real is None else real.repeat_interleave(times, dim=0)
        return Trail(ids, real)

    def with_new(self, ids: Tensor, real: Tensor | None) -> Trail:
        """The same and the tokens of another pass."""
        whole = torch.cat((self.ids.to(ids.device), ids), dim=1)
        if self.real is None and real is None:
            return Trail(whole)
        before = torch.ones_like(self.ids, dtype=torch.bool) if self.real is None else self.real
        new = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        return Trail(whole, torch.cat((before.to(ids.device), new.to(ids.device)), dim=1))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Trail:
        return Trail(move(self.ids), None if self.real is None else move(self.real))


def trail_of(cache: Any) -> Trail | None:
    """What is noted of the texts in a cache."""
    trail: Trail | None = getattr(cache, _TRAIL, None)
    return trail


def note_trail(cache: Any, trail: Trail) -> None:
    """Keep it with a cache, whose rows it follows from now on."""
    _note(cache, _TRAIL, trail)


def prompts_of(cache: Any) -> Prompts | None:
    """Where the prompts of a cache's texts stand."""
    prompts: Prompts | None = getattr(cache, _PROMPTS, None)
    return prompts


def note_prompts(cache: Any, prompts: Prompts) -> None:
    """Keep it with a cache, whose rows it follows from now on."""
    _note(cache, _PROMPTS, prompts)


class _ByKey(dict[Any, Any]):
    """What is known of the rows of a cache, by gate or by block. Nothing of it is ever changed in
    place, so that a copy of the cache has the same one, whose keys are the same objects."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> _ByKey:
        return _ByKey({key: value.moved(move) for key, value in self.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> _ByKey:
        return self


def latches_of(cache: Any) -> Mapping[Any, Any]:
    """What gates have decided of the rows of a cache, by gate."""
    return getattr(cache, _LATCHES, {})


def note_latch(cache: Any, gate: Any, latched: Any) -> None:
    """Keep what a gate has decided with a cache, whose rows it follows from now on."""
    _note(cache, _LATCHES, _ByKey({**latches_of(cache), gate: latched}))


def dials_of(cache: Any, block: Any) -> Any:
    """The dials that a block has found for the rows of a cache, None where it has none."""
    return getattr(cache, _FOUND, {}).get(block)


def note_dials(cache: Any, block: Any, found: Any) -> None:
    """Keep the dials that a block has found with a cache, whose rows they follow from now on."""
    _note(cache, _FOUND, _ByKey({**getattr(cache, _FOUND, {}), block: found}))


def _note(cache: Any, name: str, value: Any) -> None:
    _follow(cache)
    setattr(cache, name, value)


def _follow(cache: Any) -> None:
    for name in _MOVES:
        if hasattr(cache, name) and not isinstance(vars(cache).get(name), _Follow):
            setattr(cache, name, _Follow(cache, name))


def _reordered(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_select(0, rows.to(x.device))


def _repeated(times: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.repeat_interleave(times, dim=0)


def _chosen(rows: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x[rows.to(x.device) if isinstance(rows, Tensor) else rows]


#: What moves the rows of a cache, and what it does to the rows of its trail.
_MOVES: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "reorder_cache": _reordered,
    "batch_repeat_interleave": _repeated,
    "batch_select_indices": _chosen,
}


class _Follow:
    """Stands in place of a method of one cache that moves its rows: the trail goes along. It holds
    the cache weakly, so that its memory is free as soon as nobody uses it; a copy of the cache gets
    one of its own."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = weakref.ref(cache), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        given = (*args, *kwargs.values())
        for name in (_TRAIL, _PROMPTS, _FOUND, _LATCHES) if given else ():
            noted = getattr(cache, name, None)
            if noted is not None:
                setattr(cache, name, noted.moved(_MOVES[self.name](given[0])))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Follow:
        cache = self.cache()
        return _Follow(memo.get(id(cache), cache), self.name)
