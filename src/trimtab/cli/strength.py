"""`trimtab strength`: curves over a dial, budgets, the theory, contrasts for a concept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trimtab.cli.common import (
    Data,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Overwrite,
    Steer,
    console,
    open_model,
    print_json,
    read_prompts,
    read_steerings,
    refuse_existing,
)
from trimtab.contrasts import Contrast, last_message
from trimtab.endpoint import ChatEndpoint
from trimtab.errors import TrimtabError
from trimtab.evaluation import evaluate
from trimtab.fitting import fit
from trimtab.metrics.effect import plain_texts
from trimtab.metrics.judges import Chat, LocalChat
from trimtab.model import LanguageModel, load
from trimtab.steering import Steering, write_whole
from trimtab.strength.budgets import BUDGETS, budget, calibrate
from trimtab.strength.concept import (
    ChatConceptJudge,
    ConceptJudge,
    LexiconJudge,
    concept_curve,
    lexicon,
)
from trimtab.strength.costs import cost_curve
from trimtab.strength.curves import TOLERANCE, at_layers, curve, method_of, resampled
from trimtab.strength.pictures import Accuracy, Curves, draw, save
from trimtab.strength.reading import Bounds, read
from trimtab.strength.turning import limits

app = typer.Typer(
    help="How strong a steering should be: curves over its dial, budgets, theory.",
    no_args_is_help=True,
)

Prompts = Annotated[
    list[str] | None, typer.Argument(help="Prompts; - reads one per line from standard input.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="File of prompts: text lines, or JSONL with `prompt`."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts as they are.")]
AsChat = Annotated[
    bool, typer.Option("--chat", help="Use the chat template (the default where there is one).")
]


@app.command("budget")
def budget_command(
    model: Model,
    prompts: Prompts = None,
    steer: Steer = None,
    file: PromptFile = None,
    raw: Raw = False,
    chat: AsChat = False,
    kl: Annotated[
        list[float] | None,
        typer.Option(help="Nats of KL(unsteered || steered) to allow; repeat with --save."),
    ] = None,
    side: Annotated[str, typer.Option(help="positive, negative or both sides of the dial.")] = (
        "both"
    ),
    beyond_range: Annotated[
        bool, typer.Option(help="Look further than the dial's sensible range.")
    ] = False,
    save_to: Annotated[
        Path | None,
        typer.Option(
            "--save", help="Write the steering here, calibrated: FILE@kl=0.1 then turns its dial."
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The dial at which a steering changes the next token by a given KL, prompt by prompt.

    Example: `trimtab strength budget --model smollm2-135m-instruct --steer formal.safetensors --kl
    0.1 --raw "She looked at the map and"`
    """
    texts = read_prompts(prompts or [], file)
    steering = _one(steer)
    if save_to is not None:
        refuse_existing(save_to, overwrite)
    elif kl and len(kl) > 1:
        raise TrimtabError("several --kl are for a calibration: give one, or --save FILE")
    language_model = open_model(model, dtype, device)
    as_chats = _chat(raw, chat)
    if save_to is not None:
        done = calibrate(language_model, steering, texts, kl or BUDGETS, chat=as_chats, force=force)
        done.save(save_to, overwrite=overwrite)
        _show_calibration(done, save_to, as_json)
        return
    found = budget(
        language_model,
        steering,
        texts,
        (kl or [0.1])[0],
        side=side,  # type: ignore[arg-type]
        chat=as_chats,
        beyond_range=beyond_range,
        force=force,
    )
    if as_json:
        about = {"model": dict(vars(language_model.identity)), "steering": steering.label}
        print_json({"budget": found.as_json(), **about})
        return
    unit, name = steering.dial.unit, steering.dial.name
    for one in (found, found.other):
        if one is None:
            continue
        table = Table("prompt", name, "KL, nats", "", box=None)
        for row in one.per_prompt:
            note = "" if row.reached else "end of the dial"
            note = note if row.in_range else "outside the sensible range"
            text = " ".join(last_message(row.prompt).split())
            text = text if len(text) <= 60 else f"{text[:57]}..."
            table.add_row(text, f"{row.dial:.4g}{unit}", f"{row.kl:.4g}", note)
        console.print(table)
        console.print(
            f"{one.kl:g} nats: {name} {one.dial:.4g}{unit} (median of {len(one.per_prompt)}); 95 % "
            f"of the prompts stay within it at {one.worst5_dial:.4g}{unit}"
        )


def _show_calibration(steering: Steering, path: Path, as_json: bool) -> None:
    found = steering.calibration
    assert found is not None
    if as_json:
        print_json({"calibration": dict(vars(found)), "steering": str(path)})
        return
    sides = [side for side in ("positive", "negative") if getattr(found, side)]
    names = [f"{side} {what}" for side in sides for what in ("median", "95 % within")]
    table = Table("KL, nats", *names, box=None)
    for i, kl in enumerate(found.kl):
        dials = [getattr(found, f"{side}{end}")[i] for side in sides for end in ("", "_worst5")]
        cells = ["not reached" if dial is None else f"{dial:.4g}" for dial in dials]
        table.add_row(f"{kl:g}", *cells)
    console.print(table)
    console.print(f"{path}: calibrated on {found.prompts} prompts; steer with {path}@kl=0.1")


@app.command("curve")
def curve_command(
    model: Model,
    prompts: Prompts = None,
    steer: Steer = None,
    file: PromptFile = None,
    raw: Raw = False,
    chat: AsChat = False,
    span: Annotated[
        str | None, typer.Option("--range", help="LOW:HIGH of the dial (default: its own range).")
    ] = None,
    points: Annotated[int, typer.Option(help="Dials of the next-token curve.")] = 1025,
    tolerance: Annotated[
        float, typer.Option(help="Error in probability between measured dials; 0 measures all.")
    ] = TOLERANCE,
    token: Annotated[
        list[str] | None,
        typer.Option(help="A token to follow, with its space: ' happy'; repeat."),
    ] = None,
    top: Annotated[int, typer.Option(help="Follow the most probable ones at the end.")] = 8,
    contrast: Annotated[
        str | None,
        typer.Option(help="The steering's contrast: log-odds of tokens, --resamples, --layers."),
    ] = None,
    resamples: Annotated[
        int, typer.Option(help="Fit so often on resampled rows, for error bars.")
    ] = 0,
    layers: Annotated[
        int | None, typer.Option(help="Fit at so many layers, from the first to the last.")
    ] = None,
    max_kl: Annotated[float, typer.Option(help="KL in the sweet spot, nats.")] = 1.0,
    min_entropy: Annotated[
        float, typer.Option(help="Entropy in the sweet spot, as a share of the unsteered.")
    ] = 0.5,
    max_entropy: Annotated[float, typer.Option(help="The same from above.")] = 1.5,
    ce: Annotated[bool, typer.Option("--ce", help="Cross-entropy of plain text too.")] = False,
    ce_text: Annotated[
        Path | None, typer.Option(help="Text for it: plain, or JSONL with `text`.")
    ] = None,
    ce_tokens: Annotated[int, typer.Option(help="So many tokens of it.")] = 4096,
    ce_points: Annotated[int, typer.Option(help="Dials of the curve of cross-entropy.")] = 33,
    concept: Annotated[
        str | None, typer.Option(help="Sample completions and judge whether they show this.")
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="Words that show it, for a judge by words: dear,formal*.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="local:MODEL, or chat:NAME at --judge-url.")
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="Base URL of the API.")] = None,
    judge_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API's key.")
    ] = "OPENAI_API_KEY",
    any_of: Annotated[
        bool, typer.Option("--any-of", help="One label for all samples of a prompt.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Completions per prompt and dial.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a completion.")] = 100,
    concept_points: Annotated[int, typer.Option(help="Dials of the concept's curve.")] = 41,
    concept_range: Annotated[
        str | None, typer.Option(help="LOW:HIGH of the concept's curve (default: --range).")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Accuracy of a task over the dial.")
    ] = None,
    task_points: Annotated[int, typer.Option(help="Dials at which the task is evaluated.")] = 9,
    limit: Annotated[int | None, typer.Option(help="Only the first examples of it.")] = None,
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for pictures and JSON.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For sampling and resampling.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Follow a steering over its dial: tokens, KL and entropy, cost, a concept, a task.

    Example: `trimtab strength curve --model smollm2-135m-instruct --steer formal.safetensors --raw
    "She looked at the map and" --ce -o curves`
    """
    texts = read_prompts(prompts or [], file)
    as_chats = _chat(raw, chat)
    given = read_steerings(steer)
    if not given:
        raise TrimtabError("name a steering: --steer FILE")
    bounds = Bounds(max_kl, min_entropy, max_entropy)
    wide = _span(span)
    dials_of_concept = _span(concept_range) or wide
    if output is not None and (output / "curve.json").exists() and not overwrite:
        raise TrimtabError(f"{output} holds curves: choose another directory, or pass --overwrite")
    if (resamples or layers) and contrast is None:
        raise TrimtabError("--resamples and --layers fit anew: name the steering's --contrast")
    if concept is None and (words or judge):
        raise TrimtabError("--words and --judge are for a --concept")
    read_text = _plain(ce_text) if ce or ce_text else []
    source = None if contrast is None else Contrast.load(contrast, data=data, seed=seed)
    language_model = open_model(model, dtype, device)
    labeller = _judge(concept, words, judge, judge_url, judge_key_env, dtype, device)
    if layers is not None:
        assert source is not None
        methods = at_layers(_only(given), language_model.anatomy.layers, layers)
        given = fit(methods, language_model, source)
    found = []
    for steering in given:
        others = []
        if resamples:
            assert source is not None
            others = resampled(language_model, method_of(steering), source, resamples, seed)
        low, high = wide or limits(steering)
        tokens = curve(
            language_model,
            steering,
            texts,
            span=(low, high),
            points=points,
            tokens=token or top,
            tolerance=tolerance,
            chat=as_chats,
            resamples=others,
            contrast=source,
            force=force,
        )
        cost = None
        if read_text:
            cost = cost_curve(
                language_model,
                steering,
                read_text,
                _spaced(low, high, ce_points),
                limit_tokens=ce_tokens,
                force=force,
            )
        shown = None
        if labeller is not None:
            shown = concept_curve(
                language_model,
                steering,
                texts,
                labeller,
                _spaced(*(dials_of_concept or limits(steering)), concept_points),
                samples=samples,
                max_new_tokens=max_new_tokens,
                any_of=any_of,
                chat=as_chats,
                seed=seed,
                force=force,
            )
        accuracy = None
        if task is not None:
            spaced = _spaced(low, high, task_points)
            accuracy = _accuracy(language_model, steering, task, spaced, data, limit, force)
        reading = read(tokens, cost, shown, bounds)
        found.append(Curves(_name(steering), reading, tokens, cost, shown, accuracy))
    documents = [_document(one) for one in found]
    about: dict[str, Any] = {"model": dict(vars(language_model.identity)), "prompts": texts}
    pictures = _write(found, {"curves": documents, **about}, output) if output else []
    if as_json:
        several = {"curves": documents} if len(documents) > 1 else {}
        print_json({**documents[0], **several, **about, "pictures": list(map(str, pictures))})
        return
    for one in found:
        console.print(one.name, style="bold")
        assert one.tokens is not None
        console.print(
            f"{one.tokens.passes} of {len(one.tokens.dials) * one.tokens.prompts} dials run, the "
            f"others within {one.tokens.tolerance:g} in probability",
            style="dim",
        )
        for line in one.reading.lines():
            console.print(line)
        if one.accuracy is not None:
            console.print(_accuracy_line(one.accuracy))
    for path in pictures:
        console.print(f"picture  {path}", style="dim")


@app.command("theory")
def theory_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the pictures and numbers.")
    ] = Path("theory"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The unconstrained-features model that explains the curves: its figures and numbers.

    Example: `trimtab strength theory -o theory`
    """
    from trimtab.strength.ufm_pictures import facts, save_pictures

    if (output / "theory.json").exists() and not overwrite:
        raise TrimtabError(f"{output} holds the theory already: pass --overwrite to draw it again")
    _make(output)
    numbers = facts()
    pictures = save_pictures(output)
    text = json.dumps(numbers, indent=1, allow_nan=False)
    write_whole(output / "theory.json", text.encode(), overwrite=True)
    if as_json:
        print_json({**numbers, "pictures": list(map(str, pictures))})
        return
    for key, value in numbers.items():
        console.print(f"{key}: {value}")
    for path in pictures:
        console.print(f"picture  {path}", style="dim")


@app.command("contrast")
def contrast_command(
    model: Annotated[str, typer.Option("--model", "-m", help="The model that is to be steered.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSONL file to write.")],
    concept: Annotated[str, typer.Option(help="joy, optimistic, or any word of yours.")],
    negatives: Annotated[
        str, typer.Option(help="empty: the model's own text from nothing; or contrastive.")
    ] = "empty",
    count: Annotated[int, typer.Option(min=1, help="Texts of each side.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 300,
    writer: Annotated[
        str | None,
        typer.Option(
            help="Who writes: local:MODEL, or chat:NAME at --writer-url (default: the model)."
        ),
    ] = None,
    writer_url: Annotated[str | None, typer.Option(help="Base URL of the API.")] = None,
    writer_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API's key.")
    ] = "OPENAI_API_KEY",
    seed: Annotated[int, typer.Option(min=0, help="For sampling.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a contrast for a concept by sampling; a run that was interrupted goes on.

    Example: `trimtab strength contrast --model smollm2-135m-instruct --concept joy --count 50
    -o joy.jsonl`
    """
    from trimtab.concepts import generate_contrast

    refuse_existing(output, overwrite)
    language_model = open_model(model, dtype, device)
    author: Any = None
    if writer is not None:
        kind, _, name = writer.partition(":")
        if kind == "local" and name:
            author = load(name, dtype=dtype, device=device)
        elif kind == "chat" and name and writer_url:
            author = ChatEndpoint(writer_url, name, key_variable=writer_key_env)
        else:
            raise TrimtabError(
                f"--writer {writer}: write local:MODEL, or chat:NAME with --writer-url"
            )
    made = generate_contrast(
        language_model,
        concept,
        negatives=negatives,  # type: ignore[arg-type]
        count=count,
        max_new_tokens=max_new_tokens,
        writer=author,
        seed=seed,
        output=output,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"contrast": str(output), "rows": len(made), "digest": made.digest})
        return
    console.print(f"{output}: {len(made)} texts; fit with --contrast {output}")


# -- what the commands share ----------------------------------------------------------------------


def _chat(raw: bool, chat: bool) -> bool | None:
    if raw and chat:
        raise TrimtabError("choose one of --raw and --chat")
    return True if chat else False if raw else None


def _one(steer: Sequence[str] | None) -> Steering:
    return _only(read_steerings(steer))


def _only(steerings: Sequence[Steering]) -> Steering:
    if len(steerings) != 1:
        raise TrimtabError(f"name one steering with --steer, not {len(steerings)}")
    return steerings[0]


def _span(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise TrimtabError(f"--range {text!r}: write LOW:HIGH, as in -20:20") from error
    if not -1e30 < low < high < 1e30:
        raise TrimtabError(f"--range {text!r}: LOW must be below HIGH")
    return low, high


def _spaced(low: float, high: float, points: int) -> list[float]:
    """Evenly spaced dials, and 0 where it lies between them."""
    if points < 2:
        raise TrimtabError(f"a curve needs 2 points or more, not {points}")
    spaced = [low + (high - low) * i / (points - 1) for i in range(points)]
    near = 1e-9 * (high - low)
    inner = [dial for dial in spaced if abs(dial) > near]
    return sorted([*inner, 0.0]) if low <= 0 <= high else spaced


def _plain(path: Path | None) -> list[str]:
    """Texts of a file: one plain text, or JSONL with `text`; without one our own paragraphs."""
    if path is None:
        return plain_texts()
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix != ".jsonl":
                return [lines.read()]
            return [json.loads(line)["text"] for line in lines if line.strip()]
    except OSError as error:
        raise TrimtabError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrimtabError(f'{path} is not text, or JSONL rows {{"text": TEXT}}') from error


def _judge(
    concept: str | None,
    words: str | None,
    judge: str | None,
    url: str | None,
    key_env: str,
    dtype: str,
    device: str,
) -> ConceptJudge | None:
    """The judge that the options name; words where there is no model to ask."""
    if concept is None:
        return None
    if words is not None and judge is not None:
        raise TrimtabError("choose one of --words and --judge")
    if words is not None:
        return LexiconJudge(tuple(word.strip() for word in words.split(",")))
    if judge is None:
        return lexicon(concept)
    kind, _, name = judge.partition(":")
    chat: Chat
    if kind == "local" and name:
        chat = LocalChat(load(name, dtype=dtype, device=device), max_tokens=4)
    elif kind == "chat" and name and url:
        chat = ChatEndpoint(url, name, key_variable=key_env, max_tokens=4)
    else:
        raise TrimtabError(f"--judge {judge}: write local:MODEL, or chat:NAME with --judge-url")
    return ChatConceptJudge(chat, concept)


def _accuracy(
    language_model: LanguageModel,
    steering: Steering,
    task: str,
    dials: Sequence[float],
    data: str | None,
    limit: int | None,
    force: bool,
) -> Accuracy:
    """A task's first metric at each dial."""
    alternatives = {f"{dial:g}": steering.at(dial) for dial in dials}
    done = evaluate(
        language_model, task, steering=alternatives, data=data, limit=limit, force=force
    )
    metric = done.results[0].metric
    rows = [done.value(task, metric, name) for name in alternatives]
    if any(row.value is None for row in rows):
        raise TrimtabError(f"{task} gave no clear answer at one of the dials: narrow --range")
    pairs = [row.ci95 or (row.value, row.value) for row in rows]
    return Accuracy(
        task,
        metric,
        tuple(dials),
        tuple(float(row.value or 0) for row in rows),
        tuple(float(low or 0) for low, _ in pairs),
        tuple(float(high or 0) for _, high in pairs),
        rows[0].n,
        float(done.value(task, metric).value or 0),
    )


def _accuracy_line(found: Accuracy) -> str:
    best = max(range(len(found.dials)), key=lambda i: found.value[i])
    return (
        f"{found.task}, {found.metric}: {found.unsteered:.3g} unsteered, at best "
        f"{found.value[best]:.3g} [{found.low[best]:.3g}, {found.high[best]:.3g}] at "
        f"{found.dials[best]:g} (n {found.n}; chosen on what it is shown on)"
    )


def _name(steering: Steering) -> str:
    sites = [intervention.site for intervention in steering.interventions]
    where = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
    return f"{steering.method} at {where}"


def _document(found: Curves) -> dict[str, Any]:
    """All curves of one steering as JSON."""
    assert found.tokens is not None
    return {
        "name": found.name,
        "curve": found.tokens.as_json(),
        "cost": None if found.cost is None else found.cost.as_json(),
        "concept": None if found.concept is None else found.concept.as_json(),
        "accuracy": None if found.accuracy is None else found.accuracy.as_json(),
        "reading": found.reading.as_json(),
        "words": found.reading.lines(),
    }


def _write(found: Sequence[Curves], document: dict[str, Any], output: Path) -> list[Path]:
    """Pictures, numbers and the texts that were judged, in a directory."""
    _make(output)
    pictures = save(draw(found), output, "curve")
    judged = [dict(text) for one in found if one.concept is not None for text in one.concept.texts]
    if judged:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged)
        write_whole(output / "texts.jsonl", lines.encode(), overwrite=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(output / "curve.json", text.encode(), overwrite=True)
    return pictures


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrimtabError(f"cannot write {directory}: {error.strerror}") from error
