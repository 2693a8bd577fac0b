"""Where a pass stands: every way to run a model equals a plain loop, or is refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

import trimtab as tt
from helpers import (
    PROMPTS,
    block,
    by_hand,
    greedy_by_hand,
    language_model,
    left_padded,
    logits_of,
    raw_greedy,
    refused_in_one_line,
    steer_at,
    token_ids,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.dials import within
from trimtab.model.versions import cache_argument

POSITIONS = ("all", "prompt", "generated", "last")
#: A text that repeats itself, so that looking up what followed before finds something.
REPEATS = "the rudder turns the ship and the rudder turns the ship and the rudder turns"


def at(lm: tt.LanguageModel, positions: Any, seed: int = 0) -> tuple[tt.Steering, Any]:
    """A steering of a block's output, and what it does by its formula."""
    steering = steer_at(lm, "resid", seed=seed, positions=positions)
    return steering, by_hand(steering.interventions[0].operator)


# -- generate: guesses, parts, samples --------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("how", ["lookup", "assistant", "same assistant"])
def test_decoding_with_guesses_is_plain_decoding(name: str, positions: Any, how: str) -> None:
    lm = language_model(name)
    steering, change = at(lm, positions)
    assistant = lm.model if how == "same assistant" else tiny_model(name, seed=3)
    assistant.generation_config.eos_token_id = None
    options = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": assistant}
    for text in (REPEATS, PROMPTS[0]):
        expected = greedy_by_hand(lm.model, token_ids(text), 12, change, positions)
        with lm.steered(steering):
            assert raw_greedy(lm, [text], 12, **options) == [expected]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_prompt_read_in_parts(positions: Any) -> None:
    lm = language_model("llama")
    steering, change = at(lm, positions)
    expected = greedy_by_hand(lm.model, token_ids(REPEATS), 8, change, positions)
    with lm.steered(steering):
        assert raw_greedy(lm, [REPEATS], 8, prefill_chunk_size=3) == [expected]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_budgets_dial_is_kept_with_guesses(positions: Any) -> None:
    lm = language_model("llama")
    steering, _ = at(lm, positions if positions != "generated" else "all")
    with lm.steered(within(steering, kl=0.05)):
        plain = raw_greedy(lm, [REPEATS], 10)
    with lm.steered(within(steering, kl=0.05)):
        assert raw_greedy(lm, [REPEATS], 10, prompt_lookup_num_tokens=4) == plain


def test_guidance_is_refused_where_positions_matter() -> None:
    lm = language_model("llama")
    for positions in POSITIONS[1:]:
        with lm.steered(at(lm, positions)[0]):
            refused_in_one_line(
                lambda: raw_greedy(lm, PROMPTS[:1], 4, guidance_scale=1.5), "guidance_scale"
            )
    lm.model.generation_config.guidance_scale = 1.5
    with lm.steered(at(lm, "last")[0]):
        refused_in_one_line(lambda: raw_greedy(lm, PROMPTS[:1], 4), "guidance_scale")
    with lm.steered(at(lm, "all")[0]):
        raw_greedy(lm, PROMPTS[:1], 4)


# -- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_rows_are_not_repeated_outside_of_generate(name: str) -> None:
    lm = language_model(name)
    a, b = at(lm, "all")[0], at(lm, "all", 1)[0]
    four = [*PROMPTS, PROMPTS[0]]
    for rows in ([a, None], [a, b], [a]):
        for call in (
            lambda: logits_of(lm, four),
            lambda: raw_greedy(lm, four, 3),
            lambda: raw_greedy(lm, four, 3, num_beams=2),
        ):
            with lm.steered(rows):
                refused_in_one_line(call, f"given for {len(rows)} rows")
    with lm.steered([a, None, b]):  # three rows, each with two beams
        assert len(raw_greedy(lm, PROMPTS, 3, num_beams=2)) == 3


# -- passes of the user's own -----------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", TINY)
def test_a_loop_whose_cache_the_model_made(name: str, positions: Any) -> None:
    """The first pass is given no cache and puts one out, under whatever name."""
    lm = language_model(name)
    steering, change = at(lm, positions)
    ids = token_ids(PROMPTS[0])
    expected = greedy_by_hand(lm.model, ids, 5, change, positions)
    written, given = [], {}
    with torch.no_grad(), lm.steered(steering):
        new = ids
        for _ in expected:
            output = lm.model(torch.tensor([new]), use_cache=True, **given)
            given = {cache_argument(lm.anatomy.body): output.past_key_values}
            new = [int(output.logits[0, -1].argmax())]
            written += new
    assert written == expected


@pytest.mark.parametrize("positions", POSITIONS)
def test_two_texts_in_turn_keep_their_own_prompts(positions: Any) -> None:
    lm = language_model("llama")
    steering, change = at(lm, positions)
    prompts = [token_ids(PROMPTS[2]), token_ids("Today")]
    expected = [greedy_by_hand(lm.model, ids, 4, change, positions) for ids in prompts]
    caches = [DynamicCache(config=lm.model.config) for _ in prompts]
    name = cache_argument(lm.anatomy.body)
    written: list[list[int]] = [[], []]
    with torch.no_grad(), lm.steered(steering):
        for step in range(4):
            for i, ids in enumerate(prompts):
                new = written[i][-1:] if step else ids
                output = lm.model(torch.tensor([new]), use_cache=True, **{name: caches[i]})
                written[i].append(int(output.logits[0, -1].argmax()))
    assert written == expected


@pytest.mark.parametrize("name", TINY)
def test_the_cache_is_known_by_place_and_by_any_name(name: str) -> None:
    """A body that calls its cache otherwise, as transformers has done three times."""
    lm = language_model(name)
    steering, change = at(lm, "prompt")
    body, own = lm.anatomy.body, cache_argument(lm.anatomy.body)
    ids, forward = token_ids(PROMPTS[0]), lm.anatomy.body.forward

    def renamed(input_ids: Any = None, kv: Any = None, **more: Any) -> Any:
        return forward(input_ids=input_ids, **{own: kv}, **more)

    cache = DynamicCache(config=lm.anatomy.config)
    with torch.no_grad():
        body.forward = renamed
        with lm.steered(steering):
            body(torch.tensor([ids[:-1]]), cache, use_cache=True)
            found = body(torch.tensor([ids[-1:]]), kv=cache, use_cache=True).last_hidden_state
        del body.forward
        handle = block(lm.model, 1).register_forward_hook(
            lambda m, a, x: torch.cat((change(x[:, :-1]), x[:, -1:]), dim=1)
        )
        expected = body(torch.tensor([ids]), use_cache=False).last_hidden_state[:, -1:]
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("how", ["copied", "block by block", "cut"])
def test_a_cache_tells_where_its_prompt_ended(positions: Any, how: str) -> None:
    """Also a copy of it, in another block, and when it is cut back to go on with another prompt."""
    lm = language_model("llama")
    if (how, positions) == ("block by block", "generated"):
        pytest.skip("a block that reads nothing but a prompt is refused")
    steering, change = at(lm, positions)
    ids = token_ids(PROMPTS[0])
    name = cache_argument(lm.anatomy.body)
    expected = greedy_by_hand(lm.model, ids, 5, change, positions)
    with torch.no_grad(), lm.steered(steering):
        first = ids if how != "cut" else ids[:4] + token_ids(PROMPTS[1])
        output = lm.model(torch.tensor([first]), use_cache=True)
        cache = output.past_key_values
        if how == "copied":
            cache = copy.deepcopy(cache)
        if how == "cut":  # the shared beginning stays, as it was steered as part of a prompt
            cache.crop(4 - len(first))
            if positions == "last":
                pytest.skip("the beginning was the same text, but not its last token")
            output = lm.model(torch.tensor([ids[4:]]), **{name: cache}, use_cache=True)
        written = [int(output.logits[0, -1].argmax())]
        if how != "block by block":
            for _ in range(4):
                output = lm.model(torch.tensor([written[-1:]]), **{name: cache}, use_cache=True)
                written.append(int(output.logits[0, -1].argmax()))
    for _ in range(5 - len(written)):
        with torch.no_grad(), lm.steered(steering):
            output = lm.model(torch.tensor([written[-1:]]), **{name: cache}, use_cache=True)
            written.append(int(output.logits[0, -1].argmax()))
            lm.model(torch.tensor([ids]))  # the prompt's positions must be reached as well
    assert written == expected


def test_a_token_after_a_cache_that_no_block_saw_is_refused() -> None:
    lm = language_model("llama")
    name = cache_argument(lm.anatomy.body)
    for positions in POSITIONS[1:]:
        cache = lm.model(torch.tensor([token_ids(PROMPTS[0])]), use_cache=True).past_key_values
        with lm.steered(at(lm, positions)[0]):
            refused_in_one_line(
                lambda: lm.model(torch.tensor([[5]]), **{name: cache}), "no steered pass has filled"
            )


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["raw", "logits", "generate"])
def test_what_a_processor_runs_on_the_side_is_another_text(
    positions: Any, side: str, use_cache: bool
) -> None:
    lm = language_model("llama")
    steering, change = at(lm, positions)
    other = token_ids(PROMPTS[2])
    expected = greedy_by_hand(lm.model, token_ids(PROMPTS[0]), 6, change, positions)

    class OnTheSide(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if side == "raw":
                lm.model(torch.tensor([other]), use_cache=use_cache)
            elif side == "logits":
                lm.logits([PROMPTS[2]])
            else:
                lm.generate([PROMPTS[2]], max_new_tokens=2, chat=False)
            return scores

    with lm.steered(steering):
        for processors in ([], [OnTheSide()]):
            options = {"logits_processor": processors, "use_cache": use_cache}
            assert raw_greedy(lm, PROMPTS[:1], 6, **options) == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_dial_that_overflows_is_named_by_a_raw_generate(name: str, dtype: torch.dtype) -> None:
    lm = language_model(name, dtype=dtype)
    steering = steer_at(lm, "resid")
    plain = raw_greedy(lm, PROMPTS[:2], 4)
    for positions in ("all", "last"):
        far = replace(steer_at(lm, "resid", positions=positions), value=3e38)
        with lm.steered(far):
            refused_in_one_line(lambda: raw_greedy(lm, PROMPTS[:2], 4), r"alpha=3e\+38: turn the")
    with lm.steered(steering.at(0)):
        assert raw_greedy(lm, PROMPTS[:2], 4) == plain


def test_a_body_that_was_replaced_is_refused() -> None:
    lm = language_model("llama")
    steering = at(lm, "all")[0]
    lm.model.model = copy.deepcopy(lm.model.model)
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=steering), "was replaced")


@pytest.mark.parametrize("name", ["gpt2"])
def test_dropout_is_refused_where_figures_are_made(name: str) -> None:
    lm = language_model(name)
    contrast = tt.Contrast.from_pairs([(p, " yes", " no it is not") for p in PROMPTS])
    lm.model.train()
    for action in (
        lambda: lm.logits(PROMPTS),
        lambda: lm.generate(PROMPTS),
        lambda: tt.CAA(layer=1, token="last").fit(lm, contrast),
    ):
        refused_in_one_line(action, r"training mode.*eval\(\)")
    lm.model.eval()
    lm.logits(PROMPTS)


def test_offloaded_experts_are_refused_where_their_inside_is_shown() -> None:
    lm = tt.wrap(tiny_model("qwen3_moe"), tiny_tokenizer())
    plain, other = steer_at(lm, "resid"), steer_at(lm, "ffn_in")
    expected = lm.logits(PROMPTS, steering=plain)
    cpu_offload(lm.model, torch.device("cpu"))
    torch.testing.assert_close(lm.logits(PROMPTS, steering=plain), expected)
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=other), "offloaded")


def test_a_cache_of_an_unknown_kind_is_refused() -> None:
    lm = language_model("llama")

    class Paged:
        def update(self, *args: Any, **kwargs: Any) -> Any: ...

    with lm.steered(at(lm, "last")[0]):
        refused_in_one_line(
            lambda: lm.anatomy.body(torch.tensor([[1, 2]]), past_key_values=Paged()), "Paged"
        )


def test_packed_texts_are_refused_where_positions_matter() -> None:
    lm = language_model("llama")
    ids = torch.tensor([token_ids(PROMPTS[0]) + token_ids(PROMPTS[1])])
    first = len(token_ids(PROMPTS[0]))
    positions = torch.cat((torch.arange(first), torch.arange(ids.shape[1] - first)))[None]
    lengths = torch.tensor([0, first, ids.shape[1]], dtype=torch.int32)
    for where in POSITIONS[1:]:
        with lm.steered(at(lm, where)[0]):
            refused_in_one_line(lambda: lm.model(ids, position_ids=positions), "several texts")
            refused_in_one_line(lambda: lm.model(ids, cu_seq_lens_q=lengths), "several texts")
    with lm.steered([at(lm, "all")[0]]):
        refused_in_one_line(lambda: lm.model(ids, position_ids=positions), "several texts")
    with torch.no_grad(), lm.steered(at(lm, "all")[0]):
        lm.model(ids, position_ids=positions)
    # Positions as transformers counts them beside padding are no packing.
    inputs = left_padded(lm, PROMPTS)
    counted = (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(
        inputs["attention_mask"] == 0, 1
    )
    with torch.no_grad(), lm.steered(at(lm, "last")[0]):
        lm.model(**inputs, position_ids=counted)
        lm.model(ids, position_ids=torch.arange(ids.shape[1])[None])


def test_padding_that_no_mask_tells_is_refused_where_positions_matter() -> None:
    lm = language_model("llama")
    inputs = dict(lm.tokenizer(PROMPTS, return_tensors="pt", padding=True))
    for where in POSITIONS[1:]:
        with lm.steered(at(lm, where)[0]):
            if (
                where != "prompt"
            ):  # all that is read is prompt, and padding after it reaches nothing
                refused_in_one_line(lambda: lm.model(inputs["input_ids"]), "padding token")
            square = torch.ones(3, 1, *[inputs["input_ids"].shape[1]] * 2)
            refused_in_one_line(
                lambda: lm.model(inputs["input_ids"], attention_mask=square), "where texts end"
            )
    with torch.no_grad(), lm.steered(at(lm, "all")[0]):
        lm.model(inputs["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("positions", POSITIONS)
def test_continuous_batching_is_right_or_refused(positions: Any) -> None:
    lm = language_model("llama")
    steering, change = at(lm, positions)
    prompts = [token_ids(prompt) for prompt in PROMPTS]

    def run() -> list[list[int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = lm.model.generate_batch(prompts, max_new_tokens=4)
        by_prompt = {tuple(o.prompt_ids): list(o.generated_tokens) for o in outputs.values()}
        return [by_prompt.get(tuple(prompt), []) for prompt in prompts]

    expected = [greedy_by_hand(lm.model, ids, 4, change, positions) for ids in prompts]
    try:
        plain = run()
    except Exception as error:
        pytest.skip(f"continuous batching does not run here: {error}")
    if plain != [greedy_by_hand(lm.model, ids, 4, lambda x: x) for ids in prompts]:
        pytest.skip("continuous batching does not run here")
    if positions == "all":
        with lm.steered(steering):
            assert run() == expected
        return
    with pytest.raises(Exception, match="steer at all positions|touched nothing|steer all texts"):  # noqa: SIM117
        with lm.steered(steering):
            written = run()
            assert written != plain or written == expected
            raise tt.TrimtabError("steer at all positions: nothing was written")


# -- backward ---------------------------------------------------------------------------------


def gradients(lm: tt.LanguageModel, texts: list[list[int]], steering: Any, inside: bool) -> Any:
    """Gradients of the sum of two losses, from two passes before one backward."""
    torch.manual_seed(0)  # for dropout
    lm.model.train()
    lm.model.zero_grad()
    with lm.steered(steering):
        losses = []
        for ids in texts:
            tokens = torch.tensor([ids])
            mask = torch.ones_like(tokens)
            losses.append(lm.model(tokens, attention_mask=mask, labels=tokens).loss)
        if inside:
            sum(losses).backward()
    if not inside:
        sum(losses).backward()
    lm.model.eval()
    return [p.grad.clone() for p in lm.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("positions", POSITIONS[:2] + POSITIONS[3:])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_gradients_with_checkpointing_are_those_without(
    name: str, positions: Any, reentrant: bool
) -> None:
    lm = language_model(name)
    texts = [token_ids(PROMPTS[0]), token_ids(PROMPTS[1])[:5]]
    steering = steer_at(lm, "resid", positions=positions)
    steering += steer_at(lm, "ffn_in", positions=positions)
    expected = gradients(lm, texts, steering, inside=True)
    lm.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        lm.model.enable_input_require_grads()
    found = gradients(lm, texts, steering, inside=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    with pytest.raises(tt.TrimtabError, match=r"call backward\(\) inside the block") as caught:
        gradients(lm, texts, steering, inside=False)
    assert "\n" not in str(caught.value)
    assert not any(
        "Hook" in type(vars(m).get("_gradient_checkpointing_func")).__name__
        for m in lm.model.modules()
    )


# -- what others read -------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_steered_whenever_they_were_asked_for_first(
    name: str, before: bool
) -> None:
    lm = language_model(name)
    ids = torch.tensor([token_ids(PROMPTS[0])])
    with torch.no_grad():
        if before:
            lm.model(ids, output_hidden_states=True)
        for kind in ("embed", "resid"):
            steering = steer_at(lm, kind)
            operator = steering.interventions[0].operator
            plain = [x.clone() for x in lm.model(ids, output_hidden_states=True).hidden_states]
            with lm.steered(steering):
                output = lm.model(ids, output_hidden_states=True)
            place = 0 if kind == "embed" else 2
            torch.testing.assert_close(output.hidden_states[place], by_hand(operator)(plain[place]))
            for earlier in range(place):
                assert torch.equal(output.hidden_states[earlier], plain[earlier])


def test_nested_blocks_act_in_their_order_before_others_hooks() -> None:
    lm = language_model("llama")
    ids = torch.tensor([token_ids(PROMPTS[0])])
    seen: list[Tensor] = []
    block(lm.model, 1).register_forward_hook(lambda m, a, x: seen.append(x))
    first, second = steer_at(lm, "resid", "Scale"), steer_at(lm, "resid", "Add", seed=2)
    with torch.no_grad():
        lm.model(ids)
        with lm.steered(first), lm.steered(second):
            lm.model(ids)
    change, then = (by_hand(s.interventions[0].operator) for s in (first, second))
    torch.testing.assert_close(seen[1], then(change(seen[0])))


@pytest.mark.parametrize("kind", ["heads", "ffn_in", "attn_norm_in", "embed"])
def test_users_hooks_on_inputs_see_what_the_steering_made(kind: str) -> None:
    lm = language_model("llama")
    steering = steer_at(lm, kind)
    point = lm.anatomy.point(steering.interventions[0].site)
    seen: list[Tensor] = []
    point.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_of(lm)
    with lm.steered(steering):
        logits_of(lm)
    torch.testing.assert_close(seen[1], by_hand(steering.interventions[0].operator)(seen[0]))
