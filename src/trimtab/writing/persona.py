"""A contrast from the description of a trait: "formal", "answers in one short sentence".

"Persona Vectors" (Chen et al. 2025, arXiv:2507.21509). Pairs of instructions ask for the trait and
for its opposite; a model answers questions under both; pairs of answers are kept that show the
trait on one side only and make sense. The authors' persona vector is then CAA on the answers: their
`response_avg_diff[l + 1]` is our block l, because their hidden state 0 is the embedding.

What is ours: a model too small to write instructions and questions gets templates and questions of
our own; it may judge its own answers, by log-odds (see filtering.py); and a row's prompt is the
question alone, where the authors read answers behind the instruction that made them. So every
method can be fitted on the rows, and what is read is what is steered: a model without the
instruction.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.contrasts import Contrast, Conversation, Pair, Prompt, made_beside
from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.evaluation import ChatEndpoint
from trimtab.model import LanguageModel
from trimtab.options import PersonaAmounts, Sampling, flat
from trimtab.terminal import progress
from trimtab.writing.filtering import SEES, Answers, Filtered, filtered
from trimtab.writing.instructions import REQUEST as INSTRUCTIONS_REQUEST
from trimtab.writing.instructions import Instructions, new_pairs, top_up
from trimtab.writing.questions import REQUEST as QUESTIONS_REQUEST
from trimtab.writing.questions import Question, dealt, new_questions
from trimtab.writing.replies import is_text, listed, listed_questions
from trimtab.writing.wishes import Wish, read_wish
from trimtab.writing.work import Work, checked_target
from trimtab.writing.writers import (
    Writer,
    batch_seed,
    check_sampling,
    check_writer,
    described,
    write,
)

#: Fewer rows to fit on say more about themselves than about a trait.
FEWEST = 10
#: A model with fewer parameters writes neither pairs of instructions nor questions of its own.
_ABLE = 1_000_000_000
#: So often a writer is asked for what is still missing.
_TRIES = 3
#: Tokens for each pair of instructions or question that a writer writes, and for what is around.
_TOKENS_EACH, _TOKENS_AROUND, _MOST_TOKENS = 80, 200, 4000


class TooFewKeptError(TrimtabError):
    """A model's answers to a wish that leave too few rows to fit on."""


@dataclass(frozen=True)
class _Roles:
    """Who does what: writes instructions and questions (None: templates do), answers, judges."""

    writer: Writer | None
    answerer: Writer
    judge: Writer

    def as_json(self) -> dict[str, Any]:
        return {
            "writer": "templates" if self.writer is None else described(self.writer),
            "answers by": described(self.answerer),
            "judge": described(self.judge),
        }


@flat
def persona_contrast(
    language_model: LanguageModel,
    wish: str,
    *,
    opposite: str | None = None,
    writer: Writer | Literal["templates"] | None = None,
    judge: Writer | None = None,
    amounts: PersonaAmounts = PersonaAmounts(),
    sampling: Sampling = Sampling(max_new_tokens=100, temperature=1.0, top_k=0, top_p=0.9),
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Contrast:
    """A paired contrast for a trait that a few words describe ("formal", "speaks like a pirate").

        >>> contrast = tt.persona_contrast(lm, "answers in one short sentence")
        >>> steering = tt.CAA().fit(lm, contrast)

    `pairs` pairs of instructions ask for the trait and for its `opposite` (None: what is known of
    the wish's words); the model answers `questions` questions `answers` times under each, sampled
    at temperature 1. A row is a question with its two answers, without the instructions. Half of
    the questions are for fitting (train), a quarter each for choosing (validation) and measuring
    (test).

    `writer` writes instructions and questions: a chat model, an endpoint, or "templates", which
    makes instructions of the wish's words and takes questions that come with trimtab. None is the
    model itself where it has a chat template and 1e9 parameters, else templates. What a writer
    writes that is no question or no pair, or not new, is replaced so, too. A model without a chat
    template cannot follow instructions: the writer answers in its place.

    `judge` says which answers show the trait and make sense: an endpoint scores them from 0 to 100
    (positive 50 or more, negative below 50, both 50 or more in coherence); a model (None: the model
    itself) is asked for yes or no, and its log-odds are compared (see filtering.py).

    `made` of the contrast says all of it: wish, instructions, questions, who wrote what, how many
    rows were written, dropped and for what reason, and kept. With `output` the contrast is a JSONL
    file, and OUTPUT.made.json beside it has `made`. Until both are whole, finished work is in
    OUTPUT.part: an interrupted call that is repeated goes on with the very texts that it would have
    had.

    Errors: an empty wish; a model without a chat template and no writer that has one; fewer than
    10 rows to fit on are kept (TooFewKeptError); OUTPUT exists; OUTPUT.part is damaged, or of other
    settings.

    "Persona Vectors" (Chen et al. 2025, arXiv:2507.21509).
    """
    check_sampling(sampling)
    read = read_wish(wish, opposite)
    roles = roles_for(language_model, writer, judge)
    _check_amounts(amounts)
    settings = _settings(read, amounts, sampling, roles)
    special = _special_tokens(language_model)
    _check_words(read, special)
    target = checked_target(output, overwrite)
    work = Work(target, settings, overwrite)
    # A run that was stopped between the two files has left the one that says how it was made.
    overwrite = overwrite or work.resumes
    if target is not None:
        checked_target(made_beside(target), overwrite)

    told = _instructions(roles.writer, read, amounts.pairs, sampling.seed, work, special)
    asked = _questions(roles.writer, read, amounts.questions, sampling.seed, work, special)
    rows = _answered(roles.answerer, read, told, asked, amounts.answers, sampling, work)
    found = filtered(
        rows,
        roles.judge,
        read.text,
        work,
        answerer=roles.answerer,
        special=special,
        max_new_tokens=sampling.max_new_tokens,
    )
    work.check_used()
    _check_kept(found, read, len(rows))
    contrast = Contrast(
        tuple(_row(answers, language_model.chats) for answers in found.kept),
        f"persona:{read.text}" if target is None else str(target),
        made={**settings, **_findings(told, asked, rows, found)},
        behaviour=read.ask,
        opposite=read.ask_not,
    )
    if target is None:
        return contrast
    contrast.to_jsonl(target, overwrite)
    work.remove()
    return Contrast.from_jsonl(target)


# -- who does what --------------------------------------------------------------------------------


def roles_for(language_model: LanguageModel, writer: Any, judge: Writer | None) -> _Roles:
    """Each role's model, checked before anything is written; also for who asks beforehand."""
    if judge is not None and not isinstance(judge, LanguageModel | ChatEndpoint):
        raise TrimtabError(f"a judge is a LanguageModel or a ChatEndpoint, not {judge!r}")
    if isinstance(writer, LanguageModel | ChatEndpoint):
        check_writer(writer, (("user", "Hello?"),), "write instructions and questions")
    elif writer not in (None, "templates"):
        raise TrimtabError(
            f"a writer is a LanguageModel, a ChatEndpoint or 'templates', not {writer!r}"
        )
    itself = language_model.chats and language_model.model.num_parameters() >= _ABLE
    writes = writer if isinstance(writer, LanguageModel | ChatEndpoint) else None
    if writer is None and itself:
        writes = language_model
    if not language_model.chats and writes is None:
        raise TrimtabError(
            f"{language_model.name} has no chat template, so it follows no instructions: name a "
            "writer that answers in its place (--writer chat:NAME with --writer-url, or --writer "
            "local:MODEL), or take an instruction-tuned model"
        )
    answers = language_model if language_model.chats else writes
    assert answers is not None
    return _Roles(writes, answers, language_model if judge is None else judge)


def _check_words(wish: Wish, special: Sequence[str]) -> None:
    """Refuse a wish that would end a turn of the conversation that it is put into."""
    if not all(_harmless(text, special) for text in (wish.text, wish.ask_not)):
        raise TrimtabError(
            f"the wish {shown(repr(wish.text), 60)} or its opposite holds a mark of the chat "
            "template, or a character that nobody sees: write plain words"
        )


def _check_amounts(amounts: PersonaAmounts) -> None:
    """Refuse, before the work, what could not leave rows enough."""
    if min(amounts.pairs, amounts.questions, amounts.answers) < 1:
        raise TrimtabError("pairs, questions and answers must be 1 or more")
    rows = amounts.pairs * amounts.answers * ((amounts.questions + 1) // 2)
    if rows < FEWEST:
        raise TrimtabError(
            f"{amounts.pairs} pairs of instructions, {amounts.questions} questions and "
            f"{amounts.answers} answers make {rows} rows to fit on, and {FEWEST} are needed: ask "
            "for more"
        )


def _settings(
    wish: Wish, amounts: PersonaAmounts, sampling: Sampling, roles: _Roles
) -> dict[str, Any]:
    """Everything that decides what the rows are, as it comes back from a file."""
    about = {"wish": wish.text, "behaviour": wish.ask, "opposite": wish.ask_not}
    settings: dict[str, Any] = json.loads(
        json.dumps({**about, **asdict(amounts), **asdict(sampling), **roles.as_json()})
    )
    return settings


def _special_tokens(language_model: LanguageModel) -> list[str]:
    """What a text must not hold, because a chat template's marks are read as such anywhere."""
    tokens = language_model.tokenizer.all_special_tokens
    return [token for token in tokens if len(token) > 2]


# -- instructions and questions -------------------------------------------------------------------


def _missing(
    writer: Writer | None, written: Sequence[Any], count: int
) -> Iterator[tuple[Writer, int, int]]:
    """Whom to ask, for how many more, and how often it was asked before, as long as some are
    missing; nothing where nobody writes."""
    for attempt in range(_TRIES):
        if writer is not None and len(written) < count:
            yield writer, count - len(written), attempt


def _instructions(
    writer: Writer | None,
    wish: Wish,
    count: int,
    seed: int,
    work: Work,
    special: Sequence[str],
) -> list[Instructions]:
    """`count` pairs: a writer's, where there is one, and templates for what it leaves out."""
    written: list[Instructions] = []
    for asked, missing, attempt in _missing(writer, written, count):
        request = INSTRUCTIONS_REQUEST.format(
            wish=_quoted(wish.text), opposite=_quoted(wish.ask_not), count=missing
        )
        reply = _reply(asked, "instructions", request, missing, attempt, seed, work)
        new = new_pairs(listed(reply, "instructions"), written)
        written += [
            pair for pair in new if _harmless(pair.positive + " " + pair.negative, special)
        ][:missing]
    return top_up(written, wish, count)


def _questions(
    writer: Writer | None,
    wish: Wish,
    count: int,
    seed: int,
    work: Work,
    special: Sequence[str],
) -> list[Question]:
    """`count` questions: a writer's, where there is one, and built-in ones for what is missing."""
    written: list[str] = []
    for asked, missing, attempt in _missing(writer, written, count):
        request = QUESTIONS_REQUEST.format(wish=_quoted(wish.text), count=missing)
        reply = _reply(asked, "questions", request, missing, attempt, seed, work)
        found = [text for text in listed_questions(reply) if _harmless(text, special)]
        written += new_questions(found, written)[:missing]
    return dealt(written, count)


def _reply(
    writer: Writer, label: str, request: str, count: int, attempt: int, seed: int, work: Work
) -> str:
    """What a writer says to a request, or said before the work was interrupted."""
    known = work.next_batch(label, attempt, 1, str)
    if known is not None:
        return known[0]
    most = min(_MOST_TOKENS, _TOKENS_AROUND + _TOKENS_EACH * count)
    if isinstance(writer, LanguageModel):
        most = max(1, min(most, writer.max_length - _TOKENS_AROUND))
    sampling = Sampling(max_new_tokens=most, temperature=1.0, top_k=0, top_p=0.9)
    prompt: Prompt = (("user", request),)
    reply = write(writer, [prompt], batch_seed(seed, label, attempt), sampling)[0]
    work.append(label, attempt, [reply])
    return reply


def _quoted(text: str) -> str:
    """A wish in a request, which has no fields left when it is filled."""
    return json.dumps(text, ensure_ascii=False)


def _harmless(text: str, special: Sequence[str]) -> bool:
    """Whether a text can stand in a conversation: it is UTF-8, and no token ends the turn."""
    return is_text(text) and text.isprintable() and not any(token in text for token in special)


# -- answers --------------------------------------------------------------------------------------


def _answered(
    answerer: Writer,
    wish: Wish,
    told: Sequence[Instructions],
    asked: Sequence[Question],
    answers: int,
    sampling: Sampling,
    work: Work,
) -> list[Answers]:
    """Each question's answers under each pair of instructions, question by question."""
    grid = [
        (question, number)
        for question in asked
        for number in range(len(told))
        for _ in range(answers)
    ]
    as_system = _takes_system(answerer)
    prompts = {
        side: [
            _conversation(f"You are {who}. {getattr(told[number], side)}", question, as_system)
            for question, number in grid
        ]
        for side, who in (("positive", wish.who), ("negative", "a helpful assistant"))
    }
    texts: dict[str, list[str]] = {}
    with progress("writing answers", 2 * len(grid)) as advance:
        for side, asked_there in prompts.items():
            texts[side] = []
            for number, start in enumerate(range(0, len(grid), sampling.batch_size)):
                batch = asked_there[start : start + sampling.batch_size]
                written = work.next_batch(side, number, len(batch), str)
                if written is None:
                    seed = batch_seed(sampling.seed, side, number)
                    written = [text.strip() for text in write(answerer, batch, seed, sampling)]
                    work.append(side, number, written)
                texts[side] += written
                advance(len(batch))
    sides = zip(texts["positive"], texts["negative"], strict=True)
    both = zip(prompts["positive"], prompts["negative"], strict=True)
    return [
        Answers(question.text, question.part, number, *written_here, told_here)
        for (question, number), written_here, told_here in zip(grid, sides, both, strict=True)
    ]


def _conversation(system: str, question: Question, as_system: bool) -> Conversation:
    if as_system:
        return (("system", system), ("user", question.text))
    return (("user", f"{system}\n\n{question.text}"),)


def _takes_system(answerer: Writer) -> bool:
    """Whether its chat template has a place for a system message."""
    if isinstance(answerer, ChatEndpoint):
        return True
    try:
        rendered = answerer.render((("system", "Be brief."), ("user", "Why?")))
    except TrimtabError:
        return False
    return "Be brief." in rendered


def _row(answers: Answers, chats: bool) -> Pair:
    """A question with its answers: as a user's message, or as text where a model has no chats."""
    if chats:
        prompt: Prompt = (("user", answers.question),)
        return Pair(prompt, answers.positive, answers.negative, answers.part)
    prompt = f"Question: {answers.question}\nAnswer:"
    return Pair(prompt, f" {answers.positive}", f" {answers.negative}", answers.part)


# -- what came of it ------------------------------------------------------------------------------


def _check_kept(found: Filtered, wish: Wish, written: int) -> None:
    """Refuse what is too little to fit on; warn where parts are missing, or the judge is blind."""
    train = sum(row.part == "train" for row in found.kept)
    dropped = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items())
    if train < FEWEST:
        less_guessing = " and an opposite of your own words (--opposite)" if wish.guessed else ""
        raise TooFewKeptError(
            f"of {written} pairs of answers for {wish.text!r} only {len(found.kept)} are kept, "
            f"{train} of them to fit on, and {FEWEST} are needed (dropped: {dropped}): try a "
            f"larger model, longer answers (--max-new-tokens), more of them (--questions), a "
            f"stronger judge (--judge){less_guessing}"
        )
    for part in ("validation", "test"):
        if not any(row.part == part for row in found.kept):
            _warn(f"no {part} rows are kept for {wish.text!r}: ask for more questions")
    if found.separation is not None and found.separation < SEES:
        instead = {
            "which instruction fits": "the answers were kept by which instruction they fit instead",
            "nothing": "its yes and no were not used",
        }.get(found.by["trait"], "look at the rows")
        _warn(
            f"the judge hardly tells the two sides of {wish.text!r} apart (a positive answer beats "
            f"a negative one in {found.separation:.0%} of cases): {instead}; a larger model or a "
            "service judges better (--judge)"
        )


def _warn(says: str) -> None:
    # Past persona_contrast and what `flat` makes of it, to who called it.
    warnings.warn(says, TrimtabWarning, stacklevel=5)


def _findings(
    told: Sequence[Instructions],
    asked: Sequence[Question],
    rows: Sequence[Answers],
    found: Filtered,
) -> dict[str, Any]:
    """What was asked, and what came of it: written is kept and dropped together."""
    by_part = Counter(row.part for row in found.kept)
    by_pair = Counter(row.pair for row in found.kept)
    return {
        "instructions": [asdict(pair) for pair in told],
        "questions": [{"text": one.text, "part": one.part, "source": one.source} for one in asked],
        "counts": {
            "instructions": dict(Counter(pair.source for pair in told)),
            "questions": dict(Counter(one.source for one in asked)),
            "written": len(rows),
            "kept": len(found.kept),
            "dropped": found.dropped,
            "kept by part": {part: by_part[part] for part in ("train", "validation", "test")},
            "kept by pair": [by_pair[number] for number in range(len(told))],
        },
        "kept by": found.by,
        "separation": found.separation,
        "coherence": found.coherence,
    }
