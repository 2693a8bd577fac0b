"""Steerings where somebody else runs the model: vLLM, each request under steerings of its own"""

from trimtab.engines.asking import (
    ASKED,
    FIELD,
    READING,
    Read,
    ReadingOf,
    Wanted,
    extra_args,
    reading_args,
)
from trimtab.engines.batch import OURS, Ask, Heard, InProcess
from trimtab.engines.loaded import (
    SPLIT,
    content_of,
    not_captured,
    sites_of,
    steps_of,
    wanted_of,
    why_not,
)
from trimtab.engines.modules import Place, places_of
from trimtab.engines.plugin import (
    LOADED,
    TESTED,
    captures,
    configuration,
    configured,
    graphs,
    refuse_ways,
    untested,
    vllm_version,
    way_of,
)
from trimtab.engines.tokens import Acts, weights
