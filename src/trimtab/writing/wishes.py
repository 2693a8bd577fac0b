"""What a wish asks for, in the grammar that instructions need: "formal" is something to be,
"answers in one short sentence" something to do, "joy" something to show; and what its opposite is.

No parser: a few rules and lists of English words. What they do not know is quoted as it is, which
works for any language, and `opposite` says what they cannot guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trimtab.errors import TrimtabError, shown

#: A description longer than this is no description of one trait.
_LONGEST = 300

#: Verbs by which a wish that says what is done is known.
_VERBS = """
accept act add address admit advise agree answer apologise apologize argue ask avoid be begin behave
boast check cite comfort compare complain contradict correct count criticise criticize decline
describe digress disagree do doubt encourage end exaggerate explain express finish flatter focus
format give go greet guess have hedge help hesitate hide imitate include insist invent joke judge
keep leave lie like list love make mention mock mumble number offer omit open pause praise prefer
pretend question quote ramble reason recommend refer refuse remind repeat reply respond rhyme say
shout show sign sing skip sound speak start stay stop suggest summarise summarize swear take talk
tell thank think translate treat try understate use wander want warn whisper wonder write
"""
#: Third persons whose base form no rule gives.
_BASES = {"is": "be", "has": "have", "does": "do", "goes": "go", "lies": "lie", "focuses": "focus"}
#: How often: these stand before the verb, in either form.
_OFTEN = ("always", "never", "often", "rarely", "seldom", "usually", "only", "sometimes")
#: Qualities that no ending tells from adjectives.
_NOUNS = """
joy anger fear love hate hope humor humour doubt grief pride greed warmth envy wit charm courage
trust care gloom cheer irony poetry praise respect patience guilt shame
"""
_NOUN_ENDINGS = (
    *("ism", "ness", "ity", "tion", "sion", "ment", "ship", "ance", "ence", "dom", "asm", "esty"),
    *("acy", "ency"),
)

#: What is put for what, first match first, to say the opposite in words of its own: a small model
#: does what an instruction names, also where it says "do not".
_OPPOSITES: tuple[tuple[str, str], ...] = (
    (r"in (just |only )?(one|a single|1) (very )?(short |brief )?(sentence|word|line)",
     "in several long paragraphs"),
    (r"in (just |only )?(a few|two|three|few) (very )?(short |brief )?(sentences|words|lines)",
     "in several long paragraphs"),
    (r"in (several|many|multiple) (long |detailed )?(paragraphs|sentences)",
     "in one short sentence"),
    (r"(at (great )?length|long-windedly)", "in one short sentence"),
    (r"(very )?(briefly|concisely|tersely|succinctly|shortly)", "at great length"),
    (r"(concise|brief|terse|succinct|laconic)", "long-winded"),
    (r"(long-winded|wordy|verbose|talkative)", "concise"),
    (r"in rhymes?", "in plain prose"), (r"in verse", "in plain prose"),
    (r"in (bullet points|lists|a list)", "in plain paragraphs"),
    (r"(bullet points|lists)", "plain paragraphs"),
    (r"like a (child|toddler)", "like a professor"), (r"like a professor", "like a child"),
    (r"for (a child|children|kids)", "for an expert"), (r"for experts?", "for a child"),
    (r"without", "with"),
)  # fmt: skip
#: Words that are each other's opposites; an ending in -ly goes with both.
_PAIRS = (
    "formal casual", "polite rude", "warm cold", "kind harsh", "cheerful gloomy", "happy sad",
    "optimistic pessimistic", "confident hesitant", "enthusiastic bored", "serious playful",
    "honest dishonest", "truthful untruthful", "precise vague", "calm agitated",
    "patient impatient", "humble arrogant", "modest boastful", "apathetic passionate",
    "sarcastic sincere", "simple complicated", "friendly distant", "gentle rough",
    "loud quiet", "slow quick", "poetic matter-of-fact", "dramatic matter-of-fact",
    "plain flowery", "old-fashioned modern", "strict lenient", "hopeful hopeless",
    "curious indifferent", "respectful disrespectful", "emotional unemotional", "certain uncertain",
)  # fmt: skip
#: These have no such ending, or another one.
_WORDS = (
    "short long", "many few", "more fewer", "simply elaborately", "funny serious",
    "humorous serious", "witty dull", "lively dull", "technical everyday", "detailed sketchy",
    "specific general", "concrete abstract", "informal formal", "informally formally",
    "impolite polite", "direct roundabout", "evasive direct", "joy gloom",
    "optimism pessimism", "confidence doubt", "enthusiasm boredom", "warmth coldness",
    "politeness rudeness", "formality informality", "honesty dishonesty", "apathy passion",
    "patience impatience", "humility arrogance", "humor seriousness", "humour seriousness",
    "agrees disagrees", "agree disagree", "praises criticises", "praise criticise",
)  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """A trait in the forms that instructions need.

    `ask` and `ask_not` are what a model is told to do, as imperatives in lower case; `who` is whom
    it is told to be. `guessed` says that no opposite was known, so that `ask_not` only denies.
    """

    text: str
    ask: str
    ask_not: str
    who: str
    guessed: bool


def read_wish(text: str, opposite: str | None = None) -> Wish:
    """The wish in a description such as "formal" or "answers in one short sentence".

    `opposite` describes what is to be on the other side, in the same way (None: what is known or
    guessed of the wish's words).
    """
    plain = _plain(text, "the wish")
    ask, who = _asked(plain)
    if opposite is not None:
        return Wish(plain, ask, _asked(_plain(opposite, "the opposite"))[0], who, guessed=False)
    other = _opposite(ask)
    return Wish(plain, ask, other or _denied(plain, ask), who, guessed=other is None)


def _plain(text: str, what: str) -> str:
    plain = " ".join(text.split()).rstrip(".!")
    if not re.search(r"\w", plain):
        raise TrimtabError(f'{what} is empty: describe a trait, as in "formal"')
    if len(plain) > _LONGEST:
        raise TrimtabError(f"{what} has {len(plain)} characters: describe one trait in a few words")
    try:
        plain.encode()
    except UnicodeEncodeError as error:
        raise TrimtabError(f"{what} {shown(plain, 40)} is not UTF-8 text") from error
    return plain


# -- what kind of words a wish is -----------------------------------------------------------------


def _asked(wish: str) -> tuple[str, str]:
    """What to do, as an imperative, and who does so."""
    words = wish.split()
    lower = [word.casefold() for word in words]
    at = 1 if lower[0] in _OFTEN and len(words) > 1 else 0
    if lower[0] in ("be", "is") and len(words) > 1:
        return _asked_to_be(" ".join(words[1:]))
    base = _base(lower[at], alone=len(words) == 1)
    if base:
        before, rest = lower[:at], words[at + 1 :]
        do, does = [*before, base, *rest], [*before, _third(base), *rest]
        return " ".join(do), f"an assistant who {' '.join(does)}"
    if lower[0] in ("a", "an", "the"):
        return f"answer as {wish} would", wish
    if lower[0].endswith("ing") and len(words) > 1:
        return f"keep {wish}", f"an assistant known for {wish}"
    if len(words) == 1 and _is_noun(lower[0]):
        return f"show {wish} in all that you say", f"an assistant full of {wish}"
    if _is_adjective(lower):
        return _asked_to_be(wish)
    return f"let this show in every answer: {wish}", f"an assistant known for this: {wish}"


def _asked_to_be(adjective: str) -> tuple[str, str]:
    if adjective.split()[0].casefold() in ("a", "an", "the"):
        return _asked(adjective)
    return f"be {adjective} in all that you say", f"{_article(adjective)} {adjective} assistant"


def _base(word: str, alone: bool) -> str | None:
    """The base form of a verb in its third person, or of one that has it already; None for what is
    no verb. A word alone is more often an adjective than a request ("open", "calm")."""
    if word in _BASES:
        return _BASES[word]
    if word in _VERBS.split():
        return None if alone else word
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        stem = word.removesuffix(ending) + instead
        if word.endswith(ending) and stem in _VERBS.split():
            return stem
    if word.endswith(("ises", "izes", "ifies")):
        return word.removesuffix("ies") + "y" if word.endswith("ifies") else word[:-1]
    return None


def _third(base: str) -> str:
    """The third person of a verb."""
    irregular = {short: long for long, short in _BASES.items()}
    if base in irregular:
        return irregular[base]
    if base.endswith("y") and base[-2:-1] not in "aeiou":
        return f"{base[:-1]}ies"
    return f"{base}es" if base.endswith(("s", "x", "ch", "sh", "z", "o")) else f"{base}s"


def _is_noun(word: str) -> bool:
    return word in _NOUNS.split() or word.endswith(_NOUN_ENDINGS)


def _is_adjective(words: list[str]) -> bool:
    """One word that is no noun, or some with an adverb before them or with "and" between them."""
    adverbs = ("very", "rather", "quite", "too", "slightly", "somewhat", "extremely", "a")
    while len(words) > 1 and (words[0] in adverbs or words[0].endswith("ly")):
        words = words[1:]
    parts = " ".join(words).replace(",", " and ").split(" and ")
    return all(len(part.split()) == 1 for part in parts)


def _article(words: str) -> str:
    sounds = ("a", "e", "i", "o", "u", "honest", "honou", "honor", "hour")
    silent = ("eu", "uni", "use", "one", "usual")
    word = words.casefold()
    return "an" if word.startswith(sounds) and not word.startswith(silent) else "a"


# -- opposites ------------------------------------------------------------------------------------


def _opposite(ask: str) -> str | None:
    """An imperative with its telling words exchanged; None where none of them is known."""
    first, _, rest = ask.partition(" ")
    if ask.startswith("do not "):
        return ask.removeprefix("do not ")
    if first in ("never", "always"):
        return f"{'always' if first == 'never' else 'never'} {rest}"
    for pattern, instead in _OPPOSITES:
        changed, count = re.subn(rf"\b{pattern}\b", instead, ask, flags=re.IGNORECASE)
        if count:
            return changed
    changed = re.sub(r"[\w-]+", lambda word: _EXCHANGED.get(word[0].casefold(), word[0]), ask)
    return None if changed == ask else changed


def _exchanged() -> dict[str, str]:
    """Each word with its opposite, and where both have one, the adverbs too."""
    found: dict[str, str] = {}
    pairs = [pair.split() for pair in (*_PAIRS, *_WORDS)]
    adverbs = [[_adverb(word) for word in pair] for pair in pairs[: len(_PAIRS)]]
    for one, other in (*pairs[: len(_PAIRS)], *adverbs, *pairs[len(_PAIRS) :]):
        found.setdefault(one, other)
        found.setdefault(other, one)
    return found


def _adverb(adjective: str) -> str:
    if adjective.endswith("ly"):
        return f"in a {adjective} way"
    if adjective.endswith("le"):
        return f"{adjective[:-1]}y"
    if adjective.endswith("y"):
        return f"{adjective[:-1]}ily"
    return f"{adjective}ally" if adjective.endswith("ic") else f"{adjective}ly"


_EXCHANGED = _exchanged()


def _denied(wish: str, ask: str) -> str:
    """An imperative that only says no."""
    first, _, rest = ask.partition(" ")
    if first == "keep":
        return f"avoid {wish}"
    if first == "show":
        return f"show no {rest}"
    if first == "let":
        return f"let none of this show in any answer: {wish}"
    if ask.startswith("answer as ") and ask.endswith(" would"):
        return "answer as an ordinary assistant would"
    if first in _OFTEN:
        return f"do not {rest}"
    return f"do not {ask}" if first != "be" else f"do not {ask.replace('all', 'anything', 1)}"
