"""Who writes: a model that is loaded here, or a chat model behind an endpoint; batch by batch, each
with a seed of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from trimtab.contrasts import Prompt, in_words
from trimtab.errors import TrimtabError
from trimtab.evaluation import ChatEndpoint
from trimtab.model import LanguageModel
from trimtab.options import Sampling

#: Who writes: a chat model that is loaded here, or one behind an endpoint.
Writer = LanguageModel | ChatEndpoint


def check_sampling(sampling: Sampling) -> None:
    """Whether texts can be drawn so that they differ."""
    if sampling.max_new_tokens < 1 or sampling.batch_size < 1:
        raise TrimtabError("max_new_tokens and batch_size must be 1 or more")
    if not (math.isfinite(sampling.temperature) and sampling.temperature > 0):
        raise TrimtabError(
            f"temperature must be above 0, not {sampling.temperature}: without chance all texts "
            "would be equal"
        )
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise TrimtabError("top_k must be 0 or more, top_p above 0 and at most 1")


def check_writer(writer: Any, prompt: Prompt, to_do: str) -> None:
    """Whether it can be asked; also that its template takes the messages of a prompt."""
    if isinstance(writer, ChatEndpoint):
        return
    if not isinstance(writer, LanguageModel):
        raise TrimtabError(f"a writer is a LanguageModel or a ChatEndpoint, not {writer!r}")
    if not writer.chats:
        raise TrimtabError(
            f"{writer.name} has no chat template, so it cannot be asked to {to_do}: "
            "give another writer, a chat model or an endpoint"
        )
    try:
        writer.render(prompt)
    except TrimtabError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise TrimtabError(
            f"the chat template of {writer.name} refuses a system message and a question "
            f"({reason}): give another writer"
        ) from error


def write(
    writer: Writer, prompts: Sequence[Prompt], seed: int, sampling: Sampling, least: int = 0
) -> list[str]:
    """One batch of texts, one for each prompt; of a model that is loaded here each has `least` new
    tokens or more. A service is asked with a seed for each text."""
    if isinstance(writer, ChatEndpoint):
        fields = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
        }
        seeds = [{**fields, "seed": seed + number} for number in range(len(prompts))]
        return writer.ask([_messages(prompt) for prompt in prompts], seeds)
    completions = writer.generate(
        list(prompts),
        chat=False,  # messages are rendered all the same, and BOS is taken as it is
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=least,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=seed,
        batch_size=len(prompts),
    )
    return [completion.text for completion in completions]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a service takes it."""
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": role, "content": in_words(text)} for role, text in turns]


def batch_seed(seed: int, label: str, number: int) -> int:
    """A seed of each batch, so that a batch is the same whatever was sampled before it.

    31 bits, because services take no more; each text of a service adds its place in the batch.
    """
    digest = hashlib.sha256(f"{seed}/{label}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def described(writer: Writer) -> dict[str, Any]:
    """Who writes, for records and to tell one piece of work from another."""
    if isinstance(writer, ChatEndpoint):
        return {"url": writer.url, "model": writer.model, "extra": dict(writer.extra)}
    identity = writer.identity
    chat = {} if writer.chat_form.plain else {"chat": writer.chat_form.as_json()}
    return {"model": identity.name, "digest": identity.digest, "dtype": str(writer.dtype), **chat}
