"""What an engine carries by adapters: which steerings, with which modules and what rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from trimtab.errors import TrimtabError
from trimtab.exchange import modules_at, needs
from trimtab.model import LanguageModel
from trimtab.steering import Steering


@dataclass
class Adapted:
    """What an engine carries by adapters: called with a steering, it says why not, "" where it
    does. `modules` are the names of those that it was started with an adapter's place at, None as
    long as it was not; `rank` is the largest that it has room for."""

    language_model: LanguageModel
    modules: Collection[str] | None = None
    rank: int = 1
    #: How an engine is started with more modules, of a kind of site, and with more room.
    for_modules: str = "--hook {kind}"
    for_rank: str = "--vllm max_lora_rank={rank}"
    #: What serves a steering that is no adapter.
    else_by: str = "--tier plugin and --engine transformers serve it without an adapter"
    #: What steerings need, by digest.
    _known: dict[str, tuple[str, tuple[str, ...], int]] = field(default_factory=dict)

    def __call__(self, steering: Steering) -> str:
        if steering.digest not in self._known:
            self._known[steering.digest] = self._needs(steering)
        reason, modules, rank = self._known[steering.digest]
        return reason or self.refusal(modules, rank, steering)

    def _needs(self, steering: Steering) -> tuple[str, tuple[str, ...], int]:
        try:
            found = needs(self.language_model, [_turned(steering)])
        except TrimtabError as error:
            return f"{error}; {self.else_by}", (), 1
        return "", found.modules, found.rank

    def refusal(self, modules: Sequence[str], rank: int, steering: Steering) -> str:
        """Why the engine as it was started does not take an adapter; "" where it does."""
        if self.modules is None:
            return ""
        strange = [path for path in modules if last(path) not in self.modules]
        if strange:
            kind = steering.interventions[0].site.rpartition(".")[2]
            return (
                f"it was not started with adapters at {strange[0]}, and would leave that out: "
                f"start it with {self.for_modules.format(kind=kind, module=last(strange[0]))}"
            )
        if rank > self.rank:
            return (
                f"its adapter has rank {rank}, and the engine room for {self.rank}: start it with "
                f"{self.for_rank.format(rank=rank)}"
            )
        return ""

    def start(self, steerings: Sequence[Steering], kinds: Sequence[str], rank: int | None) -> None:
        """Settle with which modules and which rank an engine is started: those that steerings need,
        and modules at some kinds of sites; or a larger `rank`."""
        each = [self._needs(steering) for steering in steerings]
        anatomy = self.language_model.anatomy
        sites = [site for kind in kinds for site in anatomy.sites(kind)]
        paths = [*modules_at(self.language_model, sites), *(p for _, own, _ in each for p in own)]
        if not paths:
            raise TrimtabError(
                "with --tier lora an engine is started for some modules: give it a steering, or "
                "--hook heads (or another kind of site) for those that are added later"
            )
        most = max((rank for _, _, rank in each), default=8)
        if rank is not None and rank < most:
            raise TrimtabError(
                f"--vllm max_lora_rank={rank}: the steerings that are served need {most}"
            )
        self.modules, self.rank = sorted(set(map(last, paths))), rank or max(most, 8)


def _turned(steering: Steering) -> Steering:
    """A steering where it does something."""
    if any(not each.idle_at(steering.setting) for each in steering.interventions):
        return steering
    return steering.at(1.0) if steering.setting != 1 else steering


def last(path: str) -> str:
    return path.rpartition(".")[2]
