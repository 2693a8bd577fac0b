"""How probable a model finds texts: log-odds between the sides of a pair, cross-entropy of text.

The LM head runs only where a token is scored, and the two sides of a pair share their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Prompt
from trimtab.errors import TrimtabError
from trimtab.model import (
    LanguageModel,
    Packed,
    SteeringArgument,
    are_sound,
    batches,
    encode_contrast,
    encode_texts,
    run_packed,
    unsound,
)
from trimtab.progress import progress
from trimtab.reading.next_tokens import Reading
from trimtab.steering import Steering, Steerings, together


def log_odds(
    language_model: LanguageModel,
    contrast: Contrast,
    steering: SteeringArgument = None,
    *,
    force: bool = False,
) -> Tensor:
    """log p(positive | prompt) - log p(negative | prompt) of each pair, [pairs] in nats.

    `steering` is one for all pairs or a list with one per pair.
    """
    sums = _log_likelihoods(
        language_model, _scored_pairs(language_model, contrast), steering, force
    )
    return sums[:, 0] - sums[:, 1]


def side_readings(language_model: LanguageModel, contrast: Contrast) -> list[Reading]:
    """The two sides of each pair as readings of their own, positive before negative, for who asks
    about the same pairs under many steerings."""
    readings = []
    for row in _scored_pairs(language_model, contrast):
        for text, start in zip(row.texts(), row.answers, strict=True):
            asked = tuple(range(start - 1, len(text) - 1))
            readings.append(Reading(tuple(text[:-1]), asked, start, tuple(text[start:])))
    return readings


def _scored_pairs(language_model: LanguageModel, contrast: Contrast) -> list[Packed]:
    """Each pair with the token from which on its sides are scored."""
    if not contrast.paired:
        raise TrimtabError(f"{contrast.name} is unpaired: log-odds compare the sides of a pair")
    rows = []
    for row in encode_contrast(language_model, contrast, None):
        # A prompt's last token may merge with one answer and not with the other: both are scored
        # from the same token on, or one would be charged for the prompt's end.
        start = min(row.answers)
        if start < 1:
            raise TrimtabError(
                f"{contrast.name}, row {row.index + 1}: no token of the prompt precedes the answers"
            )
        rows.append(replace(row, answers=(start, start)))
    return rows


def preference(
    language_model: LanguageModel,
    contrast: Contrast,
    steering: SteeringArgument = None,
    *,
    force: bool = False,
) -> float:
    """How much more probable the positive side is than the negative one, in nats.

    The mean log-odds per pair; of an unpaired contrast the mean log-likelihood per token of the
    positive texts minus that of the negative ones.
    """
    if contrast.paired:
        return float(log_odds(language_model, contrast, steering, force=force).mean())
    texts = [row.text for row in contrast.texts]
    nll, _ = cross_entropy(language_model, texts, steering, force=force)
    positive = torch.tensor([row.label == "positive" for row in contrast.texts])
    return float(nll[~positive].mean() - nll[positive].mean())


def cross_entropy(
    language_model: LanguageModel,
    texts: Sequence[Prompt],
    steering: SteeringArgument = None,
    *,
    force: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of texts or chats: the mean negative log-likelihood per token in nats, and how many tokens.

    Both [texts]; a text's first token is read, not scored. Steering counts a whole text as prompt;
    it is one for all texts or a list with one per text.
    """
    rows = []
    for row in encode_texts(language_model, texts):
        if row.common < 2:
            raise TrimtabError(f"text {row.index + 1} has no token to score: it is too short")
        if row.common > language_model.max_length:
            raise TrimtabError(
                f"text {row.index + 1} has {row.common} tokens, the model takes "
                f"{language_model.max_length}: cut it into several"
            )
        rows.append(Packed(row.index, row.tokens, row.common, row.sides, (1,)))
    scored = torch.tensor([row.common - 1 for row in rows])
    sums = _log_likelihoods(language_model, rows, steering, force, all_prompt=True)
    return -sums[:, 0] / scored, scored


@torch.inference_mode()
def _log_likelihoods(
    language_model: LanguageModel,
    rows: Sequence[Packed],
    steering: SteeringArgument,
    force: bool,
    all_prompt: bool = False,
) -> Tensor:
    """Summed log-likelihood of each side's answer, [rows, sides] in float64."""
    if not rows:
        raise TrimtabError("there is no text to score")
    shared = steering is None or isinstance(steering, Steering | Steerings)
    per_row: Any = None if shared else steering
    if per_row is not None and len(per_row) != len(rows):
        raise TrimtabError(f"{len(per_row)} steerings for {len(rows)} texts: give one for each")
    sums = torch.zeros(len(rows), len(rows[0].sides), dtype=torch.float64)
    with progress("scoring", len(rows)) as advance:
        for batch in batches(rows, language_model.batch_tokens):
            here = steering if per_row is None else [per_row[row.index] for row in batch.rows]
            with language_model.steered(here, force=force) as sequences:
                sequences.given_ends = (
                    [batch.tokens.shape[1]]
                    if all_prompt
                    else [row.answers[0] for row in batch.rows]
                )
                hidden = run_packed(batch, language_model).last_hidden_state
            row, side, column, target = _scored_tokens(batch.rows, batch.place)
            picked = hidden[row.to(hidden.device), column.to(hidden.device)]
            logits: Any = language_model.unembed(picked)
            log_p = logits.log_softmax(-1).cpu().gather(-1, target[:, None]).squeeze(-1).double()
            index = torch.tensor([packed.index for packed in batch.rows])[row]
            sound = are_sound(logits).cpu()
            if not sound.all():
                first = int(index[~sound].min())
                own: Any = steering if per_row is None else per_row[first]
                labels = [one.label for one in together(own)]
                raise unsound(f"text {first + 1}", labels, language_model.dtype)
            sums.index_put_((index, side), log_p, accumulate=True)
            advance(len(batch.rows))
    return sums


def _scored_tokens(rows: Sequence[Packed], place: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each answer token: its row, its side, the column it is predicted from, and its id."""
    found: list[tuple[int, int, int, int]] = []
    columns = place.tolist()
    for i, row in enumerate(rows):
        for side, text in enumerate(row.texts()):
            for position in range(row.answers[side], len(text)):
                found.append((i, side, columns[i][side][position - 1], text[position]))
    row_of, side_of, column, target = torch.tensor(found).T
    return row_of, side_of, column, target
