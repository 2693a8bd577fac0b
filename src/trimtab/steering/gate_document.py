"""What a file says of a gate, beside the directions of its conditions, which are tensors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from trimtab.steering.parts import STRICT, Finite, Number, Word
from trimtab.steering.scope_grammar import LONGEST

GateScore = Literal["cosine", "projection", "probe", "compat"]
GateSide = Literal["above", "below"]
GateKind = Literal["token", "latched", "two-pass"]
MOST_CONDITIONS = 256


class ConditionDocument(BaseModel):
    """A condition without its direction."""

    model_config = STRICT

    site: str = Field(max_length=100)
    threshold: Number
    fires: GateSide
    score: GateScore
    bias: Number = 0.0
    reads: str = Field(max_length=LONGEST)
    name: Word = ""


class GateDocument(BaseModel):
    """A gate without its directions."""

    model_config = STRICT

    kind: GateKind
    rule: Any
    conditions: list[ConditionDocument] = Field(min_length=1, max_length=MOST_CONDITIONS)
    findings: Finite = Field(default_factory=dict)
