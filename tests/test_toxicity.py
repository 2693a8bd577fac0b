"""Toxicity scorers: the offline one on real scores, the others in place of what they talk to.

The texts written here are harmless: a made-up word stands for what is rude.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from helpers import refused_in_one_line
from services import CLOSE, Reply, Request, in_turn, nobody, serving
from trimtab.errors import TrimtabError
from trimtab.evaluation.metrics.toxicity import (
    DetoxifyScorer,
    OfflineScorer,
    RemoteScorer,
    find_scorer,
    fit_offline,
    offline_scorer,
)


def held_out(text: str) -> bool:
    """A fifth of all texts, by their hash."""
    return hashlib.sha1(text.encode()).digest()[0] % 5 == 0


def auc(scores: Sequence[float], toxic: Sequence[bool]) -> float:
    """How often a toxic text scores above one that is not (Mann and Whitney)."""
    ranks, mask = rankdata(scores), np.array(toxic)
    ones, zeros = mask.sum(), (~mask).sum()
    return float((ranks[mask].sum() - ones * (ones + 1) / 2) / (ones * zeros))


# -- offline, on real scores ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_scorer(data_dir: Path) -> OfflineScorer:
    """Fitted once; it takes some seconds."""
    return offline_scorer(str(data_dir))


@pytest.fixture(scope="session")
def real_rows(data_dir: Path) -> list[dict[str, Any]]:
    with (data_dir / "rtp/perspective_scored_spans.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def test_the_offline_scorer_ranks_texts_that_it_never_saw(
    real_scorer: OfflineScorer, real_rows: list[dict[str, Any]]
) -> None:
    rows = [row for row in real_rows if not row["challenging"]]
    assert len(rows) < len(real_rows)  # some are challenging, and have no part in it
    unseen = [row for row in rows if held_out(row["text"])]
    assert (real_scorer.fitted, real_scorer.held_out) == (len(rows) - len(unseen), len(unseen))

    scores = real_scorer.scores([row["text"] for row in unseen])
    assert all(0 <= score <= 1 for score in scores)
    ours = auc(scores, [row["toxicity"] > 0.5 for row in unseen])
    assert real_scorer.auc == pytest.approx(ours, abs=1e-9)
    assert real_scorer.auc >= 0.93
    assert f"AUC {real_scorer.auc:.3f}" in real_scorer.name
    assert real_scorer.name.startswith("offline (TF-IDF and ridge on ")

    # More toxic texts score higher, from end to end of the scale, and near what they were given.
    given = np.array([row["toxicity"] for row in unseen])
    bands = [np.array(scores)[(given > low) & (given <= low + 0.2)].mean() for low in (0, 0.4, 0.8)]
    assert bands == sorted(bands)
    assert bands[0] < 0.25 < 0.5 < bands[2]


def test_a_score_belongs_to_its_text_alone(real_scorer: OfflineScorer) -> None:
    texts = ["I love bread and poems.", "", "She looked at the map.", "čaj 🍞"]
    together = real_scorer.scores(texts)
    assert together == pytest.approx([real_scorer.scores([text])[0] for text in texts])
    assert all(0 <= score < 0.5 for score in together)
    assert real_scorer.scores([]) == []


# -- offline, on rows written here ---------------------------------------------------------------


def rows(count: int, toxic_word: str = "grumf", challenging: bool = False) -> list[dict[str, Any]]:
    """Texts of a few words; half of them have one that makes them toxic."""
    kinds = ["bread", "poem", "ship", "map", "tea", "song"]
    return [
        {
            "text": f"the {kinds[i % 6]} of day {i} is {toxic_word if i % 2 else 'fine'}",
            "toxicity": 0.9 if i % 2 else 0.05,
            "challenging": challenging,
        }
        for i in range(count)
    ]


def spans(folder: Path, rows: Sequence[Any]) -> str:
    path = folder / "rtp" / "perspective_scored_spans.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


TEXTS = ["a ship is grumf", "a ship is fine", "a ship is blarp", "nothing at all"]


def test_a_word_of_toxic_texts_makes_a_text_toxic(tmp_path: Path) -> None:
    scorer = offline_scorer(spans(tmp_path, rows(200)))
    rude, fine, new, _ = scorer.scores(TEXTS)
    assert 0 < fine < new < rude < 1
    assert fine < 0.2
    assert rude > 0.5
    assert scorer.auc == 1.0


def test_challenging_rows_are_not_learnt_from(tmp_path: Path) -> None:
    plain = offline_scorer(spans(tmp_path / "plain", rows(200)))
    mixed = offline_scorer(
        spans(tmp_path / "mixed", [*rows(60, "blarp", challenging=True), *rows(200)])
    )
    assert mixed.scores(TEXTS) == plain.scores(TEXTS)
    assert mixed.name == plain.name


def test_held_out_texts_are_not_learnt_from() -> None:
    texts, scores = [row["text"] for row in rows(200)], [row["toxicity"] for row in rows(200)]
    turned = [1 - s if held_out(t) else s for t, s in zip(texts, scores, strict=True)]
    plain, other = fit_offline(texts, scores), fit_offline(texts, turned)
    assert other.scores(TEXTS) == plain.scores(TEXTS)
    assert (plain.auc, other.auc) == (1.0, 0.0)
    assert plain.held_out == sum(map(held_out, texts))


def test_scores_at_the_ends_of_the_scale_are_learnt_from_too() -> None:
    texts = [row["text"] for row in rows(200)]
    scorer = fit_offline(texts, [float(i % 2) for i in range(200)])
    assert all(0 <= score <= 1 for score in scorer.scores([*texts, *TEXTS]))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_texts_are_refused(count: int) -> None:
    texts = [row["text"] for row in rows(count)]
    toxicity = [row["toxicity"] for row in rows(count)]
    refused_in_one_line(lambda: fit_offline(texts, toxicity), "too few, or all alike")


@pytest.mark.parametrize("toxicity", [0.0, 0.5, 0.9])
def test_texts_that_are_all_alike_are_refused(toxicity: float) -> None:
    texts = [row["text"] for row in rows(200)]
    refused_in_one_line(lambda: fit_offline(texts, [toxicity] * 200), "too few, or all alike")


def test_texts_without_a_common_word_are_refused() -> None:
    # Each text is one character of its own.
    texts = [chr(0x4E00 + i) for i in range(200)]
    toxicity = [0.9 if i % 2 else 0.1 for i in range(200)]
    refused_in_one_line(lambda: fit_offline(texts, toxicity), "too few, or all alike")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5])
def test_a_score_off_the_scale_is_refused(value: float) -> None:
    texts, scores = [row["text"] for row in rows(200)], [row["toxicity"] for row in rows(200)]
    refused_in_one_line(lambda: fit_offline(texts, [*scores[:-1], value]), "not from 0 to 1")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"toxicity": "high"}, "line 3: 'toxicity' must be"),
        ({"toxicity": True}, "line 3: 'toxicity' must be"),
        ({"challenging": 0}, "line 3: 'challenging' must be"),
        ({"text": None}, "line 3: 'text' must be"),
    ],
)
def test_a_row_of_the_wrong_kind_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    broken = rows(20)
    broken[2] |= change
    refused_in_one_line(lambda: offline_scorer(spans(tmp_path, broken)), says)


def test_a_row_that_lacks_a_column_is_refused(tmp_path: Path) -> None:
    broken = rows(20)
    del broken[4]["challenging"]
    refused_in_one_line(
        lambda: offline_scorer(spans(tmp_path, broken)), "line 5: 'challenging' is missing"
    )


def test_a_missing_file_of_scores_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "fitted on rtp/perspective_scored_spans.jsonl.*--data or TRIMTAB_DATA.*detoxify"
    refused_in_one_line(lambda: offline_scorer(str(tmp_path)), says)
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    refused_in_one_line(offline_scorer, says)


# -- Detoxify ------------------------------------------------------------------------------------


def detoxify(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    module = types.ModuleType("detoxify")
    module.Detoxify = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "detoxify", module)


def test_detoxify_is_asked_for_its_toxicity(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Model:
        def __init__(self, kind: str) -> None:
            asked.append(kind)

        def predict(self, texts: Any) -> dict[str, Any]:
            asked.append(texts)
            # A text alone would give a number, a list gives an array of each kind.
            assert isinstance(texts, list)
            values = np.array([len(text) / 100 for text in texts], dtype=np.float32)
            return {"toxicity": values, "insult": values + 0.5}

    detoxify(monkeypatch, Model)
    scorer = find_scorer("detoxify")
    assert scorer.name == "Detoxify (original)"
    found = scorer.scores(("bread", "a poem"))
    assert found == pytest.approx([0.05, 0.06])
    assert all(type(score) is float for score in found)  # JSON has no float32
    assert scorer.scores([]) == []
    assert asked == ["original", ["bread", "a poem"]]


def test_without_detoxify_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detoxify", None)
    refused_in_one_line(DetoxifyScorer, "not installed: pip install detoxify")


def test_weights_of_detoxify_that_do_not_come_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(kind: str) -> None:
        raise OSError("<urlopen error>\nmore\nand more")

    detoxify(monkeypatch, make)
    refused_in_one_line(DetoxifyScorer, "^Detoxify cannot be loaded: <urlopen error>$")


# -- a remote service ----------------------------------------------------------------------------

KEY = "perspective-key-42"


@pytest.fixture
def _remote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def scored(value: Any) -> Reply:
    """A reply as Perspective gives it."""
    summary = {"summaryScore": {"value": value, "type": "PROBABILITY"}}
    return Reply({"attributeScores": {"TOXICITY": summary}, "languages": ["en"]})


def by_length(request: Request) -> Reply:
    return scored(len(request.content["comment"]["text"]) / 100)


def remote(url: str, **options: Any) -> RemoteScorer:
    return RemoteScorer(url + "/analyze", **{"pause": 0.01, "tries": 2} | options)


@pytest.mark.usefixtures("_remote")
def test_a_service_scores_each_text() -> None:
    texts = ["bread" * i for i in range(1, 15)]
    with serving(by_length) as service:
        scorer = remote(service.url)
        assert scorer.scores(texts) == pytest.approx([0.05 * i for i in range(1, 15)])
    assert scorer.name == f"remote ({service.url}/analyze)"
    assert service.most_under_way <= scorer.concurrency == 4
    assert sorted(request.content["comment"]["text"] for request in service.requests) == texts
    for request in service.requests:
        assert request.path == "/analyze"
        assert request.headers["x-goog-api-key"] == KEY
        assert "authorization" not in request.headers
        assert list(request.content["requestedAttributes"]) == ["TOXICITY"]
        assert request.content["doNotStore"] is True
        assert KEY not in json.dumps(request.content)
    assert KEY not in repr(scorer) + scorer.name


@pytest.mark.usefixtures("_remote")
def test_text_of_nothing_is_not_sent() -> None:
    with serving(by_length) as service:
        assert remote(service.url).scores(["", "bread", " \n"]) == [0.0, 0.05, 0.0]
    assert len(service.requests) == 1


@pytest.mark.usefixtures("_remote")
def test_no_key_is_sent_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    with serving(by_length) as service:
        remote(service.url).scores(["bread"])
    assert "x-goog-api-key" not in service.requests[0].headers


NONSENSE = {
    "no JSON": Reply(b"<html>"),
    "empty": Reply({}),
    "no scores": Reply({"attributeScores": {}}),
    "another attribute": Reply({"attributeScores": {"INSULT": {"summaryScore": {"value": 0.1}}}}),
    "null": scored(None),
    "a word": scored("low"),
    "a list": scored([0.5]),
    "below": scored(-0.01),
    "above": scored(1.01),
    "not a number": scored(float("nan")),
    "without end": scored(float("inf")),
}


@pytest.mark.parametrize("kind", NONSENSE)
@pytest.mark.usefixtures("_remote")
def test_nonsense_of_a_service_is_never_a_score(kind: str) -> None:
    with serving(in_turn(NONSENSE[kind])) as service:
        says = "failed 2 times, the last time with: an answer that makes no sense"
        refused_in_one_line(lambda: remote(service.url).scores(["bread"]), says)
    assert len(service.requests) == 2


@pytest.mark.parametrize("failure", [CLOSE, Reply(b"", 503), Reply(b"", 429), scored(7)])
@pytest.mark.usefixtures("_remote")
def test_a_service_that_fails_once_is_asked_again(failure: Reply) -> None:
    with serving(in_turn(failure, scored(0.25))) as service:
        assert remote(service.url).scores(["bread"]) == [0.25]


@pytest.mark.usefixtures("_remote")
def test_a_refusal_by_a_service_ends_in_one_line() -> None:
    body = b'{\n "error": {"message": "API key not valid: ' + KEY.encode() + b'"}\n}'
    with serving(in_turn(Reply(body, 400))) as service:
        scorer = remote(service.url, concurrency=1)
        with pytest.raises(TrimtabError, match="status 400: .*not valid") as caught:
            scorer.scores(["bread"] * 10)
    assert KEY not in str(caught.value)
    assert len(service.requests) == 1
    refused_in_one_line(lambda: remote(nobody()).scores(["bread"]), "no connection")


# -- by name -------------------------------------------------------------------------------------


def test_scorers_have_names(tmp_path: Path) -> None:
    assert isinstance(find_scorer("offline", spans(tmp_path, rows(200))), OfflineScorer)
    assert find_scorer("https://host/analyze") == RemoteScorer("https://host/analyze")
    assert isinstance(find_scorer("http://localhost:8000"), RemoteScorer)


@pytest.mark.parametrize("name", ["", "Offline", "perspective", "ftp://host", "host:80"])
def test_an_unknown_scorer_is_refused(name: str) -> None:
    refused_in_one_line(lambda: find_scorer(name), "unknown toxicity scorer.*offline, detoxify")


@pytest.mark.parametrize("url", ["https://host/analyze?key=secret", "https://me:secret@host/"])
def test_a_url_that_holds_a_key_is_refused_unseen(url: str) -> None:
    with pytest.raises(TrimtabError, match="must not hold a key") as caught:
        find_scorer(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "https://[", "http://host:eight"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    refused_in_one_line(lambda: find_scorer(url), "is not the URL of a service")
