"""Tokenised training rows of several files: filtered by length, sampled, kept on disk and mapped into memory."""

from __future__ import annotations

import bisect
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longllm.conversations import IGNORED, begin, row_fault, row_tokens
from longllm.recipe import source
from training import read_rows
from training.record import fingerprint

#: changes whenever the same rows become other tokens, so that those of an earlier version are not taken for these
_VERSION = 2


@dataclass(frozen=True)
class Samples:
    """Tokenised rows, one after the other in flat arrays.

    >>> rows = Samples(np.array([5, 6, 7], np.int32), np.array([0, 1, 1], bool), np.array([0, 1, 3]), {})
    >>> len(rows), rows.lengths, rows[1]
    (2, [1, 2], ([6, 7], [6, 7]))
    """

    ids: np.ndarray
    """[tokens] int32"""
    learned: np.ndarray
    """[tokens] bool: which are targets"""
    offsets: np.ndarray
    """[rows + 1] where each row begins"""
    report: dict[str, dict[str, int]]
    """by FILE or FILE[N]: rows read, kept, and left out because too long, too short or without targets"""

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> tuple[list[int], list[int]]:
        """Return ids and labels of a row."""
        part = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        ids = self.ids[part]
        return ids.tolist(), np.where(self.learned[part], ids, IGNORED).tolist()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return np.diff(self.offsets).tolist()


def load_samples(
    tokenizer: Any,
    files: Sequence[str],
    *,
    max_length: int,
    min_length: int = 0,
    seed: int = 42,
    cache: Path | None = None,
    progress: bool = False,
) -> Samples:
    """Tokenise the rows of ``files`` (each FILE or FILE[N]) in order.

    N rows are drawn from those that pass the length filter, in file order, with ``seed``.

    Args:
        tokenizer: with a chat template, if there are conversations.
        files: JSON Lines of ``text`` or ``conversations``.
        max_length, min_length: in tokens.
        seed: of the draws.
        cache: folder where the tokens are kept, so that the next run maps them instead; None = in memory only.
        progress: show a bar on stderr.

    Raises:
        ValueError: a bad row (file, line and field are named), too few rows for N, or none at all.
        OSError: a file cannot be read.
    """
    sources = [source(words) for words in files]
    if not sources:
        raise ValueError("there are no training files: name at least one")
    if missing := [path for path, _ in sources if not Path(path).is_file()]:
        raise FileNotFoundError(f"there is no file {missing[0]}")
    settings = {"max_length": max_length, "min_length": min_length, "seed": seed}
    place = None
    if cache is not None:
        prints = [[path, take, fingerprint(path)["sha256"]] for path, take in sources]
        words = json.dumps([_VERSION, prints, settings, _tokenizer_print(tokenizer)])
        place = cache / hashlib.sha256(words.encode()).hexdigest()[:16]
        if (place / "report.json").is_file():
            return _mapped(place)
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    report = {}
    for words, (path, take) in zip(files, sources, strict=True):
        kept, counts = _file_rows(tokenizer, path, max_length, min_length, progress)
        if take:
            if take > len(kept):
                raise ValueError(
                    f"{path}[{take}] asks for {take} rows, but only {len(kept)} pass the filters: {counts}"
                )
            kept = [kept[at] for at in sorted(random.Random(seed).sample(range(len(kept)), take))]
            counts["kept"] = take
        ids += [row for row, _ in kept]
        learned += [row for _, row in kept]
        report[words] = counts
    if not ids:
        raise ValueError(f"no row passes the filters ({min_length} to {max_length} tokens): {report}")
    offsets = np.cumsum([0, *map(len, ids)])
    samples = Samples(np.concatenate(ids), np.concatenate(learned), offsets, report)
    if place is not None:
        _store(samples, place)
    return samples


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return groups of rows whose lengths fit into ``room``: best fit, longest first, so that little is left empty.

    Raises:
        ValueError: a row does not fit alone.

    >>> packed([5, 3, 2, 6], 8)
    [[3, 2], [0, 1]]
    """
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, group), sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        if length > room:
            raise ValueError(f"row {row} has {length} tokens, more than the {room} of a packed row")
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            groups.append([row])
            left, group = room - length, len(groups) - 1
        else:
            left, group = free.pop(at)
            groups[group].append(row)
            left -= length
        bisect.insort(free, (left, group))
    return groups


def _file_rows(
    tokenizer: Any, path: str, max_length: int, min_length: int, progress: bool
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, int]]:
    """Tokenise one file; return (ids, learned) of the rows that pass, and counts."""
    kept = []
    counts = dict.fromkeys(("rows", "kept", "too long", "too short", "no targets"), 0)
    rows = read_rows(path, row_fault)
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(rows, desc=Path(path).name, unit="row", disable=None if progress else True, file=sys.stderr, leave=False)
    for number, row in bar:
        counts["rows"] += 1
        try:
            tokens = row_tokens(tokenizer, row, max_length)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if tokens is None:
            counts["too long"] += 1
        elif len(tokens.ids) < min_length:
            counts["too short"] += 1
        elif not tokens.targets:
            counts["no targets"] += 1
        else:
            counts["kept"] += 1
            kept.append((np.array(tokens.ids, np.int32), np.array(tokens.labels, np.int32) != IGNORED))
    return kept, counts


def _tokenizer_print(tokenizer: Any) -> str:
    """Return what changes when a tokeniser does: its words, its rules, its template and the tokens that it adds."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) if rules is None else rules.to_str()
    words = [vocabulary, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), str(begin(tokenizer))]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _store(samples: Samples, place: Path) -> None:
    """Write the arrays as a whole folder or not at all."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in ("ids", "learned", "offsets"):
            np.save(partial / f"{name}.npy", getattr(samples, name))
        (partial / "report.json").write_text(json.dumps(samples.report), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"the tokens could not be kept in {place.parent} ({error}): make room there") from error
    shutil.rmtree(place, ignore_errors=True)
    partial.replace(place)


def _mapped(place: Path) -> Samples:
    """Return the arrays of a folder, mapped into memory."""
    ids, learned, offsets = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ("ids", "learned", "offsets"))
    return Samples(ids, learned, offsets, json.loads((place / "report.json").read_text(encoding="utf-8")))
