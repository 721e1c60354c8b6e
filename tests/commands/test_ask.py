"""``longscope ask``: right and wrong command lines, and a record whose figures follow from the model's shape."""

import json
from pathlib import Path
from typing import Any

import pytest

import longscope
from commands.ask import ask

TEXT = "The captain is Ahab. The whale is white and the sea is wide.\n"
SHAPE = 2 * 2 * 2 * 8 * 4  # layers, keys and values, kv heads, head size, bytes of fp32: the tiny model's per token
RECORD = {"answer", "tokens_seen", "kv_bytes", "kv_bytes_full", "method", "ratio", "seconds"}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A small document."""
    file = tmp_path / "whale.txt"
    file.write_text(TEXT)
    return file


def options(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--dtype", "fp32", "--max_new_tokens", "12"]


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Run a command line in this process; return stdout and stderr."""
    assert longscope.main(words) == 0
    out, error = capsys.readouterr()
    return out, error


def test_json_is_one_line_with_the_promised_figures(door: Any, text_file: Path, tiny_folder: Path) -> None:
    done = door("ask", "--doc", text_file, "who is the captain?", *options(tiny_folder), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    record = json.loads(done.stdout)
    assert record.keys() >= RECORD
    assert (record["method"], record["ratio"], record["truncated"]) == ("full", 1.0, False)
    assert record["kv_bytes"] == record["kv_bytes_full"] == record["tokens_seen"] * SHAPE
    assert record["document_tokens"] < record["tokens_seen"] < record["trained_length"]
    assert (record["tokens_beyond_training"], record["warning"]) == (0, None)
    assert (record["model"], record["document"]) == (str(tiny_folder), str(text_file))
    assert 0 < record["time_to_first_token"] <= record["seconds"]


def test_both_orders_of_options_and_question_give_the_same_answer(
    capsys: pytest.CaptureFixture[str], text_file: Path, tiny_folder: Path
) -> None:
    given = ["--doc", str(text_file), *options(tiny_folder)]
    first, _ = answered(capsys, "ask", *given, "who is the captain?")
    second, _ = answered(capsys, "ask", "who is the captain?", *given)
    # The last line but one holds times.
    assert first.splitlines()[:-2] == second.splitlines()[:-2]
    assert first.splitlines()[-1] == second.splitlines()[-1]
    for figure in ("time to first token", "tokens/s", "KV cache", "tokens read"):
        assert figure in " ".join(first.splitlines()[-2:])


def test_the_text_shown_is_the_answer_of_the_record(text_file: Path, tiny_folder: Path) -> None:
    pieces = list(ask("who?", doc=str(text_file), model=str(tiny_folder), dtype="fp32", max_new_tokens=12))
    record = pieces.pop()
    assert len(pieces) > 4
    assert "".join(pieces).startswith(record["answer"])
    assert "cut off after 12 tokens" in "".join(pieces)
    assert not record["stopped"]


def test_full_attention_beyond_the_trained_length_is_possible_and_said_to_be_poor(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 60)
    out, _ = answered(capsys, "ask", "who?", "--doc", str(long), "--method", "full", *options(tiny_folder), "--json")
    record = json.loads(out)
    beyond = record["tokens_seen"] - 512
    assert record["trained_length"] == 512 < record["document_tokens"]
    assert record["tokens_beyond_training"] == beyond > 0
    assert f"{beyond:,} more than the 512" in record["warning"]
    assert record["warning"] in caplog.text
    assert record["kv_bytes"] == record["tokens_seen"] * SHAPE


def test_the_seed_decides_what_is_drawn(capsys: pytest.CaptureFixture[str], text_file: Path, tiny_folder: Path) -> None:
    def drawn(seed: int) -> str:
        heat = ["--temperature", "3", "--seed", str(seed)]
        out, _ = answered(capsys, "ask", "who?", "--doc", str(text_file), *options(tiny_folder), *heat, "--json")
        return json.loads(out)["answer"]

    assert drawn(5) == drawn(5) != drawn(6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ask", "who?"], "--doc"),
        (["ask", "--doc", "{folder}/whale.txt"], "question"),
        (["ask", "  ", "--doc", "{folder}/whale.txt"], "question is empty"),
        (["ask", "who?", "--doc", "{folder}/nothing.txt"], "nothing.txt"),
        (["ask", "who?", "--doc", "{folder}"], "directory"),
        (["ask", "who?", "--doc", "{folder}/binary.txt"], "binary"),
        (["ask", "who?", "--doc", "{folder}/empty.txt"], "empty"),
        (["ask", "who?", "--doc", "{folder}/latin.txt"], "latin.txt"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--model", "no-such-model"], "no-such-model"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--dtype", "int3"], "int3"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--attention", "magic"], "magic"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--max_new_tokens", "0"], "max_new_tokens"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--temperature", "-1"], "temperature"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--method", "zip"], "snapkv"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--ratio", "0.5"], "ratio must be a number of at least 1"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--ratio", "4", "--slots", "9"], "one of ratio, slots"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--budget", "big"], "such as 64MB; got 'big'"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--method", "full", "--ratio", "4"], "compresses nothing"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--method", "retrieve", "--save-cache", "x"], "--save-cache"),
        (["ask", "who?", "--doc", "{folder}/whale.txt", "--cache", "{folder}/whale.kv"], "either --doc"),
        (["ask", "who?", "--cache", "{folder}/whale.kv"], "whale.kv"),
        (["ask", "who?", "--cache", "{folder}/whale.txt", "--ratio", "4"], "leave those options out"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    door: Any, text_file: Path, words: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("señor, más café ".encode("utf-16-le")[1:] * 9)
    # Refused before any framework is imported.
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('torch was imported')")
    done = door(*(word.replace("{folder}", str(tmp_path)) for word in words), PYTHONPATH=str(blocked))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("longscope: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize("left_out", ["model.safetensors", "chat_template.jinja"])
def test_a_model_that_cannot_be_used_gets_one_line(
    capfd: pytest.CaptureFixture[str], text_file: Path, tiny_folder: Path, tmp_path: Path, left_out: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        if file.name != left_out:
            (folder / file.name).symlink_to(file)
    assert longscope.main(["ask", "who?", "--doc", str(text_file), "--model", str(folder)]) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "weights" in error or "chat template" in error


@pytest.mark.real
def test_the_default_model_answers_about_a_small_real_text(door: Any, tmp_path: Path) -> None:
    page = tmp_path / "ship.md"
    page.write_text(
        "# The good ship Union\n\nThe good ship Union left Boston on 3 May 1921 under Captain Mary Webster. "
        "She carried tea and silk, and reached London after nineteen days.\n"
    )
    done = door("ask", "Who was the captain of the Union?", "--doc", page)
    assert done.returncode == 0, done.stderr
    answer, _, figures = done.stdout.strip().rpartition("\n\n")
    assert "Webster" in answer
    for figure in ("time to first token", "tokens/s", "KV cache", "tokens read"):
        assert figure in figures
