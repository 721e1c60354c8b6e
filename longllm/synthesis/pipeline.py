"""From results to training data: every request is accounted for, as used or as dropped for a reason."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longllm.batch import read_results
from longllm.conversations import row_fault
from longllm.replies import reply_text
from longllm.synthesis.chunk import count_tokens
from longllm.synthesis.corpus import SourceText
from longllm.synthesis.dialogues import Assembly, arranged, regroup, row
from longllm.synthesis.parse import parse_pairs
from longllm.synthesis.prompts import Family, asked
from longllm.synthesis.requests import Context, rows_of, write_rows, write_whole

#: what of a useless answer is kept for people to look at, in characters
_SHOWN = 300


@dataclass
class _Account:
    """What became of every request and pair."""

    outcome: dict[str, str] = field(default_factory=dict)
    """custom_id -> why it was dropped, "" if it is used"""
    answers: dict[str, str] = field(default_factory=dict)
    """the beginning of the answers that were dropped"""
    problems: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """custom_id -> why pairs of it were dropped"""
    used: int = 0
    """pairs in the data"""
    beyond: int = 0
    """pairs left out because a conversation has enough of them"""
    rows: list[int] = field(default_factory=list)
    """tokens of each row"""


@dataclass(frozen=True)
class _Part:
    """A context and its pairs."""

    context: Context
    pairs: tuple[tuple[str, str], ...]


def assemble(
    folder: str | os.PathLike[str],
    tokenizer: Any,
    settings: Assembly | None = None,
    *,
    results: str | os.PathLike[str] = "",
    out: str | os.PathLike[str] = "",
) -> dict[str, Any]:
    """Make ``train.jsonl`` from the requests and results in a folder; return the report, also written as JSON.

    ``dropped.jsonl`` says which requests gave nothing and why; ``used`` and ``dropped`` of the report add up to
    ``requests``. Can be run at any time, also while results are still coming in, and again with other settings.

    Args:
        folder: where ``prepare`` wrote its files.
        tokenizer: of ``token_counter``, or a function that counts.
        settings: of the conversations.
        results: the results file; ``results.jsonl`` in the folder unless given.
        out: the training file; ``train.jsonl`` in the folder unless given.

    Raises:
        ValueError: the results file is damaged.
        OSError: a file is missing or cannot be written.

    >>> import pathlib, tempfile
    >>> from longllm.synthesis import Recipe, prepare
    >>> words = lambda text: len(text.split())
    >>> reply = '[{"question": "Who?", "answer": "Ishmael"}]'
    >>> result = {"custom_id": "single-0-0", "response": {"choices": [{"message": {"content": reply}}]}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     book = pathlib.Path(folder, "book.txt")
    ...     _ = book.write_text("Call me Ishmael.")
    ...     _ = prepare(book, folder, Recipe("single"), words)
    ...     _ = pathlib.Path(folder, "results.jsonl").write_text(json.dumps(result))
    ...     report = assemble(folder, words)
    >>> report["rows"], report["requests"], report["used"], report["pairs"]
    (1, 1, 1, 1)
    """
    folder, settings = Path(folder), settings or Assembly()
    file, target = Path(results or folder / "results.jsonl"), Path(out or folder / "train.jsonl")
    if not file.is_file():
        raise FileNotFoundError(f"there are no results {file}: longscope synth run writes them")
    texts = [SourceText(line["name"], line["text"]) for line in rows_of(folder / "documents.jsonl")]
    wanted = [Context(**{**line, "documents": tuple(line["documents"])}) for line in rows_of(folder / "contexts.jsonl")]
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    family: Family = recipe["family"]
    account = _Account()
    parts, strangers = _read(file, wanted, family, account)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(target, _rows(texts, parts, family, settings, tokenizer, account))
    dropped = {name: reason for name, reason in account.outcome.items() if reason}
    beside = target.with_suffix(".dropped.jsonl") if out else folder / "dropped.jsonl"
    write_rows(
        beside,
        (
            {"custom_id": name, "reason": reason, "answer": account.answers.get(name, "")}
            for name, reason in dropped.items()
        ),
    )
    faults = Counter(problem for found in account.problems.values() for problem in found)
    faults["enough questions"] += account.beyond
    report = {
        "file": str(target), "family": family, "rows": len(account.rows), "tokens": sum(account.rows),
        "shortest": min(account.rows, default=0), "longest": max(account.rows, default=0),
        "requests": len(wanted), "used": len(wanted) - len(dropped), "dropped": dict(Counter(dropped.values())),
        "pairs": account.used, "pairs_dropped": dict(+faults), "unknown_results": strangers,
    }  # fmt: skip
    named = target.with_suffix(".report.json") if out else folder / "report.json"
    write_whole(named, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _read(file: Path, wanted: Sequence[Context], family: Family, account: _Account) -> tuple[dict[str, _Part], int]:
    """Return the parts by id, and how many results belong to no request; note what cannot be used."""
    form = asked(family)
    parts = {context.custom_id: _Part(context, ()) for context in wanted}
    account.outcome.update(dict.fromkeys(parts, "not answered"))
    strangers = 0
    for name, record in read_results(file):
        if name not in parts:
            strangers += 1
        elif "response" not in record:
            # An earlier or later answer to the same request is worth more than a failure.
            if not parts[name].pairs:
                account.outcome[name] = "request failed"
                account.answers[name] = "; ".join(map(str, record["errors"]))[:_SHOWN]
        else:
            text = reply_text(record["response"])
            cut = record["response"]["choices"][0].get("finish_reason") == "length"
            parsed = parse_pairs(text, form.first, form.second, cut_off=cut)
            parts[name] = _Part(parts[name].context, parsed.pairs)
            whole = next((problem for problem in parsed.problems if problem in ("empty", "no JSON")), "")
            account.outcome[name] = "" if parsed.pairs else whole or "no usable pair"
            account.answers[name] = text[:_SHOWN]
            account.problems[name] = () if whole else parsed.problems
    return parts, strangers


def _rows(
    texts: Sequence[SourceText],
    parts: Mapping[str, _Part],
    family: Family,
    settings: Assembly,
    tokenizer: Any,
    account: _Account,
) -> Iterator[dict[str, Any]]:
    """Yield the rows; what is dropped is noted."""
    for group in _groups(list(parts.values()), family, settings.target):
        found = [pair for part in group for pair in part.pairs]
        if not found:
            continue
        first, last = group[0].context, group[-1].context
        context = Context(first.custom_id, first.documents, first.start, last.end, 0).of(texts)
        pairs = arranged(family, found, settings, first.custom_id)
        tokens = sum(part.context.tokens for part in group)
        tokens += sum(count_tokens(tokenizer, text) for pair in pairs for text in pair)
        source = [texts[number].name for number in first.documents]
        made = row(context, pairs, family=family, source=source, id=first.custom_id, tokens=tokens)
        fault = _fault(made, tokens, settings)
        if fault:
            for part in group:
                if not account.outcome[part.context.custom_id]:
                    account.outcome[part.context.custom_id] = fault
            continue
        account.rows.append(tokens)
        account.used += len(pairs)
        account.beyond += len(found) - len(pairs)
        yield made


def _groups(parts: Sequence[_Part], family: Family, target: int) -> Iterator[Sequence[_Part]]:
    """Yield the parts that make a conversation: consecutive chunks of a text, or each context alone."""
    if family != "single":
        yield from ([part] for part in parts)
        return
    documents: dict[int, list[_Part]] = {}
    for part in parts:
        documents.setdefault(part.context.documents[0], []).append(part)
    for chunks in documents.values():
        for run in regroup([part.context.tokens for part in chunks], target):
            yield chunks[run.start : run.stop]


def _fault(made: Mapping[str, Any], tokens: int, settings: Assembly) -> str:
    """Return why a row is dropped, "" if it is kept."""
    if tokens < settings.least:
        return "conversation too short"
    if settings.most and tokens > settings.most:
        return "conversation too long"
    return row_fault(made) or ""
