"""A model in memory: load or wrap it, steer it, bake it."""

from trimtab.model.arguments import Completion, SteeringArgument, per_text, row_steerings
from trimtab.model.attach import finds_dials, turned
from trimtab.model.baking import bake
from trimtab.model.batching import BATCH_TOKENS, batches_by_length, refuse_dropout
from trimtab.model.chats import ChatForm, put_as, render_messages
from trimtab.model.decoding import (
    OPTIONS,
    SAMPLING,
    UnsoundError,
    are_sound,
    end_tokens,
    left_aside,
    sampling,
    stop_pattern,
    stops_in,
    unsound,
)
from trimtab.model.explaining import Firing, acted, firing, scope_weights
from trimtab.model.folding import Fold, record_of, unlike
from trimtab.model.gate_reports import (
    Columns,
    Fired,
    decisions,
    fired_by,
    has_two_pass,
    reported,
    settled,
    watch,
)
from trimtab.model.gate_scores import read_prompts, score_pass, score_prompts
from trimtab.model.identity import has_adapters
from trimtab.model.images import (
    ImageText,
    extended,
    frozen,
    has_images,
    refuse_unseen,
    with_images,
)
from trimtab.model.kept import Kept
from trimtab.model.language_model import LanguageModel
from trimtab.model.loading import directory_of, load, locations
from trimtab.model.passes import Sequences
from trimtab.model.plain import plain_copy
from trimtab.model.questions import (
    alike,
    answered,
    asking,
    hidden_alone,
    is_asking,
    probe_texts,
)
from trimtab.model.running import unsteered
from trimtab.model.saving import check_target
from trimtab.model.spans import Images, Span, Turn
from trimtab.model.standing import UNKNOWN_END
from trimtab.model.stepwise import Writing
from trimtab.model.streaming import Growing
from trimtab.model.thinking import answer_of, without_thoughts
from trimtab.model.versions import cache_argument, caps_attention, warn_if_untested
from trimtab.model.wording import asked
from trimtab.model.wrapping import check_model, wrap

warn_if_untested()
