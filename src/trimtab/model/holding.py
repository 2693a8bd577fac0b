"""How a model is held in memory: on which device, in which precision, and whether it fits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch

from trimtab.checkpoints import Counts, weight_bytes
from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.terminal import note

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Quantise = Literal["4bit", "8bit"]
#: The ways in which accelerate itself spreads a model over devices.
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
#: Bytes of weights from which on it is said how many they are.
_LARGE = 2e9


def device_of(device: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    unknown = TrimtabError(f"unknown device {device!r}: auto, cpu, cuda, cuda:1, mps")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise unknown from error
    if chosen.type == "meta":  # a place without numbers, on which nothing runs
        raise unknown
    return chosen


def on_cpu(place: torch.device, device_map: Any) -> bool:
    """Whether a model runs on the CPU."""
    if isinstance(device_map, Mapping):
        return {str(where) for where in device_map.values()} <= {"cpu", "disk"}
    if device_map is None or device_map in _SPREADING:
        return place.type == "cpu"
    return str(device_map) == "cpu"


def precision_of(dtype: str | torch.dtype | None, cpu: bool) -> torch.dtype | Literal["auto"]:
    """What transformers is asked for: a dtype, or "auto", the checkpoint's own."""
    if dtype == "checkpoint" or (dtype in ("auto", None) and not cpu):
        return "auto"
    if dtype in ("auto", None):
        return torch.float32
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise TrimtabError(
            f"unknown dtype {dtype!r}: known are auto, checkpoint, {', '.join(DTYPES)}"
        )
    precision = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if not isinstance(precision, torch.dtype):
        raise TrimtabError(f"dtype is {dtype!r}: write a name or a dtype of torch")
    return precision


def quantisation(quantise: str, precision: torch.dtype | str, cpu: bool) -> Any:
    """How bitsandbytes stores linear maps in 4 or 8 bits; they compute in `precision`."""
    if quantise not in get_args(Quantise):
        raise TrimtabError(
            f"quantise is {quantise!r}: known are {', '.join(get_args(Quantise))}; transformers' "
            "other ways are given as quantization_config"
        )
    if find_spec("bitsandbytes") is None:
        raise TrimtabError(
            "quantising needs bitsandbytes: install trimtab's extra quantised "
            "(pip install 'trimtab[quantised]')"
        )
    from transformers import BitsAndBytesConfig

    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if isinstance(precision, str):
        precision = torch.float32 if cpu else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision
    )


def how_held(
    dtype: str | torch.dtype | None,
    place: torch.device,
    device_map: Any,
    quantise: str | None,
    config: Any,
) -> dict[str, Any]:
    """What transformers is asked for: dtype, and where they are wanted device_map and
    quantization_config (`config` is one that the user made)."""
    cpu = on_cpu(place, device_map)
    held: dict[str, Any] = {"dtype": precision_of(dtype, cpu)}
    if quantise is not None:
        if config is not None:
            raise TrimtabError("give quantise or quantization_config, not both")
        config = quantisation(quantise, held["dtype"], cpu)
    if config is not None:
        held["quantization_config"] = config
    # Quantised weights are made where they stay; and what goes to a card need not fit into the
    # memory beside it first.
    on_card = place.type == "cuda" and torch.cuda.is_available()
    if device_map is None and (on_card or config is not None):
        device_map = {"": 0 if place.type == "cuda" and place.index is None else place}
    if device_map is not None:
        held["device_map"] = device_map
    return held


def bits_of(config: Any) -> str | None:
    """In how many bits a quantisation stores linear maps: "4bit", "8bit", another kind; None where
    there is none."""
    if config is None:
        return None
    if getattr(config, "load_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(config, "load_in_8bit", False) else "another kind"


# -- does it fit ------------------------------------------------------------------------------


def say_size(
    name: str,
    counts: Counts,
    precision: torch.dtype | str | None,
    bits: str | None,
    places: tuple[torch.device, ...],
) -> None:
    """Say how much memory the weights take where that is much, and warn where it is too much.

    `precision` None is that of the files. The rest that running takes (the KV cache, activations)
    depends on what is run, and is not in it.
    """
    size = precision.itemsize if isinstance(precision, torch.dtype) else None
    known = bits is None or bits in get_args(Quantise)
    needed = weight_bytes(counts, size, bits if known else None)
    free = sum(map(free_bytes, places))
    held = bits or ("as stored" if size is None else f"in {str(precision).removeprefix('torch.')}")
    where = " and ".join(dict.fromkeys(place.type for place in places))
    said = (
        f"the weights of {shown(name)} take about {_gb(needed)} {held}; {_gb(free)} of memory is "
        f"free ({where})"
    )
    if not known:
        said = f"the weights of {shown(name)} take at most {_gb(needed)}, and less quantised"
    if known and needed > free:
        warnings.warn(
            f"{said}: it does not fit; load it in fewer bits (--dtype bfloat16, --quantise 4bit), "
            "over several devices (--device-map auto), or a smaller model",
            TrimtabWarning,
            stacklevel=4,
        )
    elif needed >= _LARGE:
        note(said)


def places_of(place: torch.device, device_map: Any) -> tuple[torch.device, ...]:
    """The devices whose memory a model may take."""
    if device_map is None:
        return (place,)
    if isinstance(device_map, Mapping):
        named = {str(where) for where in device_map.values()} - {"disk"}
        return tuple(device_of(f"cuda:{one}" if one.isdigit() else one) for one in sorted(named))
    if device_map not in _SPREADING:
        return (device_of(str(device_map)),)
    cards = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return (*cards, torch.device("cpu"))


def free_bytes(place: torch.device) -> float:
    """Bytes of memory that are free on a device."""
    if place.type == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(place)[0])
    if place.type == "mps" and torch.backends.mps.is_available():
        used = torch.mps.driver_allocated_memory()
        return float(torch.mps.recommended_max_memory() - used)
    return min(float(psutil.virtual_memory().available), _free_in_group())


def _free_in_group() -> float:
    """What a container leaves of its own limit; infinity where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files count as used, and are given back when they are needed.
        return float(limit) - float(used) + float(held.get("inactive_file", 0))
    except (OSError, ValueError):  # another system, or "max"
        return float("inf")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
