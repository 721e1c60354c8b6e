"""From a corpus over a real server to training rows; every request is accounted for."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import longllm
from longllm import batch
from longllm.conversations import row_fault
from longllm.endpoint import Endpoint
from longllm.serve import ModelServer
from longllm.synthesis import Assembly, Recipe, assemble, conversation, prepare, read_corpus, regroup, token_counter
from training import read_rows

SERVER = runpy.run_path(str(Path(__file__).with_name("chat_server.py")))
ChatServer, refusal = SERVER["ChatServer"], SERVER["refusal"]
PARAGRAPHS = [f"Paragraph {n} tells that captain number {n} sails to port {n} with {n} men." for n in range(12)]


def words(text: str) -> int:
    return len(text.split())


def context_of(body: dict[str, Any]) -> str:
    """What stands between the two rules of a prompt."""
    message = body["messages"][0]["content"]
    rule = message.partition("\n")[0]
    return message.split(rule)[1][1:-1]


def books(folder: Path, *texts: str) -> Path:
    file = folder / "books.jsonl"
    file.write_text("".join(json.dumps({"name": f"book {n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return file


def pairs(*items: tuple[str, str], keys: tuple[str, str] = ("question", "answer")) -> str:
    return json.dumps({"items": [dict(zip(keys, item, strict=True)) for item in items]})


def sent(folder: Path, reply: Any) -> Any:
    """Send the requests of a folder; return the server with what it was asked."""
    with ChatServer(reply) as server, Endpoint(server.url, "m") as endpoint:
        batch.run(endpoint, folder / "requests.jsonl", folder / "results.jsonl")
    return server


def rows(file: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(file, row_fault)]


def accounted(report: dict[str, Any]) -> bool:
    return report["used"] + sum(report["dropped"].values()) == report["requests"]


def test_chunks_are_asked_about_one_by_one_and_put_together_again(tmp_path: Path) -> None:
    text = "\n\n".join(PARAGRAPHS)
    made = prepare(books(tmp_path, text), tmp_path / "one", Recipe("single", chunk=30), words)
    assert made["requests"] == 6

    def reply(body: dict[str, Any], before: int) -> str:
        first = context_of(body).split()[1]
        return f"Here you are:\n```json\n{pairs((f'Who sails to port {first}?', f'captain number {first}'))}\n```"

    server = sent(tmp_path / "one", reply)
    asked = {context_of(body) for body in server.bodies}
    assert all(body["temperature"] == 0 and body["max_tokens"] == 4096 for body in server.bodies)
    assert "response_format" in server.bodies[0]
    report = assemble(tmp_path / "one", words, Assembly(target=60, shuffle=False))
    assert (report["rows"], report["pairs"], report["used"], report["dropped"]) == (3, 6, 6, {})
    found = rows(tmp_path / "one" / "train.jsonl")
    contexts = [row["conversations"][0]["content"].rpartition("\n\n")[0] for row in found]
    assert "".join(contexts) == text
    assert all(any(chunk in context for context in contexts) for chunk in asked)
    assert [turn["content"] for turn in found[0]["conversations"][1:]] == [
        "captain number 0", "Who sails to port 2?", "captain number 2"
    ]  # fmt: skip
    # The same answers at another length: no request is needed.
    whole = assemble(tmp_path / "one", words, Assembly(target=10_000), out=tmp_path / "whole.jsonl")
    assert (whole["rows"], whole["pairs"]) == (1, 6)
    assert rows(tmp_path / "whole.jsonl")[0]["conversations"][0]["content"].startswith(text)


def test_whatever_goes_wrong_is_reported_under_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    prepare(books(tmp_path, "\n\n".join(PARAGRAPHS)), folder, Recipe("single", chunk=15), words)
    replies = [
        pairs(("Who?", "he"), ("Where?", "port")),
        "I cannot help with that.",
        refusal(422, "refused", param="messages"),
        "",
        "{'items': [{'question': 'Why?', 'answer': 'because'}, {'question': 'Wh",
        pairs(("Only a question?", "")),
    ]

    def reply(body: dict[str, Any], before: int) -> Any:
        place = int(context_of(body).split()[1])
        return replies[place] if place < len(replies) else pairs((f"{place}?", "x"))

    sent(folder, reply)
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"single-0-11"' not in line]
    (folder / "results.jsonl").write_text("".join(kept) + json.dumps({"custom_id": "stranger", "errors": ["x"]}) + "\n")
    report = assemble(folder, words, Assembly(target=15, most=40))
    assert report["dropped"] == {
        "no JSON": 1, "request failed": 1, "empty": 1, "no usable pair": 1, "not answered": 1
    }  # fmt: skip
    assert report["pairs_dropped"] == {"cut off": 1, "no answer": 1}
    assert (report["used"], report["rows"], report["pairs"], report["unknown_results"]) == (7, 7, 8, 1)
    assert accounted(report)
    dropped = {row["custom_id"]: row for row in map(json.loads, (folder / "dropped.jsonl").read_text().splitlines())}
    assert dropped["single-0-1"] == {
        "custom_id": "single-0-1", "reason": "no JSON", "answer": "I cannot help with that."
    }  # fmt: skip
    assert dropped["single-0-2"]["answer"] == "422 refused"
    assert json.loads((folder / "report.json").read_text()) == report
    # Conversations beyond a length are dropped with all their requests.
    report = assemble(folder, words, Assembly(target=15, most=16))
    assert report["dropped"]["conversation too long"] == 1
    assert accounted(report)
    report = assemble(folder, words, Assembly(least=10_000))
    assert (report["rows"], report["used"]) == (0, 0)
    assert accounted(report)


def test_a_later_answer_replaces_a_failure_and_a_later_failure_no_answer(tmp_path: Path) -> None:
    prepare(books(tmp_path, "One.\n\nTwo."), tmp_path / "one", Recipe("single", chunk=1), words)
    good = {"response": {"choices": [{"message": {"content": pairs(("q?", "a"))}}]}}
    lines = [
        {"custom_id": "single-0-0", "errors": ["oops"]}, {"custom_id": "single-0-0", **good},
        {"custom_id": "single-0-1", **good}, {"custom_id": "single-0-1", "errors": ["oops"]},
    ]  # fmt: skip
    (tmp_path / "one" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert assemble(tmp_path / "one", words)["used"] == 2


def test_several_texts_side_by_side_and_biographies(tmp_path: Path) -> None:
    sea = [f"The whale ship {n} sails the sea with its captain and harpoons." for n in range(3)]
    law = [f"The congress passes tax law {n} and the treasury of the senate pays." for n in range(3)]
    source = books(tmp_path, *sea, *law)
    made = prepare(source, tmp_path / "side", Recipe("cluster", context=40), words)
    server = sent(tmp_path / "side", lambda body, before: pairs(("What do both tell?", "much")))
    assert made["requests"] == len(server.bodies) >= 2
    report = assemble(tmp_path / "side", words)
    for row in rows(tmp_path / "side" / "train.jsonl"):
        assert len(row["source"]) >= 2
        assert row["conversations"][0]["content"].startswith(f"Text 1: {row['source'][0]}\n\nThe ")
    assert report["used"] == made["requests"]

    prepare(source, tmp_path / "bio", Recipe("biography", take=2, service=True, model="m"), words)
    keys = ("character", "summary")
    sent(tmp_path / "bio", lambda body, before: pairs(("Ahab", "A captain."), ("Ishmael", "He tells."), keys=keys))
    report = assemble(tmp_path / "bio", words, Assembly(turns=1))
    assert (report["rows"], report["pairs"], report["pairs_dropped"]) == (2, 2, {"enough questions": 2})
    for row in rows(tmp_path / "bio" / "train.jsonl"):
        question, answer = (turn["content"] for turn in row["conversations"])
        assert ("Ahab" in question) == (answer == "A captain.")


def test_stages_share_no_text_even_when_abstracts_were_moved(tmp_path: Path) -> None:
    source = books(tmp_path, *(f"Body {n}. Abstract: short {n}" for n in range(6)))
    first, second = tmp_path / "a", tmp_path / "b"
    prepare(source, first, Recipe("paper", take=4, abstract=True), words)
    texts = [json.loads(line) for line in (first / "documents.jsonl").read_text().splitlines()]
    assert all(text["text"].startswith("Abstract: short ") for text in texts)
    report = prepare(source, second, Recipe("multi"), words, exclude=[first])
    assert (report["documents"], report["left_out"]) == (2, {"used by another stage": 4})


def test_a_stage_is_made_once_and_not_mixed_with_another(tmp_path: Path) -> None:
    source = books(tmp_path, *PARAGRAPHS)
    report = prepare(source, tmp_path / "one", Recipe("multi"), words)
    before = (tmp_path / "one" / "requests.jsonl").stat()
    assert prepare(source, tmp_path / "one", Recipe("multi"), words) == report
    assert (tmp_path / "one" / "requests.jsonl").stat() == before
    with pytest.raises(ValueError, match="holds the requests of another recipe"):
        prepare(source, tmp_path / "one", Recipe("multi", seed=1), words)
    with pytest.raises(FileNotFoundError, match="longscope synth run writes them"):
        assemble(tmp_path / "one", words)
    with pytest.raises(FileNotFoundError, match="longscope synth requests writes it"):
        prepare(source, tmp_path / "two", Recipe("multi"), words, exclude=[tmp_path / "nothing"])
    with pytest.raises(ValueError, match="no two of the 12 texts fit into a context of 5 tokens"):
        prepare(source, tmp_path / "two", Recipe("cluster", context=5), words)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"family": "haiku"}, "family must be one of single, multi"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"take": -1}, "take must be at least 0, got -1"),
        ({"family": "paper", "questions": 3}, "papers are asked 6 set questions, got questions=3"),
    ],
)
def test_recipes_without_meaning_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Recipe(**values)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 40))
def test_runs_of_chunks_are_all_chunks_in_order_and_as_long_as_fits(lengths: list[int], target: int) -> None:
    runs = list(regroup(lengths, target))
    assert [number for run in runs for number in run] == list(range(len(lengths)))
    for run, after in zip(runs, [*runs[1:], None], strict=False):
        total = sum(lengths[number] for number in run)
        assert total <= target or len(run) == 1
        assert after is None or total + lengths[after[0]] > target


def test_the_questions_are_mixed_but_always_the_same_way(tmp_path: Path) -> None:
    prepare(books(tmp_path, "One text."), tmp_path / "one", Recipe("multi"), words)
    asked = [(f"question {n}?", str(n)) for n in range(8)]
    sent(tmp_path / "one", lambda body, before: pairs(*asked))

    def answers(seed: int) -> list[str]:
        assemble(tmp_path / "one", words, Assembly(seed=seed))
        (row,) = rows(tmp_path / "one" / "train.jsonl")
        return [turn["content"] for turn in row["conversations"] if turn["role"] == "assistant"]

    assert answers(1) == answers(1) != answers(2)
    assert sorted(answers(1)) == [answer for _, answer in asked]
    assert conversation("c", asked)[0]["content"] == "c\n\nquestion 0?"


@pytest.mark.real
def test_a_real_small_model_is_asked_about_two_chunks(tmp_path: Path) -> None:
    loaded = longllm.load("smollm2-135m-instruct")
    tokenizer = token_counter("smollm2-135m-instruct")
    text = next(read_corpus("sotu/1963")).text[:1600]
    recipe = Recipe("single", chunk=200, questions=2, max_answer=80)
    made = prepare(books(tmp_path, text), tmp_path / "one", recipe, tokenizer)
    with ModelServer(loaded) as server, Endpoint(server.url, "smollm2") as endpoint:
        done = batch.run(endpoint, tmp_path / "one" / "requests.jsonl", tmp_path / "one" / "results.jsonl")
    assert (done["answered"], done["failed"]) == (made["requests"], 0)
    # Its first try is refused the response format, which this server cannot hold a model to.
    assert made["requests"] < endpoint.usage.attempts <= 2 * made["requests"]
    report = assemble(tmp_path / "one", tokenizer)
    assert accounted(report)
    assert report["requests"] == made["requests"] >= 2
    assert len(rows(tmp_path / "one" / "train.jsonl")) == report["rows"]
