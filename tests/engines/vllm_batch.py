"""Asks vLLM and transformers for the same, in an environment that has both.

    python vllm_batch.py FOLDER

The folder has a model in `model`; what both gave goes into `said.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHARED = (
    "The notes below were written by several people over a long summer by the sea, and they do not "
    "all agree with each other about what happened on the last evening. "
)
ENDS = ("Read them", "She told me that", "Dear sir, I am", "Who", "We went to the")
NEW = 14


def main(folder: Path) -> None:
    import torch

    import trimtab as tt
    from trimtab.reading import Reading, next_tokens

    lm = tt.load(folder / "model", device="cpu", dtype=torch.float32)
    contrast = tt.Contrast.from_pairs(
        [("Today I feel", " happy and light", " sad and heavy"), ("It was", " wonderful", " dull")]
    )
    caa = tt.CAA(layer=3, token="last").fit(lm, contrast)
    heads = tt.ITI(k=3, alpha=2).fit(lm, contrast)
    for name, one in (("caa", caa), ("heads", heads)):
        one.save(folder / f"{name}.safetensors")
    acting: list[Any] = [
        None, caa.at(4), caa.at(-7), heads.at(9), [caa.at(3), heads.at(5)],
        caa.at(9).scoped("generated"), caa.at(9).scoped("last"), caa.at(9).scoped("prompt[-6:]"),
        caa.at(9).scoped("generated ~ 0.8"),
    ]  # fmt: skip
    prompts = [SHARED + end for end in ENDS for _ in acting]
    each = acting * len(ENDS)
    options: dict[str, Any] = {"max_new_tokens": NEW, "chat": False}
    said: dict[str, Any] = {"texts": {}, "file": {}}
    said["texts"]["transformers"] = tokens_of(lm.generate(prompts, steering=each, **options))
    readings = []
    for prompt in prompts:
        (text,) = (tuple(one) for one in lm.encode([f"{prompt} and so on, as they said"]))
        start = len(text) - 6
        readings.append(
            Reading(text[:-1], tuple(range(start - 1, len(text) - 1)), start, text[start:])
        )
    expected = log_p_of(next_tokens(lm, readings, each), len(readings))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in rows_of(folder)))
    plain = tt.generate_file(lm, rows, folder / "plain.jsonl", **options)
    pairs = [
        {
            "prompt": f"{SHARED}{end}, I feel",
            "positive": " happy and light",
            "negative": f" sad and heavy {part}",
            "part": part,
        }
        for part in ("train", "validation", "test")
        for end in ENDS
    ]
    file = folder / "parts.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    parts = tt.Contrast.from_jsonl(file)
    steered = {"heads": heads.at(9), "caa": caa.at(-7), "late": caa.at(9).scoped("generated")}
    space = {"layer": [1, 3], "alpha": [1.0, 4.0, -4.0]}
    asked: dict[str, Any] = {"fixed": {"token": "last"}, "baselines": False}
    said["evaluated"] = {"transformers": figures(tt.evaluate(lm, parts, steering=steered))}
    said["swept"] = {"transformers": trials(tt.sweep(lm, "caa", parts, space, **asked))}
    engine_options = {"max_model_len": 256, "block_size": 32, "max_num_seqs": 8,
                      "max_num_batched_tokens": 64, "enforce_eager": True}  # fmt: skip
    with tt.VLLM(lm, [caa, heads], model=folder / "model", **engine_options) as engine:
        said["texts"]["vllm"] = tokens_of(engine.generate(prompts, steering=each, **options))
        again = tokens_of(engine.generate(prompts[::-1], steering=each[::-1], **options))
        said["cached"] = again[::-1] == said["texts"]["vllm"]
        found = log_p_of(engine.next_tokens(readings, each), len(readings))
        tt.generate_file(lm, rows, folder / "out.jsonl", engine=engine, **options)
    engine_options["hooks"] = ["resid"]  # it starts at the evaluation, before the sweep says where
    with tt.VLLM(lm, model=folder / "model", **engine_options) as engine:
        said["evaluated"]["vllm"] = figures(tt.evaluate(lm, parts, steering=steered, engine=engine))
        said["swept"]["vllm"] = trials(tt.sweep(lm, "caa", parts, space, **asked, engine=engine))
    said["scored"] = list(zip(found, expected, strict=True))
    assert not plain.failed
    for name, file in (("vllm", "out.jsonl"), ("transformers", "plain.jsonl")):
        said["file"][name] = [json.loads(one) for one in (folder / file).read_text().splitlines()]
    (folder / "said.json").write_text(json.dumps(said))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    caa, heads = str(folder / "caa.safetensors"), str(folder / "heads.safetensors")
    return [
        {"prompt": SHARED + ENDS[0]},
        {"prompt": SHARED + ENDS[0], "steer": caa, "dial": 6, "id": "b"},
        {"prompt": SHARED + ENDS[1], "steer": [caa, heads], "dial": [5, 7]},
        {"messages": [{"role": "user", "content": "Why?"}], "steer": f"{caa}@8", "scope": "last"},
        {"messages": [{"role": "user", "content": "Why?"}], "steer": f"{caa}@8", "scope": "user"},
        {"messages": [{"role": "user", "content": "Why?"}]},
    ]


def figures(found: Any) -> list[Any]:
    return [
        [record["steering"], record["index"], record["values"]["log_odds"], record["output"]]
        for record in found.records
    ]


def trials(found: Any) -> list[Any]:
    return [[one.params, one.state, one.value, one.cost, one.test] for one in found.trials]


def tokens_of(completions: Any) -> list[list[int]]:
    return [list(one.tokens) for one in completions]


def log_p_of(batches: Any, count: int) -> list[float]:
    found = [0.0] * count
    for planned, some in batches:
        for place, one in zip(planned.rows, some, strict=True):
            found[place] = float(one.log_p.sum())
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
