"""Watches a steered model run: every pass, every `generate`, every pass that backward repeats.

One `Attached` sits on a model as long as any block is open on it, however many there are and in
whatever order they end. It tells each block's `Sequences` what the model is about to read, and
makes an error of what would otherwise pass in silence: a model that runs on after its block, a
`generate` whose passes go around the hooks, a thread that runs a model which another one steers.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread, current_thread, local
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Hook
from trimtab.errors import TrimtabError
from trimtab.model.images import model_around
from trimtab.model.passes import Sequences, find_cache


@dataclass(eq=False)
class Block:
    """One block on a model. `placed` says whether it matters where passes stand, `finds` whether
    its dials are found when the model begins to read; `thread` is the only one that may run the
    model, None where all may."""

    sequences: Sequences
    placed: bool
    finds: bool = False
    thread: Thread | None = None
    #: How many passes and calls of generate each thread is in.
    running: Counter[Thread] = field(default_factory=Counter)
    generating: set[Thread] = field(default_factory=set)
    #: Threads that have run a pass, and what one other than the block's own was refused.
    seen: set[Thread] = field(default_factory=set)
    refused: TrimtabError | None = None
    opener: Thread = field(default_factory=current_thread)
    #: The steerings, for people; whether all tokens so far were chosen from numbers that say one.
    labels: Sequence[str] = ()
    sound: Tensor | bool = True

    def leave(self, thread: Thread) -> None:
        """A pass or a call of generate has ended, which another one may be inside of."""
        self.running[thread] -= 1
        if self.running[thread] <= 0:
            del self.running[thread]


class Attached:
    """What is on one model: the blocks that are open, in the order in which they were opened."""

    def __init__(self, model: Any, body: nn.Module) -> None:
        self._model, self._body = model, body
        #: The model that puts images in their places and runs the body, where there is one.
        self._around = model_around(model, body)
        self._given = _Given()
        self.blocks: list[Block] = []
        #: Threads in which a call of generate has outlived its block.
        self._left: set[Thread] = set()
        self._handles: list[Any] = []
        self._replaced: list[tuple[nn.Module, str]] = []

    def open(self, block: Block) -> None:
        if not self._handles:
            before = self._body.register_forward_pre_hook(Hook(self._before), with_kwargs=True)
            after = self._body.register_forward_hook(Hook(self._after), always_call=True)
            self._handles = [before, after]
            if self._around is not None:
                noted = self._around.register_forward_pre_hook(Hook(self._note), with_kwargs=True)
                forgotten = self._around.register_forward_hook(Hook(self._forget), always_call=True)
                self._handles += [noted, forgotten]
        if not self.blocks:
            self._replace(self._model, "generate", Hook(self._generate, self._model.generate))
        self.blocks.append(block)

    def close(self, block: Block) -> None:
        self.blocks.remove(block)
        self._left |= block.generating
        self._clear()

    def _clear(self) -> None:
        """Leave nothing on the model that nobody needs."""
        if not self.blocks:
            for module, name in self._replaced:
                hook = vars(module).get(name)
                if isinstance(hook, Hook):  # or somebody has put another one there
                    object.__delattr__(module, name)
                    if hook.before is not None:
                        object.__setattr__(module, name, hook.before)
            self._replaced.clear()
        if not self.blocks and not self._left:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _replace(self, module: nn.Module, name: str, hook: Hook) -> None:
        hook.before = vars(module).get(name)
        object.__setattr__(module, name, hook)
        self._replaced.append((module, name))

    # -- passes -------------------------------------------------------------------------------

    def _note(self, around: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What is said of a pass to the model around the body, which hands on embeddings only."""
        names = inspect.signature(around.forward).parameters if args else ()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        said = {"input_ids": given.get("input_ids")}
        if isinstance(mask, Tensor) and mask.dim() == 2:
            said["attention_mask"] = mask
        self._given.arguments = {name: x for name, x in said.items() if x is not None}

    def _forget(self, around: nn.Module, args: Any, output: Any) -> None:
        self._given.arguments = {}

    def _before(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = current_thread()
        if thread in self._left:
            raise TrimtabError(
                "the block that steered this call of generate() has ended: wait for the thread "
                "that generates (thread.join()) inside the block"
            )
        for block in self.blocks:
            if block.sequences.here.paused:
                continue
            if block.thread not in (None, thread):
                raise TrimtabError(
                    "another thread steers this model at the moment (or a stream that is not at "
                    "its end): run it by lm.generate() or lm.logits(), which wait for threads, or "
                    "outside of that thread's calls"
                )
            try:
                self._look(block, thread, args, kwargs)
            except TrimtabError as error:
                if thread is not block.opener:  # where nobody may hear of it
                    block.refused = block.refused or error
                raise
            block.sequences.count()  # one that is not refused
            block.running[thread] += 1
        if body.training and torch.is_grad_enabled():
            self._watch_checkpoints()

    def _look(
        self, block: Block, thread: Thread, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note what a block's pass is about to read; refuse one that began before the block."""
        if thread not in block.seen:
            cache = None if thread is block.opener else find_cache([*args, *kwargs.values()])
            if (
                cache is not None
                and not block.sequences.here.generations
                and cache.get_seq_length()
            ):
                raise TrimtabError(
                    "another thread was generating when the block began, so that its text would "
                    "be steered in part: begin the block first, or wait for the thread"
                )
            block.seen.add(thread)
        if block.placed:
            block.sequences.observe(args, kwargs, self._given.arguments)

    def _after(self, body: nn.Module, args: Any, output: Any) -> None:
        thread = current_thread()
        for block in self.blocks:
            if not block.sequences.here.paused:
                block.leave(thread)
                if output is None:  # the pass has failed
                    continue
                if block.placed:
                    block.sequences.finish(output)
                if block.thread is None and block.sequences.here.generations:
                    block.sound = block.sound & _is_sound(output)

    # -- generate -----------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        thread, begun, passes = current_thread(), list[Block](), list[int]()
        nested: list[Block] = []
        try:
            for block in tuple(self.blocks):
                config = self._model.generation_config
                if not block.sequences.begin_generation(args, kwargs, config):
                    nested.append(block)
                    continue
                begun.append(block)
                block.running[thread] += 1
                block.generating.add(thread)
            result = original(*args, **kwargs)
        finally:
            for block in nested:
                block.sequences.end_nested()
            for block in begun:
                passes.append(block.sequences.end_generation())
                block.leave(thread)
                if not block.sequences.here.generations:
                    block.generating.discard(thread)
            if begun and thread in self._left:
                self._left.discard(thread)
                self._clear()
        if any(block not in self.blocks for block in begun):
            raise TrimtabError(
                "the block that steered this call of generate() ended before it did: wait for the "
                "thread that generates (thread.join()) inside the block"
            )
        for block in begun:
            if not bool(block.sound):
                block.sound = True  # the next text may be another one
                raise TrimtabError(
                    "the model's last activations are not finite, or all zero, with "
                    f"{' and '.join(block.labels)}: turn the dial towards 0"
                )
        if 0 in passes:
            raise TrimtabError(
                "generate() wrote a text without a steered pass: the model's own code was not run "
                "(compiled, exported or replaced); generate with the plain model"
            )
        return result

    # -- gradient checkpointing ---------------------------------------------------------------

    def _watch_checkpoints(self) -> None:
        """Have passes that backward repeats take place where the first ones did."""
        for module in self._body.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            on = getattr(module, "gradient_checkpointing", False)
            if on and function is not None and not isinstance(function, Hook):
                hook = Hook(self._checkpointed, function)
                self._replace(module, "_gradient_checkpointing_func", hook)

    def _checkpointed(
        self, original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        then = [(block, block.sequences.here.current) for block in self.blocks]

        def run(*inputs: Any, **options: Any) -> Any:
            if self.blocks != [block for block, _ in then]:
                raise TrimtabError(
                    "gradient checkpointing runs the model again in backward(), but the steering "
                    "is no longer that of the forward pass: call backward() inside the block"
                )
            before = [block.sequences.here.current for block in self.blocks]
            for block, current in then:
                block.sequences.here.current = current
            try:
                return function(*inputs, **options)
            finally:
                for block, current in zip(self.blocks, before, strict=True):
                    block.sequences.here.current = current

        return original(run, *args, **kwargs)


#: What is on each model, by its transformer body.
ATTACHED: WeakKeyDictionary[nn.Module, Attached] = WeakKeyDictionary()


@contextmanager
def unsteered(anatomy: Anatomy) -> Iterator[None]:
    """Passes that this thread runs inside are none of the texts that open blocks steer: nothing
    acts on them, and nobody counts their positions or rows."""
    on = ATTACHED.get(anatomy.body)
    here = [block.sequences.here for block in on.blocks] if on is not None else []
    before = [each.paused for each in here]
    for each in here:
        each.paused = True
    try:
        yield
    finally:
        for each, paused in zip(here, before, strict=True):
            each.paused = paused


class _Given(local):
    """What the model around the body was given, in each thread that runs it."""

    arguments: Mapping[str, Any] = MappingProxyType({})


def _is_sound(output: Any) -> Tensor | bool:
    """Whether what the final norm puts out for the last tokens can tell tokens apart. A norm makes
    zeros of activations that overflowed."""
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        return True
    size = hidden[:, -1].float().abs().amax(-1)
    return ((size > 0) & size.isfinite()).all()
