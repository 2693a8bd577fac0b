"""Trains a GPT of one layer, steers it toward upper-case words, and draws what that does.

    python examples/one_layer_gpt.py --text articles.jsonl -o one-layer

The experiment of figure A.4 of "Towards Understanding Steering Strength" (Taimeskhanov et al.
2026), small enough for two CPU cores: a GPT-2 with one block is trained on a text of yours, with a
tokenizer that is made from that text. So that the concept "upper-case words" is there to be
learnt, a quarter of the sentences (`--share`) is put into upper case, chosen at random. The
steering is the difference of means at the output of the only block: upper-case sentences against
others, each the mean over its tokens. The picture shows how the probabilities of the eight tokens
that are most likely at the largest alpha change on the way there. Theorem 3.3 has most of them
rise and fall again, and a few rise all the way.

The directory then holds the model (`trimtab generate -m one-layer --steer
one-layer/upper-case.safetensors@1 ...`), the steering, and the figure as SVG, PNG and JSON.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import trimtab as tt
from trimtab.files import check_output
from trimtab.strength import Curve, curve
from trimtab.terminal import progress

#: Tokens that the model sees together, and rows of so many in a step of training.
WINDOW = 128
ROWS = 32
#: Share of the documents that training does not see.
HELD_OUT = 0.05
#: The highest learning rate; a short rise at first, then a cosine down to a tenth.
LEARNING_RATE = 3e-3
RISE = 0.05
#: Begins and separates documents.
SEPARATOR = "<|endoftext|>"

#: Sentences on each side of the contrast, and the fewest words of one.
SENTENCES = 500
WORDS = 6
#: Tokens in the figure, and how far their probabilities may be off.
SHOWN = 8
EXACT = 1e-5

CONTEXT = "In the following year he was"

# Okabe and Ito's palette, with line styles: colours are safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True)
class Corpus:
    """Documents with some sentences in upper case, and the sentences, as they are in them."""

    documents: list[str]
    upper: list[str]
    ordinary: list[str]


@dataclass(frozen=True)
class Course:
    """What a token's probability does on the way to the largest alpha."""

    token: str
    upper_case: bool
    change: float  # at the largest alpha
    peak: float  # alpha at which it is most likely
    course: str  # "bump" or "rise"


def main(
    text: Annotated[Path, Parameter(help="Plain text, or .jsonl whose rows have the field text.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The directory to write.")],
    share: Annotated[
        float,
        Parameter(
            validator=Number(gte=0.01, lte=0.99), help="Share of sentences put into upper case."
        ),
    ] = 0.25,
    vocabulary: Annotated[
        int, Parameter(validator=Number(gte=400), help="Tokens of the tokenizer.")
    ] = 4000,
    width: Annotated[
        int, Parameter(validator=Number(gte=16), help="Units of the residual stream.")
    ] = 128,
    heads: Annotated[int, Parameter(validator=Number(gte=1), help="Attention heads.")] = 4,
    steps: Annotated[int, Parameter(validator=Number(gte=1), help="Steps of training.")] = 500,
    alpha: Annotated[float, Parameter(help="The largest alpha of the figure.")] = 50.0,
    context: Annotated[str, Parameter(help="What the next token follows.")] = CONTEXT,
    seed: Annotated[int, Parameter(help="Of upper case, first weights and batches.")] = 0,
    overwrite: Annotated[
        bool, Parameter(name=["--overwrite"], help="Replace an output that exists.")
    ] = False,
) -> None:
    """Train a GPT of one layer, steer it toward upper-case words, draw the figure.

    Example: python examples/one_layer_gpt.py --text articles.jsonl -o one-layer
    """
    started = time.perf_counter()
    check_output(output, overwrite)
    if output.exists() and not output.is_dir():
        raise tt.TrimtabError(f"{output} is a file: name a directory")
    if width % heads:
        raise tt.TrimtabError(f"--width {width} is not a multiple of --heads {heads}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise tt.TrimtabError(f"--alpha must be above 0, not {alpha}")
    corpus = with_upper_case(read_documents(text), share, seed)
    tokenizer = new_tokenizer(corpus.documents, vocabulary)
    contrast = contrast_of(corpus, tokenizer, seed)
    train, held_out = split(corpus.documents, tokenizer, seed)

    model = new_model(tokenizer, width, heads, seed)
    fit(model, train, steps, seed)
    losses = {"train": loss(model, train[: len(held_out)]), "held_out": loss(model, held_out)}
    trained = time.perf_counter()

    lm = tt.wrap(model, tokenizer, output.name)
    steering = tt.CAA(layer=0, token="mean").fit(lm, contrast)
    followed = curve(lm, steering, [context], span=(0.0, alpha), tokens=SHOWN, tolerance=EXACT)
    courses = [course_of(followed, place) for place in range(len(followed.tokens))]
    save(lm, steering, followed, courses, context, losses, output, overwrite)

    print(f"tokens         {len(train)} to train on, {len(held_out)} held out")
    print(
        f"cross-entropy  {losses['train']:.3f} nats in training, {losses['held_out']:.3f} held out"
    )
    print(f"seconds        {time.perf_counter() - started:.0f}, training {trained - started:.0f}")
    print(f"After {context!r}, most likely at alpha = {alpha:g}:")
    for one in courses:
        kind = "upper case" if one.upper_case else ""
        where = f"bump, peak at {one.peak:.1f}" if one.course == "bump" else "rise"
        print(f"  {one.token!r:16} {one.change:+.4f}  {where:22} {kind}")
    print(f"Saved {output}: the model, upper-case.safetensors, figure.svg, .png and .json.")


# -- texts ------------------------------------------------------------------------------------


def read_documents(path: Path) -> list[str]:
    """Documents: rows of a .jsonl file, or the paragraphs of a plain one."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix != ".jsonl":
                documents = re.split(r"\n\s*\n", lines.read())
            else:
                documents = [
                    read_row(line, f"{path}, line {number}")
                    for number, line in enumerate(lines, 1)
                    if line.strip()
                ]
    except OSError as error:
        raise tt.TrimtabError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise tt.TrimtabError(f"{path} is not UTF-8 text: {error}") from error
    return [document for document in documents if document.strip()]


def read_row(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise tt.TrimtabError(f"{where} is not JSON: {error}") from error
    if not (isinstance(row, dict) and isinstance(row.get("text"), str)):
        raise tt.TrimtabError(f"{where} has no field text: each row needs one")
    return str(row["text"])


def with_upper_case(documents: Sequence[str], share: float, seed: int) -> Corpus:
    """Every sentence is put into upper case with a chance of `share`."""
    chance = random.Random(seed)
    changed: list[str] = []
    upper: list[str] = []
    ordinary: list[str] = []
    for document in documents:
        sentences = re.split(r"(?<=[.!?])(\s+)", document)  # with the space between them
        for place in range(0, len(sentences), 2):
            chosen = chance.random() < share
            if chosen:
                sentences[place] = sentences[place].upper()
            sentence = sentences[place].strip()
            if len(sentence.split()) >= WORDS:
                (upper if chosen else ordinary).append(sentence)
        changed.append("".join(sentences))
    return Corpus(changed, upper, ordinary)


def contrast_of(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> tt.Contrast:
    """Upper-case sentences against others, chosen at random; all of them short enough to read."""
    sides = []
    for sentences in (corpus.upper, corpus.ordinary):
        drawn = random.Random(seed).sample(sentences, min(2 * SENTENCES, len(sentences)))
        lengths = (
            [len(ids) for ids in tokenizer(drawn, verbose=False)["input_ids"]] if drawn else []
        )
        fitting = [s for s, length in zip(drawn, lengths, strict=True) if length <= WINDOW]
        if len(fitting) < 2:
            raise tt.TrimtabError(
                "the text has too few sentences for a contrast: give more text, or another --share"
            )
        sides.append(fitting[:SENTENCES])
    return tt.Contrast.from_texts(sides[0], sides[1], "upper-case words")


def new_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text, as GPT-2 has one.

    It sees every document in upper case too, so that upper-case words are whole tokens as often as
    others are, however few of them there are.
    """
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[SEPARATOR],
        show_progress=False,
    )
    bpe.train_from_iterator([*documents, *map(str.upper, documents)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def split(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[Tensor, Tensor]:
    """Token ids of all documents but a few, in random order, and of those few."""
    order = random.Random(seed).sample(list(documents), len(documents))
    held_out: list[int] = []
    train: list[int] = []
    for document in order:
        ids = [tokenizer.bos_token_id, *tokenizer(document, verbose=False)["input_ids"]]
        side = held_out if len(held_out) < HELD_OUT * (len(train) + len(held_out)) else train
        side += ids
    if len(train) < 20 * WINDOW or len(held_out) <= WINDOW:
        raise tt.TrimtabError(
            f"{len(train)} tokens to train on and {len(held_out)} held-out ones are too few: give "
            "more text (blank lines between paragraphs, or .jsonl)"
        )
    return torch.tensor(train), torch.tensor(held_out)


# -- the model --------------------------------------------------------------------------------


def new_model(
    tokenizer: PreTrainedTokenizerFast, width: int, heads: int, seed: int
) -> GPT2LMHeadModel:
    """An untrained GPT-2 with one block."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=WINDOW,
            n_embd=width,
            n_layer=1,
            n_head=heads,
            # No dropout: at this size a model does not learn its text by heart.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fit(model: GPT2LMHeadModel, ids: Tensor, steps: int, seed: int) -> None:
    """Next-token cross-entropy on windows from anywhere in the text."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(
            (step + 1) / (RISE * steps), 0.55 + 0.45 * math.cos(math.pi * step / steps)
        ),
    )
    drawn = windows(ids, seed)
    model.train()
    with progress("training", steps) as advance:
        for _ in range(steps):
            batch = next(drawn)
            optimiser.zero_grad()
            cross_entropy(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            advance(1)
    model.eval()


def cross_entropy(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    """Of each token after those before it, mean in nats."""
    given = batch[:, :-1]
    logits = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def windows(ids: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches without end, [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - WINDOW + 1, (ROWS, 1), generator=generator)
        yield ids[starts + torch.arange(WINDOW)]


@torch.inference_mode()
def loss(model: GPT2LMHeadModel, ids: Tensor) -> float:
    """Cross-entropy in nats per token, over windows one after the other."""
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    sums = [float(cross_entropy(model, batch)) * len(batch) for batch in rows.split(ROWS)]
    return sum(sums) / len(rows)


# -- the figure -------------------------------------------------------------------------------


def course_of(followed: Curve, place: int) -> Course:
    """Whether a token's probability falls again before the end."""
    token = followed.tokens[place]
    top = int(token.delta_p.argmax())
    peak = float(followed.dials[top])
    last = float(token.delta_p[-1])
    # The last per cent is no fall: all curves flatten out, as the final norm takes over.
    highest = token.base_p + float(token.delta_p[top])
    falls = float(token.delta_p[top]) - last > 0.01 * highest
    letters = [letter for letter in token.token if letter.isalpha()]
    upper_case = bool(letters) and all(letter.isupper() for letter in letters)
    return Course(token.token, upper_case, last, peak, "bump" if falls else "rise")


def draw(followed: Curve, courses: Sequence[Course], context: str) -> Figure:
    """Change of each token's probability over alpha; a dot at each peak."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes: Any = figure.subplots()
        for place, (token, course) in enumerate(zip(followed.tokens, courses, strict=True)):
            style = {"color": COLOURS[place], "linewidth": 1.6}
            label = f"{course.token!r} ({course.course})"
            axes.plot(
                followed.dials,
                token.delta_p,
                linestyle="-" if course.upper_case else "--",
                label=label,
                **style,
            )
            if course.course == "bump":
                axes.plot(course.peak, token.delta_p.max(), "o", markersize=4, color=COLOURS[place])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            xlabel="alpha",
            ylabel="change of next-token probability",
            title=f"A GPT of one layer, steered toward upper-case words\nafter “{context}”",
        )
        axes.spines["right"].set_visible(False)
        figure.legend(
            loc="outside right upper",
            frameon=False,
            fontsize=9,
            title="solid: upper case",
            title_fontsize=9,
        )
    return figure


# -- the output -------------------------------------------------------------------------------


def save(
    lm: tt.LanguageModel,
    steering: tt.Steering,
    followed: Curve,
    courses: Sequence[Course],
    context: str,
    losses: dict[str, float],
    output: Path,
    overwrite: bool,
) -> None:
    """A directory with all of it, the model first (whole or not at all)."""
    figure = draw(followed, courses, context)
    document = {
        "context": context,
        "cross_entropy": losses,
        "parameters": lm.model.num_parameters(),
        "courses": [asdict(course) for course in courses],
        "curve": followed.as_json(),
    }
    lm.save_pretrained(output, overwrite=overwrite)
    try:
        steering.save(output / "upper-case.safetensors", overwrite=True)
        for kind in ("svg", "png"):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, dpi=150)
            (output / f"figure.{kind}").write_bytes(drawn.getvalue())
        text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
        (output / "figure.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise tt.TrimtabError(f"cannot write to {output}: {error.strerror or error}") from error


# -- the command line -------------------------------------------------------------------------


def run() -> int:
    """The command; a mistake is one line on standard error, and exit status 2."""
    app = App(default_command=main)
    transformers_logging.disable_progress_bar()
    try:
        app(exit_on_error=False, print_error=False, result_action="return_none")
    except (tt.TrimtabError, CycloptsError) as error:
        hint = " (see --help)" if isinstance(error, CycloptsError) else ""
        print("one_layer_gpt:", " ".join(str(error).split()) + hint, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
