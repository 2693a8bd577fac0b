"""How probable a model finds texts: log-odds between the sides of a pair, cross-entropy of text.

The LM head runs only where a token is scored, and the two sides of a pair share their prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Prompt, check_contrast
from trimtab.errors import TrimtabError, check_list
from trimtab.model import (
    LanguageModel,
    SteeringArgument,
    check_model,
    frozen,
    has_images,
    has_two_pass,
    per_text,
    refuse_unseen,
    row_steerings,
)
from trimtab.reading.abilities import packs
from trimtab.reading.packing import (
    Batch,
    Packed,
    batches,
    encode_contrast,
    encode_texts,
    run_packed,
)
from trimtab.reading.reader import (
    Reading,
    next_tokens,
    read_columns,
    refuse_unsound,
    whole_reading,
)
from trimtab.reading.streams import StreamCache
from trimtab.terminal import progress


@torch.inference_mode()
def log_odds(
    language_model: LanguageModel,
    contrast: Contrast,
    steering: SteeringArgument = None,
    *,
    force: bool = False,
) -> Tensor:
    """log p(positive | prompt) - log p(negative | prompt) of each pair, [pairs] in nats.

    `steering` is one for all pairs or a list with one per pair. The two sides of a pair share
    their prompt in one packed row, however short it is, where the model takes that.
    """
    check_model(language_model)
    check_contrast(contrast)
    rows = _scored_pairs(language_model, contrast)
    steerings = per_text(steering, len(rows))
    of_rows = [row_steerings(steering)] * len(rows) if steerings is None else steerings
    refuse_unseen(of_rows, [row.texts()[0] for row in rows])
    if has_two_pass(of_rows):
        prompts = [row.texts()[0][: row.answers[0]] for row in rows]
        of_rows, _ = language_model.settled(of_rows, prompts, force)
        steering = steerings = of_rows
    # What counts the tokens before one would count the other side's in a packed row.
    plain = all(scope.plain for row in of_rows for one in row for scope in one.scopes) and all(
        one.gate is None or one.gate.kind == "token" for row in of_rows for one in row
    )
    packed = plain and packs(language_model)
    odds = torch.zeros(len(rows), dtype=torch.float64)
    with progress("scoring", len(rows)) as advance:
        for batch in batches(rows, language_model.batch_tokens, packed):
            owners = batch.owners()
            indices = [batch.rows[row].index for row, _ in owners]
            here = steering if steerings is None else [steerings[i] for i in indices]
            with language_model.steered(here, force=force) as sequences:
                sequences.may_miss_images = True
                sequences.given_ends = [batch.rows[row].answers[side] for row, side in owners]
                hidden = run_packed(batch, language_model).last_hidden_state
            columns, targets = _answer_tokens(batch)
            answers = read_columns(language_model, hidden, columns, targets)
            refuse_unsound(language_model, answers, indices, here)
            for i, row in enumerate(batch.rows):
                first, last = (answers[line].log_p for line in batch.lines[i].tolist())
                positive, negative = (row.common + n - row.answers[0] for n in row.sides)
                odds[row.index] = first[:positive].sum() - last[len(last) - negative :].sum()
            advance(len(batch.rows))
    return odds


def _answer_tokens(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Of each line the columns that answer tokens are predicted from, and these tokens: in a
    packed row the positive side's, then the negative side's."""
    columns: list[list[int]] = [[] for _ in batch.tokens]
    targets: list[list[int]] = [[] for _ in batch.tokens]
    for i, row in enumerate(batch.rows):
        for line, places, tokens in answers_scored(batch, i, row.answers[0]):
            columns[line] += places
            targets[line] += tokens
    return columns, targets


def answers_scored(
    batch: Batch, row: int, start: int
) -> Iterator[tuple[int, list[int], tuple[int, ...]]]:
    """Of each side of a row (by its place in the batch): its line, the columns that its tokens from
    `start` on are predicted from, and these tokens."""
    for side, text in enumerate(batch.rows[row].texts()):
        places = batch.place[row, side, start - 1 : len(text) - 1].tolist()
        yield int(batch.lines[row, side]), places, tuple(text)[start:]


def side_readings(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None = None
) -> list[Reading]:
    """The two sides of each pair as readings of their own, positive before negative, for who asks
    about the same pairs under many steerings. Prompts of texts that are longer than `max_length`
    (default: what the model takes) are cut on the left."""
    readings = []
    for row in _scored_pairs(language_model, contrast, max_length):
        for text, start in zip(row.texts(), row.answers, strict=True):
            asked = tuple(range(start - 1, len(text) - 1))
            # The last token is only predicted, but a text with images is read whole.
            read = frozen(text) if has_images(text) else tuple(text[:-1])
            readings.append(Reading(read, asked, start, tuple(text)[start:]))
    return readings


def text_readings(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None = None
) -> list[Reading]:
    """The texts of an unpaired contrast as readings, as if the model wrote them: all tokens but the
    first are scored, and count as answer. Longer ones are cut as by `side_readings`."""
    readings = []
    for row in encode_contrast(language_model, contrast, max_length):
        if row.common < 2:
            raise TrimtabError(
                f"{contrast.name}, row {row.index + 1}: the text has no token to score"
            )
        (text,) = row.texts()
        asked = tuple(range(row.common - 1))
        readings.append(Reading(frozen(text), asked, 1, tuple(text)[1:]))
    return readings


def _scored_pairs(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None = None
) -> list[Packed]:
    """Each pair with the token from which on its sides are scored."""
    if not contrast.paired:
        raise TrimtabError(f"{contrast.name} is unpaired: log-odds compare the sides of a pair")
    rows = []
    for row in encode_contrast(language_model, contrast, max_length):
        start = scored_from(row, contrast.name)
        rows.append(replace(row, answers=(start, start)))
    return rows


def scored_from(row: Packed, name: str = "the contrast") -> int:
    """The token of both sides of a pair from which on they are scored.

    A prompt's last token may merge with one answer and not with the other: both are scored from
    the same token on, or one would be charged for the prompt's end.
    """
    start = min(row.answers)
    if start < 1:
        raise TrimtabError(
            f"{name}, row {row.index + 1}: no token of the prompt precedes the answers"
        )
    return start


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
    kept: StreamCache | None = None,
    force: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of texts or chats: the mean negative log-likelihood per token in nats, and how many tokens.

    Both [texts]; a text's first token is read, not scored. Steering counts a whole text as prompt;
    it is one for all texts or a list with one per text. `kept` is as in `next_tokens`.
    """
    check_model(language_model)
    check_list("text", texts)
    readings = []
    for row in encode_texts(language_model, texts):
        if row.common < 2:
            raise TrimtabError(f"text {row.index + 1} has no token to score: it is too short")
        if row.common > language_model.max_length:
            raise TrimtabError(
                f"text {row.index + 1} has {row.common} tokens, the model takes "
                f"{language_model.max_length}: cut it into several"
            )
        readings.append(whole_reading(*row.texts()))
    if not readings:
        raise TrimtabError("there is no text to score")
    nll = torch.zeros(len(readings), dtype=torch.float64)
    with progress("scoring", len(readings)) as advance:
        for batch, scored in next_tokens(
            language_model, readings, steering, kept=kept, force=force
        ):
            nll[list(batch.rows)] = torch.stack([-each.log_p.mean() for each in scored])
            advance(len(batch.rows))
    return nll, torch.tensor([len(reading.positions) for reading in readings])


def neutral_prompts() -> list[dict[str, str]]:
    """Questions about nothing in particular that come with trimtab: id, language and prompt."""
    path = files("trimtab") / "data" / "neutral.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain_texts() -> list[str]:
    """Paragraphs of plain English that come with trimtab."""
    path = files("trimtab") / "data" / "plain.txt"
    return path.read_text(encoding="utf-8").splitlines()
