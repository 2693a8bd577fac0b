"""Steerings on the hub, found by their tags and told by their cards, which are not trusted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.card import OWN, TAG
from trimtab.exchange.hub_client import REPO, api_of, asked
from trimtab.reports import Presented, Table
from trimtab.terminal import status


@dataclass(frozen=True)
class Listed:
    """A steering that is on the hub, as its card and the hub have it; "" and None where neither
    says it."""

    repo: str
    base_model: str
    model: str
    method: str
    dial: str
    likes: int | None
    downloads: int | None
    changed: str


@dataclass(frozen=True, repr=False)
class Listing(Presented):
    """What `search` found, those that were changed last first."""

    found: tuple[Listed, ...]
    more: bool

    @property
    def summary(self) -> str:
        """How many were found."""
        count = len(self.found)
        said = f"{count} steering{'' if count == 1 else 's'}"
        return f"the first {said} of more" if self.more else said

    def tables(self) -> list[Table]:
        """A row for each."""
        rows = [
            [
                one.repo, one.base_model or one.model, one.method, one.dial,
                "" if one.likes is None else one.likes,
                "" if one.downloads is None else one.downloads, one.changed[:10],
            ]
            for one in self.found
        ]  # fmt: skip
        heads = ["repository", "model", "method", "dial", "likes", "downloads", "changed"]
        return [Table("Steerings on the hub", heads, rows)]

    def as_json(self) -> dict[str, Any]:
        return {"steerings": [asdict(one) for one in self.found], "more": self.more}


def search(
    words: str = "",
    *,
    model: str | None = None,
    limit: int = 30,
    token: str | None = None,
    endpoint: str | None = None,
) -> Listing:
    """Steerings on the hub whose names have these words; with `model` those for one: by its id on
    the hub, or by the name that it had where they were made. At most `limit`. Raises TrimtabError.
    """
    if limit < 1:
        raise TrimtabError(f"limit is {limit}: it must be 1 or more")
    of_hub = model is not None and REPO.fullmatch(model) is not None
    tags = [TAG, "steering-vector", *([f"base_model:{model}"] if of_hub else [])]
    api = api_of(token, endpoint)

    def ask() -> Listing:
        listed = api.list_models(
            filter=tags,
            search=" ".join(words.split()) or None,
            sort="last_modified",
            expand=["cardData", "downloads", "lastModified", "likes"],
        )
        every = (_listed(each) for each in listed)
        wanted = (one for one in every if model is None or of_hub or one.model == model)
        found = tuple(islice(wanted, limit + 1))
        return Listing(found[:limit], len(found) > limit)

    with status("asking the hub"):
        return asked(api, "the list of steerings", ask)


def _listed(info: Any) -> Listed:
    card = info.card_data.to_dict() if info.card_data is not None else {}
    own = _mapping(card.get(OWN))
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    changed = info.last_modified
    return Listed(
        repo=shown(info.id),
        base_model=shown(base) if isinstance(base, str) else "",
        model=_word(_mapping(own.get("model")), "name"),
        method=_word(own, "method"),
        dial=_word(_mapping(own.get("dial")), "name"),
        likes=info.likes,
        downloads=info.downloads,
        changed="" if changed is None else changed.isoformat(timespec="seconds"),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _word(mapping: dict[str, Any], name: str) -> str:
    value = mapping.get(name)
    return shown(value) if isinstance(value, str) else ""
