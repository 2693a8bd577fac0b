"""What the words of a scope are in one model's tokens: markers, turns of its chat template, images.

How turns begin and end is not known by name: conversations are put through the template that differ
in one message, and what stays the same between two messages is what the template writes there.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.model.chats import ChatForm
from trimtab.model.spans import Ids, Images, Span, Turn, Turns
from trimtab.steering import (
    ROLES,
    And,
    Between,
    Mark,
    Not,
    Or,
    Part,
    Scope,
    TokenIs,
    Window,
    Word,
    parts_of,
)

#: How models mark their thinking and their calls of tools, where the tokenizer has both or the
#: template writes both.
THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
_TOOL_CALL = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_call|>", "<|/tool_call|>"),
    ("<|tool_call>", "<tool_call|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<tool_calls>", "</tool_calls>"),
    ("<function_call>", "</function_call>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
#: Under which names templates take what an assistant has thought.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
#: What messages say that are put through a template, each something else.
_SAID = ("kite", "Berg", "stone")
#: What one of them says instead: of many beginnings and ends, because the last token of what stands
#: before a message may take its first letters in, and the first one behind it its last.
_INSTEAD = ("Moon", "It is.", "the end?", "42", '"so"', "A!")
#: Of how many scopes and markers it is known what they are in a model's tokens: whoever asks a
#: server may think of ever new ones, and those that were not asked for longest are found anew.
_KEPT = 1024


@dataclass(frozen=True, eq=False)
class Placed:
    """A scope in one model's tokens.

    `placed` says whether it asks where prompts end, `reads` whether it asks what texts say, and
    `counts` whether tokens before a token have a say; `after_prompts` whether padding behind a
    prompt could be taken for something else.
    """

    text: str
    part: Any
    decay: float | None
    everywhere: bool
    placed: bool
    reads: bool
    counts: bool
    after_prompts: bool
    #: Whether it ought to act on any text that is not just its prompt.
    plain: bool
    only_generated: bool
    only_images: bool
    looks_ahead: bool
    #: How turns are told apart, where it asks for some.
    turns: Turns | None = None
    name: str = ""


@dataclass(eq=False)
class Marks:
    """The markers of one model: its tokenizer, how its conversations are put, its image tokens."""

    tokenizer: Any
    name: str
    form: ChatForm = ChatForm()
    images: Collection[int] = ()
    #: What they were found of, so that another tokenizer or template has its own.
    of: Any = None
    _known: dict[Any, Any] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.RLock)

    def place(self, scope: Scope) -> Placed:
        """A scope in this model's tokens; the same one for the same scope, as long as it is asked
        for. Refuses what the model has not: a role that its template does not mark, a marker
        without tokens."""
        found: Placed = self._once(scope, lambda: self._placed(scope))
        return found

    def _placed(self, scope: Scope) -> Placed:
        try:
            self._refuse_unmarked(scope)
            part = self._resolved(scope.part)
        except TrimtabError as error:
            raise TrimtabError(f"the scope '{scope}' does not fit {self.name}: {error}") from error
        kind_only = scope.decay is None and not any(
            isinstance(each, Window | Between)
            or (isinstance(each, Word) and each.name not in ("all", "text", "image"))
            for each in parts_of(scope.part)
        )
        roles = any(isinstance(each, Word) and each.name in ROLES for each in parts_of(scope.part))
        reads = scope.by_content or (
            bool(self.images)
            and any(each in (Word("text"), Word("image")) for each in parts_of(scope.part))
        )
        windows = any(isinstance(each, Window) for each in parts_of(scope.part))
        return Placed(
            text=str(scope),
            part=part,
            decay=scope.decay,
            everywhere=scope.everywhere,
            placed=not kind_only,
            reads=reads,
            counts=windows or scope.decay is not None or (scope.by_content and not kind_only),
            after_prompts=not kind_only and scope.part != Word("prompt"),
            plain=scope.plain,
            only_generated=scope.only_generated,
            only_images=scope.only_images,
            looks_ahead=scope.looks_ahead,
            turns=self.turns if roles else None,
            name=self.name,
        )

    def _once(self, key: Any, make: Any) -> Any:
        with self._lock:
            found = self._known.pop(key) if key in self._known else make()
            self._known[key] = found  # behind all that was asked for before
            while len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]
            return found

    # -- words --------------------------------------------------------------------------------

    def _resolved(self, part: Part) -> Any:
        match part:
            case Word(name=name):
                return self._word(name)
            case Between(start=start, end=end):
                return Span(self._variants(start), self._variants(end))
            case Window(of=of, first=first, stop=stop):
                return Window(self._resolved(of), first, stop)
            case Not(of=of):
                return Not(self._resolved(of))
            case And(parts=parts):
                return And(tuple(map(self._resolved, parts)))
            case Or(parts=parts):
                return Or(tuple(map(self._resolved, parts)))
            case TokenIs(ids=ids):
                self._check_ids(ids)
        return part

    def _word(self, name: str) -> Any:
        nothing = Not(Word("all"))
        if name in ("text", "image"):
            images: Any = Images(tuple(sorted(self.images))) if self.images else nothing
            return images if name == "image" else Not(images)
        if name in ROLES:
            turns = self.turns
            if name == "system" and not turns.has_system:
                raise TrimtabError(
                    "its chat template takes no system messages, or writes them into the user's "
                    "turn: take user"
                )
            role = "user" if name == "last_user" else name
            return Turn(turns, role, only_last=name == "last_user")
        if name in ("thinking", "tool_call"):
            return self._span(name) or nothing
        if name == "answer":
            thinking: Any = self._span("thinking")
            return (
                Word("generated") if thinking is None else And((Word("generated"), Not(thinking)))
            )
        return Word(name)

    def _refuse_unmarked(self, scope: Scope) -> None:
        """Refuse a scope that never acts where a model marks no thinking or no calls of tools, and
        say of any other that it takes what the model writes for none."""
        words = {each.name for each in parts_of(scope.part) if isinstance(each, Word)}
        asked = {"answer": "thinking", "thinking": "thinking", "tool_call": "tool_call"}
        for word in sorted(words & asked.keys()):
            name = asked[word]
            if self._span(name) is not None:
                continue
            what = "thinking" if name == "thinking" else "calls of tools"
            why = f"neither its chat template nor its tokenizer marks {what}"
            named = f'name the markers, as in between("<{name}>", "</{name}>")'
            if Scope(_without(scope.part, name)).never:
                raise TrimtabError(f"{why}: {named}")
            warnings.warn(
                f"{self.name} under the scope '{scope}': {why}, so that nothing is taken for it; "
                f"if it has some, {named}",
                TrimtabWarning,
                stacklevel=2,
            )

    def _check_ids(self, ids: Ids) -> None:
        size = len(self.tokenizer)
        beyond = [token for token in ids if token >= size]
        if beyond:
            raise TrimtabError(f"it has no token {beyond[0]}: its ids are 0 to {size - 1}")

    # -- markers ------------------------------------------------------------------------------

    @property
    def thinking(self) -> Span | None:
        """The markers of thinking, None where the model has none."""
        return self._span("thinking")

    def _span(self, name: str) -> Span | None:
        """The markers of thinking or of calls of tools, None where the model has none."""
        found: Span | None = self._once(("span", name), lambda: self._find_span(name))
        return found

    def _find_span(self, name: str) -> Span | None:
        added = self.tokenizer.get_added_vocab()
        template = str(self.tokenizer.chat_template or "")
        pairs = THINKING if name == "thinking" else _TOOL_CALL
        pair = next((pair for pair in pairs if all(mark in added for mark in pair)), None)
        if pair is None:
            pair = next((pair for pair in pairs if all(mark in template for mark in pair)), None)
        if pair is None and name == "thinking" and template:
            pair = self._thoughts()
        return None if pair is None else Span(*map(self._variants, pair))

    def _thoughts(self) -> tuple[str, str] | None:
        """What the template writes around the thoughts of an assistant, if it writes them."""
        for key in _THOUGHTS:
            said = {"role": "assistant", "content": _SAID[1], key: _SAID[2]}
            try:
                text = self._render([{"role": "user", "content": _SAID[0]}, said])
            except TrimtabError:
                continue
            before, thought, after = text.partition(_SAID[2])
            between, answer, _ = after.partition(_SAID[1])
            if thought and answer and before.split() and between.strip():
                return before.split()[-1], between.strip()
        return None

    def _variants(self, mark: Mark) -> tuple[Ids, ...]:
        """The token ids that a marker may be, which depend on what stands around it."""
        if not isinstance(mark, str):
            self._check_ids(mark)
            return (mark,)
        found: tuple[Ids, ...] = self._once(("mark", mark), lambda: self._find_variants(mark))
        return found

    def _find_variants(self, mark: str) -> tuple[Ids, ...]:
        tokenizer, found = self.tokenizer, dict[Ids, None]()
        around = [(before, after) for before in ("", "a", " ", "\n") for after in _BEHIND]
        if not tokenizer.is_fast:
            around = [("", "")]
        for before, after in around:
            made = tokenizer(
                before + mark + after,
                add_special_tokens=False,
                return_offsets_mapping=tokenizer.is_fast,
                verbose=False,
            )
            ids = made["input_ids"]
            if tokenizer.is_fast:
                ids = _inside(ids, made["offset_mapping"], before, mark)
            if ids:
                found[tuple(ids)] = None
        unknown = tokenizer.unk_token_id
        known = tuple(ids for ids in found if unknown is None or unknown not in ids)
        if not known:
            raise TrimtabError(f"its tokenizer has no tokens for the marker {json.dumps(mark)}")
        return known

    # -- turns --------------------------------------------------------------------------------

    @property
    def turns(self) -> Turns:
        """How the turns of a chat are told apart."""
        found: Turns = self._once("turns", self._find_turns)
        return found

    def _find_turns(self) -> Turns:
        if not self.tokenizer.chat_template:
            raise TrimtabError("it has no chat template, which says where turns begin")
        chat = [*zip(("user", "assistant", "user"), _SAID, strict=True)]
        before, to_assistant, to_user, after_user = self._parts(chat)
        after_assistant = self._parts(chat[:2])[-1]
        asked = self._parts(chat[:1], generation=True)[-1]
        ends_user = _common(to_assistant, after_user)
        ends_assistant = _common(to_user, after_assistant)
        answers, asks = to_assistant[len(ends_user) :], to_user[len(ends_assistant) :]
        if asked[: len(ends_user)] == ends_user and len(asked) > len(ends_user):
            answers = _common(answers, asked[len(ends_user) :]) or answers
        markers = dict[Ids, str]()
        # What only ends a turn begins the next one where that has no beginning of its own.
        if ends_user:
            markers[ends_user] = "" if answers else "assistant"
        if ends_assistant:
            markers[ends_assistant] = "" if asks else "user"
        begins = [(answers, "assistant"), (asks, "user")]
        if asks and before[len(before) - len(asks) :] != asks:
            # A first turn that begins otherwise.
            begins.append((self._without_bos(before), "user"))
        for marker, role in begins:
            if marker and markers.get(marker, role) not in (role, ""):
                raise TrimtabError("turns of user and assistant begin alike in its chat template")
            if marker:
                markers[marker] = role
        if not {"user", "assistant"} <= set(markers.values()):
            raise TrimtabError("its chat template does not mark where turns begin")
        system = self._begin_of_system(markers, len(asks) or len(ends_assistant))
        if system:
            markers.setdefault(system, "system")
        bos = self.tokenizer.bos_token_id
        ordered = sorted(markers.items(), key=lambda item: len(item[0]))
        return Turns(
            tuple(ordered),
            has_system=system is not None,
            bare_system=system == (),
            begins=() if bos is None else (bos,),
        )

    def _begin_of_system(self, begins: Mapping[Ids, str], length: int) -> Ids | None:
        """The marker of the system's turn: what the template writes before a system message, of a
        long preface (which may hold a date) as many tokens as the user's marker has; none of them
        where the message comes right at the beginning, None where the template writes it into the
        user's turn or takes none."""
        chat = [*zip(("system", "user"), _SAID, strict=False)]
        try:
            before = self._without_bos(self._parts(chat)[0])
        except TrimtabError:
            return None
        if any(role and _holds(before, marker) for marker, role in begins.items()):
            return None
        return before if len(before) <= 2 * length else before[:length]

    def _without_bos(self, ids: Ids) -> Ids:
        return ids[1:] if ids[:1] == (self.tokenizer.bos_token_id,) else ids

    def _parts(self, chat: Sequence[tuple[str, str]], generation: bool = False) -> list[Ids]:
        """What the template writes before, between and behind the messages of a conversation: what
        does not change with what they say."""
        whole = self._ids(chat, generation)
        places = []
        for i, (role, _) in enumerate(chat):
            before, behind = whole, whole[::-1]
            for said in _INSTEAD:
                found = self._ids([*chat[:i], (role, said), *chat[i + 1 :]], generation)
                if found == whole:
                    raise TrimtabError("its chat template leaves messages out")
                before, behind = _common(before, found), _common(behind, found[::-1])
            places.append((len(before), len(whole) - len(behind)))
        ends = [0, *(behind for _, behind in places)]
        begins = [*(before for before, _ in places), len(whole)]
        return [whole[a:b] for a, b in zip(ends, begins, strict=True)]

    def _ids(self, chat: Sequence[tuple[str, str]], generation: bool) -> Ids:
        messages = self.form.messages(tuple(chat))
        text = self._render(messages, generation)
        made = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tuple(made)

    def _render(self, messages: Sequence[Mapping[str, Any]], generation: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generation,
                **self.form.options,
            )
        except Exception as error:  # a template is a program: it fails as it likes
            said = shown(" ".join(str(error).split()), 200) or type(error).__name__
            roles = ", ".join(str(message["role"]) for message in messages)
            raise TrimtabError(f"its chat template refuses the roles {roles}: {said}") from error
        return text


#: What may stand behind a marker and change its last token.
_BEHIND = ("", "a", " ", "\n", "\n\n")


def _inside(ids: Iterable[int], offsets: Any, before: str, mark: str) -> list[int]:
    """The tokens that a marker is in; none where one of them is also part of a word beside it."""
    start, end = len(before), len(before) + len(mark)
    found = []
    for token, (first, last) in zip(ids, offsets, strict=True):
        if first < end and last > start:
            if (before == "a" and first < start) or (last > end + 2):
                return []
            found.append(token)
    return found


def _common(one: Ids, other: Ids) -> Ids:
    """What two sequences begin with alike."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return one[:length]


def _without(part: Part, name: str) -> Part:
    """A part where a word holds of no token."""
    match part:
        case Word(name=own) if own == name:
            return Not(Word("all"))
        case Window(of=of, first=first, stop=stop):
            return Window(_without(of, name), first, stop)
        case Not(of=of):
            return Not(_without(of, name))
        case And(parts=parts):
            return And(tuple(_without(each, name) for each in parts))
        case Or(parts=parts):
            return Or(tuple(_without(each, name) for each in parts))
    return part


def _holds(ids: Ids, marker: Ids) -> bool:
    return any(ids[i : i + len(marker)] == marker for i in range(len(ids) - len(marker) + 1))
