"""Helium names its modules as Llama does, which are the defaults."""

from trimtab.anatomy import Architecture

HELIUM = Architecture()
