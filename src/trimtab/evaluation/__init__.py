"""Tasks under steerings: their rows, how a model answers them, how answers are judged."""

from trimtab.evaluation.answering import AnsweredBy, Settings, engine_of
from trimtab.evaluation.drifting import Drift, Repeated, drift
from trimtab.evaluation.endpoint import Address, ChatEndpoint, read_key
from trimtab.evaluation.evaluation import evaluate, refuse_elsewhere
from trimtab.evaluation.jobs import (
    Asked,
    Judging,
    PreferenceJob,
    TaskJob,
    Wanted,
    find_job,
    misfit,
    task_name,
)
from trimtab.evaluation.metrics.coherence import coherence, looping, repetition
from trimtab.evaluation.metrics.judges import (
    HARMBENCH_TEMPLATE,
    Chat,
    ChatJudge,
    HarmBenchJudge,
    Judge,
    LocalChat,
    PhraseJudge,
    PolyGuardJudge,
)
from trimtab.evaluation.metrics.ratings import (
    RATINGS,
    ChatRater,
    OfflineRater,
    Rater,
    Rating,
    offline_rater,
    overall,
)
from trimtab.evaluation.metrics.toxicity import Scorer
from trimtab.evaluation.per_token import Continuations, NextTokens, TokenKL, neutral
from trimtab.evaluation.prompted import (
    Attached,
    Prompted,
    asked_with,
    steering_of,
    together_with,
    with_words,
    words_of,
)
from trimtab.evaluation.rounds import in_turns, one_by_one
from trimtab.evaluation.sampled import Sample, kept_samples, samples, samples_table
from trimtab.evaluation.tasks import (
    PROTOCOLS,
    TASKS,
    Example,
    Generation,
    Protocol,
    Row,
    Source,
    Task,
    check_protocol,
    check_task,
    find_task,
    load_contrast,
)
from trimtab.evaluation.tasks.answers import from_answers
from trimtab.evaluation.tasks.data import data_directory, source_file
from trimtab.evaluation.tasks.prompts import prompts_task
