"""Tokenised rows of several files: filtered, drawn, packed, and kept on disk."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longllm import LoadedModel, samples
from longllm.samples import load_samples, packed


def written(folder: Path, name: str, *texts: str) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def talk(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"conversations": turns, "id": 5}) + "\n"


@pytest.fixture
def words(tiny: LoadedModel) -> Any:
    return tiny.tokenizer


def decoded(words: Any, found: samples.Samples) -> list[str]:
    return [words.decode(found[row][0], skip_special_tokens=True) for row in range(len(found))]


def test_rows_of_a_mixture_come_in_order_and_are_counted(words: Any, tmp_path: Path) -> None:
    first = written(tmp_path, "a.jsonl", "The whale is white.", "a", "The sea is wide. " * 30)
    (tmp_path / "b.jsonl").write_text(talk("Who is it?", "The captain.") + talk("Who? " * 60, "Ahab."))
    found = load_samples(words, [first, str(tmp_path / "b.jsonl")], max_length=60, min_length=4)
    texts = decoded(words, found)
    assert texts[0] == "The whale is white."
    assert texts[1].startswith("The sea is wide. The sea"), "a text is cut"
    assert texts[2] == "user\nWho is it?\nassistant\nThe captain.\n", "an over-long conversation is left out"
    assert found.lengths[1] == 60
    nothing = {"too long": 0, "too short": 0, "no targets": 0}
    assert found.report == {
        first: {**nothing, "rows": 3, "kept": 2, "too short": 1},
        str(tmp_path / "b.jsonl"): {**nothing, "rows": 2, "kept": 1, "too long": 1},
    }
    ids, labels = found[2]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert words.decode([label for label in labels if label != -100]) == "The captain.<|im_end|>"


def test_rows_are_drawn_after_the_filter_in_file_order_and_with_a_seed(words: Any, tmp_path: Path) -> None:
    texts = [f"Number {place}. " + "It is so. " * (place % 2 * 30) for place in range(40)]
    file = written(tmp_path, "a.jsonl", *texts)
    drawn = load_samples(words, [f"{file}[7]"], max_length=500, min_length=50, seed=3)
    assert len(drawn) == 7
    assert drawn.report == {f"{file}[7]": {"rows": 40, "kept": 7, "too long": 0, "too short": 20, "no targets": 0}}
    numbers = [int(text.split(".")[0].split()[1]) for text in decoded(words, drawn)]
    passing = [place for place in range(40) if place % 2]
    assert numbers == [passing[at] for at in sorted(random.Random(3).sample(range(20), 7))]
    other = load_samples(words, [f"{file}[7]"], max_length=500, min_length=50, seed=4)
    assert decoded(words, other) != decoded(words, drawn)


def test_more_rows_than_pass_and_none_at_all_are_refused(words: Any, tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", "The whale is white.", "a")
    with pytest.raises(ValueError, match=r"a.jsonl\[2\] asks for 2 rows, but only 1 pass.*'too short': 1"):
        load_samples(words, [f"{file}[2]"], max_length=60, min_length=4)
    (tmp_path / "b.jsonl").write_text(talk("Who? " * 60, "Ahab."))
    with pytest.raises(ValueError, match=r"no row passes the filters \(0 to 60 tokens\): .*'too long': 1"):
        load_samples(words, [str(tmp_path / "b.jsonl")], max_length=60)
    with pytest.raises(ValueError, match="there are no training files"):
        load_samples(words, [], max_length=60)
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere.jsonl"):
        load_samples(words, ["nowhere.jsonl[3]"], max_length=60)
    with pytest.raises(ValueError, match=r"the number of rows in 'a.jsonl.0.' must be a positive integer"):
        load_samples(words, ["a.jsonl[0]"], max_length=60)


def test_a_row_without_a_target_is_left_out(words: Any, tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", "The whale is white.", "a")
    found = load_samples(words, [file], max_length=1000)
    assert len(found) == 2
    with pytest.raises(ValueError, match="'no targets': 2"):
        load_samples(words, [file], max_length=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"conversations": [{"role": "user", "content": 5}]}', r"conversations\[0\].content must be str, got int"),
        ('{"text": "a"', "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(words: Any, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(talk("Who?", "Ahab.") + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}"):
        load_samples(words, [str(tmp_path / "a.jsonl")], max_length=60)


def test_a_template_that_cannot_be_trained_with_is_named_by_file_and_line(words: Any, tmp_path: Path) -> None:
    import copy

    own = copy.deepcopy(words)
    own.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    (tmp_path / "a.jsonl").write_text(talk("Who?", "Ahab."))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the chat template puts no end-of-turn token"):
        load_samples(own, [str(tmp_path / "a.jsonl")], max_length=60)


def test_tokens_are_kept_and_mapped_until_something_changes(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    file, cache = written(tmp_path, "a.jsonl", "The whale is white.", "The sea is wide."), tmp_path / "tokens"
    fresh = load_samples(words, [file], max_length=60, cache=cache)
    reads = []
    real = samples.row_tokens
    monkeypatch.setattr(samples, "row_tokens", lambda *given: reads.append(given) or real(*given))
    again = load_samples(words, [file], max_length=60, cache=cache)
    assert reads == []
    assert isinstance(again.ids, np.memmap)
    assert again.report == fresh.report
    assert [again[row] for row in range(2)] == [fresh[row] for row in range(2)]
    other = copy.deepcopy(words)
    other.chat_template += " "
    for tokenizer, changes in ((words, {"max_length": 3}), (words, {"min_length": 1}), (other, {})):
        load_samples(tokenizer, [file], **{"max_length": 60, "cache": cache, **changes})
    written(tmp_path, "a.jsonl", "The whale is white.", "The sea is wild.")
    load_samples(words, [file], max_length=60, cache=cache)
    assert len(reads) == 8
    assert not list(cache.glob(".*")), "nothing half-written is left"


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), spare=st.integers(0, 20))
def test_packs_hold_every_row_once_and_never_too_much(lengths: list[int], spare: int) -> None:
    room = max(lengths) + spare
    groups = packed(lengths, room)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in group) for group in groups]
    assert max(sums) <= room
    # Best fit opens a pack only for a row that fits nowhere: no two packs could be one.
    assert len(sums) == 1 or sum(sorted(sums)[:2]) > room


def test_a_row_that_fits_no_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 9 tokens, more than the 8"):
        packed([3, 9], 8)
