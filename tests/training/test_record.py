"""The record of a run."""

import hashlib
import json
from pathlib import Path

import pytest

from training import Optimisation, run_record
from training.record import plain, write_record


def test_a_record_names_settings_data_versions_machine_and_command(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b"x" * 3_000_000)
    record = run_record({"optimisation": Optimisation(seed=3), "files": (data,)}, [data])
    assert record["settings"]["optimisation"]["seed"] == 3
    assert record["data"][str(data)] == {"bytes": 3_000_000, "sha256": hashlib.sha256(b"x" * 3_000_000).hexdigest()}
    assert {"python", "torch", "transformers", "longscope"} <= record["versions"].keys()
    assert record["command"]
    assert record["machine"]["cores"] >= 1
    assert record["begun"].startswith("20")
    assert json.loads(json.dumps(record)) == record


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "run.json"
    write_record(file, {"a": "ü"})
    with pytest.raises(TypeError):
        write_record(file, {"a": object()})
    assert json.loads(file.read_text("utf-8")) == {"a": "ü"}
    assert [found.name for found in file.parent.iterdir()] == ["run.json"]


def test_values_become_plain(tmp_path: Path) -> None:
    assert plain({1: (tmp_path, [Optimisation(seed=2)])})["1"][0] == str(tmp_path)
    assert plain([Optimisation(seed=2)])[0]["seed"] == 2


def test_a_missing_data_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        run_record({}, [tmp_path / "none"])
