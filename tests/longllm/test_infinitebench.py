"""InfiniteBench: prompts filled in from released rows, every scorer at its edges, rows made offline that are right."""

import re
from typing import Any

import pytest

from longllm.evals import infinite_scorers as scorers
from longllm.evals import infinitebench, offline
from longllm.evals.infinitebench import METRICS, InfiniteBench, fields, kinds, labels, table
from longllm.evals.task import Row

TOKENS = {
    "passkey": 6, "number_string": 12, "kv_retrieval": 50, "longdialogue_qa_eng": 40, "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40, "longbook_qa_eng": 40, "longbook_qa_chn": 40, "math_find": 3, "math_calc": 30000,
    "code_run": 5, "code_debug": 5,
}  # fmt: skip
OPTIONS = ["read", "parse", "cut", "join"]


def prompt(name: str, **changes: Any) -> str:
    row = {"context": "THE BOOK", "input": "Who?", "answer": ["parse"], "options": OPTIONS, **changes}
    return next(iter(InfiniteBench(kinds()[name], [row]).examples(None))).prompt


def test_the_tasks_are_those_of_the_paper() -> None:
    assert {name: kind.new_tokens for name, kind in kinds().items()} == TOKENS
    assert {kind.metric for kind in kinds().values()} == METRICS.keys()
    assert infinitebench.chosen("all") == list(TOKENS)
    with pytest.raises(ValueError, match="no task 'pass'"):
        infinitebench.chosen("pass")


def test_prompts_are_filled_in_from_the_rows() -> None:
    for name in ("longbook_choice_eng", "code_debug"):
        assert "A. read\nB. parse\nC. cut\nD. join" in prompt(name)
    assert prompt("passkey").endswith("Who?\n\nThe pass key is")
    assert "$$MASK$$" in prompt("longdialogue_qa_eng")
    code = prompt("code_run", input="Please give me the return value of func_12(-3).")
    assert code.startswith("There is a function called func_12 in")
    assert code.endswith("The value of func_12(-3) is")
    found = prompt("math_find", input="Answer with one number. The second smallest number of the list is: ")
    assert found.startswith("What is the second smallest number in the following list?\n\nTHE BOOK")
    # Braces of a text are no fields of the prompt.
    assert '{"a": "b"}' in prompt("kv_retrieval", context='{"a": "b"}')


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("code_run", {}, "calls no function"),
        ("math_find", {}, "asks for no number"),
        ("code_debug", {"options": ["one"]}, "has 1 options, four are needed"),
        ("longbook_choice_eng", {"answer": "sail"}, "'sail', which is none of its options"),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt(name, **changes)


def test_labels_are_the_answers_or_option_and_letter() -> None:
    assert labels(kinds()["code_debug"], {"answer": ["cut"], "options": OPTIONS}) == ("cut", "C")
    assert labels(kinds()["longbook_choice_eng"], {"answer": ["cut", "C"], "options": OPTIONS}) == ("cut", "C")
    assert labels(kinds()["math_calc"], {"answer": [8, 5]}) == ("8", "5")
    assert labels(kinds()["code_run"], {"answer": 7}) == ("7",)


@pytest.mark.parametrize(
    ("score", "answer", "label", "expected"),
    [
        (scorers.first_integer, "71432 is it, not 9", ["71432"], 1),
        (scorers.first_integer, "9 then 71432", ["71432"], 0),
        (scorers.first_integer, "none", ["71432"], 0),
        (scorers.word, 'value:"a-b".', ["a-b"], 1),
        (scorers.word, "a-bc", ["a-b"], 0),
        (scorers.name, "it's ahab!", ["AHAB"], 1),
        (scorers.name, "Ahabs", ["AHAB"], 0),
        (scorers.choice, "B. parse", ["parse", "B"], 1),
        (scorers.choice, "Because", ["parse", "B"], 1),  # the rule looks at the first letter, whatever word it begins
        (scorers.choice, "  C", ["parse", "B"], 0),
        (scorers.choice, "It seems the option is B", ["parse", "B"], 1),
        (scorers.choice, "The answer is parse", ["parse", "B"], 1),
        (scorers.choice, "I take (B) over (A)", ["parse", "B"], 1),
        (scorers.choice, "no idea", ["parse", "B"], 0),
        (scorers.choice, "", ["parse", "B"], 0),
        (scorers.faulty_function, "B: parse", ["parse", "B"], 1),
        (scorers.faulty_function, "the answer is: `parse`", ["parse", "B"], 1),
        (scorers.faulty_function, "The correct option is: B", ["parse", "B"], 1),
        (scorers.faulty_function, "parse", ["parse", "B"], 0),
        (scorers.last_integer, "The value is: 12.", ["12"], 1),
        (scorers.last_integer, "12 apples", ["12"], 0),
        (scorers.last_integer, "", ["12"], 0),
        (scorers.first_number, "3.0", ["3"], 1),
        (scorers.first_number, "[17, 3]", ["3"], 0),
        (scorers.leading_values, "8, 5, 7, 3", ["8", "5", "7", "3"], 1),
        (scorers.leading_values, "8 9 7 3", ["8", "5", "7", "3"], 0.25),
        (scorers.leading_values, "", ["8"], 0),
        (scorers.character_f1, "北京市", ["北京"], 0.8),
        (scorers.character_f1, "", ["北京"], 0),
        (scorers.summary, "", ["words"], 0),
        (scorers.summary, "white whale", ["white whale"], 1),
        (scorers.qa_f1_best, "the whale", ["ship", "a whale"], 1),
    ],
)
def test_scorers_follow_the_rules_of_the_benchmark(score: Any, answer: str, label: list[str], expected: float) -> None:
    assert score(answer, label) == pytest.approx(expected, abs=1e-6)


def test_the_average_is_a_plain_mean_with_four_decimals() -> None:
    rows = [Row(str(n), "", {"score": float(n == 0)}, (), {"left_out": n}) for n in range(3)]
    summary = InfiniteBench(kinds()["passkey"], []).summarise(rows)
    assert (summary["score"], summary["cut"]) == (0.3333, 2)
    assert table({"code_run": 0.1, "passkey": 0.30005})["average"] == 0.2


@pytest.mark.parametrize("seed", range(3))
def test_offline_functions_give_what_the_row_says(seed: int) -> None:
    for row in offline.rows(offline.INFINITEBENCH, "code_run", 3, 150, seed):
        space: dict[str, Any] = {}
        exec(row["context"], space)
        call = fields(kinds()["code_run"], row)["call"]
        assert str(eval(call, space)) == row["answer"][0]


def test_offline_rows_have_the_released_format_and_are_always_the_same() -> None:
    for name in ("kv_retrieval", "math_find"):
        made = offline.rows(offline.INFINITEBENCH, name, 2, 80)
        assert made == offline.rows(offline.INFINITEBENCH, name, 2, 80)
        assert made[0] != made[1]
        task = InfiniteBench(kinds()[name], made)
        for example in task.examples(None):
            assert task.score(example, f" {example.references[0]}") == {"score": 1.0}
    keys = re.search(r'Key: "(.+)"', offline.rows(offline.INFINITEBENCH, "kv_retrieval", 1, 80)[0]["input"])
    assert keys is not None
    with pytest.raises(ValueError, match="no offline data for 'longbook_sum_eng'"):
        offline.rows(offline.INFINITEBENCH, "longbook_sum_eng", 1, 80)


def test_passages_are_whole_sentences() -> None:
    text = " ".join(f"Sentence {number} of the speech has exactly nine words here." for number in range(100))
    found = offline.passages(text, "State of the Union 1963, Lyndon Johnson")
    assert all(passage.text.startswith("Sentence") and passage.text.endswith("here.") for passage in found)
    assert (found[0].year, found[0].president) == ("1963", "Lyndon Johnson")
    assert not any("Sentence 0 " in passage.text for passage in found)


@pytest.mark.real
def test_rows_from_real_speeches_are_answered_right_by_their_own_references() -> None:
    from longllm.evals import longbench

    for name in offline.LONGBENCH:
        kind = longbench.kinds()[name]
        task = longbench.LongBench(kind, offline.rows(offline.LONGBENCH, name, 2, 400))
        for example, row in zip(task.examples(None), task.rows, strict=True):
            assert set(row) == {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
            assert task.score(example, row["answers"][0]) == {"score": 1.0}
            assert row["input"] == "" or row["input"][-30:] in example.prompt
    for name in ("passkey", "number_string"):
        made = offline.rows(offline.INFINITEBENCH, name, 1, 300)[0]
        assert made["context"].count(made["answer"][0]) == 2
    rows, worked = offline.definitions(20)
    assert len(worked) == 5
    assert all(row["choices"][row["answer"]] not in row["query"] for row in rows)
