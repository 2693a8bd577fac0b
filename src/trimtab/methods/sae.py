"""SAE: change how active chosen features of a sparse autoencoder are.

    h <- h + sum over chosen features i of (f'_i - f_i(h)) d_i

with f_i(h) what the autoencoder's encoder makes of h and d_i its decoder's row. That is
h + dec(f') - dec(f): what the autoencoder does not explain of h stays as it is, as in AxBench's
clamp, where putting dec(f') in the place of h would lose it. At strength t, with a_i the feature's
largest activation on the texts (`level="mean"`: its mean over the positive ones),

    add        f'_i = f_i + t a_i         clamp   f'_i = t a_i
    at_least   f'_i = max(f_i, t a_i)     ablate  f'_i = (1 - t) f_i     scale  f'_i = (1 + t) f_i

Features are named (`features`) or chosen (`by`), see feature_scores.py: by how well they tell the
two sides apart (AxBench's SAE-A, Wu et al., 2501.17148), by how they go with the outcomes of
answers (CorrSteer, Cho et al., 2508.12535), or by what scaling them does to the answers. Of several
autoencoders, each of a site of its own, `variant` takes the best features over all of them, those
of each, or of these what raises the preference of validation rows (CorrSteer's S, A and P).

Where this differs from the authors' code on purpose: CorrSteer hooks a block's input with that
block's autoencoder, and steers the last position of each pass (`positions="last"`); here a feature
is steered where its autoencoder reads. It prunes on a task's accuracy, one layer at a time; here on
the validation rows' preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Method,
    Number,
    Says,
    Statistics,
    Want,
    load_labels,
    new_steering,
    validation_part,
)
from trimtab.methods.feature_scores import (
    Asked,
    By,
    Known,
    Pool,
    by_autoencoder,
    choose,
    correlated,
    cutoffs,
    length_correlation,
    packed_quietly,
    warn_of_length,
)
from trimtab.methods.ranking import rank
from trimtab.model import LanguageModel
from trimtab.reading import Features, features_for, preference
from trimtab.steering import Add, Dial, Intervention, Positions, Scope, SetFeatures, Steering

Do = Literal["add", "clamp", "at_least", "ablate", "scale"]
AtLeastOne = Annotated[int, Field(ge=1), Says("must be 1 or more, not {value}")]

#: How far the dial goes, by what is done.
_RANGES: dict[str, tuple[float, float]] = {
    "add": (-5.0, 5.0),
    "clamp": (0.0, 5.0),
    "at_least": (0.0, 5.0),
    "ablate": (0.0, 1.0),
    "scale": (-1.0, 9.0),
}
#: Tokens at which features are read and changed: at a text's first one they may be a hundred times
#: as active as anywhere else, and setting them there moves all that attends to it.
_BUT_FIRST = "all[1:]"
#: Texts on which it is measured how often a cutoff is right.
_CHECKED = 16


@dataclass(frozen=True)
class SAE(Method):
    """SAE: change how active chosen features of a sparse autoencoder are.

        h <- h + sum of (f'_i - f_i(h)) d_i    f' = f + t a, or t a, or at least that, or (1 -+ t) f

    with a_i the largest activation of feature i on the texts and t the strength. Features are
    named, or chosen on the contrast, as AxBench does (arXiv:2501.17148), by the outcomes of
    answers, as CorrSteer does (arXiv:2508.12535), or by what scaling them does.

        >>> steering = tt.SAE(sae="my-sae/", do="clamp").fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(2))
    """

    sae: str = field(
        metadata={
            "help": "Sparse autoencoder: a directory, or RELEASE:ID (SAELens); several, each of a "
            "site of its own, with commas between them, or the option again.",
            "repeats": True,
        }
    )
    features: tuple[int, ...] | int | None = field(
        default=None, metadata={"help": "Features by number, as in 12,345 (default: chosen)."}
    )
    by: By = field(
        default="auroc",
        metadata={
            "help": "Score that chooses: auroc, or difference of the two sides; correlation with "
            "outcomes; effect (what scaling does to the answers)."
        },
    )
    k: AtLeastOne = field(default=1, metadata={"help": "How many features to choose."})
    variant: Literal["single", "all", "pruned"] = field(
        default="single",
        metadata={
            "help": "Of several autoencoders: the best k of all, the best k of each (all), or of "
            "these what gains on validation rows (pruned)."
        },
    )
    do: Do = field(
        default="add",
        metadata={
            "help": "What to do with them: add, clamp to a value, raise to at_least a value, "
            "ablate, or scale."
        },
    )
    strength: Number | None = field(
        default=None,
        metadata={
            "help": "The dial's default, in units of level; of ablate a share, of scale the factor "
            "minus 1 (default: measured; of clamp and ablate 1)."
        },
    )
    level: Literal["largest", "mean"] | None = field(
        default=None,
        metadata={
            "help": "What strength 1 is: a feature's largest activation on the texts, or its mean "
            "over positive texts (default: largest; by correlation mean)."
        },
    )
    a_max: tuple[float, ...] | float | None = field(
        default=None,
        metadata={"help": "Largest activations of the named features, where they are known."},
    )
    pool: Pool = field(
        default="max",
        metadata={"help": "What stands for a text: a feature's max over its tokens, or mean."},
    )
    outcomes: str | None = field(
        default=None,
        metadata={
            "help": "By correlation: a file of answers with prompt, answer and outcome, or the "
            "directory of an evaluation (default: the contrast's sides)."
        },
    )
    negative: bool = field(
        default=False,
        metadata={"help": "Choose features that speak against the positive side, too; add only."},
    )
    labels: str | None = field(
        default=None,
        metadata={
            "help": "A file of what features are about (default: labels.json or "
            "explanations.jsonl beside the autoencoder)."
        },
    )
    positions: Positions | None = field(
        default=None,
        metadata={
            "help": f"{POSITIONS_HELP} (default: all, but of what reads features all[1:], because "
            "those of a text's first token are huge)."
        },
    )

    name = "sae"
    dial = "strength"
    unmeasured = 1.0
    columns = ("a_max",)

    def check(self) -> None:
        if "" in self.sources:
            raise TrimtabError("sae: name an autoencoder (sae): a directory, or RELEASE:ID")
        if self.named is not None and len(self.sources) > 1:
            raise TrimtabError(
                "sae: features are numbers of one autoencoder: name one, and add the steerings up"
            )
        if self.named is not None and (not self.named or len(set(self.named)) < len(self.named)):
            raise TrimtabError("sae: features are empty, or one is there twice")
        if self.named is not None and (self.by, self.k, self.variant) != ("auroc", 1, "single"):
            raise TrimtabError("sae: by, k and variant choose features, and these are named")
        if self.outcomes is not None and self.by != "correlation":
            raise TrimtabError("sae: outcomes choose features by correlation: say by correlation")
        if self.negative and self.do != "add":
            raise TrimtabError("sae: negative is for add: what is not there cannot be less active")
        if self.labels is not None and len(self.sources) > 1:
            raise TrimtabError("sae: labels is a file of one autoencoder, and several are named")
        if self.a_max is not None and (
            self.named is None or len(self._given) != len(self.named) or min(self._given) <= 0
        ):
            raise TrimtabError("sae: a_max is a number above 0 for each of the named features")

    @property
    def sources(self) -> tuple[str, ...]:
        """The autoencoders that were named."""
        return tuple(name.strip() for name in self.sae.split(","))

    @property
    def named(self) -> tuple[int, ...] | None:
        """The features that were named."""
        return (self.features,) if isinstance(self.features, int) else self.features

    @property
    def _given(self) -> tuple[float, ...]:
        given = self.a_max if isinstance(self.a_max, tuple) else (self.a_max or 0.0,)
        return tuple(map(float, given))

    @property
    def asks_for_dial(self) -> bool:
        return super().asks_for_dial and self.do not in ("clamp", "ablate")

    @property
    def chooses_by_dial(self) -> bool:
        return self.variant == "pruned"

    @property
    def looks_beyond(self) -> bool:
        return self.do != "ablate"  # a share ends at 1

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"k": (1, 4, 16), "strength": (0.2, 0.5, 1.0, 2.0, 5.0)}

    @property
    def _asked(self) -> Asked:
        return Asked(self.by, self.pool, self._scope)

    @property
    def _scope(self) -> Positions:
        """The tokens that are steered."""
        return self.positions or ("all" if self.do == "add" else _BUT_FIRST)

    def _features(self, language_model: LanguageModel) -> list[Features]:
        """The autoencoders, after every check."""
        found = [features_for(self.name, source, language_model) for source in self.sources]
        for one in found:
            one.check_plain()
            if self.do != "add":
                one.check_by_row()
            outside = [n for n in self.named or () if not 0 <= n < one.width]
            if outside:
                raise TrimtabError(
                    f"sae: {one.source} has features 0 to {one.width - 1}, and no {outside[0]}"
                )
        sites = [one.site for one in found]
        twice = next((site for site in sites if sites.count(site) > 1), None)
        if twice is not None:
            raise TrimtabError(f"sae: two autoencoders read {twice}: name one of each site")
        return found

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        features = self._features(language_model)
        if self.variant == "pruned":
            validation_part(self.name, contrast)
        return [] if self.outcomes else self._asked.wants(contrast, features)

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        features = self._features(language_model)
        findings: dict[str, Any] = {"autoencoders": {one.site: one.name for one in features}}
        if self.outcomes:
            known, findings["outcomes"] = correlated(
                language_model, self.outcomes, features, self.pool
            )
            warn_of_length(findings["outcomes"]["length_r"], self.pool)
        else:
            known = self._asked.known(language_model, contrast, statistics, features)
            if self.by == "correlation":
                rows = packed_quietly(language_model, contrast.train, statistics.max_length)
                length_r = length_correlation(rows, contrast)
                findings["length_r"] = length_r
                warn_of_length(length_r, self.pool)
        picked = self._picked(known)
        if self.variant == "pruned":
            picked, findings["validation_gain"] = self._pruned(
                language_model, contrast, known, picked
            )
        chosen = [number for number, own in enumerate(picked) if len(own)]
        interventions = [self._intervention(known[number], picked[number]) for number in chosen]
        if self.do != "add" and any(known[number].features.by_rank for number in chosen):
            operators = {each.site: each.operator for each in interventions}
            some = contrast.train.take(_CHECKED)
            packed = packed_quietly(language_model, some, statistics.max_length)
            texts = [text for row in packed for text in row.texts()]
            findings |= cutoffs(language_model, texts, known, picked, operators)
        tables, labels = self._table(known, picked)
        if any(labels):
            findings["labels"] = labels
        return self._steering(language_model, contrast, interventions, tables, findings)

    def _steering(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        interventions: Sequence[Intervention],
        tables: dict[str, Tensor] | None = None,
        findings: dict[str, Any] | None = None,
    ) -> Steering:
        dial = Dial("strength", self.at_default, _RANGES[self.do])
        return new_steering(self, language_model, contrast, interventions, dial, tables, findings)

    # -- which features ---------------------------------------------------------------------------

    def _picked(self, known: Sequence[Known]) -> list[Tensor]:
        """Of each autoencoder its features that are steered."""
        if self.named is not None:
            return [self._checked(known[0], torch.tensor(self.named))]
        usable = [
            (one.peak > 0) & (self._levels(one) > 0) & one.features.decoder.any(-1) for one in known
        ]
        if self.variant == "single":
            return by_autoencoder(known, choose(known, usable, self.k, self.negative))
        return [
            choose([one], [use], self.k, self.negative)
            for one, use in zip(known, usable, strict=True)
        ]

    def _checked(self, known: Known, named: Tensor) -> Tensor:
        """Named features, of which nothing is known where they are never active."""
        silent = named[self._levels(known, named) <= 0]
        if len(silent) and self.do not in ("ablate", "scale"):
            raise TrimtabError(
                f"sae: feature {int(silent[0])} of {known.features.source} is active in none of "
                "the texts, so that a strength has no unit: give texts in which it is, or a_max"
            )
        return named

    def _levels(self, known: Known, which: Tensor | None = None) -> Tensor:
        """What strength 1 is, as the autoencoder measures it: of all features, or of some."""
        if self.a_max is not None and which is not None:
            return torch.tensor(self._given, dtype=torch.float64)
        default = "mean" if self.by == "correlation" else "largest"
        levels = known.mean if (self.level or default) == "mean" else known.peak
        return levels if which is None else levels[which]

    def _pruned(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        known: Sequence[Known],
        picked: Sequence[Tensor],
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Of the features of each autoencoder those that alone raise the preference of validation
        rows (of ablate: that lower it), and the gains by site."""
        validation = validation_part(self.name, contrast)
        base = preference(language_model, validation)
        gains = {}
        for one, own in zip(known, picked, strict=True):
            alone = self._steering(language_model, contrast, [self._intervention(one, own)])
            gains[one.features.site] = preference(language_model, validation, alone) - base
        sign = -1.0 if self.do == "ablate" else 1.0
        kept = [
            own if sign * gains[one.features.site] > 0 else own[:0]
            for one, own in zip(known, picked, strict=True)
        ]
        if not any(map(len, kept)):
            raise TrimtabError(
                "sae: of no autoencoder the features gain anything on validation rows: take "
                "variant all, another strength, or other texts"
            )
        return kept, gains

    # -- what is done with them -------------------------------------------------------------------

    def _intervention(self, known: Known, own: Tensor) -> Intervention:
        """What is done at an autoencoder's site."""
        features, scope = known.features, Scope.of(self._scope)
        levels = self._levels(known, own)
        if self.do == "add":
            amounts = levels * known.signed[own].sign() if self.negative else levels
            vector = amounts @ features.decoder[own].double()
            return Intervention(features.site, Add(vector.float()), scope)
        rows = features.rows(own, known.cutoff)
        level = None
        if self.do in ("clamp", "at_least"):
            level = (levels * features.decoder[own].double().norm(dim=-1)).float()
        operator = SetFeatures(
            rows.encoder, rows.bias, rows.threshold, rows.decoder, self.do, level
        )
        return Intervention(features.site, operator, scope)

    def _table(
        self, known: Sequence[Known], picked: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """What is known of the features that are steered, in rank order (named ones in theirs),
        and what each is about."""
        columns: dict[str, list[Tensor]] = {}
        labels: list[str] = []
        layers = [parse_site(one.features.site)[0] for one in known]
        for one, own, layer in zip(known, picked, layers, strict=True):
            peak = one.peak[own] if self.a_max is None else torch.tensor(self._given)
            of = {"feature": own, "a_max": peak, "mean": one.mean[own]}
            if any(each is not None for each in layers):
                of["layer"] = torch.full_like(own, -1 if layer is None else layer)
            of |= {name: column[own] for name, column in one.columns.items()}
            for name, column in of.items():
                columns.setdefault(name, []).append(column)
            about = load_labels(one.features.source, self.labels) if len(own) else {}
            labels += [about.get(number, "") for number in own.tolist()]
        sizes = [one.signed[own].abs() for one, own in zip(known, picked, strict=True)]
        order = rank(torch.cat(sizes)) if self.named is None else torch.arange(len(labels))
        tables = {name: torch.cat(each)[order] for name, each in columns.items()}
        whole = ("feature", "layer")
        return (
            {name: each if name in whole else each.float() for name, each in tables.items()},
            [labels[place] for place in order.tolist()],
        )

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        options, found = steering.hyperparameters, steering.findings
        count = len(steering.tables["feature"])
        which = f"{count} features" if count > 1 else "one feature"
        lines = [f"SAE {_DOES[options['do']].format(which)} at {steering.where}."]
        if options["do"] in ("add", "clamp", "at_least"):
            lines.append(_unit_in_words(options))
        if options["features"] is None:
            lines.append(_choice_in_words(options, found))
        if found.get("cutoffs"):
            share = (
                ""
                if found["agree"] is None
                else f"; the two agree {found['agree']:.0%} of the time"
            )
            lines.append(
                "Its autoencoder takes the k largest activations; a feature is taken for one of "
                f"them above a cutoff, the mean of the k-th largest{share}."
            )
        if found.get("validation_gain"):
            gains = found["validation_gain"]
            lines.append(
                f"Of {len(gains)} autoencoders it has those whose features alone gain on "
                "validation rows."
            )
        return lines


#: What is done, in words.
_DOES = {
    "add": "adds the decoder's rows of {} of a sparse autoencoder",
    "clamp": "sets {} of a sparse autoencoder to a fixed activation, and leaves the rest as it is,",
    "at_least": "raises {} of a sparse autoencoder where they are less active than a fixed value",
    "ablate": "takes away what {} of a sparse autoencoder add",
    "scale": "scales what {} of a sparse autoencoder add",
}


def _unit_in_words(options: dict[str, Any]) -> str:
    default = "mean" if options["by"] == "correlation" else "largest"
    level = options["level"] or default
    return {
        "largest": "Strength 1 is the largest activation of each on the texts (a_max).",
        "mean": "Strength 1 is the mean activation of each over the positive texts.",
    }[level]


def _choice_in_words(options: dict[str, Any], found: dict[str, Any]) -> str:
    """Why these features."""
    if "outcomes" in found:
        about = found["outcomes"]
        return (
            f"Chosen for how they go with the outcomes of {about['rows']} answers, "
            f"{about['successful']} of which went well ({about['source']})."
        )
    return {
        "auroc": "Chosen for how well they tell the two sides' texts apart (auroc).",
        "difference": "Chosen for how much more active they are on the positive side (difference).",
        "correlation": "Chosen for how they go with the side that an answer is on (r).",
        "effect": "Chosen because what scaling them does to the answers is most certain (effect).",
    }[options["by"]]
