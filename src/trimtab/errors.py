"""The two ways in which trimtab speaks up: an error that ends the work, a warning that does not.

Every message is one line for a person: what is wrong, where, and what to do about it.
"""


class TrimtabError(Exception):
    """A mistake in what the user gave, or a precondition that does not hold."""


class TrimtabWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""
