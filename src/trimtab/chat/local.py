"""Answers of a model in memory: what was read of the conversation is kept for the next turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from trimtab.chat.answers import Answer, Asked, Cost, OnBoth, OnText, Put, Receipt
from trimtab.dials import divergence, within
from trimtab.errors import TrimtabError
from trimtab.files import exists, user_path
from trimtab.model import Completion, Kept, LanguageModel, acted, extended
from trimtab.reading import run_upper
from trimtab.steering import Steering


class Local:
    """A model with a chat template. `options` are `generate`'s: how tokens are chosen, and
    `max_new_tokens`, which the room that a long conversation leaves may lower."""

    def __init__(
        self, language_model: LanguageModel, options: Mapping[str, Any], *, force: bool = False
    ) -> None:
        if not language_model.chats:
            raise TrimtabError(
                f"{language_model.name} has no chat template, so it cannot chat: trimtab generate "
                "goes on with text"
            )
        self._lm, self._force = language_model, force
        self._options = {"max_new_tokens": 512, "seed": None, **options}
        self._kept = Kept()

    @property
    def name(self) -> str:
        return self._lm.name

    def known(self) -> list[str]:
        return []

    # -- steerings --------------------------------------------------------------------------------

    def put(self, argument: str) -> Put:
        return self.put_on(argument, Steering.read(argument))

    def put_on(self, argument: str, steering: Steering) -> Put:
        """A steering that was read from FILE or FILE@DIAL."""
        lm = self._lm
        steering.check_fits(lm.anatomy, lm.identity, self._force, lm.quantised)
        path = user_path(argument)
        if not exists(path):
            path = user_path(argument.rpartition("@")[0])
        return Put(path.stem, str(path), own=steering, steering=steering)

    def _settled(self, asked: Asked, prompt: Sequence[int]) -> tuple[Steering, ...]:
        """What acts, at the dials that budgets allow for a prompt (token ids)."""
        found = []
        for put in asked.acting:
            assert put.steering is not None
            steering = put.steering
            if put.kl is not None:
                (dial,) = within(steering, kl=put.kl).dials(self._lm, [prompt], self._force)
                steering = replace(steering, value=dial)
            found.append(steering)
        return tuple(found)

    # -- answers ----------------------------------------------------------------------------------

    def answer(self, asked: Asked, on_text: OnText) -> Answer:
        (found,) = self._written(asked, lambda _, piece: on_text(piece), (True,))
        return found

    def both(self, asked: Asked, on_both: OnBoth) -> tuple[Answer, Answer]:
        unsteered, steered = self._written(asked, on_both, (False, True))
        return unsteered, steered

    def _written(self, asked: Asked, on_text: OnBoth, steered: Sequence[bool]) -> list[Answer]:
        """Answers that are written at once, with or without what steers. One by itself goes on
        with what was read before."""
        lm, prompt, options = self._begin(asked)
        acting = self._settled(asked, prompt)
        rows = [acting if steers else () for steers in steered]
        kept = self._kept if len(rows) == 1 else None
        watch = _Watch(len(rows), on_text)
        done: list[Completion] | None = None
        with suppress(KeyboardInterrupt):
            done = lm.generate(
                [asked.messages] * len(rows),
                chat=True,
                steering=[list(row) for row in rows],
                on_text=watch.heard,
                kept=kept,
                force=self._force,
                **options,
            )
        answers = []
        for i, row in enumerate(rows):
            text = watch.texts[i] if done is None else done[i].text
            new = tuple(self._ids(text)) if done is None else done[i].tokens
            told = acted(lm.marks, row, () if done is None else done[i].gates, prompt, new)
            names = [put.name for put in asked.acting]
            receipt = Receipt(
                tuple({"name": name, **one} for name, one in zip(names, told, strict=False)),
                len(prompt),
                0 if kept is None else kept.reused,
                len(new),
                time.monotonic() - watch.began,
                watch.first[i],
                done is None,
            )
            answers.append(Answer(text, receipt, new, row))
        return answers

    def _begin(self, asked: Asked) -> tuple[LanguageModel, Sequence[int], dict[str, Any]]:
        """The model as it puts this conversation, the prompt's token ids, and the options of
        `generate` for it."""
        lm = self._lm
        if asked.system != lm.chat_form.system:
            lm = self._lm = lm.with_chat(lm.chat_form.options, asked.system)
        (prompt,) = lm.encode(lm.prompts([asked.messages], True))
        room = lm.max_length - len(prompt)
        if room < 1:
            raise TrimtabError(
                f"the conversation has {len(prompt)} tokens, and {lm.name} takes {lm.max_length}: "
                "/undo takes the last turn back, /new begins again"
            )
        options = dict(self._options)
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        if options["seed"] is not None:
            options["seed"] += asked.number
        return lm, prompt, options

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text that was left, as far as they are known from it."""
        ids: list[int] = self._lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    # -- what it cost -----------------------------------------------------------------------------

    @torch.inference_mode()
    def cost(self, asked: Asked, answer: Answer) -> Cost:
        if not answer.acting:
            raise TrimtabError("the last answer was not steered: it cost nothing")
        if not answer.tokens:
            raise TrimtabError("the last answer has no token")
        lm, prompt, _ = self._begin(asked)
        base, steered = (self._log_p(lm, prompt, answer.tokens, row) for row in ((), answer.acting))
        kl = divergence(base, steered).clamp(min=0.0)
        said = torch.tensor(answer.tokens, device=base.device)[:, None]
        gain = (steered.gather(-1, said) - base.gather(-1, said)).mean()
        return Cost(float(kl.mean()), float(kl.max()), float(gain), len(answer.tokens))

    def _log_p(
        self,
        lm: LanguageModel,
        prompt: Sequence[int],
        new: Sequence[int],
        steerings: tuple[Steering, ...],
    ) -> torch.Tensor:
        """Log-probabilities of what comes at each of the new tokens, [tokens, vocabulary]."""
        rows, _ = lm.settled([steerings], [prompt], self._force)
        with lm.held(rows, self._force) as sequences:
            sequences.given_ends, sequences.in_part = [len(prompt)], True
            text = extended(prompt, new)
            hidden = run_upper(lm, [text], (), 0)[0, len(prompt) - 1 : len(text) - 1]
        return lm.unembed(hidden).log_softmax(-1)


class _Watch:
    """Hears answers while they are written: when each began, and what it says so far."""

    def __init__(self, answers: int, on_text: Callable[[int, str], object]) -> None:
        self.began = time.monotonic()
        self.texts, self.first = [""] * answers, list[float | None]([None] * answers)
        self._on_text = on_text

    def heard(self, place: int, piece: str) -> None:
        if self.first[place] is None:
            self.first[place] = time.monotonic() - self.began
        self.texts[place] += piece
        self._on_text(place, piece)
