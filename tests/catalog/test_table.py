"""The table: every row is well formed, lookups are exact, messages help."""

import re
import tomllib

import pytest

import catalog
from catalog import table

GOOD = """
[toy]
kind = "data"
what = "a toy"
licence = "MIT"
version = "1"
size = 5
sources = [{ type = "hub", repo = "me/toy" }]
"""


def test_rows_of_the_design_are_all_there() -> None:
    names = {row.name for row in catalog.rows()}
    wanted = "smollm2-135m-instruct minilm-l6 gemma3-270m moby-dick sotu spam emoji-google emoji-twitter "
    wanted += "emoji-facebook emoji-keywords wordnet beacon-qwen-2-7b-instruct llama-3-8b-instruct-80k-qlora "
    wanted += "bge-visualized bge-en-icl bge-reranker-v2.5-gemma2-lightweight bge-m3 bge-small-en-v1.5"
    assert set(wanted.split()) <= names


@pytest.mark.parametrize("row", catalog.rows(), ids=lambda row: row.name)
def test_a_row_is_pinned_and_licensed(row: catalog.Row) -> None:
    assert row.licence
    assert row.what
    assert re.fullmatch(r"[a-z0-9.-]+", row.name), "a name is also a folder and a command-line word"
    for source in row.sources:
        for archive in source.archives:
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
            assert re.search(r"[=@]\d+\.\d+\.\d+$", archive.spec), "asked for by exact version"
        if source.archives:
            assert sum(archive.size for archive in source.archives) == row.size
            assert row.disk > 0


def test_no_row_carries_a_registry_address() -> None:
    for row in catalog.rows():
        assert "://" not in repr(row.sources)


def test_defaults_are_free_and_small() -> None:
    defaults = {row.name: row for row in catalog.rows() if row.default}
    assert set(defaults) == {"smollm2-135m-instruct", "minilm-l6", "moby-dick", "sotu"}
    assert sum(row.size for row in defaults.values()) < 200e6
    assert not any("Gemma" in row.licence for row in defaults.values())


def test_names_and_repositories_are_unique() -> None:
    names = [row.name for row in catalog.rows()] + [row.repo for row in catalog.rows() if row.repo]
    assert len(names) == len(set(names))


def test_a_row_is_found_by_its_hub_repository() -> None:
    assert catalog.row("BAAI/bge-m3") is catalog.row("bge-m3")


def test_an_unknown_name_lists_close_matches_first_and_then_all() -> None:
    with pytest.raises(ValueError, match="unknown name 'mobydick': did you mean moby-dick") as caught:
        catalog.row("mobydick")
    assert all(row.name in str(caught.value) for row in catalog.rows())
    assert "\n" not in str(caught.value)


def test_an_empty_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="unknown name ''"):
        catalog.row("")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "data"', 'kind = "toy"', "kind 'toy' is not one of model, data"),
        ("size = 5", "sise = 5", "unknown key 'sise'"),
        ('licence = "MIT"', "", "licence"),
        ('type = "hub"', 'type = "ftp"', "source type 'ftp'"),
        ('repo = "me/toy"', 'branch = "x"', "unknown key 'branch'"),
        ('type = "hub", repo = "me/toy"', 'type = "npm"', "npm source needs archives"),
        ('[{ type = "hub", repo = "me/toy" }]', "[]", "no sources"),
        ("size = 5", 'size = 5\nconvert = "onnx"', "convert 'onnx'"),
    ],
)
def test_a_bad_row_is_refused_by_name(old: str, new: str, message: str) -> None:
    assert table.parse(GOOD)[0].name == "toy"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        table.parse(GOOD.replace(old, new))
    assert "toy" in str(caught.value)


def test_a_pin_follows_what_is_installed_and_nothing_else() -> None:
    row = table.parse(GOOD)[0]
    same = table.parse(GOOD.replace("a toy", "the same toy"))[0]
    other = table.parse(GOOD.replace('"me/toy"', '"me/toy", revision = "v2"'))[0]
    assert row.sources[0].pin == same.sources[0].pin != other.sources[0].pin


def test_the_table_file_is_plain_toml() -> None:
    text = (table.resources.files("catalog") / "catalog.toml").read_text(encoding="utf-8")
    assert list(tomllib.loads(text)) == [row.name for row in catalog.rows()]
