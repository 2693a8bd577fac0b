"""Watched chats drawn, and as the page of a run: turns with the threshold, and tokens by colour."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from trimtab.monitoring.watching import Monitoring, Turn
from trimtab.reports import (
    DOWN,
    GREEN,
    Coloured,
    Passage,
    Picture,
    Run,
    look_of,
    model_line,
    panels,
    run_page,
    styled,
)

#: So many chats are told apart by colour and named.
_NAMED = 8
#: Of so many turns the tokens are shown; the results have all.
_SHOWN = 40


def draw(axes: Any, found: Monitoring) -> None:
    """What is compared of each turn, chat by chat; an alarm is ringed."""
    monitor = found.monitor
    at = "answer" if monitor is None else monitor.at
    place = 1
    chats = [list(turns) for _, turns in groupby(found.turns, key=lambda turn: turn.chat)]
    for number, turns in enumerate(chats):
        known = [(place + i, turn.value(at)) for i, turn in enumerate(turns)]
        drawn = [(x, y) for x, y in known if y is not None]
        label = f"chat {turns[0].chat + 1}" if len(chats) <= _NAMED else None
        colour, marker = look_of(number)
        axes.plot(*zip(*drawn, strict=True) if drawn else ([], []), color=colour, marker=marker,
                  label=label)  # fmt: skip
        ringed = [(x, turn.value(at)) for (x, _), turn in zip(known, turns, strict=True)
                  if found.alarms(turn)]  # fmt: skip
        if ringed:
            axes.plot(*zip(*ringed, strict=True), "o", mfc="none", mec=DOWN, ms=13)
        place += len(turns)
    if monitor is not None:
        usual = monitor.baseline
        axes.axhspan(usual.mean - usual.sd, usual.mean + usual.sd, color=GREEN, alpha=0.15,
                     label="usual")  # fmt: skip
        axes.axhline(monitor.condition.threshold, color=DOWN, ls="--", label="threshold")
    axes.set_xlabel("turn, chat after chat")
    axes.set_ylabel("answer's mean" if at == "answer" else "at the prompt's end")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


@styled
def _picture(found: Monitoring) -> Picture:
    figure, (axes,) = panels((7.5, 3.6))
    draw(axes, found)
    note = "" if found.monitor is None else "A ring is an alarm; the band is one sd around usual."
    alt = "the projection of each turn along the direction, with the threshold"
    return Picture("Turns along the direction", "projections", figure, alt, note)


def _tokens(found: Monitoring) -> Coloured:
    """The answers with each token as coloured as it is far from the threshold (where there is none
    for answers, from 0)."""
    monitor = found.monitor
    has_limit = monitor is not None and monitor.at == "answer"
    middle = monitor.condition.threshold if monitor is not None and has_limit else 0.0
    shown = [turn for turn in found.turns if turn.tokens][:_SHOWN]
    away = [abs(value - middle) for turn in shown for value in turn.projections]
    full = max(away, default=0.0) or 1.0

    def passage(turn: Turn) -> Passage:
        alarm = ", alarm" if found.alarms(turn) else ""
        shades = [(value - middle) / full for value in turn.projections]
        return Passage(
            f"chat {turn.chat + 1}, turn {turn.number + 1}{alarm}",
            tuple(zip(turn.tokens, shades, turn.projections, strict=True)),
        )

    more = sum(bool(turn.tokens) for turn in found.turns) - len(shown)
    of = "the threshold" if has_limit else "0"
    note = f"Blue is above, orange below {of}; point at a token for its projection."
    if more:
        note += f" {more} other turns are in results.json."
    return Coloured("Tokens", tuple(map(passage, shown)), note)


def page_of(found: Monitoring, run: Run, environment: dict[str, Any]) -> str:
    """The page of a run."""
    model = run.config["model"]
    return run_page(
        run,
        environment,
        f"Chats along {found.site}",
        f"{model['name']}; {model_line(model)}",
        [*found.tables(), _picture(found), _tokens(found)],
        summary=found.summary,
    )
