"""The training itself: steps of AdamW on the operators' parameters, judged on held-out rows.

    for each step:  rows of the batch -> runs -> operators at sites -> log-probabilities -> loss
                    gradients, clipped -> AdamW -> (now and then) the gain on held-out rows

The model computes in its own type, as it does when it is steered; operators, log-probabilities,
loss and parameters are float32. A batch that is too large for one pass is run in parts, whose
gradients add up to those of the whole.

The gain is what the operators add to log p(positive) - log p(negative) of a held-out pair, in nats;
of rows without a negative text, to the log-probability of the positive one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import get_scheduler

from trimtab.anatomy import is_hooked
from trimtab.contrasts import spread
from trimtab.errors import TrimtabError
from trimtab.files import json_digest
from trimtab.fitting import differentiates, digest_of
from trimtab.model import LanguageModel, batches_by_length, with_images
from trimtab.terminal import progress
from trimtab.training.checkpoints import VERSION, Checkpoint, flat, under
from trimtab.training.objective import Objective, Run
from trimtab.training.passes import Passes
from trimtab.training.settings import Training
from trimtab.training.texts import Texts

#: Seconds between two writes of a checkpoint.
_KEPT_EVERY = 20.0
#: Held-out rows that are read at most.
_JUDGED = 64


@dataclass(frozen=True)
class Trained:
    """What was learnt, float32 on the CPU, and what is told of how: JSON."""

    parameters: dict[str, Tensor]
    findings: dict[str, Any]


@dataclass
class _Standing:
    """Where a training stands, as far as it is no tensor."""

    step: int = 0
    seconds: float = 0.0
    ended: str = ""  # "", or by what: "steps" or "patience"
    figures: list[dict[str, float]] = field(default_factory=list)  # of each step
    gains: list[tuple[int, float]] = field(default_factory=list)  # of each check
    best: int = 0  # the step with the largest gain


def train(
    language_model: LanguageModel,
    objective: Objective,
    texts: Texts,
    settings: Training,
    *,
    own: Any = None,
    cache: Path | None = None,
) -> Trained:
    """Learn the objective's parameters on texts.

    With a `cache` directory the training goes on there after an interruption, to the same bits, and
    one that is finished is read; `own` is what says, as JSON, which objective it is.
    """
    with torch.inference_mode(False):
        return _Trainer(language_model, objective, texts, settings, own, cache).run()


class _Trainer:
    def __init__(
        self,
        language_model: LanguageModel,
        objective: Objective,
        texts: Texts,
        settings: Training,
        own: Any,
        cache: Path | None,
    ) -> None:
        lm = language_model
        _check_differentiable(lm, objective)
        self._lm, self._objective, self._texts, self._settings = lm, objective, texts, settings
        self._passes = Passes(lm, objective, texts.texts)
        device = lm.device
        begun = objective.start(_generator(settings.seed, "start"))
        self._parameters = {
            name: tensor.to(device, torch.float32, copy=True).requires_grad_(True)
            for name, tensor in begun.items()
        }
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self._rate = _rates(self._optimizer, settings)
        # What float16 would round to nothing on the way back is made larger.
        self._scaler = torch.amp.GradScaler(device.type, enabled=lm.dtype == torch.float16)
        self._standing = _Standing()
        self._best = self._copied()
        self._held_out = spread(texts.held_out, _JUDGED)
        self._checkpoint = None
        if cache is not None:
            if is_hooked(lm.model):
                raise TrimtabError(
                    f"{lm.name} is steered, and a cache keeps what is learnt of it unsteered: "
                    "leave the cache out, or fit after the block"
                )
            self._checkpoint = Checkpoint(cache, self._key(own))

    def run(self) -> Trained:
        self._resume()
        begun = time.monotonic() - self._standing.seconds
        written = time.monotonic()
        settings, standing = self._settings, self._standing
        with progress("training", settings.steps) as advance:
            advance(standing.step, self._said())
            while not standing.ended and not self._late():
                self._step()
                standing.seconds = time.monotonic() - begun
                last = standing.step == settings.steps
                if last or standing.step % settings.check_every == 0:
                    self._judge()
                if last and not standing.ended:
                    standing.ended = "steps"
                now = time.monotonic()
                if self._checkpoint and now - written >= _KEPT_EVERY:
                    self._write()
                    written = now
                advance(1, self._said())
            if not standing.ended and self._held_out:
                self._judge()  # the time is up
        if self._checkpoint:
            self._write()
        parameters = self._best if standing.gains else self._copied()
        return Trained({n: t.cpu() for n, t in parameters.items()}, self._findings())

    # -- one step ---------------------------------------------------------------------------------

    def _step(self) -> None:
        settings, standing = self._settings, self._standing
        rows = self._rows_of(standing.step)
        drawn = self._objective.draw(rows, _generator(settings.seed, "draw", standing.step))
        share = standing.step / settings.steps
        totals: dict[str, float] = {}
        self._optimizer.zero_grad()
        for part in self._parts(drawn):
            runs = [run for row in part for run in row]
            with self._passes.learning(runs):
                outcome = self._passes.run(
                    self._parameters, runs, len(part), share, self._objective.refers
                )
                figures = self._objective.loss(self._parameters, outcome)
                loss = figures["loss"].sum() / len(rows)
                if loss.requires_grad:  # none where every run stands at dial 0
                    self._scaler.scale(loss).backward()
            for name, figure in figures.items():
                totals[name] = totals.get(name, 0.0) + float(figure.detach().sum()) / len(rows)
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.clip)
        if not math.isfinite(totals["loss"]):
            raise TrimtabError(
                f"training diverged at step {standing.step + 1}: the loss is not finite; take a "
                "smaller learning rate"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._rate(standing.step)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            self._objective.tidy(self._parameters)
        standing.step += 1
        standing.figures.append(totals)

    def _rows_of(self, step: int) -> list[tuple[int, ...]]:
        """The rows of a step: all are dealt out in an order of the epoch's own."""
        rows, batch = self._texts.rows, self._settings.batch
        epoch, place = divmod(step, math.ceil(len(rows) / batch))
        generator = _generator(self._settings.seed, "order", epoch)
        order = torch.randperm(len(rows), generator=generator).tolist()
        return [rows[i] for i in order[place * batch : (place + 1) * batch]]

    def _parts(self, drawn: Sequence[Sequence[Run]]) -> Iterator[list[Sequence[Run]]]:
        """The rows of a batch that run together, of similar length."""
        texts = self._texts.texts
        lengths = [max(len(texts[run.text]) for run in row) * len(row) for row in drawn]
        apart = with_images([texts[row[0].text].tokens for row in drawn])
        for rows in batches_by_length(lengths, self._lm.batch_tokens, apart=apart):
            yield [drawn[i] for i in rows]

    # -- how good it is ---------------------------------------------------------------------------

    @torch.no_grad()
    def _judge(self) -> None:
        """Read the held-out rows, where there are some, and note whether it got better."""
        standing, settings = self._standing, self._settings
        if not self._held_out:
            return
        if standing.gains and standing.gains[-1][0] == standing.step:
            return
        gains: list[Tensor] = []
        drawn = [[self._objective.judged(text) for text in row] for row in self._held_out]
        for part in self._parts(drawn):
            runs = [run for row in part for run in row]
            outcome = self._passes.run(self._parameters, runs, len(part), 1.0, referring=True)
            gained = outcome.by_row(outcome.log_p.double() - outcome.reference.double())
            gains.append(gained[:, 0] - (gained[:, 1] if gained.shape[1] > 1 else 0.0))
        gain = float(torch.cat([each.cpu() for each in gains]).mean())
        known = [each for _, each in standing.gains]
        standing.gains.append((standing.step, gain))
        if not known or gain > max(known):
            standing.best, self._best = standing.step, self._copied()
        since = sum(step > standing.best for step, _ in standing.gains)
        if settings.patience and since >= settings.patience:
            standing.ended = "patience"

    def _late(self) -> bool:
        minutes = self._settings.minutes
        return minutes is not None and self._standing.seconds >= 60 * minutes

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._parameters.items()}

    def _said(self) -> str:
        """For the bar."""
        standing, said = self._standing, "training"
        if standing.figures:
            said += f", loss {standing.figures[-1]['loss']:.3f}"
        if standing.gains:
            said += f", validation gain {standing.gains[-1][1]:+.2f}"
        return said

    def _findings(self) -> dict[str, Any]:
        """What is told of the training: JSON."""
        standing = self._standing
        figures = standing.figures[0] if standing.figures else ()
        told: dict[str, Any] = {
            "steps": standing.step,
            "seconds": round(standing.seconds, 1),
            "ended": standing.ended or "minutes",
            "rows": len(self._texts.rows),
        }
        for name in figures:
            values = [each[name] for each in standing.figures]
            told[name] = {"first": values[0], "last": values[-1]}
        told["validation_rows"] = len(self._held_out)
        if standing.gains:
            told["validation_gain"] = {str(step): gain for step, gain in standing.gains}
            told["best_step"] = standing.best
        return told

    # -- checkpoints ------------------------------------------------------------------------------

    def _key(self, own: Any) -> str:
        """A digest of all that the parameters depend on; `minutes` only end it."""
        texts, settings = self._texts, asdict(self._settings)
        del settings["minutes"]
        about = {
            "version": VERSION,
            "torch": torch.__version__,
            "device": self._lm.device.type,
            "batch_tokens": self._lm.batch_tokens,
            "model": digest_of(self._lm, ()),
            "texts": [[*text.tokens, text.start] for text in texts.texts],
            "images": [repr(getattr(text.tokens, "digests", "")) for text in texts.texts],
            "rows": [texts.rows, texts.held_out],
            "settings": settings,
            "sites": self._objective.sites,
            "positions": str(self._objective.positions),
            "own": own,
        }
        return json_digest(about, sort_keys=True)

    def _write(self) -> None:
        assert self._checkpoint is not None
        names = list(self._parameters)
        states = self._optimizer.state_dict()["state"]
        state = {
            f"{names[number]}/{key}": torch.as_tensor(value)
            for number, kept in states.items()
            for key, value in kept.items()
        }
        tensors = {
            **flat("parameters", self._copied()),
            **flat("best", self._best),
            **flat("adam", state),
            "reference": self._passes.reference,
        }
        document = {"standing": asdict(self._standing), "scaler": self._scaler.state_dict()}
        self._checkpoint.write(tensors, document)

    def _resume(self) -> None:
        """Go on where a checkpoint stands."""
        found = self._checkpoint.read() if self._checkpoint else None
        if found is None:
            return
        tensors, document = found
        with torch.no_grad():
            for name, tensor in under("parameters", tensors).items():
                self._parameters[name].copy_(tensor)
        self._best = {
            name: tensor.to(self._lm.device) for name, tensor in under("best", tensors).items()
        }
        whole = self._optimizer.state_dict()
        kept = under("adam", tensors)
        whole["state"] = {
            number: under(name, kept)
            for number, name in enumerate(self._parameters)
            if any(key.startswith(f"{name}/") for key in kept)
        }
        self._optimizer.load_state_dict(whole)
        self._passes.reference = tensors["reference"].clone()
        self._scaler.load_state_dict(document["scaler"])
        standing = document["standing"]
        standing["gains"] = [(int(step), gain) for step, gain in standing["gains"]]
        self._standing = _Standing(**standing)


def _check_differentiable(language_model: LanguageModel, objective: Objective) -> None:
    """Refuse models whose backward pass is not what changing activations does."""
    kinds = {site.rpartition(".")[2] for site in objective.sites}
    for kind in sorted(kinds):
        if not differentiates(language_model, kind):
            raise TrimtabError(
                f"nothing can be trained at {kind} of {language_model.name}: its backward pass "
                "does not say what changing activations there does (a kernel without a backward "
                "pass, a detach, or rounded activations): take another site, or load the model "
                "otherwise"
            )


def _rates(optimizer: torch.optim.Optimizer, settings: Training) -> Any:
    """The share of the learning rate at each step, by number."""
    scheduler: Any = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup,
        num_training_steps=settings.horizon or settings.steps,
    )
    return scheduler.lr_lambdas[0]


def _generator(seed: int, *of: Any) -> Generator:
    """Chance of its own for each purpose and step."""
    digest = json_digest([seed, *of])
    return Generator().manual_seed(int(digest[:15], 16))
