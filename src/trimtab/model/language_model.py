"""A loaded model: generate, logits, and steering for the length of a `with` block."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.checkpoints import baked_already
from trimtab.contrasts import Image, Prompt, images_in, read_prompt
from trimtab.errors import TrimtabError, TrimtabWarning, check_list, shown
from trimtab.model.arguments import (
    Completion,
    Rule,
    SteeringArgument,
    is_for_all,
    per_text,
    row_steerings,
)
from trimtab.model.attach import RowSteerings, attached, attached_by
from trimtab.model.batching import (
    BATCH_TOKENS,
    BATCH_TOKENS_GPU,
    batches_by_length,
    refuse_dropout,
)
from trimtab.model.chats import ChatForm, chat_form, put_otherwise, render
from trimtab.model.decoding import (
    are_sound,
    changed,
    sampling,
    seed_number,
    stop_pattern,
    unsound,
    whole,
    written,
)
from trimtab.model.explaining import Firing, firing
from trimtab.model.gate_reports import Columns, Fired, has_two_pass, reported, settled, watch
from trimtab.model.identity import Weights
from trimtab.model.images import (
    ImageText,
    image_inputs,
    image_tokens,
    model_around,
    processed,
    refuse_bare,
    refuse_unseen,
    with_images,
)
from trimtab.model.kept import Kept, check_kept
from trimtab.model.marks import Marks
from trimtab.model.padding import (
    input_device,
    left_padded,
    pads_generate,
    pads_logits,
    plain_logits,
)
from trimtab.model.passes import Sequences
from trimtab.model.plain import is_quantised
from trimtab.model.questions import answered, probe_texts
from trimtab.model.rules import chooser
from trimtab.model.saving import save_checkpoint
from trimtab.model.streaming import OnText, Pieces, check_on_text, iterated
from trimtab.model.versions import mend_attention
from trimtab.steering import ModelIdentity, Steering
from trimtab.terminal import progress

#: What configurations call the longest text.
_LONGEST = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
#: What is said of models that take texts of any length.
_UNLIMITED = 1 << 20


class LanguageModel:
    """A causal language model of transformers with its tokenizer.

    `model`, `tokenizer` and `processor` stay what they were and may be used directly, also inside
    `steered`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        chat_form: ChatForm = ChatForm(),
        anatomy: Anatomy | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        #: How conversations become text; `with_chat` changes it.
        self.chat_form = chat_form
        #: What was baked into the weights, in order, as `trimtab.json` of a checkpoint says it.
        self.baked: tuple[dict[str, Any], ...] = ()
        #: What makes a model's inputs of images; None where it takes none.
        self.processor: Any = None
        #: Why there is no processor, where there should be one.
        self.no_processor = ""
        self._warned: set[str] = set()
        self._marks: Marks | None = None
        mend_attention(model)
        self.anatomy = Anatomy(model, like=anatomy)
        self._weights = Weights(model)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding table."""
        return input_device(self.model)

    @property
    def batch_tokens(self) -> int:
        """How many tokens to run at once when texts are only read."""
        return BATCH_TOKENS if self.device.type == "cpu" else BATCH_TOKENS_GPU

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def bos(self) -> int | None:
        bos: int | None = self.tokenizer.bos_token_id
        return bos

    @property
    def max_length(self) -> int:
        """The longest text in tokens; a million where the model has no limit (ALiBi, a state)."""
        named = (getattr(self.anatomy.config, name, None) for name in _LONGEST)
        limits = [
            next((limit for limit in named if limit is not None), None),
            # A tokenizer without a limit says so with a number like 1e30.
            self.tokenizer.model_max_length,
        ]
        for limit in limits:
            if not isinstance(limit, int | float | None):
                raise TrimtabError(
                    f"{shown(self.name)} says that its texts have at most {shown(limit, 40)} "
                    "tokens, which is no number: mend model_max_length in tokenizer_config.json"
                )
        return min((int(limit) for limit in limits if limit and limit < 1e9), default=_UNLIMITED)

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in fewer bits; a GGUF model has plain ones once loaded."""
        return is_quantised(self.model)

    @property
    def identity(self) -> ModelIdentity:
        """Name, architecture, sizes and digests of the weights as they are now."""
        anatomy = self.anatomy
        return ModelIdentity(
            self.name, anatomy.name, anatomy.layers, anatomy.hidden_size, *self._weights.digests()
        )

    @property
    def described(self) -> dict[str, Any]:
        """For the configuration of a run: the identity and the dtype."""
        identity = {k: v for k, v in vars(self.identity).items() if k != "plain_digest"}
        chat = {} if self.chat_form.plain else {"chat": self.chat_form.as_json()}
        return {**identity, "dtype": str(self.dtype), **chat}

    def __repr__(self) -> str:
        anatomy, dtype = self.anatomy, str(self.dtype).removeprefix("torch.")
        return (
            f"<LanguageModel {shown(self.name)}: {anatomy.name}, {anatomy.layers} layers of "
            f"{anatomy.hidden_size}, {dtype} on {self.device}>"
        )

    def _repr_html_(self) -> str:
        """For notebooks: what it is, in a small table."""
        from trimtab.reports import Table, tables_html

        anatomy = self.anatomy
        longest = "no limit" if self.max_length == _UNLIMITED else f"{self.max_length:,} tokens"
        template = getattr(self.tokenizer, "chat_template", None)
        rows = [
            ["name", shown(self.name)],
            ["architecture", f"{anatomy.name}, {anatomy.layers} layers of {anatomy.hidden_size}"],
            ["weights", f"{str(self.dtype).removeprefix('torch.')} on {self.device}"],
            ["chat template", "yes" if template else "no: prompts are taken raw"],
            ["longest text", longest],
        ]
        if self.baked:
            rows.append(["baked into it", ", ".join(shown(one["label"]) for one in self.baked)])
        return tables_html([Table("Language model", ["", ""], rows)])

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        model, tokenizer = copy.deepcopy(self.model, memo), copy.deepcopy(self.tokenizer, memo)
        copied = LanguageModel(model, tokenizer, self.name, self.chat_form, self.anatomy)
        copied.baked = self.baked
        copied.processor = copy.deepcopy(self.processor, memo)
        copied.no_processor = self.no_processor
        return copied

    def with_chat(
        self, chat_options: Mapping[str, Any] | None = None, system: str | None = None
    ) -> LanguageModel:
        """The same model in memory, whose conversations are put otherwise: `chat_options` are
        variables of its chat template, as in `{"enable_thinking": False}`, and `system` is the
        system message of every conversation that has none. What is not given is the template's
        default."""
        changed = copy.copy(self)
        changed.chat_form = chat_form(self.tokenizer, self.name, chat_options, system)
        changed._warned = set()
        return changed

    def save_pretrained(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write a plain checkpoint with its tokenizer and processor, whole or not at all.

        Of a baked model `trimtab.json` and the model card (README.md) say what was baked.
        """
        readers = [reader for reader in (self.processor, self.tokenizer) if reader is not None]
        return save_checkpoint(self.model, readers, self.name, directory, overwrite, self.baked)

    @property
    def marks(self) -> Marks:
        """What the words of scopes are in this model's tokens."""
        form, tokenizer = self.chat_form, self.tokenizer
        template = str(getattr(tokenizer, "chat_template", None))
        key = (id(tokenizer), template, form)
        if self._marks is None or self._marks.of != key:
            self._marks = Marks(tokenizer, self.name, form, self.image_tokens, of=key)
        return self._marks

    # -- tokens -------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.chat_template)

    def render(self, prompt: Prompt) -> str:
        """A conversation through the chat template, with the generation prompt, or, where its last
        message is the assistant's, up to that message's end, to be continued; text as it is."""
        if isinstance(prompt, str):
            return prompt
        return render(self.tokenizer, self.name, prompt, self.chat_form)

    def encode(
        self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None
    ) -> list[Sequence[int]]:
        """Token ids of prompts, each with its answer appended to its text as it is.

        A prompt with images is an `ImageText`, which has as many tokens for each as the processor
        gives it, and carries the images along.

        Special tokens are the tokenizer's default; none are added to what already has them (a
        rendered chat, a text that begins with BOS), so BOS is never there twice. None are added at
        the end, where some tokenizers put EOS: these texts go on.
        """
        texts = [self.render(prompt) for prompt in prompts]
        bos = self.tokenizer.bos_token
        bare = [
            not isinstance(prompt, str) or bool(bos and text.startswith(bos))
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        if answers is not None:
            texts = [text + answer for text, answer in zip(texts, answers, strict=True)]
        images = [images_in(prompt) for prompt in prompts]
        encoded: list[Sequence[int]] = [
            self._expanded(text, seen) if seen else []
            for text, seen in zip(texts, images, strict=True)
        ]
        for special in (True, False):
            chosen = [i for i, is_bare in enumerate(bare) if is_bare is not special]
            chosen = [i for i in chosen if not images[i]]
            if chosen:
                ids = self.tokenizer(
                    [texts[i] for i in chosen], add_special_tokens=special, verbose=False
                )["input_ids"]
                closing = self._closing_tokens() if special else 0
                for i, tokens in zip(chosen, ids, strict=True):
                    encoded[i] = tokens[: len(tokens) - closing]
        return encoded

    def _expanded(self, text: str, images: tuple[Image, ...]) -> ImageText:
        """A rendered text with images."""
        self._require_processor()
        found = processed(self.processor, self.name, text, images)
        if self.image_tokens.isdisjoint(found):
            raise TrimtabError(
                f"the chat template of {self.name} leaves images out of the text: it takes none"
            )
        return found

    def _require_processor(self) -> None:
        if self.processor is None:
            why = self.no_processor or (
                "it has no image processor (a model in memory is given one by "
                "wrap(model, tokenizer, processor=...))"
            )
            raise TrimtabError(f"{self.name} takes no images: {why}")

    @property
    def image_tokens(self) -> frozenset[int]:
        """The tokens that stand for images; none of a model of text."""
        return image_tokens(self.model.config)

    def image_inputs(
        self, texts: Sequence[Sequence[int]], side: Literal["left", "right"]
    ) -> dict[str, Tensor]:
        """Arguments of the model for texts with images, padded on one side: token ids, padding
        mask, pixels, and what else its processor makes."""
        self._require_processor()
        seen = [text for text in texts if isinstance(text, ImageText)]
        made = image_inputs(self.processor, self.name, seen, side)
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in made.items()
        }

    def read_with_images(self, texts: Sequence[Sequence[int]]) -> Any:
        """What the transformer body puts out for texts with images, [texts, longest, units];
        padding on the right. The model around the body runs, which puts the images in their
        places."""
        around: Any = model_around(self.model, self.anatomy.body)
        if around is None:
            raise TrimtabError(f"{self.name} has no part that puts images in their places")
        return around(**self.image_inputs(texts, "right"), use_cache=False)

    def refuse_bare(self, texts: Sequence[Sequence[int]]) -> None:
        """Refuse texts that come without the images that tokens in them stand for."""
        refuse_bare(self.image_tokens, texts, self.name)

    def _closing_tokens(self) -> int:
        """How many special tokens the tokenizer adds after a text."""
        bare, whole = (
            self.tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
            for special in (False, True)
        )
        if not bare:
            return 0
        added = len(whole) - len(bare)
        before = next((i for i in range(added) if whole[i : i + len(bare)] == bare), added)
        return added - before

    def prompts(self, prompts: Sequence[Any], chat: bool | None) -> list[Prompt]:
        """Prompts as text or conversations; text becomes a user's message in a chat (default:
        where the model has a chat template)."""
        check_list("prompt", prompts)
        chat = self.chats if chat is None else chat
        read = [read_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts, 1)]
        if not chat:
            return read
        return [(("user", prompt),) if isinstance(prompt, str) else prompt for prompt in read]

    def fitting(self, prompts: Sequence[Prompt], new: int = 0) -> list[Sequence[int]]:
        """Token ids of prompts, none of them empty or too long for `new` tokens more."""
        encoded = self.encode(prompts)
        for prompt, tokens in zip(prompts, encoded, strict=True):
            if not tokens:
                raise TrimtabError(f"the prompt {prompt!r} is empty")
            if len(tokens) + new > self.max_length:
                more = f" and {new} new ones exceed" if new else " exceeds"
                raise TrimtabError(
                    f"a prompt of {len(tokens)} tokens{more} the {self.max_length} tokens that "
                    f"{self.name} takes: shorten it"
                )
        return encoded

    def pads(self, how: Literal["logits", "generate"]) -> bool:
        """Whether texts of different lengths may share a batch that is padded on the left: whether
        each of them then gives what it gives alone. It is asked once, by numbers on a short text.
        """
        ask = partial(pads_logits if how == "logits" else pads_generate, self.model)
        return answered(self.anatomy, ("pads", how), partial(ask, *probe_texts(self.anatomy)))

    def _batches(
        self, texts: Sequence[Sequence[int]], rows: int, how: Literal["logits", "generate"]
    ) -> Iterator[list[int]]:
        """Indices of texts (token ids) that run together; where the model does not pad, texts of
        equal length."""
        lengths = [len(text) for text in texts]
        for chosen in batches_by_length(lengths, rows=rows, apart=with_images(texts)):
            mixed = len({lengths[i] for i in chosen}) > 1
            if mixed and not self.pads(how):
                own = [lengths[i] for i in chosen]
                yield from (
                    [chosen[place] for place in places]
                    for places in batches_by_length(own, rows=rows, equal=True)
                )
            else:
                yield chosen

    def _left_padded(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        if any(with_images(tokens)):
            return self.image_inputs(tokens, "left")
        self.refuse_bare(tokens)
        return left_padded(tokens, self.device)

    # -- steering -----------------------------------------------------------------------------

    @contextmanager
    def steered(self, *steerings: SteeringArgument, force: bool = False) -> Iterator[Sequences]:
        """Steer every pass of the model inside the block, also a raw `lm.model.generate(...)`.

        `steered(a, b)` puts both on all rows, in that order; `steered([a, None, b.at(3)])` gives
        each row of the batch its own. `force` allows a steering made for other weights of the
        same sizes. The hooks are gone when the block ends, however it ends.

        A rule chooses the dial: `steered(tt.within(a, kl=0.1))` finds, whenever the model begins to
        read new texts, the one at which each row's next token is 0.1 nats from the unsteered
        model's.

        The block is its thread's: until it ends, other threads may run the raw model, which is
        steered then, but `steered`, `generate` and `logits` refuse them.
        """
        rule = next((one for one in steerings if isinstance(one, Rule)), None)
        if rule is not None:
            if len(steerings) > 1:
                raise TrimtabError("a rule (a budget) turns one dial: give it alone")
            self.warn_of(rule.steering)
            choose = chooser(partial(rule.dials, self, force=force))
            with attached_by(self.anatomy, rule.steering, self.marks, choose) as sequences:
                yield sequences
            return
        lists: list[Any] = [argument for argument in steerings if not is_for_all(argument)]
        if lists and len(steerings) > 1:
            raise TrimtabError("give steered() either steerings for all rows, or one list of rows")
        rows = list(map(row_steerings, lists[0])) if lists else [row_steerings(steerings)]
        with self._attached(rows, bool(lists), force, block=True) as sequences:
            yield sequences

    def _attached(
        self, rows: Sequence[RowSteerings], per_row: bool, force: bool, block: bool = False
    ) -> AbstractContextManager[Sequences]:
        """One entry of `rows` for all rows of a batch, or (`per_row`) one each. Unless it is a
        `block`, the model is held for one call only, for which others wait."""
        self._check_fit(rows, force)
        pad = self.tokenizer.pad_token_id
        return attached(self.anatomy, rows, self.marks, per_row=per_row, pad=pad, block=block)

    def settled(
        self, rows: Sequence[RowSteerings], prompts: Sequence[Sequence[int]], force: bool
    ) -> tuple[list[RowSteerings], dict[tuple[int, int], Fired]]:
        """As `gate_reports.settled`, for steerings that fit the model, also those whose gate then
        leaves a text alone."""
        if has_two_pass(rows):
            self._check_fit(rows, force)
        return settled(self.anatomy, self.marks, rows, prompts)

    def _check_fit(self, rows: Sequence[RowSteerings], force: bool) -> None:
        unique = {id(steering): steering for row in rows for steering in row}
        if not unique:
            return
        identity = self.identity
        for steering in unique.values():
            self.warn_of(steering)
            steering.check_fits(self.anatomy, identity, force, self.quantised)
            self._refuse_without_images(steering)

    def _refuse_without_images(self, steering: Steering) -> None:
        if not self.image_tokens and any(scope.only_images for scope in steering.scopes):
            raise TrimtabError(
                f"this {shown(steering.method)} steering acts on image tokens, and {self.name} has "
                "none: it reads text only; steer all tokens (steering.on('all'))"
            )

    def warn_of(self, steering: Steering) -> None:
        """Once: it was fitted on conversations put otherwise, or the weights have it already."""
        said = [baked_already(steering, self.name, self.baked)]
        if self.chats:
            said.append(put_otherwise(steering, self.name, self.chat_form))
        for message in said:
            if message and message not in self._warned:
                self._warned.add(message)
                warnings.warn(message, TrimtabWarning, stacklevel=2)

    def held(self, rows: Sequence[RowSteerings], force: bool) -> AbstractContextManager[Sequences]:
        """The model for one batch with steerings of each row, for which other threads wait; what
        all rows share takes less time per token."""
        alike = all(row == rows[0] for row in rows)
        return self._attached(rows[:1] if alike else rows, not alike, force)

    # -- running ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 64,
        chat: bool | None = None,
        steering: SteeringArgument = None,
        seed: int | None = None,
        stop: str | None = None,
        batch_size: int = 16,
        on_text: OnText | None = None,
        force: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Continue prompts: text, or lists of messages {"role", "content"}.

        `chat` puts text through the chat template as a user's message (default: where the model
        has one). `seed` makes sampling repeatable. `stop` is a regular expression: a text ends with
        the token that completes a match of it. `steering` is one for all prompts or a list with one
        per prompt, or a rule that finds each prompt's dial (`tt.within(steering, kl=0.1)`).
        `on_text` is called with a prompt's place and the next piece of its text while that is
        written (`stream` iterates over the pieces of one prompt); there is no progress bar then.
        `options` say how tokens are chosen: `temperature` (0, the default, is greedy), `top_k` (0:
        all), `top_p` (1: all), `min_new_tokens` (before, no text ends by itself), and those of
        transformers by their names there: `repetition_penalty=1.2`, `min_p=0.1`, `num_beams=4`
        (`decoding.OPTIONS` has all). One more, `kept`, is what was read of one prompt, such as a
        conversation, that goes on with the next call: `kept = tt.Kept()`, and the same in each. Of
        the checkpoint's own generation settings only the special tokens are used. Logits that
        cannot choose a token (not finite, or all equal) are an error.
        Returns one `Completion` per prompt, in order.
        """
        min_new_tokens = whole("min_new_tokens", options.pop("min_new_tokens", 0))
        kept: Kept | None = options.pop("kept", None)
        asked = sampling(options, self.anatomy.config.vocab_size)
        pattern = None if stop is None else stop_pattern(stop)
        if on_text is not None:
            check_on_text(on_text, asked.get("num_beams", 1))
        if pattern is not None and asked.get("num_beams", 1) > 1:
            raise TrimtabError("stop ends a text while it is written; beams are compared after it")
        max_new_tokens = whole("max_new_tokens", max_new_tokens)
        batch_size = whole("batch_size", batch_size)
        seed = None if seed is None else seed_number(seed)
        if max_new_tokens < 1 or batch_size < 1:
            raise TrimtabError("max_new_tokens and batch_size must be 1 or more")
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise TrimtabError(
                f"min_new_tokens must be 0 to {max_new_tokens}, not {min_new_tokens}"
            )
        lengths = (min_new_tokens, max_new_tokens)
        wanted = self.prompts(prompts, chat)
        if kept is not None:
            check_kept(kept, len(wanted), asked.get("num_beams", 1))
        tokens = self.fitting(wanted, max_new_tokens)
        asked_rows = self._rows_for(tokens, steering, force)
        rows, decided = self.settled(asked_rows, tokens, force)
        done: dict[int, Completion] = {}
        with (
            torch.random.fork_rng(enabled=seed is not None),
            _progress(len(wanted), on_text is None) as advance,
        ):
            if seed is not None:
                torch.manual_seed(seed)
            for chosen in self._batches(tokens, batch_size, "generate"):
                before = {} if kept is None else kept.begin(self, tokens[0], rows[0])
                with self.held([rows[i] for i in chosen], force) as sequences:
                    inputs = self._left_padded([tokens[i] for i in chosen]) | before
                    sequences.in_part = kept is not None and kept.reused > 0
                    watch(sequences.gates)
                    pieces = None if on_text is None else Pieces(self.tokenizer, chosen, on_text)
                    texts, sound = written(
                        self.model, self.tokenizer, inputs, asked, pattern, lengths, pieces
                    )
                    sequences.ended_at_once = max_new_tokens > 1 and not any(texts)
                if kept is not None:
                    kept.end(self, len(tokens[0]), [*tokens[0], *texts[0]])
                beams, width = asked.get("num_beams", 1), inputs["input_ids"].shape[1]
                for row, (i, new, is_sound) in enumerate(zip(chosen, texts, sound, strict=True)):
                    labels = tuple(steering.label for steering in asked_rows[i])
                    at = Columns(
                        width - len(tokens[i]), width, width + len(new) - 1 if beams == 1 else None
                    )
                    early = {place: each for (of, place), each in decided.items() if of == i}
                    gates = reported(asked_rows[i], early, sequences.gates, row * beams, at)
                    if not is_sound:
                        raise unsound(f"prompt {i + 1}", labels, self.dtype, list(changed(asked)))
                    text = self.tokenizer.decode(new, skip_special_tokens=True)
                    if pieces is not None:
                        pieces.finish(row, text)
                    done[i] = Completion(wanted[i], text, tuple(new), labels, gates)
                advance(len(chosen))
        return [done[i] for i in range(len(wanted))]

    def explain(
        self,
        steering: SteeringArgument,
        prompt: Any,
        *,
        chat: bool | None = None,
        max_new_tokens: int = 16,
        force: bool = False,
    ) -> Firing:
        """Token by token on what a steering (or several) acts: in a prompt, and in the tokens that
        the model writes after it under that steering. `print` shows a table."""
        steerings = row_steerings(steering)
        wanted = self.prompts([prompt], chat)
        (tokens,) = self.fitting(wanted, max_new_tokens)
        new: tuple[int, ...] = ()
        if max_new_tokens:
            (done,) = self.generate(
                wanted,
                chat=chat,
                max_new_tokens=max_new_tokens,
                steering=[steerings],
                force=force,
            )
            new = done.tokens
        self._check_fit([steerings], force)
        return firing(self.anatomy, self.marks, steerings, tokens, new)

    def stream(self, prompt: Any, **arguments: Any) -> Iterator[str]:
        """Continue one prompt, piece by piece: the same text as `generate([prompt], ...)`, with the
        same arguments.

            for piece in lm.stream("Today I feel", steering=steering.at(2)):
                print(piece, end="", flush=True)

        The model writes only while the next piece is waited for, and stops where the loop is left.
        """
        return iterated(
            lambda say: self.generate([prompt], on_text=lambda _, piece: say(piece), **arguments)
        )

    @torch.inference_mode()
    def logits(
        self,
        prompts: Sequence[Any],
        *,
        chat: bool | None = False,
        steering: SteeringArgument = None,
        at: Literal["last", "all"] = "last",
        batch_size: int = 16,
        force: bool = False,
    ) -> Any:
        """Logits in float32: of the token after each prompt, [prompts, vocabulary]; or, with
        `at="all"`, a list with the logits after each token of each prompt, [tokens, vocabulary].
        Logits that are not finite, or all equal, are an error.
        """
        wanted = self.prompts(prompts, chat)
        tokens = self.fitting(wanted)
        rows = self._rows_for(tokens, steering, force)
        rows, _ = self.settled(rows, tokens, force)
        found: dict[int, Tensor] = {}
        seen = with_images(tokens)
        # One by one where there are images, so that the model itself counts positions.
        alone = [[i] for i, sees in enumerate(seen) if sees]
        plain = [i for i, sees in enumerate(seen) if not sees]
        together = self._batches([tokens[i] for i in plain], batch_size, "logits")
        for chosen in (*alone, *([plain[place] for place in places] for places in together)):
            inputs = self._left_padded([tokens[i] for i in chosen])
            with self.held([rows[i] for i in chosen], force):
                count, last = not seen[chosen[0]], at == "last"
                logits = plain_logits(self.model, inputs, last, count).float()
            for i, row in zip(chosen, logits, strict=True):
                found[i] = row[-1] if at == "last" else row[-len(tokens[i]) :]
        ordered = [found[i] for i in range(len(wanted))]
        sound = torch.stack([are_sound(row).all() for row in ordered]).tolist()
        if not all(sound):
            first = sound.index(False)
            labels = [steering.label for steering in rows[first]]
            raise unsound(f"prompt {first + 1}", labels, self.dtype)
        return torch.stack(ordered) if at == "last" else ordered

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits in float32 (of a float64 model in float64) from what the final norm puts out,
        scaled and soft-capped where the model's are."""
        return self.anatomy.unembed(hidden)

    def _rows_for(
        self, texts: Sequence[Sequence[int]], steering: SteeringArgument, force: bool
    ) -> list[RowSteerings]:
        """The steerings of each text (token ids)."""
        refuse_dropout(self.model)
        if not texts:
            raise TrimtabError("there is no prompt")
        if isinstance(steering, Rule):
            refuse_unseen([(steering.steering,)] * len(texts), texts)
            dials = steering.dials(self, texts, force)
            return [(replace(steering.steering, value=dial),) for dial in dials]
        own = per_text(steering, len(texts), "prompts")
        rows = [row_steerings(steering)] * len(texts) if own is None else own
        refuse_unseen(rows, texts)
        return rows


@contextmanager
def _progress(prompts: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar, or nothing beside text that is shown as it comes."""
    if not shown:
        yield lambda steps: None
        return
    with progress("generating", prompts) as advance:
        yield advance
