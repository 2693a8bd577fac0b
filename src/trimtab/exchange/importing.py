"""Reads steerings from other tools' files.

A format has a function in `SIGNS`, which knows its files by what they hold, and one in `READERS`,
which says in our words what a file does (of effects of SAE-TS it is `sae_ts.read`). What comes of
it is a normal steering for the given model, whose dial stands where the file says, and whose range
is measured, as that of a fitted one is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab.contrasts import Contrast
from trimtab.dials import measured
from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.exchange import (
    control_vectors,
    harness,
    hook_names,
    json_vectors,
    lora,
    pickled,
    plain,
    sae_ts,
    steering_lite,
)
from trimtab.exchange.containers import Container, open_container
from trimtab.exchange.vectors import Found
from trimtab.files import exists, file_digest, user_path
from trimtab.model import LanguageModel
from trimtab.reading import plain_texts
from trimtab.steering import Dial, Steering

#: How far the dial of a vector goes that is not measured, as CAA has it.
_FAR = 20.0
#: Whether a file is of a format, by what it holds.
SIGNS: dict[str, Callable[[Container], bool]] = {
    "gguf": control_vectors.is_control_vector,
    "repeng": control_vectors.is_control_vector,
    "lm-eval": harness.is_lm_eval,
    "svec": json_vectors.is_svec,
    "steering-vectors": pickled.is_steering_vectors,
    "steering-lite": steering_lite.is_steering_lite,
    "vllm-lens": json_vectors.is_vllm_lens,
    "transformer-lens": hook_names.is_transformer_lens,
    "neuronpedia": hook_names.is_neuronpedia,
    "persona-vectors": pickled.is_rows,
    "sae-ts": sae_ts.is_effects,
    "tensor": plain.is_tensor,
}
#: What reads each format but sae-ts, of whose files more is asked: the sites that are wanted of a
#: file with several may be named.
READERS: dict[str, Callable[[Container, LanguageModel, Sequence[str]], Found]] = {
    "gguf": control_vectors.read_gguf,
    "repeng": control_vectors.read_repeng,
    "lm-eval": harness.read,
    "svec": json_vectors.read_svec,
    "steering-vectors": pickled.read_steering_vectors,
    "steering-lite": steering_lite.read,
    "vllm-lens": json_vectors.read_vllm_lens,
    "transformer-lens": hook_names.read_transformer_lens,
    "neuronpedia": hook_names.read_neuronpedia,
    "persona-vectors": pickled.read_persona,
    "tensor": plain.read,
}
_KNOWN = ", ".join(("lora", *SIGNS))


def import_steering(
    source: str | Path,
    language_model: LanguageModel,
    *,
    format: str | None = None,
    site: str | Sequence[str] = (),
    target: sae_ts.Target | None = None,
    measure: bool = True,
) -> Steering:
    """A steering from another tool's file, for this model; or from an adapter's directory, if it
    is one that `export` wrote.

    `format` is lora or one of `SIGNS`; without it what the file holds says which. Of a file with
    vectors for several sites `site` names those that are to act (`layers.12.resid`, or a kind:
    `resid`), and of a bare tensor where it belongs. Of a file of SAE-TS, which says what vectors do
    to the features of an autoencoder, `target` names those that are wanted. The dial stands on the
    strength that the file names, 1 where it names none: then the model computes what the tool
    computes. Its range and its named strengths are measured on plain text; with `measure` off the
    range is 20 on either side, or twice as far as the dial stands, and a share's from 0 to 1.

    Raises TrimtabError, in one line, for whatever is no such file or does not fit the model.
    """
    path = user_path(source)
    sites = (site,) if isinstance(site, str) else tuple(site)
    if format == "lora" or (format is None and exists(path) and lora.recognises(path)):
        return _from_adapter(path, language_model)
    container = open_container(path)
    name = _format_of(container, language_model, format)
    if name == "sae-ts":
        found = sae_ts.read(container, language_model, sites, target)
    elif target is not None:
        raise container.refused("features are named of a file of SAE-TS only")
    else:
        found = READERS[name](container, language_model, sites)
    _warn_of_model(container, language_model, found)
    steering = Steering(
        method="imported",
        hyperparameters={
            "format": name,
            "file": shown(path.name, 200),
            "sha256": file_digest(path),
            **{key: shown(said, 200) for key, said in found.says.items()},
        },
        interventions=found.interventions,
        dial=_dial(found),
        model=language_model.identity,
    )
    try:
        for intervention in steering.interventions:
            intervention.operator.check()
        steering.check_fits(language_model.anatomy, language_model.identity)
    except TrimtabError as error:
        raise container.refused(str(error)) from error
    if not measure:
        return steering
    texts = plain_texts()  # their sides do not matter, but a contrast has two
    contrast = Contrast.from_texts(texts[::2], texts[1::2], "plain text")
    return measured(language_model, steering, contrast, default=False, beyond=not found.share)


def _from_adapter(path: Path, language_model: LanguageModel) -> Steering:
    """The steering of an adapter of ours, at its dial."""
    if not lora.recognises(path):
        raise TrimtabError(f"{shown(path, 200)} is no adapter's directory")
    steerings = lora.read(path)
    if len(steerings) != 1:
        raise TrimtabError(
            f"{shown(path, 200)} is {len(steerings)} steerings together: they lie in its folder "
            f"{lora.OWN}/, each in a file"
        )
    (steering,) = steerings
    steering.check_fits(language_model.anatomy, language_model.identity)
    return steering


def _format_of(container: Container, language_model: LanguageModel, given: str | None) -> str:
    """The format that is given, if the file can be of it, or that of what it holds."""
    if given is not None:
        if given not in SIGNS:
            raise TrimtabError(f"format is {shown(given)!r}: known are {_KNOWN}")
        if not SIGNS[given](container):
            raise container.refused(f"it does not hold what a file of {given} does")
        return given
    if "trimtab" in container.metadata:
        raise container.refused("it is a trimtab steering already: use it as it is")
    if control_vectors.is_control_vector(container):
        return "repeng" if control_vectors.has_first(container) else "gguf"
    if pickled.is_rows(container):
        rows = len(container.content)
        return "persona-vectors" if rows == language_model.anatomy.layers + 1 else "tensor"
    name = next((name for name, is_one in SIGNS.items() if is_one(container)), None)
    if name is None:
        raise container.refused(f"it is of no format that is known here: known are {_KNOWN}")
    return name


def _warn_of_model(container: Container, language_model: LanguageModel, found: Found) -> None:
    said, is_one = found.says.get("model_type"), language_model.anatomy.name
    if said is not None and said != is_one:
        warnings.warn(
            f"{container.named} says that it was made for {shown(said, 60)}, and this model is "
            f"{is_one}",
            TrimtabWarning,
            stacklevel=3,
        )


def _dial(found: Found) -> Dial:
    if found.share:
        return Dial("amount", found.default, (0.0, 1.0))
    far = max(_FAR, 2 * abs(found.default))
    return Dial("alpha", found.default, (-far, far))
