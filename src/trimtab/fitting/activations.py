"""One pass over a contrast: for every site that is asked for, running statistics.

Each method says what it wants: a site, which token's activation stands for a text, and which
statistic of the two sides. `collect` runs the model once for all of them. It keeps no activations:
a hook picks the wanted tokens out of a batch, the statistics take them in, and they are gone, so
memory grows with sites and units, not with texts. Neither the LM head nor any block above the
highest wanted site is run.

A want may be the effect of scaling units instead of an activation (see gradients.py): the same pass
is then run back as well.

With a cache directory what is picked is also written there, batch by batch (see stored.py): a pass
that was killed goes on where it stopped, and a later one runs the model only for what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from trimtab.anatomy import Edit, Enough, Point, hooked, is_hooked, site_order
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, not_finite
from trimtab.fitting.differentiable import check_differentiable
from trimtab.fitting.effects import Effect, check_scored, effects_of
from trimtab.fitting.elsewhere import read_by
from trimtab.fitting.fields import Says
from trimtab.fitting.statistics import Sides
from trimtab.fitting.stored import StoredPass
from trimtab.model import LanguageModel
from trimtab.reading import Batch, Engine, Packed, batches, encode_contrast, packed, run_packed
from trimtab.terminal import progress

#: Whose activation stands for a text: its last token's, the mean over all its tokens, or the mean
#: over the tokens of its answer (what follows the prompt; paired contrasts only). A negative
#: number is a token counted from the end: -1 is the last, -2 the one before it.
Token = Annotated[
    Literal["last", "mean", "answer"] | Annotated[int, Field(lt=0)],
    Says("is {value!r}: known are last, mean, answer, and -1, -2 ... from the end"),
]


@dataclass(frozen=True)
class Pooled:
    """Stands in a `Want` in place of a token: the largest value of each number over some tokens of
    a text, their mean, or their sum. Over its answer's tokens (what follows the prompt; paired
    contrasts only), over all of them, or over the rest: all but the first, whose activations are
    huge in many models (a text of one token stands for itself)."""

    pool: Literal["max", "mean", "sum"]
    over: Literal["answer", "all", "rest"]

    def __str__(self) -> str:
        """For file names."""
        return f"{self.pool}.{self.over}"


@dataclass(frozen=True)
class Pick:
    """What is read of a text: a site, whose tokens stand for the text, and in which form.

    `read` maps activations [..., units] to what is wanted of them, before tokens are averaged; it
    has a `name` that no other map has. None takes them as they are. That of an `Effect` maps
    activations and gradients, which None multiplies.
    """

    site: str
    token: Token | Pooled | Effect
    read: Any = None

    @property
    def name(self) -> str:
        """For file names."""
        form = f".{self.read.name}" if self.read else ""
        return f"{self.site}.{self.token}{form}"

    def order(self) -> tuple[Any, str]:
        """Sort key: in the order in which a token passes the sites."""
        return site_order(self.site), self.name


@dataclass(frozen=True)
class Want:
    """One statistic of what is picked; equal wants are served once.

    `rows` limits it to some rows of the contrast.
    """

    site: str
    token: Token | Pooled | Effect
    statistic: type[Any]
    read: Any = None
    rows: frozenset[int] | None = None

    @property
    def pick(self) -> Pick:
        return Pick(self.site, -1 if self.token == "last" else self.token, self.read)


@dataclass(frozen=True)
class UnitLength:
    """Reads an activation as its direction: divided by its length."""

    name = "unit"

    def __call__(self, activation: Tensor) -> Tensor:
        return torch.nn.functional.normalize(activation.float(), dim=-1)


class Statistics(dict[Want, Any]):
    """What a pass has gathered, and what methods have made of it that others of their settings
    need too. `max_length` is that of the pass, `cache` the directory that keeps what the model was
    run for, `engine` what ran it in place of transformers."""

    def __init__(
        self,
        gathered: Mapping[Want, Any] | None = None,
        max_length: int | None = None,
        cache: Path | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(gathered or {})
        self.max_length = max_length
        self.cache = cache
        self.engine = engine
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], M]) -> M:
        """What `make` makes, made once for each key."""
        if key not in self._made:
            self._made[key] = make()
        found: M = self._made[key]
        return found

    def of(self, site: str, token: Token | Pooled | Effect, statistic: type[S], **more: Any) -> S:
        found: S = self[Want(site, token, statistic, **more)]
        return found


S = TypeVar("S")
M = TypeVar("M")


@torch.no_grad()
def collect(
    language_model: LanguageModel,
    contrast: Contrast,
    wants: Iterable[Want],
    *,
    max_length: int | None = None,
    cache: str | Path | None = None,
    engine: Engine | None = None,
) -> Statistics:
    """Run the model once over the contrast and return every wanted statistic.

    `max_length` is the longest text in tokens (default: what the model takes); prompts of longer
    ones are cut on the left, with a warning. `cache` is a directory that keeps what was read. An
    `engine` runs the model in place of transformers; it gives no gradients.
    """
    gathered = {want: want.statistic() for want in wants}
    wanted = Statistics(gathered, max_length, Path(cache) if cache else None, engine)
    if not wanted:
        return wanted
    if not contrast.paired:
        for want, statistic in wanted.items():
            if want.token == "answer" or getattr(want.token, "over", "") == "answer":
                raise TrimtabError(
                    f"{contrast.name} is unpaired, so its texts have no answers: take another "
                    "token rule (token mean or last), or give it pairs"
                )
            if statistic.needs_pairs:
                raise TrimtabError(
                    f"{contrast.name} is unpaired, and this method compares the two sides of a "
                    "pair: give it rows with prompt, positive and negative"
                )
    if engine is not None:
        _check_elsewhere(language_model, engine, wanted)
    every = encode_contrast(language_model, contrast, max_length)
    for want in wanted:
        _check_lengths(contrast.name, every, want)
    picks = sorted({want.pick for want in wanted}, key=Pick.order)
    shapes = {pick: (_sides_of(pick, every), _width(language_model, pick)) for pick in picks}
    rows = every
    if all(want.rows is not None for want in wanted):
        needed = frozenset().union(*(want.rows or () for want in wanted))
        rows = [row for row in every if row.index in needed]
    stored = None
    if cache:
        if is_hooked(language_model.model):
            raise TrimtabError(
                f"{language_model.name} is steered, and a cache keeps what it does unsteered: "
                "leave the cache out, or fit after the block"
            )
        name = "" if engine is None else engine.name
        stored = StoredPass(Path(cache), language_model, every, shapes, len(rows), name)
    labels = None
    if not contrast.paired:
        labels = torch.tensor([text.label == "positive" for text in contrast.texts])
    check_differentiable(
        language_model, (pick.site for pick in picks if isinstance(pick.token, Effect))
    )
    if engine is None:
        read = _read(language_model, rows, picks, stored)
    else:
        read = _read_elsewhere(language_model, engine, rows, picks, stored)
    with progress("reading activations", len(rows)) as advance:
        for indices, found in read:
            _check_finite(contrast.name, language_model, indices, wanted, found)
            for want, statistic in wanted.items():
                statistic.update(_sides(found[want.pick], indices, labels, want.rows))
            advance(len(indices))
    return wanted


def _read(
    language_model: LanguageModel,
    rows: Sequence[Packed],
    picks: Sequence[Pick],
    stored: StoredPass | None,
) -> Iterator[tuple[Tensor, dict[Pick, Tensor]]]:
    """What is picked of rows, [rows, sides, units], a batch at a time, with their numbers."""
    shared = packed(language_model, rows)
    for batch in batches(rows, language_model.batch_tokens, shared):
        indices = torch.tensor([row.index for row in batch.rows])
        found = stored.read(indices, language_model.device) if stored else {}
        missing = [pick for pick in picks if pick not in found]
        if missing:
            fresh = _run(language_model, batch, missing)
            if stored:
                stored.write(indices, fresh)
                # On one device, whether it was read just now or earlier.
                fresh = {pick: x.to(language_model.device) for pick, x in fresh.items()}
            found |= fresh
        yield indices, found


def _read_elsewhere(
    language_model: LanguageModel,
    engine: Engine,
    rows: Sequence[Packed],
    picks: Sequence[Pick],
    stored: StoredPass | None,
) -> Iterator[tuple[Tensor, dict[Pick, Tensor]]]:
    """The same of an engine, a row at a time, as they come."""
    device = language_model.device
    asked = []
    for row in rows:
        index = torch.tensor([row.index])
        found = stored.read(index, device) if stored else {}
        missing = [pick for pick in picks if pick not in found]
        if missing:
            asked.append((row, missing))
        else:
            yield index, found
    for row, fresh in read_by(engine, asked, device):
        index = torch.tensor([row.index])
        found = stored.read(index, device) if stored and len(fresh) < len(picks) else {}
        if stored:
            stored.write(index, fresh)
        yield index, found | fresh


def _check_elsewhere(language_model: LanguageModel, engine: Engine, wants: Iterable[Want]) -> None:
    """Refuse what an engine does not read, before it starts."""
    if is_hooked(language_model.model):
        raise TrimtabError(
            f"{language_model.name} is steered, and {engine.name} reads it as it is: leave the "
            "engine out, or fit after the block"
        )
    if any(isinstance(want.token, Effect) for want in wants):
        raise TrimtabError(f"effects are gradients, which {engine.name} does not give")
    engine.prepare_sites(sorted({want.site for want in wants}))


def _check_lengths(name: str, rows: Sequence[Packed], want: Want) -> None:
    """Refuse a text that has no token at the wanted place, before the model has run for an hour."""
    token = want.pick.token
    if isinstance(token, Effect):
        check_scored(name, rows)
    if not isinstance(token, int):
        return
    for row in rows:
        length = row.common + min(row.sides)
        if length < -token and (want.rows is None or row.index in want.rows):
            raise TrimtabError(
                f"{name}, row {row.index + 1}: a text has {length} tokens, so there is none at "
                f"{token} from the end"
            )


def _check_finite(
    name: str,
    language_model: LanguageModel,
    indices: Tensor,
    wants: Iterable[Want],
    read: Mapping[Pick, Tensor],
) -> None:
    """Refuse activations that are not numbers: what is made of them would be none either."""
    device = language_model.device
    # One question to the device for all sites together.
    finite = torch.stack([picked.isfinite().all().to(device) for picked in read.values()])
    if finite.all():
        return
    for want in sorted(wants, key=lambda want: want.pick.order()):
        good = read[want.pick].isfinite().all(-1).all(-1).tolist()
        for index, fine in zip(indices.tolist(), good, strict=True):
            if not fine and (want.rows is None or index in want.rows):
                where = f"{name}, row {index + 1}: the activation at {want.site} is not finite"
                raise not_finite(where, language_model.dtype)


def _sides_of(pick: Pick, rows: Sequence[Packed]) -> int:
    """How many things are picked of a row; the effect on a pair is one."""
    return 1 if isinstance(pick.token, Effect) else len(rows[0].sides)


def _width(language_model: LanguageModel, pick: Pick) -> int:
    """How many numbers a pick has per text."""
    width: int = language_model.anatomy.read_point(pick.site).width
    return int(getattr(pick.read, "width", width))


def _sides(
    picked: Tensor, indices: Tensor, labels: Tensor | None, rows: frozenset[int] | None
) -> Sides:
    """What was picked, [rows, sides, units], as the two sides of the contrast; one number of a pair
    is on the positive side."""
    if rows is not None:
        kept = torch.tensor([index in rows for index in indices.tolist()])
        picked, indices = picked[kept.to(picked.device)], indices[kept]
    if labels is None:
        both = slice(None) if picked.shape[1] > 1 else slice(0)
        return Sides(picked[:, 0], picked[both, -1], indices, indices[both])
    positive = labels[indices]
    mask = positive.to(picked.device)
    return Sides(picked[mask, 0], picked[~mask, 0], indices[positive], indices[~positive])


def _run(language_model: LanguageModel, batch: Batch, picks: list[Pick]) -> dict[Pick, Tensor]:
    """One batch: hooks pick the wanted tokens of each site, [rows, sides, units] in float32."""
    effects = [pick for pick in picks if isinstance(pick.token, Effect)]
    found: dict[Pick, Tensor] = {}
    activations = [pick for pick in picks if pick not in effects]
    readers = _readers(batch, activations, found, language_model.device)
    if effects:
        found |= effects_of(language_model, batch, effects, readers)
    else:
        _run_forward(language_model, batch, readers)
    for pick in picks:
        if pick not in found:
            raise TrimtabError(
                f"{pick.site} was not computed when {language_model.name} ran: its code, or a "
                "kernel that replaces it, does not go through the module that is read there"
            )
    return found


def _run_forward(language_model: LanguageModel, batch: Batch, readers: Mapping[str, Edit]) -> None:
    """Run a batch up to the highest site that is read."""
    anatomy, last = language_model.anatomy, max(readers, key=site_order)

    def stop(activation: Tensor) -> None:
        readers[last](activation)
        raise Enough

    edits: dict[Point, Edit] = {
        anatomy.read_point(site): stop if site == last else reader
        for site, reader in readers.items()
    }
    with torch.inference_mode(), hooked(anatomy.body, edits), suppress(Enough):
        run_packed(batch, language_model)


def _readers(
    batch: Batch, picks: list[Pick], found: dict[Pick, Tensor], device: torch.device
) -> dict[str, Edit]:
    """Of each site what puts its picks into `found` when it sees the activation."""
    by_site: dict[str, list[Pick]] = {}
    for pick in picks:
        by_site.setdefault(pick.site, []).append(pick)
    pickers = {token: _picker(batch, token, device) for token in {pick.token for pick in picks}}

    def reader(site: str) -> Edit:
        def read(activation: Tensor) -> None:
            forms: dict[Any, Tensor] = {None: activation}
            for pick in by_site[site]:
                picker = pickers[pick.token]
                if isinstance(pick.token, int):  # one token: there is no need to read the others
                    picked = picker(activation)
                    found[pick] = pick.read(picked) if pick.read else picked
                    continue
                if pick.read not in forms:
                    forms[pick.read] = pick.read(activation)
                found[pick] = picker(forms[pick.read])

        return read

    return {site: reader(site) for site in by_site}


def _picker(batch: Batch, token: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Takes from [lines, tokens, units] what stands for each side: [rows, sides, units]."""
    place, lines = batch.place, batch.lines  # [rows, sides, longest side], [rows, sides]
    lengths = (place >= 0).sum(-1)
    if isinstance(token, int):
        # Too short are only rows that this pick is not wanted of: any token will do.
        steps = (lengths + token).clamp(min=0)
        columns = place.gather(-1, steps.unsqueeze(-1)).squeeze(-1).to(device)

        def one(activation: Tensor) -> Tensor:
            device = activation.device
            return activation[lines.to(device), columns.to(device)].float()

        return one
    taken = _taken(batch, token.over if isinstance(token, Pooled) else token, lengths)
    if isinstance(token, Pooled) and token.pool == "max":
        return _largest(place, lines, taken)
    weights = torch.zeros(*lengths.shape, batch.tokens.shape[1])
    weights.scatter_add_(-1, place.clamp(min=0), taken.float())
    if not (isinstance(token, Pooled) and token.pool == "sum"):
        weights = weights / taken.sum(-1, keepdim=True)
    weights = weights.to(device)
    # A line is a row, with all its sides, or a side.
    by_line = weights.view(len(batch.tokens), -1, weights.shape[-1])

    def summed(activation: Tensor) -> Tensor:
        sums = torch.bmm(by_line.to(activation.device), activation.float())
        return sums.view(*lines.shape, -1)

    return summed


def _taken(batch: Batch, over: str, lengths: Tensor) -> Tensor:
    """Which tokens of each side stand for it, [rows, sides, longest side]; `over` is mean or
    all, answer, or rest."""
    start = torch.zeros_like(lengths)
    if over == "answer":
        start = torch.tensor([row.answers for row in batch.rows])
        start = torch.minimum(start, lengths - 1)  # an empty answer: its prompt's last token
    if over == "rest":
        start = (lengths - 1).clamp(max=1)
    steps = torch.arange(batch.place.shape[-1])
    return (steps >= start[..., None]) & (steps < lengths[..., None])


def _largest(place: Tensor, lines: Tensor, taken: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes the largest of each number over the tokens that are taken of each side."""

    def largest(activation: Tensor) -> Tensor:
        rows = [
            [
                activation[lines[row, side], place[row, side][taken[row, side]]].amax(0)
                for side in range(place.shape[1])
            ]
            for row in range(len(place))
        ]
        return torch.stack([torch.stack(sides) for sides in rows]).float()

    return largest
