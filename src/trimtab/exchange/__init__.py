"""A steering in other tools' formats: what each carries exactly, and what it cannot."""

from trimtab.exchange.auditing import Audit, audit
from trimtab.exchange.exporting import FORMATS, export, writer_of
from trimtab.exchange.hub import Listing, Pulled, Pushed, fetched, pull, push, search
from trimtab.exchange.request import Exported, Request
from trimtab.exchange.stripping import Stripped, strip
