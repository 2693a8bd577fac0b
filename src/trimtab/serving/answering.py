"""From a request's body to the jobs that answer it, and from what they tell to the answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from threading import Lock
from typing import Any

from trimtab.errors import TrimtabError, shown
from trimtab.model import LanguageModel, acted, render_messages
from trimtab.serving.bodies import MOST_ANSWERS, ChatBody, CompletionBody
from trimtab.serving.choosing import Chosen
from trimtab.serving.jobs import Answers, Ended, GoneError, Job, Piece, Told
from trimtab.serving.library import Library
from trimtab.serving.names import Asked, asked_by

#: How many tokens an answer has where the request does not say.
_CHAT_TOKENS, _COMPLETION_TOKENS = 1024, 16


class UnknownModelError(TrimtabError):
    """A request names a model that is not served."""


class LateError(TrimtabError):
    """An answer took longer than this server allows."""

    def __init__(self) -> None:
        super().__init__("the answer took longer than this server allows")


#: What it is where an answer ends that is not whole.
_CUT_OFF: dict[str, Callable[[], TrimtabError]] = {
    "timeout": LateError,
    "closed": partial(GoneError, "the server ends"),
}


@dataclass(eq=False)
class Answer:
    """One of a request's answers: its job, and what was told of it so far."""

    job: Job
    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    reason: str = ""
    #: What acted, once it is whole and somebody has asked.
    acted: list[dict[str, Any]] | None = None


@dataclass(eq=False)
class Request:
    """A request that is being answered: its answers, of which each has a job."""

    kind: str
    model: str
    names: list[str]
    answers: list[Answer]
    prompt_tokens: int
    began: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    told: asyncio.Queue[tuple[int, Told]] = field(default_factory=asyncio.Queue)

    def leave(self) -> None:
        """Nobody waits for it any more."""
        for answer in self.answers:
            answer.job.left.set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """What its answers go on with, in the order in which it comes, until all are whole; one
        that is cut off is an error, and never looks like one that came to its end."""
        open_answers = len(self.answers)
        while open_answers:
            index, told = await self.told.get()
            if isinstance(told, TrimtabError):
                raise told
            answer = self.answers[index]
            if isinstance(told, Piece):
                answer.text += told.text
                answer.tokens += told.tokens
            elif told.reason in _CUT_OFF:
                raise _CUT_OFF[told.reason]()
            else:
                answer.reason = told.reason
                open_answers -= 1
            yield index, told


@dataclass(frozen=True)
class Desk:
    """Where requests become jobs: the model, its steerings, its engine; `name` is what clients call
    the model, `timeout` how many seconds an answer may take."""

    language_model: LanguageModel
    name: str
    library: Library
    engine: Answers
    timeout: float
    #: Tokenizers change while they read.
    tokenizing: Lock = field(default_factory=Lock)

    def begin(self, body: ChatBody | CompletionBody, loop: asyncio.AbstractEventLoop) -> Request:
        """Check a request whole, and hand its jobs to the engine, which tell of themselves in
        `loop`; nothing has run where it is refused."""
        asked = self._asked(body)
        wanted = self.library.wanted(asked)
        with self.tokenizing:
            prompts = self._prompts(body)
        most = self._most(body, prompts)
        logprobs = _logprobs(body)
        names = [one.name for one in asked]
        total = len(prompts) * (body.n or 1)
        if total > MOST_ANSWERS:
            raise TrimtabError(f"a request may have {MOST_ANSWERS} answers, not {total}")
        request = Request(
            "chat" if isinstance(body, ChatBody) else "text", body.model, names, [],
            sum(map(len, prompts)),
        )  # fmt: skip
        deadline = time.monotonic() + self.timeout
        # One search of a budget serves all answers to a prompt.
        settled = [cache(partial(self.library.settled, wanted, tokens)) for tokens in prompts]
        for i in range(total):
            tokens = prompts[i // (body.n or 1)]
            settings = body.settings(most[i // (body.n or 1)], logprobs, i)
            settings.check(self.language_model.anatomy.config.vocab_size)
            job = Job(
                list(tokens),
                settled[i // (body.n or 1)],
                settings,
                _teller(loop, request.told, i),
                deadline,
                kl=self.library.left_to_engine(wanted),
            )
            request.answers.append(Answer(job))
        try:
            for answer in request.answers:
                self.engine.submit(answer.job)
        except TrimtabError:
            request.leave()
            raise
        return request

    def _asked(self, body: ChatBody | CompletionBody) -> list[Asked]:
        by_name = asked_by(body.model, self.name)
        if by_name is None:
            raise UnknownModelError(
                f"there is no model '{shown(body.model)}': this server has {self.name}, and "
                f"{self.name}+STEERING@DIAL"
            )
        by_field = [one.asked for one in body.steering or []]
        if by_name and by_field:
            raise TrimtabError("name steerings in the model's name or in steering, not in both")
        return by_name or by_field

    def _prompts(self, body: ChatBody | CompletionBody) -> list[Sequence[int]]:
        """The token ids of each prompt. No image comes with them, so that no token may stand for
        one, in whichever way it was written."""
        if isinstance(body, ChatBody):
            prompts = [self._chat_tokens(body)]
        else:
            prompts = self._text_tokens(body.prompt)
        self.language_model.refuse_bare(prompts)
        return prompts

    def _text_tokens(self, prompt: Any) -> list[Sequence[int]]:
        lm = self.language_model
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        if isinstance(prompt[0], str):
            return list(lm.fitting(lm.prompts(prompt, False)))
        largest = lm.anatomy.config.vocab_size - 1
        for tokens in prompt:
            if max(tokens) > largest:
                raise TrimtabError(f"token ids go from 0 to {largest}, and one is {max(tokens)}")
        return list(prompt)

    def _chat_tokens(self, body: ChatBody) -> Sequence[int]:
        lm = self.language_model
        if not lm.chats:
            raise TrimtabError(f"{self.name} has no chat template: ask /v1/completions")
        tools = None if body.tool_choice == "none" else body.tools or None
        messages = [message.told for message in body.messages]
        text = self._rendered(messages, tools)
        if tools and text == self._rendered(messages, None):
            raise TrimtabError(f"the chat template of {self.name} takes no tools: leave them out")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TrimtabError("messages and tools have halves of characters: send text") from error
        found: list[int] = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _rendered(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
    ) -> str:
        lm = self.language_model
        try:
            return render_messages(lm.tokenizer, self.name, messages, lm.chat_form, tools)
        except TrimtabError as error:
            if error.__cause__ is None:
                raise
            # The sentence has what this server puts before messages, which clients do not read.
            said = shown(" ".join(str(error.__cause__).split()), 300)
            raise TrimtabError(
                f"the chat template of {self.name} refuses these messages: {said}"
            ) from error

    def _most(self, body: ChatBody | CompletionBody, prompts: Sequence[Sequence[int]]) -> list[int]:
        """How many tokens the answers to each prompt may have."""
        if isinstance(body, ChatBody):
            asked = body.max_completion_tokens or body.max_tokens
        else:
            asked = body.max_tokens or _COMPLETION_TOKENS
        most = []
        for tokens in prompts:
            room = self.language_model.max_length - len(tokens)
            if room < (asked or 1):
                raise TrimtabError(
                    f"a prompt of {len(tokens)} tokens and {asked or 1} new ones exceed the "
                    f"{self.language_model.max_length} tokens that {self.name} takes"
                )
            most.append(asked or min(room, _CHAT_TOKENS))
        return most

    def acted(self, request: Request, index: int) -> list[dict[str, Any]]:
        """Of one answer which steerings acted, at which dial, on how many tokens of the prompt and
        of the answer, and what their gates decided."""
        answer = request.answers[index]
        if answer.acted is None:
            job = answer.job
            marks = self.language_model.marks
            each = acted(marks, job.acting, job.gates, job.tokens, job.new)
            answer.acted = [
                {"name": name, **told} for name, told in zip(request.names, each, strict=False)
            ]
        return answer.acted


def _teller(
    loop: asyncio.AbstractEventLoop, told: asyncio.Queue[tuple[int, Told]], index: int
) -> Callable[[Told], None]:
    """What the engine's thread calls; a loop that has ended hears nothing."""

    def tell(what: Told) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(told.put_nowait, (index, what))

    return tell


def _logprobs(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


# -- in OpenAI's form -----------------------------------------------------------------------------


def whole(desk: Desk, request: Request) -> dict[str, Any]:
    """The answer, when all of it is there."""
    choices = []
    for i, answer in enumerate(request.answers):
        content: dict[str, Any] = {"text": answer.text}
        if request.kind == "chat":
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        choices.append({
            "index": i,
            **content,
            "logprobs": said(desk, request.kind, answer.tokens),
            "finish_reason": answer.reason,
            "steering": desk.acted(request, i),
        })  # fmt: skip
    kind = "chat.completion" if request.kind == "chat" else "text_completion"
    return {**_head(request, kind), "choices": choices, "usage": usage(request)}


def chunk(desk: Desk, request: Request, index: int, told: Piece | Ended) -> dict[str, Any] | None:
    """A piece of a streamed answer; None where there is nothing to say of it."""
    finish = told.reason if isinstance(told, Ended) else None
    text = told.text if isinstance(told, Piece) else ""
    logprobs = said(desk, request.kind, told.tokens) if isinstance(told, Piece) else None
    if not (text or finish or logprobs):
        return None
    choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish}
    if finish:
        choice["steering"] = desk.acted(request, index)
    if request.kind == "chat":
        return {
            **_head(request, "chat.completion.chunk"),
            "choices": [{**choice, "delta": {"content": text} if text else {}}],
        }
    return {**_head(request, "text_completion"), "choices": [{**choice, "text": text}]}


def opening(request: Request, index: int) -> dict[str, Any]:
    """The first piece of a streamed chat answer, which says whose turn it is."""
    choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    return {**_head(request, "chat.completion.chunk"), "choices": [choice]}


def closing(request: Request) -> dict[str, Any]:
    """The last piece of a stream: how many tokens there were."""
    name = "chat.completion.chunk" if request.kind == "chat" else "text_completion"
    return {**_head(request, name), "choices": [], "usage": usage(request)}


def usage(request: Request) -> dict[str, int]:
    written = sum(len(answer.job.new) for answer in request.answers)
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": request.prompt_tokens + written,
    }


def _head(request: Request, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if request.kind == "chat" else "cmpl"
    return {
        "id": f"{prefix}-{request.key}",
        "object": kind,
        "created": request.created,
        "model": request.model,
    }


def said(desk: Desk, kind: str, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
    """Log-probabilities of some tokens, in the form of an answer of that kind."""
    if not tokens or tokens[0].logprob is None:
        return None
    decode = desk.language_model.tokenizer.decode
    if kind == "chat":
        content = [
            {
                **_word(decode([one.token]), one.logprob or 0.0),
                "top_logprobs": [_word(decode([token]), value) for token, value in one.top],
            }
            for one in tokens
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [decode([one.token]) for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{decode([token]): value for token, value in one.top} for one in tokens],
    }


def _word(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
