"""How a result shows itself: in a line, in a notebook, and its tables as text."""

from __future__ import annotations

from abc import ABC, abstractmethod

from trimtab.reports.page import tables_html
from trimtab.reports.tables import Table


class Presented(ABC):
    """What results share: they have `tables()`, and a `summary`, one sentence that says what was
    found; a result without them cannot be made."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """One sentence that says what was found."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """What was found, for people."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary}>"

    def _repr_html_(self) -> str:
        """For notebooks: the sentence and the tables, as the page of a run has them."""
        return tables_html(self.tables(), self.summary)

    def to_csv(self, table: int = 0) -> str:
        """One of `tables()` as CSV."""
        return self.tables()[table].to_csv()

    def to_latex(self, table: int = 0) -> str:
        """One of `tables()` as a LaTeX tabular with the rules of booktabs."""
        return self.tables()[table].to_latex()
