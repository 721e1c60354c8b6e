"""Needle and passkey as tasks: exact lengths, the depth formula, scores computed again by other means, the judge."""

from collections.abc import Sequence
from typing import Any

import pytest

import longllm
from longllm.evals.answerers import LocalAnswerer
from longllm.evals.cells import by_cell, by_length
from longllm.evals.haystack import Haystack
from longllm.evals.interval import wilson
from longllm.evals.judge import ANCHORS, Judge, mark
from longllm.evals.needle import INSTRUCTION, NEEDLE, QUESTION, Needle
from longllm.evals.passkey import Passkey, hide, passkey_cells, passkey_prompt
from longllm.evals.task import Row

HAY = Haystack("log", " ".join(f"Line {number} of the log speaks of the sea." for number in range(100)))
LENGTHS, DEPTHS = (400, 611), (0, 11, 50, 100)


def size(tiny: longllm.LoadedModel, text: str) -> int:
    return len(tiny.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_every_prompt_has_its_length_and_the_needle_its_place(tiny: longllm.LoadedModel) -> None:
    examples = list(Needle(LENGTHS, DEPTHS, HAY).examples(tiny.tokenizer))
    assert [(x.facts["length"], x.facts["depth"]) for x in examples] == [(n, d) for n in LENGTHS for d in DEPTHS]
    sentence, question = f"\n\n{NEEDLE}\n\n", f"\n\n{QUESTION}"
    d, k, p = (size(tiny, text) for text in (INSTRUCTION, sentence, question))
    for example in examples:
        length, depth = example.facts["length"], example.facts["depth"]
        assert len(example.ids) == length
        place = d + round((length - p - k - 1 - d) * depth / 100)
        assert example.facts["needle_start"] == place
        assert tiny.tokenizer.decode(example.ids[place : place + k]) == sentence
        assert tiny.tokenizer.decode(example.ids) == example.prompt
        assert example.prompt.startswith(INSTRUCTION)
        assert example.prompt.endswith(question)
        around = example.prompt[len(INSTRUCTION) : -len(question)].replace(sentence, "")
        assert around in HAY.text * 2
    assert examples[3].ids[-p - 1 - k : -p - 1] == examples[0].ids[d : d + k]


def test_a_prompt_reaches_the_model_with_nothing_cut(tiny: longllm.LoadedModel) -> None:
    *_, example = Needle((700,), (50,), HAY).examples(tiny.tokenizer)
    ids, left_out = LocalAnswerer(tiny).prompt_ids(example)  # trained on 512
    assert left_out == 0
    assert ids == longllm.chat_prompt(tiny.tokenizer, example.ids)


def common_words(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """A longest common subsequence, by its plain recursion."""
    rows: list[list[list[str]]] = [[[] for _ in range(len(right) + 1)] for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            rows[i + 1][j + 1] = [*rows[i][j], a] if a == b else max(rows[i][j + 1], rows[i + 1][j], key=len)
    return rows[-1][-1]


@pytest.mark.parametrize(
    "answer", [NEEDLE, "Sit in Dolores Park on a sunny day", "The best thing to do is to eat.", "whales swim"]
)
def test_rouge_is_the_common_subsequence_counted_again(answer: str, tiny: longllm.LoadedModel) -> None:
    pytest.importorskip("rouge")
    task = Needle((400,), (50,), HAY)
    (example,) = task.examples(tiny.tokenizer)
    ours, theirs = (text.rstrip(".").split(" ") for text in (answer, NEEDLE))
    common = len(set(common_words(ours, theirs)))
    expected = 0.0
    if common:  # the package counts different words alone
        precision, recall = common / len(set(ours)), common / len(set(theirs))
        expected = 2 * precision * recall / (precision + recall)
    assert task.score(example, answer)["rouge_l"] == pytest.approx(expected, abs=1e-3)
    assert task.score(example, "  ") == {"rouge_l": 0.0}


def test_the_judge_sees_everything_and_its_last_mark_counts(tiny: longllm.LoadedModel) -> None:
    pytest.importorskip("rouge")
    heard: list[str] = []

    def ask(messages: Sequence[dict[str, str]]) -> str:
        heard.append(messages[-1]["content"])
        return "First I thought [[3]], but it is all there.\nRating: [[9]]"

    task = Needle((400,), (50,), HAY, judge=Judge(ask))
    (example,) = task.examples(tiny.tokenizer)
    scores = task.score(example, "In the park.")
    assert scores["judge"] == 9
    assert task.main_score == "judge"
    for part in ("In the park.", NEEDLE, QUESTION, *ANCHORS.values()):
        assert part in heard[0]
    assert sorted(ANCHORS) == [1, 3, 5, 7, 10]
    summary = task.summarise([Row("a", "", scores, (), dict(example.facts))])
    assert summary["cells"] == [{"length": 400, "depth": 50, "n": 1, "judge": 9.0}]


@pytest.mark.parametrize("reply", ["ten", "Rating: 10", "[[11]]", "[[0]]", "[[]]", ""])
def test_a_reply_without_a_mark_is_refused(reply: str) -> None:
    with pytest.raises(ValueError, match="no mark from 1 to 10"):
        mark(reply)


@pytest.mark.parametrize("hay", [None, HAY])
def test_passkey_cells_are_the_prompts_of_the_protocol(hay: Haystack | None, tiny: longllm.LoadedModel) -> None:
    task = Passkey(LENGTHS, DEPTHS, hay, seed=9)
    examples = list(task.examples(tiny.tokenizer))
    cells = list(passkey_cells(LENGTHS, DEPTHS, seed=9))
    for example, cell in zip(examples, cells, strict=True):
        prompt = passkey_prompt(tiny.tokenizer, cell, hay.text if hay else None)
        assert (example.ids, example.references, example.prompt) == (prompt.ids, (cell.key,), prompt.text)
        assert len(example.ids) == cell.length
        scores = task.score(example, f"It is {cell.key}")
        assert scores["right"] == 1.0
        assert task.score(example, "0")["right"] == 0.0


def test_tables_hold_the_means(tiny: longllm.LoadedModel) -> None:
    rows = [
        Row(f"{n}", "", {"right": float(n % 3 == 0), "f1": n / 10}, (), {"length": 100 * (n % 2), "depth": n % 4})
        for n in range(8)
    ]
    assert by_length(rows, "f1")["0"] == {"n": 4, "f1": pytest.approx((0 + 2 + 4 + 6) / 40)}
    assert by_length(rows, "right")["100"] == {"n": 4, "right": 1, "accuracy": 0.25, "interval": list(wilson(1, 4))}
    assert by_cell(rows, "f1")[1] == {"length": 0, "depth": 2, "n": 2, "f1": pytest.approx(0.4)}
    summary = Passkey(LENGTHS, DEPTHS).summarise(rows)
    assert summary["right"] == pytest.approx(3 / 8)
    assert len(summary["cells"]) == 4


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: list(Needle((20,), (0,), HAY).examples(t)), "at least"),
        (lambda t: list(Needle((400,), (101,), HAY).examples(t)), "depth"),
        (lambda t: list(Needle((400,), (0,), HAY).examples(None)), "tokeniser"),
        (lambda t: list(Passkey((400,), (0,)).examples(None)), "tokeniser"),
        (lambda t: Needle((400,), (0,), HAY, needle=" "), "must not be empty"),
        (lambda t: hide(10, 50, [1] * 5, [2] * 5, []), "at least 11"),
    ],
)
def test_what_cannot_be_built_is_refused(make: Any, reason: str, tiny: longllm.LoadedModel) -> None:
    with pytest.raises(ValueError, match=reason):
        make(tiny.tokenizer)
