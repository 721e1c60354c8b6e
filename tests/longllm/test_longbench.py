"""LongBench: the published facts of its tasks, cutting to the letter, scores and means, runs that go on and join."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import longllm
from longllm.evals import longbench
from longllm.evals.answerers import LocalAnswerer
from longllm.evals.longbench import LongBench, kinds, table
from longllm.evals.rows import read_rows
from longllm.evals.run import evaluate, joined, rows_of
from longllm.evals.task import Example
from longllm.evals.truncation import shortened

#: task -> tokens of an answer, from the paper's code
TOKENS = {
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "multifieldqa_zh": 64, "hotpotqa": 32, "2wikimqa": 32,
    "musique": 32, "dureader": 128, "gov_report": 512, "qmsum": 512, "multi_news": 512, "vcsum": 512, "trec": 64,
    "triviaqa": 32, "samsum": 128, "lsht": 64, "passage_count": 32, "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32, "lcc": 64, "repobench-p": 64,
}  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    return {
        "input": "Who is it?",
        "context": "The captain is Ahab.",
        "answers": ["Ahab"],
        "all_classes": None,
        **changes,
    }


def task(name: str, *rows: dict[str, Any], max_length: int = 0) -> LongBench:
    return LongBench(kinds()[name], rows or (row(),), max_length)


def test_the_tasks_are_those_of_the_paper() -> None:
    found = kinds()
    assert {name: kind.new_tokens for name, kind in found.items()} == TOKENS
    plain = {name for name, kind in found.items() if not kind.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, kind in found.items() if kind.newline_stop} == {
        "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "samsum",
    }  # fmt: skip
    assert {name for name, kind in found.items() if kind.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    english = {name for name, kind in found.items() if kind.language == "en"}
    assert set(longbench.chosen("published")) == english
    assert set(longbench.chosen("default")) == {name for name in english if found[name].category != "Synthetic"}
    for kind in found.values():
        assert "{context}" in kind.prompt, kind.name
        assert "{{" not in kind.prompt, kind.name
    # Twice in the prompt: before the text and after it.
    for name in ("narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique"):
        before, _, after = found[name].prompt.partition("{context}")
        shared = "nswer the question"
        assert shared in before, name
        assert shared in after, name
    # lm-eval strips these ends; the project has them.
    assert found["passage_count"].prompt.endswith("answer is: ")
    assert found["lcc"].prompt.endswith("line of code:\n")
    with pytest.raises(ValueError, match=r"no task 'squad'.*narrativeqa"):
        longbench.chosen("squad")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("The whale is white.\n Größe 海", min_size=1, max_size=120), most=st.integers(2, 60))
def test_a_prompt_keeps_its_first_and_last_half(text: str, most: int, tiny: longllm.LoadedModel) -> None:
    ids = tiny.tokenizer(text)["input_ids"]
    got, left_out = shortened(tiny.tokenizer, text, most)
    if len(ids) <= most:
        assert (got, left_out) == (text, 0)
        return
    half = most // 2
    assert got == tiny.tokenizer.decode(ids[:half]) + tiny.tokenizer.decode(ids[-half:])
    assert left_out == len(ids) - 2 * half
    assert shortened(tiny.tokenizer, text, most, "left")[0] == tiny.tokenizer.decode(ids[-most:])


def test_a_begin_of_text_token_takes_a_place_of_the_first_half(tiny: longllm.LoadedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tiny.tokenizer)
    own.bos_token = "<|im_start|>"
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", own.bos_token_id)]
    )
    text = "The whale is white and the sea is wide. " * 5
    ids = own(text)["input_ids"]
    assert ids[0] == own.bos_token_id
    wanted = own.decode(ids[:10], skip_special_tokens=True) + own.decode(ids[-10:])
    assert shortened(own, text, 20)[0] == wanted


def test_prompts_are_cut_before_they_are_wrapped(tiny: longllm.LoadedModel) -> None:
    long = row(context="The sky is blue. " * 200)
    chat = next(iter(task("hotpotqa", long, max_length=100).examples(tiny.tokenizer)))
    ids, left_out = LocalAnswerer(tiny).prompt_ids(chat)
    assert ids == longllm.chat_prompt(tiny.tokenizer, chat.prompt)
    assert left_out == 0
    assert chat.facts["left_out"] > 0
    assert chat.prompt.endswith("Answer:")
    plain = next(iter(task("lcc", long, max_length=100).examples(tiny.tokenizer)))
    assert LocalAnswerer(tiny).prompt_ids(plain)[0] == tiny.tokenizer(plain.prompt)["input_ids"]
    whole = next(iter(task("lcc", long, max_length=100).examples(None)))
    assert "The sky is blue. " * 200 in whole.prompt
    assert whole.truncate == "middle"


def test_the_best_reference_and_only_the_first_line_count() -> None:
    qa, trivia = task("hotpotqa"), task("triviaqa")
    example = Example("0", "", ("a ship", "the white whale"), 1)
    assert qa.score(example, "white whale") == {"score": 1.0}
    assert trivia.score(example, "\n\nwhite whale\nPassage: more") == {"score": 1.0}
    assert qa.score(example, "white whale\nmore words")["score"] < 1
    rows = [row(all_classes=["City", "Date"], answers=["Date"]), row(all_classes=["City"], answers=["City"])]
    trec = task("trec", *rows)
    first, second = trec.examples(None)
    # The classes of each row are its own: the reference takes the first row's for all.
    assert trec.score(first, "City or Date") == {"score": 0.5}
    assert trec.score(second, "City or Date") == {"score": 1.0}


def test_the_published_average_is_the_mean_of_sixteen_tasks() -> None:
    published = {
        "Single-Doc QA": 43.57, "Multi-Doc QA": 43.07, "Summarization": 28.93, "Few-shot": 69.15, "Synthetic": 48.50,
        "Code": 51.95,
    }  # fmt: skip
    scores = {name: published[kinds()[name].category] for name in longbench.chosen("published")}
    found = table(scores)
    assert found["categories"] == published
    assert found["published_average"] == found["average"] == 47.19
    assert table({"qasper": 1.0})["published_average"] is None


@pytest.fixture
def captains() -> LongBench:
    """Five questions that the tiny model babbles about."""
    return task("hotpotqa", *(row(context=f"Ship {number}. The captain is Ahab. " * 3) for number in range(5)))


def test_a_run_goes_on_joins_its_parts_and_touches_no_settings(
    captains: LongBench, tiny: longllm.LoadedModel, tmp_path: Path
) -> None:
    before = copy.deepcopy(tiny.model.generation_config.to_dict())
    answerer = LocalAnswerer(tiny)
    whole = evaluate(captains, answerer, tmp_path / "whole")
    for part in (1, 0, 2):
        evaluate(captains, answerer, tmp_path / "parts", part=part, parts=3)
    together = joined(captains, tmp_path / "parts", 3)
    assert {key: together[key] for key in ("n", "score", "cut")} == {key: whole[key] for key in ("n", "score", "cut")}
    left, right = (rows_of(captains.name, tmp_path / name, parts)[1] for name, parts in (("whole", 1), ("parts", 3)))
    assert [(one.name, one.answer, one.scores) for one in left] == [(one.name, one.answer, one.scores) for one in right]
    assert tiny.model.generation_config.to_dict() == before
    assert all("\n" not in one.answer for one in left)
    # Half of the lines lost: only those are asked again, and the summary is the same.
    file = tmp_path / "whole" / "longbench-hotpotqa.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    again = evaluate(captains, answerer, tmp_path / "whole")
    assert again == whole


def test_parts_of_different_runs_are_not_joined(captains: LongBench, tiny: longllm.LoadedModel, tmp_path: Path) -> None:
    for part, seed in ((0, 1), (1, 2)):
        evaluate(captains, LocalAnswerer(tiny), tmp_path, settings={"seed": seed}, part=part, parts=2, limit=1)
    with pytest.raises(ValueError, match=r"another seed \(2\) than part 0 \(1\)"):
        joined(captains, tmp_path, 2)


def test_rows_are_read_from_every_format_and_refused_by_place(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [{"question": "Who?\u2028Where?", "context": "c", "answers": ["Ahab"]}]
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in rows)
    (tmp_path / "trec.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(Table.from_pylist(rows), tmp_path / "qasper.parquet")
    for source, name in ((tmp_path, "trec"), (tmp_path / "list.json", ""), (tmp_path, "qasper")):
        assert read_rows(source, name, longbench.NEEDS) == rows
    assert next(iter(task("trec", rows[0]).examples(None))).prompt.endswith("Who?\u2028Where?")
    with pytest.raises(FileNotFoundError, match=r"holds no samsum.jsonl, .json or .parquet"):
        read_rows(tmp_path, "samsum")
    (tmp_path / "bad.jsonl").write_text(lines + "\n{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2 is no JSON"):
        read_rows(tmp_path / "bad.jsonl")
    (tmp_path / "short.jsonl").write_text('{"context": "c", "answers": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="row 1: the field input or question is missing"):
        read_rows(tmp_path / "short.jsonl", needs=longbench.NEEDS)
