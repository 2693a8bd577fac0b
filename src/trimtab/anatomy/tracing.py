"""Watches a model compute two short texts: what each module was given and what it returned.

The texts are random tokens, and begin alike, so that whether a token sees later ones shows in the
same pass. Blocks are watched one at a time and forgotten, so that a large model needs no more
memory than one block's activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.behaviour import find_input, first_tensor, is_linear

#: The texts: how many, of how many tokens, and with how many tokens do they begin alike.
ROWS, LENGTH, ALIKE = 2, 11, 4


@dataclass(eq=False)
class Call:
    """One call of a module: its path, its arguments, the activations that it took and returned."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str | None
    x: Tensor | None
    y: Tensor | None = None

    def again(self, x: Tensor) -> Any:
        """What the module returns for other activations, everywhere where it took these."""
        args, kwargs = self.arguments(x)
        return self.module(*args, **kwargs)

    def arguments(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given: Any = self.args[self.place] if isinstance(self.place, int) else None
        if isinstance(self.place, str):
            given = self.kwargs[self.place]

        def put(value: Any) -> Any:
            if isinstance(value, MutableMapping):  # Gemma 4 keeps keys there for later layers
                return copy.copy(value)
            alike = (
                isinstance(value, Tensor) and value.shape == x.shape and value.is_floating_point()
            )
            return x if value is given or (alike and torch.equal(value, given)) else value

        return tuple(map(put, self.args)), {name: put(v) for name, v in self.kwargs.items()}

    @property
    def times(self) -> int:
        """In how many arguments it took the activations."""
        args, kwargs = self.arguments(self.x) if self.x is not None else ((), {})
        return sum(value is self.x for value in (*args, *kwargs.values()))


@dataclass
class Trace:
    """The calls of one block or of what is around the blocks, in the order in which they began."""

    calls: list[Call] = field(default_factory=list)

    def at(self, name: str) -> Call | None:
        """The one call of a module; None where it did not run, or not once."""
        found = [call for call in self.calls if call.name == name]
        return found[0] if len(found) == 1 else None

    def place(self, call: Call) -> int:
        return next(i for i, other in enumerate(self.calls) if other is call)


def probe_ids(model: Any) -> Tensor:
    """Token ids of the two texts, [rows, tokens]: no special token of the configuration."""
    config = model.config.get_text_config(decoder=True)
    special = {0, 1, 2}
    for each in (model.config, config):
        for name, value in vars(each).items():
            if name.endswith(("token_id", "token_index")):
                special |= set(value if isinstance(value, list | tuple) else [value])
    generator = torch.Generator().manual_seed(0)
    size = int(config.vocab_size)
    ids: list[int] = []
    while len(ids) < ROWS * LENGTH:
        drawn = int(torch.randint(0, size, (), generator=generator))
        if drawn not in special or len(special) >= size:
            ids.append(drawn)
    rows = torch.tensor(ids).view(ROWS, LENGTH)
    rows[1:, :ALIKE] = rows[0, :ALIKE]
    table = model.get_input_embeddings().weight
    device = table.device
    if device.type == "meta":  # accelerate says where a table that it keeps elsewhere is brought to
        device = torch.device(model.get_input_embeddings()._hf_hook.execution_device)
    return rows.to(device)


class _Watch:
    """Hooks that note the calls of modules."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.paused = False
        self._open: list[Call] = []
        self._handles: list[Any] = []

    def add(self, name: str, module: nn.Module) -> None:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.paused:
                return
            place = find_input(args, kwargs)
            x = None
            if place is not None:
                x = (args[place] if isinstance(place, int) else kwargs[place]).detach().clone()
            call = Call(name, module, args, kwargs, place, x)
            self._open.append(call)
            self.calls.append(call)

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.paused:
                return
            y = first_tensor(output)
            self._open.pop().y = None if y is None else y.detach().clone()

        # What others' hooks make of an activation belongs to how the model computes.
        self._handles += [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end, with_kwargs=True),
        ]

    def after(self, module: nn.Module, function: Callable[[], None]) -> None:
        """Call a function each time that a module has run."""

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not self.paused:
                self.paused = True
                try:
                    function()
                finally:
                    self.paused = False

        self._handles.append(module.register_forward_hook(end))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _watching() -> Iterator[_Watch]:
    watch = _Watch()
    try:
        with torch.no_grad():
            yield watch
    finally:
        watch.remove()


def run(model: Any, ids: Tensor) -> Tensor:
    """One plain pass: logits [rows, tokens, vocabulary]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def survey(model: Any, ids: Tensor) -> tuple[Trace, Tensor]:
    """One pass, with the calls of everything outside of lists of modules and of the lists'
    members, but of nothing inside of these; and the logits."""
    with _watching() as watch:
        for name, module in _outside_of_lists(model, ""):
            watch.add(name, module)
        logits = run(model, ids)
    return Trace(watch.calls), logits


def _outside_of_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if is_linear(module):
        return
    for own, child in module.named_children():
        path = f"{name}.{own}".removeprefix(".")
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{i}", member) for i, member in enumerate(child))
        else:
            yield from _outside_of_lists(child, path)


def trace_blocks(
    model: Any,
    ids: Tensor,
    blocks: Sequence[nn.Module],
    around: Mapping[str, nn.Module],
    visit: Callable[[int, Trace], None],
) -> tuple[Trace, Tensor]:
    """One pass, in which each block is visited when it has run: `visit` gets its number and the
    calls inside of it, by their paths from the block; the block's own is the empty path. Returns
    the calls of the modules `around` them, by their names, and the logits."""
    with _watching() as outer, _watching() as watch:
        for name, module in around.items():
            outer.add(name, module)
        for number, block in enumerate(blocks):
            for name, module in _watchable(block, ""):
                watch.add(name, module)

            def visited(number: int = number) -> None:
                calls, watch.calls = watch.calls, []
                outer.paused = watch.paused = True
                try:
                    visit(number, Trace(calls))
                finally:
                    outer.paused = watch.paused = False

            watch.after(block, visited)
        logits = run(model, ids)
    return Trace(outer.calls), logits


def _watchable(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside of linear maps (adapters, quantised weights)."""
    yield name, module
    if not is_linear(module):
        for own, child in module.named_children():
            yield from _watchable(child, f"{name}.{own}".removeprefix("."))
