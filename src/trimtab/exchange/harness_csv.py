"""lm-eval's table of features (`--model steered --model_args steer_path=FILE.csv`), in and out.

A row names a feature of a sparse autoencoder, by its number and where the autoencoder comes from,
and a module whose output changes at every token, with d the feature's row of the decoder and b the
decoder's bias:

    add     x <- x + steering_coefficient * d
    clamp   x <- x + (steering_coefficient - v'(x - b)) v,  v = d of length 1

So a row that adds is what `tt.SAE` with do="add" makes of one feature. A row that clamps is another
thing than its do="clamp", which reads the encoder; it is a `Clamp`. Of rows for one hook point
lm-eval keeps the last. Version 0.4.13 refuses each row that adds, because it hands the decoder's
bias to an action that takes none; those before it, and its own description, take them.

A file must not say what is opened here: an autoencoder is read if SAELens has it in its list of
releases, and of no directory or repository that a row names.

https://github.com/EleutherAI/lm-evaluation-harness (lm_eval/models/hf_steered.py)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import torch

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.containers import Container, as_number
from trimtab.exchange.request import Request
from trimtab.exchange.vectors import Added
from trimtab.files import write_whole
from trimtab.reading import Features, is_release, load_features
from trimtab.steering import Steering

COLUMNS = (
    "loader", "action", "sparse_model", "hookpoint", "feature_index", "steering_coefficient",
    "head_index", "sae_id", "description",
)  # fmt: skip
#: What a table must have for its rows to be read; the others may be left out.
_NEEDED = {"hookpoint", "feature_index", "steering_coefficient", "sparse_model"}
#: Rows that a table may have: no model has more modules that steering acts on.
_MOST = 1000


def is_table(text: str) -> bool:
    """Whether a file's text is such a table, by its first line."""
    return {"hookpoint", "feature_index"} <= set(text.partition("\n")[0].strip().split(","))


# -- in -------------------------------------------------------------------------------------------


def entries(container: Container) -> dict[str, dict[str, object]]:
    """The rows as a .pt file of lm-eval has them, by hook point."""
    rows = _rows(container)
    found: dict[str, dict[str, object]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{container.named}, row {number}"
        hook = (row.get("hookpoint") or "").strip()
        if not hook:
            raise TrimtabError(
                f"{where} has no hookpoint: name the module, as in layers.12 (lm-eval takes the "
                "name that the autoencoder has for it, which is none in these models)"
            )
        if hook in found:
            raise TrimtabError(f"{where} is for {shown(hook, 60)} again: lm-eval keeps the last")
        found[hook] = _entry(row, where)
    return found


def _rows(container: Container) -> list[dict[str, str]]:
    try:
        lines = csv.DictReader(io.StringIO(container.content, newline=""), strict=True)
        missing = sorted(_NEEDED - set(lines.fieldnames or ()))
        rows = list(lines)
    except csv.Error as error:
        raise container.refused(f"it is no table of commas: {error}") from error
    if missing:
        raise container.refused(f"it has no column {missing[0]}")
    if not 0 < len(rows) <= _MOST:
        raise container.refused(f"it has {len(rows)} rows: from 1 to {_MOST} are read")
    if any(None in row or None in row.values() for row in rows):
        raise container.refused("its rows have more or fewer entries than there are columns")
    return rows


def _entry(row: Mapping[str, str], where: str) -> dict[str, object]:
    """What lm-eval makes of a row; the bias where it takes one."""
    loader, action = row.get("loader") or "sparsify", row.get("action") or "add"
    if loader != "sae_lens":
        raise TrimtabError(
            f"{where}: its loader is {shown(loader, 30)}, and features are read of SAELens' "
            "releases: let lm-eval read it, and save SteeredModel.derive_steer_config(FILE) with "
            "torch.save as a .pt file"
        )
    if (row.get("head_index") or "").strip():
        raise TrimtabError(f"{where} is for one head, which no row of an autoencoder is")
    release, name = row["sparse_model"].strip(), (row.get("sae_id") or "").strip()
    if not is_release(release, name):
        raise TrimtabError(
            f"{where}: SAELens has no release {shown(release, 60)} with {shown(name, 60)}, and a "
            "table opens nothing else"
        )
    features = load_features(f"{release}:{name}")
    number = row["feature_index"].strip()
    if not number.isdecimal() or int(number) >= features.width:
        raise TrimtabError(
            f"{where}: feature_index is {shown(number, 30)}: the autoencoder has 0 to "
            f"{features.width - 1}"
        )
    coefficient = row["steering_coefficient"].strip()
    try:
        value = float(coefficient)
    except ValueError as error:
        raise TrimtabError(
            f"{where}: steering_coefficient is {shown(coefficient, 30)}, no number"
        ) from error
    return {
        "action": action,
        "steering_vector": features.sae.W_dec[int(number)].detach().float().clone(),
        "steering_coefficient": as_number(value, f"{where}, steering_coefficient"),
        "bias": features.sae.b_dec.detach().float().clone() if action == "clamp" else None,
    }


# -- out ------------------------------------------------------------------------------------------


def write(request: Request, added: list[Added], hooks: Mapping[str, str]) -> Path:
    """A table with a row for each site, whose vector is one feature's."""
    chosen = [_feature(steering) for steering in request.steerings]
    by_site = {site: (source, number) for source, number, site in chosen}
    if len(by_site) < len(chosen):
        raise TrimtabError(
            "two features act at one site, and lm-eval keeps the last of several rows for one: "
            "write -o FILE.pt, which adds both"
        )
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for one in added:
        source, number = by_site[one.site]
        release, _, name = source.partition(":")
        table.writerow(
            {
                "loader": "sae_lens",
                "action": "add",
                "sparse_model": release,
                "hookpoint": hooks[one.site],
                "feature_index": number,
                "steering_coefficient": repr(_coefficient(one, source, number)),
                "sae_id": name,
            }
        )
    return write_whole(request.output, text.getvalue().encode(), request.overwrite)


def _feature(steering: Steering) -> tuple[str, int, str]:
    """The one feature that a steering adds: of which autoencoder, its number, and its site."""
    options = steering.hyperparameters
    source, which = str(options.get("sae", "")), steering.tables.get("feature")
    if steering.method != "sae" or options.get("do") != "add" or which is None:
        raise _unwritten(
            f"{shown(steering.method, 30)} is no addition of a feature (trimtab fit sae --do add)"
        )
    if len(which) != 1 or len(steering.interventions) != 1:
        raise _unwritten(f"it adds {len(which)} features, and a hook point takes one row")
    release, _, name = source.partition(":")
    if not is_release(release, name):
        raise _unwritten(f"{shown(source, 100)} is no RELEASE:ID that SAELens knows")
    return source, int(which[0]), steering.interventions[0].site


def _coefficient(added: Added, source: str, number: int) -> float:
    """How often a feature's row of the decoder is what is added."""
    features: Features = load_features(source)
    row = features.sae.W_dec[number].detach().double().cpu()
    vector = added.folded.double()
    times = float(vector @ row / (row @ row)) if len(row) == len(vector) else 0.0
    if not torch.allclose(vector, times * row, rtol=1e-4, atol=1e-6 * float(vector.abs().max())):
        raise _unwritten(
            f"the vector at {added.site} is not the row of feature {number} of {source}, which is "
            "another autoencoder than it was made with"
        )
    return times


def _unwritten(why: str) -> TrimtabError:
    return TrimtabError(
        f"a .csv of lm-eval names features of released autoencoders, one for a hook point, and "
        f"{why}: write -o FILE.pt, which holds vectors"
    )
