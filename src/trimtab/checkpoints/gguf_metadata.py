"""What a GGUF file says of itself, its tensors apart.

It is kept beside a checkpoint that was made of the file, and found again when the checkpoint
becomes a GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

#: The file beside a checkpoint: a GGUF file with the metadata of the one that it was made of, and
#: those of its tensors that are no weights of the model.
ORIGIN = "ORIGIN.gguf"
#: The key under which stands what was baked, as trimtab.json has it.
BAKED = "trimtab.baked"
#: Tensors that no weight of a model of transformers stands for.
_BESIDE_WEIGHTS = ("rope_freqs.weight",)


def values_of(reader: GGUFReader) -> dict[str, Any]:
    """The values of a file's metadata, by key."""
    return {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }


def keep_metadata(reader: GGUFReader, directory: Path) -> None:
    """Write what a GGUF file says of itself into a directory."""
    from gguf import GGUFWriter

    writer = GGUFWriter(directory / ORIGIN, "")
    carry(reader, writer, {key: key for key in values_of(reader)})
    for name, tensor in beside_weights(reader).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def beside_weights(reader: GGUFReader) -> dict[str, Any]:
    """The tensors (float32) of a file that are no weights of the model, by name."""
    from gguf import dequantize

    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
        if tensor.name in _BESIDE_WEIGHTS
    }


def carry(reader: GGUFReader, writer: GGUFWriter, names: Mapping[str, str]) -> None:
    """Put a file's values of these keys into another file, each under its new name."""
    for key, name in names.items():
        field = reader.fields[key]
        item = field.types[-1] if len(field.types) > 1 else None
        writer.kv_data[0].pop(name, None)  # the writer itself puts in the architecture
        writer.add_key_value(name, field.contents(), field.types[0], item)


def metadata_of(directory: Path) -> GGUFReader | None:
    """What the GGUF file said that a checkpoint was made of; None where it was made of none."""
    from gguf import GGUFReader

    file = directory / ORIGIN
    return GGUFReader(file) if file.is_file() else None
