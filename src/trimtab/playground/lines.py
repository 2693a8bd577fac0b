"""What the page shows as lines that run elsewhere: Python, the command line, curl, llama.cpp."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from trimtab.exchange import is_control_vector
from trimtab.model import LanguageModel
from trimtab.playground.bodies import LinesBody, Turned
from trimtab.playground.shelf import Shelf
from trimtab.steering import Steering


def lines(language_model: LanguageModel, shelf: Shelf, body: LinesBody) -> dict[str, str]:
    """The same question under the same steerings, by the name of where it is asked."""
    steerings = [shelf.steering(one.name) for one in body.steerings]
    model = language_model.name
    return {
        "python": _python(model, shelf, body),
        "cli": _cli(model, shelf, body),
        "curl": _curl(model, shelf, body),
        "llama.cpp": _llama(model, shelf, body, steerings),
    }


def _file(shelf: Shelf, name: str) -> str:
    """The file of a steering, without a dial."""
    file = shelf.files[name]
    head, at, _ = file.rpartition("@")
    return head if at and head.endswith(".safetensors") else file


def _python(model: str, shelf: Shelf, body: LinesBody) -> str:
    names, said = [], []
    for number, one in enumerate(body.steerings):
        name = "steering" if len(body.steerings) == 1 else f"steering_{number + 1}"
        turned = f"tt.Steering.load({json.dumps(_file(shelf, one.name))})"
        if one.scope:
            turned += f".scoped({json.dumps(one.scope)})"
        if one.dial is not None:
            turned += f".at({one.dial:g})"
        said.append(f"{name} = {turned}")
        names.append(f"tt.within({name}, kl={one.kl:g})" if one.kl is not None else name)
    steering = names[0] if len(names) == 1 else f"[[{', '.join(names)}]]"
    asked: Any = body.prompt
    if body.system:
        asked = [
            {"role": "system", "content": body.system},
            {"role": "user", "content": body.prompt},
        ]
    options = [f"max_new_tokens={body.sampling.max_tokens}"]
    if body.sampling.temperature:
        options += [f"temperature={body.sampling.temperature:g}", f"seed={body.sampling.seed}"]
        options += [f"top_p={body.sampling.top_p:g}"] if body.sampling.top_p < 1 else []
    given = f", steering={steering}" if names else ""
    return "\n".join([
        "import trimtab as tt",
        "",
        f"lm = tt.load({json.dumps(model)})",
        *said,
        f"prompt = {json.dumps(asked, ensure_ascii=False)}",
        f"print(lm.generate([prompt]{given}, {', '.join(options)})[0].text)",
    ])  # fmt: skip


def _at(shelf: Shelf, one: Turned) -> str:
    """FILE@DIAL of a command line; a budget is one that the steering was calibrated for."""
    file = _file(shelf, one.name)
    if one.kl is not None:
        return f"{file}@kl={one.kl:g}"
    return file if one.dial is None else f"{file}@{one.dial:g}"


def _steered(shelf: Shelf, turned: Sequence[Turned]) -> str:
    said = []
    for one in turned:
        if one.kl is not None:
            said.append(f"--steer {shlex.quote(_file(shelf, one.name))} --kl {one.kl:g}")
        else:
            said.append(f"--steer {shlex.quote(_at(shelf, one))}")
    if any(one.scope for one in turned):
        scopes = [one.scope or str(shelf.steering(one.name).scopes[0]) for one in turned]
        said += [f"--scope {shlex.quote(scope)}" for scope in scopes]
    return " ".join(said)


def _cli(model: str, shelf: Shelf, body: LinesBody) -> str:
    parts = [f"trimtab generate --model {shlex.quote(model)}", _steered(shelf, body.steerings)]
    parts.append(f"--max-new-tokens {body.sampling.max_tokens}")
    if body.sampling.temperature:
        parts.append(f"--temperature {body.sampling.temperature:g} --seed {body.sampling.seed}")
        parts += [f"--top-p {body.sampling.top_p:g}"] if body.sampling.top_p < 1 else []
    if body.system:
        parts.append(f"--system {shlex.quote(body.system)}")
    parts.append(f"-- {shlex.quote(body.prompt)}")
    return " \\\n  ".join(part for part in parts if part)


def _curl(model: str, shelf: Shelf, body: LinesBody) -> str:
    """Against `trimtab serve`, whose line comes first."""
    files = " ".join(
        f"--steer {shlex.quote(file)}"
        for file in dict.fromkeys(_file(shelf, one.name) for one in body.steerings)
    )
    asked: dict[str, Any] = {"model": "model"}
    sampling = body.sampling
    if sampling.temperature:
        asked |= {"temperature": sampling.temperature, "seed": sampling.seed}
        asked |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
    else:
        asked["temperature"] = 0
    asked["max_tokens"] = sampling.max_tokens
    turned = [one.model_dump(exclude_none=True) for one in body.steerings]
    asked |= {"steering": turned} if turned else {}
    system = [{"role": "system", "content": body.system}] if body.system else []
    asked["messages"] = [*system, {"role": "user", "content": body.prompt}]
    return "\n".join([
        f"trimtab serve --model {shlex.quote(model)} --name model {files}".rstrip()
        + " --port 8000 &",
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"  -d {shlex.quote(json.dumps(asked, ensure_ascii=False))}",
    ])  # fmt: skip


def _llama(model: str, shelf: Shelf, body: LinesBody, steerings: Sequence[Steering]) -> str:
    """A control vector where the steerings are one each; baked into a file of the model else."""
    prompt = shlex.quote(body.prompt)
    ask = f"llama-cli -m {{model}} {{more}}-n {body.sampling.max_tokens} -p {prompt}"
    if not steerings:
        return ask.format(model="model.gguf", more="")
    kl = [one.name for one in body.steerings if one.kl is not None]
    if kl:
        return f"# {kl[0]} is turned by nats, prompt by prompt: set a dial to take it elsewhere"
    if all(map(is_control_vector, steerings)) and not any(one.scope for one in body.steerings):
        exported, vectors = [], []
        for one in body.steerings:
            exported.append(
                f"trimtab export {shlex.quote(_at(shelf, one))} --model {shlex.quote(model)} "
                f"--to gguf -o {one.name}.gguf"
            )
            vectors.append(f"--control-vector {one.name}.gguf ")
        return "\n".join([*exported, ask.format(model="model.gguf", more="".join(vectors))])
    scoped = [
        one.name
        for one, of in zip(body.steerings, steerings, strict=True)
        if one.scope or of.gate or not all(scope.everywhere for scope in of.scopes)
    ]
    if scoped:
        return f"# {scoped[0]} acts on some tokens only, which weights cannot: serve it instead"
    files = " ".join(f"--steer {shlex.quote(_at(shelf, one))}" for one in body.steerings)
    bake = f"trimtab bake --model {shlex.quote(model)} {files} --to gguf -o steered.gguf"
    return "\n".join([bake, ask.format(model="steered.gguf", more="")])
