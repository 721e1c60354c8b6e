"""Running a task: examples through an answerer into a results file that an interrupted run goes on from."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longllm.evals.task import Answer, Answerer, Example, Measuring, Row, Task, shard


class ResultsFile:
    """Rows of one run as JSON lines; the first line says what was run, and nothing else may be added to the file."""

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Open a file, or begin one.

        Raises:
            ValueError: the file belongs to another run, or is no results file.
            OSError: it cannot be read or written.
        """
        self.path, self.settings = Path(path), dict(settings)
        self.rows: dict[str, Row] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._take_up()
        else:
            self.path.write_text(json.dumps({"run": self.settings}, ensure_ascii=False) + "\n", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Write a row; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row.record(), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row.name] = row

    def _take_up(self) -> None:
        """Read what an earlier run has written; a last line that was cut off is dropped."""
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = whole.rstrip("\n").split("\n")
        try:
            begun = json.loads(lines[0])["run"]
            rows = [Row.of(json.loads(line)) for line in lines[1:]]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is no results file of an evaluation ({error}): choose another --out"
            ) from error
        if begun != self.settings:
            changed = sorted(
                name for name in begun.keys() | self.settings.keys() if begun.get(name) != self.settings.get(name)
            )
            raise ValueError(
                f"{self.path} was begun with another {changed[0]} ({begun.get(changed[0])!r}, now "
                f"{self.settings.get(changed[0])!r}): choose another --out, or delete it"
            )
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        self.rows = {row.name: row for row in rows}


def evaluate(
    task: Task,
    answerer: Answerer,
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    part: int = 0,
    parts: int = 1,
    limit: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Answer and score a task's examples; return the summary, which is also written as JSON.

    Rows go to ``<out>/<task>.jsonl`` one by one; a run that was interrupted goes on with the examples that have none.

    Args:
        task: what is asked.
        answerer: who answers.
        out: folder of the results.
        settings: what else distinguishes this run from others; it must be the same when the run goes on.
        part, parts: take every ``parts``-th example only, for several machines; ``joined`` puts the files together.
        limit: take only so many examples; 0 = all.
        progress: show a bar on stderr.

    Raises:
        ValueError: the results file belongs to another run.
    """
    facts = {"task": task.name, "answerer": answerer.name, "part": part, "parts": parts, **(settings or {})}
    ending = "" if parts == 1 else f".{part}-of-{parts}"
    results = ResultsFile(Path(out) / f"{task.name}{ending}.jsonl", facts)
    examples = list(shard(task.examples(answerer.tokenizer), part, parts))
    examples = examples[:limit] if limit else examples
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(examples, desc=task.name, disable=None if progress else True, file=sys.stderr, leave=False)
    for example in bar:
        if example.name in results.rows:
            continue
        answer, scores = asked(task, answerer, example)
        seen = {"tokens_seen": answer.tokens_seen, "tokens_cut": answer.tokens_cut, "seconds": answer.seconds}
        results.add(
            Row(example.name, answer.text, scores, example.references, {**example.facts, **seen, **answer.facts})
        )
    rows = [results.rows[example.name] for example in examples]
    return written(Path(out) / f"{task.name}{ending}.json", {**facts, "n": len(rows), **task.summarise(rows)})


def asked(task: Task, answerer: Answerer, example: Example) -> tuple[Answer, dict[str, float]]:
    """Return an answer and its scores: generated and scored, or measured where the task wants likelihoods."""
    if isinstance(task, Measuring):
        return task.measure(answerer, example)
    answer = answerer.generate(example)
    return answer, task.score(example, answer.text)


def joined(task: Task, out: str | os.PathLike[str], parts: int) -> dict[str, Any]:
    """Put the results of all parts together; return and write the summary.

    Raises:
        FileNotFoundError, ValueError: as ``rows_of``.
    """
    facts, rows = rows_of(task.name, out, parts)
    return written(Path(out) / f"{task.name}.json", {**facts, "n": len(rows), **task.summarise(rows)})


def rows_of(name: str, out: str | os.PathLike[str], parts: int = 1) -> tuple[dict[str, Any], list[Row]]:
    """Return the settings and the rows of a finished run, all its parts together, in the order of the data.

    Raises:
        FileNotFoundError: a part has no results.
        ValueError: parts were run with different settings.
    """
    found: list[list[Row]] = []
    facts: dict[str, Any] = {}
    for part in range(parts):
        path = Path(out) / (f"{name}.{part}-of-{parts}.jsonl" if parts > 1 else f"{name}.jsonl")
        if not path.is_file():
            raise FileNotFoundError(f"there are no results of part {part} of {parts}: {path} is missing")
        # Only "\n" ends a line of JSON: answers may hold other separators, which splitlines() would cut at.
        begun, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        own = {key: value for key, value in json.loads(begun)["run"].items() if key not in ("part", "parts")}
        if part and own != facts:
            other = next(key for key in {**own, **facts} if own.get(key) != facts.get(key))
            raise ValueError(
                f"{path} was run with another {other} ({own.get(other)!r}) than part 0 ({facts.get(other)!r}): "
                "run it again in another --out"
            )
        facts = own
        found.append([Row.of(json.loads(line)) for line in lines])
    # Parts took every so-manieth example in turn.
    rows = [row for turn in itertools.zip_longest(*found) for row in turn if row is not None]
    return facts, rows


def written(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write a summary as a whole file or not at all, and return it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return summary
