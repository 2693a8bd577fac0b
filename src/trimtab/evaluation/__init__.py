"""Tasks under steerings: their rows, how a model answers them, how answers are judged."""

from trimtab.evaluation.answering import Settings
from trimtab.evaluation.endpoint import ChatEndpoint
from trimtab.evaluation.evaluation import evaluate
from trimtab.evaluation.jobs import (
    Attached,
    Judging,
    PreferenceJob,
    TaskJob,
    Wanted,
    find_job,
    misfit,
)
from trimtab.evaluation.metrics.coherence import coherence, repetition
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
from trimtab.evaluation.metrics.toxicity import Scorer
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
    find_task,
    load_contrast,
)
from trimtab.evaluation.tasks.answers import from_answers
from trimtab.evaluation.tasks.data import data_directory, source_file
from trimtab.evaluation.tasks.prompts import prompts_task

__all__ = [
    "HARMBENCH_TEMPLATE",
    "PROTOCOLS",
    "TASKS",
    "Attached",
    "Chat",
    "ChatEndpoint",
    "ChatJudge",
    "Example",
    "Generation",
    "HarmBenchJudge",
    "Judge",
    "Judging",
    "LocalChat",
    "PhraseJudge",
    "PolyGuardJudge",
    "PreferenceJob",
    "Protocol",
    "Row",
    "Scorer",
    "Settings",
    "Source",
    "Task",
    "TaskJob",
    "Wanted",
    "check_protocol",
    "coherence",
    "data_directory",
    "evaluate",
    "find_job",
    "find_task",
    "from_answers",
    "load_contrast",
    "misfit",
    "prompts_task",
    "repetition",
    "source_file",
]
