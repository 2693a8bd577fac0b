"""The two ways in which trimtab speaks up: an error that ends the work, a warning that does not.

Every message is one line for a person: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import errno


class TrimtabError(Exception):
    """A mistake in what the user gave, or a precondition that does not hold."""


class TrimtabWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""


def os_reason(error: BaseException) -> str:
    """Why writing to the cache failed, and what to do."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full; free some space, or set TRIMTAB_CACHE to a directory with more"
    return f"{getattr(error, 'strerror', None) or error}; TRIMTAB_CACHE sets another directory"
