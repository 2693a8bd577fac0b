"""A steering in other tools' formats: what each carries exactly, and what it cannot."""

from trimtab.exchange.exporting import FORMATS, export, writer_of
from trimtab.exchange.importing import READERS, import_steering
from trimtab.exchange.request import Exported, Request
