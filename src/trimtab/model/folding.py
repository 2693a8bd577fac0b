"""A steering on its way into weights: what folds, what is noted of it, and whether what comes of it
is still the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import probe_ids
from trimtab.model.language_model import LanguageModel
from trimtab.steering import LinearOperator, Steering


@dataclass(frozen=True)
class Fold:
    """An intervention at its dial, ready to be folded."""

    site: str
    operator: LinearOperator
    dial: float

    @property
    def shifts(self) -> bool:
        """Whether it adds something, which takes a bias."""
        return bool(self.operator.offset(self.dial).any())

    @property
    def factors(self) -> Tensor | None:
        """What each unit is multiplied by, [units] float64, None where units are mixed."""
        probe = torch.arange(1, self.operator.width + 1, dtype=torch.float64)
        factors = self.operator.linear_part(torch.ones_like(probe), self.dial)
        alone = torch.equal(self.operator.linear_part(probe, self.dial), probe * factors)
        return factors if alone else None


def record_of(steering: Steering, base: dict[str, Any]) -> dict[str, Any]:
    """What files say of a steering that is in their weights, for the model `base`."""
    dial = {"name": steering.dial.name, "value": steering.setting, "unit": steering.dial.unit}
    return {
        "method": steering.method,
        "label": steering.label,
        "dial": dial,
        "digest": steering.digest,
        "contrast": steering.contrast,
        "base": base,
        "trimtab": version("trimtab"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


#: How far the logits of a changed model may be from those of the steered one: as a share of the
#: largest logit, and in half precision, where rounding is larger, of the steering's own effect.
_ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3}
_ALIKE_IN_HALF, _OF_EFFECT_IN_HALF = 0.02, 0.25


@torch.no_grad()
def unlike(
    language_model: LanguageModel, steerings: Sequence[Steering], changed: Any, force: bool
) -> float | None:
    """By what share of the largest logit a model with changed weights differs from the steered one
    on a short text; None where that is rounding.

    What no boundary of modules shows, such as a second reader of the embedding, shows here.
    """
    ids = probe_ids(language_model.model)
    plain = _logits(language_model.model, ids)
    with language_model.steered(*steerings, force=force):
        attached = _logits(language_model.model, ids)
    off, largest = (_logits(changed, ids) - attached).abs(), attached.abs().max().clamp(min=1e-30)
    share = float(off.max() / largest)
    alike = share <= _ALIKE.get(language_model.dtype, _ALIKE_IN_HALF)
    if not alike and language_model.dtype not in _ALIKE:
        effect = (attached - plain).square().mean().sqrt()
        alike = bool(off.square().mean().sqrt() <= _OF_EFFECT_IN_HALF * effect)
    return None if alike else share


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double()
