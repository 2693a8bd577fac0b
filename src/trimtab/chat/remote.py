"""Answers of a model behind an OpenAI-compatible address; on a server of ours under steerings by
name, which go along in the body's field `steering`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from trimtab.chat.answers import Answer, Asked, Cost, OnBoth, OnText, Put, Receipt
from trimtab.errors import TrimtabError, shown
from trimtab.evaluation import Address, read_key
from trimtab.steering import as_number

httpx: Any
try:
    import httpx
except ImportError:  # it comes with an extra
    httpx = None

#: Seconds to wait for a connection, and for the next piece of an answer.
_CONNECT, _PIECE = 10.0, 600.0
#: An answer with more characters than this is no answer.
_LONGEST = 4 * 2**20
#: What an answer that is not in OpenAI's form raises where it is read.
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError)


class Remote:
    """A model by its name behind a base URL, as in http://localhost:8000/v1.

    The key is read from the environment variable `key_variable`. `body` is sent with every
    question: how tokens are chosen, by OpenAI's names and the server's own.
    """

    def __init__(
        self,
        url: str,
        model: str,
        body: Mapping[str, Any],
        *,
        key_variable: str = "OPENAI_API_KEY",
        seed: int | None = None,
    ) -> None:
        if httpx is None:
            raise TrimtabError("asking a server needs the extra chat: pip install 'trimtab[chat]'")
        key = read_key(key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = Address(url.rstrip("/"), headers).url  # says what is wrong with it
        self._key, self._model, self._body, self._seed = key, model, dict(body), seed
        timeout = httpx.Timeout(_PIECE, connect=_CONNECT)
        self._client = httpx.Client(headers=headers, timeout=timeout)
        self._served: list[str] | None = None

    @property
    def name(self) -> str:
        return self._model

    # -- steerings --------------------------------------------------------------------------------

    def known(self) -> list[str]:
        try:
            return self._steerings()
        except TrimtabError:
            return []

    def put(self, argument: str) -> Put:
        name, _, dial = argument.partition("@")
        served = self._steerings()
        if name not in served:
            raise TrimtabError(
                f"no steering is called '{shown(name, 80)}' at {self._url}: there are "
                f"{', '.join(served) or 'none'}"
            )
        if not dial:
            return Put(name, name)
        kind, budget, nats = dial.partition("=")
        if budget and kind == "kl":
            return Put(name, name, kl=_number(nats, argument))
        word = dial.lstrip("-").isalpha()
        return Put(name, name, dial=dial if word else _number(dial, argument))

    def _steerings(self) -> list[str]:
        """Names of what the server has; refused where it is not one of ours."""
        if self._served is None:
            with self._said_plainly():
                response = self._client.get(f"{self._url}/steerings")
                if response.status_code in (401, 403):
                    raise self._refusal(response.status_code, response.content)
                try:
                    rows = response.json()["data"] if response.status_code == 200 else None
                    self._served = None if rows is None else [str(row["name"]) for row in rows]
                except _NONSENSE:
                    self._served = None
            if self._served is None:
                raise TrimtabError(
                    f"{self._url} is no server of trimtab and cannot steer: /steer is for a model "
                    "of this machine, or for trimtab serve"
                )
        return self._served

    # -- answers ----------------------------------------------------------------------------------

    def answer(self, asked: Asked, on_text: OnText) -> Answer:
        stream = _Stream()
        try:
            self._run(self._question(asked, asked.acting), stream, on_text)
        except KeyboardInterrupt:
            stream.stopped = True
        return stream.answer()

    def both(self, asked: Asked, on_both: OnBoth) -> tuple[Answer, Answer]:
        """Two requests at once; their pieces are handed on in this thread."""
        streams = _Stream(), _Stream()
        heard: SimpleQueue[tuple[int, str | BaseException | None]] = SimpleQueue()

        def work(place: int) -> None:
            question = self._question(asked, asked.acting if place else ())
            try:
                self._run(question, streams[place], lambda piece: heard.put((place, piece)))
                heard.put((place, None))
            except BaseException as error:
                heard.put((place, error))

        threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in (0, 1)]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                place, what = heard.get()
                if isinstance(what, BaseException):
                    raise what
                if what is None:
                    left -= 1
                else:
                    on_both(place, what)
        except BaseException as error:
            for stream in streams:
                stream.stopped = True  # each ends with its next piece
            if not isinstance(error, KeyboardInterrupt):
                raise
        return streams[0].answer(), streams[1].answer()

    def cost(self, asked: Asked, answer: Answer) -> Cost:
        raise TrimtabError("a server does not say what steering cost: /cost is for models here")

    def _question(self, asked: Asked, acting: tuple[Put, ...]) -> dict[str, Any]:
        system = [] if asked.system is None else [{"role": "system", "content": asked.system}]
        question: dict[str, Any] = {
            "model": self._model,
            "messages": [*system, *map(dict, asked.messages)],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._body,
        }
        if self._seed is not None:
            question["seed"] = self._seed + asked.number
        if acting:
            question["steering"] = [_named(put) for put in acting]
        return question

    def _run(self, question: dict[str, Any], stream: _Stream, on_text: OnText) -> None:
        """Ask, and hand on what comes."""
        url = f"{self._url}/chat/completions"
        with self._said_plainly(), self._client.stream("POST", url, json=question) as response:
            if response.status_code != 200:
                raise self._refusal(response.status_code, response.read())
            for line in response.iter_lines():
                if stream.stopped:
                    return
                if line.startswith("data:") and line != "data: [DONE]":
                    stream.read(line.removeprefix("data:"), on_text)
        if not stream.ended:
            raise TrimtabError(f"{self._url} broke off its answer")

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """What goes wrong on the way in one line."""
        try:
            yield
        except httpx.ConnectError as error:
            raise TrimtabError(f"{self._url} cannot be reached: is the server running?") from error
        except httpx.TimeoutException as error:
            raise TrimtabError(f"{self._url} did not answer in time") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TrimtabError(f"{self._url} cannot be asked: {type(error).__name__}") from error

    def _refusal(self, status: int, body: bytes) -> TrimtabError:
        """What a server says that refuses, without a key that it repeats."""
        try:
            said = json.loads(body)["error"]["message"]
        except _NONSENSE:
            said = body.decode("utf-8", "replace")
        said = " ".join(str(said).split())
        if self._key:
            said = said.replace(self._key, "[key]")
        return TrimtabError(f"{self._url} answered with status {status}: {shown(said, 300)}")


@dataclass
class _Stream:
    """An answer as it comes: its text so far, and what the server says of it."""

    began: float = field(default_factory=time.monotonic)
    text: str = ""
    first: float | None = None
    pieces: int = 0
    ended: bool = False
    stopped: bool = False
    usage: Mapping[str, Any] = field(default_factory=dict)
    acted: tuple[Mapping[str, Any], ...] = ()

    def read(self, event: str, on_text: OnText) -> None:
        """One event of the stream."""
        try:
            said = json.loads(event)
            if said.get("error"):
                raise TrimtabError(f"the server broke off: {shown(_message(said['error']), 300)}")
            self.usage = said.get("usage") or self.usage
            choice: Any = next(iter(said.get("choices") or []), {})
            piece = (choice.get("delta") or {}).get("content") or ""
            self.acted = tuple(choice.get("steering") or self.acted)
            self.ended = self.ended or bool(choice.get("finish_reason"))
            if not isinstance(piece, str):
                raise TypeError
        except _NONSENSE as error:
            raise TrimtabError("the server's answer is not in OpenAI's form") from error
        if piece:
            if self.first is None:
                self.first = time.monotonic() - self.began
            self.text += piece
            self.pieces += 1
            if len(self.text) > _LONGEST:
                raise TrimtabError("the server's answer has no end")
            on_text(piece)

    def answer(self) -> Answer:
        """What has come; where the server does not count tokens its pieces stand for them."""
        written, read = (self.usage.get(f"{one}_tokens") for one in ("completion", "prompt"))
        seconds = time.monotonic() - self.began
        tokens = int(written or 0) or self.pieces
        receipt = Receipt(self.acted, read, None, tokens, seconds, self.first, self.stopped)
        return Answer(self.text, receipt)


def _message(error: Any) -> str:
    return str(error.get("message") if isinstance(error, Mapping) else error)


def _named(put: Put) -> dict[str, Any]:
    """A steering in a request's body."""
    said = {"name": put.name, "dial": put.dial, "kl": put.kl, "scope": put.scope}
    return {name: value for name, value in said.items() if value is not None}


def _number(text: str, argument: str) -> float:
    number = as_number(text)
    if number is None:
        raise TrimtabError(f"{shown(argument, 150)}: write NAME@DIAL, as in warm@2, or NAME@kl=0.1")
    return number
