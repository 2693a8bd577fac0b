"""From prompts to tokens: chat templates that refuse, tokenizers that add EOS, messages in CSV."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

import trimtab as tt
from helpers import PROMPTS, language_model, plain_logits, token_ids
from tiny import tiny_model, tiny_tokenizer
from trimtab.evaluation.tasks.prompts import prompts_task


def one_line(error: Any) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# -- chat templates ---------------------------------------------------------------------------


def with_template(template: str) -> tt.LanguageModel:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tt.wrap(tiny_model("llama"), tokenizer, "tiny")


#: As Gemma's: no system message, and the roles take turns.
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{{ message['content'] }}\n{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (STRICT, [{"role": "system", "content": "Be brief"}, *HELLO], "System role not supported"),
        (STRICT, [*HELLO, *HELLO], "roles user, user: Conversation roles must alternate"),
        ("{{ messages[0].parts.text }}", HELLO, "has no attribute 'parts'"),
        ("{{ raise_exception('one\nline\tonly') }}", HELLO, "one line only"),
        ("{{ raise_exception('') }}", HELLO, "TemplateError"),
        ("{% for %}", HELLO, "Expected an expression"),
        ("{{ messages[0]['content'] + 1 }}", HELLO, "can only concatenate str"),
        ("{{ 1 / 0 }}", HELLO, "division by zero"),
        ("{{ messages[9]['role'] }}", HELLO, "has no element 9"),
        ("{{ messages | nothing }}", HELLO, "No filter named 'nothing'"),
        ("{{ ''.__class__.__mro__ }}", HELLO, "unsafe|undefined|not safely"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", HELLO, "recursion"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", HELLO, "Range too big"),
        ("{# nothing #}", HELLO, "makes an empty text of messages with the roles user"),
    ],
)
def test_a_template_that_refuses_is_one_line(template: str, messages: Any, says: str) -> None:
    lm = with_template(template)
    for run in (
        lambda: lm.generate([messages], max_new_tokens=2),
        lambda: lm.logits([messages]),
        lambda: lm.encode([tuple((one["role"], one["content"]) for one in messages)], ["Yes"]),
    ):
        with pytest.raises(tt.TrimtabError, match=says) as caught:
            run()
        message = one_line(caught)
        assert "chat template of tiny" in message
        assert "raw text" in message


def test_what_a_template_takes_is_as_it_was() -> None:
    lm = with_template(STRICT)
    rendered = lm.tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert lm.render((("user", "Hello"),)) == rendered
    assert lm.generate([HELLO], max_new_tokens=2)[0] == lm.generate(["Hello"], max_new_tokens=2)[0]


# -- tokenizers that add EOS ------------------------------------------------------------------


def closing(single: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another frame around every text."""
    plain = tiny_tokenizer()
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    specials = [("<s>", plain.bos_token_id), ("</s>", plain.eos_token_id), ("<pad>", 0)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=plain.chat_template,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


@pytest.mark.parametrize(
    ("frame", "begins"),
    [
        ("<s> $A </s>", True),
        ("$A </s>", False),
        ("<s> $A </s> <pad>", True),
        ("<s> $A", True),
        ("$A", False),
    ],
)
def test_a_prompt_never_ends_with_what_the_tokenizer_adds(frame: str, begins: bool) -> None:
    lm = language_model("llama")
    ours = tt.wrap(lm.model, closing(frame))
    start = 0 if begins else 1
    for prompt in [*PROMPTS, "a", "aa", " "]:
        expected = token_ids(prompt)[start:]
        assert ours.encode([prompt]) == [expected]
        assert ours.encode([prompt], [" yes"]) == [token_ids(prompt + " yes")[start:]]
        logits = plain_logits(lm.model, expected)[-1]
        torch.testing.assert_close(ours.logits([prompt])[0], logits, rtol=1e-4, atol=1e-4)
        done = ours.generate([prompt], max_new_tokens=1, chat=False)[0]
        assert done.tokens == (int(logits.argmax()),)
    # What the text says itself stays, with and without the frame.
    eos = lm.tokenizer.eos_token_id
    assert ours.encode(["end</s>"])[0][-1] == eos
    assert ours.encode(["end</s>"])[0][-2] != eos
    rendered = ours.render((("user", "Hi"),))
    assert ours.encode([rendered, (("user", "Hi"),)]) == [token_ids(rendered[3:])] * 2


def test_a_fit_reads_the_last_token_of_the_text_and_not_eos() -> None:
    lm = language_model("llama")
    pairs = [("The ship", " left", " sank"), ("The king", " spoke", " slept")]
    contrast = tt.Contrast.from_pairs(pairs)
    vectors = []
    for tokenizer in (tiny_tokenizer(), closing("<s> $A </s>")):
        steering = tt.CAA(layer=1, token="last").fit(tt.wrap(lm.model, tokenizer), contrast)
        vectors.append(steering.interventions[0].operator.vector)
    assert torch.equal(*vectors)


# -- messages in CSV --------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": 'Say "hi"'}]
PLAIN = json.dumps(MESSAGES)


@pytest.mark.parametrize(
    "cell",
    [
        PLAIN,
        PLAIN.replace("[{", "[ {"),
        PLAIN.replace("[{", " [\t{ "),
        PLAIN.replace("[{", "[\n  {\n    "),
        PLAIN.replace("[{", "\r\n[\r\n{"),
        "\ufeff" + PLAIN,
        json.dumps(MESSAGES, indent=2),
    ],
)
def test_messages_in_csv_are_messages_whatever_the_blanks(cell: str, tmp_path: Path) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    path = tmp_path / "pairs.csv"
    path.write_bytes(f"prompt,positive,negative\r\n{quoted},yes,no\r\n".encode())
    assert tt.Contrast.from_csv(path).pairs[0].prompt == (("user", 'Say "hi"'),)
    path.write_bytes(f"text,label\r\n{quoted},positive\r\nno,negative\r\n".encode())
    assert tt.Contrast.from_csv(path).texts[0].text == (("user", 'Say "hi"'),)
    path.write_bytes(f"Goal,id\r\n{quoted},1\r\n".encode())
    task = prompts_task("refusal", str(path), None)
    assert task.read_file is not None
    row = task.read_file(path)[0]
    assert task.example(row, 0, "trimtab").prompt == (("user", 'Say "hi"'),)


@pytest.mark.parametrize("cell", ["[1] {", "{[", "see [{x}]", "\u00a0[{", "()", "[", "", "[]"])
def test_text_in_csv_stays_text(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f'prompt,positive,negative\n"{cell}",yes,no\n', encoding="utf-8")
    assert tt.Contrast.from_csv(path).pairs[0].prompt == cell


def test_messages_in_csv_that_are_no_json_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,positive,negative\n"[ {role: user}]",yes,no\n')
    with pytest.raises(tt.TrimtabError, match=r"row 1, prompt is not JSON") as caught:
        tt.Contrast.from_csv(path)
    one_line(caught)
