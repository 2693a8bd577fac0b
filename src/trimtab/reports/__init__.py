"""The directory of a run, its page, and its pictures."""

from trimtab.reports.charts import (
    COLOURS,
    DOWN,
    NEUTRAL,
    STYLE,
    UP,
    picture,
    plot_effects,
    plot_units,
    rendered,
    save_figure,
)
from trimtab.reports.page import (
    Picture,
    Table,
    cell,
    evaluation_page,
    evaluation_tables,
    interval,
    model_line,
    page,
)
from trimtab.reports.run import (
    Finite,
    Run,
    check_overwritable,
    line_of,
    object_in,
)

__all__ = [
    "COLOURS",
    "DOWN",
    "NEUTRAL",
    "STYLE",
    "UP",
    "Finite",
    "Picture",
    "Run",
    "Table",
    "cell",
    "check_overwritable",
    "evaluation_page",
    "evaluation_tables",
    "interval",
    "line_of",
    "model_line",
    "object_in",
    "page",
    "picture",
    "plot_effects",
    "plot_units",
    "rendered",
    "save_figure",
]
