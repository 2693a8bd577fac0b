"""The files that are left beside the report: the steering, its card, samples side by side, and what
to do next, one line each."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from trimtab.contrasts import last_message
from trimtab.errors import TrimtabError, shown
from trimtab.exchange import card_of, is_control_vector, lora_rank
from trimtab.files import write_whole
from trimtab.steering import Steering
from trimtab.wishes.made import Made
from trimtab.wishes.texts import FILE

STEERING, CARD, SAMPLES, NEXT = "steering.safetensors", "README.md", "samples.md", "next.md"
#: What a run of this kind makes, beside what all runs do.
MADE = (STEERING, CARD, SAMPLES, NEXT, FILE, "work.jsonl")
#: Where trained steerings wait for what comes after.
TRAINED = "trained"
_SLUG = re.compile(r"[^a-z0-9]+")
#: Characters of a directory's name.
_LONGEST = 60


def slug(wish: str) -> str:
    """A wish as the name of a directory."""
    return _SLUG.sub("-", wish.lower()).strip("-")[:_LONGEST].strip("-") or "steering"


def check_free(directory: Path) -> None:
    """Refuse a directory with somebody's own files of these names."""
    if (directory / "config.json").exists():
        return
    for name in MADE:
        if (directory / name).exists():
            raise TrimtabError(
                f"{directory} holds {name} but no config.json: choose another directory"
            )


def clear(directory: Path) -> None:
    """Take away what an earlier run of this kind left, but for the contrast."""
    files = [directory / name for name in MADE if name != FILE]
    files.append(directory / f"{FILE}.part")
    files += (directory / TRAINED).glob("*.safetensors")
    for file in files:
        file.unlink(missing_ok=True)


def leave(found: Made, directory: Path, model: str) -> None:
    """Write card, samples and what to do next; the steering is there already."""
    name = f"YOUR-NAME/{slug(directory.name)}"
    texts = {SAMPLES: samples_text(found), NEXT: next_text(found, directory, model, name)}
    if found.chosen is not None:
        texts[CARD] = card_of(directory / STEERING, name)
    for file, text in texts.items():
        write_whole(directory / file, text.encode(), overwrite=True)


def samples_text(found: Made) -> str:
    """What the model writes after each prompt, unsteered, asked, steered."""
    parts = [f"# What it writes: {shown(found.called, 200)}"]
    if not found.written.samples:
        parts.append("Nothing was written: no setting worked, or no prompt is there.")
    for sample in found.written.samples:
        parts.append(f"## {_heading(last_message(sample.prompt))}")
        for name, text in {"unsteered": sample.unsteered, **sample.steered}.items():
            parts.append(f"**{name}**\n\n{_fenced(text)}")
    return "\n\n".join(parts) + "\n"


def _heading(text: str) -> str:
    """A prompt's end in one line, without what Markdown would take for more than text."""
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", shown(" ".join(text.split())[-160:], 160))


def _fenced(text: str) -> str:
    """A text as it is, between more backticks than it has in a row."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _exported(steering: Steering, line: str, directory: Path) -> dict[str, str]:
    """The line for a format that carries the steering exactly, where there is one."""
    if is_control_vector(steering):
        file = shlex.quote(str(directory / "vector.gguf"))
        return {"Export it as a control vector for llama.cpp": f"{line} --to gguf -o {file}"}
    if lora_rank(steering) is not None:
        room = shlex.quote(str(directory / "lora"))
        return {"Export it as a LoRA adapter": f"{line} --to lora -o {room}"}
    return {}


def next_text(found: Made, directory: Path, model: str, repo: str) -> str:
    """One line for each thing to do next, as it is typed in the directory where this was made."""
    if found.chosen is None:
        head = [f"# {shown(found.called, 200)}", found.summary]
        return "\n\n".join([*head, *(f"- {one}" for one in found.advice)]) + "\n"
    steering, contrast = (shlex.quote(str(directory / name)) for name in (STEERING, FILE))
    room, named = shlex.quote(str(directory)), f"--model {shlex.quote(model)}"
    steered = f"{named} --steer {steering}"
    lines = {
        "Try it, beside the model as it is": f"trimtab generate {steered} --compare 'Today I feel'",
        "Chat with it": f"trimtab chat {steered}",
        "Play with its dial in a browser": f"trimtab playground {steered}",
        "Serve it with OpenAI's API": f"trimtab serve {steered} --port 8000",
        "Bake it into a plain checkpoint": (
            f"trimtab bake {steered} -o {shlex.quote(str(directory / 'baked'))}"
        ),
        **_exported(found.chosen.steering, f"trimtab export {steering} {named}", directory),
        "Push it to the hub, under a name of yours": f"trimtab push {steering} {repo}",
        "Measure it again": (
            f"trimtab evaluate {steered} --task contrast:{contrast} -o {room}-evaluated"
        ),
    }
    parts = [f"# {shown(found.called, 200)}: what to do next", found.summary]
    parts += [f"{what}:\n\n```sh\n{line}\n```" for what, line in lines.items()]
    return "\n\n".join(parts) + "\n"
