"""Steerings of text tokens, of image tokens, or of both: a plain hook that masks by hand does the
same, with and without a cache, in batches, row by row, and when a prompt is read in parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, steer
from seeing import about, by_hand, inputs_alone, saved, seeing, seeing_tokenizer, square
from trimtab.anatomy import Anatomy
from trimtab.methods import describe, explain
from trimtab.model.marks import Marks
from trimtab.model.one_pass import Pass
from trimtab.model.standing import Prompts
from trimtab.model.trails import Trail
from trimtab.reading import log_odds, next_tokens, prompt_reading
from trimtab.steering import Add, Dial, Intervention, Scale, Scope, Steering

NEW = 5
KINDS = ("text", "image")
IMAGE = 400


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    assert seeing_tokenizer().image_token_id == IMAGE
    return seeing()


def vector(seed: int = 3) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


def steering(lm: tt.LanguageModel, tokens: Any, positions: Any = "all", dial: float = 4.0) -> Any:
    added = Intervention("layers.0.resid", Add(vector()), Scope.placed(positions, tokens))
    return Steering("test", {}, (added,), Dial("alpha", dial, (-9.0, 9.0)), lm.identity)


PROMPTS = [
    about("What is this? ", square("red")),
    about(square("green"), square("blue"), " She looked at the map"),
    [{"role": "user", "content": "Today I feel"}],
]


def masked(tokens: str, dial: float = 4.0) -> Any:
    """By hand: the vector where a token is of the kind."""

    def change(hidden: Tensor, ids: Tensor) -> Tensor:
        here = (ids == IMAGE) if tokens == "image" else (ids != IMAGE)
        return torch.where(here[..., None], hidden + dial * vector(), hidden)

    return change


def alone(lm: tt.LanguageModel, prompt: Any, change: Any, **options: Any) -> tuple[int, ...]:
    given = inputs_alone(prompt)
    width = given["input_ids"].shape[1]
    with by_hand(lm.model, 0, change):
        written = lm.model.generate(**given, max_new_tokens=NEW, do_sample=False, **options)
    return tuple(written[0, width:].tolist())


@pytest.mark.parametrize("tokens", KINDS)
def test_a_batch_is_steered_as_each_row_by_hand(lm: tt.LanguageModel, tokens: str) -> None:
    one = steering(lm, tokens)
    found = lm.generate(PROMPTS, max_new_tokens=NEW, steering=one)
    expected = [alone(lm, prompt, masked(tokens)) for prompt in PROMPTS]
    assert [completion.tokens for completion in found] == expected
    logits = lm.logits(PROMPTS, steering=one)
    everywhere, unsteered = lm.logits(PROMPTS, steering=one.on("all")), lm.logits(PROMPTS)
    for other in (everywhere, unsteered):
        assert ((logits[:2] - other[:2]).abs().amax(-1) > 0.01).all()
    # A text without an image is all text.
    same = everywhere if tokens == "text" else unsteered
    assert torch.allclose(logits[2], same[2], atol=1e-4)


@pytest.mark.parametrize("tokens", KINDS)
@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 7}])
def test_without_a_cache_and_in_parts(
    lm: tt.LanguageModel, tokens: str, options: dict[str, Any]
) -> None:
    one = steering(lm, tokens)
    for prompt in PROMPTS[:2]:
        given = inputs_alone(prompt)
        expected = given["input_ids"].shape[1]
        with lm.steered(one):
            found = lm.model.generate(**given, max_new_tokens=NEW, do_sample=False, **options)
        with by_hand(lm.model, 0, masked(tokens)):
            by_plain = lm.model.generate(**given, max_new_tokens=NEW, do_sample=False, **options)
        assert found[0, expected:].tolist() == by_plain[0, expected:].tolist()


def test_text_and_image_together_are_all(lm: tt.LanguageModel) -> None:
    both = [steering(lm, "text") + steering(lm, "image")] * len(PROMPTS)
    found = lm.logits(PROMPTS, steering=both)
    assert torch.allclose(found, lm.logits(PROMPTS, steering=steering(lm, "all")), atol=1e-4)


def test_each_row_has_its_own(lm: tt.LanguageModel) -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    rows = [steering(lm, "image"), steering(lm, "text"), None]
    found = lm.generate(prompts, max_new_tokens=NEW, steering=rows)
    assert found[0].tokens == alone(lm, prompts[0], masked("image"))
    assert found[1].tokens == alone(lm, prompts[1], masked("text"))
    assert found[2].tokens == alone(lm, prompts[2], lambda hidden, ids: hidden)


@pytest.mark.parametrize("tokens", KINDS)
def test_positions_and_tokens_hold_together(lm: tt.LanguageModel, tokens: Any) -> None:
    one = steering(lm, tokens, "prompt")
    end = inputs_alone(PROMPTS[0])["input_ids"].shape[1]
    seen = 0

    def change(hidden: Tensor, ids: Tensor) -> Tensor:
        nonlocal seen
        place = torch.arange(seen, seen + ids.shape[1])
        seen += ids.shape[1]
        changed = masked(tokens)(hidden, ids)
        return torch.where((place < end)[:, None], changed, hidden)

    (found,) = lm.generate([PROMPTS[0]], max_new_tokens=NEW, steering=one)
    assert found.tokens == alone(lm, PROMPTS[0], change)


@pytest.mark.parametrize("tokens", KINDS)
def test_what_is_only_read(lm: tt.LanguageModel, tokens: Any, tmp_path: Path) -> None:
    one = steering(lm, tokens)
    red, green, *_ = saved(tmp_path)
    pairs = tt.Contrast.from_pairs(
        [(about("What? ", red), " good", " bad"), (about(green), " yes", " no")]
    )
    expected = []
    for pair, path in zip(pairs.pairs, (red, green), strict=True):
        prompt = about("What? ", path) if path == red else about(path)
        scores = []
        for answer in (pair.positive, pair.negative):
            given = inputs_alone(prompt, answer)
            start = inputs_alone(prompt)["input_ids"].shape[1]
            with by_hand(lm.model, 0, masked(tokens)), torch.no_grad():
                log_p = lm.model(**given, use_cache=False).logits[0].double().log_softmax(-1)
            ids = given["input_ids"][0]
            scores.append(log_p[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())
        expected.append(float(scores[0] - scores[1]))
    assert log_odds(lm, pairs, one).tolist() == pytest.approx(expected, abs=1e-3)


def test_a_batch_without_images_is_no_mistake_beside_one_with_some(lm: tt.LanguageModel) -> None:
    one = steering(lm, "image")
    readings = [prompt_reading(tokens) for tokens in lm.encode(lm.prompts(PROMPTS, True))]
    for given in (one, [one] * len(readings)):
        best = {
            i: int(each.best[0])
            for batch, found in next_tokens(lm, readings, given)
            for i, each in zip(batch.rows, found, strict=True)
        }
        expected = lm.logits(PROMPTS, steering=one).argmax(-1).tolist()
        assert [best[i] for i in range(len(best))] == expected


# -- what cannot act is refused -------------------------------------------------------------------


def test_a_steering_of_images_without_images_is_refused(lm: tt.LanguageModel) -> None:
    one, text = steering(lm, "image"), ["Today I feel"]
    for run in (
        lambda: lm.generate(text, steering=one),
        lambda: lm.logits(text, steering=one),
        lambda: lm.logits([PROMPTS[0], *text], steering=[None, one]),
        lambda: tt.cross_entropy(lm, text, one),
        lambda: tt.log_odds(lm, tt.Contrast.from_pairs([("I", " a", " b")]), one),
        lambda: lm.generate(text, steering=tt.within(one, kl=0.1)),
    ):
        with pytest.raises(tt.TrimtabError, match="acts on image tokens, and no text") as caught:
            run()
        assert "\n" not in str(caught.value)
    ids = torch.tensor(lm.encode(text))
    with (
        pytest.raises(tt.TrimtabError, match="without a token of the scope 'image'"),
        lm.steered(one),
    ):
        lm.model(input_ids=ids)


def test_a_model_of_text_has_no_image_tokens() -> None:
    text = language_model("llama")
    one = steer(text, ("layers.1.resid", Add(vector())))
    with (
        pytest.raises(tt.TrimtabError, match="llama has none: it reads text only"),
        text.steered(one.on("image")),
    ):
        text.logits(["Today I feel"])
    found = text.logits(["Today I feel"], steering=one.on("text"))
    assert torch.equal(found, text.logits(["Today I feel"], steering=one))


def test_embeddings_alone_do_not_say_what_they_stand_for(lm: tt.LanguageModel) -> None:
    given = inputs_alone(PROMPTS[0])
    embeddings = lm.model.get_input_embeddings()(given["input_ids"])
    with (
        pytest.raises(tt.TrimtabError, match="which tokens are text and which stand for images"),
        lm.steered(steering(lm, "text")),
    ):
        lm.model(inputs_embeds=embeddings, attention_mask=given["attention_mask"])


@pytest.mark.parametrize("positions", ["generated", "last"])
def test_what_is_written_is_text(lm: tt.LanguageModel, positions: Any) -> None:
    with pytest.raises(tt.TrimtabError, match="never acts"):
        steering(lm, "image", positions)
    with pytest.raises(tt.TrimtabError, match="never acts"):
        steering(lm, "all", positions).on("image")
    with pytest.raises(tt.TrimtabError, match="tokens is 'pictures': known are all, text, image"):
        steering(lm, "all").on("pictures")


def test_only_what_acts_on_all_tokens_bakes(lm: tt.LanguageModel) -> None:
    with pytest.raises(tt.TrimtabError, match="acts on the scope 'image'"):
        tt.bake(lm, steering(lm, "image"))
    scale = Scale(torch.arange(10), torch.full((10,), 0.5), 80)
    scaled = Intervention("layers.1.ffn_in", scale)
    everywhere = replace(steering(lm, "all"), interventions=(scaled,))
    found = tt.bake(lm, everywhere)
    assert found.processor is lm.processor
    expected = lm.logits(PROMPTS, steering=everywhere)
    assert torch.allclose(found.logits(PROMPTS), expected, atol=1e-4)
    assert not torch.allclose(lm.logits(PROMPTS), expected, atol=1e-2)
    embed = replace(everywhere, interventions=(Intervention("embed", Add(vector())),))
    with pytest.raises(tt.TrimtabError, match="do not come from the embedding table"):
        tt.bake(lm, embed)


def test_every_operator_keeps_to_its_tokens(lm: tt.LanguageModel) -> None:
    scale = Scale(torch.arange(10), torch.full((10,), 0.5), 48)
    scaled = Intervention("layers.0.ffn_out", scale, Scope.parse("image"))
    one = Steering("test", {}, (scaled,), Dial("alpha", 2.0, (-9.0, 9.0)), lm.identity)
    given = inputs_alone(PROMPTS[1])
    here = (given["input_ids"] == IMAGE)[..., None]
    block = Anatomy(lm.model).blocks[0]

    def act(module: Any, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., :10] *= 2.0
        return torch.where(here, changed, output)

    handle = block.get_submodule("mlp").register_forward_hook(act)
    with torch.no_grad():
        expected = lm.model(**given, use_cache=False).logits[0, -1]
    handle.remove()
    found = lm.logits([PROMPTS[1]], steering=one)[0]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, lm.logits([PROMPTS[1]])[0], atol=1e-2)


# -- fitted, kept, told ---------------------------------------------------------------------------


def test_it_is_fitted_and_kept_in_the_file(lm: tt.LanguageModel, tmp_path: Path) -> None:
    red, green, *_ = saved(tmp_path)
    pairs = tt.Contrast.from_pairs(
        [(about("What? ", red), " good", " bad"), (about(green), " yes", " no")]
    )
    whole = tt.CAA(layer=1).fit(lm, pairs, measure=False)
    one = tt.CAA(layer=1).fit(lm, pairs, measure=False, on="image")
    assert list(map(str, one.scopes)) == ["image"]
    again = tt.Steering.load(one.save(tmp_path / "image.safetensors"))
    assert list(map(str, again.scopes)) == ["image"]
    assert again.digest == one.digest != whole.digest == one.on("all").digest
    found = lm.logits([PROMPTS[0]], steering=again)
    assert torch.equal(found, lm.logits([PROMPTS[0]], steering=one))
    assert "It acts on every token, where it stands for an image." in explain(one)
    assert describe(one)["interventions"][0]["tokens"] == "image"
    # What acts on all tokens is written as it always was.
    assert "tokens" not in describe(whole)["interventions"][0]
    assert b'"tokens"' not in whole.save(tmp_path / "whole.safetensors").read_bytes()


def test_a_dial_is_measured_on_images_only(
    lm: tt.LanguageModel, tmp_path: Path, measuring: None
) -> None:
    red, green, *_ = saved(tmp_path)
    pairs = tt.Contrast.from_pairs(
        [(about("What? ", red), " good", " bad"), (about(green), " yes", " no")]
    )
    one = tt.CAA(layer=1).fit(lm, pairs, on="image")
    assert one.calibration is not None
    assert one.findings["measured"]["cost"] == 0  # plain text has no image to steer
    texts = tt.Contrast.from_pairs([("I am", " good", " bad")])
    with pytest.raises(tt.TrimtabError, match="has no images, on which the dial"):
        tt.CAA(layer=1).fit(lm, texts, on="image")


def test_masks_of_a_pass() -> None:
    marks, cpu = Marks(seeing_tokenizer(), "seeing", images={IMAGE}), torch.device("cpu")

    def mask(ends: list[int], scope: str, ids: Tensor) -> Tensor | bool:
        trail = Trail(torch.cat((torch.zeros(len(ids), 4, dtype=torch.long), ids), 1))
        now = Pass(4, 3, Prompts.ending(ends), trail=trail)
        return now.mask(marks.place(Scope.parse(scope)), cpu)

    ids = torch.tensor([[IMAGE, 5, 6], [5, 6, IMAGE]])
    assert mask([5, 6], "all", ids) is True
    assert torch.equal(mask([5, 6], "image", ids), ids == IMAGE)  # type: ignore[arg-type]
    after = torch.tensor([[False, True, True], [False, False, False]])
    assert torch.equal(mask([5, 6], "generated & text", ids), after)  # type: ignore[arg-type]
    assert mask([9, 9], "generated & text", ids) is False
    assert mask([2, 2], "generated & text", ids * 0) is True
