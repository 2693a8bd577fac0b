"""Sets a monitor: what is usual, and from where on a turn is an alarm.

The threshold is chosen on the validation part of a contrast, and how often it alarms is counted on
its test part; what is usual is taken from the negative turns of the train part, or from texts that
are named.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Pair, Prompt, check_contrast
from trimtab.errors import TrimtabError, TrimtabWarning, check_choice
from trimtab.figures import auroc_interval
from trimtab.fitting import best_threshold, rare_threshold, sides_fired
from trimtab.model import LanguageModel, check_model
from trimtab.monitoring.alarms import At, Baseline, Monitor, direction_of, what_is_read
from trimtab.monitoring.chats import Answered, Chat, as_chat
from trimtab.monitoring.watching import Turn, turns_along
from trimtab.steering import Condition, GateSide, Steering

Threshold = Literal["false-alarms", "f1"]


def fit_monitor(
    language_model: LanguageModel,
    steering: Steering,
    contrast: Contrast,
    *,
    site: str | None = None,
    at: At = "answer",
    threshold: Threshold = "false-alarms",
    false_alarms: float = 0.01,
    fires: GateSide = "above",
    baseline: Sequence[Any] | None = None,
    chat: bool = False,
) -> Monitor:
    """A monitor of the direction of a steering: a probe's reader, or the vector that it adds, takes
    out or bounds, at unit length. `site` names one where it has several.

    At turns of the contrast's positive side it is to alarm, at those of the negative one not.
    Compared is the mean projection over the answer's tokens, or with `at="prompt"` that at the
    prompt's last token, which is there before the answer is. The threshold is the lowest (for
    `fires="below"` the highest) that alarms at no larger share of the negative validation turns
    than `false_alarms`, or the one of the best F1. `baseline` are chats that are as usual (default:
    the negative turns of the train part). `chat` puts plain prompts as a user's message.

    Errors: a TrimtabError where the steering has no direction, the contrast has too few rows, or a
    turn has nothing to read.
    """
    check_model(language_model)
    check_contrast(contrast)
    check_choice("at", at, At)
    check_choice("threshold", threshold, Threshold)
    check_choice("fires", fires, GateSide)
    parts = contrast.with_parts()
    if not parts.has_parts:
        raise TrimtabError(
            f"{contrast.name} has too few texts to hold some out for validation and test: "
            f"{contrast.too_few}"
        )
    condition, source = direction_of(language_model, steering, site)
    read = {
        part: _values(language_model, condition, parts.part(part), at, chat)
        for part in ("validation", "test")
    }
    values, positive = read["validation"]
    limit = _limit(values, positive, threshold, false_alarms, fires, contrast.name)
    if baseline is None:
        usual, labels = _values(language_model, condition, parts.train, at, chat)
        usual, of = usual[~labels], f"negative turns of {contrast.name}"
    else:
        chats = [as_chat(one, f"baseline {number}") for number, one in enumerate(baseline, 1)]
        usual = _compared(language_model, condition, chats, at, "the baseline")
        of = "chats of the baseline"
    below = fires == "below"
    return Monitor(
        replace(condition, threshold=limit, fires=fires),
        Baseline(float(usual.mean()), float(usual.std(correction=0)), len(usual), of),
        at,
        source,
        {
            "by": threshold,
            **({"false_alarms": false_alarms} if threshold == "false-alarms" else {}),
            "negative_turns": int((~positive).sum()),
        },
        language_model.identity,
        {"name": contrast.name, "digest": parts.train.digest, "rows": len(parts.train)},
        {
            part: {
                **sides_fired(own < limit if below else own > limit, labels),
                "auroc": auroc_interval(-own if below else own, labels).value,
            }
            for part, (own, labels) in read.items()
        },
    )


def _limit(
    values: Tensor,
    positive: Tensor,
    threshold: Threshold,
    false_alarms: float,
    fires: GateSide,
    name: str,
) -> float:
    """The threshold, from the values of validation turns."""
    sign = -1.0 if fires == "below" else 1.0
    values = sign * values
    if not values[positive].mean() > values[~positive].mean():
        other = "above" if fires == "below" else "below"
        warnings.warn(
            f"{name}: its positive turns are not {fires} its negative ones along this direction, "
            f"so that the alarm tells little: take another direction, or let it fire {other}",
            TrimtabWarning,
            stacklevel=3,
        )
    if threshold == "f1":
        return sign * best_threshold(values, positive, False)[1]
    return sign * rare_threshold(values[~positive], false_alarms)


def _values(
    language_model: LanguageModel, condition: Condition, contrast: Contrast, at: At, chat: bool
) -> tuple[Tensor, Tensor]:
    """What is compared of the turns of a contrast, [turns], and which of them are positive."""
    chats: list[Chat] = []
    labels: list[bool] = []
    for row in contrast.rows:
        if not isinstance(row, Pair):
            (prompt,) = language_model.prompts([row.text], chat)
            plain = isinstance(prompt, str) or prompt[-1][0] != "assistant"
            chats.append(Answered(prompt, "") if at == "prompt" and plain else prompt)
            labels.append(row.label == "positive")
            continue
        if at == "prompt":
            raise TrimtabError(
                f"{contrast.name} has pairs, whose sides share their prompt, so that nothing is "
                "told apart at its last token: give texts or conversations with labels"
            )
        prompt = _put(language_model, row.prompt, chat)
        chats += [Answered(prompt, row.positive), Answered(prompt, row.negative)]
        labels += [True, False]
    found = _compared(language_model, condition, chats, at, contrast.name)
    return found, torch.tensor(labels)


def _put(language_model: LanguageModel, prompt: Prompt, chat: bool) -> Prompt:
    (found,) = language_model.prompts([prompt], chat)
    return found


def _compared(
    language_model: LanguageModel,
    condition: Condition,
    chats: Sequence[Chat],
    at: At,
    name: str,
) -> Tensor:
    """What is compared of the last turn of each chat, [chats] in float64."""
    last: dict[int, Turn] = {
        turn.chat: turn for turn in turns_along(language_model, condition, chats)
    }
    values = [last[number].value(at) for number in range(len(chats))]
    if not values:
        raise TrimtabError(f"{name} has no chat")
    for number, value in enumerate(values):
        if value is None:
            raise TrimtabError(
                f"{name}, turn {number + 1}: there is nothing to read of {what_is_read(at)}"
            )
    return torch.tensor(values, dtype=torch.float64)
