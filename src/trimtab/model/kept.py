"""What a model has read of a conversation, kept from one call of `generate` to the next.

Keys and values of a token depend on the tokens up to it and on what steered them. So they are used
again as far as a text begins with the same tokens and all of these are steered as they were: by the
same operators, at the same dials. That is looked up token by token, because a scope counts from the
end of the prompt, and what was an answer in one call is prompt in the next.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from trimtab.errors import TrimtabError, shown
from trimtab.model.attach import RowSteerings
from trimtab.model.explaining import scope_weights
from trimtab.model.images import ImageText
from trimtab.model.running import ATTACHED
from trimtab.model.versions import cache_argument

if TYPE_CHECKING:
    from trimtab.model.language_model import LanguageModel

#: A token and what steers it: operators and dials, and how much of the dial it gets.
_Read = tuple[int, tuple[tuple[Any, float], ...]]


class Kept:
    """What a model has read, for `generate([prompt], kept=...)`: one for each conversation.

    Nothing is kept where a state cannot be cut back (Mamba's, a sliding window that has moved on),
    of texts with images, of beams, under gates that decide while the model runs, and inside of
    blocks (`lm.steered`); a text is then read anew. `reused` says of how many tokens of the last
    prompt the reading was there already.
    """

    def __init__(self) -> None:
        self.reused = 0
        self._model: Any = None
        self._cache: Any = None
        self._read: list[_Read] = []
        #: The steerings that `_read` speaks of, so that no other operator takes the place of one.
        self._steerings: RowSteerings = ()

    def begin(
        self, language_model: LanguageModel, prompt: Sequence[int], steerings: RowSteerings
    ) -> dict[str, Any]:
        """The cache with which a prompt (token ids) is read under some steerings, as an argument
        of the model; nothing where none is kept. Until `end` there is nothing to use again."""
        model: Any = language_model.model
        cache, read, before = self._cache, self._read, self._model
        self._cache, self._read, self.reused = None, [], 0
        gated = any(steering.gate is not None for steering in steerings)
        # What blocks of the caller's steer nobody knows afterwards.
        on = ATTACHED.get(language_model.anatomy.body)
        if gated or (on is not None and on.blocks):
            return {}
        if isinstance(prompt, ImageText) or not _takes_cache(model):
            return {}
        same = 0
        if cache is not None and before is model:
            # The last token is read in any case: what comes after it is asked for.
            new = _reading(language_model, steerings, prompt, len(prompt))[:-1]
            same = _common(read, new)
        if not same or not _cut(cache, same):
            cache, same = DynamicCache(config=model.config), 0
        if not all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in cache.layers):
            return {}
        self._model, self._cache, self.reused = model, cache, same
        self._steerings = steerings
        return {cache_argument(model): cache}

    def end(self, language_model: LanguageModel, prompt: int, text: Sequence[int]) -> None:
        """A text (token ids) was read with the cache and written, of which the first `prompt`
        tokens are the prompt."""
        if self._cache is None:
            return
        count = self._cache.get_seq_length()
        if 0 < count <= len(text):
            self._read = _reading(language_model, self._steerings, text, prompt)[:count]
        else:  # the model read something else, or went around the cache
            self._cache = None


def check_kept(kept: Any, prompts: int, beams: int) -> None:
    """Refuse what is none, several prompts, and beams."""
    if not isinstance(kept, Kept):
        raise TrimtabError(f"kept must be a Kept, not {shown(repr(kept), 60)}")
    if prompts != 1 or beams > 1:
        raise TrimtabError("what was read is kept of one prompt, which is written without beams")


def _takes_cache(model: Any) -> bool:
    """Whether a model takes keys and values, and keeps no other state."""
    taken = cache_argument(model) in inspect.signature(model.forward).parameters
    dynamic = getattr(model, "_supports_default_dynamic_cache", lambda: False)()
    return taken and dynamic and not getattr(model, "_is_stateful", True)


def _reading(
    language_model: LanguageModel, steerings: RowSteerings, text: Sequence[int], prompt: int
) -> list[_Read]:
    """Each token of a text, whose first `prompt` ones are the prompt, with what steers it."""
    acting = []
    for steering in steerings:
        for scope in steering.scopes:
            operators = tuple(
                (each.site, id(each.operator), each.weight)
                for each in steering.interventions
                if each.scope == scope
            )
            weights = scope_weights(language_model.marks, scope, text, prompt)
            acting.append(((operators, steering.setting), weights))
    return [
        (token, tuple((what, weights[i]) for what, weights in acting if weights[i]))
        for i, token in enumerate(text)
    ]


def _common(one: Sequence[_Read], other: Sequence[_Read]) -> int:
    """With how many equal tokens, steered alike, two texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _cut(cache: Any, tokens: int) -> bool:
    """Cut a cache back to its first tokens; False where it cannot be."""
    surplus = cache.get_seq_length() - tokens
    windows = [one for one in cache.layers if isinstance(one, DynamicSlidingWindowLayer)]
    if surplus and any(one.get_seq_length() >= one.sliding_window for one in windows):
        return False  # what has left a window does not come back
    if surplus:
        cache.crop(-surplus)
    return True
