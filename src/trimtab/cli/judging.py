"""Options that say who judges texts, for every command that evaluates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.common import console
from trimtab.errors import TrimtabError
from trimtab.evaluation import (
    HARMBENCH_TEMPLATE,
    Chat,
    ChatEndpoint,
    ChatJudge,
    HarmBenchJudge,
    Judge,
    LocalChat,
    PhraseJudge,
    PolyGuardJudge,
)
from trimtab.model import load

_PANEL = "Judges"

Toxicity = Annotated[
    str,
    typer.Option(help="Toxicity scorer: offline, detoxify, or a URL.", rich_help_panel=_PANEL),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        help="Who judges texts: phrases, harmbench:MODEL, polyguard:MODEL, local:MODEL (a chat "
        "model) or chat:NAME at --judge-url; repeat. The first local: or chat: compares answers "
        "in bpo.",
        rich_help_panel=_PANEL,
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(help="Base URL of an OpenAI-compatible API.", rich_help_panel=_PANEL),
]
JudgeKeyEnv = Annotated[
    str,
    typer.Option(help="Environment variable that holds the API's key.", rich_help_panel=_PANEL),
]
JudgeConcurrency = Annotated[
    int, typer.Option(help="Calls under way at once.", rich_help_panel=_PANEL)
]
JudgeTimeout = Annotated[
    float, typer.Option(help="Seconds to wait for an answer.", rich_help_panel=_PANEL)
]
JudgePrices = Annotated[
    str | None,
    typer.Option(
        help="Prices per million tokens, read and written: 0.15,0.60.", rich_help_panel=_PANEL
    ),
]
JudgeTemplate = Annotated[
    Path | None,
    typer.Option(
        help="HarmBench's prompt, with {behavior} and {generation}.", rich_help_panel=_PANEL
    ),
]
#: Name, type and default of each, for commands whose options are put together.
JUDGE_OPTIONS: list[tuple[str, Any, Any]] = [
    ("judge", Judges, None),
    ("judge_url", JudgeUrl, None),
    ("judge_key_env", JudgeKeyEnv, "OPENAI_API_KEY"),
    ("judge_concurrency", JudgeConcurrency, 8),
    ("judge_timeout", JudgeTimeout, 60.0),
    ("judge_prices", JudgePrices, None),
    ("judge_template", JudgeTemplate, None),
]


@dataclass
class JudgeOptions:
    """What the options say, and the judges that come of them; `endpoints` are those that are
    called, which count what it costs."""

    judge: list[str] | None
    judge_url: str | None
    judge_key_env: str
    judge_concurrency: int
    judge_timeout: float
    judge_prices: str | None
    judge_template: Path | None
    endpoints: list[ChatEndpoint] = field(default_factory=list)

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> JudgeOptions:
        """Those among a command's options, which keeps the others."""
        return cls(**{name: options.pop(name) for name, _, _ in JUDGE_OPTIONS})

    def __post_init__(self) -> None:
        if self.judge_url is not None and not any(
            spec.startswith("chat:") for spec in self.judge or []
        ):
            raise TrimtabError("--judge-url needs the name of the model there: --judge chat:NAME")
        self._prices, self._template = _prices(self.judge_prices), _template(self.judge_template)

    def judges(self, dtype: str, device: str) -> tuple[list[Judge], Chat | None]:
        """The judges, and the chat model that compares answers."""

        def model(name: str) -> Any:
            return load(name, dtype=dtype, device=device)

        found: list[Judge] = []
        preference: Chat | None = None
        for spec in dict.fromkeys(self.judge or []):
            kind, _, name = spec.partition(":")
            if spec == "phrases":
                found.append(PhraseJudge())
            elif name and kind == "harmbench":
                found.append(HarmBenchJudge(model(name), self._template))
            elif name and kind == "polyguard":
                found.append(PolyGuardJudge(model(name)))
            elif name and kind in ("local", "chat"):
                chat = LocalChat(model(name)) if kind == "local" else self._endpoint(name)
                preference = preference or chat
                found.append(ChatJudge(chat))
            else:
                raise TrimtabError(
                    f"--judge {spec}: known are phrases, harmbench:MODEL, polyguard:MODEL, "
                    "local:MODEL, chat:NAME"
                )
        return found, preference

    def costs(self) -> dict[str, str]:
        """What each endpoint was asked, and at what price."""
        return {chat.name: str(chat.usage) for chat in self.endpoints}

    def as_json(self) -> dict[str, Any]:
        """What judges add to a run's results: nothing where none is paid."""
        return {"judges": self.costs()} if self.endpoints else {}

    def _endpoint(self, name: str) -> ChatEndpoint:
        if self.judge_url is None:
            raise TrimtabError(f"--judge chat:{name} needs --judge-url")
        endpoint = ChatEndpoint(
            self.judge_url,
            name,
            self.judge_key_env,
            self.judge_concurrency,
            self.judge_timeout,
            prices=self._prices,
        )
        self.endpoints.append(endpoint)
        return endpoint


def say_costs(judging: JudgeOptions) -> None:
    """What judges behind an address were asked, and what it cost."""
    for name, cost in judging.costs().items():
        console.print(f"judge {name}: {cost}", style="dim")


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


def _template(path: Path | None) -> str:
    if path is None:
        return HARMBENCH_TEMPLATE
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrimtabError(f"cannot read the template {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{path} is not UTF-8 text") from error
