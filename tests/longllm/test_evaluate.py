"""Running a task over an answerer: the same rows whatever interrupts it, and answers that are the model's own."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import longllm
from longllm.evals.answerers import LocalAnswerer
from longllm.evals.run import evaluate, joined
from longllm.evals.task import Answer, Example, Row, mean_scores


class Copying:
    """A task that asks for each of some words."""

    name = "copying"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        for number, word in enumerate(self.words):
            yield Example(f"{number}", f"Say {word}. " * 5, (word,), max_new_tokens=4, facts={"size": len(word)})

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"right": float(example.references[0] in answer)}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        return mean_scores(rows)


class Speaker:
    """Answers with the first word asked for; after ``lasts`` answers it fails."""

    name, tokenizer = "speaker", None

    def __init__(self, lasts: int = 1000) -> None:
        self.asked: list[str] = []
        self.lasts = lasts

    def generate(self, example: Example) -> Answer:
        if len(self.asked) == self.lasts:
            raise KeyboardInterrupt
        self.asked.append(example.name)
        return Answer(example.prompt.split()[1] if len(self.asked) % 2 else "nothing", tokens_seen=7)


WORDS = ("sea", "whale", "ship", "captain", "sail")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_and_summary_say_what_happened(tmp_path: Path) -> None:
    summary = evaluate(Copying(WORDS), Speaker(), tmp_path, settings={"seed": 3})
    begun, *rows = lines(tmp_path / "copying.jsonl")
    assert begun == {"run": {"task": "copying", "answerer": "speaker", "part": 0, "parts": 1, "seed": 3}}
    assert [row["name"] for row in rows] == list("01234")
    assert rows[0]["facts"] == {"size": 3, "tokens_seen": 7, "tokens_cut": 0, "seconds": 0.0}
    assert (summary["n"], summary["right"], summary["seed"]) == (5, 3 / 5, 3)
    assert json.loads((tmp_path / "copying.json").read_text()) == summary


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on_with_what_is_missing(torn: bool, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(Copying(WORDS), Speaker(lasts=3), tmp_path)
    file = tmp_path / "copying.jsonl"
    if torn:  # killed while a line was being written
        file.write_text(file.read_text() + '{"name": "3", "ans', encoding="utf-8")
    second = Speaker()
    summary = evaluate(Copying(WORDS), second, tmp_path)
    assert (second.asked, summary["n"]) == (["3", "4"], 5)
    assert [row["name"] for row in lines(file)[1:]] == list("01234")
    third = Speaker()
    assert evaluate(Copying(WORDS), third, tmp_path) == summary
    assert third.asked == []


def test_a_file_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    evaluate(Copying(WORDS), Speaker(), tmp_path, settings={"max_length": 4096})
    before = (tmp_path / "copying.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another max_length \(4096, now 8192\).*choose another --out"):
        evaluate(Copying(WORDS), Speaker(), tmp_path, settings={"max_length": 8192})
    assert (tmp_path / "copying.jsonl").read_bytes() == before
    (tmp_path / "copying.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="no results file"):
        evaluate(Copying(WORDS), Speaker(), tmp_path)


def test_parts_together_are_the_whole(tmp_path: Path) -> None:
    for part in (1, 0):
        evaluate(Copying(WORDS), Speaker(), tmp_path / "parts", part=part, parts=2)
    together = joined(Copying(WORDS), tmp_path / "parts", 2)
    assert (together["n"], together["task"]) == (5, "copying")
    names = [row["name"] for part in (0, 1) for row in lines(tmp_path / "parts" / f"copying.{part}-of-2.jsonl")[1:]]
    assert sorted(names) == list("01234")
    with pytest.raises(FileNotFoundError, match="part 0 of 3"):
        joined(Copying(WORDS), tmp_path / "parts", 3)
    with pytest.raises(ValueError, match="part must be one of"):
        evaluate(Copying(WORDS), Speaker(), tmp_path, part=2, parts=2)
    assert evaluate(Copying(WORDS), Speaker(), tmp_path / "few", limit=2)["n"] == 2


def test_a_local_model_answers_as_it_streams(tiny: longllm.LoadedModel) -> None:
    example = Example("0", "The sky is blue. " * 4, (), max_new_tokens=8)
    answer = LocalAnswerer(tiny).generate(example)
    ids = longllm.chat_prompt(tiny.tokenizer, example.prompt)
    assert answer.text == longllm.stream(tiny, ids, longllm.Decoding(8)).result.text
    assert (answer.tokens_seen, answer.tokens_cut) == (len(ids), 0)
    read: list[tuple[int, int]] = []

    def reader(part: Sequence[int], expected: int) -> longllm.Prefix:
        read.append((len(part), expected))
        return longllm.prefill(tiny, part)

    assert LocalAnswerer(tiny, reader=reader, label="read before").generate(example).text == answer.text
    assert read == [(len(ids) - 1, len(ids) + 8)]


def test_prompts_that_are_too_long_lose_their_middle_and_say_so(tiny: longllm.LoadedModel) -> None:
    example = Example("0", "one two three four five six seven eight nine ten", (), 1, chat=False)
    whole, none = LocalAnswerer(tiny, max_length=500).prompt_ids(example)
    kept, left_out = LocalAnswerer(tiny, max_length=9).prompt_ids(example)
    assert (none, left_out, len(kept)) == (0, len(whole) - 9, 9)
    assert kept == whole[:4] + whole[-5:]
    framed, _ = LocalAnswerer(tiny, max_length=60).prompt_ids(
        dataclasses.replace(example, chat=True, prompt="a " * 200)
    )
    assert len(framed) == 60
    assert longllm.chat_prompt(tiny.tokenizer, "")[-3:] == framed[-3:]
    strict = dataclasses.replace(example, truncate="error")
    with pytest.raises(ValueError, match="9 are allowed"):
        LocalAnswerer(tiny, max_length=9).prompt_ids(strict)
    exact = dataclasses.replace(example, ids=(5, 6, 7))
    assert LocalAnswerer(tiny).prompt_ids(exact) == ([5, 6, 7], 0)


def test_an_answer_can_end_with_its_line(tiny: longllm.LoadedModel) -> None:
    example = Example("0", "The pass key is", (), max_new_tokens=40)
    whole = LocalAnswerer(tiny).generate(example).text
    first = LocalAnswerer(tiny).generate(dataclasses.replace(example, stop_at_newline=True)).text
    assert first == whole.partition("\n")[0]


def test_options_are_weighed_by_one_reading_of_the_prompt(tiny: longllm.LoadedModel) -> None:
    example, options = Example("0", "Which one?", (), 1), [" A", " the sky", "B"]
    answerer = LocalAnswerer(tiny)
    ids, _ = answerer.prompt_ids(example)
    for option, score in zip(options, answerer.option_scores(example, options), strict=True):
        own = tiny.tokenizer(option, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rows = tiny.model(torch.tensor([[*ids, *own]])).logits[0].log_softmax(-1)
        expected = sum(float(rows[len(ids) - 1 + at, token]) for at, token in enumerate(own))
        assert score == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="has no tokens"):
        answerer.option_scores(example, [""])


@pytest.mark.parametrize("first", [1, 5, 599])
def test_losses_of_a_text_are_those_of_one_dense_pass(first: int, tiny: longllm.LoadedModel) -> None:
    ids = torch.randint(5, 200, (600,)).tolist()
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="none")
    got = LocalAnswerer(tiny).token_losses(ids, first)
    torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="first must lie between 1 and 599"):
        LocalAnswerer(tiny).token_losses(ids, 600)
