"""Whether paired differences are more than chance, also where there are many of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences.

    McNemar's exact test where they are -1, 0 and 1 (right or wrong), else Wilcoxon's signed-rank
    test.
    """
    values = np.asarray(differences, dtype=float)
    if not values.any():
        return 1.0
    if np.isin(values, (-1, 0, 1)).all():
        gained, lost = int((values > 0).sum()), int((values < 0).sum())
        return float(stats.binomtest(gained, gained + lost).pvalue)
    return float(stats.wilcoxon(values).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of several p for their number, in their order."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected
