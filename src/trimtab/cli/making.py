"""Makes commands for cyclopts: of a function that says its arguments by type, default and help.

Groups of options (dataclasses, see `trimtab.options`) become flat options under a heading.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, convert, validators

from trimtab.cli.values import flags_of, kinds_of, list_in, read_list, read_value, words_of
from trimtab.errors import TrimtabError
from trimtab.terminal import is_terminal, status

#: The headings of groups of options, in the order of a page of help; each group names its own.
HEADINGS = (
    "Making",
    "Method",
    "Fitting",
    "Rows",
    "Steerings",
    "Format",
    "Choosing",
    "Search",
    "Comparing",
    "Units",
    "Strengths",
    "Circle",
    "Answering",
    "Prompts",
    "Decoding",
    "Batch",
    "Judges",
    "lm-eval",
    "Curves",
    "Cross-entropy",
    "Concept",
    "Task",
    "Texts",
    "Budget",
    "Server",
    "Engine",
    "Model",
    "Run",
    "Output",
)


def strict(kind: Any, tokens: Any) -> Any:
    """As cyclopts reads values, but 1.5 is no whole number: it would make 2 of it."""
    kinds = kinds_of(kind)
    if int in kinds and float not in kinds:
        for token in tokens if isinstance(tokens, list | tuple) else [tokens]:
            if re.fullmatch(r"[+-]?\d+", token.value) is None:
                raise ValueError
    return convert(kind, tokens)


def as_typed(value: Any) -> str | None:
    """A default as it would be typed; None where there is nothing to say."""
    if value is None or value is False or value == ():
        return None
    if isinstance(value, tuple | list):
        return ",".join(str(as_typed(each)) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- groups of options ----------------------------------------------------------------------------


@cache
def prepared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its groups of options flat, each under its heading; made once in a process,
    which may run many commands.

    cyclopts gives a field that is not on the command line its class's default, whatever object is
    the default of the argument. So each group gets a class whose defaults are that object's.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    parameters = [_prepared(each, hints[each.name]) for each in signature.parameters.values()]
    # Those that must be given come first, or Python refuses the signature.
    parameters.sort(key=lambda each: (each.kind, each.default is not each.empty))

    def command(*args: Any, **given: Any) -> Any:
        if "opened" in signature.parameters:
            _start()
        for each in parameters:  # cyclopts hands over only what is on the command line
            if each.kind is each.KEYWORD_ONLY and each.default is not each.empty:
                given.setdefault(each.name, each.default)
        return function(*args, **{name: _as_declared(value) for name, value in given.items()})

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__doc__ = function.__doc__
    return command


def _start() -> None:
    """Where somebody looks on, say that work begins while PyTorch is imported, which takes
    seconds."""
    if is_terminal(sys.stderr):
        with status("starting"):
            import_module("trimtab.model")


def _as_declared(value: Any) -> Any:
    """A group as an object of its own class, not of the one that was made for cyclopts."""
    if not dataclasses.is_dataclass(value):
        return value
    made: Any = type(value)
    values = {
        item.name: _as_declared(getattr(value, item.name)) for item in dataclasses.fields(value)
    }
    return made.__bases__[0](**values)


def _prepared(parameter: inspect.Parameter, hint: Any) -> inspect.Parameter:
    if not dataclasses.is_dataclass(hint):
        return parameter.replace(annotation=_repeatable(hint))
    default = None if parameter.default is parameter.empty else parameter.default
    kind = _group(typing.cast(Any, hint), default)
    group = typing.get_args(kind)[0]
    needed = any(item.default is dataclasses.MISSING for item in dataclasses.fields(group))
    return parameter.replace(annotation=kind, default=parameter.empty if needed else group())


def _repeatable(hint: Any) -> Any:
    """The hint, of which a switch may be there twice: it says the same. Other options may not,
    unless they take several values one at a time."""
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if kind in (bool, bool | None):
        return Annotated[hint, Parameter(allow_repeating=True)]
    return hint


@cache
def _group(kind: Any, default: Any) -> Any:
    """A class for cyclopts, with the values of the object `default` as its defaults. Many commands
    have the same group."""
    hints = typing.get_type_hints(kind, include_extras=True)
    made = []
    for item in dataclasses.fields(kind):
        value = item.default if default is None else getattr(default, item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            hint = _group(hints[item.name], value)
            value = typing.get_args(hint)[0]()
        elif "help" in item.metadata:
            hint = _option(item.name, hints, item.metadata)
        else:  # a method's, which is an option already
            hint = hints[item.name]
        hint = _repeatable(hint)
        about = {} if value is dataclasses.MISSING else {"default": value}
        made.append((item.name, hint, dataclasses.field(**about, metadata=item.metadata)))
    new = dataclasses.make_dataclass(kind.__name__, made, bases=(kind,), frozen=True, kw_only=True)
    new.__module__ = kind.__module__  # cyclopts looks there for what a type is
    if not hasattr(kind, "heading"):  # a group of groups, each under its own
        return Annotated[new, Parameter(name="*")]
    group = Group(kind.heading, sort_key=HEADINGS.index(kind.heading))
    return Annotated[new, Parameter(name="*", group=group)]


def _option(name: str, hints: Mapping[str, Any], about: Any) -> Any:
    """A field as an option, as its metadata say."""
    hint = hints[name]
    flag, least, most = (about.get(name) for name in ("flag", "least", "most"))
    own: dict[str, Any] = {"help": about["help"]}
    if list_in(hint) is not None:
        own["negative"] = ()  # no --empty-...
    if hint in (bool, bool | None) and isinstance(flag, tuple):
        own["name"], own["negative"] = flag
    elif flag is not None:
        own["name"] = flag
        own["negative"] = ()
    elif hint is not bool:
        own["name"] = flags_of(name, hints)
    if least is not None:
        own["validator"] = validators.Number(gte=least, lte=most)
    if about.get("zero_is_all"):
        own["converter"] = rows_or_all
    several = list_in(hint)
    if (
        several is not None
        and not about.get("repeats")
        and {int, float} & set(typing.get_args(several))
    ):
        own |= _one_text(lambda name, text: read_list(name, text, typing.get_args(several)[0]))
    return Annotated[hint, Parameter(**own)]


def given_twice(option: str) -> str:
    """Why an option that says two things is refused: one of them would be lost."""
    return f"{option} is given twice: give it once (where it takes several values, with commas)"


def _one_text(read: Callable[[str, str], Any], repeats: bool = False) -> dict[str, Any]:
    """For an option whose text, one word, is read by our own function of name and text. One that
    `repeats` is read as if it were there once, with commas between its texts."""

    def converter(kind: Any, tokens: Sequence[Any]) -> Any:
        texts = [token.value for token in tokens]
        if len(texts) > 1 and not repeats:
            raise TrimtabError(given_twice(tokens[-1].keyword))
        return read(tokens[-1].keyword, ",".join(texts))

    # -1 is one token each time, as often as it is there.
    return {"converter": converter, "n_tokens": -1 if repeats else 1}


def rows_or_all(kind: Any, tokens: Sequence[Any]) -> int | None:
    """How many rows an option takes; 0 is all."""
    rows = int(strict(int, tokens))
    if rows < 0:
        raise TrimtabError(f"{tokens[-1].keyword} must be 1 or more, or 0 for all, not {rows}")
    return rows or None


# -- options of methods and of analyses -----------------------------------------------------------


def method_options(method: type, as_text: bool = False) -> Any:
    """A group whose fields are those of a method; `as_text` leaves all of them as text, not given
    unless the user does."""
    hints = typing.get_type_hints(method)
    known = [item.name for item in dataclasses.fields(method)]
    made: list[tuple[str, Any, Any]] = []
    hint: Any
    for item in dataclasses.fields(method):
        words, names = item.metadata.get("help"), flags_of(item.name, known)
        if as_text:
            hint = Annotated[str | None, Parameter(help=words, name=names, metavar="VALUES")]
            about = dataclasses.field(default=None)
        else:
            repeats = bool(item.metadata.get("repeats"))
            hint = method_option(hints[item.name], words, names, repeats)
            about = dataclasses.field(default=item.default)
        made.append((item.name, hint, about))
    options = dataclasses.make_dataclass(
        "Method", made, namespace={"heading": "Method"}, kw_only=True, frozen=True
    )
    options.__module__ = method.__module__
    return options


def method_option(
    hint: Any, words: str | None, names: tuple[str, ...], repeats: bool = False
) -> Any:
    """An option of a method, which itself says which words it knows."""
    if hint is bool:
        return Annotated[hint, Parameter(help=words)]

    def read(name: str, text: str) -> Any:
        return read_value(name, text, hint)

    # Any, because cyclopts holds what was read to the type where pydantic is loaded.
    own: dict[str, Any] = {"help": words, "name": names, "metavar": _metavar(hint)}
    return Annotated[Any, Parameter(**own, **_one_text(read, repeats))]


def _metavar(hint: Any) -> str:
    """What may stand for a value: `INT|all`."""
    plain = [kind.__name__.upper() for kind in kinds_of(hint) if kind in (int, float, str)]
    if list_in(hint) is not None:
        numbers = {int, float} & set(typing.get_args(list_in(hint)))
        plain = ["NUMBERS" if numbers else "WORDS"]
    return "|".join([*plain, *words_of(hint)])


def argument_option(hint: Any, words: str | None, names: tuple[str, ...]) -> Any:
    """An option of an analysis' argument: lists have commas."""
    several = list_in(hint)
    if several is None:
        own: dict[str, Any] = {} if hint is bool else {"name": names}
        return Annotated[hint, Parameter(help=words, **own)]
    item = typing.get_args(several)[0]
    reading = _one_text(lambda name, text: read_list(name, text, item))
    return Annotated[hint, Parameter(help=words, name=names, metavar="VALUES", **reading)]


# -- pages that are not asked for -----------------------------------------------------------------


@cache
def summary(module: str, name: str | None = None) -> str:
    """The first paragraph of a docstring, read without importing anything: that of a function or a
    class of a module, or the module's own."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree: Any = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    if name is not None:
        tree = next(node for node in tree.body if getattr(node, "name", None) == name)
    return (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
