"""Whether what a model's backward pass says of scaling units is what scaling them does.

Where the graph breaks (a kernel without a backward pass, a detach, activations that are rounded)
gradients come out all the same, with a part of them missing. So each model is asked, at the first
use, by numbers on a few texts of a dozen tokens (see `model/questions.py`): all units of a kind of
site are scaled by 1 + step and by 1 - step, their signs drawn for each text, and what that does to
the log-probabilities of its tokens is held against the sum of the effects.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trimtab.anatomy import Edit, hooked
from trimtab.errors import TrimtabError
from trimtab.fitting.gradients import Scored, Summed, run_gradients
from trimtab.model import LanguageModel, answered, probe_texts
from trimtab.reading import Batch, Packed, batch_of, read_columns, run_packed

#: How many texts are read, each with signs of its own.
_TEXTS = 8
#: Steps of which one has to agree with the gradient (experts may be chosen otherwise at a small
#: one, and a large one leaves the slope), and how far from it half of the texts may be, as a share
#: of what is typical.
_STEPS, _TOLERANCE = (1e-3, 2e-4, 5e-3), 0.05
#: Steps where numbers are rounded to a few bits, whose noise is as large as the change itself, and
#: how much may be missing of the gradient's square.
_LARGE_STEPS, _MISSING = (0.02, 0.04, 0.06, 0.08), 0.1


def check_differentiable(language_model: LanguageModel, sites: Iterable[str]) -> None:
    """Refuse sites at which gradients do not say what scaling units does."""
    kinds = {site.rpartition(".")[2] for site in sites}
    for kind in sorted(kinds):
        if not differentiates(language_model, kind):
            raise TrimtabError(
                f"effects cannot be read off the backward pass of {language_model.name}: at "
                f"{kind} it does not say what scaling units does (a kernel without a backward "
                "pass, a detach, or rounded activations): choose units by another score"
            )


def differentiates(language_model: LanguageModel, kind: str) -> bool:
    """Whether the effects at a kind of site are true of a model; asked once of each architecture
    and configuration."""
    lm = language_model

    def ask() -> bool:
        probe = _Probe(lm, kind)
        told = probe.told()
        size, exact = told.square().mean(), torch.finfo(lm.dtype).eps < 1e-5
        if exact:
            allowed = _TOLERANCE * size.sqrt()
            if any((probe.done(step) - told).abs().median() <= allowed for step in _STEPS):
                return True
        if exact and not lm.quantised:
            return False
        return bool(_missing(told, probe) <= _MISSING * size)

    return answered(lm.anatomy, ("differentiates", kind), ask)


def _missing(told: Tensor, probe: _Probe) -> Tensor:
    """The square of what the gradient lacks, of a text in the middle. Rounding is another one at
    each step, and has no part in products of what two steps have found."""
    apart = torch.stack([probe.done(step) - told for step in _LARGE_STEPS])
    pairs = len(apart) * (len(apart) - 1)
    return ((apart.sum(0).square() - apart.square().sum(0)) / pairs).median()


class _Probe:
    """Some short texts, and the signs by which the units of a kind of site are scaled in each."""

    def __init__(self, language_model: LanguageModel, kind: str) -> None:
        self._lm = language_model
        text = probe_texts(language_model.anatomy)[0]
        self._texts = [(*text[i:], *text[:i]) for i in range(_TEXTS)]
        anatomy = language_model.anatomy
        generator = torch.Generator().manual_seed(0)
        self._signs = {
            site: 2.0 * torch.randint(0, 2, (_TEXTS, anatomy.width(site)), generator=generator) - 1
            for site in anatomy.sites(kind)
        }
        self._weights = torch.randn(_TEXTS, len(text) - 1, generator=generator)

    def told(self) -> Tensor:
        """What the backward pass says of the signs, [texts] in nats per step."""
        batch = self._batch(1)
        everywhere = torch.ones(batch.tokens.shape)
        sums = {site: {site: Summed(everywhere)} for site in self._signs}
        lines, columns = torch.ones_like(self._weights).nonzero().T
        targets = batch.tokens[lines, columns + 1]
        scored = Scored(lines, columns, targets, self._weights.flatten())
        effects = run_gradients(self._lm, batch, sums, [lambda hidden: scored])
        return torch.stack(
            [
                (effects[site][0].double().cpu() * signs).sum(-1)
                for site, signs in self._signs.items()
            ]
        ).sum(0)

    def done(self, step: float) -> Tensor:
        """What scaling by a step does, [texts] in nats per step."""
        anatomy = self._lm.anatomy

        def scaled(signs: Tensor) -> Edit:
            factors = 1 + step * torch.cat([signs, -signs])[:, None]
            return lambda x: x * factors.to(x)

        edits = {anatomy.point(site): scaled(signs) for site, signs in self._signs.items()}
        batch = self._batch(2)
        with hooked(anatomy.body, edits):
            hidden = run_packed(batch, self._lm).last_hidden_state
        columns = [list(range(len(text) - 1)) for text in batch.tokens]
        targets = batch.tokens[:, 1:].tolist()
        log_p = torch.stack(
            [each.log_p for each in read_columns(self._lm, hidden, columns, targets)]
        )
        up, down = (log_p * self._weights.repeat(2, 1)).sum(-1).chunk(2)
        return (up - down) / (2 * step)

    def _batch(self, times: int) -> Batch:
        rows = [
            Packed(i, text, len(text), (0,), (len(text),))
            for i, text in enumerate(self._texts * times)
        ]
        return batch_of(tuple(rows), packed=False)
