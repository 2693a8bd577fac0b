"""What differs between the versions of transformers: what is said, and what is mended."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, VaultGemmaConfig

import trimtab as tt
from both_ends import ENDS, FILES, files
from tiny import tiny_model, tiny_tokenizer
from trimtab.model import versions
from trimtab.model.versions import NEWEST, OLDEST, mend_attention

IDS = torch.tensor([list(range(6, 30))])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


# -- the range that is tested ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        (OLDEST + ".0", True),
        (NEWEST + ".9", True),
        ("5.15.1", False),
        ("5.25.0", False),
        ("6.0.0", False),
        ("4.57.6", False),
        ("5.24.0.dev0", True),
    ],
)
def test_an_untested_version_is_said(
    version: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda name: version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn_if_untested()
    assert [w.category for w in caught] == ([] if tested else [tt.TrimtabWarning])
    assert all(version in str(w.message) for w in caught)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.15.0", NEWEST])
def test_it_is_said_once_models_are_needed(version: str) -> None:
    """Not by `import trimtab`, which stays quick."""
    code = (
        "import importlib.metadata as m; real = m.version\n"
        f"m.version = lambda name: {version!r} if name == 'transformers' else real(name)\n"
        "import sys, trimtab; print('transformers' in sys.modules, file=sys.stderr)\n"
        "trimtab.load; trimtab.load"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = said.stderr.splitlines()
    assert lines[0] == "False"
    assert said.stderr.count("outside of what trimtab is tested with") == (version == "5.15.0")


def test_both_ends_of_the_range_are_tested() -> None:
    """By `make test-versions`."""
    assert [end.rpartition(".")[0] for end in ENDS] == [OLDEST, NEWEST]
    assert all(files(group) for group in FILES)


# -- attention that computes something else --------------------------------------------------------


def vaultgemma() -> Any:
    config = VaultGemmaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=400, sliding_window=8,
        query_pre_attn_scalar=1, attn_logit_softcapping=2.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def gemma2() -> Any:
    return tiny_model("gemma2")


@pytest.mark.parametrize("build", [gemma2, vaultgemma])
def test_a_soft_cap_on_attention_is_heeded_in_every_version(build: Any) -> None:
    """As before 5.21, where nothing keeps these models from running without it."""
    model = build()
    expected = logits(model)
    model.config._attn_implementation = "sdpa"
    try:
        without = logits(model)
    except ValueError:  # from 5.21 on
        without = torch.zeros_like(expected)
    assert not torch.allclose(without, expected, atol=1e-3)
    with pytest.warns(tt.TrimtabWarning, match="soft-cap"):
        mend_attention(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model), expected)


def test_a_wrapped_model_heeds_its_soft_cap() -> None:
    model = gemma2()
    expected = logits(model)
    model.config._attn_implementation = "sdpa"
    with pytest.warns(tt.TrimtabWarning, match="soft-cap"):
        lm = tt.wrap(model, tiny_tokenizer(), "gemma2")
    assert torch.equal(logits(lm.model), expected)


def test_the_default_attention_of_a_wrapped_model_is_eager_attention(tmp_path: Any) -> None:
    """As this version of transformers opens it by itself."""
    for name in ("llama", "mistral", "gemma2", "gemma3", "phi3"):
        model = tiny_model(name)
        model.save_pretrained(tmp_path / name)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tt.TrimtabWarning)  # below 5.21
            lm = tt.wrap(opened, tiny_tokenizer(), name)
        found = logits(lm.model)
        lm.model.set_attn_implementation("eager")
        torch.testing.assert_close(found, logits(lm.model), atol=1e-4, rtol=1e-3)


def test_other_attention_is_left_alone() -> None:
    for name in ("llama", "gemma3"):
        model = tiny_model(name)
        used = model.config._attn_implementation
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mend_attention(model)
        assert model.config._attn_implementation == used == "sdpa"
