"""Asks a chat model behind an OpenAI-compatible endpoint: many at once, again where it fails, and
never twice for the same answer.

The key comes from the environment and is never written anywhere. Answers are kept on disk by what
was asked; tokens, and money where prices are given, are counted.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from trimtab.errors import TrimtabError
from trimtab.files import cache_dir, checksum, json_digest, make_directory, write_whole
from trimtab.model import without_thoughts

#: Messages of a conversation, as the API has them.
Messages = Sequence[Mapping[str, str]]
Item = TypeVar("Item")
Answer = TypeVar("Answer")

#: An answer larger than this is no answer.
_LARGEST = 1 << 20
#: The longest wait between two tries, in seconds, whatever the service asks for.
_LONGEST_WAIT = 60.0
#: A longer time to wait for an answer than anyone means, in seconds.
_LONGEST_TIMEOUT = 86400.0
#: What is said of an answer for which nobody waits any longer.
_LATE = "no answer in time"
#: What a service says when it may do better the next time, besides 500 and above.
_PASSING = (408, 429)


def read_key(variable: str) -> str:
    """The key in an environment variable; empty where there is none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise TrimtabError(f"the key in {variable} has a character that no key has")
    return key


def together(
    function: Callable[[Item, threading.Event], Answer], items: Iterable[Item], at_once: int
) -> list[Answer]:
    """`function` of each item, in order, several at once; after a failure no other is begun.

    It is given an event besides, which is set when its answer is wanted no more. An interrupt ends
    all at once: no thread holds the process.
    """
    waiting = deque(enumerate(items))
    found: list[Any] = [None] * len(waiting)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                place, item = waiting.popleft()
            except IndexError:
                return
            try:
                found[place] = function(item, stopped)
            except BaseException as error:
                stopped.set()  # here, because the next item would begin before the caller hears
                ended.put(error)
            else:
                ended.put(None)

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(waiting)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in found:
            error = ended.get()
            if error is not None:
                for thread in threads:  # what is under way is paid for, and kept
                    thread.join()
                raise error
    finally:
        stopped.set()
    return found


def _within(seconds: float, function: Callable[[], Answer]) -> Answer:
    """What a function returns, if it does in time. A library's timeout is not enough: it begins
    anew with every byte that comes."""
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise _TryAgainError(_LATE) from None
    if error is not None:
        raise error
    return cast(Answer, answer)


def _sleep(stopped: threading.Event, seconds: float) -> None:
    stopped.wait(seconds)


class _TryAgainError(Exception):
    """A failure that may pass; `wait` is how many seconds the service asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Address:
    """A URL that takes JSON by POST and answers with JSON, tried again with growing pauses."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float = 60.0
    tries: int = 5
    pause: float = 1.0  # seconds before the second try; doubled before each further one

    def __post_init__(self) -> None:
        # A URL is shown and recorded, so one that may hold a key is not even repeated here.
        if "?" in self.url or "#" in self.url or "@" in self.url.partition("://")[2].split("/")[0]:
            raise TrimtabError(
                "the URL of a service must not hold a key, so it must have no user, query or "
                "fragment: put the key in the environment variable"
            )
        try:
            parts = urlsplit(self.url)
            named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # brackets, or a port that is no port
            named = False
        if not named:
            said = "the URL" if "@" in self.url else repr(self.url)
            raise TrimtabError(f"{said} is not the URL of a service: http://HOST:PORT/...")

    def post(
        self,
        content: Any,
        read: Callable[[Any], Answer],
        stopped: threading.Event | None = None,
    ) -> Answer:
        """What `read` makes of the answer; where it raises, the answer was nonsense.

        An answer is whole after `timeout` seconds or is asked for again, until `stopped` is set.
        """
        try:
            import requests  # noqa: F401 - for `_answer`
            import tenacity
        except ImportError as error:
            raise TrimtabError("asking a service needs trimtab[eval]: pip install it") from error

        stopped = stopped or threading.Event()
        growing = tenacity.wait_exponential(self.pause, _LONGEST_WAIT) + tenacity.wait_random(
            0, self.pause / 2
        )

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait if isinstance(error, _TryAgainError) else 0.0
            return max(growing(state), min(asked, _LONGEST_WAIT))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgainError),
            stop=tenacity.stop_after_attempt(self.tries) | tenacity.stop_when_event_set(stopped),
            wait=wait,
            sleep=partial(_sleep, stopped),
            reraise=True,
        )
        try:
            answer: Answer = retrying(self._post_once, content, read, stopped)
            return answer
        except _TryAgainError as error:
            raise TrimtabError(
                f"{self.url} failed {self.tries} times, the last time with: {error}"
            ) from error

    def _post_once(
        self, content: Any, read: Callable[[Any], Answer], stopped: threading.Event
    ) -> Answer:
        if stopped.is_set():  # in the pause before this try
            raise TrimtabError(f"{self.url} was not asked again: the work was stopped")
        status, headers, body = _within(self.timeout, partial(self._answer, content))
        if status in _PASSING or status >= 500:
            raise _TryAgainError(f"status {status}", _seconds(headers.get("Retry-After")))
        if status != 200:
            raise TrimtabError(f"{self.url} answered with status {status}{self._said(body)}")
        if len(body) > _LARGEST:
            raise _TryAgainError("an answer that is too long")
        try:
            return read(json.loads(body))
        except _NONSENSE as error:
            raise _TryAgainError("an answer that makes no sense") from error

    def _answer(self, content: Any) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body; nobody waits for one that takes longer than the timeout."""
        import requests
        import urllib3

        body, over = b"", time.monotonic() + self.timeout
        try:
            with requests.post(
                self.url,
                json=content,
                headers=dict(self.headers),
                auth=lambda request: request,  # else a .netrc would replace the key
                timeout=self.timeout,
                stream=True,
                allow_redirects=False,  # a key does not go to another host
            ) as response:
                while len(body) <= _LARGEST and time.monotonic() < over:
                    more = response.raw.read1(_LARGEST, decode_content=True)
                    if not more:
                        break
                    body += more
                return response.status_code, response.headers, body
        except ValueError as error:  # no try would go out
            raise TrimtabError(f"{self.url} cannot be asked: {type(error).__name__}") from error
        # Reading a body raises urllib3's own errors.
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _TryAgainError(_reason(error)) from error

    def _said(self, body: bytes) -> str:
        """The beginning of an answer, in one line, without a key that it repeats."""
        said = " ".join(body.decode("utf-8", "replace").split())
        for value in self.headers.values():
            said = said.replace(value.split()[-1], "[key]")
        return f": {said[:200]}" if said else ""


#: What reading an answer raises that is not what it should be.
_NONSENSE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


def _reason(error: Exception) -> str:
    """In a few words; the libraries' own are long."""
    import requests
    import urllib3

    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return _LATE
    if isinstance(error, requests.ConnectionError | urllib3.exceptions.ProtocolError):
        return "no connection"
    return type(error).__name__


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date, which is rare
        return 0.0


@dataclass
class Usage:
    """What a judge has cost: calls that went out, answers from disk, tokens, money."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def __str__(self) -> str:
        money = "" if self.cost is None else f", {self.cost:.4f} in money"
        return (
            f"{self.calls} calls, {self.cached} answers from disk, {self.prompt_tokens} tokens "
            f"read, {self.completion_tokens} written{money}"
        )


@dataclass(frozen=True)
class ChatEndpoint:
    """A chat model behind an OpenAI-compatible API.

    `url` is the base URL, as in http://localhost:8000/v1; the key is read from the environment
    variable `key_variable`, and none is sent where that is empty. `prices` are per million tokens,
    read and written. Answers are kept in `cache` (default: in trimtab's cache directory). `extra`
    is sent with every question: what this service takes beyond the API, as {"top_k": 50}.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    tries: int = 5
    pause: float = 1.0
    max_tokens: int = 16
    prices: tuple[float, float] | None = None
    cache: str | Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    usage: Usage = field(default_factory=Usage, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.tries < 1 or self.max_tokens < 1:
            raise TrimtabError("a judge's concurrency, tries and max_tokens must be 1 or more")
        if not 0 < self.timeout <= _LONGEST_TIMEOUT:
            raise TrimtabError(
                f"a judge's timeout must be above 0 seconds and at most a day, not {self.timeout}"
            )
        self._address()  # says at once what is wrong with the URL and the key

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def ask(
        self,
        conversations: Sequence[Messages],
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """The answer to each conversation, in order; several are under way at once.

        `fields`, one mapping per conversation, are sent with it or in place of the usual ones: to
        sample a question several times, temperature and another seed each time.
        """
        address = self._address()
        own = [{}] * len(conversations) if fields is None else fields
        questions = [
            self._question(messages) | dict(more)
            for messages, more in zip(conversations, own, strict=True)
        ]
        files = [self._kept(address.url, asked) for asked in questions]
        distinct = dict(zip(files, questions, strict=True))
        answers = together(
            lambda item, stopped: self._answer(address, *item, stopped),
            distinct.items(),
            self.concurrency,
        )
        known = dict(zip(distinct, answers, strict=True))
        return [without_thoughts(known[file]) for file in files]

    def _address(self) -> Address:
        key = read_key(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self.url.rstrip("/") + "/chat/completions"
        return Address(url, headers, self.timeout, self.tries, self.pause)

    def _question(self, messages: Messages) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **self.extra,
        }

    def _answer(
        self, address: Address, kept: Path, asked: dict[str, Any], stopped: threading.Event
    ) -> str:
        known = _read_kept(kept, asked)
        if known is not None:
            with self._lock:
                self.usage.cached += 1
            return known
        make_directory(kept.parent)  # before the answer is paid for
        text, read, written = address.post(asked, _completion, stopped)
        answer = {"asked": asked, "answer": text}
        content = json.dumps(answer | {"checksum": checksum(answer, kept.name)})
        with self._lock:  # also for the file: while it is made, the process has no umask
            self._count(read, written)
            write_whole(kept, content.encode(), overwrite=True)
        return text

    def _kept(self, url: str, asked: dict[str, Any]) -> Path:
        """The file of an answer, named by everything that was asked."""
        digest = json_digest([url, asked], sort_keys=True)
        folder = Path(self.cache) if self.cache else cache_dir() / "answers"
        return folder / digest[:2] / f"{digest}.json"

    def _count(self, read: int, written: int) -> None:
        usage = self.usage
        usage.calls += 1
        usage.prompt_tokens += read
        usage.completion_tokens += written
        if self.prices is not None:
            per_read, per_written = self.prices
            usage.cost = (usage.cost or 0) + (read * per_read + written * per_written) / 1e6


def _completion(answer: Any) -> tuple[str, int, int]:
    """Text and tokens of an answer; an exception where it has none."""
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("no text")
    text.encode()  # half a surrogate pair is no text either
    used = answer.get("usage") or {}
    return text, int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)


def _read_kept(path: Path, asked: dict[str, Any]) -> str | None:
    """A kept answer; one that is damaged, or answers something else, is asked for again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = kept.pop("checksum", None)  # which older ones have not
        if found is not None and found != checksum(kept, path.name):
            return None
        answer = kept["answer"] if kept["asked"] == json.loads(json.dumps(asked)) else None
    except (OSError, *_NONSENSE):
        return None
    return answer if isinstance(answer, str) else None
