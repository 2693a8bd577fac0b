"""The card of a steering on the hub: what its file says of it, for people and for the hub's search.

All that a steering says of itself comes from a file that anybody may have written. In the lines
between the dashes it is YAML that a library wrote, in the text it is escaped or stands in code.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from trimtab.anatomy import parse_site
from trimtab.errors import TrimtabError, shown
from trimtab.steering import STRENGTHS, Ablate, Add, Affine, Rotate, Scale, Shift, Steering

#: The names of the files of a steering's repository; there are no others.
STEERING, CARD = "steering.safetensors", "README.md"
#: What every steering on the hub is tagged with, and found by.
TAG = "trimtab"
#: Where the lines between the dashes say the method and the dial, which are no field of the hub's.
OWN = "trimtab"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: What Markdown, or the hub's kind of it, takes for more than text.
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+.!|~&@:=$^\"']|^-)")
_TAG = re.compile(r"[^a-z0-9]+")
_NOT_MEASURED = "not measured"
#: Hyperparameters and interventions that are listed: a card is to be read.
_MOST = 60
#: Sites at which a linear operator is a change of linear maps, and the largest rank that engines
#: take.
_FOLDS = ("heads", "attn_out", "ffn_in", "ffn_out", "attn_norm", "ffn_norm")
_MOST_RANK = 512
#: Half of a 95 % interval, in standard errors.
_HALF = 1.96


@dataclass(frozen=True)
class About:
    """What the file does not say: the repository, the model of the hub that the steering is for,
    the licence that its owner gives it, and digest and size of the file that is uploaded."""

    repo: str
    base_model: str | None
    license: str | None
    sha256: str
    size: int


def base_model_of(steering: Steering, given: str | None) -> str | None:
    """The id on the hub of the model that a steering is for: the one that is given, or the name of
    the model that it was made on, where that is one."""
    if given is not None:
        if not _HUB_ID.fullmatch(given):
            raise TrimtabError(
                f"{shown(given)} is no model of the hub: the base model is written OWNER/NAME"
            )
        return given
    name = steering.model.name.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) else None


def write_card(steering: Steering, about: About) -> str:
    """The whole card, front matter and text."""
    parts = [
        f"# {_text(about.repo.partition('/')[2])}",
        _what_it_is(steering, about),
        "## Dial",
        *_dial(steering),
        "## Gain and cost",
        *_gain_and_cost(steering),
        "## What breaks",
        _breaks(steering),
        "## Use",
        *_use(steering, about),
        "## How it was made",
        *_how_made(steering),
        "## Digests",
        *_digests(steering, about),
    ]
    return _front_matter(steering, about) + "\n\n".join(parts) + "\n"


# -- for the hub ----------------------------------------------------------------------------------


def _front_matter(steering: Steering, about: About) -> str:
    fields: dict[str, Any] = {"library_name": "trimtab"}
    if about.license is not None:
        fields["license"] = about.license
    if about.base_model is not None:
        fields |= {"base_model": about.base_model, "base_model_relation": "adapter"}
    dial = steering.dial
    method = shown(steering.method)
    tags = [TAG, "steering-vector", _tag(method), f"dial-{_tag(dial.name)}"]
    fields["tags"] = list(dict.fromkeys(tag for tag in tags if tag.strip("-")))
    fields[OWN] = {
        "method": method,
        "dial": {
            "name": shown(dial.name),
            "unit": shown(dial.unit),
            "default": dial.default,
            "range": list(dial.range),
        },
        "model": {
            "name": shown(steering.model.name),
            "architecture": shown(steering.model.architecture),
            "digest": shown(steering.model.digest),
        },
        "digest": steering.digest,
    }
    written = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{written}---\n\n"


def _tag(name: str) -> str:
    return _TAG.sub("-", name.lower()).strip("-")[:60]


# -- in words -------------------------------------------------------------------------------------


def _text(text: object, limit: int = 100) -> str:
    """Foreign text inside Markdown, which reads as it is: no link, no tag, no heading."""
    return _MARKUP.sub(r"\\\1", shown(text, limit))


def _code(text: object, limit: int = 200) -> str:
    """Foreign text as code inside a line: between more backticks than it has in a row, and without
    what ends the cell of a table."""
    said = shown(text, limit).replace("|", "¦")
    runs = [len(run) for run in re.findall(r"`+", said)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if said.startswith("`") or said.endswith("`") or not said else ""
    return f"{fence}{pad}{said}{pad}{fence}"


def _block(language: str, *lines: str) -> str:
    """Lines of code. Each is one line, so that none can end the block."""
    return "\n".join([f"```{language}", *(shown(line, 400) for line in lines), "```"])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _what_it_is(steering: Steering, about: About) -> str:
    where, model = _text(steering.where), _text(steering.model)
    base = f", on the hub {_code(about.base_model)}" if about.base_model else ""
    return (
        f"A steering by the method {_text(steering.method)} for {model}{base}. It changes "
        f"activations at {where} while the model runs, as far as one number, its dial, says; the "
        "model's own weights stay as they are."
    )


def _dial(steering: Steering) -> list[str]:
    dial = steering.dial
    low, high = (f"{end:g}{_text(dial.unit)}" for end in dial.range)
    said = (
        f"The dial is {_text(dial.name)}. It stands at {steering.setting:g}{_text(dial.unit)}; "
        f"sensible are {low} to {high}."
    )
    known = steering.calibration
    if known is None:
        return [said, f"Strengths: {_NOT_MEASURED}."]
    sides = {"positive": dict(zip(known.kl, known.positive, strict=False))}
    if known.negative:
        sides["negative"] = dict(zip(known.kl, known.negative, strict=False))
    rows = [
        [
            name,
            f"{kl:g}",
            *(_number(dials.get(kl), steering.dial.unit) for dials in sides.values()),
        ]
        for name, kl in STRENGTHS.items()
    ]
    heads = ["strength", "nats at the next token", *(f"dial, {side} side" for side in sides)]
    on = f"At these dials the next token of half of {known.prompts} prompts changes by so much:"
    return [said, on, _table(heads, rows)]


def _number(value: float | None, unit: str) -> str:
    return _NOT_MEASURED if value is None else f"{value:.3g}{_text(unit)}"


def _gain_and_cost(steering: Steering) -> list[str]:
    """What was measured, as far as the file has it; what was only predicted says so."""
    rows = [[name, *_figure(steering, name)] for name in ("gain", "cost")]
    lines = [_table(["", "value", "95 % interval", "how"], rows)]
    return [*lines, f"At {_text(steering.dial.name)} = {steering.dial.default:g}."]


def _figure(steering: Steering, name: str) -> list[str]:
    """A figure of the findings, its interval, and where it comes from."""
    for place in ("made", "chosen", "measured"):
        found = steering.findings.get(place)
        value: Any = found.get(name) if isinstance(found, dict) else None
        if _is_number(value):
            assert isinstance(found, dict)
            unit = " nats per token of plain text" if (place, name) == ("measured", "cost") else ""
            return [f"{value:+.3g}{unit}", _interval(found.get(f"{name}_ci95")), "measured"]
    foreseen = steering.findings.get("predicted")
    if isinstance(foreseen, dict):
        own, power, unit = (
            ("gain", 1, "nats of log-odds per pair")
            if name == "gain"
            else ("kl", 2, "nats per token of plain text")
        )
        value = foreseen.get(own)
        error: Any = foreseen.get(f"{own}_error")
        if _is_number(value):
            factor = steering.dial.default**power
            half = _HALF * abs(factor) * error if _is_number(error) else None
            middle = factor * value
            ends = None if half is None else [middle - half, middle + half]
            return [f"{middle:+.3g} {unit}", _interval(ends), "predicted from its effects"]
    return [_NOT_MEASURED, "", ""]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _interval(ends: Any) -> str:
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends)):
        return f"{ends[0]:+.3g} to {ends[1]:+.3g}"
    return _NOT_MEASURED


def _breaks(steering: Steering) -> str:
    measured = steering.findings.get("measured")
    breaks = measured.get("breaks") if isinstance(measured, dict) else None
    low, high = steering.dial.range
    unit = _text(steering.dial.unit)
    if _is_number(breaks):
        return (
            f"Plain text becomes hard to predict: at {high:g}{unit}, the end of the range, by "
            f"{breaks:g} nats per token, and what the model writes falls apart beyond."
        )
    if isinstance(measured, dict):
        return (
            f"Nothing up to {high:g}{unit} (down to {low:g}{unit}), as far as the cost of plain "
            "text shows it."
        )
    return f"Where text breaks was {_NOT_MEASURED}."


def _use(steering: Steering, about: About) -> list[str]:
    model = _weights(steering, about)
    served = about.base_model or model
    own = f"{about.repo.partition('/')[2]}.safetensors"
    lines = [
        "In Python:",
        _block(
            "python",
            "import trimtab as tt",
            f"lm, steering = tt.load({json.dumps(model)}), tt.pull({json.dumps(about.repo)})",
            'print(lm.generate(["Today I feel"], steering=steering)[0].text)',
        ),
        "On the command line:",
        _block(
            "sh",
            f"trimtab pull {about.repo} -o {own}",
            f"trimtab generate --model {shlex.quote(model)} --steer {own} 'Today I feel'",
        ),
    ]
    if served != model:
        lines.append(
            f"It was made on the weights that are called {_code(model)} here. On others of the "
            "same model (of another precision, say) it has to be forced: `--force`, or "
            "`lm.steered(steering, force=True)`."
        )
    rank = lora_rank(steering)
    if rank is not None:
        lines += [
            "In vLLM, as a LoRA adapter:",
            _block(
                "sh",
                # What an adapter adds is computed from the weights that it is for.
                f"trimtab export {own} --model {shlex.quote(served)} --to lora -o adapter/"
                + (" --force" if served != model else ""),
                f"vllm serve {shlex.quote(served)} --enable-lora --max-lora-rank {rank} "
                "--lora-modules steered=adapter/",
            ),
        ]
    if is_control_vector(steering):
        lines += [
            "In llama.cpp, as a control vector:",
            _block(
                "sh",
                f"trimtab export {own} --model {shlex.quote(model)} --to gguf -o vector.gguf",
                "llama-cli -m model.gguf --control-vector vector.gguf -p 'Today I feel'",
            ),
        ]
    return lines


def _weights(steering: Steering, about: About) -> str:
    """What to load: the weights that the steering was made on, whose digest it asks for, where
    others have them by that name."""
    name = steering.model.name
    elsewhere = "/" in name and base_model_of(steering, None) is None
    return about.base_model if elsewhere and about.base_model else name


def lora_rank(steering: Steering) -> int | None:
    """The rank of the adapter that a steering is, as engines count ranks; None where it is none, as
    far as that shows without the model: it is one where it changes linear maps and nothing else, on
    all tokens alike."""
    ranks: dict[int | None, int] = {}
    for each in steering.interventions:
        operator: Any = each.operator
        layer, kind = parse_site(each.site)
        rank = _rank_of(operator)
        if rank is None or not (each.scope.everywhere and operator.linear):
            return None
        if kind not in _FOLDS or operator.offset(1.0).any():
            return None
        ranks[layer] = ranks.get(layer, 0) + rank  # several may change one map
    largest = max(ranks.values(), default=0)
    padded = max(8, 1 << max(0, largest - 1).bit_length())
    return padded if largest > 0 and padded <= _MOST_RANK else None


def _rank_of(operator: Any) -> int | None:
    """How many directions an operator changes a map in."""
    if isinstance(operator, Scale | Shift):
        return operator.size
    if isinstance(operator, Rotate):
        return 2
    if isinstance(operator, Ablate):
        return operator.direction.shape[0] if operator.direction.dim() > 1 else 1
    return operator.u.shape[-1] if isinstance(operator, Affine) else None


def is_control_vector(steering: Steering) -> bool:
    """Whether a steering adds vectors to the residual stream after blocks, on all tokens, and not
    after the first block, which control vectors cannot name."""
    return all(
        isinstance(each.operator, Add)
        and each.operator.linear
        and each.scope.everywhere
        and parse_site(each.site)[1] == "resid"
        and parse_site(each.site)[0] != 0
        for each in steering.interventions
    )


# -- where it comes from --------------------------------------------------------------------------


def _how_made(steering: Steering) -> list[str]:
    contrast = steering.contrast
    texts = _text(contrast.get("name", "an unnamed contrast"))
    rows = contrast.get("rows")
    counted = f", {rows} rows" if isinstance(rows, int) else ""
    digest = contrast.get("digest")
    lines = [
        f"Method {_text(steering.method)}, fitted on {texts}{counted}"
        + (f" (digest {_code(digest)})" if digest else "")
        + f", made on {_text(steering.date[:10])}.",
        _table(
            ["setting", "value"],
            [
                [_text(name), _code(json.dumps(value, ensure_ascii=False))]
                for name, value in sorted(steering.hyperparameters.items())[:_MOST]
            ],
        ),
        "What acts where:",
        "\n".join(
            f"- {_text(type(each.operator).__name__)} on {each.operator.size} units of "
            f"{_code(each.site)}, tokens: {_code(each.scope)}"
            for each in steering.interventions[:_MOST]
        ),
    ]
    if len(steering.interventions) > _MOST:
        lines.append(f"and {len(steering.interventions) - _MOST} more.")
    versions = ", ".join(f"{_text(name)} {_text(v)}" for name, v in steering.versions.items())
    return [*lines, f"Versions: {versions}."]


def _digests(steering: Steering, about: About) -> list[str]:
    rows: Mapping[str, str] = {
        f"SHA-256 of {STEERING}": about.sha256,
        "bytes": str(about.size),
        "what it does": steering.digest,
        "the model's weights": steering.model.digest,
    }
    return [_table(["", ""], [[_text(name), _code(digest)] for name, digest in rows.items()])]
