"""Which tokens of a training row are learned: the answers, each with the token that ends its turn."""

from types import ModuleType
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from longllm.conversations import Tokens, conversation_tokens, row_fault, row_tokens

LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system message, please') }}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} </s>{% endif %}{% endfor %}"
)
#: user unchanged, newlines before an answer stripped (Qwen3)
HALF = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{{ m['content'].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
TURNS = [
    ("user", "\n\nWhat is the pass key?"),
    ("assistant", "\n The pass key is 12345.\n"),
    ("user", "\nAnd who is the captain? "),
    ("assistant", "Größe 海.\n\n"),
]


@pytest.fixture
def words(tiny_chat: ModuleType) -> Any:
    """The tiny tokeniser with the special tokens of the families."""
    own = tiny_chat.tokenizer()
    names = ["<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    own.add_special_tokens({"additional_special_tokens": names})
    return own


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def learned(words: Any, tokens: Tokens) -> list[str]:
    """Return what is learned, decoded run by run."""
    assert all(label in (-100, token) for token, label in zip(tokens.ids, tokens.labels, strict=True))
    runs: list[list[int]] = [[]]
    for label in tokens.labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [words.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (None, ["\n The pass key is 12345.\n<|im_end|>", "Größe 海.\n\n<|im_end|>"]),
        (LLAMA3, ["The pass key is 12345.<|eot_id|>", "Größe 海.<|eot_id|>"]),
        (MISTRAL, ["\n The pass key is 12345.\n</s>", "Größe 海.\n\n</s>"]),
        (LLAMA2, ["The pass key is 12345. </s>", "Größe 海. </s>"]),
        (HALF, [" The pass key is 12345.\n<|im_end|>", "Größe 海.\n\n<|im_end|>"]),
    ],
    ids=["chatml", "llama3", "mistral", "llama2", "half"],
)
def test_labels_are_the_answers_and_their_ends_and_ids_the_rendered_chat(
    words: Any, template: str | None, answers: list[str]
) -> None:
    words.chat_template = template or words.chat_template
    words.bos_token = "<s>"
    turns = conversation(*TURNS)
    tokens = conversation_tokens(words, turns)
    assert learned(words, tokens) == answers
    rendered = words.apply_chat_template(turns, tokenize=False)
    assert words.decode(tokens.ids, clean_up_tokenization_spaces=False) == rendered
    assert tokens.targets == sum(label != -100 for label in tokens.labels)


def test_the_tokeniser_s_begin_of_text_comes_first_unless_the_template_has_it(words: Any) -> None:
    words.chat_template, words.bos_token = LLAMA3, "<|begin_of_text|>"
    without = conversation_tokens(words, conversation(*TURNS))
    begin = words.bos_token_id
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    assert words("a")["input_ids"][0] == begin
    tokens = conversation_tokens(words, conversation(*TURNS))
    assert tokens.ids == (begin, *without.ids)
    assert tokens.labels == (-100, *without.labels)
    assert row_tokens(words, {"text": "The whale"}, 99).ids[0] == begin
    words.chat_template = "{{ bos_token }}" + LLAMA3
    assert conversation_tokens(words, conversation(*TURNS)).ids == tokens.ids


def test_a_text_that_spells_a_special_token_ends_no_turn(words: Any) -> None:
    end = words.convert_tokens_to_ids("<|im_end|>")
    tokens = conversation_tokens(words, conversation(("user", "a <|im_end|> b"), ("assistant", "c <|im_end|> d")))
    assert tokens.ids.count(end) == 2
    assert [label for label in tokens.labels if label == end] == [end]
    assert learned(words, tokens) == ["c <|im_end|> d<|im_end|>"]


def test_system_messages_are_read_and_leading_answers_dropped(words: Any) -> None:
    system, question, answer = ("system", "Be brief."), ("user", "Who?"), ("assistant", "Ahab.")
    tokens = conversation_tokens(words, conversation(system, question, answer))
    assert learned(words, tokens) == ["Ahab.<|im_end|>"]
    assert "Be brief." in words.decode(tokens.ids)
    led = conversation_tokens(words, conversation(system, ("assistant", "Hello!"), question, answer))
    assert led == tokens
    open_end = conversation_tokens(words, conversation(question, answer, ("user", "Why?")))
    assert learned(words, open_end) == ["Ahab.<|im_end|>"]


def test_texts_are_learned_whole_ended_and_cut(words: Any) -> None:
    text = "The whale is white and the sea is wide."
    ids = words(text, add_special_tokens=False)["input_ids"]
    whole = row_tokens(words, {"text": text}, 99)
    assert whole.ids == whole.labels == (*ids, words.eos_token_id)
    assert whole.targets == len(ids)
    assert row_tokens(words, {"text": text}, len(ids)).ids == tuple(ids)
    assert row_tokens(words, {"text": text}, 4).ids == tuple(ids[:4])
    # Given both, the text wins.
    assert row_tokens(words, {"text": text, "conversations": []}, 99) == whole


def test_a_conversation_that_is_too_long_is_never_cut(words: Any) -> None:
    row = {"conversations": conversation(*TURNS)}
    tokens = conversation_tokens(words, row["conversations"])
    assert row_tokens(words, row, len(tokens.ids)) == tokens
    assert row_tokens(words, row, len(tokens.ids) - 1) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "has no chat template: train on text rows"),
        ("{{ messages[0]['content'] }}", "does not carry every message"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no end-of-turn token behind an answer"),
        (
            "{% for m in messages %}<|im_start|>{{ m['content'] }}\n{% endfor %}",
            "no end-of-turn token behind an answer: the model would never stop",
        ),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{{ messages[0]['content'] }}", "repeats a"),
        (MISTRAL, "refuses the roles system, user, assistant: no system message, please"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(words: Any, template: str, message: str) -> None:
    words.chat_template = template
    turns = conversation(("system", "s"), ("user", "q"), ("assistant", "a"))
    with pytest.raises(ValueError, match=message):
        conversation_tokens(words, turns)


def test_a_text_without_an_end_is_refused(words: Any) -> None:
    words.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-text token \(eos_token\): the model would never stop"):
        row_tokens(words, {"text": "a"}, 9)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "a row must have text or conversations, got nothing"),
        ({"prompt": "a"}, "a row must have text or conversations, got prompt"),
        ({"text": 1}, "text must be str, got int"),
        ({"text": " \n"}, "text is empty"),
        ({"conversations": "a"}, "conversations must be a list, got str"),
        ({"conversations": ["a"]}, "conversations[0] must be an object with role and content, got str"),
        ({"conversations": conversation(("bot", "a"))}, "conversations[0].role must be one of system, user, assistant"),
        ({"conversations": [{"role": "user"}]}, "conversations[0].content must be str, got NoneType"),
        ({"conversations": conversation(("user", "q"), ("assistant", " "))}, "conversations[1].content is empty"),
        ({"conversations": []}, "conversations must hold an answer of the assistant, got none"),
        ({"conversations": conversation(("assistant", "a"), ("user", "q"))}, "must hold an answer of the assistant"),
        (
            {"conversations": conversation(("user", "q"), ("user", "q"), ("assistant", "a"))},
            "user and assistant must take turns, beginning with the user",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_named(row: dict[str, Any], fault: str) -> None:
    assert fault in (row_fault(row) or "")


def test_good_rows_are_let_through() -> None:
    assert row_fault({"text": "a", "source": 7}) is None
    assert row_fault({"conversations": conversation(*TURNS)}) is None
    assert row_fault({"conversations": conversation(("system", "s"), ("assistant", "hi"), *TURNS)}) is None
