"""What the papers show, on any model."""

from trimtab.papers.analyses import ANALYSES
from trimtab.papers.recipe import SCALES, billions_in, check_needs, find_recipe, recipes
from trimtab.papers.reproduction import (
    Reproduction,
    beside_paper,
    check_ready,
    check_used,
    reproduce,
)
from trimtab.papers.result import write
from trimtab.papers.studies import WITHOUT_MODEL
