"""A GPT of one block, trained here, that is steered toward words in capitals (Figure A.4 of
"Towards Understanding Steering Strength")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from trimtab.contrasts import Contrast
from trimtab.fitting import fit
from trimtab.methods import CAA
from trimtab.model import LanguageModel, wrap
from trimtab.options import Tracing, flat
from trimtab.papers.result import StudyResult, Value
from trimtab.papers.strength.curves import plain_corpus
from trimtab.reading import plain_texts
from trimtab.reports import Picture, Table
from trimtab.strength import Curves, curve, draw, read
from trimtab.terminal import progress

_BLOCK, _RATE = 64, 3e-3


@dataclass(frozen=True, kw_only=True)
class Training:
    """The small model and what it learns from."""

    steps: int = 2000
    width: int = 128
    batch: int = 8
    text_tokens: int = 1_000_000


@flat
def one_layer(
    language_model: LanguageModel,
    *,
    training: Training = Training(),
    tracing: Tracing = Tracing(span=(0.0, 50.0), points=513, choose="end"),
    contexts: int = 4,
    data: str | None = None,
    seed: int = 0,
) -> StudyResult:
    """Train one block of `width` units on plain text, every other piece of it in capitals, and
    steer it from text as it is toward capitals. The model lends its tokenizer only."""
    texts = plain_corpus(data, training.text_tokens)
    small, loss = _trained(language_model, texts, training, seed)
    pieces = [
        " ".join(piece.split()[:30])
        for text in texts[:200]
        for piece in text.split(". ")
        if piece.strip()
    ][:400]
    source = Contrast.from_texts([piece.upper() for piece in pieces], pieces, "capitals")
    steering = fit([CAA(0, 1.0, "mean")], small, source, measure=False)[0]
    asked = [" ".join(text.split()[:30]) for text in plain_texts()[:contexts]]
    followed = curve(small, steering, asked, tracing=tracing, chat=False)
    reading = read(followed)
    shown = [token.token for token in followed.tokens]
    capitals = sum(token.isupper() for token in shown)
    one = Curves("one block, toward capitals", reading, followed)
    picture = Picture(
        "A GPT of one block over the strength α", "curves", draw([one]),
        "change in next-token probability of the tokens that are highest at the largest strength",
    )  # fmt: skip
    values = {
        "highest tokens": Value(", ".join(map(repr, shown))),
        "capitals among them": Value(f"{capitals} of {len(shown)}"),
        "tokens with a bump": Value(sum(peak.kind == "bump" for peak in reading.peaks)),
        "tokens that rise on": Value(sum(peak.kind == "rises" for peak in reading.peaks)),
        "loss, nats per token": Value(loss),
    }
    size = sum(parameter.numel() for parameter in small.model.parameters())
    table = Table("In words", ["what the curves say"], [[line] for line in reading.lines()])
    steps = training.steps
    notes = [f"trained here: {size / 1e6:.1f} million parameters, {steps} steps, loss {loss:.2f}"]
    document = {"curve": followed.as_json(), "reading": reading.as_json(), "loss": loss}
    return StudyResult(document, values, [table], [picture], notes)


def _trained(
    language_model: LanguageModel, texts: list[str], training: Training, seed: int
) -> tuple[LanguageModel, float]:
    """The small model after so many steps of Adam, and its loss over the last tenth of them."""
    tokenizer, steps = language_model.tokenizer, training.steps
    blocks = _blocks(tokenizer, texts, training.text_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=256, n_embd=training.width, n_layer=1, n_head=4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        order = torch.randint(len(blocks), (steps, training.batch))
        losses = _train(model, blocks, order)
    last = losses[-max(1, steps // 10) :]
    return wrap(model.eval(), tokenizer, "one-block GPT"), sum(last) / len(last)


def _train(model: GPT2LMHeadModel, blocks: Tensor, order: Tensor) -> list[float]:
    steps = len(order)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / warm) * max(0.1, 1 - step / steps)
    )
    losses = []
    model.train()
    with progress("training one block", steps) as advance:
        for rows in order:
            chosen = blocks[rows]
            logits = model(chosen).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            advance(1)
    return losses


def _blocks(tokenizer: Any, texts: list[str], most: int) -> Tensor:
    """The texts, every other one in capitals, as blocks [blocks, tokens] of token ids."""
    ids: list[int] = []
    for i in range(2 * len(texts)):
        text = texts[i // 2].upper() if i % 2 else texts[i // 2]
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= most:
            break
    count = len(ids) // _BLOCK
    return torch.tensor(ids[: count * _BLOCK]).reshape(count, _BLOCK)
