"""Requests to vLLM that are under way: which wait, which steerings the workers hold for them, and
what comes of each. Work of several kinds may be under way at the same time; whoever waits takes the
next step for all.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from trimtab.engines import Ask, Heard, InProcess, ReadingOf, Wanted, content_of, wanted_of
from trimtab.errors import TrimtabError
from trimtab.model import Fired, LanguageModel, fired_by, stops_in
from trimtab.serving.deciding import (
    Decision,
    check_scopes,
    decided,
    early_of,
    read_of,
    scores_of,
)
from trimtab.serving.placing import acts_of
from trimtab.steering import Gate, Steering

#: Steerings that workers hold at once, and requests that the engine has at once.
_HELD, _AT_ONCE = 512, 1024
#: How many steerings are kept in the form in which requests ask for them.
KNOWN = 4096

Acting = tuple[Steering, ...]


@dataclass(eq=False)
class Work:
    """Requests of one kind: how many are not over, and those that are, by their place."""

    left: int = 0
    over: deque[tuple[int, Request]] = field(default_factory=deque)


@dataclass(eq=False)
class Request:
    """One text that is under way, and what came of it."""

    work: Work
    place: int
    ask: Ask
    acting: Acting
    #: How many of its tokens are prompt to steerings.
    prompt: int
    pattern: Any = None
    #: What gates that go by the prompt decide, by the place of their steering, and did.
    decisions: dict[int, Decision] = field(default_factory=dict)
    early: dict[int, Fired] = field(default_factory=dict)
    #: What the workers steer with, and of what gates decide token by token the place in `acting`,
    #: by that place.
    sent: Acting = ()
    by_token: dict[int, int] = field(default_factory=dict)
    #: What it finds out for others, where it is no text of anybody's.
    finds: Decision | None = None
    tokens: list[int] = field(default_factory=list)
    sound: bool = True
    last: Heard | None = None
    #: What each rank has read of it.
    told: list[dict[str, Tensor]] = field(default_factory=list)


class Queue:
    """What is under way in an engine, which `start` starts at the first step."""

    def __init__(self, language_model: LanguageModel, start: Callable[[], InProcess]) -> None:
        self._lm, self._start = language_model, start
        self.inner: InProcess | None = None
        self._broken = False
        self._waiting: deque[Request] = deque()
        #: Requests whose gates have not decided, passes that they wait for, and what came of these,
        #: by gate and prompt.
        self._undecided: list[Request] = []
        self._asides = Work()
        self._decisions: dict[tuple[int, tuple[int, ...]], Decision] = {}
        self._free: dict[int, tuple[Steering, Steering]] = {}
        self._under_way: dict[str, Request] = {}
        #: Steerings that the workers hold, by digest, and how many requests run with each.
        self._held: dict[str, int] = {}
        #: Steerings in the form in which requests ask for them.
        self._known: dict[int, tuple[Steering, Wanted]] = {}
        self._count = 0
        #: Tokens that ran through the model.
        self.read = 0

    def ask(self, request: Request) -> None:
        """Have a text wait for its turn; refuses one that has no turns of a chat where a scope asks
        for some, or whose gates see what they should not."""
        for steering in request.acting:
            check_scopes(self._lm, steering.scopes, request.ask.tokens)
        prompt = request.ask.tokens[: request.prompt]
        request.decisions = {
            place: self._decision(gate, prompt) for place, gate in early_of(request.acting).items()
        }
        request.work.left += 1
        if request.decisions:
            self._undecided.append(request)
        else:
            self._settle(request)

    def _decision(self, gate: Gate, prompt: tuple[int, ...]) -> Decision:
        """What a gate decides of a prompt, from a pass that is not steered; one for all who ask."""
        key = id(gate), prompt
        if key in self._decisions:
            return self._decisions[key]
        if len(self._decisions) >= KNOWN:
            known = [k for k, one in self._decisions.items() if one.scores is not None]
            for each in known:
                del self._decisions[each]
        found = self._decisions[key] = Decision(gate)
        reads = tuple(read_of(self._lm, each, prompt) for each in gate.conditions)
        salt = uuid.uuid4().hex  # what comes out of a cache passes no site
        asked = Ask(prompt, reading=ReadingOf(uuid.uuid4().hex, reads), salt=salt)
        self._asides.left += 1
        self._waiting.append(Request(self._asides, 0, asked, (), len(prompt), finds=found))
        return found

    def _settle(self, request: Request) -> None:
        """Have a request wait for its turn whose gates that go by the prompt have decided."""
        acting = request.acting
        for place, decision in request.decisions.items():
            assert decision.scores is not None
            request.early[place] = fired_by(acting[place], decision.scores)
        places = [
            place
            for place in range(len(acting))
            if place not in request.early or request.early[place].fired
        ]
        request.sent = tuple(self._without(acting[place]) for place in places)
        request.by_token = {
            number: place
            for number, place in enumerate(places)
            if request.sent[number].gate is not None
        }
        wanted = self._wanted(request.sent)
        if request.prompt != len(request.ask.tokens):  # else it shares blocks with texts that go on
            wanted = tuple(replace(one, prompt=request.prompt) for one in wanted)
        request.ask = replace(request.ask, wanted=wanted)
        if request.by_token:  # what is read again is not known to gates
            reading = ReadingOf(uuid.uuid4().hex, written=True)
            request.ask = replace(request.ask, reading=reading, salt=uuid.uuid4().hex)
        self._waiting.append(request)

    def _without(self, steering: Steering) -> Steering:
        """A steering as the workers hold it; the same one for all who have it."""
        if decided(steering) is steering:
            return steering
        if id(steering) not in self._free:
            if len(self._free) >= KNOWN:
                del self._free[next(iter(self._free))]
            self._free[id(steering)] = steering, decided(steering)
        return self._free[id(steering)][1]

    def _wanted(self, acting: Acting) -> tuple[Wanted, ...]:
        """How steerings are asked for."""
        found = []
        for steering in acting:
            if id(steering) not in self._known:
                if len(self._known) >= KNOWN:
                    del self._known[next(iter(self._known))]
                wanted = wanted_of(steering, partial(acts_of, self._lm))
                self._known[id(steering)] = steering, wanted
            found.append(self._known[id(steering)][1])
        return tuple(found)

    # -- while it runs ----------------------------------------------------------------------------

    def results(self, work: Work, in_turns: bool) -> Iterator[list[tuple[int, Request]]]:
        """Requests that are over, as they come."""
        if in_turns and work.left:
            yield []  # all who take turns have asked before the first step
        try:
            while work.left or work.over:
                if not work.over:
                    self._step()
                found = [work.over.popleft() for _ in range(len(work.over))]
                if found or in_turns:
                    yield found
        finally:
            self._leave(work)

    def _leave(self, work: Work) -> None:
        """Nobody waits for the rest of some work."""
        if not work.left:
            return
        self._waiting = deque(one for one in self._waiting if one.work is not work)
        self._undecided = [one for one in self._undecided if one.work is not work]
        for name, one in list(self._under_way.items()):
            if one.work is work:
                self._over(name)
                if self.inner is not None and not self._broken:
                    self.inner.leave(name)
                    if one.ask.reading is not None:  # which is forgotten with it
                        self.inner.told(one.ask.reading.name)

    def _step(self) -> None:
        """One pass, for all work that is under way."""
        if self._broken:
            raise TrimtabError("the engine was ended or interrupted: open another")
        inner = self._started()
        try:
            self._feed(inner)
            for heard in inner.step():
                self._hear(inner, heard)
        except BaseException:
            self._broken = True  # what it was at, nobody knows
            raise

    def _feed(self, inner: InProcess) -> None:
        """Hand over requests that wait, as far as their steerings find room."""
        if self._undecided:
            asked, self._undecided = self._undecided, []
            for each in asked:
                if all(decision.scores is not None for decision in each.decisions.values()):
                    self._settle(each)
                else:
                    self._undecided.append(each)
        while self._waiting and len(self._under_way) < _AT_ONCE:
            request = self._waiting[0]
            own = {
                wanted.digest: one
                for wanted, one in zip(request.ask.wanted, request.sent, strict=True)
            }
            if not all(self._hold(inner, digest, own) for digest in own):
                return
            self._waiting.popleft()
            for one in request.ask.wanted:
                self._held[one.digest] += 1
            self._count += 1
            name = str(self._count)
            self._under_way[name] = request
            inner.add(name, request.ask)

    def _hold(self, inner: InProcess, digest: str, own: Mapping[str, Steering]) -> bool:
        """Have the workers hold a steering, one of those of a request; whether they do."""
        if digest in self._held:
            return True
        if len(self._held) >= _HELD:
            idle = [each for each, running in self._held.items() if not running and each not in own]
            if not idle:
                return False
            del self._held[idle[0]]
            inner.unload(idle[0])
        inner.load(digest, content_of(own[digest]))
        self._held[digest] = 0
        return True

    def _hear(self, inner: InProcess, heard: Heard) -> None:
        request = self._under_way.get(heard.name)
        if request is None:  # one that was left
            return
        request.last = heard
        request.sound = request.sound and all(heard.sound)
        over = heard.over
        for token in heard.tokens:
            request.tokens.append(token)
            # As in transformers, where the end of a text counts as text.
            if request.pattern is not None and stops_in(
                request.pattern, self._lm.tokenizer.decode(request.tokens)
            ):
                if not over:
                    inner.leave(heard.name)
                over = True
                break
        if over:
            self._over(heard.name)
            if request.ask.reading is not None:
                request.told = inner.told(request.ask.reading.name)
            if request.finds is None:
                request.work.over.append((request.place, request))
            else:
                request.finds.scores = scores_of(request.finds.gate, request.told)

    def _over(self, name: str) -> None:
        request = self._under_way.pop(name)
        request.work.left -= 1
        for one in request.ask.wanted:
            self._held[one.digest] -= 1
        cached = 0 if request.last is None else request.last.cached
        # The last token that was written ran through nothing.
        self.read += len(request.ask.tokens) - cached + max(0, len(request.tokens) - 1)

    def _started(self) -> InProcess:
        if self.inner is None:
            self.inner = self._start()
        return self.inner

    def close(self) -> None:
        """End the engine, and what is under way."""
        inner, self.inner, self._broken = self.inner, None, True
        self._waiting.clear()
        self._undecided.clear()
        self._under_way.clear()
        if inner is not None:
            inner.close()
