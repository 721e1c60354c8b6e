"""Rows of a benchmark's data: JSON lines, JSON, Parquet, a folder of such files, or the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: endings of data files, as they are looked for in a folder
_ENDINGS = (".jsonl", ".json", ".parquet")
HUB = "hub:"


def read_rows(
    source: str | os.PathLike[str], name: str = "", needs: Sequence[str] = (), split: str = "test"
) -> list[dict[str, Any]]:
    """Return the rows of one data set.

    Args:
        source: a file; a folder with ``<name>.jsonl``, ``.json`` or ``.parquet`` in it; or ``hub:OWNER/DATASET`` on the
            Hugging Face hub, with ``name`` as its configuration or, if it has none of that name, as its data file.
        name: of the data set, for folders and the hub.
        needs: fields that every row must have; "a|b" is either.
        split: of a data set on the hub.

    Raises:
        ValueError: a row that is none, or lacks a field; names the file, the line and the field.
        OSError: no such file.
        ImportError: Parquet and the hub need the extra ``longscope[train]``.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "trec.jsonl").write_text('{"input": "Who?", "answers": ["Human"]}')
    ...     read_rows(folder, "trec", ["input", "answers"])
    [{'input': 'Who?', 'answers': ['Human']}]
    """
    text = os.fspath(source)
    if text.startswith(HUB):
        rows, where = _from_hub(text.removeprefix(HUB), name, split), text
    else:
        path = data_file(text, name)
        rows, where = (_parquet(path) if path.suffix == ".parquet" else _json(path)), str(path)
    if not rows:
        raise ValueError(f"{where} holds no rows")
    for number, row in enumerate(rows, 1):
        for field in needs:
            if not any(key in row for key in field.split("|")):
                raise ValueError(f"{where}, row {number}: the field {field.replace('|', ' or ')} is missing")
    return rows


def data_file(source: str, name: str) -> Path:
    """Return the file that holds a data set.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / f"{name}{ending}" for ending in _ENDINGS if (path / f"{name}{ending}").is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds no {name}{_ENDINGS[0]}, {_ENDINGS[1]} or {_ENDINGS[2]}")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {source}")
    return path


def field(row: Mapping[str, Any], *names: str) -> Any:
    """Return the first of some fields that a row has.

    Raises:
        ValueError: it has none of them.

    >>> field({"question": "Who?"}, "input", "question")
    'Who?'
    """
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"a row without {' or '.join(names)}: its fields are {', '.join(row)}")


def _json(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, or of one JSON list."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            values = list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    else:
        values = []
        # Only "\n" ends a line of JSON: texts may hold other separators, which splitlines() would cut at.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    values.append((number, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    for number, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: a row is an object with fields, got {type(value).__name__}")
    return [value for _, value in values]


def _parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'longscope[train]'") from error
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _from_hub(repository: str, name: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a data set on the hub; data sets that need code of their own are refused by the library."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data on the hub needs the package datasets: pip install 'longscope[train]'") from error
    if name and name not in datasets.get_dataset_config_names(repository):
        table = datasets.load_dataset(repository, data_files={split: f"{name}.jsonl"}, split=split)
    else:
        table = datasets.load_dataset(repository, name or None, split=split)
    return [dict(row) for row in table]
