"""Questions about how a model runs, each answered once, by numbers on two short random texts.

Whether rows may be padded, packed or taken up in the middle depends on how an architecture builds
its masks, counts positions and keeps states. No list of architectures says that for sure, so that
each model is asked: what is computed in the clever way is compared with each text alone. An error
or a difference beyond rounding is a no.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from trimtab.anatomy import (
    DOES_NOT_RUN,
    Anatomy,
    Hook,
    cache_file,
    eager,
    exclusively,
    first_tensor,
    near,
    probe_ids,
)
from trimtab.errors import TrimtabError
from trimtab.files import write_whole
from trimtab.model.batching import refuse_dropout
from trimtab.model.running import unsteered

#: What models raise at what they do not take.
_NO_ANSWER = (*DOES_NOT_RUN, ArithmeticError)

#: Where each model's answers are kept, by its transformer body: a file, or the body's own name.
_PLACES: WeakKeyDictionary[nn.Module, Path | str] = WeakKeyDictionary()
#: What is in these places.
_ANSWERS: dict[Path | str, dict[str, bool]] = {}


_HERE = threading.local()


def is_asking() -> bool:
    """Whether what this thread runs at the moment only answers a question."""
    return bool(getattr(_HERE, "asking", 0))


@contextmanager
def asking() -> Iterator[None]:
    """What runs inside only says something of the model, and is no work of a run."""
    _HERE.asking = getattr(_HERE, "asking", 0) + 1
    try:
        yield
    finally:
        _HERE.asking -= 1


def answered(anatomy: Anatomy, question: Hashable, ask: Callable[[], bool]) -> bool:
    """The answer to a question about a model, which is asked once of each architecture and
    configuration, and remembered."""
    # Another attention may answer otherwise.
    key = f"{question} {getattr(anatomy.config, '_attn_implementation', None)}"
    with exclusively(anatomy.body):
        place = _place(anatomy)
        answers = _ANSWERS[place]
        if key not in answers:
            refuse_dropout(anatomy.model)
            with asking(), eager(), unsteered(anatomy), torch.no_grad():
                try:
                    answers[key] = ask()
                except _NO_ANSWER:
                    # What fails on plain text as well is an error, and no answer.
                    hidden_alone(anatomy, probe_texts(anatomy)[0])
                    answers[key] = False
            if isinstance(place, Path):
                _keep(place, answers)
        return answers[key]


def _place(anatomy: Anatomy) -> Path | str:
    """Where the answers of models like this one are kept, which are read the first time. Other
    modules (adapters), dtypes and devices may answer otherwise, and what was changed by hand is
    like no other model."""
    body, model = anatomy.body, anatomy.model
    if body not in _PLACES:
        if any(map(_is_changed, model.modules())):
            _PLACES[body] = f"model {next(_NUMBERS)}"
        else:
            kinds = sorted(
                {f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()}
            )
            dtype, device = next((str(p.dtype), p.device.type) for p in model.parameters())
            _PLACES[body] = cache_file(model, "ways of running", kinds, dtype, device)
    place = _PLACES[body]
    if place not in _ANSWERS:
        _ANSWERS[place] = _kept(place) if isinstance(place, Path) else {}
    return place


def _is_changed(module: nn.Module) -> bool:
    """Whether somebody has put hooks or another forward or generate on a module; ours are off
    while it is asked."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = (vars(module).get(name) for name in ("forward", "generate"))
    return any(each is not None and not isinstance(each, Hook) for each in (*hooks, *own))


_NUMBERS = count()


def _kept(file: Path) -> dict[str, bool]:
    """Answers of earlier runs; anything else there is as if nothing were."""
    try:
        return _KEPT.validate_json(file.read_bytes())
    except (OSError, ValueError):
        return {}


def _keep(file: Path, answers: dict[str, bool]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, _KEPT.dump_json(answers), overwrite=True)
    except (OSError, TrimtabError):
        pass  # the next run asks again, and nothing else


_KEPT = TypeAdapter(dict[str, bool])


def probe_texts(anatomy: Anatomy) -> tuple[list[int], list[int]]:
    """Token ids of two texts of different lengths that begin with the same four tokens."""
    first, second = probe_ids(anatomy.model).tolist()
    return first, second[:8]


def hidden_alone(anatomy: Anatomy, text: Sequence[int]) -> Tensor:
    """What the transformer body returns of one text that the model reads by itself,
    [tokens, units]: what any other way of running it is held against."""
    seen: list[Tensor | None] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(first_tensor(output))

    model: Any = anatomy.model
    handle = anatomy.body.register_forward_hook(see)
    try:
        ids = torch.tensor([list(text)], device=probe_ids(model).device)
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    (hidden,) = seen
    if hidden is None:
        raise ValueError("the body returns no activations")
    return hidden[0]


def alike(found: Tensor, alone: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether activations or logits of the same tokens, [tokens, units], differ by no more than
    rounding, in the `dtype` that they were computed in (default: their own).

    In half precision the experts of a mixture may be chosen otherwise for a rounding's sake, so
    that a few tokens may differ.
    """
    epsilon = torch.finfo(dtype or alone.dtype).eps
    tolerance = max(1e-4, 12 * epsilon)
    if epsilon < 1e-5:
        return near(found, alone, tolerance)
    fine = [near(found[i : i + 1], alone[i : i + 1], tolerance) for i in range(len(alone))]
    return found.shape == alone.shape and sum(fine) >= 0.7 * len(fine)
