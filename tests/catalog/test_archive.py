"""Extraction: only what is wanted, never outside the folder, never from a damaged archive."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from catalog.archive import extract, join_parts

MakeTar = Callable[[dict[str, bytes | str]], Path]
ESCAPES = ["../evil", "/evil", "a/../../evil", "..\\evil", "C:evil", "package/../../evil", "package//evil", ".."]


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(zipfile.ZipInfo(name), content)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_members_that_match_are_extracted_and_the_prefix_goes(make_tar: MakeTar, tmp_path: Path) -> None:
    archive = make_tar({"package/img/64/a.png": b"A", "package/img/32/a.png": b"B", "package/x.json": b"{}"})
    matched = extract(archive, tmp_path / "out", ["package/img/64/*", "package/*.md"], ["package/"])
    assert files_in(tmp_path / "out") == {"img/64/a.png": b"A"}
    assert matched == ["package/img/64/*"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_tar_member_that_leads_out_is_refused(name: str, make_tar: MakeTar, tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "out"
    inside.mkdir(parents=True)
    with pytest.raises(OSError, match="outside the target folder"):
        extract(make_tar({name: b"x"}), inside, ["*"], ["package/"])
    assert not list(tmp_path.rglob("*evil*"))
    assert not os.path.exists("/evil")


@pytest.mark.parametrize("name", [name for name in ESCAPES if name != ".."])
def test_a_zip_member_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "made.whl", {"fine": b"x", name: b"x"})
    with pytest.raises(OSError, match="outside the target folder"):
        extract(archive, tmp_path / "deep" / "out", ["*"], ["package/"])
    assert not list(tmp_path.rglob("*evil*"))


def test_a_bad_name_is_refused_even_where_it_is_not_wanted(make_tar: MakeTar, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="refused"):
        extract(make_tar({"../evil": b"x", "good": b"y"}), tmp_path / "out", ["good"])


def test_links_are_never_extracted(make_tar: MakeTar, tmp_path: Path) -> None:
    archive = make_tar({"out": "/etc", "out/passwd": b"mine", "link": "/etc/passwd", "real": b"r"})
    extract(archive, tmp_path / "folder")
    assert files_in(tmp_path / "folder") == {"out/passwd": b"mine", "real": b"r"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_link_in_a_zip_is_not_extracted(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
        zipped.writestr("real", b"r")
    extract(tmp_path / "made.whl", tmp_path / "folder")
    assert files_in(tmp_path / "folder") == {"real": b"r"}


@pytest.mark.parametrize(("kind", "damage"), [("tgz", "cut"), ("tgz", "text"), ("whl", "cut"), ("whl", "flip")])
def test_a_damaged_archive_is_one_clear_error(kind: str, damage: str, make_tar: MakeTar, tmp_path: Path) -> None:
    content = os.urandom(50_000)
    path = make_tar({"a": content}) if kind == "tgz" else make_zip(tmp_path / "made.whl", {"a": content})
    data = bytearray(path.read_bytes())
    data[25_000] ^= 255
    path.write_bytes({"cut": bytes(data[:20_000]), "flip": bytes(data), "text": b"not found"}[damage])
    with pytest.raises(OSError, match="not a readable archive") as caught:
        extract(path, tmp_path / "out")
    assert caught.value.errno is None, "a damaged archive is not an error of the disk"


def test_parts_are_joined_in_name_order(tmp_path: Path) -> None:
    for folder, number in (("z", 0), ("a", 1), ("m", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"model.gguf.part0{number}").write_bytes(bytes([number]) * 3)
    join_parts(tmp_path, "model.gguf")
    assert files_in(tmp_path) == {"model.gguf": bytes([0, 0, 0, 1, 1, 1, 2, 2, 2])}


def test_nothing_to_join_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no \*\.partNN files"):
        join_parts(tmp_path, "model.gguf")
