"""Passkey prompts: lengths, depths and scores, counted again by other means."""

import sys

import pytest

import longllm
from longllm import evals
from longllm.evals import Cell, passkey_cells, passkey_prompt, passkey_score
from longllm.evals.passkey import INSTRUCTION, KEY, NOISE, QUESTION


def count(tiny: longllm.LoadedModel, text: str) -> int:
    return len(tiny.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("length", [200, 201, 777])
@pytest.mark.parametrize("depth", [0, 11, 50, 99.5, 100])
def test_a_prompt_has_exactly_the_asked_length_and_states_the_key_twice(
    tiny: longllm.LoadedModel, length: int, depth: float
) -> None:
    prompt = passkey_prompt(tiny.tokenizer, Cell(length, depth, "48213"))
    assert len(prompt.ids) == length
    assert prompt.text.count("48213") == 2
    assert prompt.text.startswith(INSTRUCTION)
    assert prompt.text.endswith(QUESTION)
    assert tiny.tokenizer.decode(prompt.ids) == prompt.text


@pytest.mark.parametrize("length", [200, 501])
@pytest.mark.parametrize("depth", [0, 25, 77, 100])
def test_the_key_stands_where_the_protocol_puts_it(tiny: longllm.LoadedModel, length: int, depth: float) -> None:
    sentence = KEY.format(key="48213")
    prompt = passkey_prompt(tiny.tokenizer, Cell(length, depth, "48213"))
    d, p, k = (count(tiny, text) for text in (INSTRUCTION, QUESTION, sentence))
    assert prompt.key_start == d + round((length - p - k - 1 - d) * depth / 100)
    assert tiny.tokenizer.decode(prompt.ids[prompt.key_start : prompt.key_start + k]) == sentence


def test_the_depths_end_at_the_instruction_and_one_token_before_the_question(tiny: longllm.LoadedModel) -> None:
    first, last = (passkey_prompt(tiny.tokenizer, Cell(300, depth, "48213")) for depth in (0, 100))
    assert first.text.startswith(INSTRUCTION + KEY.format(key="48213"))
    end = last.key_start + count(tiny, KEY.format(key="48213"))
    assert 300 - end - count(tiny, QUESTION) == 1


def test_noise_starts_anew_after_the_key(tiny: longllm.LoadedModel) -> None:
    text = passkey_prompt(tiny.tokenizer, Cell(600, 50, "48213")).text
    before, after = text[len(INSTRUCTION) : -len(QUESTION)].split(KEY.format(key="48213"))
    assert (NOISE * 20).startswith(before)
    assert (NOISE * 20).startswith(after)


def test_a_haystack_goes_on_where_the_key_interrupts_it(tiny: longllm.LoadedModel) -> None:
    haystack = " ".join(f"Line {number} of the log." for number in range(200))
    prompt = passkey_prompt(tiny.tokenizer, Cell(500, 30, "48213"), haystack)
    before, after = prompt.text[len(INSTRUCTION) : -len(QUESTION)].split(KEY.format(key="48213"))
    assert len(prompt.ids) == 500
    assert haystack.startswith(before + after)
    assert 0.2 < len(before) / len(before + after) < 0.4


@pytest.mark.parametrize(
    ("cell", "haystack", "reason"),
    [
        (Cell(30, 50, "48213"), None, "at least"),
        (Cell(300, 101, "48213"), None, "depth"),
        (Cell(300, -1, "48213"), None, "depth"),
        (Cell(300, 50, "48213"), "too short", "haystack has"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tiny: longllm.LoadedModel, cell: Cell, haystack: str | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        passkey_prompt(tiny.tokenizer, cell, haystack)


def test_the_smallest_length_that_the_refusal_names_can_be_built(tiny: longllm.LoadedModel) -> None:
    with pytest.raises(ValueError, match="at least") as caught:
        passkey_prompt(tiny.tokenizer, Cell(1, 50, "48213"))
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert len(passkey_prompt(tiny.tokenizer, Cell(least, 50, "48213")).ids) == least
    with pytest.raises(ValueError, match="at least"):
        passkey_prompt(tiny.tokenizer, Cell(least - 1, 50, "48213"))


def test_one_generator_draws_one_key_per_cell() -> None:
    cells = list(passkey_cells([100, 200], [0, 50, 100]))
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in (100, 200) for d in (0, 50, 100)]
    assert len({cell.key for cell in cells}) == 6
    assert all(len(cell.key) == 5 and cell.key.isdigit() and cell.key[0] != "0" for cell in cells)
    assert list(passkey_cells([100, 200], [0, 50, 100])) == cells
    assert list(passkey_cells([100, 200], [0, 50, 100], seed=7)) != cells
    assert len(next(passkey_cells([100], [0], digits=9)).key) == 9
    with pytest.raises(ValueError, match="digits"):
        next(passkey_cells([100], [0], digits=0))


@pytest.mark.parametrize(
    ("answer", "correct", "similarity"),
    [
        ("48213", True, 1.0),
        ("The pass key is 48213, not 11111.", True, 1.0),
        ("11111? No: 48213", False, 0.2),
        ("148213", False, 0.91),
        ("4821", False, 0.89),
        ("I do not know.", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_the_first_run_of_digits_counts(answer: str, correct: bool, similarity: float) -> None:
    pytest.importorskip("rapidfuzz")
    assert passkey_score(answer, "48213") == evals.Score(correct, similarity)


def test_without_the_extra_there_is_no_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    assert passkey_score("48213", "48213") == evals.Score(True, None)
