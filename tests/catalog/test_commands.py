"""``longscope models`` and ``longscope fetch`` through the front door."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import catalog
import longscope
from commands.fetch import fetch
from commands.models import models

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_data(longscope_home: Path) -> Path:
    """Folders of the user's own for two data sets, so that fetching them needs no network."""
    for name in ("sotu", "moby-dick"):
        (longscope_home / "local" / name).mkdir(parents=True)
    return longscope_home


def test_models_lists_every_row_with_licence_and_presence(own_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longscope.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in catalog.rows():
        line = next(line for line in lines if line.split()[0] == row.name)
        assert row.licence in line
        assert row.what in line
        assert line.split()[4] == ("yes" if row.name in ("sotu", "moby-dick") else "-")


@pytest.mark.parametrize("kind", ["model", "data"])
def test_models_of_one_kind_as_json(kind: str, own_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longscope.main(["models", "--kind", kind, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    listed = json.loads(line)["models"]
    assert [entry["name"] for entry in listed] == [row.name for row in catalog.rows() if row.kind == kind]
    assert {entry["name"] for entry in listed if entry["local"]} == (
        set() if kind == "model" else {"sotu", "moby-dick"}
    )


def test_notes_on_licences_are_shown() -> None:
    text = "".join(piece for piece in models(kind="data") if isinstance(piece, str))
    assert "note on emoji-twitter: pictures: Copyright Twitter" in text
    assert "note on emoji-facebook: test data only" in text


def test_fetch_takes_several_names_on_the_real_command_line(own_data: Path) -> None:
    script = Path(sys.executable).with_name("longscope")
    done = subprocess.run([script, "fetch", "sotu", "moby-dick", "sotu", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = json.loads(done.stdout)["fetched"]
    assert [entry["name"] for entry in fetched] == ["sotu", "moby-dick"], "a name given twice is fetched once"
    assert fetched[0]["path"] == str(own_data / "local" / "sotu")


def test_an_unknown_name_stops_before_the_first_download(
    longscope_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert longscope.main(["fetch", "moby-dick", "no-such-thing"]) == 2
    assert "unknown name 'no-such-thing'" in capsys.readouterr().err
    assert list(longscope_home.iterdir()) == []


def test_defaults_are_the_rows_marked_so(longscope_home: Path) -> None:
    for row in catalog.rows():
        if row.default:
            (longscope_home / "local" / row.name).mkdir(parents=True)
    record = list(fetch(["defaults"]))[-1]
    assert [entry["name"] for entry in record["fetched"]] == [row.name for row in catalog.rows() if row.default]
