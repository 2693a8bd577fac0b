"""What a steering does to the next token over its whole dial.

A curve has as many dials as asked for, but the model runs at few of them: the grid is refined where
a cubic spline through the dials so far misses the probability of any token of the vocabulary, and
read off the spline elsewhere. The error that is tolerated is stated with the curve. A text of
several tokens is followed as a sequence: its probability is that of all of them in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.dials import Turning, divergence, entropy, idle_dial
from trimtab.errors import TrimtabError
from trimtab.fitting import Method
from trimtab.methods import METHODS
from trimtab.model import LanguageModel, batches_by_length, extended, with_images
from trimtab.options import Bounds, Tracing, flat
from trimtab.reading import last_logits
from trimtab.reports import Presented, Table, change_text, number_text, value_text
from trimtab.steering import Steering
from trimtab.terminal import progress

#: KL and entropy may be off by this many nats, or this share of their size.
_NATS, _SHARE = 0.01, 0.01
#: Dials of the coarse grid that a curve begins with; shorter curves are measured everywhere.
_COARSE = 33
#: Tokens count that are ever more probable than this share of the tolerance, and than this.
_LIVE, _NEVER = 0.25, 1e-6
#: Rows of the table of a curve.
_SHOWN = 11


@dataclass(frozen=True, repr=False)
class TokenCurve:
    """One token: its probability minus the unsteered one, [dials] in float64, mean over prompts.

    `runs` [runs, dials] are the same of steerings fitted on resampled contrasts; `log_odds` is how
    much likelier the token is after a contrast's positive texts than after its negative ones.
    Where a text of several tokens is followed, these are its `pieces` with their `ids`, `id` is the
    first of them, and every figure is that of all pieces in turn.
    """

    token: str
    id: int
    base_p: float
    delta_p: Tensor
    runs: Tensor | None = None
    log_odds: float | None = None
    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()

    @property
    def farthest(self) -> int:
        """The place of the dial at which its probability is farthest from the unsteered one."""
        return int(self.delta_p.abs().argmax())

    def __repr__(self) -> str:
        most = change_text(float(self.delta_p[self.farthest]), "prefers")
        return f"<TokenCurve of {self.token!r}: {most} at most>"


@dataclass(frozen=True, repr=False)
class Curve(Presented):
    """The next token over the dial, as a mean over `prompts` prompts.

    `dials` rise, and the dial that does nothing is among them; at `measured` ones the model ran
    (for at least one prompt), the others are within `tolerance` in probability. `kl` is
    KL(unsteered || steered) and `entropy` the entropy of the steered distribution, [dials] in nats.
    `target` is the summed probability of the tokens; `chosen` says how they were, where they were
    not named.
    """

    steering: Steering
    prompts: int
    dials: Tensor
    measured: Tensor
    tokens: tuple[TokenCurve, ...]
    target: Tensor
    kl: Tensor
    entropy: Tensor
    base_entropy: float
    tolerance: float
    passes: int = field(default=0)  # (prompt, dial) pairs at which the model ran
    chosen: str = ""

    @property
    def summary(self) -> str:
        """One sentence: the token that changes most, where, and how far the rest has moved."""
        unit, name = self.steering.dial.unit, self.steering.dial.name
        most = max(self.tokens, key=lambda token: float(token.delta_p.abs().max()))
        place = most.farthest
        return (
            f"From {name} {self.dials[0]:g}{unit} to {self.dials[-1]:g}{unit}, {most.token!r} "
            f"changes most: {change_text(float(most.delta_p[place]), 'prefers')} in probability at "
            f"{self.dials[place]:.4g}{unit}, where KL is {number_text(float(self.kl[place]))} nats "
            f"(mean over {self.prompts} prompt{'s' if self.prompts > 1 else ''})."
        )

    def tables(self) -> list[Table]:
        """Each token where it changes most, and what the whole distribution does over the dial."""
        tokens = [
            [
                repr(token.token),
                value_text(token.base_p, "prefers"),
                change_text(float(token.delta_p[token.farthest]), "prefers"),
                number_text(float(self.dials[token.farthest])),
                "" if token.log_odds is None else number_text(token.log_odds, "+"),
            ]
            for token in self.tokens
        ]
        dial = (
            f"{self.steering.dial.name}{self.steering.dial.unit and ', '}{self.steering.dial.unit}"
        )
        heads = ["token", "unsteered", "largest change", f"at {dial}", "log-odds in the contrast"]
        places = np.linspace(0, len(self.dials) - 1, min(_SHOWN, len(self.dials))).round()
        whole = [
            [number_text(float(each[int(i)])) for each in (self.dials, self.kl, self.entropy)]
            for i in places
        ]
        return [
            Table("Next tokens", heads, tokens).without_empty_columns(),
            Table("The whole distribution", [dial, "KL, nats", "entropy, nats"], whole),
        ]

    def plot(self, ax: Any = None) -> Any:
        """The change of each token's probability over the dial, and the sweet spot: on the
        matplotlib axes `ax` or those of a new figure; they are returned."""
        from trimtab.strength.pictures import plot_tokens

        return plot_tokens(self, ax)

    def as_json(self) -> dict[str, Any]:
        """What `trimtab strength curve --json` prints as `curve`."""
        return {
            "steering": self.steering.label,
            "dial": {"name": self.steering.dial.name, "unit": self.steering.dial.unit},
            "prompts": self.prompts,
            "dials": self.dials.tolist(),
            "measured": self.measured.tolist(),
            "tolerance": self.tolerance,
            "passes": self.passes,
            "tokens": [
                {
                    "token": token.token,
                    "id": token.id,
                    "ids": list(token.ids or (token.id,)),
                    "base_p": token.base_p,
                    "delta_p": token.delta_p.tolist(),
                    "log_odds": token.log_odds,
                    "sd": None if token.runs is None else token.runs.std(0).tolist(),
                }
                for token in self.tokens
            ],
            "chosen": self.chosen,
            "target": self.target.tolist(),
            "kl": self.kl.tolist(),
            "entropy": self.entropy.tolist(),
            "base_entropy": self.base_entropy,
        }


@flat
def curve(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    *,
    tracing: Tracing = Tracing(),
    bounds: Bounds = Bounds(),
    chat: bool | None = None,
    resamples: Sequence[Steering] = (),
    contrast: Contrast | None = None,
    force: bool = False,
) -> Curve:
    """Follow the next token after prompts over the dial, from one end of `span` (default: the
    dial's range) to the other.

    `tokens` are the ones to show, as texts or ids (a text of several tokens is followed as a
    sequence), or how many are chosen. `choose` says which these are: those that gain most while KL
    and entropy keep to their `bounds` (gain), or the most probable at the end that is farther from
    the dial that does nothing (end).
    `tolerance` 0 runs the model at every dial. `resamples` are steerings fitted on resampled
    contrasts (`resampled`), whose curves give the error bars; with `contrast` tokens get their
    log-odds.
    """
    wanted = language_model.fitting(language_model.prompts(prompts, chat))
    if not wanted:
        raise TrimtabError("there is no prompt to draw a curve for")
    tokens, tolerance = tracing.tokens, tracing.tolerance
    dials = _grid(steering, tracing.span, tracing.points)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise TrimtabError(f"the tolerance must be 0 or more, not {tolerance}")
    shown = [] if isinstance(tokens, int) else sequences(language_model, tokens)
    _check_room(language_model, wanted, shown)

    def read(one: Steering, what: str) -> list[_Read]:
        """The prompts under a steering, with whatever is shown by then."""
        given = one, dials, shown, tolerance, force
        return [_Read.of(language_model, text, *given) for text in _shown(wanted, what)]

    found, chosen = read(steering, "turning the dial"), ""
    followed = [one.next_token for one in found]
    if isinstance(tokens, int):
        ids, chosen = _choose(followed, steering, dials, tracing, bounds)
        shown = [(token,) for token in ids]
    runs = [_mean_p(found, shown)]
    for number, other in enumerate(resamples, 1):
        runs.append(_mean_p(read(other, f"resample {number}"), shown))
    odds = None if contrast is None else _log_odds(language_model, contrast, shown)
    base = torch.stack([one.base(shown) for one in found]).mean(0)
    drawn = []
    for place, ids_shown in enumerate(shown):
        rises = torch.stack([run[:, place] for run in runs]) - base[place]
        drawn.append(
            TokenCurve(
                language_model.tokenizer.decode(ids_shown),
                ids_shown[0],
                float(base[place]),
                rises[0],
                rises[1:] if len(rises) > 2 else None,
                None if odds is None else odds[place],
                ids_shown,
                tuple(language_model.tokenizer.decode([token]) for token in ids_shown),
            )
        )
    return Curve(
        steering,
        len(wanted),
        torch.tensor(dials, dtype=torch.float64),
        torch.stack([one.measured for one in followed]).any(0),
        tuple(drawn),
        _summed(runs[0], shown),
        torch.stack([one.kl for one in followed]).mean(0),
        torch.stack([one.entropy for one in followed]).mean(0),
        float(torch.stack([one.base_entropy for one in followed]).mean()),
        tolerance,
        sum(int(one.measured.sum()) for one in followed),
        chosen,
    )


def sequences(language_model: LanguageModel, tokens: Sequence[str | int]) -> list[tuple[int, ...]]:
    """The ids of each token: itself, or all tokens of a text as it stands."""
    if isinstance(tokens, str):
        raise TrimtabError("tokens must be a list: write [token]")
    found: list[tuple[int, ...]] = []
    vocabulary = language_model.model.get_output_embeddings().weight.shape[0]
    for token in tokens:
        ids: list[int] = []
        if isinstance(token, str):
            ids = language_model.tokenizer(token, add_special_tokens=False)["input_ids"]
        else:
            ids = [token]
        if not ids:
            raise TrimtabError(f"{token!r} has no token")
        for one in ids:
            if not 0 <= one < vocabulary:
                raise TrimtabError(f"there is no token {one}: {vocabulary} are known")
        found.append(tuple(ids))
    if not found:
        raise TrimtabError("there is no token to show")
    return list(dict.fromkeys(found))


def _check_room(
    language_model: LanguageModel, texts: Sequence[Sequence[int]], shown: Sequence[tuple[int, ...]]
) -> None:
    """Refuse what is longer than the model takes with the pieces of a sequence after it."""
    more = max((len(ids) for ids in shown), default=1) - 1
    longest = max(map(len, texts))
    if longest + more > language_model.max_length:
        raise TrimtabError(
            f"a prompt of {longest} tokens and {more} pieces of a token exceed the "
            f"{language_model.max_length} tokens that {language_model.name} takes: shorten it"
        )


def _shown(texts: Sequence[Sequence[int]], what: str) -> Any:
    """The texts, with a progress bar."""
    with progress(what, len(texts)) as advance:
        for text in texts:
            yield text
            advance(1)


def _grid(steering: Steering, span: tuple[float, float] | None, points: int) -> list[float]:
    """Evenly spaced dials, and the one that does nothing where it lies between them."""
    low, high = steering.dial.range if span is None else span
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise TrimtabError(f"a curve goes from a lower to a higher dial, not from {low} to {high}")
    if points < 2:
        raise TrimtabError(f"a curve needs 2 points or more, not {points}")
    dials = set(np.linspace(low, high, points).tolist())
    idle = idle_dial(steering)
    if idle is not None and low <= idle <= high:
        near = min(dials, key=lambda dial: abs(dial - idle))
        if abs(near - idle) < 1e-9 * (high - low):  # the same but for rounding
            dials.remove(near)
        dials.add(idle)
    return sorted(dials)


# -- one prompt -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Followed:
    """One prompt over the grid: probabilities [dials, live] of the tokens that are ever probable
    (or asked for), and what is computed from whole distributions."""

    live: Tensor
    p: Tensor
    base_p: Tensor  # [vocabulary]
    kl: Tensor
    entropy: Tensor
    base_entropy: Tensor
    measured: Tensor

    def of(self, tokens: Sequence[int]) -> Tensor:
        """[dials, tokens]; a token that is never probable stays at its unsteered probability."""
        place = {token: i for i, token in enumerate(self.live.tolist())}
        columns = self.base_p[list(tokens)].double().repeat(len(self.p), 1)
        for i, token in enumerate(tokens):
            if token in place:
                columns[:, i] = self.p[:, place[token]]
        return columns


@dataclass(frozen=True)
class _Read:
    """One prompt over the grid, and what follows the first pieces of the sequences, by these."""

    after: dict[tuple[int, ...], _Followed]

    @classmethod
    def of(
        cls,
        language_model: LanguageModel,
        text: Sequence[int],
        steering: Steering,
        dials: Sequence[float],
        shown: Sequence[tuple[int, ...]],
        tolerance: float,
        force: bool,
    ) -> _Read:
        """Pieces are read as if the model had written them."""
        after = {}
        for prefix, asked in _prefixes(shown).items():
            whole = extended(text, prefix)
            turning = Turning(language_model, steering, [whole], force=force, given=[len(text)])
            after[prefix] = _follow(turning, dials, asked, tolerance)
        return cls(after)

    @property
    def next_token(self) -> _Followed:
        """What comes right after the prompt."""
        return self.after[()]

    def p(self, shown: Sequence[tuple[int, ...]]) -> Tensor:
        """Probabilities [dials, shown] in float64."""
        return torch.stack(
            [
                torch.stack([one.of([token])[:, 0] for one, token in self._steps(ids)]).prod(0)
                for ids in shown
            ],
            1,
        )

    def base(self, shown: Sequence[tuple[int, ...]]) -> Tensor:
        """The same without steering, [shown]."""
        return torch.stack(
            [
                torch.stack([one.base_p[token].double() for one, token in self._steps(ids)]).prod(0)
                for ids in shown
            ]
        )

    def _steps(self, ids: tuple[int, ...]) -> list[tuple[_Followed, int]]:
        return [(self.after[ids[:place]], token) for place, token in enumerate(ids)]


def _prefixes(shown: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """What is read on from, and which tokens are asked for there."""
    found: dict[tuple[int, ...], list[int]] = {(): []}
    for ids in shown:
        for place, token in enumerate(ids):
            found.setdefault(ids[:place], []).append(token)
    return found


def _follow(
    turning: Turning, dials: Sequence[float], asked: Sequence[int], tolerance: float
) -> _Followed:
    nodes = _Nodes(turning, dials, asked, tolerance)
    everywhere = list(range(len(dials)))
    if tolerance == 0 or len(dials) <= 2 * _COARSE:
        nodes.measure(everywhere)
    else:
        nodes.measure(np.linspace(0, len(dials) - 1, _COARSE).round().astype(int).tolist())
        nodes.refine()
    values = nodes.at(everywhere)
    measured = torch.zeros(len(dials), dtype=torch.bool)
    measured[nodes.known] = True
    return _Followed(
        nodes.live,
        values[:, 2:],
        turning.base[0].float().exp().cpu(),
        values[:, 0],
        values[:, 1],
        entropy(turning.base[0]).cpu(),
        measured,
    )


class _Nodes:
    """The dials of a grid (by their index) at which the model ran, and a spline through them.

    Columns of what is read off it: KL, entropy, and the probabilities of the live tokens.
    """

    def __init__(
        self, turning: Turning, dials: Sequence[float], asked: Sequence[int], tolerance: float
    ) -> None:
        self.turning, self.dials, self.tolerance = turning, dials, tolerance
        self._rows: dict[int, Tensor] = {}  # probabilities, [vocabulary] in float32
        self._nats: dict[int, Tensor] = {}  # KL and entropy
        base = turning.base[0]
        self._largest = base.float().exp().cpu()
        self._asked = torch.tensor(list(asked), dtype=torch.long)
        idle = idle_dial(turning.steering)
        if idle is not None and idle in dials:  # has run already, as the unsteered model
            place = dials.index(idle)
            self._rows[place] = self._largest
            self._nats[place] = torch.stack(
                (base.new_zeros((), dtype=torch.float64), entropy(base))
            ).cpu()

    @property
    def known(self) -> list[int]:
        return sorted(self._rows)

    @property
    def live(self) -> Tensor:
        """Tokens that are more probable somewhere than the error that is tolerated."""
        ever = self._largest > max(self.tolerance * _LIVE, _NEVER)
        ever[self._asked] = True
        return ever.nonzero().flatten()

    def measure(self, indices: Sequence[int]) -> None:
        """Run the model at these dials, where it has not."""
        indices = [i for i in indices if i not in self._rows]
        with progress("running dials", len(indices)) as advance:
            self._measure(indices, advance)

    def _measure(self, indices: Sequence[int], advance: Callable[[int], object]) -> None:
        base = self.turning.base
        for places, log_p in self.turning.log_p(
            [0] * len(indices), [self.dials[i] for i in indices]
        ):
            advance(len(places))
            nats = torch.stack((divergence(base, log_p), entropy(log_p)), 1).cpu()
            p = log_p.float().exp().cpu()
            if not torch.isfinite(nats).all():
                raise TrimtabError(
                    f"the model's numbers overflow at dials like {self.dials[indices[places[0]]]:g}"
                    ": try --dtype float32, or a smaller range"
                )
            self._largest = torch.maximum(self._largest, p.amax(0))
            for place, row, pair in zip(places, p, nats, strict=True):
                self._rows[indices[place]], self._nats[indices[place]] = row, pair

    def refine(self) -> None:
        """Halve intervals until the spline foretells what is measured in the middle of each.

        The middles then join the spline, which makes it about sixteen times as exact there.
        """
        intervals = list(zip(self.known, self.known[1:], strict=False))
        while intervals := [(i, j) for i, j in intervals if j - i > 1]:
            middles = [(i + j) // 2 for i, j in intervals]
            before = self.known
            self.measure(middles)
            live = self.live  # of all that is known now
            foretold = self._spline(before, live, middles)
            found = self._columns(middles, live)
            off = (foretold - found).abs()
            bad = off[:, 2:].amax(1) > self.tolerance
            allowed = torch.maximum(torch.tensor(_NATS), _SHARE * found[:, :2].abs())
            bad |= (off[:, :2] > allowed).any(1)
            intervals = [
                half
                for (i, j), middle, is_bad in zip(intervals, middles, bad.tolist(), strict=True)
                if is_bad
                for half in ((i, middle), (middle, j))
            ]

    def at(self, indices: Sequence[int]) -> Tensor:
        """What was measured, or what the spline says: [indices, 2 + live] in float64."""
        live, known = self.live, self.known
        values = self._spline(known, live, indices)
        place = {index: i for i, index in enumerate(indices)}
        values[[place[index] for index in known]] = self._columns(known, live)
        values[:, 2:].clamp_(0, 1)
        values[:, :2].clamp_(min=0)
        return values

    def _spline(self, known: Sequence[int], live: Tensor, indices: Sequence[int]) -> Tensor:
        at = np.array(self.dials)
        through = CubicSpline(at[list(known)], self._columns(known, live).numpy(), axis=0)
        return torch.from_numpy(through(at[list(indices)]))

    def _columns(self, indices: Sequence[int], live: Tensor) -> Tensor:
        rows = [torch.cat((self._nats[i], self._rows[i][live].double())) for i in indices]
        return torch.stack(rows)


# -- which tokens ---------------------------------------------------------------------------------


def _choose(
    followed: Sequence[_Followed],
    steering: Steering,
    dials: Sequence[float],
    tracing: Tracing,
    bounds: Bounds,
) -> tuple[list[int], str]:
    """As many tokens as are wanted, and how they were chosen, in words."""
    count = tracing.tokens
    assert isinstance(count, int)
    if count < 1:
        raise TrimtabError(f"a curve shows 1 token or more, not {count}")
    live = torch.cat([one.live for one in followed]).unique()
    p = torch.stack([one.of(live.tolist()) for one in followed]).mean(0)
    idle, unit = idle_dial(steering), steering.dial.unit
    why = "the steering does nothing at no dial of the curve"
    if tracing.choose == "gain" and idle is not None and idle in dials:
        middle = dials.index(idle)
        kl, nats, base = (
            torch.stack([getattr(one, name) for one in followed]).mean(0)
            for name in ("kl", "entropy", "base_entropy")
        )
        for step in (1, -1):
            last = farthest(kl, nats / base, bounds, middle, step)
            first, end = sorted((middle, last))
            gains = p[first : end + 1].amax(0) - p[middle]
            if float(gains.max()) > max(tracing.tolerance, 1e-9):
                ids = _highest(live, gains, count)
                reach = f"from {dials[middle]:g} to {dials[last]:.4g}{unit}"
                return ids, (
                    f"the tokens are the {len(ids)} that gain most {reach}, where KL and entropy "
                    "keep to their bounds"
                )
        why = "none gains at a dial of the curve at which KL and entropy keep to their bounds"
    end = -1 if abs(dials[-1] - (idle or 0)) >= abs(dials[0] - (idle or 0)) else 0
    ids = _highest(live, p[end], count)
    said = f"the tokens are the {len(ids)} most probable at {dials[end]:.4g}{unit}, the far end"
    return ids, "" if tracing.choose == "end" else f"{said}: {why}"


def _highest(ids: Tensor, values: Tensor, count: int) -> list[int]:
    chosen: list[int] = ids[values.argsort(descending=True, stable=True)[:count]].tolist()
    return chosen


def farthest(kl: Tensor, entropy: Tensor, bounds: Bounds, middle: int, step: int) -> int:
    """How far KL and entropy (as a share of the unsteered one), [dials], stay within their bounds
    from one dial on, step by step: the place of the last dial."""
    allowed = kl <= bounds.max_kl
    allowed &= (entropy >= bounds.min_entropy) & (entropy <= bounds.max_entropy)
    last = middle
    while 0 <= last + step < len(kl) and bool(allowed[last + step]):
        last += step
    return last


def _mean_p(found: Sequence[_Read], shown: Sequence[tuple[int, ...]]) -> Tensor:
    """[dials, shown], mean over prompts."""
    return torch.stack([one.p(shown) for one in found]).mean(0)


def _summed(p: Tensor, shown: Sequence[tuple[int, ...]]) -> Tensor:
    """How probable any of what is shown is, [dials]; what continues another is in it already."""
    own = [
        place
        for place, ids in enumerate(shown)
        if not any(other != ids and ids[: len(other)] == other for other in shown)
    ]
    return p[:, own].sum(1)


# -- the contrast ---------------------------------------------------------------------------------


def method_of(steering: Steering) -> Method:
    """The method that a steering was fitted with, with its hyperparameters."""
    if steering.method not in METHODS:
        raise TrimtabError(f"no method {steering.method!r}: known are {', '.join(METHODS)}")
    try:
        return METHODS[steering.method](**steering.hyperparameters)
    except TypeError as error:
        raise TrimtabError(
            f"this {steering.method} steering has hyperparameters that the method does not: {error}"
        ) from error


def resampled(
    language_model: LanguageModel,
    method: Method,
    contrast: Contrast,
    times: int = 5,
    seed: int = 0,
) -> list[Steering]:
    """The method fitted again on contrasts whose train rows are drawn with replacement."""
    if times < 2:
        raise TrimtabError(f"error bars need 2 resamples or more, not {times}")
    seeds = range(seed * times, (seed + 1) * times)  # another seed shares none of them
    return [method.fit(language_model, contrast.resample(own), measure=False) for own in seeds]


@torch.no_grad()
def token_log_odds(
    language_model: LanguageModel,
    contrast: Contrast,
    max_length: int = 100,
    after: Sequence[int] = (),
) -> Tensor:
    """Of every token: its mean log-probability after the positive texts of a contrast minus that
    after the negative ones, [vocabulary] in float64 nats (the measured counterpart of Def. 3.2 of
    "Towards Understanding Steering Strength"). Texts count up to `max_length` tokens, and the
    tokens `after` follow each of them.
    """
    train = contrast.train
    if train.paired:
        prompts = [pair.prompt for pair in train.pairs]
        sides = [
            language_model.encode(prompts, [pair.positive for pair in train.pairs]),
            language_model.encode(prompts, [pair.negative for pair in train.pairs]),
        ]
    else:
        sides = [
            language_model.encode([row.text for row in train.texts if row.label == label])
            for label in ("positive", "negative")
        ]
    means = []
    with progress("reading log-odds", sum(map(len, sides))) as advance:
        for side in sides:
            texts = [extended(text[:max_length], after) for text in side]
            lengths, total = [len(text) for text in texts], torch.zeros(())
            most, apart = language_model.batch_tokens, with_images(texts)
            for rows in batches_by_length(lengths, most, apart=apart):
                logits = last_logits(language_model, [texts[i] for i in rows])
                total = total + logits.double().log_softmax(-1).sum(0).cpu()
                advance(len(rows))
            means.append(total / len(texts))
    return means[0] - means[1]


def _log_odds(
    language_model: LanguageModel, contrast: Contrast, shown: Sequence[tuple[int, ...]]
) -> list[float]:
    """Log-odds of tokens; those of a sequence are the sum over its pieces."""
    after = {
        prefix: token_log_odds(language_model, contrast, after=prefix)
        for prefix in _prefixes(shown)
    }
    return [
        sum(float(after[ids[:place]][token]) for place, token in enumerate(ids)) for ids in shown
    ]


def at_layers(steering: Steering, layers: int, count: int) -> list[Method]:
    """The steering's method at `count` blocks from the first to the last, int(linspace(0, L - 1))
    of the model's `layers`."""
    method = method_of(steering)
    if count < 1:
        raise TrimtabError(f"curves over layers need 1 layer or more, not {count}")
    if "layer" not in steering.hyperparameters:
        raise TrimtabError(
            f"{steering.method} has no layer: curves over layers need a method that has"
        )
    places = np.linspace(0, layers - 1, count).astype(int).tolist()
    return [replace(method, layer=layer) for layer in dict.fromkeys(places)]  # type: ignore[type-var]
