"""From methods to steerings: one pass over the contrast, whatever the methods want of it."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trimtab.contrasts import SINGLE, Contrast, Pair, check_contrast, images_in
from trimtab.dials import measured
from trimtab.errors import TrimtabError, TrimtabWarning, check_list
from trimtab.fitting.activations import Statistics, Want, collect
from trimtab.fitting.effects import Effect
from trimtab.fitting.fields import fields_in_words, validate
from trimtab.model import LanguageModel, check_model, put_as
from trimtab.reading import Engine
from trimtab.steering import (
    POSITIONS,
    Dial,
    Intervention,
    Steering,
    Tokens,
    operators_in_words,
    to_tensors,
)

#: For the field that every method has.
POSITIONS_HELP = f"Tokens to steer, a scope: {', '.join(POSITIONS)}, 'generated[:32]' ..."


class Method(ABC):
    """What every method has beside its hyperparameters; `name` is what the command line calls it.

    A method says what it `wants` of a pass over the contrast, and `build`s a steering from that.
    """

    name: ClassVar[str]
    #: The hyperparameter that is the steering's dial.
    dial: ClassVar[str] = "alpha"
    #: Where the dial stands if it is neither given nor measured. None: the method's formula says.
    unmeasured: ClassVar[float | None] = None
    #: Columns that the tables of its steerings always have, beside the one that numbers the units,
    #: heads or features it chose.
    columns: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """What `help()` says of a method ends with its fields, in the words of its options."""
        super().__init_subclass__()
        if cls.__doc__:
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{fields_in_words(cls)}"

    def __post_init__(self) -> None:
        validate(self, self.name)
        self.check()

    def check(self) -> None:  # noqa: B027, most methods have nothing to add
        """Refuse hyperparameters that do not go together; each by itself is held to its
        annotation."""

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        """What a sweep tries by default, on a model of so many blocks: the values of its paper, or
        what covers them. Empty: the user names values."""
        return {}

    @classmethod
    def ranges(cls, layers: int) -> dict[str, tuple[float, float]]:
        """What a search for trade-offs draws its numbers from, lowest and highest, on a model of so
        many blocks. Empty: what `grid` has."""
        return {}

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        """What a steering of its does, in sentences for someone who meets the method for the first
        time. A file may lack what they need: a KeyError or TypeError then does no harm."""
        return operators_in_words(steering)

    def fit(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        *,
        max_length: int | None = None,
        cache: str | Path | None = None,
        measure: bool = True,
        on: Tokens = "all",
        engine: Engine | None = None,
    ) -> Steering:
        """Make a steering from a contrast; the arguments are those of `trimtab.fit`."""
        (made,) = fit(
            [self],
            language_model,
            contrast,
            max_length=max_length,
            cache=cache,
            measure=measure,
            on=on,
            engine=engine,
        )
        return made

    @property
    def at_default(self) -> float:
        """Where the dial stands as it was given, or unmeasured."""
        given = getattr(self, self.dial)
        return float(self.unmeasured if given is None else given)  # type: ignore[arg-type]

    @property
    def asks_for_dial(self) -> bool:
        """Whether the dial's default is to be measured."""
        return self.unmeasured is not None and getattr(self, self.dial) is None

    @property
    def chooses_by_dial(self) -> bool:
        """Whether what is steered is chosen where the dial stands, so that at another dial it is
        another steering."""
        return False

    @property
    def looks_beyond(self) -> bool:
        """Whether the dial may stand outside the method's own range, which measuring then looks
        beyond; a share has its end by itself."""
        return self.unmeasured is not None

    @abstractmethod
    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        """The statistics that it needs of the contrast's train part."""

    @abstractmethod
    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        """The steering, from what the pass gathered."""


def fit(
    methods: Sequence[Method],
    language_model: LanguageModel,
    contrast: Contrast,
    *,
    max_length: int | None = None,
    cache: str | Path | None = None,
    measure: bool = True,
    on: Tokens = "all",
    engine: Engine | None = None,
) -> list[Steering]:
    """Fit several methods on one contrast; the model runs over it once, whatever they want of it.

    Uses the rows of part "train", or all rows where none names a part: to hold some out, `split`
    the contrast first. A method that chooses something itself does so on the rows of part
    "validation". `max_length` is the longest text in
    tokens (default: what the model takes). `cache` names a directory that keeps what the model
    was run for: a pass that was interrupted goes on there, and a later one need not run again.

    Each steering's dial is then measured on this model and contrast: its range, the dials of the
    named strengths (`steering.at("clear")`), and, where the method was given no strength, its
    default. `measure=False` leaves that out: the dial's default and range are then the method's
    own numbers, which know neither the model nor the texts.

    `on` says which tokens are steered, of a model that sees images: all, those of text, or those
    that stand for an image.

    An `engine` (`tt.VLLM`) reads the contrast in place of transformers, on the same weights. What
    is measured under a steering (the dial, a choice on validation rows) is transformers' all the
    same. Methods that need gradients, or train, are refused.
    """
    check_list("method", methods, ", or method.fit(model, contrast)")
    methods = list(methods)
    for method in methods:
        if not isinstance(method, Method):
            raise TrimtabError(f"{method!r} is not a method: give one as CAA() makes it")
    check_model(language_model)
    check_contrast(contrast)
    if on == "image" and measure and not _has_images(contrast):
        raise TrimtabError(
            f"{contrast.name} has no images, on which the dial of a steering of image tokens could "
            "be measured: give a contrast with images, or leave measuring out (--no-measure)"
        )
    by_method = [method.wants(language_model, contrast) for method in methods]
    if engine is not None:
        for method, its_wants in zip(methods, by_method, strict=True):
            _refuse_elsewhere(method, its_wants, engine)
    wants = [want for its_wants in by_method for want in its_wants]
    if len(contrast.train) == 1 and any(want.rows is None for want in wants):  # not asked for one
        warnings.warn(f"{contrast.name}: {SINGLE}", TrimtabWarning, stacklevel=2)
    statistics = collect(
        language_model,
        contrast.train,
        wants,
        max_length=max_length,
        cache=cache,
        engine=engine,
    )
    steerings = [method.build(language_model, contrast, statistics).on(on) for method in methods]
    if not measure:
        return steerings
    return [
        _measured(method, language_model, contrast.train, steering)
        for method, steering in zip(methods, steerings, strict=True)
    ]


def _refuse_elsewhere(method: Method, wants: Sequence[Want], engine: Engine) -> None:
    """Refuse a method whose activations an engine does not give, or that is not made of any."""
    if not wants:
        raise TrimtabError(
            f"{method.name} runs the model itself as it is fitted, which {engine.name} does not "
            "take part in: leave the engine out"
        )
    if any(isinstance(want.token, Effect) for want in wants):
        raise TrimtabError(
            f"{method.name} goes by gradients here, which {engine.name} does not give: leave the "
            "engine out"
        )
    try:
        engine.prepare_sites(sorted({want.site for want in wants}))
    except TrimtabError as error:
        raise TrimtabError(
            f"{engine.name} does not read what {method.name} is fitted on: {error}"
        ) from error


def _has_images(contrast: Contrast) -> bool:
    prompts = (row.prompt if isinstance(row, Pair) else row.text for row in contrast.rows)
    return any(map(images_in, prompts))


def _measured(
    method: Method, language_model: LanguageModel, contrast: Contrast, steering: Steering
) -> Steering:
    """The steering with its dial measured; warned about where the user's own dial is out of the
    range that was found."""
    if not steering.acts:
        return steering
    found = measured(
        language_model,
        steering,
        contrast,
        default=method.asks_for_dial,
        beyond=method.looks_beyond,
    )
    found.warn_out_of_range()
    return found


def new_steering(
    method: Method,
    language_model: LanguageModel,
    contrast: Contrast,
    interventions: Sequence[Intervention],
    dial: Dial,
    tables: dict[str, Tensor] | None = None,
    findings: dict[str, Any] | None = None,
) -> Steering:
    """A method's result, with where it came from; one that would change nothing is refused."""
    _check_interventions(method.name, contrast, interventions)
    train = contrast.train
    split = {} if contrast.drawn is None else {"split": str(contrast.drawn)}
    made = {} if contrast.made is None else {"made": contrast.made_in_short}
    return Steering(
        method=method.name,
        hyperparameters=_plain(asdict(method)),  # type: ignore[call-overload]
        interventions=tuple(interventions),
        dial=dial,
        model=language_model.identity,
        contrast={
            "name": train.name,
            "digest": train.digest,
            "rows": len(train),
            **split,
            **made,
            **put_as(train, language_model.chat_form),
        },
        tables=tables or {},
        findings=findings or {},
    )


def _check_interventions(
    name: str, contrast: Contrast, interventions: Sequence[Intervention]
) -> None:
    """Refuse NaN and infinity, and what is zero at every site: the sides do not differ there."""
    for intervention in interventions:
        for tensor in to_tensors(intervention.operator)[0].values():
            if not tensor.isfinite().all():
                raise TrimtabError(
                    f"{name}: what {contrast.name} gives at {intervention.site} is not finite: "
                    "its activations are too large for float32"
                )
    if interventions and not any(intervention.acts for intervention in interventions):
        sites = interventions[0].site + (" and others" if len(interventions) > 1 else "")
        raise TrimtabError(
            f"{name}: the two sides of {contrast.name} do not differ at {sites}, so there is "
            "nothing to steer: take another site or token rule, or other texts"
        )


def validation_part(method: str, contrast: Contrast) -> Contrast:
    """The rows that a method chooses on, which are not those that it is fitted on."""
    if not any(row.part == "validation" for row in contrast.rows):
        raise TrimtabError(
            f"{method} chooses on validation rows, and {contrast.name} has none: name parts in its "
            "rows, or call contrast.split() (--split)"
        )
    return contrast.part("validation")


def _plain(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as they come back from a file."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in hyperparameters.items()
    }
