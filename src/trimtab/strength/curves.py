"""What a steering does to the next token over its whole dial.

A curve is the mean over prompts, each of which is followed over the grid by itself
(`following`). A text of several tokens is followed as a sequence: its probability is that of all
of them in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.dials import idle_dial
from trimtab.errors import TrimtabError, check_list
from trimtab.model import LanguageModel, check_model
from trimtab.options import Bounds, Tracing, flat
from trimtab.reports import Presented, Table, change_text, number_text, value_text
from trimtab.steering import Steering
from trimtab.strength.following import Followed, Read
from trimtab.strength.refitting import sequence_log_odds
from trimtab.terminal import progress

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
    check_model(language_model)
    wanted = language_model.fitting(language_model.prompts(prompts, chat))
    if not wanted:
        raise TrimtabError("there is no prompt to draw a curve for")
    tokens, tolerance = tracing.tokens, tracing.tolerance
    dials = _grid(steering, tracing.span, tracing.points)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise TrimtabError(f"the tolerance must be 0 or more, not {tolerance}")
    shown = [] if isinstance(tokens, int) else sequences(language_model, tokens)
    _check_room(language_model, wanted, shown)

    def read(one: Steering, what: str) -> list[Read]:
        """The prompts under a steering, with whatever is shown by then."""
        given = one, dials, shown, tolerance, force
        return [Read.of(language_model, text, *given) for text in _shown(wanted, what)]

    found, chosen = read(steering, "turning the dial"), ""
    followed = [one.next_token for one in found]
    if isinstance(tokens, int):
        ids, chosen = _choose(followed, steering, dials, tracing, bounds)
        shown = [(token,) for token in ids]
    runs = [_mean_p(found, shown)]
    for number, other in enumerate(resamples, 1):
        runs.append(_mean_p(read(other, f"resample {number}"), shown))
    odds = None if contrast is None else sequence_log_odds(language_model, contrast, shown)
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
    check_list("token", tokens)
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


# -- which tokens ---------------------------------------------------------------------------------


def _choose(
    followed: Sequence[Followed],
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


def _mean_p(found: Sequence[Read], shown: Sequence[tuple[int, ...]]) -> Tensor:
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
