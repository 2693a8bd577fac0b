"""`trimtab generate` on a tiny model: texts are those of Python, from arguments, files and
pipes."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest

import trimtab as tt
from commands import GENERATE, PROMPTS, Command, home, same_as_python, trimtab, work, write_rows

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

# -- generate ----------------------------------------------------------------------------------


def test_generate(trimtab: Command) -> None:
    found = trimtab(*shlex.split(GENERATE), *PROMPTS, "--json").json
    assert [output["prompt"] for output in found["outputs"]] == PROMPTS
    same_as_python(found["outputs"], [])
    assert found["model"]["architecture"] == "llama"


def test_generate_steered(trimtab: Command, home: Path) -> None:
    au, caa = (tt.Steering.load(home / f"{name}.safetensors") for name in ("au", "caa"))
    base = f"{GENERATE} 'Today I feel' 'The ship' --json"
    plain = trimtab(base).json["outputs"]
    fitted = trimtab(f"{base} --steer au.safetensors").json["outputs"]
    same_as_python(fitted, ["au.safetensors"], steering=au)
    turned = trimtab(f"{base} --steer au.safetensors@40").json["outputs"]
    same_as_python(turned, ["au.safetensors@40"], steering=au.at(40))
    both = trimtab(f"{base} -s au.safetensors@40 --steer caa.safetensors@-2").json["outputs"]
    labels = ["au.safetensors@40", "caa.safetensors@-2"]
    same_as_python(both, labels, steering=[[au.at(40), caa.at(-2)]] * 2)
    texts = [[output["text"] for output in run] for run in (plain, turned, both)]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_generate_raw_and_chat(trimtab: Command) -> None:
    base = f"{GENERATE} 'Today I feel' --json"
    found = {how: trimtab(f"{base} {how}").json["outputs"] for how in ("--raw", "--chat", "")}
    same_as_python(found["--raw"], [], chat=False)
    same_as_python(found["--chat"], [], chat=True)
    assert found[""] == found["--chat"] != found["--raw"]  # this model has a template
    # A model without a template takes text raw.
    arguments = "generate --model base --max-new-tokens 6 'Today I feel' --json"
    assert trimtab(arguments).json["outputs"] == found["--raw"]


def test_generate_from_files_and_standard_input(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": PROMPTS[1]}]
    (work / "p.txt").write_bytes("\ufeffToday I feel\r\n\n  \nShe said\u2028no\n".encode())
    write_rows("p.jsonl", [{"prompt": PROMPTS[0], "more": 1}, {"prompt": messages}])
    text = trimtab(f"{GENERATE} --prompts p.txt --json").json["outputs"]
    assert [output["prompt"] for output in text] == ["Today I feel", "She said\u2028no"]
    rows = trimtab(f"{GENERATE} --prompts p.jsonl --json").json["outputs"]
    assert [output["prompt"] for output in rows] == [PROMPTS[0], messages]
    same_as_python(rows, [])
    monkeypatch.setattr("sys.stdin", io.StringIO("Today I feel\n\nShe said\u2028no\n"))
    assert trimtab(f"{GENERATE} - --json").json["outputs"] == text
    # All sources together, in the order of command line, then file.
    both = trimtab(f"{GENERATE} Hello --prompts p.jsonl --json").json["outputs"]
    assert [output["prompt"] for output in both] == ["Hello", PROMPTS[0], messages]
    # The last message of a conversation is what is shown to people.
    assert PROMPTS[1] in trimtab(f"{GENERATE} --prompts p.jsonl").text


def test_generate_compares(trimtab: Command) -> None:
    base = f"{GENERATE} 'Today I feel' 'The ship' --steer caa.safetensors@8 --compare"
    found = trimtab(f"{base} --json").json["outputs"]
    labels = [[], [], ["caa.safetensors@8"], ["caa.safetensors@8"]]
    assert [output["steering"] for output in found] == labels
    same_as_python(found[:2], [])
    caa = tt.Steering.load("caa.safetensors").at(8)
    same_as_python(found[2:], ["caa.safetensors@8"], steering=caa)
    text = trimtab(base).text
    for words in ("Today I feel", "unsteered", "caa.safetensors@8", *(o["text"] for o in found)):
        assert words in text


def test_generate_repeats_with_a_seed(trimtab: Command) -> None:
    base = f"{GENERATE} 'Today I feel' --temperature 1.5 --json --seed"
    one, again, other = (trimtab(f"{base} {seed}").json["outputs"] for seed in (3, 3, 4))
    assert one == again != other
    same_as_python(one, [], temperature=1.5, seed=3)


def test_generate_shows_text_as_it_is(trimtab: Command) -> None:
    prompt = "[bold]a[/x] :smile: b\\"
    found = trimtab(*shlex.split(GENERATE), prompt, "--json").json["outputs"]
    text = trimtab(*shlex.split(GENERATE), prompt).text
    assert text.startswith(prompt + "\n")
    assert found[0]["text"] in text


def test_generate_writes_models_text_untouched(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[/b] :smile: \\ a\tb " + "long " * 60
    completion = tt.Completion("Hi", text, (1,))
    monkeypatch.setattr(tt.LanguageModel, "generate", lambda *a, **o: [completion])
    assert trimtab(f"{GENERATE} Hi").text == f"Hi\n{text}\n\n"
