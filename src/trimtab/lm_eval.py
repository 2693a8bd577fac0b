"""trimtab as a model of EleutherAI's lm-evaluation-harness, and its tasks as tasks of trimtab.

    python -m trimtab.lm_eval --model trimtab \\
        --model_args pretrained=smollm2-135m-instruct,steering=formal.safetensors@2 --tasks ...

takes whatever the harness's own command takes; importing this module is what makes the harness
know the model. Log-likelihoods are those of its `hf` model, computed with shared contexts run
once, options of one token read from one position, and no padding between unequal lengths.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml  # type: ignore[import-untyped]
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.model import LanguageModel, load
from trimtab.next_tokens import Next, Reading, next_tokens, plan
from trimtab.progress import progress
from trimtab.steering import Steering, Steerings


@register_model("trimtab")
class TrimtabLM(TemplateLM):  # type: ignore[misc]
    """A steered (or unsteered) model, as the harness wants it.

    `pretrained` is what `trimtab.load` takes, or a `LanguageModel`. `steering` is a steering, or
    FILE@DIAL; several are joined with ";". `answers` is a file that keeps every answer, so that an
    interrupted evaluation goes on; answers of other models and steerings in it are left alone.
    """

    def __init__(
        self,
        pretrained: Any,
        steering: Any = None,
        dtype: str = "float32",
        device: str | None = "auto",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        answers: str | Path | None = None,
        force: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise TrimtabError(
                f"trimtab's model has no argument {', '.join(unknown)}: known are pretrained, "
                "steering, dtype, device, batch_size, answers, force"
            )
        self.language_model: LanguageModel = (
            pretrained
            if isinstance(pretrained, LanguageModel)
            else load(pretrained, dtype=dtype, device=_device(device))
        )
        self.tokenizer = self.language_model.tokenizer
        self.steering = _steering(steering)
        self.force = str(force).lower() == "true"
        self.batch_size = max(1, int(batch_size)) if str(batch_size).isdigit() else 16
        self._answers = _Answers(None if answers is None else Path(answers))
        self._who = [
            self.language_model.identity.digest,
            str(self.language_model.dtype),
            [[one.digest, one.setting] for one in _each(self.steering)],
        ]
        # Says at once what does not fit, not after hours.
        with self.language_model.steered(self.steering, force=self.force):
            pass

    # -- what the harness asks about the model ------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        bos = self.language_model.bos
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.language_model.max_length

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self.language_model.name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.language_model.chats:
            raise TrimtabError(f"{self.language_model.name} has no chat template")

        def render(messages: list[dict[str, str]]) -> str:
            rendered: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return rendered

        try:
            return render(chat_history)
        except TemplateError:  # as the harness's `hf` does: some templates have no system message
            return render([one for one in chat_history if one["role"] != "system"])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        if add_special_tokens is None:
            return self.language_model.encode([string])[0]
        ids: list[int] = self.tokenizer(
            string, add_special_tokens=add_special_tokens, verbose=False
        )["input_ids"]
        return ids

    # -- likelihoods --------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        readings, cut = [], 0
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                shown = "" if texts is None else f" after {texts[0][-40:]!r}: {texts[1][:40]!r}"
                raise TrimtabError(
                    f"the harness asks for the likelihood of {len(continuation)} tokens{shown}; it "
                    f"can be 1 to {self.max_length}"
                )
            tokens = (*context, *continuation)
            cut += len(tokens) > self.max_length + 1
            tokens = tokens[-(self.max_length + 1) :]
            prompt = len(tokens) - len(continuation)
            positions = tuple(range(prompt - 1, len(tokens) - 1))
            readings.append(Reading(tokens[:-1], positions, prompt, tokens[prompt:]))
        self._warn_of_cuts(cut, len(readings))
        return self._scored(readings)

    def _warn_of_cuts(self, cut: int, total: int) -> None:
        if cut:
            warnings.warn(
                f"{cut} of {total} prompts are longer than the {self.max_length} tokens of "
                f"{self.language_model.name}: they lost their beginning",
                TrimtabWarning,
                stacklevel=2,
            )

    def _scored(self, readings: Sequence[Reading]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether every token is the most probable one) of each reading's targets.

        Those that read the same tokens are one text; options of one token share a position.
        """
        texts: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, reading in enumerate(readings):
            texts.setdefault((reading.tokens, reading.prompt), []).append(i)
        merged = [_merge([readings[i] for i in owners]) for owners in texts.values()]
        batches = plan(merged, self.language_model.batch_tokens)
        owners_of = list(texts.values())
        keys = [
            _digest(["likelihood", self._who, one.tokens, one.positions, one.targets])
            for one in merged
        ]
        missing = [b for b in batches if any(keys[i] not in self._answers for i in b.rows)]
        with progress("scoring", len(merged)) as advance:
            advance(len(merged) - sum(len(batch.rows) for batch in missing))
            for batch, found in next_tokens(
                self.language_model, merged, missing, self.steering, force=self.force
            ):
                self._answers.keep(
                    {
                        keys[i]: _sums(merged[i], each, len(owners_of[i]))
                        for i, each in zip(batch.rows, found, strict=True)
                    }
                )
                advance(len(batch.rows))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(readings)
        for key, owners in zip(keys, owners_of, strict=True):
            for i, (total, greedy) in zip(owners, self._answers[key], strict=True):
                results[i] = (float(total), bool(greedy))
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += total
        return totals

    # -- texts --------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for group in groups.values():
            asked = _Asked(requests[group[0]].args[1], self.max_gen_toks)
            given = [requests[i].args[0] for i in group]
            contexts = [self._room_for(context, asked.new_tokens) for context in given]
            cut = sum(one != other for one, other in zip(given, contexts, strict=True))
            self._warn_of_cuts(cut, len(given))
            for i, text in zip(group, self._written(contexts, asked), strict=True):
                texts[i] = text
        return texts

    def _written(self, contexts: Sequence[str], asked: _Asked) -> list[str]:
        # What is sampled several times gets several answers; a greedy answer is written once. The
        # harness sets torch's seed.
        seed = torch.initial_seed() if asked.sampling else 0
        seen: Counter[str] = Counter()
        keys = []
        for context in contexts:
            keys.append(_digest(["text", self._who, context, asked.about, seed, seen[context]]))
            seen[context] += bool(asked.sampling)
        wanted = dict(zip(keys, contexts, strict=True))
        lengths = map(len, self.language_model.encode(list(wanted.values())))
        length_of = dict(zip(wanted, lengths, strict=True))
        order = sorted(wanted, key=lambda key: (length_of[key], key))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if all(key in self._answers for key in batch):
                continue
            written = self.language_model.generate(
                [wanted[key] for key in batch],
                chat=False,
                max_new_tokens=asked.new_tokens,
                steering=self.steering,
                stop=asked.stop,
                batch_size=self.batch_size,
                force=self.force,
                seed=(seed + start) % (1 << 32) if asked.sampling else None,
                **asked.sampling,
            )
            self._answers.keep(
                {key: asked.cut(each.text) for key, each in zip(batch, written, strict=True)}
            )
        return [self._answers[key] for key in keys]

    def _room_for(self, context: str, new_tokens: int) -> str:
        """A context, or the end of one that is too long to leave room for an answer."""
        limit = self.max_length - new_tokens
        tokens = self.tok_encode(context)
        if len(tokens) <= limit:
            return context
        # The end as text may have more tokens than it had within the whole, BOS for one.
        for start in range(len(tokens) - max(limit, 0), len(tokens)):
            kept: str = self.tokenizer.decode(tokens[start:])
            if len(self.tok_encode(kept)) <= limit:
                return kept
        raise TrimtabError(
            f"{new_tokens} new tokens do not fit in the {self.max_length} tokens of "
            f"{self.language_model.name}"
        )


#: What a task may ask of its texts beside stop strings and length, if only to say the default.
_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
_DEFAULTS = {"num_beams": 1, "repetition_penalty": 1.0}


class _Asked:
    """How a task of the harness wants its texts."""

    def __init__(self, options: dict[str, Any], longest: int) -> None:
        self.about = options
        normal: dict[str, Any] = dict(normalize_gen_kwargs(options, longest))
        unknown = [
            key
            for key, value in normal.items()
            if key not in _OPTIONS and (key not in _DEFAULTS or value != _DEFAULTS[key])
        ]
        if unknown:
            raise TrimtabError(
                f"the task asks for texts with {', '.join(unknown)}, which trimtab does not have"
            )
        self.until = [end for end in normal["until"] if end]
        self.new_tokens = int(normal["max_gen_toks"])
        self.sampling: dict[str, Any] = {}
        if normal["do_sample"] and normal.get("temperature"):
            kept = ("temperature", "top_k", "top_p")
            self.sampling = {key: normal[key] for key in kept if normal.get(key) is not None}
        self.stop = "|".join(map(re.escape, self.until)) or None

    def cut(self, text: str) -> str:
        """The text before the first of the strings that end it."""
        for end in self.until:
            text = text.split(end)[0]
        return text


def _device(given: str | None) -> str:
    """The harness's command says cuda:0 where the user says nothing, on any machine."""
    cuda = str(given).startswith("cuda")
    return given if given and (not cuda or torch.cuda.is_available()) else "auto"


def _steering(given: Any) -> Steering | Steerings | None:
    if given is None or isinstance(given, Steering | Steerings):
        return given
    parts = [part.strip() for part in str(given).split(";") if part.strip()]
    return Steerings(Steering.read(part) for part in parts) if parts else None


def _each(steering: Steering | Steerings | None) -> Sequence[Steering]:
    if steering is None:
        return ()
    return (steering,) if isinstance(steering, Steering) else steering


def _merge(readings: Sequence[Reading]) -> Reading:
    """Options that read the same tokens, in one reading: one after the other."""
    first = readings[0]
    targets = tuple(target for reading in readings for target in reading.targets or ())
    return Reading(first.tokens, first.positions * len(readings), first.prompt, targets)


def _sums(reading: Reading, found: Next, options: int) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of each option of a merged reading."""
    hit = found.best == torch.tensor(reading.targets)
    return [
        (float(log_p.sum()), bool(hits.all()))
        for log_p, hits in zip(found.log_p.chunk(options), hit.chunk(options), strict=True)
    ]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class _Answers:
    """Answers by what was asked, in a file with one JSON object a line, if there is a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is None:
            return
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # the last line was cut off in the middle
                with path.open("r+b") as file:
                    file.truncate(whole)
        except OSError as error:
            raise TrimtabError(f"cannot read the answers in {path}: {error.strerror}") from error
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                self._known.update(json.loads(line))
            except (ValueError, TypeError) as error:
                raise TrimtabError(
                    f"{path}, line {number} does not hold answers: remove the file, or name another"
                ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def keep(self, answers: dict[str, Any]) -> None:
        self._known.update(answers)
        if self.path is None:
            return
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(answers, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrimtabError(f"cannot write answers to {self.path}: {error.strerror}") from error


# -- its tasks ------------------------------------------------------------------------------------


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
        reason = (str(error).strip().splitlines() or [""])[0]
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
        redirect_stderr(nowhere),
    ):
        yield
    for one in caught:
        if issubclass(one.category, TrimtabWarning):
            warnings.warn(str(one.message), TrimtabWarning, stacklevel=4)


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


def main() -> None:
    """The harness's own command, in this module's name, so that its registry has the model."""
    from lm_eval.__main__ import cli_evaluate

    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        cli_evaluate()
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())
        named = reason if isinstance(error, TrimtabError) else f"{type(error).__name__}: {reason}"
        print(f"trimtab: {named}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
