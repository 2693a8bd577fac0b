"""The dial from 0 to 360 degrees, and which layers it turns: Selective Steering's two studies
(arXiv 2601.19375) beside Angular Steering's (arXiv 2510.26243).

Both turn steerings through a circle of angles on the rows of a task, choose an angle on validation
rows and report it on test rows. The best angle on the test rows, which the authors report, is the
oracle that nobody has; it is given apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from trimtab.anatomy import parse_site
from trimtab.contrasts import Contrast, Part
from trimtab.errors import TrimtabError, check_choice
from trimtab.evaluation import Asked
from trimtab.figures import VIOLATION, Estimate, Result, on_task, with_unit
from trimtab.fitting import check_number, fit
from trimtab.methods import SS, sites_of
from trimtab.model import LanguageModel
from trimtab.options import Rows, flat
from trimtab.papers.result import StudyResult, Value, timed
from trimtab.papers.rotations.circle import (
    COST,
    Circle,
    Study,
    Turned,
    Variant,
    angles_of,
    figures_of,
    plain_figures,
    study_of,
)
from trimtab.papers.rotations.dial_pictures import Mask, dial_picture, mask_picture
from trimtab.papers.rotations.planes import ANGULAR, spans
from trimtab.reports import (
    Run,
    Table,
    cell,
    difference_cell,
    flips_cell,
    number_cell,
    value_text,
)
from trimtab.steering import Intervention, Operator, Rotate, Steering, Turn
from trimtab.sweeps import Measured, contrast_for

# -- the dial -------------------------------------------------------------------------------------


@flat
@timed
def dial(
    language_model: LanguageModel,
    task: Asked,
    *,
    methods: Sequence[str] = ("ss", "sas", "aas"),
    contrast: Contrast | str | None = None,
    part: Literal["validation", "test"] = "validation",
    oracle: bool = True,
    rows: Rows = Rows(),
    measured: Measured = Measured(),
    circle: Circle = Circle(),
    run: Run | None = None,
) -> StudyResult:
    """SS, SAS and AAS turned from 0 to 360 degrees: every metric that the task has at each angle.

    One pass over the contrast (default: the task's train rows) fits all `methods`. `step` is in
    degrees; the paper's is 10, and 30 for capability. `part` validation draws the circle over
    `limit` validation rows (`validation_task` stands in for them where a task has none), chooses
    for each method the angle at which `metric` (default: the task's first) is best (`better`: more
    or less of it, where its name does not say), and reports it on the test rows; `oracle` turns
    through the test rows too. Part test draws it over the test rows and chooses nothing. `cost`
    measures what each angle costs on plain text, in nats per token, and `max_cost` leaves those out
    of the choice that cost more. `judges` say of what is written whether it complies. At 0 degrees
    SS does nothing, while SAS and AAS lay activations on the positive side. `run` keeps every
    angle's records, from which an interrupted study goes on.
    """
    angles = angles_of(circle.step)
    for name in methods:
        check_choice("method", name, Literal["ss", "sas", "aas"])
    if not methods:
        raise TrimtabError(f"name a method: {', '.join(ANGULAR)}")
    study = study_of(
        language_model, task, part, rows, measured, oracle=oracle, cost=circle.cost, run=run
    )
    shared: dict[str, Any] = {"ss_compat": circle.ss_compat, "positions": circle.positions}
    whole: dict[str, Any] = {"whole_blocks": circle.whole_blocks}
    made = [
        ANGULAR[name](**shared, **(whole if name == "ss" else {}))
        for name in dict.fromkeys(methods)
    ]
    texts = contrast_for(task, contrast, rows)
    steerings = fit(made, language_model, texts, measure=False)
    variants = [Variant(steering.method, steering) for steering in steerings]
    found = study.turn(variants, angles)
    drawn = study.unsteered("validation")
    picture = dial_picture(
        {
            turned.variant.name: {theta: turned.estimates(theta) for theta in turned.figures}
            for turned in found
        },
        figures_of(drawn),
        {turned.variant.name: turned.theta for turned in found},
        study.rows.metric,
        f"{study.rows.task}, {len(drawn)} {part} rows",
        chosen=study.chooses,
    )
    head = {**_head(study, texts, part), "step": circle.step}
    return StudyResult(
        {**head, "methods": [turned.as_json(study.rows.metric) for turned in found]},
        _values(study, found),
        [_chosen_table(study, found, "method"), _dial_table(found, part)],
        [picture],
        [*study.rows.notes(), *_dial_notes(study, found)],
        "dial",
        f"The dial from 0 to 360° on {study.rows.task}",
    )


def _values(study: Study, found: Sequence[Turned]) -> dict[str, Value]:
    each = [turned.values(study.rows.metric) for turned in found]
    return {name: value for values in each for name, value in values.items()}


def _head(study: Study, texts: Contrast, part: str) -> dict[str, Any]:
    """What is said of the rows, whichever study it is."""
    rows = study.rows
    parts: tuple[Part, ...] = ("validation", "test") if study.chooses else ("validation",)
    names = {"validation": part, "test": "test"}
    return {
        "task": rows.task,
        "part": part,
        "metric": rows.metric,
        "maximise": rows.maximise,
        "contrast": {"name": texts.name, "digest": texts.digest, "rows": len(texts.train)},
        "unsteered": {names[one]: plain_figures(figures_of(study.unsteered(one))) for one in parts},
    }


def _dial_notes(study: Study, found: Sequence[Turned]) -> list[str]:
    notes = []
    metric = study.rows.metric
    base = figures_of(study.unsteered("validation"))
    for turned in found:
        name = turned.variant.name
        if turned.violations is not None:
            (count, of), own = turned.violations, "self_perplexity"
            notes.append(
                f"{name}: self-perplexity above {VIOLATION:g} at {count} of {of} angles "
                f"(violations; unsteered it is {_short(base.get(own), own)})"
            )
        if turned.theta is None:
            limit = "" if study.max_cost is None else f" within {study.max_cost:g} nats per token"
            notes.append(f"{name}: no angle has a value of {metric}{limit}")
        elif study.chooses and turned.theta == 0 and name.startswith("ss"):
            notes.append(f"{name}: no angle beats 0°, at which it does nothing, on validation")
    if any(turned.violations for turned in found):
        notes.append("self-perplexity is blind to repetition: a loop is predicted perfectly")
    if not study.chooses:
        notes.append(
            "the circle was drawn over the test rows: its best angle is an oracle's, and nothing "
            "was chosen beforehand"
        )
    return notes


def _chosen_table(study: Study, found: Sequence[Turned], what: str) -> Table:
    """What each variant is worth on the test rows, beside the unsteered model."""
    metric = study.rows.metric
    base = figures_of(study.unsteered("test" if study.chooses else "validation"))
    drawn = figures_of(study.unsteered("validation")).get(metric) if study.chooses else None
    extra = dict.fromkeys(name for turned in found for name in turned.tested if name != metric)
    heads = [what, "blocks", "sites", "θ", "validation", "test", "change on test", "flipped"]
    heads += ["p, Holm", *map(with_unit, extra), "plain text, nats/token", "oracle"]
    rows: list[list[Any]] = [
        ["unsteered", "", "", "", cell(drawn, metric), cell(base.get(metric), metric), "", "", ""]
        + [_short(base.get(name), name) for name in extra]
        + ["", ""]
    ]
    for turned in found:
        change, theta, oracle = turned.change, turned.theta, turned.oracle
        drawn = turned.figures.get(theta or 0.0, {}).get(metric) if study.chooses else None
        rows.append(
            [
                turned.variant.name,
                spans(turned.variant.layers),
                len(turned.variant.steering.interventions),
                "" if theta is None else f"{theta:g}°",
                cell(drawn, metric),
                cell(turned.tested.get(metric), metric),
                difference_cell(change, metric),
                flips_cell(change),
                number_cell(None if change is None else change.corrected_p, ".2g"),
                *(_short(turned.tested.get(name), name) for name in extra),
                "" if theta not in turned.costs else f"{turned.costs[theta]:+.3f}",
                "" if oracle is None else f"{oracle[0]:g}°: {_short(oracle[1], metric)}",
            ]
        )
    note = "θ is chosen on the validation rows; the oracle's on the test rows themselves."
    if not study.chooses:
        note = "All on the test rows."
    return Table(on_task(metric, study.rows.task), heads, rows, note).without_empty_columns()


def _dial_table(found: Sequence[Turned], part: str) -> Table:
    every = [each for turned in found for each in turned.figures.values()]
    names = list(dict.fromkeys(name for each in every for name in each))
    rows = [
        [
            turned.variant.name,
            f"{theta:g}°",
            *(cell(figures.get(name), name) for name in names),
            number_cell(turned.costs.get(theta), "+.3f"),
        ]
        for turned in found
        for theta, figures in turned.figures.items()
    ]
    heads = ["method", "θ", *map(with_unit, names), "plain text, nats/token"]
    return Table(f"Every angle, {part} rows", heads, rows).without_empty_columns(len(names) + 2)


def _short(found: Result | None, metric: str) -> str:
    return "" if found is None or found.value is None else value_text(found.value, metric)


# -- which layers ---------------------------------------------------------------------------------


@flat
@timed
def masks(
    language_model: LanguageModel,
    task: Asked,
    *,
    theta: float | None = None,
    seeds: Sequence[int] = (42, 43, 44),
    contrast: Contrast | str | None = None,
    rows: Rows = Rows(),
    measured: Measured = Measured(),
    circle: Circle = Circle(),
    run: Run | None = None,
) -> StudyResult:
    """Selective Steering with other layers and with SAS's formula: what its choice is worth.

    SS's own mask; the same sites by SAS's formula; every discriminative site where the whole-block
    rule left some out; all blocks; the first half; the second half; a random half for each of
    `seeds` (the paper's is 42). All in SS's plane. At the angle `theta` in degrees all of them
    are measured on the test rows; without it each gets the angle that is best on the validation
    rows, in steps of `step`, because what is an angle to go by for SS is one to go to for SAS.
    The other arguments are those of `dial`.
    """
    if theta is not None:
        check_number("theta", theta)
        if measured.choosing.validation_task is not None:
            raise TrimtabError("with theta nothing is chosen: leave validation_task out")
    angles = angles_of(circle.step) if theta is None else [float(theta)]
    part = "validation" if theta is None else "test"
    study = study_of(
        language_model, task, part, rows, measured, oracle=False, cost=circle.cost, run=run
    )
    texts = contrast_for(task, contrast, rows)
    made = [
        SS(whole_blocks=whole, ss_compat=circle.ss_compat, positions=circle.positions)
        for whole in dict.fromkeys((circle.whole_blocks, False))
    ]
    own, *alone = fit(made, language_model, texts, measure=False)
    every = sites_of(made[0], language_model.anatomy)
    variants = variants_of(own, alone[0] if alone else own, every, seeds)
    found = study.turn(variants, angles)
    base = figures_of(study.unsteered("test" if study.chooses else "validation"))
    picture = mask_picture(
        [
            Mask(turned.variant.name, turned.variant.layers, turned.theta, _tested(turned))
            for turned in found
        ],
        base,
        language_model.anatomy.layers,
        study.rows.metric,
        study.rows.task,
    )
    document = {
        **_head(study, texts, part),
        "theta": theta,
        "step": circle.step,
        "source_site": own.findings["source_site"],
        "masks": [turned.as_json(study.rows.metric) for turned in found],
    }
    return StudyResult(
        document,
        _values(study, found),
        [_chosen_table(study, found, "mask")],
        [picture],
        [*study.rows.notes(), *_mask_notes(study, found, theta)],
        "masks",
        f"Layers of Selective Steering on {study.rows.task}",
    )


def _tested(turned: Turned) -> dict[str, Estimate]:
    """The figures on the test rows, and what plain text costs at the angle."""
    known = {name: result.estimate for name, result in turned.tested.items()}
    if turned.theta in turned.costs:
        known[COST] = turned.estimates(turned.theta)[COST]
    return {name: estimate for name, estimate in known.items() if estimate is not None}


def variants_of(
    own: Steering, alone: Steering, every: Sequence[str], seeds: Sequence[int]
) -> list[Variant]:
    """The masks of the study: `own` is SS as it is fitted, `alone` SS without the whole-block
    rule, `every` all sites."""
    rotate = own.interventions[0].operator
    assert isinstance(rotate, Rotate)
    scope = own.interventions[0].scope
    layers = sorted({parse_site(site)[0] or 0 for site in every})
    half = len(layers) // 2
    steered = [one.site for one in own.interventions]

    def with_sites(name: str, sites: Sequence[str], operator: Operator) -> Variant:
        changed = tuple(Intervention(site, operator, scope) for site in sites)
        return Variant(name, replace(own, interventions=changed))

    def of_layers(name: str, chosen: Sequence[int]) -> Variant:
        sites = [site for site in every if parse_site(site)[0] in chosen]
        return with_sites(name, sites, rotate)

    found = [
        Variant("ss", own),
        with_sites("ss's mask, sas's formula", steered, Turn(rotate.basis)),
    ]
    if len(alone.interventions) != len(steered):
        found.append(Variant("every discriminative site", alone))
    found += [of_layers("all blocks", layers)]
    if half:
        found += [
            of_layers("first half", layers[:half]),
            of_layers("second half", layers[half:]),
            *(
                of_layers(f"random half, seed {seed}", random.Random(seed).sample(layers, half))
                for seed in dict.fromkeys(seeds)
            ),
        ]
    return found


def _mask_notes(study: Study, found: Sequence[Turned], theta: float | None) -> list[str]:
    notes = _dial_notes(study, found) if theta is None else []
    metric = study.rows.metric
    drawn = [t for t in found if t.variant.name.startswith("random half") and metric in t.tested]
    values = [value for t in drawn if (value := t.tested[metric].value) is not None]
    if len(values) > 1:
        mean = sum(values) / len(values)
        notes.append(
            f"random halves: {metric} {mean:.4g} on average over {len(values)} seeds, from "
            f"{min(values):.4g} to {max(values):.4g}"
        )
    if theta is not None:
        notes.append(
            f"at θ = {theta:g}° for all: SS turns activations by it, SAS's formula lays them at it"
        )
    return notes
