"""`--scope` wherever a command steers or fits: what it does is what Python's `scoped` does."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

import trimtab as tt
from commands import GENERATE, PROMPTS, Command, home, same_as_python, trimtab, work, write_rows
from trimtab.cli.values import read_values

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

SCOPE = 'generated & !between("a", "b")'


def test_generate_under_a_scope(trimtab: Command, home: Path) -> None:
    au, caa = (tt.Steering.load(home / f"{name}.safetensors") for name in ("au", "caa"))
    base = [*shlex.split(GENERATE), *PROMPTS, "--json", "--steer", "au.safetensors@40"]
    one = trimtab(*base, "--scope", SCOPE).json["outputs"]
    same_as_python(one, ["au.safetensors@40"], steering=au.scoped(SCOPE).at(40))
    everywhere = trimtab(*base).json["outputs"]
    assert [each["text"] for each in one] != [each["text"] for each in everywhere]
    both = [*base, "--steer", "caa.safetensors@-2"]
    labels = ["au.safetensors@40", "caa.safetensors@-2"]
    for scopes in (["user"], [SCOPE, "last"]):
        more = [word for scope in scopes for word in ("--scope", scope)]
        found = trimtab(*both, *more).json["outputs"]
        first, second = scopes[0], scopes[-1]
        pair = [au.scoped(first).at(40), caa.scoped(second).at(-2)]
        same_as_python(found, labels, steering=[pair] * len(PROMPTS))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{GENERATE} Hi --steer au.safetensors --scope 'generated &'", "missing after '&'"),
        (f"{GENERATE} Hi --scope all", "name one with --steer"),
        (
            f"{GENERATE} Hi -s au.safetensors --scope all --scope last",
            "2 times --scope for 1 times",
        ),
        (f"{GENERATE} Hi --raw -s au.safetensors --scope user", "no turn of a chat"),
        ("bake --model model --steer caa.safetensors --scope prompt -o b", "acts on the scope"),
        ("fit caa --model model -c pairs.jsonl -o x.safetensors --scope fist", "no word 'fist'"),
        ("inspect caa.safetensors --model model", "give a --model and a prompt"),
        ("analyse dial --model x --task y --positions 'all &' -o b", "missing after '&'"),
        ("inspect caa.safetensors Hi", "give a --model and a prompt"),
        ("inspect caa.safetensors --scope 'all['", "':' is expected"),
    ],
)
def test_mistakes_in_scopes(trimtab: Command, work: Path, line: str, says: str) -> None:
    found = trimtab(line)
    assert found.status == 2
    assert says in found.err
    assert len(found.err.splitlines()) == 1
    assert not (work / "b").exists()
    assert not (work / "x.safetensors").exists()


def test_fit_on_a_scope_by_either_name(trimtab: Command) -> None:
    base = "fit caa --model model -c pairs.jsonl --layer 1 --no-measure --samples 0 --split none"
    for option in ("--scope", "--positions"):
        trimtab(*shlex.split(base), option, "generated[:32]", "-o", f"{option[2:]}.safetensors")
    one, other = (tt.Steering.load(f"{name}.safetensors") for name in ("scope", "positions"))
    assert list(map(str, one.scopes)) == list(map(str, other.scopes)) == ["generated[:32]"]
    assert one.digest == other.digest
    assert one.hyperparameters == other.hyperparameters
    assert one.hyperparameters["positions"] == "generated[:32]"


def test_fit_on_turns_from_texts_that_are_no_chats(trimtab: Command) -> None:
    """Its dial is measured as if the prompts' last tokens were the user's."""
    base = "fit caa --model model -c pairs.jsonl --layer 1 --samples 0 --split none"
    found = trimtab(f"{base} --scope user -o user.safetensors --json").json
    assert found["scope"] == "user"
    assert found["gain"] is None
    last = trimtab(f"{base} --scope last -o last.safetensors --json").json
    assert found["dial"] == last["dial"]
    assert last["gain"] is not None


def test_a_late_steering_bakes_on_all_tokens_where_that_is_asked_for(trimtab: Command) -> None:
    refused = trimtab("bake --model model --steer late.safetensors -o baked")
    assert "cannot bake caa: it acts on the scope 'generated'" in refused.err
    trimtab("bake --model model --steer late.safetensors --scope all -o baked")
    late, lm = tt.Steering.load("late.safetensors"), tt.load("model", device="cpu")
    expected = lm.logits(PROMPTS, steering=late.scoped("all"))
    found = tt.load("baked", device="cpu").logits(PROMPTS)
    assert torch.allclose(found, expected, atol=1e-3)


def test_inspect_shows_what_fires(trimtab: Command) -> None:
    line = [
        *shlex.split("inspect caa.safetensors@2 --model model --max-new-tokens 4"),
        "--scope", "last ~ 0.5", *PROMPTS,
    ]  # fmt: skip
    found = trimtab(*line, "--json").json
    assert found["scope"] == "last ~ 0.5"
    lm, one = tt.load("model", device="cpu"), tt.Steering.load("caa.safetensors").at(2)
    for fires, prompt in zip(found["fires"], PROMPTS, strict=True):
        expected = one.scoped("last ~ 0.5").explain(lm, prompt, max_new_tokens=4)
        assert fires == expected.as_json()
    text = trimtab(*line).text
    assert "It acts on the tokens of the scope 'last ~ 0.5'." in text
    assert "are steered: 5 under 'last ~ 0.5'." in text
    assert text.count("0.125") == 2
    assert trimtab("inspect late.safetensors --json").json["scope"] == "generated"


def test_evaluate_and_budget_under_a_scope(trimtab: Command) -> None:
    line = [
        *shlex.split("strength budget --model model --raw 'Today I feel' --kl 0.01 --json"),
        "--steer", "caa.safetensors",
    ]  # fmt: skip
    everywhere = trimtab(*line).json["budget"]
    last = trimtab(*line, "--scope", "prompt[-1:]").json["budget"]
    assert last["per_prompt"] != everywhere["per_prompt"]
    assert last == trimtab(*line, "--scope", "last").json["budget"]
    refused = trimtab(*line, "--scope", "generated[:3]")
    assert "cannot change what comes after a text" in refused.err
    write_rows("rows.jsonl", [
        {"prompt": f"Today {i}", "positive": " good", "negative": " bad", "part": "test"}
        for i in range(6)
    ])  # fmt: skip
    found = trimtab(
        *shlex.split("evaluate --model model --task contrast:rows.jsonl --json"),
        "--steer", "caa.safetensors@3", "--scope", "prompt[-1:]",
    ).json  # fmt: skip
    named = {result["steering"] for result in found["results"]}
    assert "caa.safetensors@3 on prompt[-1:]" in named


def test_values_of_a_sweep_keep_their_brackets() -> None:
    text = 'all, token(1, 2), between("a,b", [3, 4]),generated[:3]'
    expected = ["all", "token(1, 2)", 'between("a,b", [3, 4])', "generated[:3]"]
    assert read_values("--positions", text, str) == expected
    assert read_values("--k", "4,16,64", int) == [4, 16, 64]
