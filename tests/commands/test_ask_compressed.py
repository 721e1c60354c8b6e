"""``longscope ask`` with a compressed cache: what is kept, saved, refused, taken up again; and spans instead."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import beacon
import catalog
import longllm
import longscope
from commands import reading
from commands.ask_plan import MethodName, Plan, Wish, decide

SENTENCE = "The captain is Ahab. The whale is white and the sea is wide.\n"
TOKEN = 2 * 2 * 2 * 8 * 4  # layers, keys and values, kv heads, head size, bytes of fp32: the tiny model's per token


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    """A document of some 1,300 tokens, beyond the 512 the tiny model was made for."""
    file = tmp_path / "novel.txt"
    file.write_text("".join(f"Chapter {number}. {SENTENCE}" for number in range(50)))
    return file


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> Any:
    """Run ``ask`` in this process with the tiny model; return its record."""

    def run(*words: str | Path) -> dict[str, Any]:
        options = ["--model", str(tiny_folder), "--dtype", "fp32", "--max_new_tokens", "8", "--json"]
        assert longscope.main(["ask", "who is the captain?", *map(str, words), *options]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_long_document_is_read_whole_into_a_cache_within_the_trained_length(asked: Any, novel: Path) -> None:
    record = asked("--doc", novel)
    assert (record["method"], record["truncated"], record["warning"]) == ("spotlight", False, None)
    assert record["tokens_seen"] > 512 > 128 >= record["ledger"]["layers"][0]["slots"][0]
    assert record["ledger"]["tokens_seen"][0] + 60 > record["tokens_seen"] > record["ledger"]["tokens_seen"][0]
    assert record["kv_bytes"] <= 128 * TOKEN
    assert record["kv_bytes_full"] == record["tokens_seen"] * TOKEN
    assert record["ratio"] == record["kv_bytes_full"] / record["kv_bytes"]
    assert (record["ledger"]["positions"], record["steered"]) == ("compact", True)
    assert len(record["verified"]) == 6


@pytest.mark.parametrize("method", [name for name in get_args(MethodName) if name not in ("auto", "full", "retrieve")])
def test_every_method_keeps_to_a_byte_budget(asked: Any, novel: Path, method: str) -> None:
    record = asked("--doc", novel, "--method", method, "--budget", "64KB")
    held = record["ledger"]
    assert held["nbytes"] + held["index_bytes"] <= 64_000
    assert record["kv_bytes"] <= 64_000 < record["kv_bytes_full"]
    assert record["method"] == method
    assert record["steered"] == beacon.method(method).steerable


def test_the_names_of_the_command_are_those_of_the_methods() -> None:
    assert set(get_args(MethodName)) == {"auto", "retrieve", *beacon.METHODS}


def test_a_question_that_is_not_to_steer_does_not(asked: Any, novel: Path) -> None:
    record = asked("--doc", novel, "--no_question_aware", "--positions", "original")
    assert (record["steered"], record["ledger"]["positions"]) == (False, "original")


def test_a_saved_document_answers_at_once_and_as_before(asked: Any, novel: Path, tmp_path: Path) -> None:
    file = tmp_path / "novel.kv"
    first = asked("--doc", novel, "--save-cache", file)
    again = asked("--cache", file)
    same = ("answer", "tokens_seen", "kv_bytes_full", "document", "document_tokens", "method", "steered")
    assert [first[key] for key in same] == [again[key] for key in same]
    assert again["reading_seconds"] == 0 < first["reading_seconds"]
    kept = file.stat()
    third = asked("--doc", novel, "--save-cache", file)
    assert (third["reading_seconds"], file.stat()) == (0, kept)


def test_an_interrupted_reading_is_refused_as_a_cache_and_goes_on_with_its_document(
    asked: Any, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = asked("--doc", novel)
    file, read = tmp_path / "novel.kv", beacon.read
    monkeypatch.setattr(reading, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(reading.Keep.__init__, "__defaults__", (0.0,))

    def killed(*arguments: Any, after_chunk: Any, **options: Any) -> Any:
        def stop_after(cache: Any) -> None:
            after_chunk(cache)
            if cache.seen[0] > 600:
                raise KeyboardInterrupt

        return read(*arguments, after_chunk=stop_after, **options)

    monkeypatch.setattr(beacon, "read", killed, raising=False)
    assert longscope.main(["ask", "who is the captain?", "--doc", str(novel), "--save-cache", str(file), "--model",
                           whole["model"], "--dtype", "fp32"]) == 130  # fmt: skip
    monkeypatch.setattr(beacon, "read", read)
    capsys.readouterr()
    assert longscope.main(["ask", "who?", "--cache", str(file), "--model", whole["model"], "--dtype", "fp32"]) == 2
    assert "stopped after" in capsys.readouterr().err
    resumed = asked("--doc", novel, "--save-cache", file)
    assert resumed["answer"] == whole["answer"]
    assert resumed["ledger"]["layers"] == whole["ledger"]["layers"]


def test_a_file_of_another_reading_or_model_is_refused_by_name(
    asked: Any, novel: Path, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "novel.kv"
    asked("--doc", novel, "--save-cache", file)
    kept = file.read_bytes()
    options = ["--model", str(tiny_folder), "--dtype", "fp32"]
    assert (
        longscope.main(["ask", "who?", "--doc", str(novel), "--slots", "90", "--save-cache", str(file), *options]) == 2
    )
    assert "spotlight, 128 slots a layer" in capsys.readouterr().err
    other = tmp_path / "other-model"
    loaded = longllm.load(tiny_folder, dtype="fp32")
    with torch.no_grad():
        loaded.model.lm_head.weight.add_(1)
    loaded.model.save_pretrained(other)
    loaded.tokenizer.save_pretrained(other)
    assert longscope.main(["ask", "who?", "--cache", str(file), "--model", str(other), "--dtype", "fp32"]) == 2
    error = capsys.readouterr().err
    assert f"was made by {tiny_folder}" in error
    assert f"not by {other}" in error
    assert file.read_bytes() == kept


def test_retrieval_reads_spans_and_says_that_it_is_no_compression(asked: Any, novel: Path) -> None:
    novel.write_text(novel.read_text() + "\n\nThe cook is called Fleece. " * 4)
    record = asked("--doc", novel, "--method", "retrieve")
    assert (record["method"], record["truncated"], record["ledger"]) == ("retrieve", True, None)
    assert record["kv_bytes"] == record["kv_bytes_full"]
    assert record["tokens_seen"] < 512 < record["document_tokens"]
    text = novel.read_text()
    assert all("captain" in text[begin:end] for begin, end in record["spans"])


def test_what_is_left_open_is_decided_by_lengths() -> None:
    assert decide(Wish(), 512, 512) == decide(Wish(method="full"), 9999, 512)
    long = decide(Wish(), 513, 512)
    assert (long.method, long.limit, long.positions) == ("spotlight", beacon.Budget(slots=128), "compact")
    assert decide(Wish(ratio=4), 100, 512) == Plan("spotlight", beacon.Budget(ratio=4), "original")
    assert decide(Wish(method="tova", positions="compact"), 100, 512).limit == beacon.Budget(ratio=8)
    assert decide(Wish(ratio=1), 100, 512).method == "full"


def test_a_broken_method_is_stopped_before_it_reads(
    novel: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.contract import ValuesMoved

    monkeypatch.setattr(beacon, "CompressedCache", ValuesMoved, raising=False)
    words = ["ask", "who?", "--method", "snapkv", "--doc", str(novel), "--model", str(tiny_folder), "--dtype", "fp32"]
    assert longscope.main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "compression contract broken (a slot is the token it claims to be)" in error


@pytest.mark.real
def test_the_default_finds_a_fact_planted_beyond_the_trained_length(door: Any, tmp_path: Path) -> None:
    text = catalog.read_document("moby-dick").text[:40_000]
    fact = "\n\nThe best thing to do in San Francisco is to eat a sandwich and sit in Dolores Park on a sunny day.\n\n"
    page = tmp_path / "novel.txt"
    page.write_text(text[:8_000] + fact + text[8_000:])
    done = door("ask", "What is the best thing to do in San Francisco?", "--doc", page, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["tokens_seen"] > record["trained_length"] == 8192
    assert (record["method"], record["ledger"]["positions"], len(record["verified"])) == ("spotlight", "compact", 6)
    assert record["kv_bytes"] * 4 < record["kv_bytes_full"]
    assert "Dolores Park" in record["answer"]
