"""What is in a steering: as plain data for programs, and in words for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.errors import TrimtabError, shown
from trimtab.steering.artifact import Steering
from trimtab.steering.operators import Ablate, Add, Rotate, Turn

#: The tables that a steering may have: what each row is, by the column that numbers it.
_KINDS = {"unit": "units", "head": "heads", "feature": "features"}
#: Columns that say where a row is and how it ranks, in the order in which they are shown.
_FIRST = ("layer", "head", "unit", "feature", "score")
#: Columns that are always there together with the numbering one.
_COLUMNS = {
    "austeer": ("layer", "unit", "score", "r_pos", "r_neg", "gain"),
    "sadi": ("layer", "score"),
    "iti": ("layer", "head", "accuracy", "sigma"),
    "sta": ("feature", "amplitude", "frequency"),
}


def describe(steering: Steering) -> dict[str, Any]:
    """A steering as plain data: method, dial, interventions, model, findings.

    Methods that choose units, heads or features list them in rank order (gamma at the dial where
    it stands); rotations have their plane and the layers that they steer.
    """
    described: dict[str, Any] = {
        "method": steering.method,
        "hyperparameters": steering.hyperparameters,
        "dial": {
            "name": steering.dial.name,
            "unit": steering.dial.unit,
            "default": steering.dial.default,
            "range": list(steering.dial.range),
            "value": steering.setting,
        },
        "interventions": [
            {
                "site": intervention.site,
                "operator": type(intervention.operator).__name__,
                "size": intervention.operator.size,
                "positions": intervention.positions,
            }
            for intervention in steering.interventions
        ],
        "model": dict(vars(steering.model)),
        "contrast": steering.contrast,
        "findings": steering.findings,
        "calibration": None if steering.calibration is None else asdict(steering.calibration),
        "versions": steering.versions,
        "date": steering.date,
    }
    described |= _chosen(steering)
    planes = [i.operator for i in steering.interventions if isinstance(i.operator, Rotate | Turn)]
    if planes:
        basis = planes[0].basis.double()
        described["plane"] = {
            "source_site": steering.findings.get("source_site"),
            "basis_norms": basis.norm(dim=-1).tolist(),
            "basis_dot": float(basis[0] @ basis[1]),
        }
        described["layers"] = _layers(steering)
    return described


def _layers(steering: Steering) -> list[int]:
    """The blocks that are steered."""
    layers = {parse_site(intervention.site)[0] for intervention in steering.interventions}
    return sorted(layer for layer in layers if layer is not None)


def _chosen(steering: Steering) -> dict[str, list[dict[str, Any]]]:
    """The units, heads or features that a method chose, one record each."""
    tables = steering.tables
    wanted = _COLUMNS.get(steering.method, ())
    numbered = [column for column in _KINDS if column in tables]
    if not wanted and not numbered:
        return {}
    lengths = {tuple(column.shape) for column in tables.values()}
    if len(numbered) != 1 or not tables.keys() >= set(wanted) or {len(s) for s in lengths} != {1}:
        raise TrimtabError(f"the {shown(steering.method)} steering does not say what it chose")
    if len(lengths) > 1:
        raise TrimtabError(
            f"the tables of the {shown(steering.method)} steering have several lengths"
        )
    # A file has its tensors in the order of their names; people want the place first.
    names = sorted(tables, key=lambda name: (_FIRST.index(name) if name in _FIRST else 9, name))
    columns = {name: tables[name].tolist() for name in names if name != "gain"}
    if numbered == ["unit"]:
        # Where a method has no gain of its own (SADI), the dial itself is gamma.
        gains = tables["gain"].tolist() if "gain" in tables else [1.0] * len(columns["unit"])
        columns["gamma"] = [steering.setting * gain for gain in gains]
    records = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    kinds = {parse_site(intervention.site)[1] for intervention in steering.interventions}
    if "layer" in columns and len(kinds) == 1:
        (kind,) = kinds
        records = [{"site": f"layers.{record['layer']}.{kind}", **record} for record in records]
    return {_KINDS[numbered[0]]: records}


def explain(steering: Steering) -> list[str]:
    """What the steering does, in sentences for someone who meets the method for the first time."""
    model, dial = steering.model, steering.dial
    try:
        lines = _EXPLANATIONS.get(steering.method, _explain_any)(steering)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        # A file may carry a method's name without what that method knows.
        lines = _explain_any(steering)
    lines += [
        f"It acts on {_TOKENS[positions]}."
        for positions in dict.fromkeys(i.positions for i in steering.interventions)
    ]
    now, fitted, low, high = (
        f"{value:g}{dial.unit}" for value in (steering.setting, dial.default, *dial.range)
    )
    contrast = steering.contrast
    lines += [
        f"Dial {dial.name}: {now} now, {fitted} as fitted, sensible from {low} to {high}.",
        f"Made for {model} from {contrast.get('rows', '?')} rows of "
        f"{contrast.get('name', 'an unnamed contrast')} on {steering.date[:10]}.",
    ]
    if steering.calibration is not None:
        budgets = ", ".join(f"{kl:g}" for kl in steering.calibration.kl)
        lines.append(
            f"Calibrated on {steering.calibration.prompts} prompts for budgets of {budgets} nats: "
            "FILE@kl=NATS turns the dial to one of them, or to one between."
        )
    return lines


def _explain_austeer(steering: Steering) -> list[str]:
    units = _chosen(steering).get("units", [])
    if not units:
        return ["AUSteer with k = 0: no unit is changed."]
    options = steering.hyperparameters
    least = options.get("choose") == "least"
    change = str(options.get("change", "scale"))
    formula = {
        "scale": "each activation x becomes (1 + gamma) x",
        "absolute": "each activation x becomes x + gamma |x|",
        "vector": f"to each {steering.dial.name} times the mean difference of the two sides is "
        "added",
    }[change]
    if least:
        formula = f"each activation x becomes (1 - {steering.dial.name}) x"
    lines = [
        f"AUSteer {'shrinks' if least else 'changes'} {len(units)} single units of "
        f"{options.get('site')}, in {_counted(units)}: {formula}."
    ]
    scores = [unit["score"] for unit in units]
    best = "least" if least else "most"
    lines.append(
        {
            "momentum": f"They were chosen because they tell the two sides apart {best} reliably: "
            f"in the same direction on {_percent(scores)} of the pairs.",
            "difference": f"They were chosen because their mean differs {best} between the two "
            "sides.",
            "random": "They were drawn at random, for comparison.",
        }[options.get("locate", "momentum")]
    )
    if least:
        return lines
    up, down = (sum(sign * unit["gamma"] > 0 for unit in units) for sign in (1, -1))
    verbs = ("scaled up", "down") if change == "scale" else ("raised", "lowered")
    lines.append(f"{up} are {verbs[0]}, {down} {verbs[1]}.")
    flipped = sum(unit["gamma"] < -1 for unit in units)
    if change == "scale" and flipped and not options.get("clamp_sign", False):
        lines.append(
            f"{flipped} have a gamma below -1, which turns an activation's sign around: that is "
            "how the method is defined."
        )
    return lines


def _explain_added(steering: Steering) -> list[str]:
    """CAA, ActAdd and STA: vectors on the residual stream."""
    options, found = steering.hyperparameters, steering.findings
    added = [i for i in steering.interventions if isinstance(i.operator, Add)]
    lengths = [float(i.operator.vector.norm()) for i in added if isinstance(i.operator, Add)]
    blocks = [parse_site(i.site)[0] for i in added]
    name, at_one = _NAMES[steering.method], f"at {steering.dial.name} 1"
    if len(added) == 1:
        where = "before the first block" if blocks[0] is None else f"after block {blocks[0]}"
        lines = [
            f"{name} adds one vector (length {lengths[0]:.2f} {at_one}) to the residual stream "
            f"{where}."
        ]
    else:
        lines = [
            f"{name} adds a vector to the residual stream after each of the blocks "
            f"{_ranges(_layers(steering))} (length {min(lengths):.2f} to {max(lengths):.2f} "
            f"{at_one})."
        ]
    difference = (
        f"the mean activation of the positive texts, {_read_at(options['token'])}, minus that of "
        "the negative ones"
    )
    if steering.method == "actadd" and options["pairs"] == 1:
        first = f"the activation of the first positive text, {_read_at(options['token'])}"
        what = f"{first}, minus that of the first negative one"
    elif steering.method == "actadd":
        what = f"{difference}; of each side the first {options['pairs']} are used"
    elif steering.method == "sta":
        what = (
            f"the sum of {found['kept']} of {found['features']} features of a sparse autoencoder, "
            "those that set the two sides apart, made as long as the difference of the two sides' "
            f"mean activations, {_read_at(options['token'])}"
        )
    elif options.get("variant") == "pca":
        what = f"the direction in which the pairs differ most (PCA), {_read_at(options['token'])}"
    else:
        what = difference
    lines.append(f"{'The vector' if len(added) == 1 else 'Each vector'} is {what}.")
    gains = found.get("validation_gain")
    if gains:
        lines.append(
            f"The block was chosen among {len(gains)} on validation rows: there it moves the model "
            f"most toward the positive side, by {max(gains.values()):.2f} nats."
        )
    return lines


def _explain_iti(steering: Steering) -> list[str]:
    heads = _chosen(steering).get("heads", [])
    if not heads:
        return ["ITI with k = 0: no head is changed."]
    options, dial = steering.hyperparameters, steering.dial.name
    by = "times the texts' standard deviation along it" if options["scale"] else "long"
    along = {
        "mean": "from the mean of the negative texts to that of the positive ones",
        "probe": "where a classifier says that texts are positive",
    }[options["direction"]]
    return [
        f"ITI adds a vector to the output of {len(heads)} attention heads, in {_counted(heads)}: "
        f"it leads {along} and is {dial} {by}.",
        "They are the heads from which a classifier tells the two sides apart best: it is right "
        f"on {_percent([head['accuracy'] for head in heads])} of texts that it was not trained on.",
    ]


def _explain_sadi(steering: Steering) -> list[str]:
    chosen = _chosen(steering)
    kind, records = next(iter(chosen.items()), ("units", []))
    if not records:
        return ["SADI with k = 0: nothing is changed."]
    what = "attention heads" if kind == "heads" else "single units of "
    if kind != "heads":
        what += parse_site(records[0]["site"])[1]
    dial = steering.dial.name
    return [
        f"SADI multiplies {len(records)} {what} by 1 + {dial} (now {1 + steering.setting:g}), in "
        f"{_counted(records)}.",
        "They are the ones whose mean is higher in the positive texts than in the negative ones by "
        "most. What is multiplied is each text's own activation, so the change follows the text.",
    ]


def _explain_ablation(steering: Steering) -> list[str]:
    found, dial = steering.findings, steering.dial.name
    count = sum(isinstance(i.operator, Ablate) for i in steering.interventions)
    where = {
        "writers": f"everything that is written to the residual stream ({count} sites)",
        "norms": f"what attention and FFN read ({count} sites)",
        "layer": "the residual stream at one place",
    }[str(steering.hyperparameters.get("where", "writers"))]
    lines = [
        f"Directional ablation takes one direction out of {where}: at {dial} 1 nothing is left "
        "along it, at -1 what is there is doubled.",
        "The direction leads from the negative texts' mean to the positive ones', read at "
        f"{found['source_site']}, {_read_at(found['token'])}: what sets the positive texts apart "
        "is what the model loses.",
    ]
    chosen = found.get("chosen")
    if chosen:
        lines.append(
            f"It was chosen among {found['candidates']} on validation rows: ablating it takes the "
            f"behaviour's score (log-odds) from {found['unsteered_score']:.2f} to "
            f"{chosen['score']:.2f}, and changes other text by {chosen['kl']:.3f} nats (KL)."
        )
    return lines


def _explain_angular(steering: Steering) -> list[str]:
    options, found = steering.hyperparameters, steering.findings
    sites, blocks = len(steering.interventions), _ranges(_layers(steering))
    does = {
        "sas": "turns the part of every activation that lies in the plane to the dial's angle, "
        "wherever it pointed before: 0 is the positive side, 180 the opposite",
        "aas": "turns the part of an activation that lies in the plane to the dial's angle, but "
        "only where it points to the positive side, which is 0; the opposite is 180",
        "ss": "turns the part of every activation that lies in the plane by the dial's angle, so "
        "that at 0 nothing happens",
    }[steering.method]
    read = "in what enters" if options["candidates"] == "input" else "at"
    lines = [
        f"{_NAMES[steering.method]} works in one plane, the same at {sites} norms in blocks "
        f"{blocks}. It {does}. No activation changes its length.",
        "The plane's first axis leads from the negative texts to the positive ones, as read "
        f"{read} {found['source_site']}; the second is where such directions vary most.",
    ]
    if steering.method == "ss":
        which = "blocks all of whose norms see" if options["whole_blocks"] else "norms that see"
        lines.append(
            f"It steers only {which} the positive texts on one side of zero along the first axis, "
            "on average, and the negative ones on the other."
        )
    return lines


def _explain_any(steering: Steering) -> list[str]:
    return [
        f"{steering.method}: {type(intervention.operator).__name__} on "
        f"{intervention.operator.size} units of {intervention.site}."
        for intervention in steering.interventions
    ]


_TOKENS = {
    "all": "every token",
    "prompt": "the prompt's tokens only",
    "generated": "generated tokens only",
    "last": "the prompt's last token and the generated ones",
}

_NAMES = {
    "caa": "CAA",
    "actadd": "ActAdd",
    "sta": "STA",
    "sas": "Standard Angular Steering",
    "aas": "Adaptive Angular Steering",
    "ss": "Selective Steering",
}

_EXPLANATIONS = {
    "austeer": _explain_austeer,
    "caa": _explain_added,
    "actadd": _explain_added,
    "sta": _explain_added,
    "iti": _explain_iti,
    "sadi": _explain_sadi,
    "ablation": _explain_ablation,
    "sas": _explain_angular,
    "aas": _explain_angular,
    "ss": _explain_angular,
}


def _counted(records: list[dict[str, Any]]) -> str:
    """Layers with how many of the records each has: `layers 3 (2 of them), 5 (1)`."""
    counts = sorted(Counter(record["layer"] for record in records).items())
    if len(counts) == 1:
        return f"layer {counts[0][0]}"
    (first, count), *rest = counts
    return ", ".join([f"layers {first} ({count} of them)", *(f"{n} ({c})" for n, c in rest)])


def _percent(shares: list[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _read_at(token: str | int) -> str:
    """Which token of a text was read."""
    places = {
        "mean": "averaged over all tokens",
        "answer": "averaged over the answer's tokens",
        "last": "at the last token",
        "-1": "at the last token",
        "-2": "at the token before the last",
    }
    return places.get(str(token)) or f"at token {token} (from the end)"


def _ranges(numbers: list[int]) -> str:
    """`4-7, 9` for 4, 5, 6, 7, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
