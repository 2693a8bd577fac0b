"""What the golden files record: command lines, and the tiny models and texts that they run on.

Every command runs in a room of its own files, named as seen from there, so that nothing in what it
prints or writes depends on where the room is. Commands run in their order: later ones read what
earlier ones wrote. They go through `trimtab.cli.main` as the program does, with `sys.argv`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

import trimtab as tt
from helpers import add, steer
from tiny import tiny_model, tiny_tokenizer
from trimtab.cli import main
from trimtab.cli.common import console

WORDS = ("glad", "calm", "kind", "warm", "fine", "good", "nice", "bright", "gentle", "happy")
PEOPLE, THINGS = ("king", "mother", "captain", "daughter"), ("ship", "map", "table")
PLACES = ("The ship left the harbour", "She looked at the map", "The king was old")

#: Each method with options that suit the tiny model, and with other ones.
FITS = {
    "actadd": "actadd --layer 1 --pairs 2",
    "caa": "caa --layer 1 --alpha 2 --token last",
    "iti": "iti --k 3 --alpha 2",
    "sadi": "sadi --variant neuron --k 4",
    "sta": "sta --sae sae --p 0.3",
    "ablation": "ablation --layer 1",
    "sas": "sas --theta 30",
    "aas": "aas --theta 30",
    "ss": "ss --theta 30 --no-whole-blocks",
    "austeer": "austeer --site ffn_out --k 5 --alpha 2 --direction paper",
}
VARIANTS = {
    "actadd-default": "actadd",
    "caa-layers": "caa --layer 0,2 --token mean --unit-norm --positions generated",
    "caa-pca": "caa --layer 0-1 --variant pca --token answer",
    "caa-validation": "caa --layer validation --token last",
    "iti-probe": "iti --k 2 --direction probe --no-scale --seed 3",
    "sadi-head": "sadi --variant head --k 2",
    "sadi-resid": "sadi --variant resid --k 3 --positions last",
    "sta-mean": "sta --sae sae --token last --alpha 2 --positions generated",
    "ablation-norms": "ablation --where norms --tokens -1,-2 --kl 50",
    "ablation-writers": "ablation --where writers --layer 2 --amount 0.5",
    "sas-input": "sas --candidates input --selection norm",
    "aas-generated": "aas --positions generated",
    "ss-own-angle": "ss --ss-compat --no-whole-blocks",
    "austeer-heads": "austeer --site heads --k 7 --direction signed --clamp-sign --layers 0,2",
    "austeer-random": "austeer --site ffn_in --k 6 --locate random --seed 2 --change absolute",
    "austeer-least": "austeer --site ffn_out --k 4 --choose least --locate difference --alpha 0.5",
    "austeer-vector": "austeer --site resid --k 10 --change vector",
}
#: Those that choose on validation rows.
CHOOSING = ("caa-validation", "ablation-norms")
#: Those that are tried on architectures that differ much from Llama.
ELSEWHERE = {
    "gemma": ("caa", "sadi", "ss", "aas", "ablation", "austeer"),
    "experts": ("caa", "ss", "austeer"),
}

PROMPTS = '"Today I feel" "She looked at the map and"'
QUICK = "--limit 3 --test-limit 4"
PARTS = f"--model model --task contrast:parts.jsonl {QUICK}"


def _commands() -> dict[str, str]:
    """Every command by the name of its golden file and its own."""
    found = {"models/list": "models --json", "models/list-said": "models list --json"}
    fit = "--model model --contrast pairs.jsonl --no-measure --samples 0 --json"
    for name, options in {**FITS, **VARIANTS}.items():
        line = fit.replace("pairs", "parts") if name in CHOOSING else fit
        found[f"fit/{name}"] = f"fit {options} {line} -o {name}.safetensors"
    for other, names in ELSEWHERE.items():
        for name in names:
            line = fit.replace("--model model", f"--model {other}")
            found[f"fit/{other}-{name}"] = f"fit {FITS[name]} {line} -o {other}-{name}.safetensors"
    found["fit/many"] = (
        'fit many "caa layer=1 token=last" "austeer k=3 site=heads direction=paper" sadi '
        f"{fit} -o many"
    )
    found["fit/builtin"] = (
        "fit caa --token last --model model -c builtin:formality --layer 1 --max-length 120 "
        "--no-measure --samples 0 -o f.st --json"
    )
    found["fit/task"] = (
        "fit caa --token last --model speaker -c task:copa --data data --layer 1 --no-measure "
        "--samples 0 -o c.st --json"
    )
    found["fit/said"] = (
        "fit caa --token last --model model -c pairs.jsonl --layer -1 --no-measure "
        "-o said.safetensors"
    )
    for name in FITS:
        found[f"inspect/{name}"] = f"inspect {name}.safetensors --json"
        found[f"inspect/{name}-said"] = f"inspect {name}.safetensors@1.5 --top 3"
    found |= _generate() | _strength() | _evaluate() | _search() | _analyse()
    return found


def _generate() -> dict[str, str]:
    found = {}
    line = f"generate --model model --max-new-tokens 8 {PROMPTS} --json"
    for name, more in {
        "unsteered": "",
        "raw": "--raw",
        "chat": "--chat",
        "dial": "--steer caa.safetensors@-3",
        "two": "--steer caa.safetensors@2 --steer austeer.safetensors --raw",
        "per-prompt": "--steer caa.safetensors --kl 0.2 --raw",
        "compare": "--steer ss.safetensors@180 --raw --compare",
        "sampled": "--raw --temperature 0.8 --top-k 20 --top-p 0.9 --seed 5",
        "option": "--raw --option repetition_penalty=1.3 --batch-size 1",
        "bfloat16": "--raw --dtype bfloat16",
    }.items():
        found[f"generate/{name}"] = f"{line} {more}"
    # What bfloat16 rounds may turn later tokens.
    found["generate/bfloat16"] = found["generate/bfloat16"].replace("tokens 8", "tokens 1")
    for name in FITS:
        found[f"generate/{name}"] = f"{line} --raw --steer {name}.safetensors"
    for other, names in ELSEWHERE.items():
        line = f"generate --model {other} --max-new-tokens 8 {PROMPTS} --raw --json"
        found[f"generate/{other}"] = line
        for name in names:
            found[f"generate/{other}-{name}"] = f"{line} --steer {other}-{name}.safetensors"
    found["generate/said"] = (
        f"generate --model model --max-new-tokens 5 --raw --steer caa.safetensors --compare "
        f"{PROMPTS}"
    )
    for name, steered in {
        "caa": "caa.safetensors@2",
        "two": "ablation.safetensors austeer.safetensors@1",
        "sadi": "sadi.safetensors",
    }.items():
        steers = " ".join(f"--steer {one}" for one in steered.split())
        found[f"bake/{name}"] = f"bake --model model {steers} -o baked-{name} --json"
    found["bake/generate"] = f"generate --model baked-caa --max-new-tokens 8 {PROMPTS} --raw --json"
    return found


def _strength() -> dict[str, str]:
    caa = f"--model model --steer caa.safetensors --raw {PROMPTS}"
    curve = f"strength curve {caa} --points 9 --range -4:4"
    return {
        "strength/budget": f"strength budget {caa} --kl 0.05 --json",
        "strength/budget-side": f"strength budget {caa} --side negative --beyond-range --json",
        "strength/budget-said": f"strength budget {caa} --kl 0.05",
        "strength/calibrate": (
            f"strength budget {caa} --kl 0.01 --kl 0.1 --save calibrated.safetensors --json"
        ),
        "strength/calibrated": "inspect calibrated.safetensors --json",
        "strength/at-budget": (
            f"generate --model model --raw --max-new-tokens 6 {PROMPTS} "
            "--steer calibrated.safetensors@kl=0.1 --json"
        ),
        "strength/curve": (
            f"{curve} --token ' happy' --token ' sad' --contrast pairs.jsonl --json"
        ),
        "strength/curve-all": (
            f"{curve} --top 3 --ce-text text.txt --ce-tokens 60 --ce-points 5 --concept joy "
            "--samples 2 --max-new-tokens 3 --concept-points 3 --concept-range -2:2 "
            "--contrast pairs.jsonl --resamples 2 --seed 3 -o out-curve --json"
        ),
        "strength/curve-layers": f"{curve} --top 2 --contrast pairs.jsonl --layers 2 --json",
        "strength/curve-angle": (
            f"strength curve --model model --steer ss.safetensors --raw {PROMPTS} --points 6 "
            "--range -100:150 --top 2 --json"
        ),
        "strength/curve-said": f"{curve} --top 2",
        "strength/theory": "strength theory -o out-theory --json",
        "strength/contrast": (
            "strength contrast --model long --concept joy --count 2 --max-new-tokens 6 --seed 1 "
            "-o joy.jsonl --json"
        ),
    }


def _evaluate() -> dict[str, str]:
    copa = "evaluate --model speaker --data data --task copa"
    own = "evaluate --model model --data data"
    return {
        "evaluate/list": "evaluate --list --json",
        "evaluate/copa": (
            f"{copa} --steer speaker.safetensors@12 --limit 6 --show flips -o out-copa --json"
        ),
        "evaluate/copa-dials": (
            f"{copa} --steer speaker.safetensors --dial 0:12:6 --protocol paper "
            "--protocol trimtab --limit 4 --json"
        ),
        "evaluate/validation": f"{copa} --part validation --json",
        "evaluate/several": (
            f"{own} --task contrast:parts.jsonl --task perplexity:text.txt --limit 3 "
            "--steer caa.safetensors@3 --steer austeer.safetensors -o out-several --json"
        ),
        "evaluate/texts": (
            f"{own} --task xstest --task refusal:asked.jsonl --task coherence:asked.jsonl "
            "--judge phrases --steer caa.safetensors --max-new-tokens 4 --limit 2 -o out-texts "
            "--json"
        ),
        "evaluate/preference": (
            "evaluate --model long --task bpo --data data --steer long.safetensors@4 "
            "--judge local:judge --max-new-tokens 4 --limit 2 --json"
        ),
        "evaluate/said": f"{own} --task contrast:parts.jsonl --steer caa.safetensors@3",
    }


def _search() -> dict[str, str]:
    sweep = f"{PARTS} --json"
    pair = (
        "'caa layer=0,1 alpha=1,4 token=last' 'late: caa layer=1 alpha=2,8 token=last' "
        "'sas theta=0,90'"
    )
    return {
        "sweep/grid": (
            f"sweep austeer --direction paper {sweep} --k 0,5 --alpha 1,8 --site heads "
            "--max-cost 5 -o out-grid"
        ),
        "sweep/copa": (
            "sweep caa --token last --model speaker --data data --task copa --layer 0,1 "
            f"--alpha 4,12 {QUICK} --no-oracle --json"
        ),
        "sweep/paper": f"sweep actadd {sweep} --layer 1 --no-oracle",
        "sweep/tpe": (
            f"sweep caa --token last {sweep} --layer 0:2 --alpha 0.1:10:log --search tpe "
            "--trials 5 --seed 4 --max-cost inf"
        ),
        "sweep/halving": (
            "sweep caa --token last --model model --task contrast:many.jsonl --limit 0 "
            "--test-limit 2 --layer 0,1,2 --alpha -9,1,9 --search halving --json"
        ),
        "sweep/located": (
            f"sweep austeer {sweep} --locate momentum,effect,effect_per_nat --k 3 --alpha 1 "
            "--site heads --max-cost inf --no-oracle"
        ),
        "compare/three": (
            f"compare {pair} {PARTS} --untimed --kl 0.01 --max-cost 50 -o out-compare --json"
        ),
        "compare/said": f"compare {pair} {PARTS} --untimed --max-cost inf",
    }


def _analyse() -> dict[str, str]:
    own = "--model model --contrast pairs.jsonl --json"
    task = "--model model --task contrast:parts.jsonl --json"
    return {
        "analyse/plane": f"analyse plane {own}",
        "analyse/norms": f"analyse norms {own} --kinds resid,ffn_norm",
        "analyse/scores": f"analyse scores {own} --sites heads,ffn_out --k 4",
        "analyse/overlap": (
            "analyse overlap --model model -c a=pairs.jsonl -c b=many.jsonl --k 5 --json"
        ),
        "analyse/tokens": (
            f"analyse tokens {own} --site ffn_in --layer 1 --units 3,7 --strengths 1,10 --top 2"
        ),
        "analyse/units": f"analyse units {task} --layer 1 --site heads --head 1 --count 4",
        "analyse/count": f"analyse count {task} --ks 1,5,all --alpha 1 --limit 4",
        "analyse/dial": (
            f"analyse dial {task} --methods sas,ss --step 180 --limit 3 --no-cost -o out-dial"
        ),
        "analyse/effect": (
            f"analyse effect {task} --site heads --k 1,3 --kl 0.05 --draws 2 --alone 1 --limit 3"
        ),
        "analyse/scores-effect": f"analyse scores {own} --sites ffn_in --k 3 --locate effect",
        "analyse/heatmap": f"analyse heatmap {task} --ks 2,4 --alphas 1,4 {QUICK}",
        "reproduce/list": "reproduce --list --json",
        "reproduce/plane": "reproduce ss-plane --model model -o out-ss-plane --json",
    }


_ANALYSES = (
    *("units", "tokens", "scores", "overlap", "pairs", "count", "suppression"),
    *("ablations", "heatmap", "effect", "plane", "norms", "dial", "masks"),
)
#: The commands that have help of their own.
HELP = (
    *("", "demo", "models", "models list", "models pull", "models remove", "generate", "inspect"),
    "chat",
    *("contrast", "contrast check", "contrast show", "contrast split", "contrast persona"),
    *(
        "bake",
        "export",
        "import",
        "push",
        "pull",
        "search",
        "audit",
        "evaluate",
        "strength",
        "strength budget",
        "strength curve",
        "strength contrast",
    ),
    *("strength theory", "reproduce", "compare", "fit", "fit many", "sweep", "analyse"),
    *(f"{command} {name}" for command in ("fit", "sweep") for name in FITS),
    *(f"analyse {name}" for name in _ANALYSES),
)

COMMANDS = _commands()


# -- the room -------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pair(i: int) -> dict[str, str]:
    other = WORDS[(i * 3 + 1) % len(WORDS)]
    return {
        "prompt": f"On day {i} I felt {other} and",
        "positive": f" {WORDS[i % len(WORDS)]} again",
        "negative": f" rather {other[::-1]}",
    }


def _parts(*counts: int) -> list[dict[str, str]]:
    parts = ("train",) * counts[0] + ("validation",) * counts[1] + ("test",) * counts[2]
    return [{**_pair(i), "part": part} for i, part in enumerate(parts)]


def _save(folder: Path, model: Any, longest: int = 0, chat: bool = True) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if longest:
        config = folder / "tokenizer_config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "model_max_length": longest})
        )
    if not chat:
        (folder / "chat_template.jinja").unlink()


def _autoencoder(folder: Path) -> None:
    """A random sparse autoencoder of 40 features in the format of sae-lens; its numbers are of few
    digits, so that their digest is the same everywhere."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return (64 * torch.randn(shape, generator=draw)).round() / 128

    weights = {"W_enc": random(48, 40), "W_dec": random(40, 48), "b_enc": random(40)}
    save_file({**weights, "b_dec": random(48)}, folder / "sae_weights.safetensors")
    about = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}
    about |= {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12"}
    config = {"architecture": "standard", "d_in": 48, "d_sae": 40, "dtype": "float32"}
    config |= {"device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    config |= {"reshape_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": about}))


def furnish(room: Path) -> None:
    """Models, texts and data sets that the commands read."""
    _save(room / "model", tiny_model("llama"))
    _save(room / "gemma", tiny_model("gemma3"), chat=False)
    _save(room / "experts", tiny_model("qwen3_moe"), chat=False)
    _save(room / "long", tiny_model("llama", max_position_embeddings=4096), 4096)
    _save(room / "judge", _saying_a_or_b(seed=2, max_position_embeddings=4096), 4096)
    _save(room / "speaker", _saying_a_or_b())
    _autoencoder(room / "sae")
    said = ("happy", "wonderful", "good"), ("sad", "boring", "bad")
    write_rows(
        room / "pairs.jsonl",
        [
            {"prompt": f"The {who} saw the {what} and it was", "positive": f" {up}."}
            | {"negative": f" {down}!"}
            for who in PEOPLE
            for what, up, down in zip(THINGS, *said, strict=True)
        ],
    )
    write_rows(room / "parts.jsonl", _parts(8, 5, 6))
    write_rows(room / "many.jsonl", _parts(20, 20, 5))
    write_rows(room / "asked.jsonl", [{"prompt": f"Write a story about {x}s"} for x in THINGS])
    (room / "text.txt").write_text(
        "The ship left the harbour in the morning, and the captain stood at the wheel. " * 6
    )
    data = room / "data"
    for folder in ("copa", "bpo", "xstest"):
        (data / folder).mkdir(parents=True)
    write_rows(data / "copa" / "test.jsonl", _copa(12))
    write_rows(data / "copa" / "balanced_train.jsonl", _copa(30))
    write_rows(data / "bpo" / "test.jsonl", [{"prompt": f"Write {i}."} for i in range(3)])
    rows = [{"id": i, "prompt": f"Ask {i}", "label": ("safe", "unsafe")[i % 2]} for i in range(4)]
    write_rows(data / "xstest" / "xstest_v2.jsonl", rows)
    for source in ("speaker", "long"):
        lm = tt.load(room / source, device="cpu")
        site = "layers.1.resid"
        vector = add(lm.anatomy.width(site), seed=3, size=0.05)
        steer(lm, (site, vector)).save(room / f"{source}.safetensors")


def _saying_a_or_b(**options: Any) -> Any:
    """A model whose next token is A, B or none of both."""
    model: Any = tiny_model("llama", **options)
    spoken = torch.zeros(len(tiny_tokenizer()), 1)
    spoken[tiny_tokenizer()("AB", add_special_tokens=False).input_ids] = 1
    with torch.no_grad():
        model.lm_head.weight.mul_(spoken)
    return model


def _copa(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "premise": f"{PLACES[i % 3]}.",
            "question": "cause" if i % 2 else "effect",
            "choice1": f"They sat by the fire {i}.",
            "choice2": f"The wind was good {i}.",
            "label": i // 2 % 2,
        }
        for i in range(count)
    ]


# -- running a command ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit status and its two streams."""

    status: Any
    out: str
    err: str


def run(line: str) -> Ran:
    """Run a command line in this process, as `trimtab` does."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = None
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["trimtab", *shlex.split(line)])
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    return Ran(status, out.getvalue(), err.getvalue())


def _undrawn(figure: Figure, target: Any, **options: Any) -> None:
    """Stands in for drawing."""
    if hasattr(target, "write"):
        target.write(b"")
    else:
        Path(target).write_bytes(b"")


@contextlib.contextmanager
def inside(room: Path) -> Iterator[None]:
    """Work in a room, with nothing of this machine's settings. Pictures are made, but not drawn:
    only that they are there is compared, and drawing takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PY_COLORS", "NO_COLOR"):
            patch.delenv(name, raising=False)
        for name in ("TRIMTAB_DATA", "TRIMTAB_WHEELS", "OPENAI_API_KEY"):
            patch.delenv(name, raising=False)
        patch.setenv("TRIMTAB_CACHE", str(room.parent / "cache"))
        patch.setenv("COLUMNS", "150")
        patch.setattr(console, "_width", 150)  # it may be as old as another COLUMNS
        patch.setattr(Figure, "savefig", _undrawn)
        patch.chdir(room)
        yield
