"""Asks a chat model behind an OpenAI-compatible endpoint: many at once, again where it fails, and
never twice for the same answer.

The key comes from the environment and is never written anywhere. Answers are kept on disk by what
was asked; tokens, and money where prices are given, are counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from trimtab.errors import TrimtabError
from trimtab.packs import cache_dir
from trimtab.steering import write_whole

#: Messages of a conversation, as the API has them.
Messages = Sequence[Mapping[str, str]]
Answer = TypeVar("Answer")

#: An answer larger than this is no answer.
_LARGEST = 1 << 20
#: The longest wait between two tries, in seconds, whatever the service asks for.
_LONGEST_WAIT = 60.0


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
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TrimtabError(f"{self.url!r} is not the URL of a service: http://HOST:PORT/...")

    def post(self, content: Any, read: Callable[[Any], Answer]) -> Answer:
        """What `read` makes of the answer; where it raises, the answer was nonsense."""
        import tenacity

        growing = tenacity.wait_exponential_jitter(self.pause, _LONGEST_WAIT, jitter=self.pause / 2)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait if isinstance(error, _TryAgainError) else 0.0
            return max(growing(state), min(asked, _LONGEST_WAIT))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgainError),
            stop=tenacity.stop_after_attempt(self.tries),
            wait=wait,
            reraise=True,
        )
        try:
            answer: Answer = retrying(self._post_once, content, read)
            return answer
        except _TryAgainError as error:
            raise TrimtabError(
                f"{self.url} failed {self.tries} times, the last time with: {error}"
            ) from error

    def _post_once(self, content: Any, read: Callable[[Any], Answer]) -> Answer:
        import requests

        try:
            with requests.post(
                self.url,
                json=content,
                headers=dict(self.headers),
                timeout=self.timeout,
                stream=True,
                allow_redirects=False,  # a key does not go to another host
            ) as response:
                status, headers = response.status_code, response.headers
                body = response.raw.read(_LARGEST + 1, decode_content=True)
        except (requests.RequestException, OSError) as error:
            raise _TryAgainError(_reason(error)) from error
        if status == 429 or status >= 500:
            raise _TryAgainError(f"status {status}", _seconds(headers.get("Retry-After")))
        if status != 200:
            said = body[:200].decode("utf-8", "replace").strip()
            raise TrimtabError(f"{self.url} answered with status {status}: {said}")
        if len(body) > _LARGEST:
            raise _TryAgainError("an answer that is too long")
        try:
            return read(json.loads(body))
        except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise _TryAgainError("an answer that makes no sense") from error


def _reason(error: Exception) -> str:
    """In a few words; the libraries' own are long."""
    import requests

    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
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
    read and written. Answers are kept in `cache` (default: in trimtab's cache directory).
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
    usage: Usage = field(default_factory=Usage, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.tries < 1 or self.max_tokens < 1:
            raise TrimtabError("a judge's concurrency, tries and max_tokens must be 1 or more")
        if not self.timeout > 0:
            raise TrimtabError(f"a judge's timeout must be above 0 seconds, not {self.timeout}")
        self._address()  # says at once what is wrong with the URL

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def ask(self, conversations: Sequence[Messages]) -> list[str]:
        """The answer to each conversation, in order; several are under way at once."""
        address = self._address()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            return list(pool.map(lambda messages: self._answer(address, messages), conversations))
        finally:
            # After a failure the calls that wait are not made.
            pool.shutdown(wait=True, cancel_futures=True)

    def _address(self) -> Address:
        key = os.environ.get(self.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self.url.rstrip("/") + "/chat/completions"
        return Address(url, headers, self.timeout, self.tries, self.pause)

    def _answer(self, address: Address, messages: Messages) -> str:
        asked = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        kept = self._kept(address.url, asked)
        known = _read_kept(kept)
        if known is not None:
            with self._lock:
                self.usage.cached += 1
            return known
        text, read, written = address.post(asked, _completion)
        with self._lock:
            self._count(read, written)
        kept.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"asked": asked, "answer": text}, ensure_ascii=False)
        write_whole(kept, content.encode(), overwrite=True)
        return text

    def _kept(self, url: str, asked: dict[str, Any]) -> Path:
        """The file of an answer, named by everything that was asked."""
        canonical = json.dumps([url, asked], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(canonical.encode()).hexdigest()
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
    used = answer.get("usage") or {}
    return text, int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)


def _read_kept(path: Path) -> str | None:
    """A kept answer; one that cannot be read is asked for again."""
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if isinstance(answer, str) else None
