"""Runs tasks of lm-evaluation-harness on trimtab's model, and makes records of what it returns."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from trimtab.errors import TrimtabError, TrimtabWarning, first_line
from trimtab.evaluation.harness.model import TrimtabLM


def run_task(
    name: str,
    model: TrimtabLM,
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    task_files: Sequence[str | Path] = (),
    chat: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Run one task (or group) of the harness; a record for each of its examples.

    `task_files` are directories of task files in the harness's YAML, which are looked at first.
    """
    for directory in task_files:
        if not Path(directory).is_dir():
            raise TrimtabError(f"{directory} is not a directory of lm-eval task files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with _without_bars():
            return list(_records(_evaluated(name, model, limit, few_shot, task_files, chat, seed)))
    except TrimtabError:
        raise
    except Exception as error:
        # Task files, data sets and the network fail in as many ways as there are libraries.
        reason = first_line(error)
        raise TrimtabError(
            f"lm-eval's task {name} cannot be run: {type(error).__name__}: {reason}"
        ) from error


def _evaluated(
    name: str,
    model: TrimtabLM,
    limit: int | None,
    few_shot: int | None,
    task_files: Sequence[str | Path],
    chat: bool,
    seed: int,
) -> Any:
    """What the harness itself returns."""
    manager = _manager(name, tuple(str(path) for path in task_files))
    if name not in manager.all_tasks:
        _check_yaml(task_files)
        raise TrimtabError(
            f"lm-eval has no task {name!r}; name the directory of your own task files with "
            "--lm-eval-tasks"
        )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=few_shot,
        limit=limit,
        bootstrap_iters=0,
        task_manager=manager,
        apply_chat_template=chat,
        # Seed 0 is what the harness does by itself, and so are its examples in prompts.
        random_seed=seed,
        numpy_random_seed=DEFAULT_OTHER_SEED + seed,
        torch_random_seed=DEFAULT_OTHER_SEED + seed,
        fewshot_random_seed=DEFAULT_OTHER_SEED + seed,
    )
    fixed = {count for count in found["n-shot"].values() if few_shot not in (None, count)}
    if fixed:
        warnings.warn(
            f"lm-eval's {name} always has {', '.join(map(str, sorted(fixed)))} examples in its "
            f"prompts, not {few_shot}",
            TrimtabWarning,
            stacklevel=2,
        )
    return found


def _manager(name: str, task_files: tuple[str, ...]) -> Any:
    """Knows the task files. Reading the harness's own, thousands, takes ten seconds, so they are
    left out where the user's have all that a task consists of."""
    if task_files:
        manager = TaskManager(include_path=list(task_files), include_defaults=False)
        if _is_whole(name, manager):
            return manager
        return TaskManager(include_path=list(task_files))
    return _own_manager()


@cache
def _own_manager() -> Any:
    return TaskManager()


def _check_yaml(task_files: Sequence[str | Path]) -> None:
    """Say which task file is no YAML: the harness only leaves it out."""
    for file in (file for path in task_files for file in sorted(Path(path).rglob("*.yaml"))):
        try:
            for _ in yaml.parse(file.read_bytes()):
                pass
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise TrimtabError(f"the task file {file} is not YAML: {reason}") from error


def _is_whole(name: Any, manager: Any) -> bool:
    """Whether a task, or all that a group consists of, is among the known task files."""
    if name in manager.all_groups:
        parts = manager.task_index[name].cfg["task"]
        return isinstance(parts, list) and all(_is_whole(part, manager) for part in parts)
    return isinstance(name, str) and name in (*manager.all_subtasks, *manager.all_tags)


@contextmanager
def _without_bars() -> Iterator[None]:
    """The harness's progress bars go where ours do: nowhere, unless there is a terminal. Our
    warnings come when it is done."""
    if sys.stderr.isatty():
        yield
        return
    with (
        warnings.catch_warnings(record=True) as caught,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        _programs_silenced(nowhere.fileno()),
        redirect_stderr(nowhere),
    ):
        yield
    for one in caught:
        if issubclass(one.category, TrimtabWarning):
            warnings.warn(str(one.message), TrimtabWarning, stacklevel=4)


@contextmanager
def _programs_silenced(nowhere: int) -> Iterator[None]:
    """The harness runs git, which complains where there is no repository."""
    own = os.dup(2)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _records(found: Any) -> Iterator[dict[str, Any]]:
    """A record of each example, and one of the figures that are not means over examples."""
    index = 0
    for task, samples in found["samples"].items():
        figures = {
            name: float(value)
            for name, value in found["results"][task].items()
            if "," in name and "_stderr," not in name and isinstance(value, int | float)
        }
        # A task may read the same outputs in several ways, one after the other.
        examples: dict[int, list[dict[str, Any]]] = {}
        for sample in samples:
            examples.setdefault(sample["doc_id"], []).append(sample)
        means = {name for name, value in figures.items() if _is_mean(name, value, samples)}
        for number, readings in examples.items():
            sample = readings[0]
            outputs = [one[0] if len(one) == 1 else one for one in sample["resps"]]
            record: dict[str, Any] = {
                "index": index,
                "id": f"{task}-{number}",
                "prompt": _prompt_of(sample),
                "output": _plain(outputs[0] if len(outputs) == 1 else outputs),
                "prediction": _prediction(readings),
                "target": _plain(sample["target"]),
                "values": {
                    _named(name): _finite(one[name.partition(",")[0]])
                    for one in readings
                    for name in figures
                    if name in means and name.partition(",")[2] == one["filter"]
                },
            }
            if isinstance(sample["doc"], dict) and "trimtab_weight" in sample["doc"]:
                record["weight"] = float(sample["doc"]["trimtab_weight"])
            yield record
            index += 1
        others = {
            _named(name): value
            for name, value in figures.items()
            if name not in means and math.isfinite(value)
        }
        if others:
            yield {"index": index, "id": task, "values": {}, "figures": others, "n": len(examples)}
            index += 1


def _is_mean(name: str, value: float, samples: Sequence[dict[str, Any]]) -> bool:
    """Whether a figure is the mean of what the examples have under its name."""
    metric, _, read = name.partition(",")
    own = [sample.get(metric) for sample in samples if sample["filter"] == read]
    numbers = [float(one) for one in own if isinstance(one, bool | int | float)]
    if not own or len(numbers) < len(own):
        return False
    mean = sum(numbers) / len(numbers)
    return math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) or not math.isfinite(mean)


def _named(name: str) -> str:
    """A metric, with its filter where a task reads the same outputs in several ways."""
    metric, _, read = name.partition(",")
    return metric if read == "none" else f"{metric} ({read})"


def _prediction(readings: Sequence[dict[str, Any]]) -> Any:
    """What the filters found in a text; of options the most probable one."""
    found = {one["filter"]: _plain(one["filtered_resps"]) for one in readings}
    first = next(iter(found.values()))
    if all(isinstance(one, list) and len(one) == 2 for one in first):
        return max(range(len(first)), key=lambda i: first[i][0]) if len(first) > 1 else None
    read = {name: one[0] if len(one) == 1 else one for name, one in found.items()}
    return next(iter(read.values())) if len(read) == 1 else read


def _plain(value: Any) -> Any:
    """A value as JSON has it; what it cannot have, infinity for one, as text."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def _finite(value: Any) -> float | None:
    """A number; None, which counts as unclear, where there is none."""
    return float(value) if math.isfinite(value) else None


def _prompt_of(sample: dict[str, Any]) -> str:
    """The context of the first request, for people."""
    arguments = sample.get("arguments")
    while isinstance(arguments, dict | list | tuple) and arguments:
        arguments = next(iter(arguments.values() if isinstance(arguments, dict) else arguments))
    return arguments if isinstance(arguments, str) else ""
