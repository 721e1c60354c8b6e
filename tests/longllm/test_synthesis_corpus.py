"""Where texts come from and how they are cut, sifted and grouped."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longllm.synthesis import (
    Fitness,
    SourceText,
    abstract_first,
    chapters,
    chunks,
    clusters,
    read_corpus,
    side_groups,
    sift,
    token_counter,
)
from longllm.synthesis.chunk import count_tokens
from longllm.synthesis.corpus import language_of

TEXTS = st.text(st.sampled_from("ab .,!?\n\r\té海🐳\u200d\u0301"), max_size=300)
ENGLISH = "The captain walked across the deck and looked at the sea for a long time before he spoke to the men. " * 3
GERMAN = "Der Kapitän ging über das Deck und sah lange auf das Meer hinaus, bevor er mit den Männern sprach. " * 3


def words(text: str) -> int:
    return len(text.split())


@given(TEXTS, st.integers(1, 60))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_chunks_joined_are_the_text_and_none_is_too_long(text: str, capacity: int) -> None:
    found = chunks(text, capacity, lambda part: len(part.encode()))
    assert "".join(found) == text
    # Nothing is cut below a character.
    assert all(len(chunk.encode()) <= capacity or len(chunk) == 1 for chunk in found)


def test_chunks_are_counted_by_the_models_own_tokeniser(tiny_folder: Path, tiny: Any) -> None:
    tokenizer = token_counter(tiny_folder)
    text = "The whale is white.\n\nThe sea is wide, and 海と空 are blue. " * 20
    found = chunks(text, 32, tokenizer)
    assert "".join(found) == text
    assert all(len(tiny.tokenizer(chunk, add_special_tokens=False)["input_ids"]) <= 32 for chunk in found)
    assert count_tokens(tokenizer, text) == len(tiny.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_tokeniser_saved_with_a_limit_counts_all(tiny_folder: Path, spoiled: Path) -> None:
    file = spoiled / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(saved))
    assert count_tokens(token_counter(spoiled), ENGLISH) == count_tokens(token_counter(tiny_folder), ENGLISH) > 4
    file.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        token_counter(spoiled)


def test_chunks_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        chunks("a", 0, words)


def test_a_corpus_may_be_rows_files_or_a_folder_of_both(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("# The whale\n\nIt is white.")
    (tmp_path / "a.txt").write_text("Call me Ishmael.")
    rows = [{"text": "one", "id": 7, "meta": {"language": "en"}}, {"text": "two", "title": "T"}, {"text": "three"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    found = list(read_corpus(tmp_path))
    assert [text.text for text in found] == ["Call me Ishmael.", "one", "two", "three", "# The whale\n\nIt is white."]
    assert [text.name for text in found][1:4] == ["7", "T", "rows/3"]
    assert found[1].facts == {"id": 7, "meta": {"language": "en"}}
    assert next(read_corpus(tmp_path / "a.txt")).text == "Call me Ishmael."


@pytest.mark.parametrize("line", ['{"body": "x"}', "[1]", "{", '{"text": 3}'])
def test_a_row_without_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: "):
        list(read_corpus(tmp_path / "rows.jsonl"))


def test_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the catalog has no document of that name"):
        list(read_corpus("no-such-thing"))
    with pytest.raises(ValueError, match="holds no texts"):
        list(read_corpus(tmp_path))


@pytest.mark.real
def test_the_catalogs_texts() -> None:
    novel, parts = next(read_corpus("moby-dick")), list(read_corpus("moby-dick/chapters"))
    assert "".join(part.text for part in parts) == novel.text
    assert (len(parts), parts[0].name) == (135, "moby-dick/1")
    assert parts[41].text.startswith("CHAPTER 42. The Whiteness of The Whale.")
    speeches = list(read_corpus("sotu"))
    assert (len(speeches), speeches[0].name) == (233, "sotu/1790-washington")


def test_a_book_without_chapters_stays_whole() -> None:
    assert chapters("In Chapter 1 nothing happens.\nThe end.") == ["In Chapter 1 nothing happens.\nThe end."]


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("no marker at all", "no marker at all"),
        ("", ""),
        ("Abstract: first already", "Abstract: first already"),
        ("body Abstract: a", "Abstract: a\n\nbody "),
        ("x Abstract: old y Abstract: new", "Abstract: new\n\nx Abstract: old y "),
    ],
)
def test_the_last_abstract_comes_first(text: str, moved: str) -> None:
    assert abstract_first(text) == moved


def test_unfit_texts_are_dropped_for_a_reason() -> None:
    texts = [
        SourceText("ok", ENGLISH),
        SourceText("short", "Too short."),
        SourceText("long", ENGLISH * 9),
        SourceText("german", GERMAN),
        SourceText("claims", ENGLISH + "x", {"meta": {"language": "fr"}}),
        SourceText("blank", " \n"),
        SourceText("broken", ENGLISH + "\ud800"),
        SourceText("again", ENGLISH.replace(" ", "\n")),
    ]
    drawn, others = sift(lambda: iter(texts), words, Fitness(least=10, most=200, language="en"))
    assert [text.name for text in drawn] == ["ok"]
    assert others == {
        "too short": 1, "too long": 1, "another language": 2, "empty": 1, "not encodable": 1, "repeated": 1
    }  # fmt: skip


def test_lengths_are_inclusive_at_both_ends() -> None:
    texts = [SourceText(str(n), "w " * n) for n in range(1, 8)]
    drawn, _ = sift(lambda: iter(texts), words, Fitness(least=3, most=5))
    assert sorted(text.name for text in drawn) == ["3", "4", "5"]


def test_the_draw_depends_on_seed_and_texts_but_not_on_their_order() -> None:
    texts = [SourceText(str(n), f"text number {n}") for n in range(30)]
    mixed = random.Random(1).sample(texts, len(texts))
    first, _ = sift(lambda: iter(texts), words, take=9, seed=5)
    assert [t.name for t in first] == [t.name for t in sift(lambda: iter(mixed), words, take=9, seed=5)[0]]
    assert [t.name for t in first] != [t.name for t in sift(lambda: iter(texts), words, take=9, seed=6)[0]]


def test_stages_take_different_texts_until_there_are_none() -> None:
    texts = [SourceText(str(n), f"text number {n}") for n in range(10)]
    used: set[str] = set()
    for take in (4, 4):
        drawn, _ = sift(lambda: iter(texts), words, take=take, exclude=used)
        assert not used & {text.digest for text in drawn}
        used |= {text.digest for text in drawn}
    with pytest.raises(ValueError, match=r"3 texts were asked for, 2 are fit \(8 used by another stage\)"):
        sift(lambda: iter(texts), words, take=3, exclude=used)
    with pytest.raises(ValueError, match="the source is empty"):
        sift(lambda: iter([]), words)


def test_languages_are_told_apart_the_same_way_each_time() -> None:
    assert [language_of(ENGLISH), language_of(GERMAN), language_of("12345 ...")] == ["en", "de", ""]
    mixed = ENGLISH[:60] + GERMAN[:60]
    assert len({language_of(mixed) for _ in range(5)}) == 1


@pytest.mark.parametrize("bounds", [(-1, 0), (0, -1), (5, 4)])
def test_bounds_that_nothing_satisfies_are_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="least and most must be 0 or more"):
        Fitness(*bounds)


def test_texts_are_clustered_by_words_or_by_an_embedder() -> None:
    sea = [f"whale ship sea harpoon captain voyage {n}" for n in range(6)]
    law = [f"tax congress law treasury vote senate {n}" for n in range(6)]
    labels = clusters(sea + law, 2)
    assert len(set(labels[:6])) == len(set(labels[6:])) == 1
    assert labels[0] != labels[6]

    def parity(texts: list[str]) -> Any:
        return np.array([[float(text[-1] in "024")] for text in texts])

    labels = clusters(sea + law, 2, parity)
    assert len({(label, int(text[-1]) % 2) for label, text in zip(labels, sea + law, strict=True)}) == 2
    with pytest.raises(ValueError, match="gave 1 vectors for 12 texts"):
        clusters(sea + law, 2, lambda texts: np.zeros((1, 3)))
    with pytest.raises(ValueError, match="between 1 and 12"):
        clusters(sea + law, 13)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=40), st.integers(1, 60), st.integers(0, 5))
def test_groups_are_of_one_cluster_within_the_length_and_share_no_text(
    texts: list[tuple[int, int]], target: int, seed: int
) -> None:
    labels, lengths = [label for label, _ in texts], [length for _, length in texts]
    groups = side_groups(labels, lengths, target, seed)
    members = [number for group in groups for number in group]
    assert len(members) == len(set(members))
    for group in groups:
        assert len(group) >= 2
        assert len({labels[number] for number in group}) == 1
        assert sum(lengths[number] for number in group) <= target
