"""What a GGUF file says of itself, its tensors apart.

It is kept beside a checkpoint that was made of the file, and found again when the checkpoint
becomes a GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

#: The file beside a checkpoint: a GGUF file with the metadata of the one that it was made of, and
#: those of its tensors that are no weights of the model.
ORIGIN = "ORIGIN.gguf"
#: The key under which stands what was baked, as trimtab.json has it.
BAKED = "trimtab.baked"
#: Tensors that no weight of a model of transformers stands for.
_BESIDE_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself."""

    #: By key; arrays are lists.
    values: Mapping[str, Any]
    #: GGUF's types of the values; of an array the last one is that of its items.
    types: Mapping[str, list[GGUFValueType]]
    #: Tensors (float32) that are no weights of the model, by name.
    beside: Mapping[str, Any]

    def carry(self, writer: GGUFWriter, names: Mapping[str, str]) -> None:
        """Put the values of these keys into another file, each under its new name."""
        for key, name in names.items():
            first, *item = self.types[key]
            writer.kv_data[0].pop(name, None)  # the writer itself puts in the architecture
            writer.add_key_value(name, self.values[key], first, item[-1] if item else None)


def read_metadata(reader: GGUFReader) -> Metadata:
    """What a file says of itself, as gguf reads it."""
    from gguf import dequantize

    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return Metadata(
        {key: field.contents() for key, field in fields.items()},
        {key: field.types for key, field in fields.items()},
        {
            tensor.name: dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
            if tensor.name in _BESIDE_WEIGHTS
        },
    )


def keep_metadata(metadata: Metadata, directory: Path) -> None:
    """Write what a GGUF file says of itself into a directory."""
    from gguf import GGUFWriter

    writer = GGUFWriter(directory / ORIGIN, "")
    metadata.carry(writer, {key: key for key in metadata.values})
    for name, tensor in metadata.beside.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata_of(directory: Path) -> Metadata | None:
    """What the GGUF file said that a checkpoint was made of; None where it was made of none."""
    from gguf import GGUFReader

    file = directory / ORIGIN
    return read_metadata(GGUFReader(file)) if file.is_file() else None
