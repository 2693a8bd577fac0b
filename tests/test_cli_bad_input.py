"""What the command line says of bad input: one line each."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import trimtab as tt
from commands import (
    FIT,
    GENERATE,
    PAIRS,
    Command,
    home,
    listing,
    refused,
    trimtab,
    with_other,
    work,
    write_rows,
)
from trimtab.cli.values import read_numbers

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

# -- bad input ---------------------------------------------------------------------------------


def tampered(
    name: str,
    change: Callable[[dict[str, Any], dict[str, Any]], Any],
    source: str = "caa.safetensors",
) -> None:
    """A steering file with something changed in its document or its tensors."""
    with safe_open(source, framework="pt") as file:
        document = json.loads(file.metadata()["trimtab"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(document, tensors)
    save_file(tensors, name, {"trimtab": json.dumps(document)})


@pytest.fixture
def bad(work: Path, home: Path) -> Path:
    """Everything that may be wrong with a file, in the working directory."""

    def write(name: str, *rows: Any) -> None:
        write_rows(work / name, list(rows))

    write("equal.jsonl", PAIRS[0], {**PAIRS[1], "negative": PAIRS[1]["positive"]})
    write("empty.jsonl")
    write("missing.jsonl", {"prompt": "a", "positive": "b"})
    write("one.jsonl", {"text": "a", "label": "positive"})
    write("label.jsonl", {"text": "a", "label": "happy"})
    write("mixed.jsonl", PAIRS[0], {"text": "a", "label": "positive"})
    write("field.jsonl", {**PAIRS[0], "colour": "red"})
    write("blank.jsonl", {"prompt": "", "positive": "a", "negative": " "})
    write("unpaired.jsonl", *({"text": t, "label": t} for t in ("positive", "negative")))
    write("parts.jsonl", {**PAIRS[0], "part": "test"})
    write("long.jsonl", {**PAIRS[0], "positive": "word " * 300})
    write("chats.jsonl", {**PAIRS[0], "prompt": [{"role": "user", "content": "Hi"}]})
    write("messages.jsonl", {"prompt": [{"role": "user", "content": "Hi"}]})
    write("number.jsonl", {"prompt": 5})
    write("noprompt.jsonl", {"prompt": "a"}, {"text": "b"})
    (work / "broken.jsonl").write_text(json.dumps(PAIRS[0]) + '\n{"prompt": "a", \n')
    (work / "list.jsonl").write_text("[1]\n")
    (work / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    (work / "deep.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "\n")
    (work / "latin.jsonl").write_bytes('{"prompt": "caf\u00e9"}'.encode("latin-1"))
    (work / "wrong.csv").write_text("prompt,positive\na,b\n")
    (work / "blank.txt").write_text("\n  \n")
    (work / "folder").mkdir()
    (work / "folder" / "keep.txt").write_text("mine")

    (work / "not.gguf").write_bytes(b"PK\x03\x04 is a zip")
    (work / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5) + b"\x01")
    (work / "damaged").mkdir()
    for item in (home / "model").iterdir():
        content = item.read_bytes()
        half = content[: len(content) // 2] if item.suffix == ".safetensors" else content
        (work / "damaged" / item.name).write_bytes(half)
    (work / "garbled").mkdir()
    (work / "garbled" / "config.json").write_text("{")

    content = (home / "caa.safetensors").read_bytes()
    (work / "truncated.st").write_bytes(content[:-20])
    (work / "header.st").write_bytes(content[:100])
    (work / "nothing.st").write_bytes(b"")
    (work / "text.st").write_text("not a steering")
    save_file({"weight": torch.ones(3)}, work / "foreign.st")
    tampered("version.st", lambda document, _: document.update(format=4))
    tampered("method.st", lambda document, _: document.pop("method"))
    tampered("nan.st", lambda _, tensors: tensors["0.vector"][3:4].fill_(float("nan")))
    tampered("inf.st", lambda _, tensors: tensors["0.vector"][3:4].fill_(float("inf")))
    tampered("half.st", lambda _, tensors: tensors.update({"0.vector": torch.ones(48).half()}))
    tampered("site.st", lambda d, _: d["interventions"][0].update(site="layers.1.nowhere"))
    tampered("layer.st", lambda d, _: d["interventions"][0].update(site="layers.9.resid"))
    tampered("operator.st", lambda d, _: d["interventions"][0].update(operator="Explode"))
    tampered("width.st", lambda _, tensors: tensors.update({"0.vector": torch.ones(40)}))
    tampered("extra.st", lambda _, tensors: tensors.update(more=torch.ones(3)))
    tampered("units.st", lambda _, tensors: tensors.pop("table.gain"), "au.safetensors")
    tampered("words.st", lambda document, _: document.update(method="austeer"))
    tampered("findings.st", lambda d, _: d["findings"].update(score=float("nan")))
    tampered("short.st", lambda _, t: t.update({"table.gain": torch.ones(3)}), "au.safetensors")
    tampered("askew.st", lambda _, t: t["0.basis"][1].add_(t["0.basis"][0]), "every/ss.safetensors")
    return work


#: What is wrong: the command line, and words of the answer.
BAD = {
    # contrasts
    "contrast missing": ("fit caa --model model -c nowhere.jsonl -o o", "nowhere.jsonl", "No such"),
    "contrast a folder": ("fit caa --model model -c folder -o o", "folder", "directory"),
    "contrast not UTF-8": ("fit caa --model model -c latin.jsonl -o o", "latin.jsonl", "UTF-8"),
    "contrast not JSON": ("fit caa --model model -c broken.jsonl -o o", "line 2", "not JSON"),
    "contrast not objects": ("fit caa --model model -c list.jsonl -o o", "row 1", "JSON object"),
    "sides equal": ("fit austeer --model model -c equal.jsonl -o o", "row 2", "equal"),
    "contrast empty": ("fit caa --model model -c empty.jsonl -o o", "empty.jsonl", "empty"),
    "side missing": ("fit caa --model model -c missing.jsonl -o o", "row 1", "'negative'"),
    "one label": ("fit caa --model model -c one.jsonl -o o", "both labels"),
    "unknown label": ("fit caa --model model -c label.jsonl -o o", "row 1", "label"),
    "paired and unpaired": ("fit caa --model model -c mixed.jsonl -o o", "mixes"),
    "unknown field": ("fit caa --model model -c field.jsonl -o o", "'colour'"),
    "text blank": ("fit caa --model model -c blank.jsonl -o o", "row 1", "empty"),
    "no train rows": ("fit caa --model model -c parts.jsonl -o o", "no train rows"),
    "answer over-long": ("fit caa --model model -c long.jsonl -o o", "row 1", "does not fit"),
    "CSV column": ("fit caa --model model -c wrong.csv -o o", "wrong.csv, row 1", "'negative'"),
    "unpaired": ("fit austeer --model model -c unpaired.jsonl -o o", "unpaired", "pair"),
    "answers of unpaired": ("fit caa --token answer -m model -c unpaired.jsonl -o o", "unpaired"),
    "unknown builtin": ("fit caa --model model -c builtin:no -o o", "'no'", "formality"),
    "chat contrast, no template": ("fit caa -m base -c chats.jsonl -o o", "no chat template"),
    # models
    "no --model": ("fit caa -c pairs.jsonl -o o", "--model"),
    "no --model to generate": ("generate Hello", "--model"),
    "model missing": ("generate --model ./nowhere Hello", "./nowhere"),
    "model a file": ("generate --model pairs.jsonl Hello", "pairs.jsonl"),
    "model an empty folder": ("generate --model folder Hello", "cannot load", "folder"),
    "model damaged": ("generate --model damaged Hello", "cannot load", "damaged"),
    "model garbled": ("generate --model garbled Hello", "cannot load", "garbled"),
    "several streams": ("generate --model streams Hello", "gemma3n_text", "no way out"),
    "GGUF missing": ("generate --model no.gguf Hello", "no.gguf"),
    "not a GGUF": ("generate --model not.gguf Hello", "not.gguf is not a GGUF"),
    "GGUF truncated": ("generate --model cut.gguf Hello", "cut.gguf", "truncated"),
    "unknown dtype": (f"{GENERATE} Hello --dtype int8", "'int8'", "bfloat16"),
    "unknown dtype to fit": (f"fit caa {FIT} -o o --dtype int8", "'int8'"),
    "unknown device": (f"{GENERATE} Hello --device gpu9", "'gpu9'", "cuda"),
    "device out of range": ("bake -m model -s au.safetensors -o o --device cuda:99", "cuda:99"),
    # hyperparameters
    "unknown method": (f"fit magic {FIT} -o o", "'magic'"),
    "unknown site": (f"fit austeer {FIT} -o o --site attn", "'attn'", "ffn_out"),
    "unknown direction": (f"fit austeer {FIT} -o o --direction up", "'up'", "signed"),
    "unknown token": (f"fit caa {FIT} -o o --token first", "'first'", "mean"),
    "unknown positions": (f"fit caa {FIT} -o o --positions some", "'some'", "generated"),
    "unknown positions of units": (f"fit austeer {FIT} -o o --positions some", "'some'"),
    "layer out of range": (f"fit caa {FIT} -o o --layer 3", "layer 3", "0 to 2"),
    "layer neither number nor word": (
        f"fit caa {FIT} -o o --layer validate",
        "--layer validate: write numbers, as in 4,5,8-12, or validation",
    ),
    "layers of one block": (f"fit ablation {FIT} -o o --layer 1-2", "--layer", "no number"),
    "no validation rows": (f"fit caa {FIT} -o o --layer validation", "validation rows", "split"),
    "token before the text": (f"fit caa {FIT} -o o --token -200", "none at -200"),
    "token zero": (f"fit caa {FIT} -o o --token 0", "token", "0", "answer"),
    "tokens no numbers": (f"fit ablation {FIT} -o o --tokens=x", "--tokens x", "4,5,8-12"),
    "tokens from the start": (f"fit ablation {FIT} -o o --tokens 1,2", "tokens", "1"),
    "targets empty": (f"fit ablation {FIT} -o o --targets=", "targets"),
    "unpaired without targets": (
        "fit ablation --model model -c unpaired.jsonl -o o",
        "validation",
    ),
    "share out of range": (f"fit iti {FIT} -o o --held-out 1", "held_out", "1"),
    "heads too many": (f"fit iti {FIT} -o o --k 13", "13", "12 heads"),
    "angle NaN": (f"fit sas {FIT} -o o --theta nan", "theta", "nan"),
    "no autoencoder": (f"fit sta {FIT} -o o", "--sae"),
    "options at odds": (f"fit austeer {FIT} -o o --choose least --alpha 8", "alpha must be 0 to 1"),
    "layer too negative": (f"fit caa {FIT} -o o --layer -4", "layer -4", "0 to 2"),
    "layers out of range": (f"fit austeer {FIT} -o o --layers 0,7", "layer 7", "0 to 2"),
    "layers no numbers": (f"fit austeer {FIT} -o o --layers a,b", "--layers a,b", "4,5,8-12"),
    "layers backwards": (f"fit austeer {FIT} -o o --layers 0,2-1", "--layers 0,2-1"),
    "layers without end": (f"fit austeer {FIT} -o o --layers 0-99999999999", "write numbers"),
    "k too large": (f"fit austeer {FIT} -o o --site ffn_out --k 145", "145", "144 units"),
    "k negative": (f"fit austeer {FIT} -o o --k -1", "k must be", "-1"),
    "k no number": (f"fit austeer {FIT} -o o --k many", "k must be", "all", "many"),
    "alpha NaN": (f"fit austeer {FIT} -o o --alpha nan", "alpha", "nan"),
    "alpha infinite": (f"fit caa {FIT} -o o --alpha inf", "alpha", "inf"),
    "max length": (f"fit caa {FIT} -o o --max-length 0", "max-length", "0"),
    "max length below the answer": (f"fit caa {FIT} -o o --max-length 3", "row 1", "3 tokens"),
    # steerings
    "steering missing": (f"{GENERATE} Hello --steer no.st", "no.st"),
    "steering missing at a dial": (f"{GENERATE} Hello --steer no.st@3", "no.st"),
    "steering a folder": ("inspect folder", "folder"),
    "not safetensors": ("inspect text.st", "text.st", "not a safetensors file"),
    "empty file": ("inspect nothing.st", "nothing.st"),
    "truncated": ("inspect truncated.st", "truncated.st", "truncated"),
    "truncated header": ("bake -m model -s header.st -o o", "header.st", "truncated"),
    "foreign safetensors": ("inspect foreign.st", "not a trimtab steering"),
    "wrong version": ("inspect version.st", "version.st", "format"),
    "document incomplete": ("inspect method.st", "method.st", "method"),
    "NaN tensor": (f"{GENERATE} Hello --steer nan.st", "nan.st", "NaN"),
    "infinite tensor": ("bake -m model -s inf.st -o o", "inf.st", "infinity"),
    "tensor of another type": ("inspect half.st", "half.st", "float16"),
    "steering at an unknown site": ("inspect site.st", "site.st", "nowhere"),
    "steering at an unknown layer": ("inspect layer.st", "layer 9"),
    "unknown operator": ("inspect operator.st", "'Explode'"),
    "unexpected tensor": ("inspect extra.st", "'more'"),
    "tables of several lengths": ("inspect short.st --json", "several lengths"),
    "findings NaN": ("inspect findings.st", "findings.st", "findings"),
    "plane askew": ("inspect askew.st", "askew.st", "right angle"),
    "units without their tables": ("inspect units.st --json", "does not say what it chose"),
    "no units to put in words": ("inspect words.st", "does not say what it chose"),
    "width does not fit": (f"{GENERATE} Hello --steer width.st --force", "sizes do not fit", "40"),
    "dial no number": (f"{GENERATE} Hello -s au.safetensors@x", "au.safetensors@x", "'x'"),
    "dial empty": ("inspect au.safetensors@", "au.safetensors@"),
    "dial NaN": (f"{GENERATE} Hello -s au.safetensors@nan", "alpha", "nan"),
    "dial infinite": (f"{GENERATE} Hello -s au.safetensors@-inf", "alpha", "inf"),
    "dial too large": ("bake -m model -s au.safetensors@1e999 -o o", "alpha", "inf"),
    "another model": ("generate -m other Hello -s au.safetensors", "model (", "other (", "--force"),
    "another model baked": ("bake -m other -s au.safetensors -o o", "other (", "--force"),
    "other sizes": ("generate -m small Hello -s au.safetensors --force", "sizes do not fit"),
    "other architecture": ("bake -m gpt2 -s caa.safetensors -o o --force", "sizes do not fit"),
    "bake generated": ("bake -m model -s late.safetensors -o o", "'generated'", "attach"),
    "bake nothing": ("bake -m model -o o", "--steer"),
    # outputs
    "output exists": (f"fit caa {FIT} -o pairs.jsonl", "pairs.jsonl exists", "--overwrite"),
    "output a folder": (f"fit caa {FIT} -o folder --overwrite", "folder is a directory"),
    "no folder for output": (f"fit caa {FIT} -o no/o.st", "no/o.st", "no directory no"),
    "output below a file": (f"fit caa {FIT} -o pairs.jsonl/o.st", "pairs.jsonl/o.st"),
    "no --output": (f"fit caa {FIT}", "--output"),
    "baked output exists": ("bake -m model -s au.safetensors -o folder", "folder exists"),
    "overwrite no model": ("bake -m model -s au.safetensors -o folder --overwrite", "not a model"),
    "baked below a file": ("bake -m model -s au.safetensors -o pairs.jsonl/m", "pairs.jsonl/m"),
    "no folder for baked": ("bake -m model -s au.safetensors -o no/m", "no/m"),
    # prompts and sampling
    "no prompt": (GENERATE, "no prompt"),
    "prompt empty": (f"{GENERATE} Hello ''", "prompt 2 is empty"),
    "prompt blank": (f"{GENERATE} '  '", "prompt 1 is empty"),
    "prompt over-long": (f"{GENERATE} '{'word ' * 300}'", "256 tokens"),
    "prompt and answer over-long": (
        with_other(GENERATE, "Hello --max-new-tokens 255"),
        "256 tokens",
    ),
    "prompt not UTF-8": (f"{GENERATE} \udcff", "prompt 1 is not UTF-8"),
    "prompts missing": (f"{GENERATE} --prompts no.txt", "no.txt", "No such"),
    "prompts a folder": (f"{GENERATE} --prompts folder", "folder", "directory"),
    "prompts blank": (f"{GENERATE} --prompts blank.txt", "no prompt"),
    "prompts not UTF-8": (f"{GENERATE} --prompts latin.jsonl", "latin.jsonl", "UTF-8"),
    "prompts not JSON": (f"{GENERATE} --prompts broken.jsonl", "line 2", "JSON"),
    "prompts not objects": (f"{GENERATE} --prompts list.jsonl", "row 1", "JSON object"),
    "prompts without prompt": (f"{GENERATE} --prompts noprompt.jsonl", "row 2", "prompt"),
    "prompts deeply nested": (f"{GENERATE} --prompts deep.jsonl", "line 1", "JSON"),
    "prompts half a character": (f"{GENERATE} --prompts half.jsonl", "line 1", "JSON"),
    "prompt a number": (f"{GENERATE} --prompts number.jsonl", "prompt 1", "text"),
    "raw and chat": (f"{GENERATE} Hello --raw --chat", "--raw", "--chat"),
    "chat without template": ("generate -m base --chat Hello", "no chat template", "--raw"),
    "messages, no template": ("generate -m base --prompts messages.jsonl", "no chat template"),
    "temperature negative": (f"{GENERATE} Hello --temperature -1", "temperature", "-1"),
    "temperature NaN": (f"{GENERATE} Hello --temperature nan", "temperature", "nan"),
    "top_p 0": (f"{GENERATE} Hello --top-p 0", "top_p"),
    "top_p above 1": (f"{GENERATE} Hello --top-p 1.5", "top_p"),
    "top_k negative": (f"{GENERATE} Hello --top-k -1", "top_k"),
    "no new tokens": (with_other(GENERATE, "Hello --max-new-tokens 0"), "max_new_tokens"),
    "batch of 0": (f"{GENERATE} Hello --batch-size 0", "batch_size"),
    "seed too large": (f"{GENERATE} Hello --seed {10**30}", "--seed"),
    "seed negative": (f"{GENERATE} Hello --seed -1", "--seed"),
    # the command line itself
    "unknown option": (f"{GENERATE} Hello --colour red", "--colour"),
    "option without value": (f"{GENERATE} Hello --steer", "--steer"),
    "unknown command": ("dance", "'dance'"),
    "unknown command of models": ("models dance", "'dance'"),
    "file too many": ("inspect au.safetensors caa.safetensors", "caa.safetensors"),
    "no file": ("inspect", "missing argument"),
    "name too long": (f"inspect {'x' * 300}", "too long"),
    "unknown pack": ("models pull dance", "'dance'", "smollm2-135m-instruct"),
    "unknown pack to remove": ("models remove dance", "'dance'"),
    "pack not there": ("models remove gemma3-270m", "not in the cache"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(trimtab: Command, bad: Path, case: str) -> None:
    """One line, exit status 2, and everything in the directory as it was."""
    command, *words = BAD[case]
    before = listing(bad)
    refused(trimtab(command), *words)
    assert listing(bad) == before


@pytest.mark.parametrize(
    "case", ["contrast missing", "layer out of range", "truncated", "another model", "no prompt"]
)
def test_bad_input_with_json(trimtab: Command, bad: Path, case: str) -> None:
    """The answer is the same line: there is no object that means failure."""
    command, *words = BAD[case]
    refused(trimtab(f"{command} --json"), *words)


def test_standard_input_that_is_not_utf8(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    refused(trimtab(f"{GENERATE} -"), "standard input", "UTF-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    refused(trimtab(f"{GENERATE} -"), "no prompt")


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "--1", "1--2", "1.5", "-1-2-3", "9999999999", "1 2"]
)
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(tt.TrimtabError, match="write numbers"):
        read_numbers("layers", text)


def test_numbers() -> None:
    assert read_numbers("layers", "4, 5,8-10,-1") == (4, 5, 8, 9, 10, -1)
    assert read_numbers("layers", "3-3") == (3,)
