"""What the tests of sites, attaching, baking and models share: steerings made by hand, tokens."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import trimtab as tt
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.anatomy import KINDS
from trimtab.model import probe_texts
from trimtab.reading import packs, runs_in_parts, shares_prefixes
from trimtab.reading.streams import run_lower
from trimtab.steering import Positions
from trimtab.steering.calibration import Calibration
from trimtab.steering.operators import (
    Ablate,
    Add,
    Affine,
    Clamp,
    Operator,
    Respond,
    Rotate,
    Scale,
    SetFeatures,
    Shift,
    Turn,
)

#: Longer than the sliding window of 8 tokens, and of different lengths.
PROMPTS = [
    "She looked at the map and asked where they were going",
    "Today I feel sad because of the rain",
    "What is the best way to learn a language? Read, write and speak every day",
]

#: Operators by the names that `operator` knows: those that fold into weights, and all of them.
LINEAR = ("Scale", "Add", "Ablate", "Rotate")
OPERATORS = (*LINEAR, "Absolute", "Turn", "Adaptive", "Respond")

#: A dial at which each of them does enough to be seen.
TELLING = {"Scale": 1.5, "Add": 1.5, "Ablate": 3.0, "Rotate": 70.0, "Absolute": 1.5} | {
    "Turn": 200.0,
    "Adaptive": 200.0,
    "Respond": 1.5,
}

#: A calibration of three budgets, of which half of the prompts do not reach the largest.
CALIBRATION = Calibration(
    kl=(0.01, 0.1, 1.0),
    prompts=20,
    digest="cd" * 32,
    positive=(2.0, 6.0, None),
    positive_worst5=(1.0, 4.0, 9.0),
    negative=(-3.0, -9.0, None),
    negative_worst5=(-2.0, -5.0, -8.0),
)

#: The kinds of sites that an architecture lacks: norms before the branches, or after them, and
#: routers where there is no mixture.
MISSING: dict[str, tuple[str, ...]] = {
    name: ("attn_post_norm", "ffn_post_norm", "router") for name in TINY
} | {
    "gemma2": ("router",),
    "gemma3": ("router",),
    "olmo2": ("attn_norm_in", "ffn_norm_in", "router"),
    "qwen3_moe": ("attn_post_norm", "ffn_post_norm"),
}

#: Every architecture with every kind of site that it has.
SITES = [(name, kind) for name in TINY for kind in KINDS if kind not in MISSING[name]]


def language_model(name: str, **options: Any) -> tt.LanguageModel:
    """A tiny model as trimtab sees it. It never ends a text, so that lengths are known."""
    lm = tt.wrap(tiny_model(name, **options), tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    return lm


def asked(lm: tt.LanguageModel) -> tt.LanguageModel:
    """A model of which all that is asked once has been asked, so that passes can be counted."""
    packs(lm)
    assert lm.pads("logits")
    assert lm.pads("generate")
    for blocks in range(lm.anatomy.layers + 1):
        shares_prefixes(lm, blocks)
        runs_in_parts(lm, blocks or 1)
    run_lower(lm, [probe_texts(lm.anatomy)[0]], 1)  # the forms of what blocks return
    return lm


def token_ids(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text).input_ids
    return ids


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits of one unpadded sequence, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def without_bos() -> PreTrainedTokenizerFast:
    """The tiny tokenizer as models have it that add no special token: an empty text is empty."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer().backend_tokenizer).from_str(
            tiny_tokenizer().backend_tokenizer.to_str()
        ),
        eos_token="</s>",
        model_max_length=256,
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def warned(run: Callable[[], Any]) -> list[str]:
    """The warnings of trimtab that something gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tt.TrimtabWarning)
        run()
    return [str(one.message) for one in caught if issubclass(one.category, tt.TrimtabWarning)]


#: The tokens of the first prompt.
IDS = token_ids(PROMPTS[0])


#: Module and side of a site in a block: by Llama's names, and by GPT-2's.
_PLACES = {
    "heads": ("self_attn.o_proj", "attn.c_proj", "input"),
    "ffn_in": ("mlp.down_proj", "mlp.c_proj", "input"),
    "ffn_out": ("mlp", "mlp", "output"),
    "resid": ("", "", "output"),
}


def read_sites(model: Any, kind: str, texts: Sequence[str], tokenizer: Any = None) -> list[Tensor]:
    """Every token's activations without trimtab, [layers, tokens, units] in float64 per text."""
    gpt2 = hasattr(model, "transformer")
    llama_path, gpt2_path, side = _PLACES[kind]
    seen: list[Tensor] = []
    handles = []
    for block in model.transformer.h if gpt2 else model.model.layers:
        module = block.get_submodule(gpt2_path if gpt2 else llama_path)
        if side == "input":
            hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
        else:
            hook = module.register_forward_hook(lambda m, args, out: seen.append(out[0]))
        handles.append(hook)
    found = []
    for text in texts:
        with torch.no_grad():
            model(**(tokenizer or tiny_tokenizer())(text, return_tensors="pt"), use_cache=False)
        found.append(torch.stack(seen).double())
        seen.clear()
    for handle in handles:
        handle.remove()
    return found


def read_last(model: Any, kind: str, texts: Sequence[str], tokenizer: Any = None) -> Tensor:
    """The last token's activations without trimtab, [texts, layers, units] in float64."""
    return torch.stack([x[:, -1] for x in read_sites(model, kind, texts, tokenizer)])


def side_texts(pairs: Sequence[tuple[str, str, str]]) -> tuple[list[str], list[str]]:
    """The texts of both sides of pairs (prompt, positive, negative)."""
    return [pair[0] + pair[1] for pair in pairs], [pair[0] + pair[2] for pair in pairs]


def scale(width: int, seed: int = 0) -> Scale:
    """A Scale that enlarges, shrinks and flips a third of the units."""
    units = torch.arange(0, width, 3)
    gain = torch.randn(len(units), generator=torch.Generator().manual_seed(seed))
    return Scale(units, gain, width)


def add(width: int, seed: int = 0, size: float = 0.3) -> Add:
    return Add(size * torch.randn(width, generator=torch.Generator().manual_seed(seed)))


def basis(width: int, seed: int = 0, rows: int = 2) -> Tensor:
    """Random orthonormal rows [rows, width]."""
    noise = torch.randn(width, rows, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(noise).Q.T.float().contiguous()


def operator(kind: str, width: int, seed: int = 0) -> Any:
    """A random operator: Scale, Absolute (a Scale of |x|), Add, Ablate, Rotate, Turn, Adaptive,
    Respond."""
    if kind == "Scale":
        return scale(width, seed)
    if kind == "Absolute":
        return replace(scale(width, seed), absolute=True)
    if kind == "Add":
        return add(width, seed)
    if kind == "Respond":
        return Respond(add(width, seed).vector, add(width, seed + 1).vector, 0.5)
    if kind == "Ablate":
        return Ablate(basis(width, seed, 1)[0])
    plane = basis(width, seed)
    return Rotate(plane) if kind == "Rotate" else Turn(plane, adaptive=kind == "Adaptive")


def site_kinds(lm: tt.LanguageModel) -> list[str]:
    """The kinds of sites that an architecture has: not all have all norms."""
    return [kind for kind in KINDS if lm.anatomy.has(kind)]


def by_hand(op: Operator, dial: float = 1.0) -> Any:
    """The operator as its formula says, on any tensor; shares no code with trimtab's.

    Angles with full matrices, which trimtab never forms.
    """

    def apply(x: Tensor) -> Tensor:
        if isinstance(op, Add):
            return x + dial * op.vector.to(x.dtype)
        if isinstance(op, Respond):
            fires = (x @ op.reader.to(x.dtype) + op.bias)[..., None]
            return x + torch.where(fires > 0, dial * fires * op.vector.to(x.dtype), 0.0)
        if isinstance(op, Ablate):
            r = op.direction.to(x.dtype)
            return x @ (torch.eye(len(r), dtype=x.dtype) - dial * torch.outer(r, r))
        if isinstance(op, Clamp):
            v = op.direction.to(x.dtype)
            along = x @ v
            change = along.clamp(op.low, op.high) - along
            return x + dial * change[..., None] * v
        if isinstance(op, Affine):
            moved = (x @ op.v.to(x.dtype)) @ op.u.to(x.dtype).T
            return x + dial * (moved if op.c is None else moved + op.c.to(x.dtype))
        if isinstance(op, Rotate | Turn):
            return _in_plane(op, dial, x)
        if isinstance(op, SetFeatures):
            pre = x @ op.encoder.to(x.dtype).T + op.bias.to(x.dtype)
            f = pre.relu() * (pre > op.threshold.to(x.dtype))
            level = 0.0 if op.level is None else dial * op.level.to(x.dtype)
            new = {
                "clamp": level + 0 * f,
                "at_least": torch.maximum(f, level + 0 * f),
                "ablate": f - dial * f,
                "scale": f + dial * f,
            }[op.mode]
            return x + (new - f) @ op.decoder.to(x.dtype)
        if isinstance(op, Shift):
            own = x[..., op.units]
            carried = (1 - dial) * own + dial * (op.slope.to(x.dtype) * own + op.shift.to(x.dtype))
            if op.low is not None and op.high is not None:
                carried = torch.where((own > op.low) & (own < op.high), carried, own)
            changed = x.clone()
            changed[..., op.units] = carried
            return changed
        assert isinstance(op, Scale)
        changed = x.clone()
        own = x[..., op.units].abs() if op.absolute else x[..., op.units]
        changed[..., op.units] = x[..., op.units] + dial * op.gain.to(x.dtype) * own
        if op.clamp_sign:  # what would change its sign stops at zero
            changed = torch.where(changed * x < 0, 0.0, changed)
        return changed

    return apply


def _in_plane(op: Rotate | Turn, degrees: float, x: Tensor) -> Tensor:
    u = op.basis.to(x.dtype)
    projector, turn = u.T @ u, math.radians(degrees)
    if isinstance(op, Rotate):
        quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=x.dtype)  # turns b1 into b2
        rotation = math.cos(turn) * torch.eye(2, dtype=x.dtype) + math.sin(turn) * quarter
        matrix = torch.eye(len(projector), dtype=x.dtype) - projector + u.T @ rotation @ u
        return x @ matrix.T
    inside = x @ projector
    target = math.cos(turn) * u[0] + math.sin(turn) * u[1]
    turned = x - inside + inside.norm(dim=-1, keepdim=True) * target
    return torch.where((x @ u[0] > 0)[..., None], turned, x) if op.adaptive else turned


def steer(
    lm: tt.LanguageModel,
    *interventions: tuple[str, Any],
    positions: Positions = "all",
    alpha: float = 1.0,
) -> tt.Steering:
    """A steering of (site, operator) pairs."""
    return tt.Steering(
        method="test",
        hyperparameters={},
        interventions=tuple(
            tt.Intervention(site, op, tt.Scope.of(positions)) for site, op in interventions
        ),
        dial=tt.Dial("alpha", alpha, (-100.0, 100.0)),
        model=lm.identity,
    )


def steer_at(
    lm: tt.LanguageModel,
    kind: str,
    op: str = "Add",
    layer: int = 1,
    seed: int = 0,
    positions: Positions = "all",
) -> tt.Steering:
    """A random steering at one site of a kind."""
    site = lm.anatomy.sites(kind, (layer,))[0]
    made = operator(op, lm.anatomy.width(site), seed)
    return steer(lm, (site, made), positions=positions)


def turned(steering: tt.Steering, op: str, times: float = 1.0) -> tt.Steering:
    """At a dial at which its operator shows; degrees are beyond alpha's range, so not by `at`."""
    return replace(steering, value=times * TELLING[op])


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def refused_in_one_line(action: Callable[[], Any], says: str) -> None:
    """A mistake ends in one line that says what is wrong."""
    with pytest.raises(tt.TrimtabError, match=says) as caught:
        action()
    assert "\n" not in str(caught.value)


def one_line(error: Any) -> str:
    """The message of an error that was caught, which is one line."""
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def kl_at(
    lm: tt.LanguageModel, steering: tt.Steering, prompt: Any, dial: float, **to: Any
) -> float:
    """KL(unsteered || steered) in nats of the token after a prompt, from two plain passes."""
    turned = replace(steering, value=dial)  # at() would warn outside the range
    p, q = (
        lm.logits([prompt], steering=one, chat=to.get("chat", False))[0].double().log_softmax(-1)
        for one in (None, turned)
    )
    return float((p.exp() * (p - q)).sum())


def with_range(steering: tt.Steering, low: float = -1e4, high: float = 1e4) -> tt.Steering:
    return replace(steering, dial=replace(steering.dial, range=(low, high)))


# -- hooks and loops without trimtab ----------------------------------------------------------

Change = Callable[[Tensor], Tensor]


def block(model: Any, layer: int) -> nn.Module:
    """A block by its path in transformers."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    found: nn.Module = blocks[layer]
    return found


@contextmanager
def hand_hooked(module: nn.Module, change: Change | None) -> Iterator[None]:
    """Change a module's output with a plain hook."""
    handle = module.register_forward_hook(
        lambda module, args, output: None if change is None else change(output)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def greedy_by_hand(
    model: Any,
    prompt: list[int],
    new: int,
    change: Change,
    positions: Positions = "all",
    layer: int = 1,
) -> list[int]:
    """A plain greedy loop without a cache; `change` acts on a block's output at some positions."""
    ids, end = list(prompt), len(prompt)
    first = {"all": 0, "prompt": 0, "generated": end, "last": end - 1}[positions]
    stop = end if positions == "prompt" else 10**6

    def hook(module: Any, args: Any, x: Tensor) -> Tensor:
        return torch.cat((x[:, :first], change(x[:, first:stop]), x[:, stop:]), dim=1)

    handle = block(model, layer).register_forward_hook(hook)
    for _ in range(new):
        logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    handle.remove()
    return ids[end:]


def left_padded(lm: tt.LanguageModel, prompts: list[str]) -> dict[str, Tensor]:
    return dict(lm.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"))


def raw_greedy(lm: tt.LanguageModel, prompts: list[str], new: int, **options: Any) -> list[Any]:
    """transformers' own generate, nothing of trimtab's: the new tokens of each row."""
    inputs = left_padded(lm, prompts)
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **options}
    output = lm.model.generate(**inputs, **settings)
    tokens: list[Any] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def logits_of(lm: tt.LanguageModel, prompts: list[str] = PROMPTS) -> Tensor:
    """One plain pass over a left-padded batch, [rows, tokens, vocabulary]."""
    with torch.no_grad():
        return lm.model(**left_padded(lm, prompts), use_cache=False).logits


@contextmanager
def seen_before_and_after(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """What a module inside a block puts out, and what the steering makes of it."""

    def see(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [module.register_forward_hook(see, prepend=first) for first in (True, False)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that hooks leave on a model's modules."""
    return {
        name: (
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            dict(module._forward_hooks_with_kwargs),
            dict(module._forward_pre_hooks_with_kwargs),
            [key for key in ("forward", "generate") if key in vars(module)],
        )
        for name, module in model.named_modules()
    }


WORDS = [
    "happy",
    "sad",
    "good",
    "bad",
    "map",
    "ship",
    "rain",
    "wheel",
    "king",
    "daughter",
    "fire",
    "house",
    "children",
]


def write_pairs(path: Path, rows: int = 60, seed: int = 0) -> str:
    """Pairs in three parts, as a task."""
    draw, lines = random.Random(seed), []
    for i in range(rows):
        positive, negative = draw.sample(WORDS, 2)
        row = {
            "prompt": f"Today {draw.choice(WORDS)} {i}",
            "part": ("train", "validation", "test")[i % 3],
        }
        lines.append(json.dumps({**row, "positive": f" {positive}", "negative": f" {negative}"}))
    path.write_text("\n".join(lines))
    return f"contrast:{path}"


def few_quick(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Values of a parameter, of which only those named are for the quick run."""
    slow = pytest.mark.slow
    return [value if value in quick else pytest.param(value, marks=slow) for value in values]
