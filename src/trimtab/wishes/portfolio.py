"""The methods that are tried, each at several places of the model, and their steerings: of most of
them from one pass over the contrast.

What is in it was chosen by what works on small chat models (docs/make.md has the figures): vectors
added to the residual stream (CAA, and Probe's, which weighs directions by how much texts spread
along them), heads that know the two sides apart (ITI), units by what scaling them does to the
answers (AUSteer) and transport of whole sites (AcT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.files import make_directory
from trimtab.fitting import Method, collect, plain
from trimtab.methods import CAA, ITI, AcT, AUSteer, BiPO, Probe, ReFT, RePS
from trimtab.model import LanguageModel
from trimtab.steering import Steering
from trimtab.wishes.work import Work

#: Where vectors are added, as shares of the depth, the most promising first; a shorter list for
#: what seldom does more.
_DEPTHS, _FEW_DEPTHS = (0.2, 0.1, 0.3, 0.4, 0.5, 0.65, 0.8), (0.35, 0.2, 0.5)
#: Where trained methods act: what they cost does not allow more.
_TRAINED_DEPTH = 0.4
#: Steps of a training.
_STEPS = 60
#: Shares of all heads that ITI steers, and units of AUSteer.
_HEADS, _UNITS = (0.05, 0.15), (128, 32)


@dataclass(frozen=True)
class Arm:
    """One method with its settings, but for its dial; `trained` ones need passes of their own."""

    method: Method
    trained: bool = False

    @property
    def name(self) -> str:
        """As it is called in tables and in the journal."""
        own = " ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.method.name} {own}".strip()

    @property
    def params(self) -> dict[str, Any]:
        """The settings that are no defaults."""
        return {
            item.name: plain(getattr(self.method, item.name))
            for item in fields(self.method)  # type: ignore[arg-type]
            if item.default is MISSING or getattr(self.method, item.name) != item.default
        }


def portfolio(language_model: LanguageModel, seed: int, train: bool) -> list[Arm]:
    """What is tried on a model."""
    anatomy = language_model.anatomy
    layers = _layers(anatomy.layers, _DEPTHS)
    few = _layers(anatomy.layers, _FEW_DEPTHS)
    heads = anatomy.layers * anatomy.heads
    kinds: list[list[Method]] = [
        [CAA(layer=layer) for layer in layers],
        [ITI(k=max(1, round(share * heads)), seed=seed) for share in _HEADS],
        [AUSteer(locate="effect", k=k, seed=seed) for k in _UNITS],
        [Probe(layer=layer, steer="lda") for layer in few],
        [AcT(site=site, causal=False) for site in ("attn_out", "ffn_out")],
    ]
    # One of each kind after the other, so that where time is short every kind is tried.
    methods = [one for turn in zip_longest(*kinds) for one in turn if one is not None]
    arms = [Arm(method) for method in dict.fromkeys(methods)]
    if train:
        (layer,) = _layers(anatomy.layers, (_TRAINED_DEPTH,))
        arms += [
            Arm(kind(layer=layer, steps=_STEPS, seed=seed), trained=True)
            for kind in (RePS, ReFT, BiPO)
        ]
    return arms


def _layers(count: int, depths: Sequence[float]) -> list[int]:
    return list(dict.fromkeys(min(count - 1, round(depth * count)) for depth in depths))


class Fits:
    """The steerings of arms, made when the first of them is asked for, in one pass; a trained one
    is kept as a file, since it takes long."""

    def __init__(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        arms: Sequence[Arm],
        work: Work,
        directory: Path | None,
    ) -> None:
        self.language_model, self.contrast = language_model, contrast
        self.arms = {arm.name: arm for arm in arms}
        self._work = work
        self._directory = directory
        self._made: dict[str, Steering | str] = {}

    def why_not(self, name: str) -> str:
        """Why an arm has no steering; nothing where it has one."""

        def look() -> str:
            found = self._find(name)
            return found if isinstance(found, str) else ""

        return self._work.recall(f"fitted {name}", look)

    def steering(self, name: str) -> Steering:
        """The steering of an arm that has one."""
        found = self._find(name)
        if isinstance(found, str):
            raise TrimtabError(f"{name}: {found}")
        return found

    def _find(self, name: str) -> Steering | str:
        if name not in self._made:
            if self.arms[name].trained:
                self._made[name] = self._train(self.arms[name])
            else:
                self._made |= self._in_one_pass()
        return self._made[name]

    def _in_one_pass(self) -> dict[str, Steering | str]:
        lm, train = self.language_model, self.contrast.train
        found: dict[str, Steering | str] = {}
        wanted: dict[str, Any] = {}
        for name, arm in self.arms.items():
            if arm.trained:
                continue
            try:
                wanted[name] = arm.method.wants(lm, self.contrast)
            except TrimtabError as error:
                found[name] = str(error)
        every = list(dict.fromkeys(want for wants in wanted.values() for want in wants))
        statistics = collect(lm, train, every)
        for name in wanted:
            try:
                found[name] = self.arms[name].method.build(lm, self.contrast, statistics)
            except TrimtabError as error:
                found[name] = str(error)
        return found

    def _train(self, arm: Arm) -> Steering | str:
        file = (
            None if self._directory is None else self._directory / f"{arm.method.name}.safetensors"
        )
        if file is not None and file.exists():
            return Steering.load(file)
        try:
            made = arm.method.fit(self.language_model, self.contrast, measure=False)
        except TrimtabError as error:
            return str(error)
        if file is not None:
            make_directory(file.parent)
            made.save(file)
            return Steering.load(file)  # what goes on after an interruption is this
        return made
