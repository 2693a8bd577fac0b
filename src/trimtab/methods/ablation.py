"""Directional ablation: take one direction out of everything that is written to the stream.

"Refusal in Language Models Is Mediated by a Single Direction" (Arditi et al., NeurIPS 2024).

    r = unit(mean(h^pos) - mean(h^neg))  at a block's input and one token;     x <- x - r r'x

at the embedding and at every attention's and FFN's output (`where="writers"`), so that nothing in
the model can say anything along r. Where a norm stands between a branch and the stream (Gemma,
OLMo 2), after that norm. The dial is the share that is taken out: 1 all of it, -1 doubles it.

Without `layer` the direction is chosen on validation rows among all blocks below `depth` and
all `tokens`: the one that lowers the behaviour's score most when ablated, among those that

    change other text little: KL(unsteered || ablated) of the next token at most `kl`;
    cause the behaviour when they are added: the score with r's unscaled difference added at its
    block is at least 0 (paired: no lower than without).

The score of texts labelled positive (they show the behaviour) or negative (they do not) is
log P - log(1 - P) of the next token being one of `targets`, the tokens that the behaviour begins
with: ablation is scored on the positives, KL and adding on the negatives. Of a paired contrast it
is the log-odds of positive against negative answers, and KL is measured where the answers begin.

Two simpler variants: `where="layer"` ablates at the one place that r comes from, `where="norms"` at
every norm before attention and FFN, which is what Selective Steering's paper compares with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast, Prompt
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Means,
    Method,
    Number,
    Says,
    Statistics,
    Want,
    new_steering,
    validation_part,
)
from trimtab.methods.norms import read_sites
from trimtab.methods.words import read_at
from trimtab.model import LanguageModel
from trimtab.reading import preference
from trimtab.steering import Ablate, Add, Dial, Intervention, Positions, Scope, Steering
from trimtab.terminal import progress

#: Keeps the score finite where P is 0 or 1.
_EPSILON = 1e-8

FromEnd = Annotated[
    tuple[Annotated[int, Field(lt=0)], ...],
    Says("are counted from the end, -1 the last: {value!r}"),
]
Texts = Annotated[tuple[str, ...], Says("must be several: write ({value!r},)")]
Depth = Annotated[float, Field(gt=0, le=1), Says("must lie between 0 and 1, not {value}")]


@dataclass(frozen=True)
class Ablation(Method):
    """Directional ablation: take one direction out of all that is written to the stream.

        x <- x - amount r r'x,    r = unit(mean(h^pos) - mean(h^neg))  at a block's input

    at the embedding and at the output of every attention and FFN. "Refusal in Language Models Is
    Mediated by a Single Direction" (Arditi et al., NeurIPS 2024).

        >>> steering = tt.Ablation(layer=1).fit(lm, contrast)
        >>> plain = tt.bake(lm, steering)
    """

    layer: int | None = field(
        default=None,
        metadata={"help": "Block whose input gives the direction (default: by validation)."},
    )
    tokens: FromEnd | None = field(
        default=None,
        metadata={
            "help": "Tokens to read it at, from the end, as in -1,-2 (default: all that the chat "
            "template puts after the text, else the last; with layer, the last)."
        },
    )
    where: Literal["writers", "norms", "layer"] = field(
        default="writers", metadata={"help": "Where to ablate: writers, norms, or layer."}
    )
    targets: Texts | None = field(
        default=None,
        metadata={"help": "How the behaviour begins, as in I,Sorry; for unpaired contrasts."},
    )
    kl: Number = field(default=0.1, metadata={"help": "Largest side effect, in nats."})
    depth: Depth = field(default=0.8, metadata={"help": "Choose below this share of the blocks."})
    typical: bool = field(
        default=False,
        metadata={"help": "Use only texts on which the score's sign is the label's (targets)."},
    )
    amount: Number = field(default=1.0, metadata={"help": "Share taken out, the dial's default."})
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "ablation"
    dial = "amount"

    def check(self) -> None:
        if self.layer is not None and len(self.tokens or ()) > 1:
            raise TrimtabError("ablation: with a layer, tokens must name one")
        if self.tokens == () or self.targets == ():
            raise TrimtabError("ablation: tokens and targets must name some, or be left out")

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(max(1, int(0.8 * layers)))), "amount": (0.25, 0.5, 1.0)}

    # -- what it reads ------------------------------------------------------------------------

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        if self.layer is None:
            validation_part(self.name, contrast)
            if not contrast.paired and self.targets is None:
                raise TrimtabError(
                    "ablation: to choose a direction from unpaired texts, say how the behaviour "
                    "begins (targets, --targets I,Sorry), or name the layer (--layer)"
                )
        return list(self._candidates(language_model, contrast).values())

    def _candidates(
        self, language_model: LanguageModel, contrast: Contrast
    ) -> dict[tuple[int, int], Want]:
        """What gives the direction of each (block, token)."""
        anatomy = language_model.anatomy
        if self.layer is None:
            tokens = self.tokens or _after_text(language_model, contrast.train)
            layers = range(max(1, int(self.depth * anatomy.layers)))
        else:
            tokens = self.tokens or (-1,)
            anatomy.sites("resid", (self.layer,))  # refuses a layer out of range
            layers = range(self.layer % anatomy.layers, self.layer % anatomy.layers + 1)
        rows = None
        if self.typical:
            kept = self._typical(language_model, contrast.train)
            rows = frozenset(kept.nonzero().flatten().tolist())
        return {
            (layer, token): Want(anatomy.block_input(layer), token, Means, rows=rows)
            for layer in layers
            for token in tokens
        }

    def _typical(self, language_model: LanguageModel, contrast: Contrast) -> Tensor:
        """Which texts the model itself treats as labelled, [texts]."""
        if contrast.paired or self.targets is None:
            raise TrimtabError("ablation: typical needs an unpaired contrast, and targets")
        score = _scores(language_model, [row.text for row in contrast.texts], self.targets)
        positive = torch.tensor([row.label == "positive" for row in contrast.texts])
        kept = positive == (score > 0)
        if not (kept & positive).any() or not (kept & ~positive).any():
            raise TrimtabError(
                f"ablation: in {contrast.name} the model treats no text of one side as labelled: "
                "leave typical out, or name other targets"
            )
        return kept

    # -- what it makes ------------------------------------------------------------------------

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        candidates = self._candidates(language_model, contrast)
        differences = {place: statistics[want].difference for place, want in candidates.items()}
        findings: dict[str, Any] = {}
        if self.layer is not None:
            place = next(iter(candidates))
        else:
            place, findings = self._select(language_model, contrast, differences)
        layer, token = place
        if not differences[place].any():
            raise TrimtabError(f"ablation: the two sides do not differ at block {layer}'s input")
        findings |= {"source_site": candidates[place].site, "token": token}
        interventions = self._interventions(language_model.anatomy, layer, differences[place])
        dial = Dial("amount", self.amount, (-1.0, 1.0))
        return new_steering(self, language_model, contrast, interventions, dial, findings=findings)

    def _interventions(
        self, anatomy: Anatomy, layer: int, difference: Tensor
    ) -> list[Intervention]:
        ablate = Ablate((difference / difference.norm()).float())
        if self.where == "writers":
            sites = anatomy.stream_writers
        elif self.where == "layer":
            sites = [anatomy.block_input(layer)]
        else:
            sites = read_sites(anatomy)
        return [Intervention(site, ablate, Scope.of(self.positions)) for site in sites]

    def _select(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        differences: dict[tuple[int, int], Tensor],
    ) -> tuple[tuple[int, int], dict[str, Any]]:
        """The (block, token) whose direction lowers the score most, and what was measured."""
        anatomy = language_model.anatomy
        validation = validation_part(self.name, contrast)
        if self.typical:
            kept = self._typical(language_model, validation).tolist()
            rows = tuple(row for row, keep in zip(validation.rows, kept, strict=True) if keep)
            validation = replace(validation, rows=rows)
        scored = _Scored(language_model, validation, self.targets)
        dial = Dial("amount", 1.0, (-1.0, 1.0))
        trials: list[dict[str, Any]] = []
        costly = idle = 0
        with progress("choosing a direction", len(differences)) as advance:
            for (layer, token), difference in differences.items():
                advance(1)
                if not difference.any():
                    idle += 1
                    continue
                ablated = new_steering(
                    self,
                    language_model,
                    contrast,
                    self._interventions(anatomy, layer, difference),
                    dial,
                )
                kl = scored.kl(ablated)
                if not kl <= self.kl:  # NaN is too much, too
                    costly += 1
                    continue  # it would not be chosen, whatever its score
                site = anatomy.block_input(layer)
                added = [Intervention(site, Add(difference.float()), Scope.of(self.positions))]
                induced = scored.induced(new_steering(self, language_model, contrast, added, dial))
                if not induced >= 0:
                    idle += 1
                    continue
                trial = {"layer": layer, "token": token, "score": scored.score(ablated)}
                trials.append({**trial, "kl": kl, "induced": induced})
        if not trials:
            raise TrimtabError(
                f"ablation: none of {len(differences)} directions will do: {costly} change other "
                f"text by more than kl = {self.kl:g}, {idle} do not cause the behaviour when "
                "added: raise kl, or name the layer"
            )
        best = min(trials, key=lambda trial: trial["score"])
        findings = {
            "unsteered_score": scored.unsteered,
            "chosen": best,
            "passed": len(trials),
            "candidates": len(differences),
        }
        return (best["layer"], best["token"]), findings

    # -- in words -----------------------------------------------------------------------------

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        found, dial = steering.findings, steering.dial.name
        count = sum(isinstance(each.operator, Ablate) for each in steering.interventions)
        where = {
            "writers": f"everything that is written to the residual stream ({count} sites)",
            "norms": f"what attention and FFN read ({count} sites)",
            "layer": "the residual stream at one place",
        }[str(steering.hyperparameters.get("where", "writers"))]
        lines = [
            f"Directional ablation takes one direction out of {where}: at {dial} 1 nothing is left "
            "along it, at -1 what is there is doubled.",
            "The direction leads from the negative texts' mean to the positive ones', read at "
            f"{found['source_site']}, {read_at(found['token'])}: what sets the positive texts "
            "apart is what the model loses.",
        ]
        chosen = found.get("chosen")
        if chosen:
            lines.append(
                f"It was chosen among {found['candidates']} on validation rows: ablating it takes "
                f"the behaviour's score (log-odds) from {found['unsteered_score']:.2f} to "
                f"{chosen['score']:.2f}, and changes other text by {chosen['kl']:.3f} nats (KL)."
            )
        return lines


class _Scored:
    """What is measured of a direction on validation rows."""

    def __init__(
        self, language_model: LanguageModel, validation: Contrast, targets: tuple[str, ...] | None
    ) -> None:
        self.language_model, self.validation, self.targets = language_model, validation, targets
        self.shown: list[Prompt]
        self.other: list[Prompt]
        if validation.paired:
            self.shown = self.other = [pair.prompt for pair in validation.pairs]
        else:
            self.shown = [row.text for row in validation.texts if row.label == "positive"]
            self.other = [row.text for row in validation.texts if row.label == "negative"]
        self.base = _log_p(language_model, self.other)
        self.unsteered = self.score(None)

    def score(self, steering: Steering | None) -> float:
        """The behaviour's score where it is shown."""
        if self.validation.paired:
            return preference(self.language_model, self.validation, steering)
        assert self.targets is not None  # wants() asks for them
        return float(_scores(self.language_model, self.shown, self.targets, steering).mean())

    def induced(self, steering: Steering) -> float:
        """Its score where it is not shown; of pairs, how much it rises."""
        if self.validation.paired:
            return self.score(steering) - self.unsteered
        assert self.targets is not None
        return float(_scores(self.language_model, self.other, self.targets, steering).mean())

    def kl(self, steering: Steering) -> float:
        """Mean KL(unsteered || steered) of the next token where the behaviour is not shown."""
        steered = _log_p(self.language_model, self.other, steering)
        return float((self.base.exp() * (self.base - steered)).sum(-1).mean())


def _log_p(
    language_model: LanguageModel, prompts: Sequence[Prompt], steering: Any = None
) -> Tensor:
    """Log-probabilities of the token after each prompt, [prompts, vocabulary]."""
    logits: Tensor = language_model.logits(prompts, steering=steering)
    return logits.log_softmax(-1)


def _scores(
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    targets: Sequence[str],
    steering: Any = None,
) -> Tensor:
    """log P - log(1 - P) of the next token being the first one of a target, [prompts]."""
    ids = _first_tokens(language_model, targets)
    logits = language_model.logits(prompts, steering=steering)
    # Row by row in float64: rounded to float32, the sum of P may exceed 1.
    p = torch.stack([row.double().softmax(-1)[ids].sum() for row in logits]).clamp(max=1)
    return torch.log(p + _EPSILON) - torch.log(1 - p + _EPSILON)


def _first_tokens(language_model: LanguageModel, targets: Sequence[str]) -> list[int]:
    """The token that each target begins with, each once."""
    encoded = [language_model.tokenizer.encode(t, add_special_tokens=False) for t in targets]
    if not all(encoded):
        raise TrimtabError("ablation: a target is empty: name how the behaviour begins")
    return sorted({tokens[0] for tokens in encoded})


def _after_text(language_model: LanguageModel, contrast: Contrast) -> tuple[int, ...]:
    """The tokens, from the end, that a chat template puts after what the user says; else the last.

    Found by rendering two messages: their last tokens are the same as far as the template goes.
    """
    row = contrast.rows[0]
    if contrast.paired or isinstance(getattr(row, "text", ""), str):
        return (-1,)
    one, two = language_model.encode([(("user", "one"),), (("user", "two"),)])
    same = 0
    for first, second in zip(reversed(one), reversed(two), strict=False):
        if first != second:
            break
        same += 1
    return tuple(range(-1, -same - 1, -1)) or (-1,)
