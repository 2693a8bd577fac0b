"""What scaling units does to the answers of pairs, by plain passes of the model: what effects are
checked against. Only where a site is, is trimtab's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import trimtab as tt
from helpers import token_ids
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import curated_model
from trimtab.anatomy import hooked
from trimtab.fitting import Effect, Effects, Want
from trimtab.fitting.activations import collect

UNIT_KINDS = ("heads", "attn_out", "ffn_in", "ffn_out", "resid")

#: Answers of unequal length; a prompt that leaves the sliding window of 8 tokens.
PAIRS = [
    ("She looked at the map and asked where they were", " going. He said: yes.", " No."),
    ("Today I feel", " happy.", " sad, and I hate this film"),
]

Triple = tuple[str, str, str]


def kinds_of(lm: tt.LanguageModel) -> list[str]:
    return [kind for kind in UNIT_KINDS if lm.anatomy.has(kind)]


def all_sites(lm: tt.LanguageModel) -> list[str]:
    return [site for kind in kinds_of(lm) for site in lm.anatomy.sites(kind)]


@cache
def known(name: str, dtype: torch.dtype = torch.float64) -> tt.LanguageModel:
    """A model that no test changes."""
    return fresh(name, dtype)


def fresh(name: str, dtype: torch.dtype = torch.float64) -> tt.LanguageModel:
    model: Any = (tiny_model if name in TINY else curated_model)(name, dtype=dtype)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        with suppress(ValueError):  # no grouped product takes it
            model.set_experts_implementation("eager")
    return tt.wrap(model, tiny_tokenizer(), name)


class _Wide(TorchFunctionMode):
    """What asks for float32 gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        wide = [torch.float64 if each is torch.float32 else each for each in args]
        named = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*wide, **named)


@contextmanager
def in_float64() -> Iterator[None]:
    """Norms, attention and routers that compute in float32, whatever a model's numbers are, compute
    in float64, so that slopes can be told to a millionth."""
    with _Wide():
        yield


def effects(
    lm: tt.LanguageModel,
    pairs: Sequence[Triple] | tt.Contrast,
    sites: Sequence[str],
    effect: Effect | None = None,
    **options: Any,
) -> dict[str, Effects]:
    contrast = pairs if isinstance(pairs, tt.Contrast) else tt.Contrast.from_pairs(list(pairs))
    wants = [Want(site, effect or Effect(), Effects) for site in sites]
    found = collect(lm, contrast, wants, **options)
    return {want.site: found[want] for want in wants}


def means(*args: Any, **options: Any) -> dict[str, Tensor]:
    return {site: each.mean for site, each in effects(*args, **options).items()}


def scored_from(prompt: str, *answers: str) -> int:
    """The first token of the answers: the tokens of the prompt that both texts begin with."""
    start = token_ids(prompt)
    shared = []
    for answer in answers:
        same = [a == b for a, b in zip(start, token_ids(prompt + answer), strict=False)]
        shared.append(same.index(False) if False in same else len(same))
    return min(shared)


def slopes_by_hand(
    lm: tt.LanguageModel,
    pairs: Sequence[Triple],
    units: Mapping[str, Sequence[int]],
    step: float = 2e-5,
    counted: Any = lambda token, start: token >= 0,
    per_token: bool = False,
) -> dict[str, Tensor]:
    """Central differences of the mean log-odds, extrapolated from two steps, of each unit's factor
    at each site. `counted` says at which tokens it acts."""
    scaled = [(site, unit) for site, chosen in units.items() for unit in chosen]
    steps = (step, -step, step / 2, -step / 2)
    odds = torch.zeros(len(steps), len(scaled), dtype=torch.float64)
    for prompt, positive, negative in pairs:
        start = scored_from(prompt, positive, negative)
        for sign, answer in ((1, positive), (-1, negative)):
            ids = token_ids(prompt + answer)
            own = counted(torch.arange(len(ids)), start)
            log_p = _log_p(lm, ids, scaled, steps, own)[:, start - 1 :]
            odds += sign * (log_p.mean(-1) if per_token else log_p.sum(-1)).view(odds.shape)
    far = (odds[0] - odds[1]) / (2 * step)
    near = (odds[2] - odds[3]) / step
    slopes = ((4 * near - far) / 3 / len(pairs)).split([len(chosen) for chosen in units.values()])
    return dict(zip(units, slopes, strict=True))


@torch.no_grad()
def _log_p(
    lm: tt.LanguageModel,
    ids: list[int],
    scaled: Sequence[tuple[str, int]],
    steps: Sequence[float],
    counted: Tensor,
) -> Tensor:
    """Log-probability of each token but the first, [steps * units, tokens]: one row for each."""
    rows = len(steps) * len(scaled)
    gains: dict[str, Tensor] = {}
    for number, (site, unit) in enumerate(scaled):
        if site not in gains:
            gains[site] = torch.zeros(rows, len(ids), lm.anatomy.width(site), dtype=lm.dtype)
        for place, step in enumerate(steps):
            gains[site][place * len(scaled) + number, counted, unit] = step
    edits: Any = {
        lm.anatomy.point(site): lambda x, gain=gain: x * (1 + gain) for site, gain in gains.items()
    }
    tokens = torch.tensor([ids]).expand(rows, -1)
    with hooked(lm.anatomy.body, edits):
        logits = lm.model(input_ids=tokens, use_cache=False).logits
    log_p = logits[:, :-1].double().log_softmax(-1)
    return log_p.gather(-1, tokens[:, 1:, None])[..., 0]


def telling_units(found: Mapping[str, Tensor], count: int = 2) -> dict[str, list[int]]:
    """Of each site the units of the largest effects, and one of a small effect."""
    chosen = {}
    for site, mean in found.items():
        order = mean.abs().argsort(descending=True).tolist()
        chosen[site] = [*order[:count], order[len(order) // 2]]
    return chosen


def check_slopes(
    found: Mapping[str, Tensor], by_hand: Mapping[str, Tensor], units: Any, share: float
) -> None:
    """They differ by no more than a share of the largest effect at the site."""
    for site, slopes in by_hand.items():
        apart = (found[site][units[site]] - slopes).abs().max()
        assert apart <= share * found[site].abs().max(), (site, float(apart))
