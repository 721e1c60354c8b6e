"""The cache folder: what is returned as good, what is fetched again, what a failed fetch leaves behind."""

import json
from pathlib import Path

import pytest

import catalog
from catalog import store, table


def names_in_data() -> list[str]:
    """Return what lies in the data folder, hidden entries included."""
    return sorted(path.name for path in (catalog.home() / "data").iterdir())


def test_a_wheel_becomes_a_folder_with_its_manifest(shelf, capfd: pytest.CaptureFixture[str]) -> None:
    row = shelf.row({"a.txt": b"one", "deep/b.txt": b"two"})
    folder = store.install(row)
    assert folder == catalog.home() / "data" / "toy"
    assert (folder / "a.txt").read_bytes() == b"one"
    assert (folder / "deep" / "b.txt").read_bytes() == b"two"
    manifest = json.loads((folder / "catalog.json").read_text())
    archive = row.sources[0].archives[0]
    assert manifest["archives"] == [{"spec": "toy==1.0", "size": row.size, "sha256": archive.sha256}]
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {"a.txt": 3, "deep/b.txt": 3}
    assert names_in_data() == ["toy"], "nothing else is left"
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fetching toy" in captured.err


def test_what_is_here_is_not_fetched_again(toy: catalog.Row) -> None:
    assert store.install(toy) == store.folder_of(toy)


def test_a_damaged_folder_is_never_returned(toy: catalog.Row, shelf, capfd: pytest.CaptureFixture[str]) -> None:
    folder = store.folder_of(toy)
    manifest = folder / "catalog.json"
    whole = manifest.read_text()
    for text in (whole[:40], "[]", "{}", whole.replace('"size": 3', '"size": "3"')):
        manifest.write_text(text)
        assert "damaged" in store.fault(toy) or "bytes instead of" in store.fault(toy)
    manifest.unlink()
    assert store.fault(toy) == "catalog.json is missing"
    manifest.write_text(whole)
    assert store.fault(toy) == ""
    (folder / "deep" / "b.txt").unlink()
    assert store.fault(toy) == "b.txt is missing"
    (folder / "deep" / "b.txt").write_bytes(b"two, and more")
    assert store.fault(toy) == "deep/b.txt has 13 bytes instead of 3"
    shelf.row({"a.txt": b"one", "deep/b.txt": b"two"})
    assert (store.install(toy) / "deep" / "b.txt").read_bytes() == b"two"
    assert "toy: deep/b.txt has 13 bytes instead of 3; fetching it again" in capfd.readouterr().err


def test_sizes_alone_miss_a_flipped_byte_but_verify_finds_it(toy: catalog.Row) -> None:
    assert store.verify_row(toy) == 2
    (store.folder_of(toy) / "a.txt").write_bytes(b"oNe")
    assert store.fault(toy) == ""
    with pytest.raises(OSError, match=r"a\.txt has sha256 .* instead of .*longscope fetch toy"):
        store.verify_row(toy)
    assert store.fault(toy), "once found out it is not handed out again"
    with pytest.raises(OSError, match="cannot fetch toy"):
        store.install(toy)


def test_a_new_version_in_the_table_replaces_the_old(toy: catalog.Row, shelf) -> None:
    folder = store.install(shelf.row({"a.txt": b"two", "new.txt": b"n"}, "2.0"))
    assert folder == store.folder_of(toy)
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "catalog.json", "new.txt"]
    assert json.loads((folder / "catalog.json").read_text())["version"] == "2.0"
    assert "version 2.0" in store.fault(toy)


def test_a_failed_forced_fetch_keeps_the_old_folder(toy: catalog.Row) -> None:
    folder = store.folder_of(toy)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="cannot fetch toy"):
        store.install(toy, force=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert store.install(toy) == folder
    assert names_in_data() == ["toy"]


def test_a_crash_between_the_two_renames_is_repaired_without_a_download(toy: catalog.Row) -> None:
    folder = store.folder_of(toy)
    folder.rename(folder.with_name(".toy.old"))
    (folder.with_name(".toy.new-dead") / "content").mkdir(parents=True)
    assert store.install(toy) == folder
    assert names_in_data() == ["toy"]


def test_a_folder_of_ones_own_comes_first(shelf) -> None:
    row = shelf.row({"a.txt": b"one"})
    mine = catalog.home() / "local" / "toy"
    mine.mkdir(parents=True)
    assert store.install(row) == mine
    with pytest.raises(ValueError, match="your own folder"):
        store.verify_row(row)


def test_a_pattern_that_matches_nothing_is_an_error(shelf) -> None:
    text = shelf.text(shelf.wheel({"a.txt": b"one"})).replace('take = ["toy/*"]', 'take = ["toy/*", "toy/*.bin"]')
    row = table.parse(text)[0]
    with pytest.raises(OSError, match=r"nothing that matches toy/\*\.bin"):
        store.install(row)
    assert store.fault(row) == "not installed"


def test_path_takes_folders_and_refuses_what_is_neither(tmp_path: Path, longscope_home: Path) -> None:
    assert catalog.path(str(tmp_path)) == catalog.path(tmp_path) == tmp_path
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        catalog.path(str(file))
    with pytest.raises(FileNotFoundError, match="no folder"):
        catalog.path(str(tmp_path / "absent"))
    for name in ("smollm", ""):
        with pytest.raises(ValueError, match=f"unknown name '{name}'"):
            catalog.path(name)


def test_a_catalog_name_goes_before_a_folder_of_that_name(
    tmp_path: Path, longscope_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sotu").mkdir()
    mine = longscope_home / "local" / "sotu"
    mine.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert catalog.path("sotu") == mine
    assert catalog.path("./sotu") == Path("sotu")


def test_nothing_is_local_in_an_empty_home(longscope_home: Path) -> None:
    assert [row.name for row in catalog.rows() if catalog.local(row.name)] == []
    with pytest.raises(ValueError, match="not installed; fetch it with"):
        catalog.verify("sotu")
    assert list(longscope_home.iterdir()) == [], "looking leaves nothing behind"


def test_the_home_follows_its_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LONGSCOPE_HOME", str(tmp_path / "mine"))
    assert catalog.home() == tmp_path / "mine"
    monkeypatch.delenv("LONGSCOPE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalog.home() == tmp_path / "xdg" / "longscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert catalog.home() == tmp_path / ".cache" / "longscope"


def test_an_unusable_home_says_what_to_set(shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = shelf.row({"a.txt": b"one"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGSCOPE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot use the cache folder .*LONGSCOPE_HOME"):
        store.install(row)
