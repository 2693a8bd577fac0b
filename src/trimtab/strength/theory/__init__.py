"""The theory of steering strength, on a language model small enough to be solved by hand."""

from trimtab.strength.theory.pictures import (
    CONCEPTS,
    TOKENS,
    example,
    facts,
    figure,
    lines,
    save_pictures,
)

__all__ = ["CONCEPTS", "TOKENS", "example", "facts", "figure", "lines", "save_pictures"]
