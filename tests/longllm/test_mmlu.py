"""MMLU: one reading of a question weighs the four letters as four readings would; rows, groups and means."""

from collections import Counter
from typing import Any

import pytest
import torch

import longllm
from longllm.evals.answerers import LocalAnswerer
from longllm.evals.mmlu import LETTERS, OTHER, Mmlu, groups, sample
from longllm.evals.task import Row


def row(number: int, subject: str = "astronomy", answer: int = 1, **changes: Any) -> dict[str, Any]:
    choices = ["the whale", "the sea", "the ship", f"number {number}"]
    return {"query_id": number, "query": f"What is {number}?", "subject": subject, "choices": choices, "answer": answer,
            **changes}  # fmt: skip


def test_the_subjects_are_sorted_as_usual() -> None:
    sizes = {"STEM": 18, "Social Sciences": 12, "Humanities": 13, "Others": 14}
    assert Counter(groups().values()) == sizes
    assert groups()["professional_law"] == "Humanities"


@pytest.mark.parametrize("chat", [True, False])
def test_one_reading_gives_what_four_readings_give(chat: bool, tiny: longllm.LoadedModel) -> None:
    task = Mmlu([row(number) for number in range(3)], chat=chat)
    answerer = LocalAnswerer(tiny)
    read: list[int] = []
    hook = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for example in task.examples(tiny.tokenizer):
            read.clear()
            answer, scores = task.measure(answerer, example)
            ids, _ = answerer.prompt_ids(example)
            once = sum(read)
            expected = []
            for letter in LETTERS:
                own = tiny.tokenizer(letter if chat else f" {letter}", add_special_tokens=False)["input_ids"]
                whole = torch.tensor([[*ids, *own]])
                labels = torch.full_like(whole, -100)
                labels[0, len(ids) :] = whole[0, len(ids) :]
                with torch.no_grad():
                    expected.append(-float(tiny.model(input_ids=whole, labels=labels).loss) * len(own))
            # The tiny tokeniser may need two tokens for a space and a letter; the prompt is never read again.
            extra = sum(
                len(tiny.tokenizer(letter if chat else f" {letter}", add_special_tokens=False)["input_ids"]) - 1
                for letter in LETTERS
            )
            assert once == len(ids) + extra
            assert answer.facts["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
            best = LETTERS[expected.index(max(expected))]
            assert (answer.text, scores) == (best, {"accuracy": float(best == "B")})
    finally:
        hook.remove()


def test_worked_examples_are_of_the_same_subject() -> None:
    dev = [row(0, "astronomy"), row(1, "virology"), row(2, "astronomy", 3), row(3, "astronomy")]
    task = Mmlu([row(0, "astronomy")], dev, few_shot=2)
    prompt = next(iter(task.examples(None))).prompt
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about astronomy.\n\nWhat is 0?"
    )
    assert prompt.count("Answer: B") == 1
    assert prompt.count("Answer: D\n\n") == 1
    assert "What is 1?" not in prompt
    assert prompt.endswith("D. number 0\nAnswer:")
    with pytest.raises(ValueError, match="astronomy has 3 dev rows, few_shot asks for 5"):
        Mmlu([row(0)], dev, few_shot=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_id": 7}, "row 0 has the query_id 7"),
        ({"choices": ["one"]}, "needs four choices"),
        ({"answer": 4}, "an answer from 0 to 3, got 4"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mmlu([row(0, **changes)])


def test_means_are_over_subjects_not_over_questions() -> None:
    right = [("astronomy", 1.0)] * 3 + [("astronomy", 0.0), ("virology", 0.0), ("anatomy", 1.0), ("whales", 1.0)]
    rows = [Row(str(n), "", {"accuracy": value}, (), {"subject": name}) for n, (name, value) in enumerate(right)]
    summary = Mmlu([]).summarise(rows)
    assert summary["groups"] == {"STEM": 75.0, "Others": 50.0, OTHER: 100.0, "All": 68.75}
    assert [one["query_id"] for one in sample([row(number) for number in range(30)], 4)] == [0, 1, 2, 3]
