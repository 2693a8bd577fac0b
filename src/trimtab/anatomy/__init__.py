"""Where the sites of a model are, and hooks on them."""

from trimtab.anatomy.anatomy import Anatomy
from trimtab.anatomy.architectures import (
    Architecture,
    attention,
    ffn,
    mixer,
    mixture,
    register,
)
from trimtab.anatomy.behaviour import find_input, first_tensor, with_first
from trimtab.anatomy.description import Block, Branch, Description
from trimtab.anatomy.drawing import blocks_drawn, places, ranges
from trimtab.anatomy.entries import known
from trimtab.anatomy.exclusive import exclusively, on_behalf_of_this_thread
from trimtab.anatomy.hooks import Enough, Hook, eager, hooked, is_hooked
from trimtab.anatomy.knowing import DOES_NOT_RUN, cache_file
from trimtab.anatomy.maps import LinearMap
from trimtab.anatomy.numbers import near
from trimtab.anatomy.routers import Router
from trimtab.anatomy.sites import CHOICE, KINDS, READ_ONLY, Edit, Point, parse_site, site_order
from trimtab.anatomy.tracing import probe_ids
