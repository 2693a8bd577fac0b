"""The directory of a run, its page, its pictures, and how results show themselves."""

from trimtab.reports.charts import (
    COLOURS,
    DOWN,
    GREEN,
    MARKERS,
    NEUTRAL,
    STYLE,
    UP,
    Line,
    axes_for,
    banded,
    bars,
    circle,
    columns,
    curve,
    forest,
    heatmap,
    in_percent,
    panels,
    rendered,
    save_figure,
    styled,
)
from trimtab.reports.evaluations import Evaluation, evaluation_page, short_name, summarise
from trimtab.reports.page import (
    Picture,
    model_line,
    render_page,
    run_page,
    save_blocks,
    tables_html,
)
from trimtab.reports.presented import Presented
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
    change_text,
    change_words,
    difference_cell,
    flips_cell,
    interval,
    number_cell,
    number_text,
    tested_cell,
    value_text,
)
