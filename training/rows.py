"""Training rows from JSON Lines, checked one by one: an error names file, line and field."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: a check of a value: what is wrong with it, or None
Check = Callable[[Any], str | None]


@dataclass(frozen=True)
class Field:
    """What a row must hold under a name.

    >>> Field("text", str).fault({"text": 7})
    'text must be str, got int'
    """

    name: str
    kind: type | tuple[type, ...]
    required: bool = True
    check: Check | None = None
    """looks closer at a value of the right kind"""

    def fault(self, row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with this field of a row, or None."""
        if self.name not in row:
            return f"{self.name} is missing" if self.required else None
        value = row[self.name]
        if not isinstance(value, self.kind):
            kinds = self.kind if isinstance(self.kind, tuple) else (self.kind,)
            return f"{self.name} must be {' or '.join(kind.__name__ for kind in kinds)}, got {type(value).__name__}"
        return self.check(value) if self.check else None


def read_rows(
    path: str | os.PathLike[str], fields: Callable[[Mapping[str, Any]], str | None] | tuple[Field, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a JSON Lines file, blank lines left out.

    Args:
        path: UTF-8 text, one JSON object a line.
        fields: what rows hold, or a function that returns what is wrong with a row.

    Raises:
        ValueError: a line that is no row, naming file, line and field.
        OSError: the file cannot be read.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "rows.jsonl")
    ...     _ = file.write_text('{"text": "a"}\\n')
    ...     list(read_rows(file, (Field("text", str),)))
    [(1, {'text': 'a'})]
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    with file.open("rb") as lines:
        # As bytes: a text file decodes far ahead, and would blame the wrong line.
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number}: not UTF-8 text ({error.reason})") from error
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: a row must be a JSON object, got {type(row).__name__}")
            faults = (item.fault(row) for item in fields) if isinstance(fields, tuple) else iter([fields(row)])
            fault = next((fault for fault in faults if fault), None)
            if fault:
                raise ValueError(f"{file}, line {number}: {fault}")
            yield number, row
