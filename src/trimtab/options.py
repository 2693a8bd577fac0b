"""Arguments that travel together, each group said once: it is the argument in Python, what
config.json says of a run, and a group of options on the command line."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from trimtab.errors import TrimtabError

Returned = TypeVar("Returned")
#: Who says how a task is asked: trimtab, or the authors of the paper.
Protocol = Literal["trimtab", "paper"]
#: Which way a metric counts.
Better = Literal["more", "less"]
#: How settings are found: all of a grid, drawn, stopped early, or drawn by two aims.
Searching = Literal["grid", "tpe", "halving", "pareto"]
#: Rows that are enough to choose on, as the AUSteer paper's fast sweep has them.
FAST = 100
#: What a setting that is chosen may cost, in nats per token of plain text.
MAX_COST = 0.3
#: By how much a chosen trade-off may move neutral texts, in nats per token.
MAX_KL = 0.1
#: How far a probability may be off between the dials at which the model ran.
TOLERANCE = 1e-3
#: Train, validation and test: how the rows of a contrast are dealt out that name no part.
SPLIT = "0.6,0.2,0.2"
_REQUIRED: Any = object()


def option(help: str, default: Any = _REQUIRED, *, record: bool = True, **about: Any) -> Any:
    """A field of a group: its words for `--help`, and whether config.json has it (it has not what
    a digest says, or what changes no result).

    On the command line `flag` is its name where that is another, `least` and `most` are its range,
    `zero_is_all` lets 0 stand for None, and `repeats` has numbers given one at a time, not with
    commas between them.
    """
    metadata = {"help": help, "record": record, **about}
    return field(metadata=metadata, **({} if default is _REQUIRED else {"default": default}))


def record(*groups: Any) -> dict[str, Any]:
    """What config.json says of some groups of options."""
    return {
        item.name: getattr(group, item.name)
        for group in groups
        for item in fields(group)
        if item.metadata.get("record")
    }


def flat(function: Callable[..., Returned]) -> Callable[..., Returned]:
    """A function that takes the fields of its groups as keywords too: `limit=4` is
    `rows=Rows(limit=4)`. Fields that are not given are those of the group in the signature."""
    signature = inspect.signature(function)
    groups = [
        (place, parameter)
        for place, parameter in enumerate(signature.parameters.values())
        if is_dataclass(parameter.default)
    ]

    @functools.wraps(function)
    def called(*args: Any, **given: Any) -> Returned:
        positional = list(args)
        for place, parameter in groups:
            if place < len(positional):
                positional[place] = _with_fields(positional[place], parameter.default, given)
            else:
                group = given.get(parameter.name, parameter.default)
                given[parameter.name] = _with_fields(group, parameter.default, given)
        return function(*positional, **given)

    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
        for name, value in flat_values(parameter.default for _, parameter in groups).items()
    ]
    shown = [*signature.parameters.values(), *keywords]
    called.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return called


def _with_fields(group: Any, default: Any, given: dict[str, Any]) -> Any:
    """The group with those of its fields that are given, which are taken out of `given`.

    What groups are in it the default says: a judge may be a dataclass too, and is left alone.
    """
    changed = {}
    for item in fields(group):
        inner = getattr(default, item.name, None)
        if item.name in given:
            changed[item.name] = given.pop(item.name)
        elif is_dataclass(inner):
            changed[item.name] = _with_fields(getattr(group, item.name), inner, given)
    return replace(group, **changed)


def flat_values(groups: Iterable[Any]) -> dict[str, Any]:
    """The fields of some groups, and of the groups in them, by name."""
    values: dict[str, Any] = {}
    for group in groups:
        for item in fields(group):
            value = getattr(group, item.name)
            values |= flat_values([value]) if is_dataclass(value) else {item.name: value}
    return values


@dataclass(frozen=True)
class Split:
    """Shares of a contrast's prompts for validation and for test, the rest for train, drawn at
    random by a seed."""

    validation: float = 0.2
    test: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        held_out = self.validation, self.test
        if not (min(held_out) >= 0 and sum(held_out) < 1):
            raise TrimtabError(
                f"split: validation {self.validation} and test {self.test} must leave some rows "
                "for train"
            )

    def __str__(self) -> str:
        """As `--split` takes it."""
        shares = (1 - self.validation - self.test, self.validation, self.test)
        return ",".join(f"{share:.9g}" for share in shares) + (f":{self.seed}" if self.seed else "")

    @classmethod
    def read(cls, value: Any) -> Split | None:
        """From TRAIN,VALIDATION,TEST or TRAIN,VALIDATION,TEST:SEED, or three numbers; none, 0,
        None and nothing held out are no split."""
        if value is None or isinstance(value, cls):
            return value
        if str(value).strip() in ("none", "0"):
            return None
        several = isinstance(value, list | tuple)
        text = ",".join(map(str, value)) if several else str(value)
        shares, colon, seed = text.partition(":")
        try:
            train, validation, test = map(float, shares.split(","))
            drawn_by = int(seed) if colon else 0
        except ValueError as error:
            raise TrimtabError(f"split {text!r}: {_SPLITS}") from error
        if drawn_by < 0 or not math.isclose(train + validation + test, 1, abs_tol=1e-5):
            raise TrimtabError(f"split {text!r}: {_SPLITS}; shares that add up to 1, a seed from 0")
        return cls(validation, test, drawn_by) if validation or test else None


_SPLITS = f"write TRAIN,VALIDATION,TEST as in {SPLIT}, with :SEED behind it for others, or none"


def _split_option() -> Any:
    """How rows are dealt out, in each group that says which rows are taken."""
    return option(
        "Of a contrast whose rows name no part: TRAIN,VALIDATION,TEST:SEED, or none.",
        SPLIT,
        record=False,
    )


def _receipts_option() -> Any:
    """Whether side effects are measured; the tasks in config.json say so."""
    return option(
        "Measure side effects too: slices of mmlu, gsm8k and xstest from --data, repetition and "
        "language of free answers, plain text.",
        False,
        record=False,
    )


def _drift_option() -> Any:
    """Whether it is measured how long effects last."""
    return option(
        "Measure too whether effects last, over turns before the prompt and over a long text.",
        False,
        record=False,
    )


def _receipts_limit_option() -> Any:
    return option("Rows of each of those.", 50, record=False, least=1)


def _split_as_text(group: Any) -> None:
    """Python may give a `Split`, or three numbers; refused here is what is no split."""
    split = Split.read(group.split)
    object.__setattr__(group, "split", None if split is None else str(split))


# -- the groups -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ValidationRows:
    """The rows of a task on which something is measured or chosen."""

    heading = "Rows"

    data: str | None = option(
        "Directory of data sets (default: the environment's TRIMTAB_DATA).", None, record=False
    )
    limit: int | None = option(
        "Validation rows; 0 takes all.", FAST, record=False, zero_is_all=True
    )
    split: Any = _split_option()

    def __post_init__(self) -> None:
        _path_as_text(self)
        _split_as_text(self)
        _refuse_below_one(self, {"limit": "validation", "test_limit": "test"})


@dataclass(frozen=True, kw_only=True)
class Rows(ValidationRows):
    """The rows of a task: settings are chosen on the validation rows and reported on the test
    rows; a limit takes so many of them (None: all)."""

    test_limit: int | None = option("Test rows; 0 takes all.", None, record=False, zero_is_all=True)


def _path_as_text(rows: Any) -> None:
    """Python may give `data` as a Path."""
    object.__setattr__(rows, "data", None if rows.data is None else str(rows.data))


def _refuse_below_one(rows: ValidationRows, parts: dict[str, str]) -> None:
    for name, part in parts.items():
        limit = getattr(rows, name, None)
        if limit is not None and limit < 1:
            raise TrimtabError(f"the limit of {part} rows must be 1 or more, not {limit}")


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """What makes one setting better than another."""

    heading = "Choosing"

    protocol: Protocol = option("trimtab, or paper, which follows the authors.", "trimtab")
    validation_task: Any = option(
        "Another task whose rows stand in for the validation rows.", None, record=False
    )
    metric: str | None = option("What counts (default: the task's first).", None)
    better: Better | None = option(
        "more or less of the metric is better, where its name does not say (attack success: less).",
        None,
    )
    max_cost: float | None = option(
        "Leave out what costs more nats per token of plain text, which is what breaks text; inf: "
        "no limit.",
        MAX_COST,
    )

    def __post_init__(self) -> None:
        if self.max_cost == math.inf:
            object.__setattr__(self, "max_cost", None)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How a model answers the examples of a task."""

    heading = "Answering"

    seed: int = option("For whatever is drawn.", 0, least=0)
    batch_size: int = option("Prompts that are answered at once.", 16)
    max_new_tokens: int | None = option("Tokens of an answer (default: the task's).", None)


@dataclass(frozen=True, kw_only=True)
class FitOn:
    """What methods are fitted on."""

    heading = "Fitting"

    contrast: Any = option(
        "What to fit on (default: the task's train rows).",
        None,
        record=False,
        flag=("--contrast", "-c"),
    )
    cache: Path | str | None = option(
        "Directory that keeps the activations that were read: an interrupted fit goes on there, "
        "and a later one need not run the model again.",
        None,
        record=False,
    )
    gate: Any = option(
        "Under which condition what is fitted acts: a file of trimtab gate fit, or several as in "
        "'a.safetensors & !b.safetensors'.",
        None,
        record=False,
    )


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """The prompts that methods are compared with."""

    heading = "Prompts"

    baselines: bool | None = option(
        "Compare with asking in the prompt (default: where it is known in words what to ask for).",
        None,
        record=False,
        flag=("--baselines", "--no-baselines"),
    )
    behaviour: str = option(
        "What is steered to, as after 'Please' (default: the contrast's or the task's own words).",
        "",
        record=False,
    )
    opposite: str = option("What the opposite of it is.", "", record=False)
    written_prompt: str = option("A prompt of yours to compare with.", "", record=False)
    writer: Any = option(
        "Who writes a prompt from train pairs: self, local:MODEL, or chat:NAME at --writer-url.",
        None,
        record=False,
    )
    shots: int = option("Train pairs that are shown as examples.", 4, record=False, least=1)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the settings of a method are searched."""

    heading = "Search"

    search: Searching = option(
        "grid; tpe (draws --trials settings); halving (stops poor ones early); pareto (draws what "
        "does most for as little KL as can be on neutral texts).",
        "grid",
    )
    trials: int | None = option("How many, where they are drawn.", None)
    oracle: bool = option("Run every complete trial on the test rows too.", True)
    storage: str | None = option(
        "An Optuna storage that several machines work on, as a URL.", None, record=False
    )
    resumed: bool = option(
        "Run only the blocks that a setting changes, or all.",
        True,
        record=False,
        flag=("--resumed", "--full"),
    )
    max_kl: float = option(
        "Of pareto: choose what moves neutral texts by at most so many nats per token.",
        MAX_KL,
        record=False,
    )
    pick: int | None = option(
        "Of pareto: the number of the trial to choose instead.", None, record=False, least=0
    )
    neutral: str | None = option(
        "Of pareto: texts that are to stay as they are: a .txt with one a line, or a contrast's "
        "negative texts or prompts (default: its negative validation texts, or plain text).",
        None,
        record=False,
    )
    kl_tokens: int = option(
        "Of pareto: how many tokens after each neutral text count.", 8, record=False, least=1
    )
    prompting: Prompting = Prompting()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_kl) and self.max_kl >= 0):
            raise TrimtabError(f"max_kl must be 0 nats or more, not {self.max_kl}")
        if self.search != "pareto" and (self.pick is not None or self.neutral is not None):
            raise TrimtabError("pick and neutral are for a search for trade-offs: --search pareto")


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """What methods are compared by."""

    heading = "Comparing"

    trials: int = option("Trials of each method, at most.", 20)
    kl: Sequence[float] = option(
        "Compare once more at an equal budget of so many nats; repeat.", (), repeats=True
    )
    capability: Sequence[str] = option("A task for side effects, as lm-eval:tinyMMLU; repeat.", ())
    capability_limit: int | None = option("Rows of each of those.", None)
    timed: bool = option("Measure the time of generation.", True, flag=("--timed", "--untimed"))
    receipts: bool = _receipts_option()
    receipts_limit: int = _receipts_limit_option()
    drift: bool = _drift_option()

    def __post_init__(self) -> None:
        kl = () if self.kl is None else (self.kl,) if isinstance(self.kl, int | float) else self.kl
        object.__setattr__(self, "kl", tuple(sorted(set(kl))))


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Which rows of the tasks are evaluated."""

    heading = "Rows"

    data: str | None = option(
        "Directory of data sets (default: the environment's TRIMTAB_DATA).", None, record=False
    )
    protocol: Sequence[Protocol] = option(
        "trimtab, or paper, which follows the authors; repeat.", ("trimtab",), record=False
    )
    part: Literal["test", "validation", "train"] = option(
        "test, or validation or train rows of the train set.", "test"
    )
    limit: int | None = option("Only the first examples of a task.", None)
    split: Any = _split_option()
    receipts: bool = _receipts_option()
    receipts_limit: int = _receipts_limit_option()
    drift: bool = _drift_option()

    def __post_init__(self) -> None:
        _path_as_text(self)
        _split_as_text(self)
        if self.receipts_limit < 1:
            raise TrimtabError(f"a receipt has 1 row or more, not {self.receipts_limit}")
        if isinstance(self.protocol, str):
            object.__setattr__(self, "protocol", (self.protocol,))


@dataclass(frozen=True, kw_only=True)
class Harness:
    """How tasks of lm-eval are asked."""

    heading = "lm-eval"

    few_shot: int | None = option("Examples in lm-eval's prompts.", None, record=False)
    chat: bool = option("lm-eval's prompts through the chat template.", False, record=False)
    task_files: Sequence[str | Path] = option(
        "Directory of lm-eval task files; repeat.", (), record=False, flag="--lm-eval-tasks"
    )


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What a recipe wants the user to bring, and who judges: a chat model."""

    heading = "Rows"

    prompts: str | None = option("File of prompts, where a recipe runs on yours.", None)
    contrast: Any = option("Contrast, where a recipe runs on yours.", None)
    judge: Any = option("Chat model that judges, where a recipe has texts judged.", None)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Where a run is kept."""

    heading = "Run"

    output: Path | str | None = option(
        "Run directory; interrupted runs go on there.",
        None,
        record=False,
        flag=("--output", "-o"),
    )
    overwrite: bool = option(
        "Replace an output that exists.", False, record=False, flag="--overwrite"
    )


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What of the next token is followed over the dial, and how closely; of a number of `tokens`
    `choose` says whether they are those that gain most within the bounds, or the most probable at
    the far end of the dial."""

    span: tuple[float, float] | None = None
    points: int = 1025
    tokens: int | Sequence[str | int] = 8
    tolerance: float = TOLERANCE
    choose: Literal["gain", "end"] = "gain"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far the next token's distribution may go in the sweet spot: KL in nats, and entropy as a
    share of the unsteered one."""

    heading = "Curves"

    max_kl: float = option("KL in the sweet spot, nats.", 1.0)
    min_entropy: float = option("Entropy in the sweet spot, as a share of the unsteered.", 0.5)
    max_entropy: float = option("The same from above.", 1.5)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise TrimtabError(f"the bound on KL must be above 0 nats, not {self.max_kl}")
        if not 0 <= self.min_entropy < 1 <= self.max_entropy < math.inf:
            raise TrimtabError(
                "entropy is bounded by a share of the unsteered one below 1 and one of 1 or more, "
                f"not {self.min_entropy} and {self.max_entropy}"
            )


@dataclass(frozen=True, kw_only=True)
class PersonaAmounts:
    """How much is written for the contrast of a trait."""

    heading = "Texts"

    pairs: int = option("Pairs of instructions, one for the trait and one against it.", 5, least=1)
    questions: int = option("Questions, half of them for fitting.", 40, least=1)
    answers: int = option("Answers to each question under each instruction.", 1, least=1)


@dataclass(frozen=True, kw_only=True)
class WishTexts(PersonaAmounts):
    """How the contrast of a wish is written: as many texts as two cores write of a small model in
    some minutes."""

    pairs: int = option("Pairs of instructions, one for the wish and one against it.", 3, least=1)
    questions: int = option("Questions, half of them for fitting.", 28, least=1)
    max_new_tokens: int = option("Tokens of an answer.", 48, least=1)
    opposite: str | None = option(
        "What the other side is, in a few words (default: what is known of the wish's words).", None
    )
    writer: Any = option(
        "Who writes instructions and questions: templates, local:MODEL, or chat:NAME at "
        "--writer-url (default: the model itself from 1e9 parameters on, else templates).",
        None,
        record=False,
    )
    judge: Any = option(
        "Who says which answers are kept: local:MODEL, asked for yes or no, or chat:NAME at "
        "--judge-url, which scores from 0 to 100 (default: the model itself).",
        None,
        record=False,
    )


@dataclass(frozen=True, kw_only=True)
class Making:
    """What a steering that is made of a wish may cost, and how long making it may take."""

    heading = "Making"

    max_cost: float = option(
        "What the steering may cost at most, in nats per token of plain text.", MAX_KL
    )
    minutes: float | None = option(
        "Minutes that it may take; what is left out for that is said.", None
    )
    train: bool = option(
        "Try methods that are trained too (RePS, ReFT, BiPO), which takes longer.", False
    )
    seed: int = option("For whatever is drawn.", 0, least=0)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_cost) and self.max_cost > 0):
            raise TrimtabError(
                f"max_cost must be above 0 nats per token of plain text, not {self.max_cost}"
            )
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise TrimtabError(f"minutes must be above 0, not {self.minutes}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How texts are sampled; the defaults are those of "Towards Understanding Steering
    Strength"."""

    max_new_tokens: int = 300
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 16
