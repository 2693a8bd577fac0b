"""Sites are found from how a model computes, and what is claimed of it is proved by numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from made_up import HEADS, SIZE, MadeUp
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab import anatomy
from trimtab.anatomy import (
    KINDS,
    Anatomy,
    Architecture,
    Block,
    Branch,
    Point,
    architectures,
    attention,
    ffn,
    mixture,
)
from trimtab.anatomy.entries import ENTRIES
from trimtab.anatomy.hooks import hooked
from trimtab.anatomy.knowing import Known, discover, know

EVERY = [*TINY, *CURATED]


def _model(name: str, **options: Any) -> Any:
    return tiny_model(name, **options) if name in TINY else curated_model(name, **options)


@pytest.fixture(autouse=True)
def _own_cache_and_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.anatomy.knowing.cache_dir", lambda: tmp_path)
    monkeypatch.setattr(architectures, "_REGISTERED", {})


# -- without a hint -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_discovery_comes_to_what_the_entry_says(name: str) -> None:
    model = _model(name)
    known = know(model)
    assert (known.source, known.first_problem()) == ("entry", None)
    found = discover(model)
    assert found.source == "discovery"
    assert found.description == known.description
    assert found.flat == known.flat


@pytest.mark.parametrize("name", EVERY)
def test_in_half_precision_the_same_is_found(name: str) -> None:
    exact = discover(_model(name)).description
    found = discover(_model(name, dtype=torch.bfloat16))
    assert found.first_problem() is None
    for one, other in zip(found.description.layers, exact.layers, strict=True):
        assert len(one.branches) == len(other.branches)
        for branch, expected in zip(one.branches, other.branches, strict=True):
            for factor in ("factor", "input_factor", "writer_factor"):
                measured, given = getattr(branch, factor), getattr(expected, factor)
                assert measured == pytest.approx(given, rel=0.02)
            plain = {"factor": 1.0, "input_factor": 1.0, "writer_factor": 1.0}
            assert replace(branch, **plain) == replace(expected, **plain)


def test_what_no_entry_knows_is_found_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MadeUp()
    places = Anatomy(model)
    assert places.known.source == "discovery"
    assert places.known.first_problem() is None
    assert (places.layers, places.hidden_size, places.heads) == (3, SIZE, HEADS)
    kinds = [kind for kind in KINDS if places.has(kind)]
    assert {kind: places.width(f"layers.1.{kind}") for kind in kinds[1:-1]} == {
        "attn_norm_in": SIZE, "attn_norm": SIZE, "heads": 12, "attn_out": SIZE,
        "ffn_norm_in": SIZE, "ffn_norm": SIZE, "ffn_in": 20, "ffn_out": SIZE, "resid": SIZE,
    }  # fmt: skip
    seen: dict[str, Tensor] = {}
    edits: dict[Point, Any] = {
        places.point(site): partial(seen.__setitem__, site)
        for kind in kinds
        for site in places.sites(kind)
    }
    with torch.no_grad(), hooked(model, edits):
        model(torch.tensor([[3, 1, 4, 1, 5]]))
        block = model.core.stack[1]
        middle = seen["layers.0.resid"] + seen["layers.1.attn_out"]
        assert torch.equal(seen["layers.1.attn_norm_in"], seen["layers.0.resid"])
        assert torch.allclose(seen["layers.1.ffn_norm_in"], middle)
        assert torch.allclose(seen["layers.1.attn_norm"], block.before(seen["layers.0.resid"]))
        assert torch.allclose(seen["layers.1.attn_out"], block.look.out(seen["layers.1.heads"]))
        assert torch.allclose(seen["layers.1.ffn_norm"], block.between(middle))
        assert torch.allclose(seen["layers.1.ffn_out"], block.feed.narrow(seen["layers.1.ffn_in"]))
        assert torch.allclose(seen["layers.1.resid"], middle + seen["layers.1.ffn_out"])
        assert torch.allclose(seen["final_norm"], model.core.last(seen["layers.2.resid"]))
    # Baking asks for the maps around a site.
    assert [each.owner for each in places.writers("layers.1.ffn_out")] == [block.feed.narrow]
    assert [each.owner for each in places.readers("layers.1.attn_norm")] == [block.look.inp]
    assert [each.owner for each in places.readers("final_norm")] == [model.head]
    # The next time it is read, and proved all the same.
    monkeypatch.setattr("trimtab.anatomy.knowing.discover", lambda model: pytest.fail("again"))
    again = know(MadeUp(seed=1))
    assert (again.source, again.description) == ("cache", places.known.description)


def test_a_cache_that_says_something_false_is_not_believed(tmp_path: Path) -> None:
    know(MadeUp())
    (file,) = tmp_path.rglob("anatomy/*.json")
    text = file.read_text()
    for false in (
        text.replace('"feed.narrow"', '"feed.wide"'),
        text.replace('"factor":1.0', '"factor":2.0', 1),
        text.replace('"core.stack"', '"core.words"'),
        "[]",
        "{}",
        "no json",
    ):
        assert false != text
        file.write_text(false)
        known = know(MadeUp())
        assert known.first_problem() is None
        assert known.description.layers[0].ffn is not None
        assert known.description.layers[0].branches[1].writer == "feed.narrow"


def test_a_multiplier_is_found() -> None:
    layers = discover(MadeUp("pull")).description.layers
    assert [[branch.factor for branch in block.branches] for block in layers] == [[0.5, 0.5]] * 3


# -- what is no stack of blocks with one stream -------------------------------------------------


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        ("between blocks", "core.stack.2 does not read what core.stack.1 returns"),
        ("loop", "run 2 times in one pass: the model loops over them"),
        ("after the blocks", "the logits depend on more|final norm|does not read"),
    ],
)
def test_what_adds_to_the_stream_outside_of_the_blocks_is_refused(
    break_it: str, reason: str
) -> None:
    if break_it == "after the blocks":
        # It is a function of the stream alone, so that the stream can be steered; its norm reads
        # something else, and is no site.
        places = Anatomy(MadeUp(break_it))
        assert not places.has("final_norm")
        assert places.has("resid")
        return
    with pytest.raises(tt.TrimtabError, match=reason) as caught:
        Anatomy(MadeUp(break_it))
    assert "registering an architecture is no way out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_block_that_is_no_sum_has_the_stream_alone() -> None:
    places = Anatomy(MadeUp("hidden term"))
    assert [kind for kind in KINDS if places.has(kind)] == ["embed", "resid", "final_norm"]
    with pytest.raises(tt.TrimtabError, match="layers.1.ffn_out: its output is not its input plus"):
        places.point("layers.1.ffn_out")
    with pytest.raises(tt.TrimtabError, match="no sum of branches"):
        assert places.stream_writers


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "qwen3_next"])
def test_a_model_that_was_patched_to_add_to_its_stream_is_refused(name: str) -> None:
    """An entry that holds of the architecture does not of this model."""
    model = _model(name)
    body = Anatomy(model).blocks[1]
    original = body.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        return output + 0.05 * output.roll(1, -1)

    body.forward = patched
    places = Anatomy(model)
    assert places.known.source == "discovery"
    assert places.missing(1, "ffn_out")
    assert places.missing(0, "ffn_out") is None

    def between(module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] + 0.01, *args[1:]), kwargs

    del body.forward
    inner = body.register_forward_pre_hook(between, with_kwargs=True)
    with pytest.raises(tt.TrimtabError, match=r"does not read what .*\.0 returns"):
        Anatomy(model)
    inner.remove()
    assert Anatomy(model).known.source == "entry"


def test_an_encoder_decoder_and_a_body_are_told_why() -> None:
    from every_architecture import build

    with pytest.raises(tt.TrimtabError, match=r"encoder-decoder.*registering it is no way out"):
        Anatomy(build("t5"))
    with pytest.raises(tt.TrimtabError, match=r"take \[4, 2, 11, 64\]"):
        Anatomy(build("gemma3n_text"))
    with pytest.raises(tt.TrimtabError, match="depends on later tokens"):
        Anatomy(build("diffusion_gemma"))
    with pytest.raises(tt.TrimtabError, match="AutoModelForCausalLM"):
        Anatomy(tiny_model("llama").model)


# -- hints ----------------------------------------------------------------------------------------

_MADE_UP = Architecture(
    body="core",
    blocks="stack",
    embeddings=("words",),
    final_norm="last",
    layers=(
        Block(
            (
                attention("look", "before", ("inp",), "out"),
                ffn("feed", "between", ("wide",), "narrow", "act"),
            )
        ),
    ),
)


def test_a_hint_that_holds_is_taken() -> None:
    anatomy.register("made_up", _MADE_UP)
    assert "made_up" in anatomy.known()
    places = Anatomy(MadeUp())
    assert places.known.source == "registered"
    assert places.known.description == discover(MadeUp()).description
    times = "pull"
    pulled = replace(
        _MADE_UP,
        layers=(Block(tuple(replace(b, factor=times) for b in _MADE_UP.layers[0].branches)),),
    )
    anatomy.register("made_up", pulled)
    assert Anatomy(MadeUp("pull")).known.source == "registered"


def test_only_an_architecture_is_registered() -> None:
    with pytest.raises(tt.TrimtabError, match=r"register takes a .*Architecture, not str"):
        anatomy.register("made_up", "llama")  # type: ignore[arg-type]


def _entry(name: str) -> Architecture:
    return ENTRIES[_model(name).config.model_type]


def _with_branch(name: str, number: int, **changes: Any) -> Architecture:
    """An entry with one branch of every layer changed."""
    entry = _entry(name)
    layers = []
    for block in entry.layers:
        branches = list(block.branches)
        if number < len(branches):
            branches[number] = replace(branches[number], **changes)
        layers.append(replace(block, branches=tuple(branches)))
    return replace(entry, layers=tuple(layers))


def _only(name: str, *branches: Branch, **more: Any) -> Architecture:
    return replace(_entry(name), layers=(Block(branches, **more),))


def _dense_or(name: str, branch: Branch) -> Architecture:
    """An entry whose mixtures are described otherwise."""
    layers = [
        replace(block, branches=(block.branches[0], branch)) if block.branches[1].experts else block
        for block in _entry(name).layers
    ]
    return replace(_entry(name), layers=tuple(layers))


def _blocks(name: str, change: Callable[[Block], Block]) -> Architecture:
    return replace(_entry(name), layers=tuple(map(change, _entry(name).layers)))


_BEFORE, _BETWEEN = "input_layernorm", "post_attention_layernorm"
_ON_ATTENTION, _ON_FFN = "post_attention_layernorm", "post_feedforward_layernorm"
_QK, _QKVO = ("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")

#: Hints that are false in one place each, by the model of which the rest is true.
WRONG: dict[str, dict[str, Callable[[], Architecture]]] = {
    "llama": {
        "norms swapped": lambda: _only("llama", attention(norm=_BETWEEN), ffn(norm=_BEFORE)),
        "one norm named twice": lambda: _with_branch("llama", 1, norm=_BEFORE),
        "no norm": lambda: _with_branch("llama", 0, norm=None),
        "parallel where it is not": lambda: _with_branch("llama", 1, reads=()),
        "another map as writer": lambda: _with_branch("llama", 1, writer="mlp.up_proj"),
        "a reader forgotten": lambda: _only("llama", attention(readers=_QK), ffn()),
        "a reader too many": lambda: _only("llama", attention(readers=_QKVO), ffn()),
        "attention taken for an FFN": lambda: _with_branch("llama", 0, kind="ffn"),
        "an FFN taken for attention": lambda: _with_branch("llama", 1, kind="attn"),
        "an FFN taken for a mixer": lambda: _with_branch("llama", 1, kind="mixer"),
        "a branch forgotten": lambda: _only("llama", attention()),
        "a multiplier too many": lambda: _with_branch("llama", 1, factor=0.5),
        "pre-norms taken for post-norms": lambda: _only(
            "llama",
            attention(norm=None, post_norm=_BEFORE),
            ffn(norm=None, post_norm=_BETWEEN),
        ),
        "another norm as the final one": lambda: replace(
            _entry("llama"), final_norm="layers.2.input_layernorm"
        ),
        "a map as activation function": lambda: _with_branch("llama", 1, act="mlp.up_proj"),
    },
    "cohere2": {
        "not parallel where it is": lambda: _with_branch("cohere2", 1, reads=(0,)),
    },
    "qwen3_next": {
        "linear attention taken for softmax": lambda: _with_branch("qwen3_next", 0, kind="attn"),
    },
    "gemma4": {
        "the third branch forgotten": lambda: _blocks(
            "gemma4", lambda block: replace(block, branches=block.branches[:2])
        ),
        "the layer's scale forgotten": lambda: _blocks(
            "gemma4", lambda block: replace(block, scale=1.0)
        ),
    },
    "olmo3": {
        "post-norms taken for pre-norms": lambda: _only(
            "olmo3", attention(norm=_ON_ATTENTION), ffn(norm=_ON_FFN)
        ),
    },
    "gemma2": {
        "a post-norm forgotten": lambda: _with_branch("gemma2", 0, post_norm=None),
        "post-norms swapped": lambda: _only(
            "gemma2",
            attention(post_norm=_ON_FFN),
            ffn(norm="pre_feedforward_layernorm", post_norm=_ON_ATTENTION),
        ),
    },
    "granite": {
        "a multiplier forgotten": lambda: _with_branch("granite", 0, factor=1.0),
        "the embedding's forgotten": lambda: replace(_entry("granite"), embedding_factor=1.0),
        "the logits' forgotten": lambda: replace(_entry("granite"), logit_factor=1.0),
    },
    "falcon_h1": {
        "the input's multiplier forgotten": lambda: _with_branch("falcon_h1", 1, input_factor=1.0),
        "the writer's multiplier forgotten": lambda: _with_branch(
            "falcon_h1", 2, writer_factor=1.0
        ),
        "the Mamba beside attention forgotten": lambda: _blocks(
            "falcon_h1", lambda block: replace(block, branches=block.branches[1:])
        ),
    },
    "deepseek_v3": {
        "a shared expert forgotten": lambda: _dense_or("deepseek_v3", mixture()),
        "a shared expert's reader forgotten": lambda: _dense_or(
            "deepseek_v3", mixture(shared="shared_experts", shared_readers=("up_proj",))
        ),
    },
    "mixtral": {
        "the router forgotten": lambda: _only("mixtral", attention(), mixture(router=None)),
        "a mixture taken for an FFN": lambda: _only(
            "mixtral", attention(), ffn(readers=("gate",), writer="gate", act=None)
        ),
    },
    "gpt_oss": {
        "the router taken for the experts": lambda: _only(
            "gpt_oss", attention(), mixture(router="router", experts="router")
        ),
    },
    "gpt2": {
        "the position table forgotten": lambda: replace(_entry("gpt2"), embeddings=("wte",)),
    },
    "gemma3_wrapper": {
        "the module around the body": lambda: replace(_entry("gemma3_wrapper"), body="model"),
    },
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, hints in WRONG.items() for wrong in hints]
)
def test_a_hint_that_does_not_hold_is_refused_at_load(name: str, wrong: str) -> None:
    model = _model(name)
    anatomy.register(model.config.model_type, WRONG[name][wrong]())
    with pytest.raises(tt.TrimtabError, match="what is registered for .* does not hold") as caught:
        tt.wrap(model, tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_transposed_experts_are_seen_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square weights have no shape that tells."""
    from trimtab.anatomy import experts, knowing

    real = experts.layout_of

    def transposed(module: Any) -> Any:
        layout = real(module)
        turned = layout and replace(layout, down_transposed=not layout.down_transposed)
        return turned

    model = _model("gpt_oss")
    assert model.config.hidden_size == model.config.intermediate_size
    for place in (experts, knowing.prove_block.__globals__["disagreement"].__globals__):
        target = place if isinstance(place, dict) else vars(place)
        monkeypatch.setitem(target, "layout_of", transposed)
    anatomy.register("gpt_oss", ENTRIES["gpt_oss"])
    with pytest.raises(tt.TrimtabError, match="mlp.experts: it returns something else"):
        Anatomy(model)


# -- real models --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["smollm2-135m-instruct", "gemma3-270m"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_models_are_found_as_their_entries_say(pack: str, dtype: str) -> None:
    lm = tt.load(pack, dtype=dtype)
    known: Known = lm.anatomy.known
    assert known.source == "entry"
    found = discover(lm.model)
    assert found.first_problem() is None
    assert found.description.layers == known.description.layers
    assert found.description.embedding_factor == pytest.approx(
        known.description.embedding_factor, rel=0.01
    )
