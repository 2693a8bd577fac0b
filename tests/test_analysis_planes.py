"""Candidate directions, discriminative layers, norms, the dial and masks, against plain loops over
transformers models and numpy."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import trimtab as tt
from helpers import by_hand, language_model, refused_in_one_line, token_ids
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.papers.analyses import ANALYSES
from trimtab.papers.result import StudyResult, write
from trimtab.papers.rotations.dials import dial, masks, variants_of
from trimtab.papers.rotations.norms import norms
from trimtab.papers.rotations.planes import plane
from trimtab.reports.charts import rendered
from trimtab.reports.run import Run
from trimtab.steering.operators import Rotate, Turn
from trimtab.sweeps.rows import TaskRows

WHO, WHAT = ("king", "mother", "old captain"), ("ship", "map", "fire in the rain")
POSITIVE = [f"The {who} saw the {what} and said: I love this" for who in WHO for what in WHAT]
NEGATIVE = [f"The {who} hates the {what}, and it was bad" for what in WHAT for who in WHO][:7]
CONTRAST = Contrast.from_texts(POSITIVE, NEGATIVE, "mine")
NORMS = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")]
SITES = [f"layers.{layer}.{kind}" for layer in range(3) for _, kind in NORMS]


@functools.cache
def _lm() -> tt.LanguageModel:
    return language_model("llama")


@functools.cache
def _seen() -> dict[str, list[list[np.ndarray]]]:
    """What each norm reads and puts out, [tokens, units] per text of each side, by a plain loop:
    {"layers.0.attn_norm in": [[positives], [negatives]], "layers.0.attn_norm": ...}; and `resid`.
    """
    model: Any = _lm().model
    now: dict[str, np.ndarray] = {}
    handles = []

    def keep(site: str, both: bool) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            now[site] = output[0].double().numpy()
            if both:
                now[f"{site} in"] = (
                    (args[0] if args else kwargs["hidden_states"])[0].double().numpy()
                )

        return hook

    for layer, block in enumerate(model.model.layers):
        for path, kind in NORMS:
            hook = keep(f"layers.{layer}.{kind}", True)
            module = block.get_submodule(path)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        hook = keep(f"layers.{layer}.resid", False)
        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    found: dict[str, list[list[np.ndarray]]] = {}
    for side, texts in enumerate((POSITIVE, NEGATIVE)):
        for text in texts:
            with torch.no_grad():
                model(torch.tensor([token_ids(text)]), use_cache=False)
            for site, value in now.items():
                found.setdefault(site, [[], []])[side].append(value.copy())
    for handle in handles:
        handle.remove()
    return found


def _last(site: str) -> list[np.ndarray]:
    """The last token's activations of each side, [texts, units]."""
    return [np.stack([text[-1] for text in side]) for side in _seen()[site]]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _directions(inputs: bool) -> np.ndarray:
    """d_k at unit length, [sites, units]: SS's from outputs, Angular Steering's from inputs."""
    rows = []
    for site in SITES:
        if inputs:
            up, down = (_unit(_unit(side).mean(0)) for side in _last(f"{site} in"))
        else:
            up, down = (side.mean(0) for side in _last(site))
        rows.append(up - down)
    return _unit(np.stack(rows))


# -- plane ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ss", "sas", "aas"])
def test_the_plane_is_that_of_plain_activations(method: Any) -> None:
    found = plane(_lm(), CONTRAST, method=method).data
    unit = _directions(inputs=method != "ss")
    cosines = unit @ unit.T
    assert np.abs(np.array(found["cosines"]) - cosines).max() < 1e-4
    best = int(cosines.mean(1).argmax())
    assert found["plane"]["source_site"] == SITES[best]
    assert found["plane"]["mean_cosine"] == pytest.approx(cosines.mean(1)[best], abs=1e-4)
    assert [row["site"] for row in found["sites"]] == SITES
    # b2 is the first right singular vector of the centred directions, made orthogonal to b1.
    b2 = np.linalg.svd(unit - unit.mean(0))[2][0]
    b2 = b2 - (b2 @ unit[best]) * unit[best]
    b2 = b2 / np.linalg.norm(b2)
    for i, row in enumerate(found["sites"]):
        assert row["mean_cosine"] == pytest.approx(cosines[i].mean(), abs=1e-4)
        inside = math.hypot(unit[i] @ unit[best], unit[i] @ b2)
        assert row["in_plane"] == pytest.approx(inside, abs=1e-3)
        for side, activations in zip(("positive", "negative"), _last(SITES[i]), strict=True):
            own = _unit(activations) @ unit[best]
            assert row[side] == pytest.approx(own.mean(), abs=1e-5)
            half = stats.t.ppf(0.975, len(own) - 1) * stats.sem(own)  # 0 where all are equal
            assert row[f"{side}_ci95"] == pytest.approx(
                (own.mean() - half, own.mean() + half), abs=2e-4
            )


def test_discriminative_sites_are_those_by_hand() -> None:
    for selection in ("cosine", "norm"):
        found = plane(_lm(), CONTRAST, selection=selection).data
        unit = _directions(inputs=False)
        b1 = unit[SITES.index(found["plane"]["source_site"])]
        opposite = {}
        for site in SITES:
            up, down = ((_unit(side) @ b1).mean() for side in _last(site))
            opposite[site] = up * down < 0
        alone = [site for site in SITES if opposite[site]]
        whole = [
            f"layers.{layer}.{kind}"
            for layer in range(3)
            if opposite[f"layers.{layer}.attn_norm"] and opposite[f"layers.{layer}.ffn_norm"]
            for _, kind in NORMS
        ]
        assert found["discriminative"]["sites"] == alone
        assert found["discriminative"]["whole_blocks"] == whole
        blocks = sorted({int(site.split(".")[1]) for site in whole})
        assert found["discriminative"]["blocks"] == blocks
        # It is what the method steers.
        for rule, sites in ((True, whole), (False, alone)):
            if sites:
                made = tt.SS(whole_blocks=rule, selection=selection).fit(_lm(), CONTRAST)  # type: ignore[arg-type]
                assert [one.site for one in made.interventions] == sites
    assert 0 < len(alone) < len(SITES)  # that is how it is here


def test_sides_that_end_alike_have_no_direction_at_the_first_norm() -> None:
    pairs = [
        (f"{who} ", f"love the {what} now", f"hate the {what} now") for who in WHO for what in WHAT
    ]
    found = plane(_lm(), Contrast.from_pairs(pairs), method="ss")
    first = found.data["sites"][0]
    assert first["length"] == 0
    assert first["mean_cosine"] == 0
    assert any("layers.0.attn_norm" in note and "do not differ" in note for note in found.notes)


def test_the_projections_of_one_text_a_side_have_no_interval() -> None:
    contrast = Contrast.from_texts(POSITIVE[:1], NEGATIVE[:1])
    row = plane(_lm(), contrast).data["sites"][1]
    assert row["positive_ci95"] == (row["positive"], row["positive"])


def test_an_unknown_method_is_refused() -> None:
    refused_in_one_line(lambda: plane(_lm(), CONTRAST, method="caa"), "known are ss, sas, aas")  # type: ignore[arg-type]


# -- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["last", "mean"])
def test_norms_are_those_of_a_plain_loop(token: Any) -> None:
    found = norms(_lm(), CONTRAST, kinds=("resid", "attn_norm"), token=token, massive=1.5)
    assert [row["site"] for row in found.data["sites"]] == [
        f"layers.{layer}.{kind}" for kind in ("resid", "attn_norm") for layer in range(3)
    ]
    for row in found.data["sites"]:
        sides = [[np.linalg.norm(x, axis=1) for x in side] for side in _seen()[row["site"]]]
        for name, texts in zip(("positive", "negative"), sides, strict=True):
            own = np.array([x[-1] if token == "last" else x.mean() for x in texts])
            assert row[name]["mean"] == pytest.approx(own.mean(), rel=1e-5)
            assert row[name]["sd"] == pytest.approx(own.std(ddof=1), rel=1e-4)
            assert row[name]["n"] == len(texts)
        every = np.concatenate([x for side in sides for x in side])
        # torch takes the lower of two middle values.
        median = np.sort(every)[(len(every) - 1) // 2]
        assert row["median"] == pytest.approx(median, rel=1e-5)
        assert row["largest"] == pytest.approx(every.max(), rel=1e-5)
        assert row["tokens"] == len(every)
        assert row["massive"] == (every > 1.5 * median).sum()
        assert row["massive_first"] == sum(x[0] > 1.5 * median for side in sides for x in side)
    assert sum(row["massive"] for row in found.data["sites"])  # that is how it is here


@pytest.mark.parametrize("first", [True, False])
def test_massive_tokens_are_named(first: bool) -> None:
    # One token whose embedding drowns all others: that which every text begins with, or a word.
    lm = language_model("llama")
    word = token_ids(" love")[0 if first else -1]
    model: Any = lm.model
    with torch.no_grad():
        model.model.embed_tokens.weight[word] *= 1000
    found = norms(lm, CONTRAST, kinds=("resid",), massive=20.0)
    row = found.data["sites"][0]
    name = tiny_tokenizer().decode([word])
    assert [(one["id"], one["token"]) for one in row["massive_tokens"]] == [(word, name)]
    count = len(POSITIVE) + len(NEGATIVE) if first else len(POSITIVE)
    assert row["massive"] == count
    assert row["massive_first"] == (count if first else 0)
    share = "100%" if first else "0%"
    assert any(f"sites; {share} of them are the first" in note for note in found.notes)


def test_a_pair_counts_its_prompt_on_both_sides() -> None:
    pairs = [("The king said: ", "yes", "no, not at all"), ("I ", "love it", "hate it")]
    found = norms(_lm(), Contrast.from_pairs(pairs), kinds=("resid",), limit=1).data
    tokens = sum(len(token_ids("The king said: " + side)) for side in pairs[0][1:])
    assert found["sites"][0]["tokens"] == tokens
    assert found["sites"][0]["positive"]["n"] == 1


def test_norms_of_what_is_no_block_are_refused() -> None:
    refused_in_one_line(lambda: norms(_lm(), CONTRAST, kinds=("final_norm",)), "go by layer")
    refused_in_one_line(lambda: norms(_lm(), CONTRAST, massive=1.0), "above 1")
    refused_in_one_line(lambda: norms(_lm(), CONTRAST, limit=0), "limit")


# -- the dial -------------------------------------------------------------------------------------

PAIRS = [
    (f"The {who} saw the {what} and said:", " I love this", " it was bad")
    for who in WHO
    for what in WHAT
]
PARTS = ["train"] * 5 + ["validation"] * 2 + ["test"] * 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A contrast in parts, as a file."""
    path = tmp_path_factory.mktemp("contrast") / "pairs.jsonl"
    rows = [
        {"prompt": prompt, "positive": up, "negative": down, "part": part}
        for (prompt, up, down), part in zip(PAIRS, PARTS, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def turned(source: str) -> StudyResult:
    return dial(_lm(), f"contrast:{source}", step=90, whole_blocks=False, cost=False)


def _log_odds(pair: tuple[str, str, str], steering: Any) -> float:
    """log p(positive) - log p(negative) after the prompt, with hooks that are written here."""
    model: Any = _lm().model
    handles = []
    for one in () if steering is None else steering.interventions:
        _, layer, kind = one.site.split(".")
        path = dict((kind, path) for path, kind in NORMS)[kind]
        act = by_hand(one.operator, steering.setting)
        module = model.model.layers[int(layer)].get_submodule(path)
        handles.append(module.register_forward_hook(lambda m, a, out, act=act: act(out)))
    prompt, *sides = pair
    start, scores = len(token_ids(prompt)), []
    for side in sides:
        ids = token_ids(prompt + side)
        with torch.no_grad():
            log_p = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
    for handle in handles:
        handle.remove()
    return scores[0] - scores[1]


def test_every_angle_is_what_hooks_by_hand_give(turned: StudyResult, source: str) -> None:
    train = Contrast.from_jsonl(source)
    made = tt.fit([tt.SS(whole_blocks=False), tt.SAS(), tt.AAS()], _lm(), train)
    assert [method["name"] for method in turned.data["methods"]] == ["ss", "sas", "aas"]
    for method, steering in zip(turned.data["methods"], made, strict=True):
        assert [point["theta"] for point in method["dial"]] == [0, 90, 180, 270]
        for point in method["dial"][1::2]:
            expected = [_log_odds(pair, steering.at(point["theta"])) for pair in PAIRS[5:7]]
            found = point["metrics"]["log_odds"]
            assert found["value"] == pytest.approx(np.mean(expected), abs=1e-3)
            assert found["n"] == 2


def test_at_zero_only_selective_steering_is_the_unsteered_model(turned: StudyResult) -> None:
    base = turned.data["unsteered"]["validation"]["log_odds"]["value"]
    assert base == pytest.approx(np.mean([_log_odds(pair, None) for pair in PAIRS[5:7]]), abs=1e-4)
    at_zero = {
        m["name"]: m["dial"][0]["metrics"]["log_odds"]["value"] for m in turned.data["methods"]
    }
    assert at_zero["ss"] == pytest.approx(base, abs=1e-5)
    assert abs(at_zero["sas"] - base) > 1e-2


def test_the_angle_is_chosen_on_validation_and_the_oracle_on_test(
    turned: StudyResult, source: str
) -> None:
    made = tt.fit(
        [tt.SS(whole_blocks=False), tt.SAS(), tt.AAS()], _lm(), Contrast.from_jsonl(source)
    )
    ps = []
    for method, steering in zip(turned.data["methods"], made, strict=True):
        values = {p["theta"]: p["metrics"]["log_odds"]["value"] for p in method["dial"]}
        chosen = method["chosen"]
        assert chosen["theta"] == max(values, key=lambda theta: values[theta])
        assert chosen["validation"] == values[chosen["theta"]]
        on_test = {
            theta: np.mean([_log_odds(pair, steering.at(theta)) for pair in PAIRS[7:]])
            for theta in values
        }
        assert chosen["test"] == pytest.approx(on_test[chosen["theta"]], abs=1e-3)
        assert method["oracle"]["test"] == pytest.approx(max(on_test.values()), abs=1e-3)
        base = np.mean([_log_odds(pair, None) for pair in PAIRS[7:]])
        assert chosen["change"]["difference"] == pytest.approx(chosen["test"] - base, abs=1e-3)
        ps.append((chosen["change"]["p"], chosen["p_holm"]))
    for p, corrected in ps:  # of three p-values Holm's is at least each and at most three times it
        assert p <= corrected <= min(1.0, 3 * p)


def test_a_circle_over_the_test_rows_chooses_nothing(source: str) -> None:
    task = f"contrast:{source}"
    found = dial(_lm(), task, methods=("sas",), step=180, part="test", cost=False)
    (method,) = found.data["methods"]
    steering = tt.SAS().fit(_lm(), Contrast.from_jsonl(source))
    for point in method["dial"]:
        expected = np.mean([_log_odds(pair, steering.at(point["theta"])) for pair in PAIRS[7:]])
        assert point["metrics"]["log_odds"]["value"] == pytest.approx(expected, abs=1e-3)
    best = max(method["dial"], key=lambda point: point["metrics"]["log_odds"]["value"])
    assert method["oracle"]["theta"] == best["theta"]
    assert list(found.data["unsteered"]) == ["test"]
    assert any("oracle" in note for note in found.notes)


def test_dear_angles_are_not_chosen(source: str) -> None:
    task = f"contrast:{source}"
    free = dial(_lm(), task, methods=("sas",), step=90, oracle=False).data["methods"][0]
    costs = {point["theta"]: point["plain_text_cost"] for point in free["dial"]}
    values = {point["theta"]: point["metrics"]["log_odds"]["value"] for point in free["dial"]}
    dear = sorted(costs.values())[1]  # two angles are left
    cheap = [theta for theta in costs if costs[theta] <= dear]
    some = dial(_lm(), task, methods=("sas",), step=90, max_cost=dear).data["methods"][0]
    assert some["chosen"]["theta"] == max(cheap, key=lambda theta: values[theta])
    assert some["oracle"]["theta"] in cheap
    none = dial(_lm(), task, methods=("sas",), step=90, max_cost=-50.0)
    assert none.data["methods"][0]["chosen"] is None
    assert any("within -50 nats per token" in note for note in none.notes)
    refused_in_one_line(lambda: dial(_lm(), task, cost=False, max_cost=1.0), "leave cost on")


def test_what_is_no_circle_is_refused(source: str) -> None:
    task = f"contrast:{source}"
    for step in (0, 7, 360, -30):
        refused_in_one_line(functools.partial(dial, _lm(), task, step=step), "divide 360")
    refused_in_one_line(lambda: dial(_lm(), task, methods=("caa",)), "known are ss, sas, aas")
    refused_in_one_line(lambda: dial(_lm(), task, methods=()), "name a method")
    refused_in_one_line(
        lambda: dial(_lm(), task, part="test", validation_task=task), "validation_task"
    )


def test_prompts_are_answered_and_their_violations_counted(tmp_path: Path, source: str) -> None:
    for name, prompts in (("asked", PAIRS[:2]), ("held", PAIRS[2:4])):
        rows = [json.dumps({"prompt": prompt}) for prompt, *_ in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    task, held = f"refusal:{tmp_path / 'asked.jsonl'}", f"refusal:{tmp_path / 'held.jsonl'}"
    found = dial(
        _lm(),
        task,
        methods=("ss", "sas"),
        step=180,
        contrast=source,
        validation_task=held,
        max_new_tokens=4,
        whole_blocks=False,
        oracle=False,
        cost=False,
    )
    for method in found.data["methods"]:
        own = [point["metrics"]["self_perplexity"]["value"] for point in method["dial"]]
        assert method["violations"] == {"n": sum(value > 2 for value in own), "of": 2}
        assert method["oracle"] is None
        names = {"refusal", "perplexity", "self_perplexity", "language_consistency"}
        names |= {"compression_ratio", "repetition_4gram"}
        assert set(method["dial"][0]["metrics"]) == names
    assert any("violations" in note for note in found.notes)
    # A tiny random model is sure of nothing.
    assert found.data["methods"][0]["violations"]["n"] == 2


def test_an_interrupted_dial_goes_on_from_its_records(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> StudyResult:
        with_records = Run(tmp_path / "run", {"model": {}})
        return dial(_lm(), f"contrast:{source}", methods=("sas",), step=180, run=with_records)

    plain = TaskRows.records
    calls: list[Any] = []

    def counted(self: TaskRows, steering: Any, part: Any, *more: Any, **named: Any) -> Any:
        calls.append((named.get("name"), part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, steering, part, *more, **named)

    monkeypatch.setattr(TaskRows, "records", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    first, calls[:] = list(calls[:2]), [None] * 5
    found = run()
    assert calls[5:]
    assert not set(calls[5:]) & {call for call in first if call[0] is not None}
    monkeypatch.undo()
    whole = dial(_lm(), f"contrast:{source}", methods=("sas",), step=180)
    assert found.data["methods"] == whole.data["methods"]


# -- masks ----------------------------------------------------------------------------------------


def test_masks_are_the_layers_by_hand() -> None:
    lm = language_model("llama", num_hidden_layers=5)
    ss = tt.SS(whole_blocks=False).fit(lm, CONTRAST)
    own = [one.site for one in ss.interventions]
    every = [f"layers.{layer}.{kind}" for layer in range(5) for _, kind in NORMS]
    found = {one.name: one for one in variants_of(ss, ss, every, (42, 7, 42))}
    assert list(found) == [
        "ss",
        "ss's mask, sas's formula",
        "all blocks",
        "first half",
        "second half",
        "random half, seed 42",
        "random half, seed 7",
    ]
    layers: dict[str, set[int]] = {
        "all blocks": set(range(5)),
        "first half": {0, 1},
        "second half": {2, 3, 4},
        "random half, seed 42": set(random.Random(42).sample(range(5), 2)),
        "random half, seed 7": set(random.Random(7).sample(range(5), 2)),
    }
    for name, variant in found.items():
        sites = [one.site for one in variant.steering.interventions]
        expected = own
        if name in layers:
            both = itertools.product(sorted(layers[name]), [kind for _, kind in NORMS])
            expected = [f"layers.{layer}.{kind}" for layer, kind in both]
        assert sites == expected
        kind = Turn if "formula" in name else Rotate
        operators: list[Any] = [one.operator for one in variant.steering.interventions]
        assert all(type(one) is kind for one in operators)
        basis = ss.interventions[0].operator.basis  # type: ignore[attr-defined]
        assert all(torch.equal(one.basis, basis) for one in operators)
    assert not found["ss's mask, sas's formula"].steering.interventions[0].operator.adaptive  # type: ignore[attr-defined]


def test_masks_at_one_angle_are_measured_on_the_test_rows(source: str) -> None:
    task = f"contrast:{source}"
    found = masks(_lm(), task, theta=120, seeds=(42,), whole_blocks=False, cost=False)
    (base,) = tt.fit([tt.SS(whole_blocks=False)], _lm(), Contrast.from_jsonl(source))
    by_name = {one["name"]: one for one in found.data["masks"]}
    turn = Turn(base.interventions[0].operator.basis)  # type: ignore[attr-defined]
    laid = [tt.Intervention(one.site, turn) for one in base.interventions]
    for name, steering in (
        ("ss", base),
        ("ss's mask, sas's formula", replace(base, interventions=tuple(laid))),
    ):
        chosen = by_name[name]["chosen"]
        expected = np.mean([_log_odds(pair, steering.at(120)) for pair in PAIRS[7:]])
        assert chosen["theta"] == 120
        assert chosen["test"] == pytest.approx(expected, abs=1e-3)
        assert chosen["validation"] is not None
        assert chosen["n"] == 2
        assert by_name[name]["oracle"] is None
    assert by_name["all blocks"]["layers"] == [0, 1, 2]
    assert any("θ = 120°" in note for note in found.notes)
    refused_in_one_line(lambda: masks(_lm(), task, theta=math.nan), "finite")


def test_each_mask_gets_the_angle_that_is_best_for_it(source: str) -> None:
    found = masks(
        _lm(), f"contrast:{source}", step=120, seeds=(1, 2), whole_blocks=False, cost=False
    )
    values = []
    for one in found.data["masks"]:
        own = {p["theta"]: p["metrics"]["log_odds"]["value"] for p in one["dial"]}
        assert one["chosen"]["theta"] == max(own, key=lambda theta: own[theta])
        if one["name"].startswith("random"):
            values.append(one["chosen"]["test"])
    (note,) = (note for note in found.notes if note.startswith("random halves"))
    assert f"{np.mean(values):.4g} on average over 2 seeds" in note


# -- what people see ------------------------------------------------------------------------------


def _svg(found: StudyResult, name: str) -> str:
    (picture,) = (picture for picture in found.pictures if picture.name == name)
    return rendered(picture.figure, "svg", name).decode()


def _says(svg: str, *texts: str) -> None:
    for text in texts:
        assert f">{text}<" in svg, text


@pytest.mark.slow
def test_pictures_have_their_labels(turned: StudyResult, source: str) -> None:
    found = plane(_lm(), CONTRAST)
    source_site = found.data["plane"]["source_site"]
    _says(_svg(found, "cosines"), "cosine", "mean cosine to all candidates", f"b1: {source_site}")
    _says(_svg(found, "projections"), "attn_norm", "ffn_norm", "layer", "positive", "negative")
    lengths = norms(_lm(), CONTRAST, kinds=("resid", "ffn_out"))
    _says(_svg(lengths, "norms"), "resid", "ffn_out", "length of the activation", "longest token")
    _says(_svg(turned, "dial"), "log-odds (nats)", "unsteered", "ss", "sas", "aas", "180°", "330°")
    some = masks(_lm(), f"contrast:{source}", theta=90, seeds=(42,), whole_blocks=False, cost=False)
    _says(
        _svg(some, "masks"), "block", "log-odds", "nats", "all blocks, θ = 90°", "what is steered"
    )


def test_a_run_directory_has_page_pictures_and_results(tmp_path: Path) -> None:
    lm = _lm()
    found = plane(lm, CONTRAST)
    config = {"model": {**vars(lm.identity), "dtype": str(lm.dtype)}}
    write(found, Run(tmp_path / "run", config))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["analysis"] == "plane"
    assert results["sites"] == json.loads(json.dumps(found.data["sites"]))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "mean cosine" in page
    assert "layers.2.ffn_norm" in page.replace("<wbr>", "")
    assert {path.name for path in (tmp_path / "run" / "pictures").iterdir()} == {
        f"{name}.{kind}" for name in ("cosines", "projections") for kind in ("png", "svg")
    }


def test_they_are_listed() -> None:
    for function in (plane, norms, dial, masks):
        assert ANALYSES[function.__name__] is function


# -- a real model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_formality_in_smollm2(smollm2: Any) -> None:
    contrast = Contrast.builtin("formality")
    few = Contrast(contrast.train.rows[:12], "formality")
    found = plane(smollm2, few).data
    assert len(found["sites"]) == 60
    late = [row["mean_cosine"] for row in found["sites"][20:]]
    assert min(late) > found["sites"][0]["mean_cosine"]
    stream = norms(smollm2, few, kinds=("resid",)).data["sites"]
    assert stream[-1]["positive"]["mean"] > 5 * stream[0]["positive"]["mean"]
