"""Where the sites of a model are, and hooks on them."""

from trimtab.anatomy.anatomy import (
    KINDS,
    READ_ONLY,
    Anatomy,
    Architecture,
    Edit,
    LinearMap,
    Point,
    parse_site,
    register,
    site_order,
)
from trimtab.anatomy.exclusive import exclusively
from trimtab.anatomy.hooks import Hook, eager, hooked, is_hooked

__all__ = [
    "KINDS",
    "READ_ONLY",
    "Anatomy",
    "Architecture",
    "Edit",
    "Hook",
    "LinearMap",
    "Point",
    "eager",
    "exclusively",
    "hooked",
    "is_hooked",
    "parse_site",
    "register",
    "site_order",
]
