"""What turning the dial costs: cross-entropy on any text, dial by dial.

Text is cut into blocks; of each batch of blocks the part of the model below the steering runs once
for all dials. The first token of a block is read and not scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.dials import check_turns, idle_dial, read_at_dial
from trimtab.errors import TrimtabError
from trimtab.figures import Estimate, weighted_interval
from trimtab.model import LanguageModel, batches_by_length
from trimtab.reading import blocks_apart, run_lower
from trimtab.reports import Presented, Table, cell, number_text
from trimtab.steering import Scope, Situation, Steering
from trimtab.strength.limits import limit
from trimtab.terminal import progress


@dataclass(frozen=True, repr=False)
class CostCurve(Presented):
    """Cross-entropy of text above the unsteered one, in nats per token.

    `delta` [dials] is the mean over blocks of text, `per_block` [dials, blocks] each of them, and
    `low` and `high` the 95 % bootstrap interval over blocks. `plateaus` are what Proposition 4.1
    foretells for the dial at minus and plus infinity, None where it says nothing (`why`).
    `block_tokens` [blocks] are the tokens that are scored: what the blocks weigh in a mean.
    """

    steering: Steering
    dials: Tensor
    delta: Tensor
    low: Tensor
    high: Tensor
    per_block: Tensor
    block_tokens: Tensor
    base: float
    plateaus: tuple[float, float] | None
    why: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return int(self.block_tokens.sum())

    @property
    def summary(self) -> str:
        """One sentence: what plain text costs at both ends of the dial."""
        dial = self.steering.dial
        ends = " and ".join(
            f"{number_text(float(self.delta[i]), '+')} [{number_text(float(self.low[i]))}, "
            f"{number_text(float(self.high[i]))}] nats per token at {self.dials[i]:g}{dial.unit}"
            for i in ((0, -1) if len(self.dials) > 1 else (0,))
        )
        return f"Turning {dial.name} costs {ends}, over {self.tokens:,} tokens of text."

    def tables(self) -> list[Table]:
        """The cost at each dial, with its interval."""
        rows = zip(self.dials, self.delta, self.low, self.high, strict=True)
        n = len(self.block_tokens)
        cells = [
            [number_text(float(dial)), cell(Estimate(float(mean), float(low), float(high), n))]
            for dial, mean, low, high in rows
        ]
        heads = [self.steering.dial.name, "change in cross-entropy, nats per token"]
        return [Table(f"Cost on {self.tokens:,} tokens of text", heads, cells)]

    def plot(self, ax: Any = None) -> Any:
        """The cost over the dial with its interval: on the matplotlib axes `ax` or those of a new
        figure; they are returned."""
        from trimtab.strength.pictures import plot_cost

        return plot_cost(self, ax)

    def as_json(self) -> dict[str, Any]:
        """For `trimtab strength curve --json`."""
        return {
            "steering": self.steering.label,
            "dials": self.dials.tolist(),
            "delta_ce": self.delta.tolist(),
            "ci95": torch.stack((self.low, self.high), 1).tolist(),
            "base": self.base,
            "tokens": self.tokens,
            "blocks": self.per_block.shape[1],
            "plateaus": None if self.plateaus is None else list(self.plateaus),
            "why": self.why,
        }


def cost_curve(
    language_model: LanguageModel,
    steering: Steering,
    texts: Sequence[str],
    dials: Sequence[float],
    *,
    block: int = 128,
    limit_tokens: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> CostCurve:
    """Cross-entropy of texts at each dial minus that of the unsteered model.

    Texts are joined with the end-of-text token and cut into blocks of `block` tokens;
    `limit_tokens` takes the first ones only. A block begins with BOS where the tokenizer adds one.
    Every token of a block is one that the next is read from, so a steering of the last token (whose
    positions are `last`) acts on all of them, as if the block were written from its first token on.
    """
    check_turns(language_model, steering, force)
    if not dials or not all(math.isfinite(dial) for dial in dials):
        raise TrimtabError("cross-entropy needs dials that are finite numbers")
    blocks = cut_into_blocks(language_model, texts, block, limit_tokens)
    turns = sorted({float(dial) for dial in dials})
    nll = _nll(language_model, steering, blocks, [None, *turns])
    if not torch.isfinite(nll).all():
        raise TrimtabError(
            "the model's numbers overflow at some dials: try --dtype float32, or a smaller range"
        )
    base, per_block = nll[0], nll[1:] - nll[0]
    idle = idle_dial(steering)
    if idle in turns:
        per_block[turns.index(idle)] = 0.0
    counts = torch.tensor([len(tokens) - 1 for tokens in blocks], dtype=torch.float64)
    intervals = [weighted_interval(row, counts, seed) for row in per_block]
    mean = float((base * counts).sum() / counts.sum())
    plateaus, why = None, ""
    try:
        below, above = (_plateau(language_model, steering, blocks, sign) for sign in (-1, 1))
        plateaus = (below - mean, above - mean)
    except TrimtabError as error:
        why = str(error)
    return CostCurve(
        steering,
        torch.tensor(turns, dtype=torch.float64),
        torch.tensor([interval.value for interval in intervals], dtype=torch.float64),
        torch.tensor([interval.low for interval in intervals], dtype=torch.float64),
        torch.tensor([interval.high for interval in intervals], dtype=torch.float64),
        per_block,
        counts,
        mean,
        plateaus,
        why,
    )


def cut_into_blocks(
    language_model: LanguageModel, texts: Sequence[str], block: int, limit_tokens: int | None
) -> list[list[int]]:
    """Token ids of blocks: `block` tokens of text each (the last one may be shorter)."""
    if not 2 <= block < language_model.max_length:
        raise TrimtabError(
            f"a block has 2 tokens or more and fits the model ({language_model.max_length}), "
            f"not {block}"
        )
    if limit_tokens is not None and limit_tokens < 2:
        raise TrimtabError(f"cross-entropy needs 2 tokens or more, not {limit_tokens}")
    tokenizer = language_model.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if limit_tokens is not None and len(stream) >= limit_tokens:
            stream = stream[:limit_tokens]
            break
    begins = language_model.encode(["a"])[0][0] == language_model.bos
    start = [language_model.bos] if begins and language_model.bos is not None else []
    blocks = [start + stream[at : at + block] for at in range(0, len(stream), block)]
    blocks = [tokens for tokens in blocks if len(tokens) > 1]
    if not blocks:
        raise TrimtabError("the text has too few tokens to measure cross-entropy on")
    return blocks


@torch.no_grad()
def _nll(
    language_model: LanguageModel,
    steering: Steering,
    blocks: Sequence[list[int]],
    dials: Sequence[float | None],
) -> Tensor:
    """Mean negative log-likelihood per token of each block at each dial (None: unsteered),
    [dials, blocks] in float64."""
    lm, below = language_model, blocks_apart(language_model, [steering])
    from_first = any(map(_from_end, steering.scopes))
    nll = torch.zeros(len(dials), len(blocks), dtype=torch.float64)
    with progress("measuring cross-entropy", len(blocks) * len(dials)) as advance:
        for rows in batches_by_length([len(tokens) for tokens in blocks], lm.batch_tokens):
            texts = [blocks[i] for i in rows]
            ends = [1 if from_first else len(text) for text in texts]
            streams = run_lower(lm, texts, below)
            for place, dial in enumerate(dials):
                read = read_at_dial(lm, steering, texts, streams, dial, ends)
                nll[place, rows] = torch.stack([-each.log_p.mean() for each in read])
                advance(len(rows))
    return nll


def _from_end(scope: Scope) -> bool:
    """Whether it acts on tokens that a next one is read from, and on no others of a prompt."""
    return scope.at_end is not False and scope.holds(Situation("prompt")) is False


def _plateau(
    lm: LanguageModel, steering: Steering, blocks: Sequence[list[int]], sign: Literal[1, -1]
) -> float:
    """Cross-entropy of the blocks under the limit distribution, which no longer sees the text."""
    log_p = limit(lm, steering, sign).double().cpu()
    targets = torch.tensor([token for tokens in blocks for token in tokens[1:]])
    return float(-log_p[targets].mean())
