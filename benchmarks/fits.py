"""Fits against the authors' ways, each written anew from its formulas: AcT, AlphaSteer, training.

act         causal Mean-AcT at the FFN outputs of all blocks: all texts advance block by block
            once, against a pass for each site up to it, with the maps below it active
alphasteer  u of the rank-one map u r' by Cholesky in the directions that are left, against the
            authors' matrix of units by units, P (X'X + lambda P)^+ X' R with a pseudo-inverse; the
            same tokens are then steered by either
training    steps of SSV at block 12 of 30, against a plain loop that runs every block for each
            step; both take the same steps on the same batch
loreft      steps of LoReFT there, against pyreft where it is installed: its intervention in its
            model, without transformers' Trainer around it, which cannot train it any more

Before anything is timed it is checked that both ways come to the same. What is kept of AlphaSteer
is counted in numbers, 2 d against d d.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from clock import Report, interleaved, ratio
from torch import Tensor

import trimtab as tt
from trimtab.methods.alphasteer import gate_of
from trimtab.reading import Reading, encode_contrast, next_tokens, side_readings

MODEL = "smollm2-135m-instruct"
PAIRS, TRAINED, STEPS, BLOCK, RATE, RANK = 12, 4, 6, 12, 0.01, 4
#: Of AlphaSteer: units, texts to steer, protected texts, tokens that are steered.
UNITS, STEERED, PROTECTED, TOKENS = 1024, 200, 2000, 4096
TOLERANCE = 1e-2

Say = Callable[[str], None]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    contrast = tt.Contrast.builtin("formality").part("train").take(pairs or PAIRS)
    return [
        _act(lm, contrast, rounds, say),
        *_alphasteer(rounds, say),
        _training(lm, contrast.take(TRAINED), rounds, say),
        *_loreft(lm, contrast.take(TRAINED), rounds, say),
    ]


def _check(what: str, ours: Tensor, theirs: Tensor) -> float:
    apart = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not apart < TOLERANCE:
        raise tt.TrimtabError(f"{what}: the two ways differ by {apart:.2g}")
    return apart


# -- AcT ------------------------------------------------------------------------------------------


def _act(lm: tt.LanguageModel, contrast: tt.Contrast, rounds: int, say: Say) -> Report:
    method = tt.AcT(site="ffn_out", slope="one")
    sides = [
        [list(row.texts()[side]) for row in encode_contrast(lm, contrast, None)] for side in (0, 1)
    ]
    ours = partial(method.fit, lm, contrast, measure=False)
    theirs = partial(_site_by_site, lm, *sides)
    say("fits: checking that both ways find the same maps")
    apart = []
    for each, shift in zip(ours().interventions, theirs(), strict=True):
        assert each.operator.added is not None
        apart.append(_check("act", each.operator.added, shift))
    say(f"fits: act, {rounds} rounds")
    times = interleaved({"one pass": ours, "a pass a site": theirs}, rounds)
    return Report(
        "fits: causal AcT, SmolLM2 135M, 30 sites",
        len(contrast),
        times,
        [ratio("a pass a site / one pass", times["a pass a site"], times["one pass"])],
        {"unit": "pairs", "apart": max(apart)},
    )


class _Enough(Exception):  # noqa: N818 - no error: the rest of a pass is not wanted
    pass


def _site_by_site(
    lm: tt.LanguageModel, positive: Sequence[list[int]], negative: Sequence[list[int]]
) -> list[Tensor]:
    """The shift of each block's FFN output, in a pass of all texts for each."""
    body: Any = lm.model.model
    texts = [*positive, *negative]
    maps: list[Tensor] = []
    for block in body.layers:
        seen = torch.zeros(len(texts), lm.anatomy.width("layers.0.ffn_out"))
        for start in range(0, len(texts), 8):
            ids, mask = _padded(texts[start : start + 8])

            see = partial(_means, mask=mask, into=seen[start : start + 8])
            with torch.no_grad(), _carried(body, maps):
                hook = block.mlp.register_forward_hook(see)
                try:
                    body(input_ids=ids, attention_mask=mask, use_cache=False)
                except _Enough:
                    pass
                finally:
                    hook.remove()
        maps.append(seen[: len(positive)].mean(0) - seen[len(positive) :].mean(0))
    return maps


def _means(module: Any, args: Any, x: Tensor, mask: Tensor, into: Tensor) -> None:
    """The mean of each text's tokens, and the end of the pass."""
    real = mask[..., None]
    into.copy_((x * real).sum(1) / real.sum(1))
    raise _Enough


@contextmanager
def _carried(body: Any, maps: Sequence[Tensor]) -> Iterator[None]:
    """The maps that there are so far, at work."""

    def carry(module: Any, args: Any, x: Tensor, shift: Tensor) -> Tensor:
        return x + shift

    hooks = [
        block.mlp.register_forward_hook(partial(carry, shift=shift))
        for block, shift in zip(body.layers, maps, strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _padded(texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return ids, mask


# -- AlphaSteer -----------------------------------------------------------------------------------


def _alphasteer(rounds: int, say: Say) -> list[Report]:
    made = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2, UNITS, dtype=torch.float64)
    benign = torch.randn(PROTECTED, UNITS, generator=made, dtype=torch.float64) * spread
    harmful = torch.randn(STEERED, UNITS, generator=made, dtype=torch.float64) * 0.3 + 0.2
    r = torch.randn(UNITS, generator=made, dtype=torch.float64)
    ours = partial(gate_of, harmful, benign, 0.5, 10.0)
    theirs = partial(_matrix, harmful, benign, r, 0.5, 10.0)
    u, matrix = ours(), theirs()
    apart = _check("alphasteer", u[:, None] * r, matrix)
    x = torch.randn(TOKENS, UNITS, generator=made)
    vector, gate, whole = r.float(), u.float(), matrix.float()
    say(f"fits: alphasteer, {rounds} rounds")
    fitted = interleaved({"rank one": ours, "d × d": theirs}, rounds)
    steered = interleaved(
        {
            "rank one": lambda: _discard(x + (x @ gate)[:, None] * vector),
            "d × d": lambda: _discard(x + x @ whole),
        },
        rounds,
    )
    kept = {"rank one": 2 * UNITS, "d × d": UNITS * UNITS}
    facts = {"unit": "units", "apart": apart, "numbers kept": kept}
    return [
        Report(
            name,
            UNITS,
            times,
            [ratio("d × d / rank one", times["d × d"], times["rank one"])],
            facts,
        )
        for name, times in (
            ("fits: AlphaSteer, the fit of one site", fitted),
            (f"fits: AlphaSteer, {TOKENS:,} tokens steered", steered),
        )
    ]


def _discard(x: Tensor) -> None:
    del x


def _matrix(harmful: Tensor, benign: Tensor, r: Tensor, share: float, ridge: float) -> Tensor:
    """The map of units to units, for activations as rows: null space, then a ridge towards r."""
    _, _, rows = torch.linalg.svd(benign.T @ benign)
    q = rows[-int(share * len(r)) :].T
    p = q @ q.T
    x = harmful @ p
    wanted = r.expand(len(x), -1)
    inverse: Tensor = torch.linalg.pinv(x.T @ x + ridge * p, rtol=1e-9, hermitian=True)
    found: Tensor = p @ inverse @ x.T @ wanted
    return found


# -- training -------------------------------------------------------------------------------------


def _training(lm: tt.LanguageModel, contrast: tt.Contrast, rounds: int, say: Say) -> Report:
    method = tt.SSV(
        layer=BLOCK, steps=STEPS, batch=len(contrast), learning_rate=RATE, patience=0, alpha=1.0
    )
    ours = partial(method.fit, lm, contrast, measure=False)
    rows = encode_contrast(lm, contrast, None)
    texts = [(list(row.texts()[0]), row.answers[0]) for row in rows]
    theirs = partial(_plain_loop, lm, texts)
    lm.model.requires_grad_(False)  # nobody asks for derivatives by weights
    say("fits: checking that both ways learn the same")
    learnt: Any = ours().interventions[0].operator
    apart = _check("training", learnt.vector, theirs())
    say(f"fits: training, {rounds} rounds")
    times = interleaved({"trimtab": ours, "every block": theirs}, rounds)
    return Report(
        f"fits: {STEPS} steps of SSV at block {BLOCK} of 30, SmolLM2 135M",
        len(contrast),
        times,
        [ratio("every block / trimtab", times["every block"], times["trimtab"])],
        {
            "unit": "texts",
            "apart": apart,
            "steps per CPU second": {name: STEPS / min(each.cpu) for name, each in times.items()},
        },
    )


def _plain_loop(lm: tt.LanguageModel, texts: Sequence[tuple[list[int], int]]) -> Tensor:
    """The vector after the steps, the whole model run in each."""
    model: Any = lm.model
    vector = torch.full((lm.anatomy.width(f"layers.{BLOCK}.resid"),), 0.01, requires_grad=True)
    optimizer = torch.optim.AdamW([vector], lr=RATE, weight_decay=0.0)
    ids, mask = _padded([text for text, _ in texts])
    hook = model.model.layers[BLOCK].register_forward_hook(
        lambda module, args, out: (
            (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
        )
    )
    try:
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            log_p = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(
                -1
            )
            losses = []
            for row, (text, start) in enumerate(texts):
                places = torch.arange(start - 1, len(text) - 1)
                losses.append(-log_p[row, places, ids[row, places + 1]].mean())
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_([vector], 1.0)
            optimizer.step()
    finally:
        hook.remove()
    return vector.detach()


# -- LoReFT ---------------------------------------------------------------------------------------


def _loreft(lm: tt.LanguageModel, contrast: tt.Contrast, rounds: int, say: Say) -> list[Report]:
    if importlib.util.find_spec("pyreft") is None:
        say("fits: LoReFT is left out, since pyreft is not installed")
        return []
    method = tt.LoReFT(
        layer=BLOCK,
        rank=RANK,
        positions="prompt[-1:]",
        steps=STEPS,
        batch=len(contrast),
        learning_rate=RATE,
        patience=0,
    )
    ours = partial(method.fit, lm, contrast, measure=False)
    # What the positive answers are read from: every other reading is a negative one.
    readings = side_readings(lm, contrast)[::2]
    theirs = partial(_its_steps, lm, readings)
    say("fits: checking that pyreft computes the same with what was learnt")
    learnt = ours()
    nll = torch.stack(
        [-one.log_p.mean() for _, some in next_tokens(lm, readings, learnt) for one in some]
    )
    same, intervention = _pyreft(lm)
    _as_learnt(intervention, learnt.interventions[0].operator)
    apart = _check("loreft", nll.sort().values, _losses(same, readings).detach().sort().values)
    theirs()
    say(f"fits: loreft, {rounds} rounds")
    times = interleaved({"trimtab": ours, "pyreft": theirs}, rounds)
    return [
        Report(
            f"fits: {STEPS} steps of LoReFT at block {BLOCK} of 30, SmolLM2 135M",
            len(contrast),
            times,
            [ratio("pyreft / trimtab", times["pyreft"], times["trimtab"])],
            {
                "unit": "texts",
                "apart": apart,
                "steps per CPU second": {
                    name: STEPS / min(each.cpu) for name, each in times.items()
                },
            },
        )
    ]


def _pyreft(lm: tt.LanguageModel) -> tuple[Any, Any]:
    """pyreft's model, and its intervention at the block, as they begin; no derivative is taken by a
    weight."""
    import pyreft

    width = lm.anatomy.width(f"layers.{BLOCK}.resid")
    intervention = pyreft.LoreftIntervention(
        embed_dim=width, low_rank_dimension=RANK, dtype=torch.float32
    )
    place = {"layer": BLOCK, "component": "block_output", "low_rank_dimension": RANK}
    config = pyreft.ReftConfig(representations=[{**place, "intervention": intervention}])
    return pyreft.get_reft_model(lm.model, config), intervention


def _losses(trained: Any, readings: Sequence[Reading]) -> Tensor:
    """The mean loss of each answer, [texts], steered at the last token of its prompt."""
    ids, mask = _padded([list(reading.tokens) for reading in readings])
    labels = torch.full_like(ids, -100)
    for row, reading in enumerate(readings):
        labels[row, list(reading.positions)] = torch.tensor(reading.targets)
    places = [[[reading.positions[0]] for reading in readings]]
    _, out = trained(
        {"input_ids": ids, "attention_mask": mask},
        unit_locations={"sources->base": (None, places)},
    )
    losses = torch.nn.functional.cross_entropy(out.logits.transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / (labels >= 0).sum(1)


def _its_steps(lm: tt.LanguageModel, readings: Sequence[Reading]) -> None:
    """The steps, by pyreft."""
    trained, _ = _pyreft(lm)
    optimizer = torch.optim.AdamW(trained.get_trainable_parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        _losses(trained, readings).mean().backward()
        optimizer.step()


def _as_learnt(intervention: Any, learnt: Any) -> None:
    """Set R, W and b of pyreft's intervention: U = R', V = (W - R)', c = R'b."""
    r = learnt.u.T
    with torch.no_grad():
        intervention.rotate_layer.weight = learnt.u
        intervention.learned_source.weight.copy_(learnt.v.T + r)
        intervention.learned_source.bias.copy_(r @ learnt.c)
