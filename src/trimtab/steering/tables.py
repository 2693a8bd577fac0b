"""What is in a steering of any method: what was chosen, in rank order, and what acts where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.errors import TrimtabError, shown
from trimtab.steering.artifact import Steering
from trimtab.steering.parts import Intervention

#: The tables that a steering may have: what each row is, by the column that numbers it.
_KINDS = {"unit": "units", "head": "heads", "feature": "features"} | {"expert": "experts"}
#: Columns that say where a row is and how it ranks, in the order in which they are shown.
_FIRST = ("layer", "head", "unit", "feature", "expert", "score")


def chosen(steering: Steering, columns: Sequence[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """The units, heads, features or experts that a method chose, one record each, by what they are;
    empty where it chose none.

    `columns` are those that the method's tables always have beside the numbering one; a file
    without them is refused. Units have their gamma at the dial where it stands, features what they
    are about, where the autoencoder's release says it.
    """
    tables = steering.tables
    numbered = [column for column in _KINDS if column in tables]
    if not columns and not numbered:
        return {}
    lengths = {tuple(column.shape) for column in tables.values()}
    if len(numbered) != 1 or not tables.keys() >= set(columns) or {len(s) for s in lengths} != {1}:
        raise TrimtabError(f"the {shown(steering.method)} steering does not say what it chose")
    if len(lengths) > 1:
        raise TrimtabError(
            f"the tables of the {shown(steering.method)} steering have several lengths"
        )
    # A file has its tensors in the order of their names; people want the place first.
    names = sorted(tables, key=lambda name: (_FIRST.index(name) if name in _FIRST else 9, name))
    values = {name: tables[name].tolist() for name in names if name != "gain"}
    if numbered == ["unit"]:
        # Where a method has no gain of its own (SADI), the dial itself is gamma.
        gains = tables["gain"].tolist() if "gain" in tables else [1.0] * len(values["unit"])
        values["gamma"] = [steering.setting * gain for gain in gains]
    records = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    if "gamma" in values:
        weights = {parse_site(each.site)[0]: each.weight for each in steering.interventions}
        for record in records:
            record["gamma"] *= weights.get(record.get("layer"), 1.0)
    kinds = {parse_site(intervention.site)[1] for intervention in steering.interventions}
    if "layer" in values and len(kinds) == 1:
        (kind,) = kinds
        records = [{"site": f"layers.{record['layer']}.{kind}", **record} for record in records]
    labels = steering.findings.get("labels")
    if numbered == ["feature"] and isinstance(labels, list) and len(labels) == len(records):
        for record, label in zip(records, labels, strict=True):
            record["label"] = shown(label)
    return {_KINDS[numbered[0]]: records}


def steered_blocks(steering: Steering) -> list[int]:
    """The blocks that are steered, from the lowest up."""
    layers = {parse_site(intervention.site)[0] for intervention in steering.interventions}
    return sorted(layer for layer in layers if layer is not None)


def operators_in_words(steering: Steering) -> list[str]:
    """What acts where, a sentence each: what can be said whatever the method."""
    return [
        f"{steering.method}: {type(each.operator).__name__}{_details(each)} on "
        f"{each.operator.size} units of {each.site}."
        for each in steering.interventions
    ]


def _details(intervention: Intervention) -> str:
    """What is to be said of an intervention, in brackets."""
    words = [
        f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in intervention.details.items()
        if value is not None and value is not False
    ]
    return f" ({', '.join(words)})" if words else ""
