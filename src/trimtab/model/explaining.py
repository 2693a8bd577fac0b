"""Token by token what will fire: on which tokens of a text the interventions of steerings act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.anatomy import Anatomy
from trimtab.errors import shown
from trimtab.model.attach import attached
from trimtab.model.gate_reports import Fired, decided_by, settled, token_by_token, watch
from trimtab.model.gate_scores import refuse_images
from trimtab.model.gating import GateAtWork
from trimtab.model.marks import Marks
from trimtab.model.one_pass import Pass
from trimtab.model.padding import input_device
from trimtab.model.standing import Prompts
from trimtab.model.trails import Trail
from trimtab.reports import Presented, Table
from trimtab.steering import Scope, Steering


@dataclass(frozen=True)
class Fires:
    """What acts alike: the interventions of one steering that share a scope, and how much of the
    dial each token of the text gets, [tokens]: 0 where it is left as it is."""

    steering: str
    scope: str
    sites: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Firing(Presented):
    """Which tokens of a text are steered: their ids and texts, how many of them are the prompt, and
    what acts on each. `print(firing)` shows a table."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    prompt: int
    fires: tuple[Fires, ...]

    @property
    def summary(self) -> str:
        """How many tokens are steered, in one sentence."""
        steered = [
            f"{sum(weight != 0 for weight in each.weights)} under '{each.scope}'"
            for each in self.fires
        ]
        written = len(self.ids) - self.prompt
        of = f"{self.prompt} tokens of the prompt and {written} that were generated"
        return f"Of {of} are steered: {', '.join(steered) or 'none'}."

    def tables(self) -> list[Table]:
        """A line for each token, a column for what acts alike."""
        rows = []
        for i, (token, text) in enumerate(zip(self.ids, self.texts, strict=True)):
            part = "prompt" if i < self.prompt else "generated"
            marks = [_mark(each.weights[i]) for each in self.fires]
            rows.append([str(i), str(token), shown(repr(text), 40), part, *marks])
        heads = [f"{each.scope} ({_sites(each.sites)})" for each in self.fires]
        return [Table("What acts on which token", ["", "id", "token", "part", *heads], rows)]

    def __str__(self) -> str:
        (table,) = self.tables()
        lines = [list(table.heads), *(list(map(str, row)) for row in table.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shaped = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join([*shaped, self.summary])

    def as_json(self) -> dict[str, Any]:
        """For `trimtab inspect --json`."""
        return {
            "tokens": [
                {"id": token, "text": text, "generated": i >= self.prompt}
                for i, (token, text) in enumerate(zip(self.ids, self.texts, strict=True))
            ],
            "fires": [
                {
                    "steering": each.steering,
                    "scope": each.scope,
                    "sites": list(each.sites),
                    "weights": list(each.weights),
                }
                for each in self.fires
            ],
        }


def firing(
    anatomy: Anatomy,
    marks: Marks,
    steerings: Sequence[Steering],
    prompt: Sequence[int],
    new: Sequence[int],
) -> Firing:
    """What steerings act on in a prompt (token ids) and in the tokens that were written after it:
    what the model does when it reads and writes them."""
    ids = (*prompt, *new)
    fired = _fired(anatomy, marks, steerings, ids, len(prompt))
    fires = tuple(
        Fires(
            one.label,
            str(scope),
            tuple(each.site for each in one.interventions if each.scope == scope),
            _gated(
                scope_weights(marks, scope, ids, len(prompt)),
                where,
            ),
        )
        for one, where in zip(steerings, fired, strict=True)
        for scope in one.scopes
    )
    texts = tuple(marks.tokenizer.decode([token]) for token in ids)
    return Firing(ids, texts, len(prompt), fires)


@torch.no_grad()
def _fired(
    anatomy: Anatomy, marks: Marks, steerings: Sequence[Steering], ids: Sequence[int], prompt: int
) -> list[Sequence[bool]]:
    """Of each steering where its gate fires in a text (token ids) whose first `prompt` tokens are
    the prompt, when all of them act; everywhere where it has none."""
    if all(one.gate is None for one in steerings):
        return [(True,) * len(ids) for _ in steerings]
    refuse_images(marks, [ids])
    (row,), decided = settled(anatomy, marks, [tuple(steerings)], [ids[:prompt]])
    with attached(anatomy, [row], marks, block=False) as sequences:
        sequences.given_ends, sequences.ended_at_once = [prompt], True
        watch(sequences.gates)
        text = torch.tensor([list(ids)], device=input_device(anatomy.model))
        anatomy.body(input_ids=text, use_cache=False)
    early = {place: each for (_, place), each in decided.items()}
    return [_where(by, len(ids)) for by in decided_by(steerings, early, sequences.gates)]


def _where(by: Fired | GateAtWork | None, tokens: int) -> Sequence[bool]:
    """At which tokens of a text what decided of it fires."""
    if isinstance(by, GateAtWork) and by.gate.kind == "token":
        found: list[bool] = token_by_token(by, 0)[0].tolist()
        return found
    fired = by.seen[-1].fired[0] if isinstance(by, GateAtWork) else by is None or by.fired
    return (bool(fired),) * tokens


def _gated(weights: tuple[float, ...], fired: Sequence[bool]) -> tuple[float, ...]:
    """What a gate leaves of the weights of tokens."""
    return tuple(weight * fires for weight, fires in zip(weights, fired, strict=True))


def scope_weights(marks: Marks, scope: Scope, ids: Sequence[int], prompt: int) -> tuple[float, ...]:
    """How much of the dial each token of a text gets under a scope, [tokens]: 0 where it is left as
    it is; the first `prompt` tokens are the prompt."""
    device, placed = torch.device("cpu"), marks.place(scope)
    trail = Trail(torch.tensor([list(ids)]))
    now = Pass(0, len(ids), Prompts.ending([prompt]), trail=trail)
    now.check_turns(placed, [True])
    mask = torch.as_tensor(now.mask(placed, device)).expand(1, len(ids)).double()
    if placed.decay is not None:
        mask = mask * now.factors(placed.decay, device)
    found: list[float] = mask[0].tolist()
    return tuple(found)


def acted(
    marks: Marks,
    steerings: Sequence[Steering],
    gates: Sequence[Fired],
    prompt: Sequence[int],
    new: Sequence[int],
) -> list[dict[str, Any]]:
    """Of each steering of a text that was written: where its dial stood, on how many tokens of the
    prompt and of the answer it acted (the last one that was written is not read), and what its gate
    decided, a token gate at how many of these tokens, None of the answer's where only the prompt's
    are known; `gates` are those that have one, in order."""
    found, decided = [], list(gates)
    for steering in steerings:
        told: dict[str, Any] = {"dial": steering.setting}
        gate = decided.pop(0) if steering.gate is not None and decided else None
        if gate is None or gate.fired or gate.kind == "token":
            told["tokens"] = _counted(marks, steering, prompt, new[:-1])
        if gate is not None:
            told["gate"] = {"kind": gate.kind, "fired": gate.fired, "scores": gate.scores}
            if gate.kind == "token":
                at = {"prompt": gate.prompt_tokens, "answer": gate.new_tokens}
                told["gate"]["tokens"] = at
        found.append(told)
    return found


def _counted(
    marks: Marks, steering: Steering, prompt: Sequence[int], read: Sequence[int]
) -> dict[str, int]:
    """On how many tokens of a prompt, and read after it, the scopes of a steering are true."""
    ids, end = [*prompt, *read], len(prompt)
    each = [scope_weights(marks, scope, ids, end) for scope in steering.scopes]
    acts = [any(weights) for weights in zip(*each, strict=True)]
    return {"prompt": sum(acts[:end]), "answer": sum(acts[end:])}


def _mark(weight: float) -> str:
    return "" if weight == 0 else "x" if weight == 1 else f"{weight:.3g}"


def _sites(sites: Sequence[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{len(sites)} sites"
