"""`trimtab strength curve`: all that changes over a steering's dial, measured, read and drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.common import (
    AsChat,
    Data,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Overwrite,
    PromptFile,
    Prompts,
    Raw,
    Steer,
    as_chats,
    console,
    make_directory,
    one_steering,
    open_model,
    print_json,
    read_prompts,
    read_steerings,
    refuse_holding,
)
from trimtab.errors import TrimtabError
from trimtab.evaluation import Chat, ChatEndpoint, LocalChat, load_contrast
from trimtab.files import json_object, write_whole
from trimtab.fitting import fit
from trimtab.model import load
from trimtab.reports import save_figure
from trimtab.steering import Steering
from trimtab.strength import (
    TOLERANCE,
    Accuracy,
    Bounds,
    ChatConceptJudge,
    ConceptJudge,
    Curves,
    LexiconJudge,
    accuracy_curve,
    at_layers,
    concept_curve,
    cost_curve,
    curve,
    dial_limits,
    draw,
    lexicon,
    method_of,
    read,
    resampled,
    spaced,
)
from trimtab.sweeps import plain_texts


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
        int, typer.Option(min=0, help="Fit so often on resampled rows, for error bars.")
    ] = 0,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Fit at so many layers, from the first to the last.")
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
    chats = as_chats(raw, chat)
    texts = read_prompts(prompts or [], file)
    steerings = read_steerings(steer)
    if not steerings:
        raise TrimtabError("name a steering: --steer FILE")
    bounds = Bounds(max_kl, min_entropy, max_entropy)
    most = max(points, ce_points, concept_points, task_points)
    if most > _MOST_POINTS:
        raise TrimtabError(f"a curve has {_MOST_POINTS} points at most, not {most}")
    wide = _span(span, "--range")
    concept_wide = _span(concept_range, "--concept-range") or wide
    if (resamples or layers is not None) and contrast is None:
        raise TrimtabError("--resamples and --layers fit anew: name the steering's --contrast")
    if concept is None and (words or judge):
        raise TrimtabError("--words and --judge are for a --concept")
    if output is not None:
        refuse_holding(output, "curve.json", overwrite, {"curves", "model"})
    read_text = _plain(ce_text) if ce or ce_text else []
    source = None if contrast is None else load_contrast(contrast, data=data, seed=seed)
    labeller = _judge(concept, words, judge, judge_url, judge_key_env, dtype, device)
    language_model = open_model(model, dtype, device)
    if layers is not None:
        assert source is not None
        methods = at_layers(one_steering(steerings), language_model.anatomy.layers, layers)
        steerings = fit(methods, language_model, source)
    found = []
    for steering in steerings:
        low, high = wide or dial_limits(steering)
        accuracy, others, cost, shown = None, [], None, None
        if task is not None:  # first, because it finds out whether there is such a task
            dials = spaced((low, high), task_points)
            accuracy = accuracy_curve(
                language_model, steering, task, dials, data=data, limit=limit, force=force
            )
        if resamples:
            assert source is not None
            others = resampled(language_model, method_of(steering), source, resamples, seed)
        tokens = curve(
            language_model,
            steering,
            texts,
            span=(low, high),
            points=points,
            tokens=token or top,
            tolerance=tolerance,
            chat=chats,
            resamples=others,
            contrast=source,
            force=force,
        )
        if read_text:
            cost = cost_curve(
                language_model,
                steering,
                read_text,
                _denser(spaced((low, high), ce_points)),
                limit_tokens=ce_tokens,
                force=force,
            )
        if labeller is not None:
            shown = concept_curve(
                language_model,
                steering,
                texts,
                labeller,
                spaced(concept_wide or (low, high), concept_points),
                samples=samples,
                max_new_tokens=max_new_tokens,
                any_of=any_of,
                chat=chats,
                seed=seed,
                force=force,
            )
        reading = read(tokens, cost, shown, bounds)
        found.append(Curves(_name(steering), reading, tokens, cost, shown, accuracy))
    documents = [{**one.as_json(), "words": one.reading.lines()} for one in found]
    about: dict[str, Any] = {"model": dict(vars(language_model.identity)), "prompts": texts}
    pictures = _write(found, {"curves": documents, **about}, output) if output else []
    if as_json:
        several = {"curves": documents} if len(documents) > 1 else {}
        print_json({**documents[0], **several, **about, "pictures": list(map(str, pictures))})
        return
    for one in found:
        _print_curves(one)
    for path in pictures:
        console.print(f"picture  {path}", style="dim")


def _print_curves(found: Curves) -> None:
    console.print(found.name, style="bold")
    assert found.tokens is not None
    console.print(
        f"{found.tokens.passes} of {len(found.tokens.dials) * found.tokens.prompts} dials run, the "
        f"others within {found.tokens.tolerance:g} in probability",
        style="dim",
    )
    for line in found.reading.lines():
        console.print(line)
    if found.accuracy is not None:
        console.print(_accuracy_line(found.accuracy))


#: More points than this are a slip of the finger.
_MOST_POINTS = 10_000


def _span(text: str | None, option: str) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise TrimtabError(f"{option} {text!r}: write LOW:HIGH, as in -20:20") from error
    if not -1e30 < low < high < 1e30:
        raise TrimtabError(f"{option} {text!r}: LOW must be below HIGH")
    return low, high


def _denser(dials: list[float]) -> list[float]:
    """The dials and some more around 0, where the cost's curvature is read."""
    step = dials[1] - dials[0]
    near = [side * step / 2**i for i in range(1, 5) for side in (-1, 1)]
    return sorted({*dials, *(dial for dial in near if dials[0] < dial < dials[-1])})


def _plain(path: Path | None) -> list[str]:
    """Texts of a file: one plain text, or JSONL with `text`; without one our own paragraphs."""
    if path is None:
        return plain_texts()
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix != ".jsonl":
                return [lines.read()]
            return [json_object(line, str(path))["text"] + "" for line in lines if line.strip()]
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


def _accuracy_line(found: Accuracy) -> str:
    pairs = zip(found.figures, found.dials, strict=True)
    best, dial = max(pairs, key=lambda pair: pair[0].value)
    return (
        f"{found.task}, {found.metric}: {found.unsteered:.3g} unsteered, at best "
        f"{best.value:.3g} [{best.low:.3g}, {best.high:.3g}] at {dial:g} (n {best.n}; chosen on "
        "what it is shown on)"
    )


def _name(steering: Steering) -> str:
    sites = [intervention.site for intervention in steering.interventions]
    where = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
    return f"{steering.method} at {where}"


def _write(found: Sequence[Curves], document: dict[str, Any], output: Path) -> list[Path]:
    """Pictures, numbers and the texts that were judged, in a directory."""
    make_directory(output)
    pictures = save_figure(draw(found), output, "curve")
    judged = [dict(text) for one in found if one.concept is not None for text in one.concept.texts]
    if judged:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged)
        write_whole(output / "texts.jsonl", lines.encode(), overwrite=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(output / "curve.json", text.encode(), overwrite=True)
    return pictures
