"""Runs texts under the operators that are learnt: activations are changed at the sites by hooks,
and the log-probabilities of the answers come out, with a graph where they are to be differentiated.

What the blocks below the sites compute no parameter changes. They run without gradients, once for
each text, and what they put out is kept; then the blocks from the lowest site on run from there.
The LM head runs at answer tokens only. Each text's stream is computed alone, so that it is the same
to the bit in whatever batch it comes up, also after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from trimtab.anatomy import Edit, Point, hooked
from trimtab.errors import TrimtabError, not_finite
from trimtab.fitting import with_gradients
from trimtab.model import LanguageModel, is_asking, refuse_dropout, scope_weights
from trimtab.reading import StreamCache, blocks_apart, run_upper
from trimtab.steering import Scope
from trimtab.training.objective import Objective, Outcome, Run, Steered
from trimtab.training.texts import Text

#: Bytes of streams below the sites that are kept.
_STREAMS = 1 << 30
#: Logits in float32 of which the graph is kept; of more, they are made again on the way back.
_LOGITS = 1 << 25


class Passes:
    """A model over some texts, under the operators of an objective."""

    def __init__(
        self, language_model: LanguageModel, objective: Objective, texts: Sequence[Text]
    ) -> None:
        lm = language_model
        refuse_dropout(lm.model)
        self.language_model, self._objective, self._texts = lm, objective, texts
        every = (*objective.sites, *objective.reads)
        self._points: dict[str, Point] = {site: lm.anatomy.point(site) for site in every}
        self._blocks = blocks_apart(lm, (), sites=every)
        self._streams = StreamCache(lm, _STREAMS)
        self._weights: dict[int, Tensor] = {}
        #: The log-probability of each text's answer without operators; NaN where it is not known.
        self.reference = torch.full((len(texts),), torch.nan, dtype=torch.float64)

    def run(
        self,
        parameters: Mapping[str, Tensor],
        runs: Sequence[Run],
        rows: int,
        progress: float = 0.0,
        referring: bool = False,
    ) -> Outcome:
        """The runs of some rows under the operators. The graph is kept within `learning`."""
        at = self._steered(runs, progress)
        seen: dict[str, Tensor] = {}
        log_p = self._log_p(at, self._edits(parameters, at, seen))
        reference = log_p.new_zeros(0)
        if referring:
            reference = self.refer([run.text for run in runs]).to(log_p)
        return Outcome(at, log_p, reference, seen, rows)

    @contextmanager
    def learning(self, runs: Sequence[Run]) -> Iterator[None]:
        """Passes over these runs keep their graph while the block lasts."""
        longest = max(len(self._texts[run.text]) for run in runs)
        with with_gradients(self.language_model, (len(runs), longest)):
            yield

    @torch.no_grad()
    def refer(self, numbers: Sequence[int]) -> Tensor:
        """The log-probability of each text's answer without operators, [texts] in float64."""
        missing = [n for n in dict.fromkeys(numbers) if self.reference[n].isnan()]
        if missing:
            at = self._steered([Run(number) for number in missing], 0.0)
            self.reference[missing] = self._log_p(at, {}).double().cpu()
        return self.reference[list(numbers)]

    def _steered(self, runs: Sequence[Run], progress: float) -> Steered:
        """Runs with what is known of their tokens beforehand."""
        texts = tuple(self._texts[run.text] for run in runs)
        device = self.language_model.device
        weights = pad_sequence([self._weight(run.text) for run in runs], batch_first=True)
        columns = torch.arange(weights.shape[1])
        starts, ends = (torch.tensor(x)[:, None] for x in zip(*map(_bounds, texts), strict=True))
        answers = (columns >= starts) & (columns < ends)
        return Steered(tuple(runs), texts, weights.to(device), answers.to(device), progress)

    def _weight(self, number: int) -> Tensor:
        """How much of the dial each token of a text gets, [tokens]."""
        if number not in self._weights:
            text, lm = self._texts[number], self.language_model
            scope = Scope.of(self._objective.positions)
            found = scope_weights(lm.marks, scope, text.tokens, text.start)
            self._weights[number] = torch.tensor(found, dtype=torch.float32)
        return self._weights[number]

    def _edits(
        self, parameters: Mapping[str, Tensor], at: Steered, seen: dict[str, Tensor]
    ) -> dict[Point, Edit]:
        """What is done at each site: tokens that are not steered stay as they are, to the bit."""
        objective = self._objective

        def edit_at(site: str) -> Edit:
            def edit(x: Tensor) -> Tensor | None:
                if is_asking():  # a text of other tokens, by which a model is got to know
                    return None
                changed = None
                if site in objective.sites:
                    here = at.last(x.shape[1], x.device)
                    wide = x if x.dtype == torch.float64 else x.float()
                    changed = objective.change(parameters, site, wide, here).to(x.dtype)
                    changed = torch.where(here.steered[..., None], changed, x)
                if site in objective.reads and site not in seen:  # a block may run again
                    seen[site] = x if changed is None else changed
                return changed

            return edit

        return {point: edit_at(site) for site, point in self._points.items()}

    def _log_p(self, at: Steered, edits: Mapping[Point, Edit]) -> Tensor:
        """The summed log-probabilities of the runs' answers, [runs]."""
        lm, texts = self.language_model, [text.tokens for text in at.texts]
        streams = [self._streams.run_lower([text], self._blocks)[0] for text in texts]
        with hooked(lm.anatomy.body, edits):
            hidden = run_upper(lm, texts, streams, self._blocks)
        runs, columns = at.answers.nonzero().T
        targets = torch.tensor([t for text in at.texts for t in text.answer], device=hidden.device)
        log_p = _log_p_of(
            lm, hidden[runs.to(hidden.device), columns.to(hidden.device) - 1], targets
        )
        summed = log_p.new_zeros(len(texts)).index_add(0, runs.to(log_p.device), log_p)
        if not summed.isfinite().all():
            if not edits:
                raise not_finite("the log-probability of an answer is not finite", lm.dtype)
            raise TrimtabError(
                f"training diverged: {lm.name} gives answers no finite probability under what was "
                "learnt so far; take a smaller learning rate"
            )
        return summed


def _bounds(text: Text) -> tuple[int, int]:
    return text.start, len(text)


def _log_p_of(language_model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each token, [tokens] in float32, from what the final norm puts out
    before it, [tokens, units]."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = language_model.unembed(hidden)
        own = logits.gather(-1, targets[:, None].to(logits.device)).squeeze(-1)
        found: Tensor = own - logits.logsumexp(-1)
        return found

    vocabulary = language_model.model.get_output_embeddings().weight.shape[0]
    most = max(1, _LOGITS // vocabulary)
    if len(hidden) <= most or not hidden.requires_grad:
        return torch.cat([part(*each) for each in zip(*_split(most, hidden, targets), strict=True)])
    parts = zip(*_split(most, hidden, targets), strict=True)
    return torch.cat([checkpoint(part, *each, use_reentrant=False) for each in parts])


def _split(most: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(most) for tensor in tensors]
