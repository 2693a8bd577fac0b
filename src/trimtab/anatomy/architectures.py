"""What a user, a package or `entries.py` says of an architecture: a hint, which is proved.

`Architecture` names modules, once for all layers of a kind; `described` makes a description of one
model of it. A hint that was registered and does not hold is refused; an entry of trimtab's own that
does not hold is as if it were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from trimtab.anatomy.description import Block, Branch, Description
from trimtab.errors import TrimtabError
from trimtab.plugins import Extended


def attention(
    module: str = "self_attn",
    norm: str | None = "input_layernorm",
    readers: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    writer: str = "o_proj",
    **more: Any,
) -> Branch:
    """An attention branch; its readers and its writer are named as they are inside of it."""
    return _branch("attn", module, norm, readers, writer, more)


def ffn(
    module: str = "mlp",
    norm: str | None = "post_attention_layernorm",
    readers: Sequence[str] = ("gate_proj", "up_proj"),
    writer: str | None = "down_proj",
    act: str | None = "act_fn",
    **more: Any,
) -> Branch:
    """An FFN branch after an attention branch; readers, writer and activation function are named
    as they are inside of it."""
    more = {"reads": (0,), **more}
    if act is not None:
        more["act"] = f"{module}.{act}"
    return _branch("ffn", module, norm, readers, writer, more)


def mixer(
    module: str, norm: str | None, readers: Sequence[str], writer: str, **more: Any
) -> Branch:
    """A branch that mixes tokens in another way than softmax attention."""
    return _branch("mixer", module, norm, readers, writer, more)


def mixture(
    module: str = "mlp",
    norm: str | None = "post_attention_layernorm",
    router: str | None = "gate",
    experts: str = "experts",
    shared: str | None = None,
    shared_readers: Sequence[str] = ("gate_proj", "up_proj"),
    shared_writer: str = "down_proj",
    gate: str | None = None,
    **more: Any,
) -> Branch:
    """A mixture of experts after an attention branch: a router, fused experts, and where there is
    one a shared expert beside them, with a gate of its own or without; named as inside of it."""
    readers = [] if router is None else [router]
    if shared is not None:
        readers += [f"{shared}.{name}" for name in shared_readers]
        more["beside"] = (f"{module}.{shared}.{shared_writer}",)
    if gate is not None:
        readers.append(gate)
    more = {"reads": (0,), "experts": f"{module}.{experts}", **more}
    return _branch("ffn", module, norm, readers, None, more)


def _branch(
    kind: Any,
    module: str,
    norm: str | None,
    readers: Sequence[str],
    writer: str | None,
    more: dict[str, Any],
) -> Branch:
    return Branch(
        kind,
        module,
        norm=norm,
        readers=tuple(sorted(f"{module}.{reader}" for reader in readers)),
        writer=None if writer is None else f"{module}.{writer}",
        **more,
    )


@dataclass(frozen=True)
class Architecture:
    """Where an architecture has its parts. The defaults are Llama's.

    `body` starts at the causal language model, `blocks`, `embeddings` and `final_norm` at the body,
    and what a `Block` names at the block. Each layer is described by the first of `layers` whose
    modules it has and which holds for it.
    """

    body: str = "model"
    blocks: str = "layers"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    final_norm: str | None = "norm"
    layers: tuple[Block, ...] = (Block((attention(), ffn())),)
    #: Where the unembedding is, from the model; None: where the model itself says.
    unembedding: str | None = None
    #: What the final norm's output, the unembedding's output and the sum of the embeddings are
    #: multiplied by: a number, or the name of an attribute of the configuration.
    final_factor: float | str = 1.0
    logit_factor: float | str = 1.0
    embedding_factor: float | str = 1.0
    #: Whether it computes what Llama computes, but has no room for some of its biases.
    llama_alike: bool = False

    def described(self, model: Any) -> tuple[Description, list[list[Block]]]:
        """What this says of a model, and the blocks that each of its layers may be. Raises
        AttributeError, which says what is not there."""
        blocks = f"{self.body}.{self.blocks}".strip(".")
        listed = list(_submodule(model, blocks).children())
        layers = []
        for place, block in enumerate(listed):
            options = [_resolved(model, block, o) for o in self.layers if not _absent(block, o)]
            if not options:
                absent = _absent(block, self.layers[-1])[0]
                raise AttributeError(f"{blocks}.{place} has no {absent}")
            layers.append(options)
        within = [f"{self.body}.{name}".strip(".") for name in self.embeddings]
        final_norm = None if self.final_norm is None else f"{self.body}.{self.final_norm}"
        unembedding = self.unembedding or _unembedding(model)
        for name in (self.body, unembedding, *within, final_norm or ""):
            _submodule(model, name)
        description = Description(
            body=self.body,
            blocks=blocks,
            layers=tuple(options[0] for options in layers),
            final_norm=final_norm,
            unembedding=unembedding,
            final_factor=number(model, self.final_factor),
            logit_factor=number(model, self.logit_factor),
            tables=tuple(within),
            embedding_factor=number(model, self.embedding_factor),
        )
        return description, layers


def number(model: Any, value: float | str) -> float:
    """A factor; a name stands for an attribute of the text model's configuration, which may be
    raised to a power, as in "hidden_size**0.5"."""
    if not isinstance(value, str):
        return float(value)
    name, _, power = value.partition("**")
    found: Any = model.config.get_text_config(decoder=True)
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return float(float(found) ** float(power or 1))


def _resolved(model: Any, module: nn.Module, block: Block) -> Block:
    """A block whose factors are numbers: of the configuration, or of the block itself."""

    def value(given: float | str) -> float:
        own = getattr(module, given, None) if isinstance(given, str) else None
        return float(own) if isinstance(own, Tensor) else number(model, given)

    branches = tuple(
        replace(
            branch,
            factor=value(branch.factor),
            input_factor=value(branch.input_factor),
            writer_factor=value(branch.writer_factor),
        )
        for branch in block.branches
    )
    scale = None if block.scale is None else value(block.scale)
    return Block(branches, scale)


def _unembedding(model: Any) -> str:
    """The path of what a model says is its unembedding."""
    head = model.get_output_embeddings()
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    if not names:
        raise AttributeError("what the model says is its unembedding is no module of it")
    return names[0]


def _submodule(model: Any, path: str) -> nn.Module:
    try:
        found: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise AttributeError(f"the model has no module {path}") from error
    return found


def _absent(block: nn.Module, described: Block) -> list[str]:
    """The modules that a description names and a block lacks."""
    absent = []
    for branch in described.branches:
        names = (branch.module, branch.writer, branch.norm, branch.post_norm, branch.experts)
        for name in (*names, branch.output, branch.act, *branch.readers, *branch.beside):
            try:
                block.get_submodule(name or "")
            except AttributeError:
                absent.append(str(name))
    return absent


#: Architectures that a user taught trimtab, which must hold.
_REGISTERED: dict[str, Architecture] = {}
#: Architectures that installed packages add.
_ADDED: Extended[Architecture] = Extended(
    "architecture", {}, lambda added, name: isinstance(added, Architecture)
)


def register(model_type: str, architecture: Architecture) -> None:
    """Teach trimtab an architecture: `model_type` is what the model's config.json says.

    What it says is proved when a model of that type is loaded, and refused where it does not hold:
    `register("my_model", Architecture(layers=(Block((attention(writer="out"), ffn())),)))`.
    """
    if not isinstance(architecture, Architecture):
        raise TrimtabError(
            f"register takes a trimtab.anatomy.Architecture, not {type(architecture).__name__}"
        )
    _REGISTERED[model_type] = architecture


def registered() -> list[str]:
    """The model types that users and packages say something of."""
    return sorted({*_REGISTERED, *_ADDED})


def find_registered(model_type: str) -> Architecture | None:
    """What a user or a package says of a model type."""
    return _REGISTERED.get(model_type) or _ADDED.get(model_type)
