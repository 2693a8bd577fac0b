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
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel, load
from trimtab.next_tokens import Next, Reading, next_tokens, plan
from trimtab.progress import progress
from trimtab.steering import Steering, Steerings


@register_model("trimtab")
class TrimtabLM(TemplateLM):  # type: ignore[misc]
    """A steered (or unsteered) model, as the harness wants it.

    `pretrained` is what `trimtab.load` takes, or a `LanguageModel`. `steering` is a steering, or
    FILE@DIAL; several are joined with ";". `answers` is a file that keeps every answer, so that an
    interrupted evaluation goes on.
    """

    def __init__(
        self,
        pretrained: Any,
        steering: Any = None,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        answers: str | Path | None = None,
        force: bool = False,
    ) -> None:
        super().__init__()
        self.language_model: LanguageModel = (
            pretrained
            if isinstance(pretrained, LanguageModel)
            else load(pretrained, dtype=dtype, device=device or "auto")
        )
        self.tokenizer = self.language_model.tokenizer
        self.steering = _steering(steering)
        self.force = str(force).lower() == "true"
        self.batch_size = 16 if not str(batch_size).isdigit() else int(batch_size)
        self._answers = _Answers(None if answers is None else Path(answers))
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
        rendered: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return rendered

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
        readings = []
        for _, context, continuation in requests:
            if not continuation:
                raise TrimtabError("the harness asks for the likelihood of nothing")
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            prompt = max(1, len(tokens) - len(continuation))
            positions = tuple(range(prompt - 1, len(tokens) - 1))
            readings.append(Reading(tokens[:-1], positions, prompt, tokens[prompt:]))
        return self._scored(readings)

    def _scored(self, readings: Sequence[Reading]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether every token is the most probable one) of each reading's targets.

        Those that read the same tokens are one text; options of one token share a position.
        """
        texts: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, reading in enumerate(readings):
            texts.setdefault((reading.tokens, reading.prompt), []).append(i)
        merged = [_merge([readings[i] for i in owners]) for owners in texts.values()]
        batches = plan(merged, self.language_model.batch_tokens)
        owners_of, keys = list(texts.values()), [_key(reading) for reading in merged]
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
            contexts = [self._room_for(requests[i].args[0], asked.new_tokens) for i in group]
            for i, text in zip(group, self._written(contexts, asked), strict=True):
                texts[i] = text
        return texts

    def _written(self, contexts: Sequence[str], asked: _Asked) -> list[str]:
        lengths = [len(tokens) for tokens in self.language_model.encode(contexts)]
        order = sorted(range(len(contexts)), key=lambda i: (lengths[i], i))
        keys = [_digest(["text", context, asked.as_json]) for context in contexts]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if all(keys[i] in self._answers for i in batch):
                continue
            written = self.language_model.generate(
                [contexts[i] for i in batch],
                chat=False,
                max_new_tokens=asked.new_tokens,
                steering=self.steering,
                stop=asked.stop,
                batch_size=self.batch_size,
                force=self.force,
                seed=start if asked.sampling else None,
                **asked.sampling,
            )
            self._answers.keep(
                {keys[i]: asked.cut(each.text) for i, each in zip(batch, written, strict=True)}
            )
        return [self._answers[key] for key in keys]

    def _room_for(self, context: str, new_tokens: int) -> str:
        """The end of a context that is too long to leave room for an answer."""
        limit = self.max_length - new_tokens
        if limit < 1:
            raise TrimtabError(
                f"{new_tokens} new tokens do not fit in the {self.max_length} tokens of "
                f"{self.language_model.name}"
            )
        tokens = self.tok_encode(context)
        if len(tokens) <= limit:
            return context
        kept: str = self.tokenizer.decode(tokens[-limit:], skip_special_tokens=True)
        return kept


class _Asked:
    """How a task of the harness wants its texts."""

    def __init__(self, options: dict[str, Any], longest: int) -> None:
        until = options.get("until") or []
        self.until = [until] if isinstance(until, str) else list(until)
        self.new_tokens = int(options.get("max_gen_toks") or options.get("max_tokens") or longest)
        temperature = float(options.get("temperature") or 0.0)
        self.sampling: dict[str, Any] = {}
        if options.get("do_sample", temperature > 0) and temperature > 0:
            self.sampling = {"temperature": temperature}
            self.sampling |= {key: options[key] for key in ("top_k", "top_p") if key in options}
        self.stop = "|".join(map(re.escape, self.until)) or None
        self.as_json = json.dumps(options, sort_keys=True)

    def cut(self, text: str) -> str:
        """The text before the first of the strings that end it."""
        for end in self.until:
            text = text.split(end)[0]
        return text


def _steering(given: Any) -> Steering | Steerings | None:
    if given is None or isinstance(given, Steering | Steerings):
        return given
    parts = [part.strip() for part in str(given).split(";") if part.strip()]
    return Steerings(Steering.read(part) for part in parts) if parts else None


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


def _key(reading: Reading) -> str:
    return _digest(["likelihood", reading.tokens, reading.positions, reading.targets])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class _Answers:
    """Answers by what was asked, in a file with one JSON object a line, if there is a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            # The last line may have been cut off in the middle.
            for line in path.read_bytes().split(b"\n")[:-1]:
                self._known.update(json.loads(line))
            path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n" * bool(self._known))

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def keep(self, answers: dict[str, Any]) -> None:
        self._known.update(answers)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(json.dumps(answers, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


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
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(path) for path in task_files] or None)
    if name not in manager.all_tasks:
        raise TrimtabError(
            f"lm-eval has no task {name!r}; name the directory of your own task files with "
            "--lm-eval-tasks"
        )
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=few_shot,
        limit=limit,
        bootstrap_iters=0,
        task_manager=manager,
        apply_chat_template=chat,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """The harness's progress bars go where ours do: nowhere, unless there is a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


def _records(found: Any) -> Iterator[dict[str, Any]]:
    """A record of each example, and one of each figure that is not a mean over examples."""
    index = 0
    for task, samples in found["samples"].items():
        per_example: set[str] = set()
        for sample in samples:
            values = {
                name: float(sample[name])
                for name in sample.get("metrics") or ()
                if isinstance(sample.get(name), bool | int | float)
            }
            per_example |= set(values)
            record: dict[str, Any] = {
                "index": index,
                "id": f"{task}-{sample['doc_id']}",
                "prompt": _prompt_of(sample),
                "output": sample.get("filtered_resps"),
                "prediction": None,
                "target": sample.get("target"),
                "values": {_named(name, sample): value for name, value in values.items()},
            }
            weight = sample["doc"].get("trimtab_weight")
            if weight is not None:
                record["weight"] = float(weight)
            yield record
            index += 1
        figures = {
            name.removesuffix(",none"): value
            for name, value in found["results"].get(task, {}).items()
            if isinstance(value, int | float)
            and not name.startswith(("alias", "sample_len"))
            and "_stderr" not in name
            and name.partition(",")[0] not in per_example
        }
        if figures:
            yield {"index": index, "id": task, "values": {}, "figures": figures, "n": len(samples)}
            index += 1


def _named(metric: str, sample: dict[str, Any]) -> str:
    """A metric, with its filter where a task reads the same outputs in several ways."""
    key = str(sample.get("filter", "none"))
    return metric if key == "none" else f"{metric} ({key})"


def _prompt_of(sample: dict[str, Any]) -> str:
    """The context of the first request, for people."""
    arguments = sample.get("arguments")
    while isinstance(arguments, dict | list | tuple) and arguments:
        arguments = next(iter(arguments.values() if isinstance(arguments, dict) else arguments))
    return arguments if isinstance(arguments, str) else ""


if __name__ == "__main__":
    # The harness runs in this module's name, so that its registry has the model.
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
