"""A monitor: a direction at a site, what is usual along it, and from where on a turn is an alarm.

Its file is that of a gate with one condition, the projection and its threshold, and says the rest
in the gate's findings. So it can also be put to a steering, which then acts where the monitor
alarms: token by token, or, where it looks at prompts, at the answers to those that alarm.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from trimtab.anatomy import Anatomy
from trimtab.errors import TrimtabError, shown
from trimtab.model import LanguageModel
from trimtab.steering import Condition, Gate, GateKind, ModelIdentity, Steering

#: What of a turn is looked at: the mean over the answer's tokens, or the prompt's last token, which
#: is there before the answer is.
At = Literal["answer", "prompt"]
#: What a token gate and one that decides at the prompt's last token read.
_KINDS: dict[At, GateKind] = {"answer": "token", "prompt": "latched"}
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Baseline:
    """What turns that are as usual are along the direction: mean and standard deviation of `n`."""

    mean: float
    sd: float
    n: int
    of: str

    def score(self, value: float) -> float:
        """How many standard deviations a value is above the mean."""
        return (value - self.mean) / self.sd if self.sd > 0 else 0.0


class _Usual(BaseModel):
    model_config = _STRICT

    mean: FiniteFloat
    sd: FiniteFloat = Field(ge=0)
    n: int = Field(ge=1)
    of: str


class _Noted(BaseModel):
    """What the findings of a gate that is a monitor say of it."""

    model_config = _STRICT

    at: At
    baseline: _Usual
    source: dict[str, Any]
    chosen: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Monitor:
    """A direction at a site (`condition`, a projection with a threshold), what of a turn is
    compared (`at`: the mean over the answer, or the prompt's last token), and the `baseline`.

    `source` says where the direction is from, `chosen` how the threshold was chosen, `findings` how
    often it alarms at turns of both sides. `fit_monitor` makes one, `monitor` puts it to work.
    """

    condition: Condition
    baseline: Baseline
    at: At = "answer"
    source: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    model: ModelIdentity | None = None
    contrast: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)

    @property
    def gate(self) -> Gate:
        """The same as a gate, which lets a steering act where it alarms."""
        return Gate(
            (self.condition,),
            _KINDS[self.at],
            model=self.model,
            contrast=self.contrast,
            findings={
                **self.findings,
                "monitor": {
                    "at": self.at,
                    "baseline": asdict(self.baseline),
                    "source": self.source,
                    "chosen": self.chosen,
                },
            },
        )

    @classmethod
    def of_gate(cls, gate: Gate, source: str = "this gate") -> Monitor:
        """The monitor that a gate is. Errors: a TrimtabError where it is none."""
        findings = dict(gate.findings)
        try:
            noted = _Noted.model_validate(findings.pop("monitor", None))
        except ValidationError as error:
            raise TrimtabError(
                f"{shown(source, 200)} is a gate and no monitor: make one with trimtab monitor fit "
                "(fit_monitor)"
            ) from error
        if len(gate.conditions) != 1 or gate.kind != _KINDS[noted.at] or gate.rule != 0:
            raise TrimtabError(
                f"{shown(source, 200)} is no monitor any more: it decides otherwise than one "
                "condition does"
            )
        return cls(
            gate.conditions[0],
            Baseline(**dict(noted.baseline)),
            noted.at,
            noted.source,
            noted.chosen,
            gate.model,
            gate.contrast,
            findings,
        )

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write one .safetensors file, whole or not at all."""
        return self.gate.save(path, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Monitor:
        """Read and check a file that `save` wrote."""
        return cls.of_gate(Gate.load(path), str(path))

    def check_fits(self, anatomy: Anatomy, identity: ModelIdentity) -> None:
        """Refuse a model other than its own."""
        self.gate.check_fits(anatomy, identity)

    def alarms(self, value: float | None) -> bool:
        """Whether a turn of this value is an alarm; one without a value is none."""
        return value is not None and bool(
            self.condition.holds(torch.tensor(value, dtype=torch.float64))
        )

    @property
    def sign(self) -> str:
        return ">" if self.condition.fires == "above" else "<"

    @property
    def notes(self) -> list[str]:
        """What to know of the threshold."""
        turns, rate = self.chosen.get("negative_turns"), self.chosen.get("false_alarms")
        if self.chosen.get("by") == "f1":
            return ["The threshold is the one of the best F1 on validation turns."]
        if not isinstance(turns, int) or not isinstance(rate, float):
            return []
        said = f"The threshold lets {100 * rate:g} % of {turns} negative validation turns alarm"
        return [f"{said}: that is less than one of them." if rate * turns < 1 else f"{said}."]

    def as_json(self) -> dict[str, Any]:
        """All that it is but its direction, as the file of its gate says it."""
        return self.gate.as_json()

    def __str__(self) -> str:
        usual = self.baseline
        return (
            f"alarm where {what_is_read(self.at)} is {self.sign} {self.condition.threshold:.4g} "
            f"along the {self.source.get('what', 'direction')} at {self.condition.site} (usual: "
            f"{usual.mean:.4g}, sd {usual.sd:.3g}, of {usual.n} {shown(usual.of, 60)})"
        )

    def __repr__(self) -> str:
        return f"<Monitor: {self}>"


def what_is_read(at: At) -> str:
    """In words what of a turn is compared."""
    return "the mean over an answer's tokens" if at == "answer" else "a prompt's last token"


def direction_of(
    language_model: LanguageModel, steering: Steering, site: str | None
) -> tuple[Condition, dict[str, Any]]:
    """The direction of a steering as a projection without a threshold, and where it is from; a
    steering of another model is refused."""
    if not isinstance(steering, Steering):
        raise TrimtabError(
            f"{shown(steering, 60)} is neither a monitor nor a steering: load one with "
            "Monitor.load(FILE) or Steering.load(FILE)"
        )
    lm = language_model
    steering.check_fits(lm.anatomy, lm.identity, quantised=lm.quantised)
    condition = steering.condition(site, threshold=float("inf"))
    source = {
        "method": steering.method,
        "digest": steering.digest,
        "what": "reader" if condition.score == "probe" else "direction",
        "contrast": steering.contrast.get("name", ""),
    }
    return replace(condition, score="projection", bias=0.0), source
