"""The benchmark commands on the tiny model: files, pictures, shares, and refusals before any model is loaded."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import longscope
from commands.eval_answerer import AnswererChoice, build
from commands.eval_generation import generation
from commands.eval_infinitebench import infinitebench
from commands.eval_longbench import longbench
from commands.eval_mmlu import mmlu
from commands.eval_perplexity import perplexity

TEXT = "The whale is white and the sea is wide. There and back again. "


def told(pieces: Iterator[str | dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return what a command says, and its record."""
    found = list(pieces)
    return "".join(piece for piece in found if isinstance(piece, str)), found[-1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Released-format rows of each benchmark."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = {
        "hotpotqa": [{"input": "Who?", "context": TEXT * n, "answers": ["Ahab"]} for n in (1, 2, 40)],
        "lcc": [{"input": "", "context": "x = 1\n", "answers": ["y = 2"]}],
        "kv_retrieval": [{"context": "{}", "input": "Key?", "answer": "a", "options": []}] * 2,
        "mmlu": [{"query": "q", "subject": "anatomy", "choices": list("abcd"), "answer": n % 4} for n in range(5)],
        "texts": [{"text": TEXT * 3}, {"text": TEXT * 4}],
        "talks": [{"conversations": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a b"}]}] * 2,
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_longbench_writes_scores_table_and_picture(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    options = {"data": str(data), "tasks": "hotpotqa,lcc", "model": str(tiny_folder), "out": str(tmp_path / "out")}
    said, record = told(longbench(**options))
    assert list(record["tasks"]) == ["hotpotqa", "lcc"]
    assert record["n"] == {"hotpotqa": 3, "lcc": 1}
    # 40 sentences do not fit into 512 positions: room is left for the template and 32 tokens of the answer.
    assert record["cut"]["hotpotqa"] == 1
    assert "1 cut" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "longbench-hotpotqa.jsonl").read_text().splitlines()]
    assert rows[0]["run"]["task"] == "longbench-hotpotqa"
    assert rows[3]["facts"]["tokens_seen"] + 32 <= 512
    assert json.loads((tmp_path / "out" / "longbench.json").read_text()) == record
    for ending in ("png", "svg"):
        assert (tmp_path / "out" / f"longbench.{ending}").stat().st_size > 1000
    assert told(longbench(**options))[1] == record


def test_the_last_part_joins_them_all(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    options = {"data": str(data), "tasks": "hotpotqa", "model": str(tiny_folder)}
    whole = told(longbench(**options, out=str(tmp_path / "whole")))[1]
    said, first = told(longbench(**options, out=str(tmp_path / "parts"), part=1, parts=2))
    assert first["missing_parts"] is True
    assert "part 1 of 2 is done" in said
    joined = told(longbench(**options, out=str(tmp_path / "parts"), part=0, parts=2))[1]
    assert {**joined, "out": ""} == {**whole, "out": ""}


def test_infinitebench_mmlu_and_generation_leave_their_records(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model, out = str(tiny_folder), str(tmp_path)
    record = told(infinitebench(data=str(data), tasks="kv_retrieval", model=model, out=out))[1]
    assert record["tasks"] == {"kv_retrieval": record["average"]}
    said, record = told(mmlu(data=str(data / "mmlu.jsonl"), model=model, out=out))
    assert set(record["groups"]) == {"Others", "All"}
    assert record["groups"]["All"] % 20 == 0
    assert "chance is 25" in said
    record = told(generation(str(data / "talks.jsonl"), max_new_tokens=3, model=model, out=out))[1]
    assert record["n"] == 2
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(line["index"], line["target"]) for line in lines] == [(0, "a b"), (1, "a b")]
    for name in ("infinitebench", "mmlu", "generation"):
        assert (tmp_path / f"{name}.svg").is_file()


def test_perplexity_by_windows_and_by_context(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    said, record = told(
        perplexity(
            text=str(data / "texts.jsonl"), begin=0.0, window=40, stride=20, contexts="16,40", last=8, places=2,
            model=str(tiny_folder), out=str(tmp_path),
        )
    )  # fmt: skip
    assert "window 40, stride 20: perplexity" in said
    assert record["windows"]["n"] == 2
    assert list(record["contexts"]["lengths"]) == ["16", "40"]
    assert record["contexts"]["lengths"]["16"]["tokens"] == 2 * 2 * 8
    assert (tmp_path / "perplexity.png").is_file()


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (longbench, {"tasks": "squad"}, "no task 'squad'"),
        (longbench, {"tasks": "qasper"}, "no offline data for 'qasper'"),
        (longbench, {"part": 2, "parts": 2}, "part must be one of 0 to 1"),
        (longbench, {"method": "retrieve"}, "method retrieve searches"),
        (infinitebench, {"endpoint": "http://127.0.0.1:1/v1"}, "endpoint and endpoint_model go together"),
        (mmlu, {"endpoint": "http://127.0.0.1:1/v1", "endpoint_model": "m"}, "MMLU needs a model on this machine"),
        (perplexity, {"window": 0}, "nothing to measure"),
        (perplexity, {"window": 64, "stride": 64}, "stride must lie between 0 and 63"),
        (perplexity, {"max_length": -1}, "max_length must be 0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    command: Callable[..., Any], options: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    text = {"text": str(data / "texts.jsonl")} if command is perplexity else {}
    with pytest.raises(ValueError, match=message):
        list(command(**{**text, "model": str(tmp_path / "no-model"), "out": str(tmp_path), **options}))


def test_a_context_that_the_model_has_not_is_refused(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    options = {"text": str(data / "texts.jsonl"), "begin": 0.0, "window": 1024, "stride": 512, "out": str(tmp_path)}
    with pytest.raises(ValueError, match=r"max_length 1,024 is beyond the 512 positions"):
        list(perplexity(**options, model=str(tiny_folder)))
    stretched = told(perplexity(**options, model=str(tiny_folder), rope="yarn:2"))[1]
    assert stretched["windows"]["n"] == 2
    assert stretched["answerer"].endswith("full, yarn:2")


def test_options_of_the_answerer_stand_beside_those_of_the_task() -> None:
    words = ["--lengths", "4K", "--model", "somewhere", "--method", "tova"]
    _, options = longscope.parse("eval grid", words)
    assert [options[name] for name in ("lengths", "model", "method")] == words[1::2]
    function, options = longscope.parse(
        "eval longbench", ["--tasks", "trec", "--method", "snapkv", "--ratio=8", "--max-length", "4096"]
    )
    assert function is longbench
    chosen = {name: options[name] for name in ("tasks", "method", "ratio", "max_length")}
    assert chosen == {"tasks": "trec", "method": "snapkv", "ratio": 8.0, "max_length": 4096}
    with pytest.raises(ValueError, match="method: expected"):
        longscope.parse("eval longbench", ["--method", "magic"])
    assert AnswererChoice(method="snapkv", slots=128).settings == {"dtype": "auto", "max_length": 0}
    with pytest.raises(ValueError, match="compresses nothing"):
        AnswererChoice(method="full", ratio=8)
    with pytest.raises(ValueError, match="reads as its server does"):
        AnswererChoice(endpoint="http://x/v1", endpoint_model="m", method="snapkv")


@pytest.mark.parametrize("method", ["streaming", "snapkv", "spotlight"])
def test_a_compressed_reader_answers_weighs_and_measures(method: Any, tiny_folder: Path) -> None:
    import longllm
    from longllm.evals.answerers import LocalAnswerer
    from longllm.evals.task import Example

    answerer = build(AnswererChoice(model=str(tiny_folder), dtype="fp32", method=method, ratio=4))
    plain = LocalAnswerer(answerer.loaded)
    example = Example("0", TEXT * 20, (), 8)
    assert answerer.name.endswith(f"{method}, ratio 4")
    ids, _ = answerer.prompt_ids(example)
    prefix = answerer.reader(ids[:-1], len(ids) + 8)
    # The last tokens stand for the question: they are read after what is compressed, all but one as the probe.
    assert len(prefix.ids) == len(ids) - 64
    slots = prefix.cache.slots_of(prefix.cache.full[0])[0]
    assert slots <= len(ids) // 4 + 64 < len(prefix.ids)
    assert answerer.generate(example).tokens_seen == plain.generate(example).tokens_seen
    weighed, expected = (one.option_scores(example, ["A", " the sky"]) for one in (answerer, plain))
    assert all(abs(left - right) > 1e-4 for left, right in zip(weighed, expected, strict=True))
    longer = answerer.loaded.tokenizer(TEXT * 12)["input_ids"]
    compressed, full = answerer.token_losses(longer, 1), plain.token_losses(longer, 1)
    # Within the first chunk nothing is compressed yet.
    assert compressed[:100] == pytest.approx(full[:100], abs=1e-3)
    assert len(compressed) == len(full)
    assert isinstance(prefix, longllm.Prefix)
