"""What scaling units costs: how far it moves what a model expects in texts about nothing.

For small g the KL divergence, in nats, of the next token at a position of plain text after
x_i <- (1 + g_i) x_i is

    KL(g) = 1/2 E[(sum_i g_i u_i)^2],    u_i = sum over tokens of  x_i d log p(y) / d x_i

over tokens y that the model itself draws there (Fisher information); of adding g_i instead, u_i is
the sum of the gradients alone. The draws at several positions of a text are independent and u has
mean zero, so that one backward pass from all of a text's positions at once gives one sample of the
sum over them.

The samples of u are kept, per site, in the user's cache: for a model and its weights they are drawn
once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from trimtab.anatomy import is_hooked
from trimtab.errors import TrimtabError
from trimtab.files import cache_dir, write_whole
from trimtab.fitting.differentiable import check_differentiable
from trimtab.fitting.gradients import Scored, Summed, run_gradients
from trimtab.fitting.stored import digest_of
from trimtab.model import LanguageModel
from trimtab.reading import Batch, Packed, batches, encode_texts, plain_texts
from trimtab.terminal import progress

#: How many tokens of each plain paragraph are read, and from which on the next one is asked for: at
#: a text's first tokens anything may follow.
_TOKENS, _FROM = 48, 8
#: How often tokens are drawn at each position.
DRAWS = 4
#: Logits in float32 from which tokens are drawn at once.
_LOGITS = 1 << 25


@dataclass(frozen=True)
class Costs:
    """Samples of u at a site, [samples, units] float32, each over the positions of a text and
    divided by the square root of how many these are; `draws` of each text, one after the other."""

    samples: Tensor
    draws: int = 1

    @property
    def mean(self) -> Tensor:
        """E[u_i^2] per position, the diagonal of the Fisher information, [units] in float64."""
        return self.samples.double().square().mean(0)

    @property
    def error(self) -> Tensor:
        """Its standard error, [units], as texts differ: those of one text say less than as many of
        different texts would."""
        of_texts = self.samples.double().square().unflatten(0, (-1, self.draws)).mean(1)
        spread: Tensor = of_texts.std(0)
        return spread / math.sqrt(len(of_texts))


def kl_samples(costs: Sequence[Costs], gains: Sequence[Tensor]) -> Tensor:
    """Nats per position that scaling units by 1 + gain costs on each plain text, or adding gain
    where the costs are those of that, to second order, what the units do together included:
    [texts] in float64. `gains` [units] are in the order of the sites' costs."""
    along = [cost.samples.double() @ gain.double() for cost, gain in zip(costs, gains, strict=True)]
    squares = torch.stack(along).sum(0).square()
    of_texts: Tensor = 0.5 * squares.unflatten(0, (-1, costs[0].draws)).mean(1)
    return of_texts


def predicted_kl(costs: Sequence[Costs], gains: Sequence[Tensor]) -> float:
    """The mean of `kl_samples`; 0 where nothing is scaled."""
    return float(kl_samples(costs, gains).mean()) if costs else 0.0


def unit_costs(
    language_model: LanguageModel,
    sites: Sequence[str],
    draws: int = DRAWS,
    reads: Mapping[str, Any] | None = None,
) -> list[Costs]:
    """The samples at each of the sites: those that are kept, the others drawn in one pass.

    `reads` say what is made of activation and gradient at a site, as in a `Pick`: `Slope()` gives
    the costs of adding to units, and None those of scaling them.
    """
    reads = reads or {}
    rows = _neutral(language_model)
    steered = is_hooked(language_model.model)
    room = None if steered else _room(language_model, rows, draws)
    known: dict[str, Tensor] = {}
    for site in sites:
        width = getattr(reads.get(site), "width", language_model.anatomy.width(site))
        shape = len(rows) * draws, width
        samples = None if room is None else _kept(room, site, reads.get(site), shape)
        if samples is not None:
            known[site] = samples
    missing = [site for site in dict.fromkeys(sites) if site not in known]
    if missing:
        check_differentiable(language_model, missing)
        drawn = _drawn(language_model, rows, missing, draws, reads)
        for site, samples in zip(missing, drawn, strict=True):
            known[site] = samples
            if room is not None:
                _keep(room, site, reads.get(site), samples)
    return [Costs(known[site], draws) for site in sites]


def _neutral(language_model: LanguageModel) -> list[Packed]:
    """The beginnings of the paragraphs of plain text that come with trimtab."""
    rows = encode_texts(language_model, plain_texts())
    longest = min(_TOKENS, language_model.max_length)
    rows = [
        Packed(row.index, tokens, len(tokens), (0,), (len(tokens),))
        for row in rows
        if len(tokens := row.tokens[:longest]) > _FROM
    ]
    if not rows:
        raise TrimtabError(
            f"{language_model.name} reads at most {language_model.max_length} tokens: too few to "
            "measure what steering costs on plain text"
        )
    return rows


def _drawn(
    language_model: LanguageModel,
    rows: Sequence[Packed],
    sites: Sequence[str],
    draws: int,
    reads: Mapping[str, Any],
) -> list[Tensor]:
    """Samples [texts * draws, units] of each site."""
    found = {}
    for site in sites:
        width = getattr(reads.get(site), "width", language_model.anatomy.width(site))
        found[site] = torch.zeros(len(rows), draws, width)
    places = {row.index: place for place, row in enumerate(rows)}
    with progress("measuring what units cost", len(rows)) as advance:
        for batch in batches(rows, language_model.batch_tokens, packed=False):
            real = torch.zeros(batch.tokens.shape)
            for line in range(len(batch.rows)):
                real[batch.place_of(line, 0)] = 1
            sums = {site: {site: Summed(real, reads.get(site))} for site in sites}
            figures = [partial(_guessed, language_model, batch, draw) for draw in range(draws)]
            lengths = torch.tensor([row.common - _FROM for row in batch.rows])
            own = [places[row.index] for row in batch.rows]
            for site, samples in run_gradients(language_model, batch, sums, figures).items():
                scaled = samples.cpu() / lengths[:, None].sqrt()
                found[site][own] = scaled.transpose(0, 1)
            advance(len(batch.rows))
    return [found[site].flatten(0, 1) for site in sites]


@torch.no_grad()
def _guessed(language_model: LanguageModel, batch: Batch, draw: int, hidden: Tensor) -> Scored:
    """At every position of the texts a token that the model draws; which one depends on the text
    and on the draw only, not on what shares the batch."""
    places = [
        (line, column) for line, row in enumerate(batch.rows) for column in range(_FROM, row.common)
    ]
    uniform = torch.cat([_uniform(row, draw) for row in batch.rows])
    lines, columns = torch.tensor(places).T
    vocabulary = language_model.model.get_output_embeddings().weight.shape[0]
    targets = []
    for chunk in torch.arange(len(places)).split(max(1, _LOGITS // vocabulary)):
        where = lines[chunk].to(hidden.device), columns[chunk].to(hidden.device)
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        heap = language_model.unembed(hidden[where]).to(wide).softmax(-1).cumsum(-1)
        drawn = uniform[chunk, None].to(heap) * heap[:, -1:]
        targets.append(torch.searchsorted(heap, drawn)[:, 0].clamp(max=heap.shape[-1] - 1).cpu())
    return Scored(lines, columns, torch.cat(targets), torch.ones(len(places)))


def _uniform(row: Packed, draw: int) -> Tensor:
    """Numbers between 0 and 1, one for each position of a text."""
    generator = torch.Generator().manual_seed(1000 * row.index + draw)
    return torch.rand(row.common - _FROM, generator=generator, dtype=torch.float64)


# -- what is kept ---------------------------------------------------------------------------------


def _room(language_model: LanguageModel, rows: Sequence[Packed], draws: int) -> Path:
    """The directory of these samples: of these weights, texts and draws."""
    about = f"{digest_of(language_model, rows)} {_FROM} {draws}"
    return cache_dir() / "costs" / hashlib.sha256(about.encode()).hexdigest()[:32]


def _file(room: Path, site: str, read: Any) -> Path:
    form = f".{read.name}" if read else ""
    return room / f"{site}{form}.safetensors"


def _kept(room: Path, site: str, read: Any, shape: tuple[int, int]) -> Tensor | None:
    """What was kept of a site; anything else there is as if nothing were."""
    try:
        samples = load_file(_file(room, site, read))["samples"]
    except (OSError, KeyError, SafetensorError):
        return None
    good = samples.shape == shape and samples.dtype == torch.float32 and samples.isfinite().all()
    return samples if good else None


def _keep(room: Path, site: str, read: Any, samples: Tensor) -> None:
    try:
        room.mkdir(parents=True, exist_ok=True)
        content = save({"samples": samples.contiguous()})
        write_whole(_file(room, site, read), content, overwrite=True)
    except (OSError, TrimtabError):
        pass  # the next run draws again, and nothing else
