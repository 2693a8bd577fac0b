"""A model over many texts, with nothing computed twice."""

from trimtab.reading.abilities import (
    blocks_apart,
    blocks_to_keep,
    packed,
    packs,
    runs_in_parts,
    shares_prefixes,
)
from trimtab.reading.autoencoders import (
    Cutoff,
    FeatureEffects,
    FeatureRows,
    Features,
    features_for,
    is_release,
    load_features,
)
from trimtab.reading.engine import Engine, Stretch
from trimtab.reading.likelihood import (
    answers_scored,
    cross_entropy,
    log_odds,
    neutral_prompts,
    plain_texts,
    preference,
    scored_from,
    side_readings,
    text_readings,
)
from trimtab.reading.packing import (
    Batch,
    Packed,
    batch_of,
    batches,
    encode_contrast,
    encode_texts,
    run_packed,
)
from trimtab.reading.reader import (
    Next,
    PlannedBatch,
    Reading,
    last_logits,
    next_tokens,
    prompt_reading,
    read_columns,
    refuse_idle,
    whole_reading,
)
from trimtab.reading.scaled import ScaledUnit, scaled_log_p
from trimtab.reading.streams import StreamCache, blocks_before, blocks_below, run_lower, run_upper
