"""AlphaSteer: the gate by the authors' formula of a whole matrix, its limits, and what it leaves
alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, read_last, refused_in_one_line, relative
from test_act import CONTRAST, PAIRS
from trimtab.methods.alphasteer import gate_of
from trimtab.steering import Affine


def draw(seed: int, rows: int, units: int = 24, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank or units, generator=generator, dtype=torch.float64)
    if rank is not None:
        x = x @ torch.randn(rank, units, generator=generator, dtype=torch.float64)
    return x


def whole_matrix(h: Tensor, b: Tensor, r: Tensor, share: float, ridge: float) -> Tensor:
    """What the authors solve for, [units, units]: h <- h + s h M, with M = P D."""
    _, _, v = torch.linalg.svd(b.T @ b)
    q = v[-int(share * h.shape[1]) :].T
    p = q @ q.T
    x = h @ p
    d = torch.linalg.pinv(x.T @ x + ridge * p) @ x.T @ torch.ones(len(h), 1).double() @ r[None]
    return p @ d


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_gate_is_the_authors_matrix(share: float) -> None:
    h, b, r = draw(0, 30), draw(1, 200), draw(2, 1)[0]
    u = gate_of(h, b, share, 10.0)
    matrix = whole_matrix(h, b, r, share, 10.0)
    assert relative(torch.outer(u, r), matrix) < 1e-9
    assert torch.linalg.matrix_rank(matrix) == 1


def test_limits_of_the_penalty_and_a_true_null_space() -> None:
    h, b = draw(0, 8), draw(1, 50, rank=10)
    solved = gate_of(h, b, 0.5, 1e-9)
    assert torch.allclose(h @ solved, torch.ones(8, dtype=torch.float64), atol=1e-6)
    assert float((b @ solved).abs().max()) < 1e-6 * float(b.abs().max()), "rank 10 of 24, 12 free"
    sizes = [float((h @ gate_of(h, b, 0.5, ridge)).mean()) for ridge in (1e-6, 1.0, 10.0, 1e3, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(1, abs=1e-4)
    assert sizes[-1] == pytest.approx(0, abs=1e-4)


def test_fewer_protected_texts_than_units_leave_nothing_to_chance() -> None:
    """In another basis the same directions are found, where their order among equals is another."""
    h, b = draw(0, 8), draw(1, 6)
    turned = torch.linalg.qr(draw(3, 24)).Q
    u = gate_of(h, b, 0.4, 1.0)
    assert relative(turned @ gate_of(h @ turned, b @ turned, 0.4, 1.0), u) < 1e-9
    assert float((b @ u).abs().max()) < 1e-9


def test_what_is_fitted_is_read_at_last_tokens(tmp_path: Path) -> None:
    lm = language_model("llama")
    protected = [f"The rudder number {i} turns ship {i * 7 % 5}" for i in range(15)]
    (tmp_path / "alone.txt").write_text("\n".join(protected) + "\n\n")
    method = tt.AlphaSteer(str(tmp_path / "alone.txt"), layer=1, share=0.4, ridge=0.5)
    steering = method.fit(lm, CONTRAST, measure=False)
    (one,) = steering.interventions
    operator = one.operator
    assert isinstance(operator, Affine)
    sides = [[p + side for p, *both in PAIRS for side in both[i : i + 1]] for i in (0, 1)]
    positive, negative = (read_last(lm.model, "resid", side)[:, 1].double() for side in sides)
    r = positive.mean(0) - negative.mean(0)
    b = read_last(lm.model, "resid", protected)[:, 1].double()
    held = torch.arange(15) % 5 == 4
    u = gate_of(torch.cat((positive, negative)), b[~held], 0.4, 0.5)
    assert relative(operator.u[:, 0], r) < 2e-3
    assert relative(operator.v[:, 0], u) < 2e-2
    said = steering.findings["gate"][one.site]
    own = torch.cat((positive, negative))
    assert said["steered"] == pytest.approx(float((own @ u).mean()), abs=0.02)
    assert said["protected"] == pytest.approx(float((b[held] @ u).mean()), abs=0.02)
    assert steering.findings["protected"]["texts"] == 15
    words = " ".join(tt.AlphaSteer.explain(steering))
    assert "alone.txt" in words


def test_what_is_held_out_shares_no_prompt_with_what_is_fitted(tmp_path: Path) -> None:
    lm, file = language_model("llama"), tmp_path / "pairs.jsonl"
    prompts = [f"The rudder number {i} turns" for i in range(10)]
    pairs = [(prompt, side) for prompt in prompts for side in (" left", " right", " far")]
    lines = [{"prompt": p, "positive": side, "negative": " back"} for p, side in pairs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steering = tt.AlphaSteer(str(file), layer=1, share=0.4).fit(lm, CONTRAST, measure=False)
    (one,) = steering.interventions
    assert isinstance(one.operator, Affine)
    u = one.operator.v[:, 0].double()
    held = [p + side for p in prompts[4::5] for side in (" left", " back", " right", " far")]
    left_alone = read_last(lm.model, "resid", held)[:, 1].double() @ u
    said = steering.findings["gate"][one.site]["protected_size"]
    assert said == pytest.approx(float(left_alone.abs().mean()), rel=1e-3)
    assert steering.findings["protected"]["texts"] == 40  # each once


def test_protected_texts_change_less_than_those_that_are_steered() -> None:
    lm = language_model("llama")
    steering = tt.AlphaSteer("builtin:facts", layer=1, ridge=0.01).fit(lm, CONTRAST, measure=False)
    plain = tt.CAA(layer=1, token="last").fit(lm, CONTRAST, measure=False)
    rows = tt.Contrast.builtin("facts").part("test").pairs[:12]
    alone = [f"{row.prompt}{row.positive}" for row in rows]
    own = [prompt + side for prompt, side, _ in PAIRS]

    def moved(texts: list[str], one: Any) -> float:
        return relative(lm.logits(texts, steering=one), lm.logits(texts))

    assert moved(alone, steering) / moved(own, steering) < 0.7 * (
        moved(alone, plain) / moved(own, plain)
    )


def test_two_of_them_are_one_of_rank_one() -> None:
    """x + (a + b + a b <u, r>) <u, x> r."""
    u, r, x = draw(0, 1)[0], draw(1, 1)[0], draw(2, 5)
    operator = Affine(r[:, None].float(), u[:, None].float())
    twice = operator.bind(0.3)(operator.bind(0.5)(x))
    one = operator.bind(0.3 + 0.5 + 0.15 * float(u.float() @ r.float()))(x)
    assert relative(twice, one) < 1e-6


def test_mistakes(tmp_path: Path) -> None:
    lm = language_model("llama")
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    for arguments, says in (
        ({"protect": ""}, "protect"),
        ({"protect": str(tmp_path / "none.txt")}, "cannot read"),
        ({"protect": str(tmp_path / "few.txt")}, "2 different texts"),
        ({"protect": "builtin:nothing"}, "no builtin contrast"),
        ({"protect": "builtin:facts", "share": 1.5}, "share"),
        ({"protect": "builtin:facts", "ridge": 0}, "ridge"),
        ({"protect": "builtin:facts", "share": 0.001}, "none of them"),
    ):
        refused_in_one_line(
            lambda given=arguments: tt.AlphaSteer(layer=1, **given).fit(lm, CONTRAST), says
        )
