"""Contrasts that a model writes: texts about a concept, answers that show a trait."""

from trimtab.writing.concepts import Negatives, generate_contrast
from trimtab.writing.filtering import trait_and_coherence
from trimtab.writing.persona import TooFewKeptError, persona_contrast, roles_for
from trimtab.writing.wishes import read_wish
from trimtab.writing.writers import Writer
