"""The artifact: a steering is interventions, one dial and where they came from."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from trimtab.anatomy import Anatomy, parse_site
from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.files import exists
from trimtab.steering import document
from trimtab.steering.calibration import STRENGTHS, Calibration
from trimtab.steering.directions import condition_of
from trimtab.steering.gate_document import GateSide
from trimtab.steering.gates import Condition, Gate, check_gate
from trimtab.steering.operators import Force, to_tensors
from trimtab.steering.parts import LARGEST, Dial, Intervention, ModelIdentity
from trimtab.steering.scope import Scope, Tokens


@cache
def _version(name: str) -> str:
    return version(name)  # searches the disk


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("trimtab", "torch", "transformers")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Explains(Protocol):
    """A language model, as far as a steering needs one."""

    def explain(self, steering: Any, prompt: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """What a method's `fit` returns: attach it, turn its dial, bake it, save it.

    `tables` holds what the method knows beside the interventions, tensors by name (AUSteer: the
    chosen units in rank order with their scores), and `findings` what it found out that is no
    tensor (which layer was chosen, and why). `contrast` names the texts and their digest.
    `calibration` says which dials keep to which budgets (`trimtab.strength.calibrate`).
    With a `gate` it acts under a condition only (`gated`).
    `a + b` is both, and a acts first where the two meet.
    """

    method: str
    hyperparameters: dict[str, Any]
    interventions: tuple[Intervention, ...]
    dial: Dial
    model: ModelIdentity
    contrast: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    calibration: Calibration | None = None
    gate: Gate | None = None
    versions: dict[str, str] = field(default_factory=_versions)
    date: str = field(default_factory=_now)

    def __post_init__(self) -> None:
        if self.gate is not None:
            check_gate(self.gate, self.interventions)

    # -- the dial -----------------------------------------------------------------------------

    @property
    def setting(self) -> float:
        """Where the dial stands."""
        return self.dial.default if self.value is None else self.value

    def at(
        self,
        value: float | str | None = None,
        *,
        kl: float | None = None,
        side: Literal["positive", "negative"] = "positive",
        median: bool = False,
    ) -> Steering:
        """The same steering with its dial turned to `value`: a number, or a strength by its name.

        gentle, clear and strong change the next token by 0.1, 0.5 and 1 nats on half of the prompts
        that the steering was calibrated on, as `fit` does; -clear is the same on the other side,
        where that is calibrated. Of a calibrated steering `kl` turns it as far as so many nats
        allow: 95 % of the prompts stay within them, or with `median` half of them.
        """
        if (value is None) is (kl is None):
            raise TrimtabError("at() takes a dial, or kl= and a budget in nats")
        if isinstance(value, str):
            kl, side, median = *_strength(value), True
            value = None
        if value is None:
            assert kl is not None
            value = self._calibrated(kl).dial(kl, side, median)
        try:
            value = float(value)
        except (TypeError, ValueError):
            name = shown(self.dial.name)
            raise TrimtabError(
                f"the dial {name} takes a number, not {shown(repr(value))}"
            ) from None
        if not abs(value) <= LARGEST:
            raise TrimtabError(f"the dial {shown(self.dial.name)} cannot be {value}")
        turned = replace(self, value=value)
        turned.warn_out_of_range()
        return turned

    def on(self, tokens: Tokens) -> Steering:
        """The same steering on tokens of one kind: "text", "image" (those that stand for images),
        or "all". What was measured of its dial is that of the tokens it was fitted for."""
        return self._with_scopes([each.scope.on(tokens) for each in self.interventions])

    def scoped(self, scope: Scope | str) -> Steering:
        """The same steering on the tokens of a scope, whatever it acted on before:
        `steering.scoped("generated & !thinking")`. docs/scopes.md has the words. What was measured
        of its dial is that of the tokens it was fitted for."""
        return self._with_scopes([Scope.of(scope)] * len(self.interventions))

    def _with_scopes(self, scopes: Sequence[Scope]) -> Steering:
        if [each.scope for each in self.interventions] == list(scopes):
            return self
        changed = tuple(
            replace(each, scope=scope)
            for each, scope in zip(self.interventions, scopes, strict=True)
        )
        return replace(self, interventions=changed)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes of its interventions, each once."""
        return tuple(dict.fromkeys(each.scope for each in self.interventions))

    def gated(self, gate: Gate | None) -> Steering:
        """The same steering under a condition: it acts on rows, or tokens, where the gate fires,
        and leaves the others bit by bit as they are. None takes its gate away."""
        if not isinstance(gate, Gate | None):
            raise TrimtabError(
                f"{shown(gate, 60)} is no gate: load one with Gate.load(FILE), or fit one with "
                "fit_gate"
            )
        if gate is not None and gate.model and gate.model.digest != self.model.digest:
            raise TrimtabError(
                f"this gate was made for {gate.model}, the steering for {self.model}: fit one for "
                "the same model"
            )
        return replace(self, gate=gate)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it changes, and those that its gate reads, each once."""
        read = self.gate.sites if self.gate is not None else ()
        return tuple(dict.fromkeys((*(each.site for each in self.interventions), *read)))

    def condition(
        self, site: str | None = None, threshold: float = 0.0, fires: GateSide = "above"
    ) -> Condition:
        """What it is about, as the condition of a gate: a probe's reader, whose score is a logit,
        or else the projection on the direction that it adds, takes out or holds within bounds.

            Gate((steering.condition(),))

        `site` names one where it has several. Errors: a TrimtabError where it has no direction.
        """
        return condition_of(self, site, threshold, fires)

    def explain(self, language_model: _Explains, prompt: Any, **options: Any) -> Any:
        """Token by token what will act on a prompt and on what the model writes after it: a
        `Firing`, which prints as a table. The same as `language_model.explain(self, prompt)`."""
        return language_model.explain(self, prompt, **options)

    def _calibrated(self, kl: float) -> Calibration:
        if self.calibration is None:
            raise TrimtabError(
                f"this {shown(self.method)} steering is not calibrated, so it does not know "
                f"what {kl:g} nats (or a strength by name) allow: fit it without --no-measure, "
                "trimtab strength budget --save, or strength.calibrate()"
            )
        return self.calibration

    def warn_out_of_range(self) -> None:
        """Warn where the dial stands outside its sensible range."""
        low, high = self.dial.range
        if not low <= self.setting <= high:
            warnings.warn(
                f"{shown(self.dial.name)} = {self.setting:g} is outside the sensible range of this "
                f"{shown(self.method)} steering, {low:g} to {high:g}",
                TrimtabWarning,
                stacklevel=3,
            )

    def __add__(self, other: Any) -> Steerings:
        together: Steerings = Steerings((self,)) + other
        return together

    @property
    def label(self) -> str:
        """For people: method and dial."""
        method, dial, unit = shown(self.method), shown(self.dial.name), shown(self.dial.unit)
        gated = "" if self.gate is None else ", gated"
        return f"{method} {dial}={self.setting:g}{unit}{gated}"

    @property
    def where(self) -> str:
        """For people: its site, or how many there are of which kinds, and in which blocks."""
        sites = [intervention.site for intervention in self.interventions]
        if len(sites) == 1:
            return sites[0]
        placed = [parse_site(site) for site in sites]
        kinds = ", ".join(dict.fromkeys(kind for _, kind in placed))
        blocks = sorted({layer for layer, _ in placed if layer is not None})
        among = f" in blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else ""
        return f"{len(sites)} sites ({kinds}{among})"

    def __repr__(self) -> str:
        return f"<Steering: {self.label} at {self.where}, for {shown(self.model.name)}>"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, in a small table."""
        from trimtab.reports import Table, tables_html

        low, high = self.dial.range
        label = self.label.removeprefix(shown(self.method)).strip()
        rows = [
            ["method", shown(self.method)],
            ["dial", f"{label}, sensible from {low:g} to {high:g}"],
            ["acts at", self.where],
            ["model", str(self.model)],
            ["contrast", f"{self.contrast.get('name', '')}, {self.contrast.get('rows', '?')} rows"],
            ["made on", self.date[:10]],
        ]
        return tables_html([Table("Steering", ["", ""], rows)])

    def plot(self, ax: Any = None) -> Any:
        """Where it acts, drawn: the units or heads that were chosen, or its sites block by block.

        On the matplotlib axes `ax`, or on those of a new figure; they are returned.
        """
        from trimtab.reports import axes_for
        from trimtab.steering.pictures import plot_steering

        axes = axes_for(ax, (6.5, 3.8))
        plot_steering(axes, self)
        return axes

    @property
    def acts(self) -> bool:
        """Whether it changes anything at any dial: with no unit chosen, or only zeros to add, it
        does not."""
        return any(intervention.acts for intervention in self.interventions)

    @property
    def digest(self) -> str:
        """SHA-256 of what it does to a model, whatever its dial: sites, operators, tokens."""
        digest = hashlib.sha256()
        for intervention in self.interventions:
            tensors, others = to_tensors(intervention.operator)
            kind = type(intervention.operator).__name__
            placed = intervention.scope.as_placed
            positions, tokens = placed or (str(intervention.scope), "all")
            about: list[Any] = [intervention.site, kind, positions, others]
            if tokens != "all":
                about.append(tokens)
            if intervention.weight != 1:
                about.append(intervention.weight)
            digest.update(json.dumps(about, sort_keys=True).encode())
            for name in sorted(tensors):
                digest.update(name.encode() + tensors[name].cpu().contiguous().numpy().tobytes())
        if self.gate is not None:
            digest.update(self.gate.digest.encode())
        return digest.hexdigest()

    # -- does it fit --------------------------------------------------------------------------

    def check_fits(
        self,
        anatomy: Anatomy,
        identity: ModelIdentity,
        force: bool = False,
        quantised: bool = False,
    ) -> None:
        """Refuse a model that this steering was not made for; `force` allows another's weights.

        A `quantised` model has other weights than the one it was made from, so that there the
        weights are compared that stay whole.
        """
        same = (self.model.architecture, self.model.layers, self.model.hidden_size)
        if same != (identity.architecture, identity.layers, identity.hidden_size):
            raise TrimtabError(
                f"the sizes do not fit: this steering was made for {self.model} with hidden size "
                f"{self.model.hidden_size}, the model is {identity} with {identity.hidden_size}: "
                "fit one for this model"
            )
        for intervention in self.interventions:
            width = anatomy.width(intervention.site)
            if intervention.operator.width != width:
                raise TrimtabError(
                    f"the sizes do not fit: {intervention.site} has {width} units in "
                    f"{shown(identity.name)}, the steering has {intervention.operator.width}"
                )
            if isinstance(intervention.operator, Force):
                chosen = anatomy.router(intervention.site).chosen
                dial = intervention.dial_at(self.setting)
                intervention.operator.check_chosen(intervention.site, chosen, dial)
        if self.gate is not None:
            self.gate.check_sizes(anatomy, identity.name)
        if force or self.model.digest == identity.digest:
            return
        if quantised and not self.model.plain_digest:
            warnings.warn(
                f"this steering was made for {self.model}, and its file does not say whether the "
                f"quantised {identity.name} was made from the same weights: fit and save it anew",
                TrimtabWarning,
                stacklevel=2,
            )
        elif not (quantised and self.model.plain_digest == identity.plain_digest):
            raise TrimtabError(
                f"this steering was made for {self.model}, the model is {identity}: fit one for "
                "this model, or use force (--force) if you know that it carries over"
            )

    # -- the file -----------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write one .safetensors file, whole or not at all; it passes what `load` checks."""
        return document.write(vars(self), Path(path), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read and check a file that `save` wrote."""
        steering = cls._read(path)
        steering.warn_out_of_range()
        return steering

    @classmethod
    def _read(cls, path: str | Path) -> Steering:
        fields, source = document.read(Path(path)), shown(path, 200)
        if fields["gate"] is not None:
            said, tensors = fields["gate"]
            fields["gate"] = Gate.of_file(said, tensors, source)
        try:
            return cls(**fields)
        except TrimtabError as error:  # of a gate that could not decide in time
            raise TrimtabError(f"{source}: {error}") from error

    @classmethod
    def from_(cls, source: str | Path, language_model: _Explains, **options: Any) -> Steering:
        """From a file of another tool, for a model: `Steering.from_("vector.gguf", lm)`. The
        options are those of `trimtab.import_steering`, which says what files there are."""
        # What reads them stands above steerings, and is loaded when it is asked for.
        made: Steering = import_module("trimtab.exchange").import_steering(
            source, language_model, **options
        )
        return made

    @classmethod
    def read(cls, argument: str) -> Steering:
        """From `FILE`, `FILE@DIAL`, `FILE@clear` or `FILE@kl=NATS`: what follows the last @ is the
        dial, unless there is a file of that name."""
        path, at, value = argument.rpartition("@")
        if not at or exists(Path(argument)):
            return cls.load(argument)
        if value.removeprefix("-") in STRENGTHS:
            return cls._read(path).at(value)
        number = value.removeprefix("kl=")
        try:
            dial = float(number)
        except ValueError as error:
            raise TrimtabError(
                f"{shown(argument, 150)}: '{shown(number)}' is no number; write FILE@DIAL, as in "
                f"joy.safetensors@12, FILE@kl=NATS, or a strength: {', '.join(STRENGTHS)}"
            ) from error
        steering = cls._read(path)
        return steering.at(dial) if number == value else steering.at(kl=dial)


def _strength(name: str) -> tuple[float, Literal["positive", "negative"]]:
    """Nats and side of a named strength."""
    if name.removeprefix("-") not in STRENGTHS:
        raise TrimtabError(
            f"{shown(name)} is no dial: give a number, or a strength: {', '.join(STRENGTHS)}"
        )
    return STRENGTHS[name.removeprefix("-")], "negative" if name.startswith("-") else "positive"


class Steerings(tuple[Steering, ...]):
    """Several steerings that act together, each at its own dial, in this order.

    Give it wherever one steering goes. At one site the earlier one acts first; a site that the
    model reaches earlier comes first in any case.
    """

    def __add__(self, other: Any) -> Steerings:
        if isinstance(other, Steering):
            return Steerings((*self, other))
        if isinstance(other, Steerings):
            return Steerings((*self, *other))
        return NotImplemented

    @property
    def label(self) -> str:
        """For people: the methods and their dials."""
        return " + ".join(steering.label for steering in self)

    def __repr__(self) -> str:
        return f"<Steerings: {', then '.join(f'{one.label} at {one.where}' for one in self)}>"


def together(steering: Steering | Steerings | None) -> tuple[Steering, ...]:
    """The steerings that act together, in order: none, one, or several."""
    if steering is None:
        return ()
    several = list(steering) if isinstance(steering, list | tuple) else [steering]
    for one in several:
        if not isinstance(one, Steering):
            raise no_steering(one)
    return tuple(several)


def no_steering(given: object) -> TrimtabError:
    """What is to be said where something else stands for a steering."""
    return TrimtabError(
        f"{shown(repr(given))} is not a steering: load one with Steering.load(FILE)"
    )
