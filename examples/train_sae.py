"""Trains a small TopK sparse autoencoder (SAE) on the residual stream of a model.

    python examples/train_sae.py --text articles.jsonl --text builtin:formality -o sae-12

reads the output of one block at every token of the texts, trains SAELens' TopK autoencoder on it
(Gao et al. 2024, arXiv:2406.04093) and leaves it in a directory that SAELens reads:

    sae = SAE.load_from_disk("sae-12")
    features = sae.encode(residual)  # [..., units] as the model has them -> [..., features]

Needs `pip install sae-lens`. With 200,000 tokens of text and the small model that is the default it
takes about four minutes on two CPU cores; a larger model or autoencoder wants a GPU.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from torch import Tensor
from transformers.utils import logging as transformers_logging

import trimtab as tt
from trimtab.anatomy import Enough, hooked, parse_site
from trimtab.contrasts import Prompt, builtins
from trimtab.files import check_output
from trimtab.terminal import progress

if TYPE_CHECKING:
    from sae_lens import SAE, TopKTrainingSAE

#: Tokens that the model sees together; longer texts are cut into windows of so many.
WINDOW = 256
#: Share of the tokens, in whole passages, that training does not see.
HELD_OUT = 0.1
#: One or two tokens in ten thousand carry activations a hundred times the usual size, most of all
#: variance (Sun et al. 2024, arXiv:2402.17762). Norms beyond so many medians are left out.
MASSIVE = 3.0

#: Residuals shown in training, in as many passes over the tokens as that takes.
SHOWN = 400_000
BATCH = 1024
#: The highest learning rate; a short rise at first, and a fall to zero in the second half.
LEARNING_RATE = 2e-3
RISE, FALL = 0.05, 0.5
#: A feature that fired in none of so many batches is dead: the auxiliary loss revives it.
DEAD_AFTER = 100

#: What belongs together, as prompts with their answers: a pair, a row, a paragraph. A passage is
#: either trained on or held out, so that no held-out token stands in a text that was trained on.
Passage = list[tuple[Prompt, str]]


@dataclass(frozen=True)
class Quality:
    """What a finished autoencoder does on held-out tokens."""

    explained: float  # fraction of variance explained
    l0: float  # features that are active at a token, on average
    dead: float  # share of features that are active at no token


def main(
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The directory to write.")],
    model: Annotated[
        str,
        Parameter(name=["--model", "-m"], help="A pack, a directory, a .gguf file or a hub id."),
    ] = "smollm2-135m-instruct",
    layer: Annotated[
        int | None, Parameter(help="The block whose output is read; else at 40 % depth.")
    ] = None,
    text: Annotated[
        list[str] | None,
        Parameter(
            help="Plain text, .jsonl (every field with a space in it is a text), or builtin:NAME "
            "(the train part of a contrast); repeat for more. Else all that trimtab brings."
        ),
    ] = None,
    features: Annotated[
        int, Parameter(validator=Number(gte=1), help="Size of the dictionary.")
    ] = 4096,
    k: Annotated[
        int, Parameter(validator=Number(gte=1), help="Features that are active at a token.")
    ] = 32,
    tokens: Annotated[
        int, Parameter(validator=Number(gte=1), help="Tokens to train on, at most.")
    ] = 200_000,
    seed: Annotated[int, Parameter(help="Of the texts' order and the first weights.")] = 0,
    overwrite: Annotated[
        bool, Parameter(name=["--overwrite"], help="Replace an output that exists.")
    ] = False,
) -> None:
    """Train a small TopK sparse autoencoder on the output of one block, for SAELens.

    Example: python examples/train_sae.py --text articles.jsonl -o sae-12
    """
    started = time.perf_counter()
    check_output(output, overwrite)
    if output.exists() and not output.is_dir():
        raise tt.TrimtabError(f"{output} is a file: name a directory")
    if k > features:
        raise tt.TrimtabError(f"--k {k} is larger than --features {features}: choose a smaller k")
    check_sae_lens()
    passages = read_passages(text)
    lm = tt.load(model)
    depth = int(0.4 * lm.anatomy.layers) if layer is None else layer
    site = lm.anatomy.sites("resid", (depth,))[0]

    train, held_out = split(lm, passages, tokens, seed)
    residuals, tests = (read_residuals(lm, site, windows) for windows in (train, held_out))
    read = time.perf_counter()
    residuals, tests, left_out = without_massive(residuals, tests)
    sae = new_sae(lm, site, features, k, seed, len(residuals))
    fit(sae, residuals, seed)
    trained = time.perf_counter()
    quality = save(sae, output, tests)

    print(f"explained variance  {quality.explained:.3f} of {len(tests)} held-out tokens")
    print(f"L0                  {quality.l0:.1f} (k is {k})")
    print(f"dead features       {quality.dead:.1%} of {features} fire on no held-out token")
    print(f"tokens              {len(residuals)}; {left_out} massive ones left out")
    print(
        f"seconds             {time.perf_counter() - started:.0f}: reading {read - started:.0f}, "
        f"training {trained - read:.0f}"
    )
    print(f"Saved {output}: SAE.load_from_disk({str(output)!r}) reads {site} of {lm.name}.")


# -- texts ------------------------------------------------------------------------------------


def read_passages(sources: Sequence[str] | None) -> list[Passage]:
    """The passages of all sources, or of everything that trimtab brings."""
    if sources is not None:
        return [passage for source in sources for passage in read_source(source)]
    plain = (files("trimtab") / "data" / "plain.txt").read_text(encoding="utf-8")
    contrasts = [passage for name in builtins() for passage in read_source(f"builtin:{name}")]
    return contrasts + [[(line, "")] for line in plain.splitlines()]


def read_source(source: str) -> list[Passage]:
    """The passages of one --text."""
    if source.startswith("builtin:"):
        pairs = tt.load_contrast(source).train.pairs
        return [[(p.prompt, p.positive), (p.prompt, p.negative)] for p in pairs]
    try:
        with Path(source).open(encoding="utf-8-sig") as lines:
            if source.endswith(".jsonl"):
                # Line by line, not by str.splitlines(): texts may hold U+2028 and the like.
                passages = [
                    read_row(line, f"{source}, line {number}")
                    for number, line in enumerate(lines, 1)
                    if line.strip()
                ]
            else:
                paragraphs = re.split(r"\n\s*\n", lines.read())
                passages = [[(paragraph, "")] for paragraph in paragraphs if paragraph.strip()]
    except OSError as error:
        raise tt.TrimtabError(f"cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise tt.TrimtabError(f"{source} is not UTF-8 text: {error}") from error
    if not any(passages):
        raise tt.TrimtabError(f"{source} has no text: give another file")
    return passages


def read_row(line: str, where: str) -> Passage:
    """The texts of one JSON object: a field without a space is a name or a label, and no text."""
    try:
        row = json.loads(line)
        # JSON can escape half a surrogate pair, which is no text.
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise tt.TrimtabError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise tt.TrimtabError(f"{where} is not a JSON object: write one on each line")
    return [(text, "") for text in row.values() if isinstance(text, str) and " " in text.strip()]


def split(
    lm: tt.LanguageModel, passages: Sequence[Passage], tokens: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of token ids to train on, and held-out ones: passages in random order."""
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    trained = kept = 0
    for passage in random.Random(seed).sample(list(passages), len(passages)):
        if trained >= tokens:
            break
        found = windows(lm, passage)
        if kept < HELD_OUT * trained:
            held_out += found
            kept += count(found)
        else:
            train += found
            trained += count(found)
    while trained > tokens:  # the last passage may be long
        trained -= count([train.pop()])
    if trained < BATCH or not kept:
        raise tt.TrimtabError(
            f"{trained} tokens to train on and {kept} held-out ones are too few: give more text "
            "(--text; blank lines between paragraphs, or .jsonl), or a larger --tokens"
        )
    if trained < 0.9 * tokens:
        print(f"The texts have {trained} tokens to train on, fewer than --tokens {tokens}.")
    return train, held_out


def windows(lm: tt.LanguageModel, passage: Passage) -> list[list[int]]:
    """A passage as windows of token ids, each with the BOS where the tokenizer puts one."""
    found = []
    length = min(WINDOW, lm.max_length)
    prompts, answers = [prompt for prompt, _ in passage], [answer for _, answer in passage]
    encoded = lm.encode(prompts, answers) if passage else []
    for tokens in encoded:
        ids = list(tokens)
        start = ids[:1] if ids[:1] == [lm.bos] else []
        step = length - len(start)
        for first in range(len(start), len(ids), step):
            found.append(start + ids[first : first + step])
    return found


def count(token_windows: Sequence[Sequence[int]]) -> int:
    """Tokens whose residuals are used: all but the first of each window."""
    return sum(len(window) - 1 for window in token_windows)


# -- residuals --------------------------------------------------------------------------------


@torch.inference_mode()
def read_residuals(
    lm: tt.LanguageModel, site: str, token_windows: Sequence[Sequence[int]]
) -> Tensor:
    """The activations of a site at every token but the first of each window, [tokens, units].

    All attend to the first token of a text, and whatever token it is, its residual is many times
    larger than any other and says nothing of the text.
    """
    found = []
    with progress("reading residuals", len(token_windows)) as advance:
        for ids, used in batches(token_windows, lm.batch_tokens):
            activation = activation_of(lm, site, ids.to(lm.device))
            found.append(activation[used.to(activation.device)].float().cpu())
            advance(len(ids))
    return torch.cat(found)


def activation_of(lm: tt.LanguageModel, site: str, ids: Tensor) -> Tensor:
    """One pass up to the site; its activation, [rows, tokens, units]."""
    seen: list[Tensor] = []

    def keep(activation: Tensor) -> None:
        seen.append(activation)
        raise Enough

    with hooked(lm.anatomy.body, {lm.anatomy.point(site): keep}), suppress(Enough):
        lm.anatomy.body(input_ids=ids, use_cache=False)
    return seen[0]


def batches(
    token_windows: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids padded on the right, which a causal model does not see, and which are used."""
    waiting = sorted(token_windows, key=len, reverse=True)
    while waiting:
        longest = len(waiting[0])
        rows = waiting[: max(1, max_tokens // longest)]
        waiting = waiting[len(rows) :]
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        places = torch.arange(longest)
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        yield ids, (places > 0) & (places < lengths)


def without_massive(residuals: Tensor, tests: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both without tokens of massive activations, and how many those were."""
    limit = MASSIVE * residuals.norm(dim=-1).median()
    kept = [side[side.norm(dim=-1) <= limit] for side in (residuals, tests)]
    return kept[0], kept[1], len(residuals) + len(tests) - len(kept[0]) - len(kept[1])


# -- the autoencoder --------------------------------------------------------------------------


def check_sae_lens() -> None:
    """SAELens need not be there; its absence shows before minutes of work."""
    try:
        import sae_lens  # noqa: F401
    except ImportError as error:
        raise tt.TrimtabError("sae-lens is not installed: pip install sae-lens") from error


def new_sae(
    lm: tt.LanguageModel, site: str, features: int, k: int, seed: int, tokens: int
) -> TopKTrainingSAE:
    """An untrained autoencoder that knows which model and site it is for."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(
        model_name=lm.name,
        model_digest=lm.identity.digest,
        hook_name=f"blocks.{parse_site(site)[0]}.hook_resid_post",
        context_size=WINDOW,
        prepend_bos=lm.encode(["a"])[0][0] == lm.bos,
        training_tokens=tokens,
        seed=seed,
    )
    torch.manual_seed(seed)
    return TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=lm.anatomy.width(site),
            d_sae=features,
            k=k,
            device=str(lm.device),
            # Rows of norm 1, the encoder their transpose: from the first step on every feature
            # reads what it writes, and hardly any dies.
            decoder_init_norm=1.0,
            metadata=metadata,
        )
    )


def fit(sae: TopKTrainingSAE, residuals: Tensor, seed: int) -> None:
    """Train on scaled residuals, then fold the scale in, so that the autoencoder reads raw ones."""
    from sae_lens.saes.sae import TrainStepInput

    mean = residuals.mean(0)
    # Centred residuals get the norm of standard normal ones: the learning rate suits any model.
    spread = torch.stack([(part - mean).norm(dim=-1).sum() for part in residuals.split(BATCH)])
    scale = float(residuals.shape[1] ** 0.5 * len(residuals) / spread.sum())
    with torch.no_grad():
        sae.b_dec.copy_(mean * scale)
    steps = max(SHOWN, len(residuals)) // BATCH
    optimiser = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / (RISE * steps), (1 - step / steps) / FALL)
    )
    silent = torch.zeros(sae.cfg.d_sae, device=sae.device)  # batches since each feature fired
    drawn = shuffled_batches(residuals, seed)
    with progress("training", steps) as advance:
        for step in range(steps):
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=next(drawn).to(sae.device) * scale,
                    coefficients={},
                    dead_neuron_mask=silent > DEAD_AFTER,
                    n_training_steps=step,
                    is_logging_step=False,
                )
            )
            optimiser.zero_grad()
            output.loss.backward()
            optimiser.step()
            schedule.step()
            fired = (output.feature_acts.detach() > 0).any(0)
            silent = torch.where(fired, 0.0, silent + 1)
            advance(1)
    sae.fold_activation_norm_scaling_factor(scale)


def shuffled_batches(residuals: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches without end; every pass takes the tokens in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(residuals), generator=generator)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield residuals[order[start : start + BATCH]]


def save(sae: TopKTrainingSAE, output: Path, tests: Tensor) -> Quality:
    """Write the inference form with decoder rows of norm 1; measure what a reader will get."""
    from sae_lens import SAE

    try:
        with tempfile.TemporaryDirectory(dir=output.absolute().parent) as room:
            written = sae.save_inference_model(room)
            quality = measure(SAE.load_from_disk(room, device=str(sae.device)), tests)
            output.mkdir(exist_ok=True)
            for path in written:
                os.replace(path, output / path.name)
    except OSError as error:
        raise tt.TrimtabError(f"cannot write {output}: {error.strerror or error}") from error
    return quality


@torch.inference_mode()
def measure(sae: SAE[Any], tests: Tensor) -> Quality:
    """How well raw residuals, [tokens, units], are rebuilt, and by how many features."""
    mean = tests.mean(0).to(sae.device)
    error = variance = 0.0
    active = torch.zeros(sae.cfg.d_sae, device=sae.device)  # tokens at which a feature is active
    for part in tests.to(sae.device).split(BATCH):
        acts = sae.encode(part)
        error += float((sae.decode(acts) - part).square().sum())
        variance += float((part - mean).square().sum())
        active += (acts > 0).sum(0)
    dead = float((active == 0).double().mean())
    return Quality(1 - error / variance, float(active.sum()) / len(tests), dead)


# -- the command line -------------------------------------------------------------------------


def run() -> int:
    """The command; a mistake is one line on standard error, and exit status 2."""
    app = App(default_command=main)
    transformers_logging.disable_progress_bar()
    try:
        app(exit_on_error=False, print_error=False, result_action="return_none")
    except (tt.TrimtabError, CycloptsError) as error:
        hint = " (see --help)" if isinstance(error, CycloptsError) else ""
        print("train_sae:", " ".join(str(error).split()) + hint, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
