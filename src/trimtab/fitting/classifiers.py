"""Telling two kinds of texts apart by one number each: where that number comes from, from where on
it counts, and how often it is right. Gates, monitors and probes share it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.figures import rate_interval
from trimtab.steering import GateSide


def logistic(x: Tensor, positive: Tensor, penalty: float) -> tuple[Tensor, float]:
    """A logistic regression on activations [texts, units] of unit variance, as a direction and a
    bias for plain ones; `penalty` is the inverse strength of its L2 penalty."""
    from sklearn.linear_model import LogisticRegression

    wide = x.double().numpy()
    mean, spread = wide.mean(0), np.maximum(wide.std(0), 1e-6)
    model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=2000)
    model.fit((wide - mean) / spread, positive.numpy())
    direction = model.coef_[0] / spread
    bias = float(model.intercept_[0] - direction @ mean)
    return torch.from_numpy(direction).float(), bias


def separation(scores: Tensor, positive: Tensor) -> float:
    """How far apart two sides' scores are, in their standard deviations (d'); 0 where one text of
    each side has no spread to tell."""
    a, b = scores[positive].double(), scores[~positive].double()
    spread = float(((a.var(correction=0) + b.var(correction=0)) / 2).sqrt())
    return float((a.mean() - b.mean()).abs()) / spread if spread else 0.0


# -- from where on a score counts -----------------------------------------------------------------


def best_threshold(scores: Tensor, positive: Tensor, both: bool) -> tuple[GateSide, float]:
    """The side and the threshold with the best F1 on some texts, in the middle of the widest gap
    between scores that has it; `below` only where the score has no sign."""
    found: list[tuple[float, float, GateSide, float]] = []
    sides: tuple[GateSide, ...] = ("above", "below") if both else ("above",)
    for fires in sides:
        sign = 1.0 if fires == "above" else -1.0
        order = (sign * scores).argsort()
        ordered, labels = (sign * scores)[order].tolist(), positive[order].tolist()
        total, below = sum(labels), 0
        for place, (low, high) in enumerate(pairwise(ordered)):
            below += labels[place]
            right, fired = total - below, len(ordered) - place - 1
            found.append((2 * right / (fired + total), high - low, fires, sign * (low + high) / 2))
    # Between two scores that are one number there is no threshold.
    _, _, side, threshold = max([each for each in found if each[1] > 0] or found)
    return side, threshold


def rare_threshold(negative: Tensor, share: float) -> float:
    """The lowest of some scores that no larger share of them is above."""
    if not 0 <= share < 1:
        raise TrimtabError(f"the rate of false alarms must be 0 or more and below 1, not {share:g}")
    ordered = negative.sort(descending=True).values
    # 0.29 * 100 is a little less than 29, which is what is meant.
    return float(ordered[math.floor(share * len(ordered) + 1e-9)])


# -- how often it is right ------------------------------------------------------------------------


def f1_of(fired: Tensor, positive: Tensor) -> float:
    right, either = int((fired & positive).sum()), int(fired.sum()) + int(positive.sum())
    return 2 * right / either if either else 0.0


def fired_rate(fired: Tensor) -> dict[str, Any]:
    """At which share it fires, with its interval."""
    found = rate_interval(fired.double())
    return {"fired": found.value, "ci95": list(found.ci95), "n": found.n}


def sides_fired(fired: Tensor, positive: Tensor) -> dict[str, Any]:
    """F1, and at which share of each side it fires."""
    return {
        "f1": f1_of(fired, positive),
        "positive": fired_rate(fired[positive]),
        "negative": fired_rate(fired[~positive]),
    }
