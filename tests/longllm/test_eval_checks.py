"""Traps that spoil an evaluation silently are met before it starts, each by its name."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import longllm
from longllm.context import parse_rope
from longllm.evals.checks import check_model, check_stops, check_template, turn_end


def templated(tiny: longllm.LoadedModel, template: str | None) -> Any:
    own = copy.deepcopy(tiny.tokenizer)
    own.chat_template = template
    return own


def test_a_sound_model_passes_without_a_word(tiny: longllm.LoadedModel) -> None:
    assert check_model(tiny) == []
    assert turn_end(tiny.tokenizer) == tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_second_end_token_that_nobody_stops_at_is_refused(tiny: longllm.LoadedModel) -> None:
    # As Llama-3: the configuration stops at the end of the text, the template ends turns with another token.
    only_first = dataclasses.replace(tiny, stop_ids=frozenset({tiny.tokenizer.convert_tokens_to_ids("<|endoftext|>")}))
    with pytest.raises(ValueError, match=r"ends its answers with '<\|im_end\|>' \(id 2\), which is not among .*\[0\]"):
        check_model(only_first)
    assert check_model(only_first, chat=False) == []
    check_stops(templated(tiny, "{{ messages[0]['content'] }}{{ messages[1]['content'] }}."), frozenset())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("<|im_start|>user\nHello<|im_end|>", "carries the user's message 0 times"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "carries the user's message 2 times"),
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}", "has no generation prompt"),
        ("{{ messages[0]['content'] }}", "has no generation prompt"),
    ],
)
def test_templates_that_lose_the_question_are_refused(
    template: str | None, message: str, tiny: longllm.LoadedModel
) -> None:
    with pytest.raises(ValueError, match=message):
        check_template(templated(tiny, template))


def test_a_marker_after_the_question_is_a_generation_prompt(tiny: longllm.LoadedModel) -> None:
    # As Mistral's [/INST]: the same with and without add_generation_prompt, and yet it asks.
    check_template(templated(tiny, "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"))


def test_prompts_beyond_the_positions_are_refused_and_beyond_training_warned_of(tiny: longllm.LoadedModel) -> None:
    assert check_model(tiny, max_length=512) == []
    with pytest.raises(ValueError, match=r"max_length 513 is beyond the 512 positions.*--method"):
        check_model(tiny, max_length=513)
    assert check_model(tiny, max_length=5000, compressed=True) == []
    stretched = dataclasses.replace(tiny, trained_length=128)
    assert "beyond the 128 tokens it was trained on" in check_model(stretched, max_length=400)[0]


def test_dynamic_positions_reach_as_far_as_they_stretch(tiny_folder: Path) -> None:
    context = parse_rope("dynamic:4", AutoConfig.from_pretrained(tiny_folder), 0, str(tiny_folder))
    dynamic = longllm.load(tiny_folder, dtype="fp32", context=context)
    assert "beyond the 512 tokens it was trained on" in check_model(dynamic, max_length=2048)[0]
    with pytest.raises(ValueError, match="beyond the 2,048 positions"):
        check_model(dynamic, max_length=2049)


def test_ids_without_a_row_are_refused_and_quarrels_about_the_end_told(tiny: longllm.LoadedModel) -> None:
    with pytest.raises(ValueError, match="stops at id 9999"):
        check_model(dataclasses.replace(tiny, stop_ids=tiny.stop_ids | {9999}))
    own = copy.deepcopy(tiny.tokenizer)
    own.eos_token = "<|endoftext|>"
    warnings = check_model(dataclasses.replace(tiny, tokenizer=own))
    assert (
        warnings == [line for line in warnings if "ends texts with id 0, its generation_config with [2]" in line] != []
    )


def test_a_template_without_the_begin_of_text_token_is_told(tiny: longllm.LoadedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tiny.tokenizer)
    own.bos_token = "<|endoftext|>"
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    (warning,) = check_model(dataclasses.replace(tiny, tokenizer=own))
    assert "does not begin with '<|endoftext|>'" in warning
    own.chat_template = "<|endoftext|>" + own.chat_template
    assert check_model(dataclasses.replace(tiny, tokenizer=own)) == []
