"""Options that say who judges texts, for every command that evaluates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import console, open_beside
from trimtab.cli.options import Opened
from trimtab.errors import TrimtabError
from trimtab.options import Answering, Choosing, Prompting, option

if TYPE_CHECKING:
    from trimtab.evaluation import Chat, ChatEndpoint, Judging
    from trimtab.serving import VLLM
    from trimtab.sweeps import Measured


#: Tokens of a prompt that somebody writes.
_WRITTEN = 160


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError as error:
        raise TrimtabError(f"--judge-prices {text}: write READ,WRITTEN, as in 0.15,0.6") from error
    if not (0 <= read < math.inf and 0 <= written < math.inf):
        raise TrimtabError(f"--judge-prices {text}: prices are 0 or more")
    return read, written


@dataclass(frozen=True, kw_only=True)
class JudgedAt:
    """Who judges texts, and where it is asked."""

    heading = "Judges"

    judge: Any = None
    judge_url: str | None = option("Base URL of an OpenAI-compatible API.", None)
    judge_key_env: str = option("Environment variable that holds the API's key.", "OPENAI_API_KEY")


@dataclass(frozen=True, kw_only=True)
class AskedAt(JudgedAt):
    """The same, and how a judge at an address is asked."""

    judge_concurrency: int = option("Calls under way at once.", 8)
    judge_timeout: float = option("Seconds to wait for an answer.", 60.0)
    judge_prices: str | None = option(
        "Prices per million tokens, read and written: 0.15,0.60.", None
    )

    def endpoint(self, name: str) -> ChatEndpoint:
        """The judge at an address."""
        from trimtab.evaluation import ChatEndpoint

        if self.judge_url is None:
            raise TrimtabError(f"--judge chat:{name} needs --judge-url")
        return ChatEndpoint(
            self.judge_url,
            name,
            self.judge_key_env,
            self.judge_concurrency,
            self.judge_timeout,
            prices=_prices(self.judge_prices),
        )


@dataclass(frozen=True, kw_only=True)
class Judges(AskedAt):
    """Who judges texts: any number of judges."""

    judge: Sequence[str] = option(
        "Who judges texts: phrases, harmbench:MODEL, polyguard:MODEL, local:MODEL (a chat model) "
        "or chat:NAME at --judge-url; repeat. The first local: or chat: compares answers in bpo.",
        (),
    )
    judge_template: Path | None = option(
        "HarmBench's prompt, with {behavior} and {generation}.", None
    )
    toxicity: str = option("Toxicity scorer: offline, detoxify, or a URL.", "offline")

    def __post_init__(self) -> None:
        if self.judge_url is not None and not any(spec.startswith("chat:") for spec in self.judge):
            raise TrimtabError("--judge-url needs the name of the model there: --judge chat:NAME")
        _prices(self.judge_prices)

    def judging(self, opened: Opened) -> Judging:
        """The judges; models among them are held as the model that is judged."""
        from trimtab.evaluation import (
            HARMBENCH_TEMPLATE,
            ChatJudge,
            HarmBenchJudge,
            Judging,
            LocalChat,
            PhraseJudge,
            PolyGuardJudge,
        )

        def model(name: str) -> Any:
            return open_beside(opened, name)

        template = HARMBENCH_TEMPLATE if self.judge_template is None else _read(self.judge_template)
        judges: list[Any] = []
        preference: Any = None
        for spec in dict.fromkeys(self.judge):
            kind, _, name = spec.partition(":")
            if spec == "phrases":
                judges.append(PhraseJudge())
            elif name and kind == "harmbench":
                judges.append(HarmBenchJudge(model(name), template))
            elif name and kind == "polyguard":
                judges.append(PolyGuardJudge(model(name)))
            elif name and kind in ("local", "chat"):
                chat = LocalChat(model(name)) if kind == "local" else self.endpoint(name)
                preference = preference or chat
                judges.append(ChatJudge(chat))
            else:
                raise TrimtabError(
                    f"--judge {spec}: known are phrases, harmbench:MODEL, polyguard:MODEL, "
                    "local:MODEL, chat:NAME"
                )
        return Judging(self.toxicity, tuple(judges), preference)


@dataclass(frozen=True, kw_only=True)
class ChatJudge(AskedAt):
    """The chat model that judges texts, where one does."""

    judge: str | None = option(
        "Who judges texts, where a recipe has them judged: local:MODEL (a chat model), or "
        "chat:NAME at --judge-url.",
        None,
    )

    def __post_init__(self) -> None:
        kind, _, name = (self.judge or "").partition(":")
        if self.judge is not None and not (name and kind in ("local", "chat")):
            raise TrimtabError(f"--judge {self.judge}: known are local:MODEL, chat:NAME")
        for item in fields(self):
            if item.name != "judge" and kind != "chat" and getattr(self, item.name) != item.default:
                flag = f"--{item.name.replace('_', '-')}"
                raise TrimtabError(f"{flag} is for a judge at an address: --judge chat:NAME")
        if kind == "chat" and self.judge_url is None:
            raise TrimtabError(f"--judge {self.judge} needs --judge-url")
        _prices(self.judge_prices)

    def chat(self, opened: Opened) -> Chat | None:
        """The chat model; one that is loaded here is held as the model that is judged."""
        from trimtab.evaluation import LocalChat

        kind, _, name = (self.judge or "").partition(":")
        if kind == "local":
            return LocalChat(open_beside(opened, name))
        return self.endpoint(name) if name else None


@dataclass(frozen=True, kw_only=True)
class Asked(Prompting):
    """The prompts that methods are compared with, and where their writer is."""

    writer: str | None = option(
        "Who writes a prompt from train pairs: self, local:MODEL, or chat:NAME at --writer-url.",
        None,
        record=False,
    )
    writer_url: str | None = option("Base URL of an OpenAI-compatible API.", None, record=False)

    def with_writer(self, opened: Opened, judges: Judges) -> Prompting:
        """The same with a writer that is there; its key is that of the judges."""
        from trimtab.evaluation import ChatEndpoint, LocalChat

        kind, _, name = (self.writer or "").partition(":")
        writer: Any = self.writer
        if name and kind == "local":
            writer = LocalChat(open_beside(opened, name), _WRITTEN)
        elif name and kind == "chat" and self.writer_url is not None:
            key = judges.judge_key_env
            writer = ChatEndpoint(self.writer_url, name, key, max_tokens=_WRITTEN)
        elif self.writer not in (None, "self"):
            raise TrimtabError(
                f"--writer {self.writer}: known are self, local:MODEL, and chat:NAME with "
                "--writer-url"
            )
        given = {item.name: getattr(self, item.name) for item in fields(Prompting)}
        return Prompting(**{**given, "writer": writer})


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How the settings of a method are measured, as the command line says it."""

    choosing: Choosing = Choosing()
    answering: Answering = Answering()
    judges: Judges = Judges()

    def measured(self, opened: Opened, engine: VLLM | None = None) -> Measured:
        """The same with judges that are there, and with what runs the model."""
        from trimtab.evaluation import AnsweredBy
        from trimtab.sweeps import Measured

        judging = self.judges.judging(opened)
        answering = AnsweredBy(**vars(self.answering), engine=engine)
        return Measured(choosing=self.choosing, answering=answering, judging=judging)


def costs(judging: Judging) -> dict[str, str]:
    """What each judge behind an address was asked, and at what price."""
    from trimtab.evaluation import ChatEndpoint

    chats = [getattr(judge, "chat", None) for judge in judging.judges]
    return {chat.name: str(chat.usage) for chat in chats if isinstance(chat, ChatEndpoint)}


def costs_as_json(judging: Judging) -> dict[str, Any]:
    """What judges add to a run's results: nothing where none is paid."""
    paid = costs(judging)
    return {"judges": paid} if paid else {}


def say_costs(judging: Judging) -> None:
    """What judges behind an address were asked, and what it cost."""
    for name, cost in costs(judging).items():
        console.print(f"judge {name}: {cost}", style="dim")


def say_cost(judge: Chat | None) -> None:
    """The same of one judge."""
    from trimtab.evaluation import ChatEndpoint

    if isinstance(judge, ChatEndpoint):
        console.print(f"judge {judge.name}: {judge.usage}", style="dim")


def _read(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except OSError as error:
        raise TrimtabError(f"cannot read the template {template}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{template} is not UTF-8 text") from error
