"""Several models write the same tokens, one token each in turn.

What a steering costs is less than what a machine's speed varies from one minute to the next. So
each contender is a whole `generate()` in a thread of its own, of which only one runs at a time: all
read the prompt and write their first token, in random order, then all their second, and so on.

Needs nothing of trimtab, because other libraries' processes use it too.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

#: A contender: hands its arguments to some model's generate() and returns what that returns.
Write = Callable[..., Any]


def sibling(model: Any) -> Any:
    """The model once more, with hooks and modules of its own and the same weights in memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@torch.inference_mode()
def first_logits(write: Write, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a contender predicts after the prompts, [rows, vocabulary]."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    logits: Tensor = write(**inputs, **options, max_new_tokens=1).logits[0]
    return logits


def lockstep(
    writers: Mapping[str, Write], inputs: Mapping[str, Tensor], written: Tensor, seed: int
) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each contender's turns. All write `written`, [rows, tokens].

    A turn ends where a token is chosen. The first holds the prompt and all that is done before,
    the last what is left to do after the last token.
    """
    turns = {name: _Turns(written, inputs["input_ids"].shape[1]) for name in writers}
    count = written.shape[1]
    options = {**inputs, "do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
    for name, write in writers.items():
        threading.Thread(target=turns[name].run, args=(write, options), daemon=True).start()
    order = random.Random(seed)
    while running := [name for name, turn in turns.items() if not turn.ended]:
        for name in order.sample(running, len(running)):
            turns[name].give()
    for turn in turns.values():
        if turn.error is not None:
            raise turn.error
    return {name: turn.seconds for name, turn in turns.items()}


class _Turns(LogitsProcessor):
    """One contender's thread; it gives up its turn whenever generate() is about to choose a token,
    and then makes it choose the wanted one."""

    def __init__(self, written: Tensor, start: int) -> None:
        self.seconds: list[tuple[float, float]] = []
        self.ended = False
        self.error: BaseException | None = None
        self._written, self._start = written, start
        self._given, self._over = threading.Semaphore(0), threading.Semaphore(0)
        self._began = 0.0, 0.0

    def give(self) -> None:
        """Let the thread run until its turn is over."""
        self._given.release()
        self._over.acquire()

    def run(self, write: Write, options: Mapping[str, Any]) -> None:
        """The thread."""
        self._begin()
        try:
            with torch.inference_mode():
                write(**options, logits_processor=LogitsProcessorList([self]))
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True
            self._end()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._end()
        self._begin()
        token = self._written[:, input_ids.shape[1] - self._start]
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

    def _begin(self) -> None:
        self._given.acquire()
        self._began = time.thread_time(), time.perf_counter()

    def _end(self) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        self.seconds.append((cpu - self._began[0], wall - self._began[1]))
        self._over.release()
