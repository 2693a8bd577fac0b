"""Fixtures that all tests share: tiny models, real models, real data."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import CURATED

#: Tests of more cases than this over architectures are sampled where tests are to be quick.
_MANY = 8


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test over many architectures every sixth case, by its name, is a quick one."""
    crossed = [item for item in items if _over_architectures(item)]
    cases = Counter(item.nodeid.partition("[")[0] for item in crossed)
    for item in crossed:
        many = cases[item.nodeid.partition("[")[0]] > _MANY
        if many and zlib.crc32(item.nodeid.encode()) % 6:
            item.add_marker(pytest.mark.slow)


def _over_architectures(item: pytest.Item) -> bool:
    """Whether one of a case's parameters is the name of an architecture."""
    case = getattr(item, "callspec", None)  # which only tests of several cases have
    given = case.params.values() if case else ()
    return any(isinstance(value, str) and value in (*TINY, *CURATED) for value in given)


@pytest.fixture(scope="session", autouse=True)
def _repeatable() -> None:
    """One thread for each of the processes that share the tests, two for a process alone, because
    tiny matrices are slower on more; and one seed for what has none."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _unmeasured() -> Iterator[pytest.MonkeyPatch]:
    """`fit` leaves dials as the methods' own numbers have them, which formulas are checked against;
    tests of measured dials ask for `measuring`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "trimtab.fitting.method.measured", lambda model, steering, *rest, **more: steering
        )
        yield patch


@pytest.fixture(scope="session", autouse=True)
def _own_descriptions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found of tiny models is not left in the user's cache."""
    room = tmp_path_factory.mktemp("descriptions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.anatomy.knowing.cache_dir", lambda: room)
        yield


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` measures dials, as it does for users."""
    from trimtab.dials import measured

    monkeypatch.setattr("trimtab.fitting.method.measured", measured)


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, PreTrainedTokenizerFast]:
    """(name, model, tokenizer) of each architecture in turn. The model is new in every test."""
    return request.param, tiny_model(request.param), tiny_tokenizer()


def _real_model(name: str) -> Any:
    # Imported here, so that the tests of the tiny models need nothing of trimtab.
    import trimtab as tt

    return tt.load(name, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct, loaded once. A test that changes it must change it back."""
    return _real_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3() -> Any:
    """Gemma 3 270M (base), loaded once. A test that changes it must change it back."""
    return _real_model("gemma3-270m")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: of a run on a tiny model drawing them takes longer than the rest.

    For tests that do not look at them.
    """

    def empty(figure: Figure, target: Any, **options: Any) -> None:
        target.write(b"")

    monkeypatch.setattr(Figure, "savefig", empty)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that TRIMTAB_DATA names; skips the test where there is none."""
    folder = os.environ.get("TRIMTAB_DATA")
    if not folder:
        pytest.skip("TRIMTAB_DATA is not set: this test reads real data sets")
    path = Path(folder)
    if not path.is_dir():
        # Set but wrong is a mistake, not an absence: skipping would hide it.
        pytest.fail(f"TRIMTAB_DATA={folder} is not a folder")
    return path
