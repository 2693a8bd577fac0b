"""trimtab as a model of EleutherAI's lm-evaluation-harness, and its tasks as tasks of trimtab.

    python -m trimtab.lm_eval --model trimtab \\
        --model_args pretrained=smollm2-135m-instruct,steering=formal.safetensors@2 --tasks ...

takes whatever the harness's own command takes; importing this module is what makes the harness
know the model. Log-likelihoods are those of its `hf` model, computed with shared contexts run
once, options of one token read from one position, and no padding between unequal lengths.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.files import Journal, json_digest
from trimtab.model import OPTIONS, LanguageModel, answer_of, batches_by_length, load
from trimtab.reading import Next, Reading, next_tokens
from trimtab.steering import Steering, Steerings, together
from trimtab.terminal import progress


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
        self._answers: dict[str, Any] = {}  # by what was asked
        self._journal: Journal | None = None
        if answers is not None:
            self._journal = Journal(Path(answers), "answers")
            for line in self._journal.read() or ():
                self._answers |= line
        self._who = [
            self.language_model.identity.digest,
            str(self.language_model.dtype),
            [[one.digest, one.setting] for one in together(self.steering)],
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

        form = self.language_model.chat_form

        def render(messages: list[dict[str, str]]) -> str:
            conversation = tuple((one["role"], one["content"]) for one in messages)
            rendered: str = self.tokenizer.apply_chat_template(
                form.messages(conversation),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **form.options,
            )
            return rendered

        try:
            return render(chat_history)
        except TemplateError:  # as the harness's `hf` does: some templates have no system message
            rest = [one for one in chat_history if one["role"] != "system"]
        try:
            return render(rest)
        except TemplateError as error:
            raise TrimtabError(
                f"the chat template of {self.language_model.name} refuses the harness's messages "
                f"with the roles {', '.join(one['role'] for one in rest)}: "
                f"{' '.join(str(error).split())}"
            ) from error

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        if add_special_tokens is None:
            return list(self.language_model.encode([string])[0])
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
        owners_of = list(texts.values())
        keys = [
            _key("likelihood", self._who, one.tokens, one.positions, one.targets) for one in merged
        ]
        waiting = {i for i, key in enumerate(keys) if key not in self._answers}
        with progress("scoring", len(merged)) as advance:
            advance(len(merged) - len(waiting))
            for batch, found in next_tokens(
                self.language_model,
                merged,
                self.steering,
                missing=waiting.__contains__,
                force=self.force,
            ):
                self._keep(
                    {
                        keys[i]: _sums(merged[i], each, len(owners_of[i]))
                        for i, each in zip(batch.rows, found, strict=True)
                    }
                )
                advance(len(waiting.intersection(batch.rows)))
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

    def _keep(self, answers: dict[str, Any]) -> None:
        self._answers |= answers
        if self._journal is not None:
            self._journal.append([answers])

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
            keys.append(_key("text", self._who, context, asked.about, seed, seen[context]))
            seen[context] += bool(asked.sampling)
        wanted = dict(zip(keys, contexts, strict=True))
        order = sorted(wanted)  # of texts as long as each other, whatever the order of requests
        lengths = [len(tokens) for tokens in self.language_model.encode([wanted[k] for k in order])]
        for number, indices in enumerate(batches_by_length(lengths, rows=self.batch_size)):
            batch = [order[i] for i in indices]
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
                seed=(seed + number * self.batch_size) % (1 << 32) if asked.sampling else None,
                **asked.sampling,
                **asked.options,
            )
            self._keep(
                {
                    key: asked.cut(answer_of(self.language_model, each).text)
                    for key, each in zip(batch, written, strict=True)
                }
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


#: What a task may ask of its texts beside the options of `generate`.
_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
#: Options of `generate` that do not go with stop strings, which every task has.
_BEAMS = {"num_beams", "length_penalty", "early_stopping"}


class _Asked:
    """How a task of the harness wants its texts."""

    def __init__(self, options: dict[str, Any], longest: int) -> None:
        self.about = options
        normal: dict[str, Any] = dict(normalize_gen_kwargs(options, longest))
        #: What changes how tokens are chosen, by transformers' names.
        self.options = {
            key: value
            for key, value in normal.items()
            if key not in _OPTIONS and (key not in OPTIONS or value not in (None, OPTIONS[key]))
        }
        unknown = [key for key in self.options if key not in OPTIONS or key in _BEAMS]
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


def _key(*asked: Any) -> str:
    """By which an answer is found again."""
    return json_digest(asked, ensure_ascii=False)


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
