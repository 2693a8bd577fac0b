"""What stands in deploy/: it names commands, options, routes and counters that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from trimtab.cli.app import build
from trimtab.serving.metrics import Metrics

DEPLOY = Path(__file__).parents[1] / "deploy"


def counted() -> set[str]:
    """The names of all series that a server has; those with labels once they have been seen."""
    metrics = Metrics(SimpleNamespace(running=0, waiting=0))  # type: ignore[arg-type]
    metrics.requests.labels("/v1/models", "200").inc()
    metrics.steered.labels("warm").inc()
    metrics.tokens.labels("prompt").inc()
    metrics.gates.labels("warm", "true").inc()
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name for family in families for sample in family.samples}


def taken(words: list[str]) -> dict[str, Any]:
    """What `trimtab serve` makes of some words."""
    command, bound, *_ = build(words).parse_args(words, print_error=False, exit_on_error=False)
    assert command.__doc__ is not None
    return bound.arguments


def test_the_board_shows_what_is_counted() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [one["expr"] for panel in board["panels"] for one in panel["targets"]]
    named = {name for expression in asked for name in re.findall(r"trimtab_\w+", expression)}
    assert named <= counted()
    # And everything that is counted is on it: of histograms their buckets.
    shown = {name.removesuffix("_bucket") for name in named}
    kept = {
        re.sub(r"_(bucket|count|sum|created)$", "", name)
        for name in counted()
        if not name.endswith("_created")
    }
    assert kept == shown


def test_the_unit_and_the_image_start_a_server_as_it_is() -> None:
    unit = (DEPLOY / "trimtab.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *words = shlex.split(start)
    assert program.endswith("/bin/trimtab")
    assert taken(words)
    image = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", image, re.MULTILINE)
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    words = [*json.loads(entry)[1:], *compose["services"]["trimtab"]["command"]]
    assert taken(words)
    assert "0.0.0.0" in words  # which takes a key, and compose does not start without one
    assert ":?" in compose["services"]["trimtab"]["environment"]["TRIMTAB_API_KEY"]
    for name in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE):
        for part in name.split():
            assert (DEPLOY.parent / part).exists(), part


def test_every_file_that_compose_mounts_is_there() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = [one for each in compose["services"].values() for one in each.get("volumes", [])]
    files = [one.split(":")[0] for one in mounts if Path(one.split(":")[0]).suffix]
    assert len(files) == 4
    for file in files:
        assert (DEPLOY / file).is_file(), file
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]
    key = scrape["authorization"]["credentials_file"]
    assert Path(key).name in compose["services"]["prometheus"]["secrets"]
    # No port is open to other machines.
    for each in compose["services"].values():
        for port in each.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_replicas_are_alike_and_behind_one_address() -> None:
    compose = yaml.safe_load((DEPLOY / "replicas.yaml").read_text())["services"]
    proxy = compose.pop("nginx")
    first, *others = compose.values()
    assert others
    assert all(each == first for each in others)
    assert "ports" not in first  # nobody passes the proxy by
    assert all(mount.endswith(":ro") for mount in first["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in proxy["ports"])
    image = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", image, re.MULTILINE)
    words = [*json.loads(entry)[1:], *first["command"]]
    assert taken(words)
    settings = (DEPLOY / "nginx.conf").read_text()
    port = words[words.index("--port") + 1]
    assert re.findall(r"^ +server (\S+);$", settings, re.MULTILINE) == [
        f"{name}:{port}" for name in compose
    ]
    assert settings.count("{") == settings.count("}")
    assert "proxy_buffering off;" in settings  # or streams would come in lumps
    (listens,) = re.findall(r"listen (\d+);", settings)
    assert proxy["ports"][0].endswith(f":{listens}")
    assert proxy["volumes"] == ["./nginx.conf:/etc/nginx/nginx.conf:ro"]


@pytest.mark.parametrize(
    "name", ["compose.yaml", "replicas.yaml", "prometheus.yml", "grafana-source.yaml"]
)
def test_no_key_stands_in_a_file(name: str) -> None:
    text = (DEPLOY / name).read_text()
    for line in text.splitlines():
        if "KEY" in line and ":" in line and not line.lstrip().startswith("#"):
            assert "${" in line or "environment: TRIMTAB_API_KEY" in line, line
