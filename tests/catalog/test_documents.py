"""Documents of the catalog by name, over a small collection laid out like the real one."""

from pathlib import Path

import pytest

import catalog

FILES = {
    "1837_martin_van_buren_d.txt": "Fellow citizens",
    "1897_william_mc_kinley_r.txt": "To the Senate",
    "1953_dwight_d_eisenhower_r.txt": "Mr. President, Mr. Speaker",
    "1953_harry_s_truman_d.txt": "I have the honor",
    "1999_william_j_clinton_d.txt": "Good evening\r\nand welcome",
    "LICENSE": "not a speech",
}


@pytest.fixture
def speeches(longscope_home: Path) -> Path:
    folder = longscope_home / "local" / "sotu"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_bytes(text.encode())
    return folder


def test_every_speech_is_listed_once_in_order(speeches: Path) -> None:
    assert catalog.documents("sotu") == [
        "sotu/1837-van-buren",
        "sotu/1897-mckinley",
        "sotu/1953-eisenhower",
        "sotu/1953-truman",
        "sotu/1999-clinton",
    ]


def test_every_listed_name_reads_its_own_document(speeches: Path) -> None:
    for name in catalog.documents("sotu"):
        assert catalog.read_document(name).name == name


@pytest.mark.parametrize(
    ("asked", "name", "title"),
    [
        ("sotu/1999", "sotu/1999-clinton", "State of the Union 1999, William J Clinton"),
        ("sotu/1999-william-j-clinton", "sotu/1999-clinton", "State of the Union 1999, William J Clinton"),
        ("sotu/1953-Truman", "sotu/1953-truman", "State of the Union 1953, Harry S Truman"),
        ("sotu/1837-van-buren", "sotu/1837-van-buren", "State of the Union 1837, Martin Van Buren"),
        ("sotu/1897", "sotu/1897-mckinley", "State of the Union 1897, William McKinley"),
    ],
)
def test_a_speech_is_found_by_year_and_by_name(asked: str, name: str, title: str, speeches: Path) -> None:
    document = catalog.read_document(asked)
    assert (document.name, document.title) == (name, title)
    assert document.text.splitlines()[0] in "".join(FILES.values())


def test_a_year_with_two_speeches_lists_both(speeches: Path) -> None:
    with pytest.raises(ValueError, match="means 2 documents; name one: sotu/1953-eisenhower, sotu/1953-truman"):
        catalog.read_document("sotu/1953")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("sotu", "holds 5 documents; name one of 5, such as sotu/1837-van-buren or sotu/1999-clinton"),
        ("sotu/1953-bush", "no document '1953-bush' in sotu; .* sotu/1953-eisenhower or sotu/1953-truman"),
        ("sotu/2050", "no document '2050'"),
        ("sotu/1999-", "no document '1999-'"),
        ("sotu/1953-n", "no document '1953-n'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(asked: str, message: str, speeches: Path) -> None:
    with pytest.raises(ValueError, match=message):
        catalog.read_document(asked)


def test_a_collection_of_one_is_read_by_its_name(longscope_home: Path) -> None:
    folder = longscope_home / "local" / "moby-dick"
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("Call me Ishmael.")
    assert catalog.documents("moby-dick") == ["moby-dick"]
    assert catalog.read_document("moby-dick").text == "Call me Ishmael."
    with pytest.raises(ValueError, match="is one document"):
        catalog.read_document("moby-dick/3")


def test_a_file_goes_before_a_name(speeches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sotu").mkdir()
    (tmp_path / "sotu" / "1999").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert catalog.read_document("sotu/1999").text == "mine"


def test_an_unknown_collection_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown collection 'spam'; the collections are moby-dick, sotu"):
        catalog.documents("spam")


def test_an_emptied_folder_says_how_to_restore_it(longscope_home: Path) -> None:
    (longscope_home / "local" / "sotu").mkdir(parents=True)
    with pytest.raises(OSError, match="holds no documents"):
        catalog.documents("sotu")
