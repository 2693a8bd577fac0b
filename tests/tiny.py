"""Tiny random-weight models of every supported architecture, and one tokenizer for all of them.

They are built in memory from the transformers configuration classes, in milliseconds, so that a
test can run on every architecture. Their text means nothing; their structure is the real one, with
the details on which code that assumes Llama breaks: heads wider than the hidden size, grouped
key and value heads, fused and expert weights, tied embeddings, norms that multiply by 1 + w,
sliding windows, soft-caps, biases. Norm weights and biases are random too, because with ones and
zeros a mistake in folding them would not show.

Imports only torch, tokenizers and transformers.
"""

from __future__ import annotations

import copy
import zlib
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

# Shared by all configurations; GPT-2 knows the same names through its attribute map.
_SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}

# Wide heads: 4 heads of 16 make 64 inputs of the output projection for a hidden size of 48.
_WIDE = {"hidden_size": 48, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 16}

# 4 heads of 16 are exactly the hidden size, as in most models.
_PLAIN = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}

# Four layers, sliding and full in turn; 8 tokens, so that a short prompt already leaves the window.
# Attention scaled by less than the head size makes it sharp, so that each token looks elsewhere.
_SLIDING = {"num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 1}

_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**_WIDE, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, {**_PLAIN, "head_dim": 16, "sliding_window": None}),
    "qwen2": (Qwen2Config, {**_PLAIN, "tie_word_embeddings": True}),  # biases on q, k and v
    "qwen3": (Qwen3Config, {**_WIDE, "tie_word_embeddings": True}),  # norms on q and k, per head
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            **_WIDE,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],  # one dense layer, then layers with experts
        },
    ),
    # The soft-caps are far below Gemma's 30 and 50, so that they bite at these small logits.
    "gemma2": (
        Gemma2Config,
        {**_WIDE, **_SLIDING, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 10.0},
    ),
    # A window and a RoPE base of its own in the sliding layers.
    "gemma3": (Gemma3TextConfig, {**_WIDE, **_SLIDING, "sliding_window_pattern": 2}),
    "gpt2": (GPT2Config, {"n_embd": 48, "n_inner": 96}),  # Conv1D weights, biases, no GQA
    "phi3": (Phi3Config, _PLAIN),  # fused q, k, v and fused gate, up
    "olmo2": (Olmo2Config, _PLAIN),  # norms after attention and FFN, none before
}

TINY = tuple(_CONFIGS)

# Parameters of state-space layers, middle and spread: decays below one, so that the state stays
# finite, and near enough to one that a token is remembered for several more.
_STATE_SPACE = {"A_log": (0.0, 0.3), "dt_bias": (-1.0, 0.5), "D": (1.0, 0.2)}


def tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> PreTrainedModel:
    """A random model of architecture `name`, in eval mode on the CPU.

    `config_overrides` go to the configuration class: `tiny_model("mistral", sliding_window=8)`.
    The same arguments give the same weights; the global random state is left as it was.
    """
    if name not in _CONFIGS:
        raise ValueError(f"no tiny model {name!r}; there are {', '.join(TINY)}")
    config_class, sizes = _CONFIGS[name]
    tokenizer = tiny_tokenizer()
    config = config_class(
        **{
            **_SIZES,
            **sizes,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **config_overrides,
        }
    )
    # Construction draws from the global generator; all that it draws is overwritten below.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if getattr(config, "attn_logit_softcapping", None):  # which older versions leave out elsewhere
        model.set_attn_implementation("eager")
    if dtype == torch.float64 and hasattr(config, "num_experts"):  # no grouped product takes it
        model.set_experts_implementation("eager")
    # The name takes part, so that two architectures of one size do not share weights.
    randomise(model, torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
    return model.eval()


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrite every parameter. Drawn in float32, so that each dtype has the same weights."""
    done: set[nn.Parameter] = set()  # a tied matrix is a parameter of two modules
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in done or not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_random_value(module, name, parameter, noise))
            done.add(parameter)


def _random_value(module: nn.Module, name: str, parameter: Tensor, noise: Tensor) -> Tensor:
    """What a parameter becomes: as large as lets every part of a tiny model have its say."""
    if name in _STATE_SPACE:
        middle, spread = _STATE_SPACE[name]
        return middle + spread * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if "Norm" in type(module).__name__:
        # Around what the architecture begins with: one, or zero where it uses 1 + w.
        return parameter.float() + 0.2 * noise
    if isinstance(module, nn.Embedding):
        # Weak, or a tied embedding makes the model repeat its last token.
        return 0.1 * noise
    # Strong, so that the prompt matters more than biases and positions.
    return 0.2 * noise


# Begins with BOS, as many real templates do: a second one, from the post-processor, is a bug.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]

_TEXT = """\
The ship left the harbour in the morning, and the captain stood at the wheel. A large rudder is hard
to turn when the water runs fast, so the old builders put a small tab on its edge. The tab turns the
rudder, and the rudder turns the ship. The less you push, the more you get, if you push at the right
place. She looked at the map and asked where they were going. He said that he did not know, but that
the wind was good and the day was long.

Today I feel happy. Today I feel sad. I love this film, it was wonderful and the actors were great.
I hate this film, it was boring and the actors were bad. The answer is yes. The answer is no. The
answer to the question is not known. What is the capital of France? The capital of France is Paris.
What is the best way to learn a language? Read, write, listen and speak every day.

When the rain came, the children ran into the house and sat by the fire. Their mother told them a
story about a king who had three daughters. The first daughter was strong, the second was clever and
the third was kind. One day the king said: I am old, and one of you must rule. Which of you will it
be? They thought about it for a long time, and then they said that they would rule together.

I cannot help you with that request. I would be happy to help you with that. Sure, here is what you
should do: open the door, turn on the light, and look under the table. There are ten numbers here:
0 1 2 3 4 5 6 7 8 9. Two and two is four. It is true that water boils at 100 degrees; it is false
that the sun goes around the earth. People think that this is right, and other people think that it
is wrong. There was nothing more to say, and so nothing more was said.
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with BOS, EOS, padding and a chat template.

    Any text survives encoding and decoding. BOS is added unless `add_special_tokens=False`. Each
    call gives an instance of its own, which a test may change. Its padding side stays at the
    default, right, because code that needs left padding must see to it itself.
    """
    return copy.deepcopy(_trained_tokenizer())


@cache
def _trained_tokenizer() -> PreTrainedTokenizerFast:
    """Trained once: every test reads it through `tiny_tokenizer`, which copies it."""
    specials = ["<pad>", "<s>", "</s>", *_ROLES]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [_TEXT],
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes
            special_tokens=specials,
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B:1",
        special_tokens=[("<s>", bpe.token_to_id("<s>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=_ROLES,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=_SIZES["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
