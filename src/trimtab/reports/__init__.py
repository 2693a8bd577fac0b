"""The directory of a run, its page, and its pictures."""

from trimtab.reports.charts import (
    COLOURS,
    DOWN,
    GREEN,
    MARKERS,
    NEUTRAL,
    STYLE,
    UP,
    Line,
    banded,
    bars,
    circle,
    columns,
    curve,
    forest,
    heatmap,
    panels,
    plot_units,
    rendered,
    save_figure,
    styled,
    units_and_effects,
)
from trimtab.reports.page import (
    Picture,
    evaluation_page,
    evaluation_tables,
    model_line,
    render_page,
)
from trimtab.reports.run import (
    Finite,
    Run,
    check_overwritable,
    line_of,
    object_in,
)
from trimtab.reports.tables import (
    Table,
    Valued,
    cell,
    difference_cell,
    flips_cell,
    interval,
    number_cell,
    tested_cell,
)
