"""Contrasts that a model writes: texts about a concept."""

from trimtab.writing.concepts import Negatives, generate_contrast
from trimtab.writing.writers import Writer
