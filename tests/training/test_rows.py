"""Rows of JSON Lines: what is wrong is named by file, line and field."""

from pathlib import Path

import pytest

from training import Field, read_rows

FIELDS = (
    Field("text", str, check=lambda text: None if text else "text is empty"),
    Field("score", (int, float), required=False),
)


def test_rows_come_with_their_line_numbers_and_keep_other_keys(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "id": 1}\n\n  \n{"text": "ü", "score": 0.5}', encoding="utf-8")
    assert list(read_rows(file, FIELDS)) == [(1, {"text": "a", "id": 1}), (4, {"text": "ü", "score": 0.5})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 7}', "text must be str, got int"),
        (b"{}", "text is missing"),
        (b'{"text": ""}', "text is empty"),
        (b'{"text": "a", "score": "high"}', "score must be int or float, got str"),
        (b"[1]", "a row must be a JSON object, got list"),
        (b"{text}", "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: {message}"):
        list(read_rows(file, FIELDS))


def test_a_function_may_check_whole_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n')
    assert len(list(read_rows(file, lambda row: None))) == 1
    with pytest.raises(ValueError, match="line 1: a is odd"):
        list(read_rows(file, lambda row: "a is odd"))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        list(read_rows(tmp_path / "none.jsonl", FIELDS))
