"""Where the sites of a model are, and hooks on them."""

from trimtab.anatomy.anatomy import (
    KINDS,
    READ_ONLY,
    Anatomy,
    Edit,
    LinearMap,
    Point,
    parse_site,
    site_order,
)
from trimtab.anatomy.exclusive import exclusively
from trimtab.anatomy.hooks import Hook, eager, hooked, is_hooked

__all__ = [
    "KINDS",
    "READ_ONLY",
    "Anatomy",
    "Edit",
    "Hook",
    "LinearMap",
    "Point",
    "eager",
    "exclusively",
    "hooked",
    "is_hooked",
    "parse_site",
    "site_order",
]
