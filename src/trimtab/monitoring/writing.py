"""What watched chats leave in the directory of a run."""

from __future__ import annotations

from trimtab.monitoring.watching import Monitoring
from trimtab.reports import Run


def write_run(found: Monitoring, run: Run) -> None:
    """results.json, the picture, tables and the page; nothing where the run has no directory."""
    if run.path is None:
        return
    from trimtab.monitoring.monitoring_page import page_of  # matplotlib takes a second to import

    run.finish(found.as_json(), lambda environment: page_of(found, run, environment))
