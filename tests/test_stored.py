"""A pass kept on disk: equal to one that is not, resumed after a kill, and right when damaged.

What the model is run for is counted at its body, so that no result can come from a second look.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from helpers import language_model, steer_at
from trimtab.fitting.activations import Statistics, UnitLength, Want, collect
from trimtab.fitting.statistics import Active, Means, Samples, SecondMoment, SignCounts
from trimtab.steering.operators import to_tensors

PAIRS = [
    (f"There are {n} numbers here, and {who} said{' it' * (n % 3)}", " yes, it is.", " no!")
    for n in range(6)
    for who in ("the king", "her mother", "one of the children")
]
TEXTS = [[prompt + side[i] for prompt, *side in PAIRS] for i in (0, 1)]
SITES = ("embed", "layers.0.heads", "layers.1.ffn_out", "layers.1.resid")
UNIT = UnitLength()


def _contrast(paired: bool = True) -> tt.Contrast:
    return tt.Contrast.from_pairs(PAIRS) if paired else tt.Contrast.from_texts(*TEXTS)


def _wants(paired: bool = True) -> list[Want]:
    kinds = (Means, Samples, Active) + ((SignCounts, SecondMoment) if paired else ())
    tokens = ("last", "mean", -2) + (("answer",) if paired else ())
    wants = [Want(site, token, kind) for site in SITES for token in tokens for kind in kinds]
    return [*wants, *(Want(site, "last", Means, read=UNIT) for site in SITES)]


def _numbers(statistic: Any) -> list[Tensor]:
    """All that a statistic has found out."""
    if isinstance(statistic, Means):
        return [*statistic.sums, torch.tensor(statistic.counts)]
    if isinstance(statistic, Active):
        return list(statistic.counts)
    if isinstance(statistic, Samples):
        return list(statistic.texts())
    if isinstance(statistic, SecondMoment):
        return [statistic.sum]
    return [statistic.larger, statistic.smaller, torch.tensor(statistic.pairs)]


def _check_equal(one: Statistics, two: Statistics) -> None:
    """Bit for bit."""
    assert set(one) == set(two)
    for want, statistic in one.items():
        for number, other in zip(_numbers(statistic), _numbers(two[want]), strict=True):
            assert torch.equal(number, other), want


def _tensors(steering: tt.Steering) -> list[Tensor]:
    found = [steering.tables[name] for name in sorted(steering.tables)]
    for intervention in steering.interventions:
        found += to_tensors(intervention.operator)[0].values()
    return found


def _check_same(one: Sequence[tt.Steering], two: Sequence[tt.Steering]) -> None:
    for first, second in zip(one, two, strict=True):
        for tensor, other in zip(_tensors(first), _tensors(second), strict=True):
            assert torch.equal(tensor, other)


class _Run:
    """What passed the model: the rows of each batch, and how often each module was begun."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.modules: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        return sum(map(len, self.batches))


@contextmanager
def _watched(lm: tt.LanguageModel) -> Iterator[_Run]:
    run = _Run()

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        run.batches.append([tuple(row) for row in kwargs["input_ids"].tolist()])

    body = lm.anatomy.body
    handles = [body.register_forward_pre_hook(note, with_kwargs=True)]
    for name, module in lm.model.named_modules():
        count = lambda *_, name=name: run.modules.update([name])  # noqa: E731
        handles.append(module.register_forward_pre_hook(count))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", 150)


def _rooms(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} if cache.exists() else set()


# -- with a cache as without ------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_equal_to_a_pass_that_is_not_kept(name: str, paired: bool, tmp_path: Path) -> None:
    lm, contrast, wants = language_model(name), _contrast(paired), _wants(paired)
    plain = collect(lm, contrast, wants)
    with _watched(lm) as run:
        first = collect(lm, contrast, wants, cache=tmp_path / "a" / "b")
    assert run.rows == len(contrast)
    assert len(run.batches) > 3
    with _watched(lm) as run:
        second = collect(lm, contrast, wants, cache=str(tmp_path / "a" / "b"))
    assert not run.modules
    _check_equal(first, plain)
    _check_equal(second, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    lm, contrast, wants = language_model("llama", dtype=dtype), _contrast(), _wants()
    plain = collect(lm, contrast, wants)
    for _ in range(2):
        _check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)


def test_methods_with_a_cache(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), _contrast()
    methods = [
        tt.ActAdd(layer=1, pairs=3),
        tt.CAA(layer=1, variant="pca"),
        tt.SADI(k=3),
        tt.SAS(),
        tt.AUSteer(k=4),
    ]
    plain = tt.fit(methods, lm, contrast)
    _check_same(tt.fit(methods, lm, contrast, cache=tmp_path), plain)
    with _watched(lm) as run:
        _check_same(tt.fit(methods, lm, contrast, cache=tmp_path), plain)
        _check_same([methods[1].fit(lm, contrast, cache=tmp_path)], [plain[1]])
    assert not run.modules


def test_no_cache_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    collect(language_model("llama"), _contrast(), _wants())
    assert not list(tmp_path.iterdir())


# -- only what is missing is run --------------------------------------------------------------


def test_other_sites_and_tokens_of_the_same_pass(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), _contrast()
    low, high = Want("layers.0.resid", "last", Means), Want("layers.2.resid", "last", Means)
    middle = Want("layers.1.ffn_out", "last", SignCounts)
    collect(lm, contrast, [high], cache=tmp_path)

    def run_for(*wants: Want) -> _Run:
        plain = collect(lm, contrast, wants)
        with _watched(lm) as run:
            _check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
        return run

    # The site above is there: nothing beyond the missing one is run for it.
    run = run_for(low, high)
    assert run.rows == len(contrast)
    assert run.modules["model.layers.0"] == len(run.batches)
    assert run.modules["model.layers.1"] == 0
    run = run_for(low, middle, high)
    assert run.rows == len(contrast)
    assert run.modules["model.layers.1.mlp"] == len(run.batches)
    assert run.modules["model.layers.2"] == 0
    assert run_for(low, middle, high).rows == 0
    # Another statistic of what is there needs no pass; another token or form of it does.
    assert run_for(Want("layers.2.resid", -1, SecondMoment)).rows == 0
    for other in (
        Want("layers.2.resid", "mean", Means),
        Want("layers.2.resid", "answer", Means),
        Want("layers.2.resid", -2, Means),
        Want("layers.2.resid", "last", Means, read=UNIT),
    ):
        assert run_for(other).rows == len(contrast)
    assert len(_rooms(tmp_path)) == 1


def _a_weight_larger(lm: tt.LanguageModel) -> tt.LanguageModel:
    with torch.no_grad():
        weight = lm.model.get_parameter("model.layers.0.mlp.down_proj.weight")
        weight[5, 3] *= 1.5  # its sign stays
    return lm


def _two_weights_swapped(lm: tt.LanguageModel) -> tt.LanguageModel:
    with torch.no_grad():
        weight = lm.model.get_parameter("model.layers.0.mlp.down_proj.weight").view(-1)
        for first, second in ((10, 12), (21, 41)):
            kept = weight[first].clone()
            weight[first] = weight[second]
            weight[second] = kept
    return lm


OTHER_MODELS: dict[str, Callable[[], tt.LanguageModel]] = {
    "weights": lambda: language_model("llama", seed=1),
    "one weight": lambda: _a_weight_larger(language_model("llama")),
    "order of weights": lambda: _two_weights_swapped(language_model("llama")),
    "dtype": lambda: language_model("llama", dtype=torch.bfloat16),
    "configuration": lambda: language_model("llama", rms_norm_eps=0.1),
    "baked": lambda: _baked(language_model("llama")),
}


def _baked(lm: tt.LanguageModel) -> tt.LanguageModel:
    return tt.bake(lm, steer_at(lm, "heads", "Scale", layer=0))


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_model_has_a_room_of_its_own(what: str, tmp_path: Path) -> None:
    contrast, wants = _contrast(), [Want(site, "last", Means) for site in SITES]
    collect(language_model("llama"), contrast, wants, cache=tmp_path)
    lm = OTHER_MODELS[what]()
    plain = collect(lm, contrast, wants)
    with _watched(lm) as run:
        _check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
    assert run.rows == len(contrast)
    assert len(_rooms(tmp_path)) == 2
    # And the first one's is as it was.
    first = language_model("llama")
    with _watched(first) as run:
        kept = collect(first, contrast, wants, cache=tmp_path)
    assert not run.modules
    _check_equal(kept, collect(first, contrast, wants))


def test_one_bit_of_any_weight_counts(tmp_path: Path) -> None:
    """Also the last ones of tensors whose size is no multiple of anything."""
    lm = language_model("gpt2", n_inner=97)
    contrast, wants = _contrast(), [Want("embed", "last", Means)]
    collect(lm, contrast, wants, cache=tmp_path)
    seen = _rooms(tmp_path)
    parameters = list(lm.model.named_parameters())
    odd = [(name, tensor) for name, tensor in parameters if tensor.numel() % 2]
    assert odd
    for name, tensor in parameters[::9] + odd[:1]:
        bits = tensor.detach().view(-1).view(torch.int32)
        bits[-1] ^= 1
        collect(lm, contrast, wants, cache=tmp_path)
        assert len(_rooms(tmp_path)) == len(seen) + 1, name
        bits[-1] ^= 1
        shutil.rmtree(tmp_path / next(iter(_rooms(tmp_path) - seen)))
    with _watched(lm) as run:
        collect(lm, contrast, wants, cache=tmp_path)
    assert not run.modules


def test_names_do_not_matter(tmp_path: Path) -> None:
    """The same weights under another name, and the same texts, are the same pass."""
    contrast, wants = _contrast(), [Want("layers.1.resid", "last", Means)]
    collect(language_model("llama"), contrast, wants, cache=tmp_path)
    lm = language_model("llama")
    renamed = tt.wrap(lm.model, lm.tokenizer, "another name")
    with _watched(renamed) as run:
        collect(renamed, replace(contrast, name="another"), wants, cache=tmp_path)
    assert not run.modules


def _with_pair(number: int, pair: tuple[str, str, str]) -> tt.Contrast:
    return tt.Contrast.from_pairs([*PAIRS[:number], pair, *PAIRS[number + 1 :]])


OTHER_TEXTS: dict[str, tt.Contrast] = {
    "prompt": _with_pair(3, (PAIRS[3][0] + ",", *PAIRS[3][1:])),
    "positive": _with_pair(3, (PAIRS[3][0], " maybe.", PAIRS[3][2])),
    "negative": _with_pair(17, (*PAIRS[17][:2], " maybe.")),
    "one token": _with_pair(3, (*PAIRS[3][:2], " no?")),
    "sides": _with_pair(3, (PAIRS[3][0], PAIRS[3][2], PAIRS[3][1])),
    "order": tt.Contrast.from_pairs([PAIRS[1], PAIRS[0], *PAIRS[2:]]),
    "fewer": tt.Contrast.from_pairs(PAIRS[:-1]),
    "answer": _with_pair(0, (PAIRS[0][0] + " yes", ", it is.", "!")),
}


@pytest.mark.parametrize("what", OTHER_TEXTS)
def test_other_texts_have_a_room_of_their_own(what: str, tmp_path: Path) -> None:
    lm = language_model("llama")
    wants = [Want("layers.1.resid", token, Means) for token in ("last", "answer")]
    collect(lm, _contrast(), wants, cache=tmp_path)
    plain = collect(lm, OTHER_TEXTS[what], wants)
    with _watched(lm) as run:
        _check_equal(collect(lm, OTHER_TEXTS[what], wants, cache=tmp_path), plain)
    assert run.rows == len(OTHER_TEXTS[what])
    assert len(_rooms(tmp_path)) == 2


def test_only_where_the_answer_begins_is_different(tmp_path: Path) -> None:
    """The same tokens on both sides; the mean over the answer still is another."""
    lm = language_model("llama")
    wants = [Want("layers.1.resid", "answer", Means)]
    for pair in (("The answer", " is yes", " is no"), ("The answer is", " yes", " no")):
        contrast = tt.Contrast.from_pairs([pair])
        plain = collect(lm, contrast, wants)
        _check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
    assert len(_rooms(tmp_path)) == 2


def test_only_where_a_side_ends_is_different(tmp_path: Path) -> None:
    """One after the other, the two sides are the same tokens."""
    lm = language_model("llama")
    wants = [Want("layers.1.resid", "last", Means)]
    for pair in (("The answer is", " yes no", " it"), ("The answer is", " yes", " no it")):
        contrast = tt.Contrast.from_pairs([pair])
        plain = collect(lm, contrast, wants)
        _check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
    assert len(_rooms(tmp_path)) == 2


def test_a_cut_has_a_room_of_its_own(tmp_path: Path) -> None:
    lm, contrast, wants = language_model("llama"), _contrast(), [Want("embed", "mean", Means)]
    collect(lm, contrast, wants, cache=tmp_path)
    for limit, rows in ((20, len(contrast)), (21, len(contrast)), (20, 0), (10**6, 0)):
        with _watched(lm) as run:
            if limit < 100:
                with pytest.warns(tt.TrimtabWarning, match="were cut"):
                    found = collect(lm, contrast, wants, cache=tmp_path, max_length=limit)
                with pytest.warns(tt.TrimtabWarning, match="were cut"):
                    plain = collect(lm, contrast, wants, max_length=limit)
            else:
                found = collect(lm, contrast, wants, cache=tmp_path, max_length=limit)
                plain = collect(lm, contrast, wants)
        assert run.rows == rows + len(contrast)  # the second one has no cache
        _check_equal(found, plain)


def test_two_forms_of_one_width(tmp_path: Path) -> None:
    """Each has its name, and so its files."""
    lm, contrast = language_model("llama"), _contrast()

    class Form(namedtuple("Form", ["name", "by"])):
        width = 24

        def __call__(self, activation: Tensor) -> Tensor:
            return activation[..., :24] * self.by

    wants = [
        Want("layers.0.resid", "last", Means, read=Form(f"by{by}", by)) for by in (2.0, 3.0, 0.5)
    ]
    plain = collect(lm, contrast, wants)
    assert torch.allclose(plain[wants[0]].difference * 1.5, plain[wants[1]].difference)
    for rows in (len(contrast), 0):
        for want in wants:
            with _watched(lm) as run:
                found = collect(lm, contrast, [want], cache=tmp_path)
            assert run.rows == rows
            _check_equal(found, Statistics({want: plain[want]}))


def test_some_rows_and_then_all(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), _contrast()
    few, whole = tt.ActAdd(layer=1, pairs=2), tt.CAA(layer=1, token="mean")
    plain = tt.fit([few], lm, contrast), tt.fit([whole], lm, contrast)
    with _watched(lm) as run:
        _check_same(tt.fit([few], lm, contrast, cache=tmp_path), plain[0])
    assert run.rows == 2
    with _watched(lm) as run:
        _check_same(tt.fit([few], lm, contrast, cache=tmp_path), plain[0])
    assert run.rows == 0
    # Both rows are beside others in a batch now, which has to run as a whole.
    with _watched(lm) as run:
        _check_same(tt.fit([whole], lm, contrast, cache=tmp_path), plain[1])
    assert run.rows == len(contrast)
    # Of all, any are there.
    with _watched(lm) as run:
        tt.fit([few, tt.ActAdd(layer=1, pairs=7)], lm, contrast, cache=tmp_path)
    assert not run.modules
    other = tmp_path / "other"
    tt.fit([whole], lm, contrast, cache=other)
    with _watched(lm) as run:
        tt.fit([few], lm, contrast, cache=other)
    assert not run.modules


def test_some_texts_of_each_side_and_then_all(tmp_path: Path) -> None:
    lm, contrast = language_model("gpt2"), _contrast(paired=False)
    few = tt.ActAdd(layer=0, token="last")
    plain = tt.CAA(layer=0).fit(lm, contrast)
    with _watched(lm) as run:
        few.fit(lm, contrast, cache=tmp_path)
    assert run.rows == 2
    _check_same([tt.CAA(layer=0).fit(lm, contrast, cache=tmp_path)], [plain])


def test_a_steered_model_is_not_kept(tmp_path: Path) -> None:
    """Its weights say nothing of the steering, and the next pass would be served with it."""
    lm, contrast = language_model("llama"), _contrast()
    cache = tmp_path / "cache"
    method = tt.CAA(layer=2)
    with lm.steered(steer_at(lm, "resid", layer=0)):
        with pytest.raises(tt.TrimtabError, match="is steered.*leave the cache out") as error:
            method.fit(lm, contrast, cache=cache)
        assert "\n" not in str(error.value)
        steered = method.fit(lm, contrast)
    assert not cache.exists()
    unsteered = method.fit(lm, contrast, cache=cache)
    assert not torch.equal(_tensors(steered)[0], _tensors(unsteered)[0])


# -- killed, and run again --------------------------------------------------------------------

#: Fits with a cache, slowly; notes the rows of each batch before it is run.
SLOW_FIT = """
import json, sys, time
import torch
import trimtab as tt
from helpers import language_model
from test_stored import PAIRS, RESUMED

cache, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.set_num_threads(2)
tt.LanguageModel.batch_tokens = 150
lm = language_model("llama")

def note(module, args, kwargs):
    with open(log, "a") as file:
        file.write(json.dumps(kwargs["input_ids"].tolist()) + "\\n")
    time.sleep(seconds)

lm.anatomy.body.register_forward_pre_hook(note, with_kwargs=True)
fitted = tt.fit(RESUMED, lm, tt.Contrast.from_pairs(PAIRS), cache=cache)
for number, steering in enumerate(fitted):
    steering.save(f"{log}.{number}.safetensors")
"""
RESUMED = [
    tt.CAA(layer=(0, 2)),
    tt.CAA(layer=1, variant="pca", token="answer"),
    tt.SADI(k=3),
    tt.AUSteer(k=4),
]


@contextmanager
def _slow_fit(cache: Path, log: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that fits with this cache."""
    folder = str(Path(__file__).parent)
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_FIT, str(cache), str(log), str(seconds)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_for_batches(process: subprocess.Popen[bytes], log: Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(_logged(log)) < count:
        if process.poll() is not None:
            assert process.stderr
            pytest.fail(f"ended early: {process.stderr.read().decode()[-2000:]}")
        assert time.monotonic() < until, "the other process does not come on"
        time.sleep(0.02)


def _logged(log: Path) -> list[list[tuple[int, ...]]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [[tuple(row) for row in json.loads(line)] for line in lines]


def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    with _slow_fit(cache, log, seconds=0.3) as process:
        _wait_for_batches(process, log, 4)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = _logged(log)
    lm, contrast = language_model("llama"), _contrast()
    plain = tt.fit(RESUMED, lm, contrast)
    with _watched(lm) as run:
        resumed = tt.fit(RESUMED, lm, contrast, cache=cache)
    _check_same(resumed, plain)
    # Each text once, but those that were in flight.
    times = Counter(row for batch in (*before, *run.batches) for row in batch)
    assert len(times) == len(contrast)
    twice = {row for row, count in times.items() if count > 1}
    assert max(times.values()) <= 2
    assert twice <= set(before[-1])
    assert 0 < run.rows < len(contrast)
    with _watched(lm) as run:
        _check_same(tt.fit(RESUMED, lm, contrast, cache=cache), plain)
    assert not run.modules


def test_interrupted_and_run_again(tmp_path: Path) -> None:
    """Ctrl-C at every batch in turn: each run goes one batch further."""
    lm, contrast = language_model("llama"), _contrast()
    plain = tt.fit(RESUMED, lm, contrast)
    body, batches = lm.anatomy.body, []

    def interrupt(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        batches.append([tuple(row) for row in kwargs["input_ids"].tolist()])
        if len(batches) % 2 == 0:
            raise KeyboardInterrupt

    handle = body.register_forward_pre_hook(interrupt, with_kwargs=True)
    runs = 0
    while True:
        runs += 1
        try:
            found = tt.fit(RESUMED, lm, contrast, cache=tmp_path)
            break
        except KeyboardInterrupt:
            assert runs < 30
    handle.remove()
    assert runs > 3
    _check_same(found, plain)
    assert len(batches) == 2 * (runs - 1) + len(batches) % 2
    assert len({row for batch in batches for row in batch}) == len(contrast)


def test_two_processes_at_once(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    lm, contrast = language_model("llama"), _contrast()
    plain = tt.fit(RESUMED, lm, contrast)
    with _slow_fit(cache, log, seconds=0.05) as process:
        _wait_for_batches(process, log, 1)
        handle = lm.anatomy.body.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        here = tt.fit(RESUMED, lm, contrast, cache=cache)
        handle.remove()
        assert process.wait(timeout=120) == 0
    _check_same(here, plain)
    there = [tt.Steering.load(f"{log}.{number}.safetensors") for number in range(len(RESUMED))]
    _check_same(there, plain)
    with _watched(lm) as run:
        _check_same(tt.fit(RESUMED, lm, contrast, cache=cache), plain)
    assert not run.modules


# -- damage -----------------------------------------------------------------------------------


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


ROW = 2 * 48 * 4  # bytes of a row of layers.1.resid

#: What is done to the file of one pick; which rows of it are lost.
DAMAGES: dict[str, tuple[str, Callable[[Path], None], set[int]]] = {
    "a byte": ("f32", lambda path: _flip(path, 5 * ROW + 7), {5}),
    "the last byte": ("f32", lambda path: _flip(path, 18 * ROW - 1), {17}),
    "the first byte": ("f32", lambda path: _flip(path, 0), {0}),
    "a checksum": ("crc", lambda path: _flip(path, 4 * 5), {5}),
    "no checksum": ("crc", lambda path: path.write_bytes(bytes(4 * 18)), set(range(18))),
    "cut within a row": ("f32", lambda path: _truncate(path, 15 * ROW + 9), {15, 16, 17}),
    "cut between rows": ("f32", lambda path: _truncate(path, 16 * ROW), {16, 17}),
    "checksums cut": ("crc", lambda path: _truncate(path, 4 * 16 + 1), {16, 17}),
    "zeros": ("f32", lambda path: path.write_bytes(bytes(18 * ROW)), set(range(18))),
    "rows lost": ("f32", lambda path: path.unlink(), set(range(18))),
    "checksums lost": ("crc", lambda path: path.unlink(), set(range(18))),
    "empty": ("f32", lambda path: path.write_bytes(b""), set(range(18))),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_rows_are_run_again(what: str, tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), _contrast()
    want, other = Want("layers.1.resid", "last", Samples), Want("layers.2.resid", "last", Samples)
    plain = collect(lm, contrast, [want, other])
    with _watched(lm) as run:
        collect(lm, contrast, [want, other], cache=tmp_path)
    ending, damage, lost = DAMAGES[what]
    (file,) = tmp_path.glob(f"*/layers.1.resid.-1.{ending}")
    damage(file)
    order = tt.packing.encode_contrast(lm, contrast, None)
    texts = {row.tokens: row.index for row in order}
    batches = [{texts[_bare(row, texts)] for row in batch} for batch in run.batches]
    with _watched(lm) as run:
        _check_equal(collect(lm, contrast, [want, other], cache=tmp_path), plain)
    # The batches that hold a lost row, and of those only the site that is lost.
    assert run.rows == sum(len(batch) for batch in batches if batch & lost)
    assert run.rows > 0
    assert run.modules["model.layers.2"] == 0
    with _watched(lm) as run:
        _check_equal(collect(lm, contrast, [want, other], cache=tmp_path), plain)
    assert not run.modules


def _bare(row: tuple[int, ...], texts: dict[tuple[int, ...], int]) -> tuple[int, ...]:
    """A row without its padding."""
    return next(row[:length] for length in range(len(row), 0, -1) if row[:length] in texts)


def test_a_row_in_the_place_of_another(tmp_path: Path) -> None:
    """Whole rows swapped have whole contents; their checksums tell."""
    lm, contrast = language_model("llama"), _contrast()
    want = Want("layers.1.resid", "last", Samples)
    plain = collect(lm, contrast, [want], cache=tmp_path)
    (file,) = tmp_path.glob("*/*.f32")
    content = file.read_bytes()
    assert content[:ROW] != content[ROW : 2 * ROW]
    file.write_bytes(content[ROW : 2 * ROW] + content[:ROW] + content[2 * ROW :])
    _check_equal(collect(lm, contrast, [want], cache=tmp_path), plain)


# -- what it looks like, and what it refuses --------------------------------------------------


def test_the_files(tmp_path: Path) -> None:
    """As the format says, so that others can read them."""
    lm, contrast = language_model("llama"), _contrast()
    wants = [Want("layers.1.resid", "last", Samples), Want("embed", "mean", Means, read=UNIT)]
    found = collect(lm, contrast, wants, cache=tmp_path)
    (room,) = tmp_path.iterdir()
    names = {f"{pick}.{end}" for pick in ("layers.1.resid.-1", "embed.mean.unit")
             for end in ("f32", "crc")}  # fmt: skip
    assert {path.name for path in room.iterdir()} == {"pass.json", *names}
    about = json.loads((room / "pass.json").read_text())
    assert about["model"]["digest"] == lm.identity.digest
    assert (about["dtype"], about["texts"]) == ("torch.float32", 36)
    stored = torch.frombuffer(
        bytearray((room / "layers.1.resid.-1.f32").read_bytes()), dtype=torch.float32
    )
    texts, labels, _ = found[wants[0]].texts()
    stored = stored.view(18, 2, 48)
    for side, positive in ((0, True), (1, False)):
        error = (stored[:, side] - texts[labels == positive]).abs()
        assert (error <= 2**-10 * stored[:, side].abs().amax(-1, keepdim=True)).all()


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_reading_changes_nothing(tmp_path: Path) -> None:
    lm, contrast, wants = language_model("llama"), _contrast(), _wants()
    collect(lm, contrast, wants, cache=tmp_path)
    before = _digests(tmp_path)
    assert len(before) == 1 + 2 * len({want.pick for want in wants})
    collect(lm, contrast, wants, cache=tmp_path)
    assert _digests(tmp_path) == before


def _check_refused(cache: Path, match: str) -> None:
    lm = language_model("llama")
    with _watched(lm) as run, pytest.raises(tt.TrimtabError, match=match) as error:
        tt.CAA(layer=1).fit(lm, _contrast(), cache=cache)
    assert "\n" not in str(error.value)
    assert not run.modules


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_that_is_a_file(inside: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    _check_refused(file / "cache" if inside else file, f"^cannot use the cache {file}")
    assert file.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_cache_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        _check_refused(tmp_path, "^cannot use the cache .*: Permission denied$")
    finally:
        tmp_path.chmod(0o700)


def test_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the model runs, in spite of the check."""
    lm, contrast = language_model("llama"), _contrast()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.fitting.stored._write_at", full)
        with pytest.raises(tt.TrimtabError, match="^cannot write to the cache .*: No space left"):
            tt.CAA(layer=1).fit(lm, contrast, cache=tmp_path)
    plain = tt.CAA(layer=1).fit(lm, contrast)
    _check_same([tt.CAA(layer=1).fit(lm, contrast, cache=tmp_path)], [plain])


def test_reading_fails(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), _contrast()
    tt.CAA(layer=1).fit(lm, contrast, cache=tmp_path)
    (file,) = tmp_path.glob("*/*.f32")
    file.unlink()
    file.mkdir()
    with pytest.raises(tt.TrimtabError, match="^cannot read the cache .*: Is a directory$"):
        tt.CAA(layer=1).fit(lm, contrast, cache=tmp_path)


def _free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 18 * ROW - 1)
    _check_refused(tmp_path, f"^the cache {tmp_path} needs 0.0 GB.*disk has 0.0 GB: name another")
    _free(monkeypatch, 18 * ROW)
    lm, contrast = language_model("llama"), _contrast()
    tt.CAA(layer=1).fit(lm, contrast, cache=tmp_path)
    # What is there needs no room.
    _free(monkeypatch, 0)
    tt.CAA(layer=1).fit(lm, contrast, cache=tmp_path)
    with pytest.raises(tt.TrimtabError, match="needs"):
        tt.CAA(layer=2).fit(lm, contrast, cache=tmp_path)


def test_a_few_rows_need_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, contrast = language_model("llama"), _contrast()
    _free(monkeypatch, 3 * ROW)
    tt.ActAdd(layer=1, pairs=3).fit(lm, contrast, cache=tmp_path)
    with pytest.raises(tt.TrimtabError, match="needs"):
        tt.ActAdd(layer=2, pairs=4).fit(lm, contrast, cache=tmp_path)


def test_rows_exchanged_with_their_checksums_are_run_again(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), _contrast()
    want = Want("layers.1.resid", "last", Samples)
    plain = collect(lm, contrast, [want], cache=tmp_path)
    for ending, size in (("f32", ROW), ("crc", 4)):
        (file,) = tmp_path.glob(f"*/*.{ending}")
        content = file.read_bytes()
        file.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    _check_equal(collect(lm, contrast, [want], cache=tmp_path), plain)
