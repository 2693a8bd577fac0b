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

The direction in other ways: `project` leaves the negative side's mean alone,

    r <- unit(r - g g'r),    g = unit(mean(h^neg))

where r is read, or also (`biprojected`) at the output of the block that is edited; `directions`
takes the span of several out (by SVD of the differences, or by a map of the positive texts,
`basis="som"`, whose authors take them out one after the other: `compose`); `winsorise` clips each
activation at a quantile of its units' sizes, before the mean; `spare` takes out of the direction
what it has, by a ridge, of the means of groups of other texts (spectral cleaning, "SRA", arXiv
2601.08489), so that what the model does with these changes less; `layer=12.4` lies between the
directions of blocks 12 and 13, `per_layer` takes out at each block its own. How much of the dial
each block gets is 1, or a kernel over depth (see kernels.py), for attention and for FFN by itself;
the embedding then stays as it is. `trimtab sweep ablation --search pareto` finds kernels.

Two simpler variants: `where="layer"` ablates at the one place that r comes from, `where="norms"` at
every norm before attention and FFN, which is what Selective Steering's paper compares with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.anatomy import Anatomy, parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Count,
    Means,
    Method,
    Number,
    Samples,
    Says,
    Statistics,
    Want,
    new_steering,
    validation_part,
)
from trimtab.methods.ablation_choice import Scored, after_text, scores
from trimtab.methods.ablation_directions import (
    Finding,
    Source,
    Winsorised,
    between,
    centroids_of,
    cleaned,
    found_directions,
    operators_of,
    outside,
)
from trimtab.methods.kernels import Kernel, ranges_of_kernels
from trimtab.methods.norms import read_sites
from trimtab.methods.protected import about_texts, last_tokens, protected_texts
from trimtab.methods.words import read_at
from trimtab.model import LanguageModel
from trimtab.steering import Ablate, Add, Dial, Intervention, Positions, Scope, Steering
from trimtab.terminal import progress

FromEnd = Annotated[
    tuple[Annotated[int, Field(lt=0)], ...],
    Says("are counted from the end, -1 the last: {value!r}"),
]
Texts = Annotated[tuple[str, ...], Says("must be several: write ({value!r},)")]
Depth = Annotated[float, Field(gt=0, le=1), Says("must lie between 0 and 1, not {value}")]
Several = Annotated[int, Field(ge=1), Says("must be 1 or more, not {value}")]
Quantile = Annotated[float, Field(gt=0, le=1), Says("must be above 0 and at most 1, not {value}")]
Positive = Annotated[float, Field(gt=0), Says("must be above 0, not {value}")]
Share = Annotated[float, Field(ge=0, le=1), Says("must lie between 0 and 1, not {value}")]
Blocks = Annotated[float, Field(ge=0, lt=1e5), Says("must be a number of blocks, not {value}")]
#: A block, or a number between two, and a token from the end.
Place = tuple[float, int]


@dataclass(frozen=True)
class Ablation(Method):
    """Directional ablation: take one direction out of all that is written to the stream.

        x <- x - amount r r'x,    r = unit(mean(h^pos) - mean(h^neg))  at a block's input

    at the embedding and at the output of every attention and FFN. "Refusal in Language Models Is
    Mediated by a Single Direction" (Arditi et al., NeurIPS 2024).

        >>> steering = tt.Ablation(layer=1).fit(lm, contrast)
        >>> plain = tt.bake(lm, steering)
    """

    layer: int | float | None = field(
        default=None,
        metadata={
            "help": "Block whose input gives the direction; 12.4 lies between two (default: by "
            "validation)."
        },
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
    project: Literal["none", "negative", "biprojected"] = field(
        default="none",
        metadata={
            "help": "negative leaves the negative side's mean alone where the direction is read, "
            "biprojected also at each block that is edited."
        },
    )
    directions: Several = field(
        default=1, metadata={"help": "How many directions; of several their whole span goes."}
    )
    basis: Finding = field(
        default="svd",
        metadata={"help": "Several directions: svd of the differences, or som of the texts."},
    )
    compose: bool = field(
        default=False,
        metadata={"help": "Take several out one after the other, which leaves some of each."},
    )
    winsorise: Quantile = field(
        default=1.0,
        metadata={"help": "Quantile of an activation's units at which all are clipped; 1: none."},
    )
    spare: str | None = field(
        default=None,
        metadata={
            "help": "Texts to change little: a contrast's file (both its sides), builtin:NAME, or "
            "a .txt with a text a line."
        },
    )
    spare_groups: Several = field(
        default=8, metadata={"help": "spare: into how many groups of like texts they fall."}
    )
    spare_ridge: Positive = field(
        default=0.1,
        metadata={"help": "spare: the ridge; the larger, the less is taken out of the direction."},
    )
    per_layer: bool = field(
        default=False, metadata={"help": "Take out at each block the direction of its output."}
    )
    attn_max: Number | None = field(
        default=None, metadata={"help": "Attention's kernel over blocks: its largest weight."}
    )
    attn_position: Number | None = field(default=None, metadata={"help": "The block it is at."})
    attn_min: Share | None = field(
        default=None, metadata={"help": "Which share of it is left at the kernel's ends."}
    )
    attn_distance: Blocks | None = field(
        default=None, metadata={"help": "How many blocks away these are; beyond, nothing is left."}
    )
    ffn_max: Number | None = field(default=None, metadata={"help": "As attn_max, for FFNs."})
    ffn_position: Number | None = field(default=None, metadata={"help": "As attn_position."})
    ffn_min: Share | None = field(default=None, metadata={"help": "As attn_min."})
    ffn_distance: Blocks | None = field(default=None, metadata={"help": "As attn_distance."})
    seed: Count = field(default=0, metadata={"help": "For basis som, and for the groups of spare."})

    name = "ablation"
    dial = "amount"

    def check(self) -> None:
        if isinstance(self.layer, float):
            if not math.isfinite(self.layer):
                raise TrimtabError(f"ablation: layer must be a finite number, not {self.layer}")
            if self.layer.is_integer():
                object.__setattr__(self, "layer", int(self.layer))  # it is frozen
        if self.layer is not None and len(self.tokens or ()) > 1:
            raise TrimtabError("ablation: with a layer, tokens must name one")
        if self.spare is None and (self.spare_groups != 8 or self.spare_ridge != 0.1):
            raise TrimtabError("ablation: spare_groups and spare_ridge are for texts to spare")
        if self.tokens == () or self.targets == ():
            raise TrimtabError("ablation: tokens and targets must name some, or be left out")
        if self.per_layer and (self.layer is not None or len(self.tokens or ()) > 1):
            raise TrimtabError("ablation: per_layer takes no layer, and one token")
        if self.directions == 1 and (self.compose or self.basis != "svd"):
            raise TrimtabError("ablation: compose and basis are for several directions")
        if self.directions > 1 and isinstance(self.layer, float):
            raise TrimtabError("ablation: between two layers lies one direction, not several")
        by_block = self.per_layer or self.project == "biprojected" or bool(self._kernels)
        if self.where != "writers" and by_block:
            raise TrimtabError(
                "ablation: per_layer, kernels and biprojected are for where = writers"
            )

    @property
    def _kernels(self) -> dict[str, Kernel]:
        """The kernels of attention and of FFN, of those that have one."""
        found = {}
        for part in ("attn", "ffn"):
            given = {item.name: getattr(self, f"{part}_{item.name}") for item in fields(Kernel)}
            missing = [f"{part}_{name}" for name, value in given.items() if value is None]
            if missing and len(missing) < len(given):
                raise TrimtabError(f"ablation: a kernel needs {missing[0]} too")
            if not missing:
                found[part] = Kernel(**given)
        return found

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(max(1, int(0.8 * layers)))), "amount": (0.25, 0.5, 1.0)}

    @classmethod
    def ranges(cls, layers: int) -> dict[str, tuple[float, float]]:
        last = float(max(layers - 1, 1))
        return {"layer": (0.4 * last, 0.9 * last), **ranges_of_kernels(layers)}

    # -- what it reads ------------------------------------------------------------------------

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        if self._chooses:
            validation_part(self.name, contrast)
            if not contrast.paired and self.targets is None:
                raise TrimtabError(
                    "ablation: to choose a direction from unpaired texts, say how the behaviour "
                    "begins (targets, --targets I,Sorry), or name the layer (--layer)"
                )
        candidates = self._candidates(language_model, contrast)
        sources = [source for some in candidates.values() for source in some]
        wanted = [source.want(Means) for source in sources]
        if self.directions > 1:
            wanted += [source.want(Samples) for source in sources]
        if self.project == "biprojected":
            edited = ("embed", *language_model.anatomy.sites("resid"))
            wanted += [each._replace(site=site).want(Means) for each in sources for site in edited]
        return list(dict.fromkeys(wanted))

    @property
    def _chooses(self) -> bool:
        """Whether the direction is chosen on validation rows."""
        return self.layer is None and not self.per_layer

    def _candidates(
        self, language_model: LanguageModel, contrast: Contrast
    ) -> dict[Place, tuple[Source, ...]]:
        """Where the direction of each (block, token) is read: at one site, or at the two that it
        lies between."""
        tokens = self.tokens or (-1,)
        if self._chooses and self.tokens is None:
            tokens = after_text(language_model, contrast.train)
        read = None if self.winsorise == 1 else Winsorised(self.winsorise)
        rows = None
        if self.typical:
            kept = self._typical(language_model, contrast.train)
            rows = frozenset(kept.nonzero().flatten().tolist())
        return {
            (layer, token): tuple(Source(site, token, read, rows) for site in sites)
            for layer, sites in self._layers(language_model.anatomy).items()
            for token in tokens
        }

    def _layers(self, anatomy: Anatomy) -> dict[float, tuple[str, ...]]:
        """The blocks whose direction is taken or may be, and where it is read."""
        if self.per_layer:
            return {layer: (f"layers.{layer}.resid",) for layer in range(anatomy.layers)}
        if self.layer is None:
            some = range(max(1, int(self.depth * anatomy.layers)))
            return {layer: (anatomy.block_input(layer),) for layer in some}
        last = anatomy.layers - 1
        if isinstance(self.layer, int):
            anatomy.sites("resid", (self.layer,))  # refuses a layer out of range
            layer = self.layer % anatomy.layers
            return {layer: (anatomy.block_input(layer),)}
        if not 0 <= self.layer <= last:
            raise TrimtabError(
                f"layer {self.layer:g} is out of range: this model has layers 0 to {last}"
            )
        below = int(self.layer)
        return {self.layer: (anatomy.block_input(below), anatomy.block_input(below + 1))}

    def _typical(self, language_model: LanguageModel, contrast: Contrast) -> Tensor:
        """Which texts the model itself treats as labelled, [texts]."""
        if contrast.paired or self.targets is None:
            raise TrimtabError("ablation: typical needs an unpaired contrast, and targets")
        score = scores(language_model, [row.text for row in contrast.texts], self.targets)
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
        findings: dict[str, Any] = {}
        candidates = self._candidates(language_model, contrast)
        place = next(iter(candidates))
        if self._chooses:
            place, findings = self._select(language_model, contrast, statistics, candidates)
        layer, token = place
        where = " and ".join(source.site for source in candidates[place])
        if self.per_layer:
            where = "each block's output"
        elif not any(_difference(statistics, each).any() for each in candidates[place]):
            raise TrimtabError(f"ablation: the two sides do not differ at block {layer}'s input")
        findings |= {"source_site": where, "token": token}
        findings |= self._spared(language_model, statistics, candidates)[1]
        interventions = self._interventions(language_model, statistics, candidates, place)
        dial = Dial("amount", self.amount, (-1.0, 1.0))
        return new_steering(self, language_model, contrast, interventions, dial, findings=findings)

    def _interventions(
        self,
        language_model: LanguageModel,
        statistics: Statistics,
        candidates: Mapping[Place, tuple[Source, ...]],
        place: Place,
    ) -> list[Intervention]:
        """The directions of a place, or each block's own, at all sites that are edited."""
        anatomy = language_model.anatomy
        scope, found = Scope.of(self.positions), []
        spared = self._spared(language_model, statistics, candidates)[0]
        made: dict[str | None, list[Ablate]] = {}
        for site in self._sites(anatomy, int(place[0])):
            block, weight = parse_site(site)[0], self._weight(site)
            if not weight:
                continue  # and so it has no hook
            stream = "embed" if block is None else f"layers.{block}.resid"
            edited = stream if self.per_layer or self.project == "biprojected" else None
            if edited not in made:
                own = (float(block or 0), place[1]) if self.per_layer else place
                directions = self._directions(statistics, candidates[own], edited, spared)
                made[edited] = operators_of(directions, self.compose)
            found += [Intervention(site, each, scope, weight) for each in made[edited]]
        if not found:
            raise TrimtabError("ablation: by these kernels every block's weight is 0")
        return found

    def _sites(self, anatomy: Anatomy, layer: int) -> list[str]:
        """The sites that are edited."""
        if self.where == "writers":
            return anatomy.stream_writers
        return [anatomy.block_input(layer)] if self.where == "layer" else read_sites(anatomy)

    def _weight(self, site: str) -> float:
        """How much of the dial a site gets; the embedding, of no block, has no kernel and no
        direction of its own."""
        block, kind = parse_site(site)
        if block is None:
            return 0.0 if self._kernels or self.per_layer else 1.0
        kernel = self._kernels.get(kind.partition("_")[0])
        return 1.0 if kernel is None else kernel.weight(block)

    def _spared(
        self,
        language_model: LanguageModel,
        statistics: Statistics,
        candidates: Mapping[Place, tuple[Source, ...]],
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """By site the means of the groups of texts to spare, and what these were; nothing where
        there are none."""
        if self.spare is None:
            return {}, {}
        source, count = self.spare, self.spare_groups
        sites = tuple(dict.fromkeys(one.site for some in candidates.values() for one in some))

        def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
            texts = [text for row in protected_texts(source) for text in row]
            reads = Winsorised(self.winsorise)
            found = {
                site: centroids_of(reads(x), count, self.seed)
                for site, x in last_tokens(language_model, texts, sites).items()
            }
            return found, {"spared": about_texts(source, texts)}

        key = ("ablation spare", source, count, self.seed, self.winsorise, sites)
        return statistics.once(key, read)

    def _directions(
        self,
        statistics: Statistics,
        sources: Sequence[Source],
        edited: str | None,
        spared: Mapping[str, Tensor],
    ) -> Tensor:
        """What is taken out, [k, units] in float64; `edited` is the stream where it is, `spared`
        what is to be changed little."""
        found = []
        for source in sources:
            of = found_directions(statistics, source, self.directions, self.basis, self.seed)
            if source.site in spared:
                of = cleaned(of, spared[source.site], self.spare_ridge)
            if self.project != "none":
                others = [source]
                if self.project == "biprojected":
                    others.append(source._replace(site=edited or source.site))
                of = outside(of, [statistics[each.want(Means)].negative for each in others])
            found.append(of)
        if len(found) == 1:
            return found[0]
        assert self.layer is not None
        return between(found[0], found[1], self.layer % 1)

    def _select(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        statistics: Statistics,
        candidates: Mapping[Place, tuple[Source, ...]],
    ) -> tuple[Place, dict[str, Any]]:
        """The (block, token) whose direction lowers the score most, and what was measured."""
        validation = validation_part(self.name, contrast)
        if self.typical:
            kept = self._typical(language_model, validation).tolist()
            rows = tuple(row for row, keep in zip(validation.rows, kept, strict=True) if keep)
            validation = replace(validation, rows=rows)
        scored = Scored(language_model, validation, self.targets)
        dial = Dial("amount", 1.0, (-1.0, 1.0))
        trials: list[dict[str, Any]] = []
        costly = idle = 0
        unfound: list[TrimtabError] = []
        with progress("choosing a direction", len(candidates)) as advance:
            for place, (source,) in candidates.items():
                advance(1)
                difference = _difference(statistics, source)
                if not difference.any():
                    idle += 1
                    continue
                try:
                    ablating = self._interventions(language_model, statistics, candidates, place)
                except TrimtabError as error:  # as where there are fewer directions than asked for
                    unfound.append(error)
                    continue
                ablated = new_steering(self, language_model, contrast, ablating, dial)
                kl = scored.kl(ablated)
                if not kl <= self.kl:  # NaN is too much, too
                    costly += 1
                    continue  # it would not be chosen, whatever its score
                scope = Scope.of(self.positions)
                added = [Intervention(source.site, Add(difference.float()), scope)]
                induced = scored.induced(new_steering(self, language_model, contrast, added, dial))
                if not induced >= 0:
                    idle += 1
                    continue
                layer, token = place
                trial = {"layer": layer, "token": token, "score": scored.score(ablated)}
                trials.append({**trial, "kl": kl, "induced": induced})
        if len(unfound) == len(candidates):
            raise unfound[0]
        if not trials:
            raise TrimtabError(
                f"ablation: none of {len(candidates)} directions will do: {costly} change other "
                f"text by more than kl = {self.kl:g}, {idle + len(unfound)} do not cause the "
                "behaviour when added: raise kl, or name the layer"
            )
        best = min(trials, key=lambda trial: trial["score"])
        findings = {
            "unsteered_score": scored.unsteered,
            "chosen": best,
            "passed": len(trials),
            "candidates": len(candidates),
        }
        return (best["layer"], best["token"]), findings

    # -- in words -----------------------------------------------------------------------------

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        found, dial, said = steering.findings, steering.dial.name, steering.hyperparameters
        edited = [i for i in steering.interventions if isinstance(i.operator, Ablate)]
        count = len({each.site for each in edited})
        where = {
            "writers": f"everything that is written to the residual stream ({count} sites)",
            "norms": f"what attention and FFN read ({count} sites)",
            "layer": "the residual stream at one place",
        }[str(said.get("where", "writers"))]
        several = int(said.get("directions", 1))
        left = f"at {dial} 1 nothing is left along it, at -1 what is there is doubled."
        what = "one direction"
        if several > 1:
            what, left = f"{several} directions", left.replace("it", "them", 1)
            if said.get("compose"):
                left = "one after the other, so that some is left of all but the last."
        if said.get("per_layer"):
            what += ", each block's own,"
        weights = [each.weight for each in edited]
        if set(weights) != {1.0}:
            where = f"what blocks write to the residual stream ({count} sites)"
            left = f"at {dial} 1, {min(weights):.2f} to {max(weights):.2f} of it, by block."
        lines = [
            f"Directional ablation takes {what} out of {where}: {left}",
            "The direction leads from the negative texts' mean to the positive ones', read at "
            f"{found['source_site']}, {read_at(found['token'])}: what sets the positive texts "
            "apart is what the model loses.",
        ]
        if said.get("project", "none") != "none":
            lines.append("What lies along the negative texts' mean is left as it is.")
        if "spared" in found:
            lines.append(
                f"As far as a ridge has it, what {said['spare_groups']} groups of other texts "
                f"({found['spared']['source']}) have of it is taken out of the direction first."
            )
        chosen = found.get("chosen")
        if chosen:
            lines.append(
                f"It was chosen among {found['candidates']} on validation rows: ablating it takes "
                f"the behaviour's score (log-odds) from {found['unsteered_score']:.2f} to "
                f"{chosen['score']:.2f}, and changes other text by {chosen['kl']:.3f} nats (KL)."
            )
        return lines


def _difference(statistics: Statistics, source: Source) -> Tensor:
    found: Tensor = statistics[source.want(Means)].difference
    return found
