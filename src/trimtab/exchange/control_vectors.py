"""GGUF control vectors: those that llama.cpp adds, and repeng's, which are the same file.

Both add `direction.N` to what block N puts out, counted from 0. In llama.cpp that is what two
subtractions come to: `common_control_vector_load_one` puts direction.N at place N - 1 of a list
that begins with layer 1, and `llama_adapter_cvec::apply` gives block il the place il - 1. So its
block 0 gets none, a file with a direction.0 is refused whole, and so is one with a tensor of
another name or of another type than F32. repeng (ControlModel, extract.py) reads
hidden_states[N + 1] and adds to the output of layer N, 0 included. Neither file has a strength:
both programs multiply by one that their user gives, 1 at first. llama.cpp's own cvector-generator
writes what it read at block i as direction.(i + 1), which is then added one block later; it is
taken here as llama.cpp takes it.

https://github.com/ggml-org/llama.cpp (common/common.cpp, src/llama-adapter.cpp,
tools/cvector-generator), https://github.com/vgel/repeng (repeng/extract.py, repeng/control.py)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from trimtab.errors import shown
from trimtab.exchange.containers import Container, as_floats, as_layer
from trimtab.exchange.request import Exported, Request
from trimtab.exchange.vectors import Found, adds, after_block, chosen, in_stream
from trimtab.files import write_whole
from trimtab.model import LanguageModel

_ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


def write_gguf(request: Request) -> Exported:
    """A control vector for llama.cpp (--control-vector FILE), the dial folded in."""
    return _write(request, "gguf", first=1)


def write_repeng(request: Request) -> Exported:
    """A control vector for repeng (ControlVector.import_gguf), the dial folded in."""
    return _write(request, "repeng", first=0)


def _write(request: Request, name: str, first: int) -> Exported:
    program = {"gguf": "llama.cpp", "repeng": "repeng"}[name]
    output = request.output
    added, left_out = in_stream(request, f"a control vector of {program}", first)
    vectors = {block: one.folded for block, one in added.items()}
    content = _content(vectors, request.language_model.anatomy.name)
    file = write_whole(output, content, request.overwrite)
    use = {
        "gguf": f'llama-cli -m MODEL.gguf --control-vector {output} -p "Today I feel"',
        "repeng": (
            f"ControlModel(model, {list(vectors)}).set_control("
            f'ControlVector.import_gguf("{output}"))'
        ),
    }
    return Exported(name, (file,), left_out=left_out, use=(use[name],))


def _content(vectors: dict[int, Tensor], hint: str) -> bytes:
    """A GGUF file with a tensor for each block."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vector.gguf"
        writer = GGUFWriter(path, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
        for block, vector in vectors.items():
            writer.add_tensor(f"direction.{block}", vector.cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def is_control_vector(container: Container) -> bool:
    """Whether a file holds directions, as llama.cpp or repeng add them."""
    return container.kind == "gguf" and any(
        name.startswith("direction.") for name in container.content
    )


def has_first(container: Container) -> bool:
    """Whether one of them is for block 0, which llama.cpp refuses."""
    return "direction.0" in container.content


def read_gguf(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """A control vector, as llama.cpp adds it."""
    return _read(container, lm, sites, first=1)


def read_repeng(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """A control vector, as repeng adds it."""
    return _read(container, lm, sites, first=0)


def _read(container: Container, lm: LanguageModel, sites: Sequence[str], first: int) -> Found:
    vectors = {}
    for name, tensor in container.content.items():
        found = _DIRECTION.fullmatch(name)
        if found is None:
            raise container.refused(f"a control vector has no tensor '{shown(name, 60)}'")
        block = as_layer(found[1], lm.anatomy.layers, f"{container.named}: the layer of {name}")
        if block < first:
            raise container.refused(
                "llama.cpp refuses a control vector with direction.0; repeng takes it (--from "
                "repeng)"
            )
        vector = as_floats(tensor, f"{container.named}: {name}", (1,))
        if vector.any():
            vectors[after_block(block)] = (vector, 1.0)
    hint = container.metadata.get(f"{_ARCHITECTURE}.model_hint", "")
    picked = chosen(container, vectors, sites, together=True)
    return adds(picked, {"model_type": str(hint)} if hint else {})
