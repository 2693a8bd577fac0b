"""What gates make of texts in a pass of its own, which is not steered and goes no higher than the
gate reads: two-pass gates decide by it, and fits and explanations ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.anatomy import Anatomy, Edit, Enough, Point, hooked
from trimtab.errors import TrimtabError
from trimtab.model.batching import BATCH_TOKENS, batches_by_length
from trimtab.model.gating import Decision, GateAtWork
from trimtab.model.marks import Marks
from trimtab.model.one_pass import Pass
from trimtab.model.padding import input_device
from trimtab.model.running import unsteered
from trimtab.model.standing import Prompts
from trimtab.model.trails import Trail
from trimtab.steering import Condition, Gate, Scope


@torch.no_grad()
def score_pass(
    anatomy: Anatomy, marks: Marks, gate: Gate, texts: Sequence[Sequence[int]], ends: Sequence[int]
) -> Decision:
    """What a gate decides of texts (token ids) whose prompts end so far in, in one pass that is not
    steered and goes no higher than the gate reads; padding on the right."""
    refuse_images(marks, texts)
    device, longest = input_device(anatomy.model), max(map(len, texts))
    ids = pad_sequence([torch.tensor(list(text)) for text in texts], batch_first=True).to(device)
    ones = [torch.ones(len(text), dtype=torch.bool) for text in texts]
    real = pad_sequence(ones, batch_first=True).to(device)
    work = GateAtWork(gate, marks, partial(score_prompts, anatomy, marks))
    now = Pass(0, longest, Prompts.ending(list(ends)), trail=Trail(ids, real))
    for placed in work.scopes:
        now.check_turns(placed, [True])
    decision = Decision(work, now)
    left = set(range(len(gate.conditions)))

    def reader(numbers: Sequence[int]) -> Edit:
        def edit(x: Tensor) -> None:
            for number in numbers:
                decision.read(number, x)
            left.difference_update(numbers)
            if not left:
                raise Enough

        return edit

    edits: dict[Point, Edit] = {
        anatomy.point(site): reader([i for i, c in enumerate(gate.conditions) if c.site == site])
        for site in gate.sites
    }
    with unsteered(anatomy), hooked(anatomy.body, edits), suppress(Enough):
        anatomy.body(input_ids=ids, attention_mask=real.long(), use_cache=False)
    return decision


def score_prompts(
    anatomy: Anatomy, marks: Marks, gate: Gate, prompts: Sequence[Sequence[int]]
) -> Tensor:
    """The scores of prompts (token ids) as a latched gate has them, [conditions, prompts] in
    float64; equal prompts are read once."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    found = torch.zeros(len(gate.conditions), len(distinct), dtype=torch.float64)
    once = gate.of_kind("latched")
    for rows in batches_by_length(list(map(len, distinct)), BATCH_TOKENS):
        texts = [distinct[i] for i in rows]
        decision = score_pass(anatomy, marks, once, texts, list(map(len, texts)))
        found[:, rows] = torch.stack(decision.scores_in_order()).cpu()
    places = {text: i for i, text in enumerate(distinct)}
    return found[:, [places[tuple(prompt)] for prompt in prompts]]


@torch.no_grad()
def read_prompts(
    anatomy: Anatomy,
    marks: Marks,
    sites: Sequence[str],
    reads: Scope,
    prompts: Sequence[Sequence[int]],
    advance: Callable[[int], object],
) -> dict[str, Tensor]:
    """What a condition that reads a scope would score of prompts (token ids), at each of some
    sites: [prompts, units] in float32; NaN of a prompt without a token of the scope."""
    conditions = [
        Condition(site, torch.ones(anatomy.width(site)), 0.0, reads=reads) for site in sites
    ]
    gate = Gate(tuple(conditions), "latched")
    found = {site: torch.zeros(len(prompts), anatomy.width(site)) for site in sites}
    for rows in batches_by_length(list(map(len, prompts)), BATCH_TOKENS):
        texts = [prompts[i] for i in rows]
        decision = score_pass(anatomy, marks, gate, texts, list(map(len, texts)))
        for number, site in enumerate(sites):
            found[site][rows] = decision.activations[number].float().cpu()
        advance(len(rows))
    return found


def refuse_images(marks: Marks, texts: Sequence[Sequence[int]]) -> None:
    """Refuse texts (token ids) with images, which a pass of a gate's own does not see."""
    if any(token in marks.images for text in texts for token in text):
        raise TrimtabError(
            "a prompt has an image, and two-pass gates, and what fits, checks and explains gates, "
            "read text alone: generate with a token or a latched gate"
        )
