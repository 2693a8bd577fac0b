"""Answers requests with llama.cpp under a control vector, through the C functions of its library.

    python llamacpp_vector.py JOB.json ANSWERS.json

The job has a folder of llama.cpp's libraries, a GGUF file, how many tokens are wanted, and
requests: token ids, and a control vector's file or null. A file is put into memory as llama.cpp's
own programs put it (common_control_vector_load_one): direction.N at place N - 1, of strength 1.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader


class Parameters(ctypes.Structure):
    """Room for what llama.cpp fills in itself. Such a structure is handed over in memory, where
    nobody reads beyond what its own declaration says."""

    _fields_ = (("room", ctypes.c_byte * 1024),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *(
            (name, ctypes.c_void_p)
            for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")
        ),
    )


def opened(folder: str) -> ctypes.CDLL:
    """The library, with the types of the functions that are called."""
    (ggml,) = Path(folder).glob("libggml.v*.so")
    (llama,) = Path(folder).glob("libllama.v*.so")
    ctypes.CDLL(str(ggml), ctypes.RTLD_GLOBAL).ggml_backend_load_all_from_path(folder.encode())
    library = ctypes.CDLL(str(llama))
    library.llama_backend_init()
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    declared = {
        "llama_model_default_params": ((), Parameters),
        "llama_context_default_params": ((), Parameters),
        "llama_model_load_from_file": ((ctypes.c_char_p, Parameters), pointer),
        "llama_init_from_model": ((pointer, Parameters), pointer),
        "llama_model_get_vocab": ((pointer,), pointer),
        "llama_vocab_n_tokens": ((pointer,), number),
        "llama_model_n_embd": ((pointer,), number),
        "llama_model_n_layer": ((pointer,), number),
        "llama_set_adapter_cvec": (
            (pointer, pointer, ctypes.c_size_t, number, number, number),
            number,
        ),
        "llama_batch_get_one": ((pointer, number), Batch),
        "llama_decode": ((pointer, Batch), number),
        "llama_get_logits_ith": ((pointer, number), ctypes.POINTER(ctypes.c_float)),
        "llama_set_n_threads": ((pointer, number, number), None),
        "llama_free": ((pointer,), None),
    }
    for name, (arguments, result) in declared.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def places(file: str, width: int, layers: int) -> np.ndarray:
    """A control vector's file as the list of vectors that begins with layer 1."""
    found = np.zeros((layers - 1, width), np.float32)
    for tensor in GGUFReader(file).tensors:
        found[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data
    return found


def likeliest(library: ctypes.CDLL, context: int, given: list[int], words: int) -> int:
    """The likeliest token after tokens that follow what the context has read."""
    tokens = (ctypes.c_int32 * len(given))(*given)  # the batch only points at them
    batch = library.llama_batch_get_one(tokens, len(given))
    assert library.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (words,))
    return int(logits.argmax())


def main(job_file: str, answers_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    library = opened(job["folder"])
    model = library.llama_model_load_from_file(
        job["model"].encode(), library.llama_model_default_params()
    )
    width, layers = library.llama_model_n_embd(model), library.llama_model_n_layer(model)
    words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    answers = []
    for request in job["requests"]:
        context = library.llama_init_from_model(model, library.llama_context_default_params())
        library.llama_set_n_threads(context, 1, 1)
        if request["vector"]:
            data = places(request["vector"], width, layers)
            assert not library.llama_set_adapter_cvec(
                context, data.ctypes.data, data.size, width, 1, layers
            )
        written, given = [], request["tokens"]
        for _ in range(job["new"]):
            given = [likeliest(library, context, given, words)]
            written += given
        answers.append(written)
        library.llama_free(context)
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
