"""From a corpus to a file of requests: what is sent about which part of which text, all of it settled beforehand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longllm.synthesis.chunk import chunks, count_tokens
from longllm.synthesis.cluster import Embed, clusters, side_groups
from longllm.synthesis.corpus import Fitness, SourceText, abstract_first, read_corpus, sift
from longllm.synthesis.prompts import FAMILIES, PAPER_QUESTIONS, Family, asked, prompt, side_by_side

#: questions asked for by default
_QUESTIONS: dict[Family, int] = {"single": 4, "multi": 10, "paper": len(PAPER_QUESTIONS), "cluster": 6, "biography": 1}
#: the path that batch services want on each line
_SERVICE = "/v1/chat/completions"


@dataclass(frozen=True)
class Recipe:
    """What is asked about a corpus.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Recipe("single").asks
    4
    """

    family: Family = "single"
    """single: every chunk of each text; multi, paper, biography: each text whole; cluster: several side by side"""
    take: int = 0
    """how many texts to draw; 0 = all that are fit"""
    questions: int = 0
    """how many questions a request asks for; 0 = 4 (single), 10 (multi), 6 (cluster); papers have their six"""
    chunk: int = 4096
    """tokens of a chunk (single)"""
    context: int = 64_000
    """most tokens of texts side by side (cluster)"""
    abstract: bool = False
    """move the abstract of each text to its front"""
    seed: int = 2024
    """of the draw and the clusters"""
    model: str = ""
    """name of the model on each line, which batch services want; the command that sends them fills it in otherwise"""
    max_answer: int = 4096
    """most tokens of an answer"""
    schema: bool = True
    """ask for the JSON form by a schema too, where the server can hold a model to it"""
    service: bool = False
    """write the lines as batch services want them"""

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        for name, least in (("take", 0), ("questions", 0), ("chunk", 1), ("context", 1), ("max_answer", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.family == "paper" and self.questions not in (0, len(PAPER_QUESTIONS)):
            raise ValueError(f"papers are asked {len(PAPER_QUESTIONS)} set questions, got questions={self.questions}")

    @property
    def asks(self) -> int:
        """Return how many questions a request asks for."""
        return self.questions or _QUESTIONS[self.family]


@dataclass(frozen=True)
class Context:
    """The part of the corpus that a request is about: characters [start, end) of one text, or texts side by side.

    >>> Context("single-0-1", (0,), 10, 14, 2).of([SourceText("a", "Call me Ishmael, …")])
    'hmae'
    """

    custom_id: str
    documents: tuple[int, ...]
    start: int
    end: int
    tokens: int

    def of(self, texts: Sequence[SourceText]) -> str:
        """Return the text itself."""
        if len(self.documents) > 1:
            return side_by_side((texts[number].name, texts[number].text) for number in self.documents)
        return texts[self.documents[0]].text[self.start : self.end]


def contexts(
    texts: Sequence[SourceText], recipe: Recipe, tokenizer: Any, embed: Embed | None = None
) -> Iterator[Context]:
    """Yield what the requests of a recipe are about; ids say family, text and place.

    Raises:
        ValueError: too few texts to put side by side.
        ImportError: a package of ``longscope[synth]`` is not installed.

    >>> found = contexts([SourceText("a", "One two. Three four.")], Recipe("single", chunk=2), lambda t: len(t.split()))
    >>> [(context.custom_id, context.start, context.end, context.tokens) for context in found]
    [('single-0-0', 0, 9, 2), ('single-0-1', 9, 20, 2)]
    """
    if recipe.family == "cluster":
        yield from _clustered(texts, recipe, tokenizer, embed)
        return
    for number, text in enumerate(texts):
        if recipe.family != "single":
            tokens = count_tokens(tokenizer, text.text)
            yield Context(f"{recipe.family}-{number}", (number,), 0, len(text.text), tokens)
            continue
        start = 0
        for section, chunk in enumerate(chunks(text.text, recipe.chunk, tokenizer)):
            end = start + len(chunk)
            yield Context(f"single-{number}-{section}", (number,), start, end, count_tokens(tokenizer, chunk))
            start = end


def _clustered(texts: Sequence[SourceText], recipe: Recipe, tokenizer: Any, embed: Embed | None) -> Iterator[Context]:
    """Yield groups of related texts."""
    lengths = [count_tokens(tokenizer, text.text) for text in texts]
    groups: list[list[int]] = []
    if sum(sorted(lengths)[:2]) <= recipe.context and len(texts) > 1:
        # On average a cluster holds two contexts, so that its texts are close and little is left over.
        number = max(1, min(len(texts) // 4, sum(lengths) // (2 * recipe.context)))
        labels = clusters([text.text for text in texts], number, embed, recipe.seed)
        groups = side_groups(labels, lengths, recipe.context, recipe.seed)
    if not groups:
        raise ValueError(
            f"no two of the {len(texts)} texts fit into a context of {recipe.context:,} tokens: allow more (context), "
            "or take shorter texts"
        )
    for place, group in enumerate(groups):
        tokens = count_tokens(tokenizer, side_by_side((texts[one].name, texts[one].text) for one in group))
        yield Context(f"cluster-{place}", tuple(group), 0, 0, tokens)


def body(recipe: Recipe, context: str) -> dict[str, Any]:
    """Return the chat-completions body that asks about a context.

    >>> body(Recipe("single", schema=False), "Call me Ishmael.")["temperature"]
    0
    """
    settings: dict[str, Any] = {"temperature": 0, "top_p": 1.0, "max_tokens": recipe.max_answer}
    if recipe.model:
        settings = {"model": recipe.model, **settings}
    if recipe.schema:
        settings["response_format"] = asked(recipe.family).response_format
    return {"messages": [{"role": "user", "content": prompt(recipe.family, context, recipe.asks)}], **settings}


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    tokenizer: Any,
    *,
    fitness: Fitness | None = None,
    exclude: Iterable[str | os.PathLike[str]] = (),
    embed: Embed | None = None,
    tokenizer_name: str = "",
) -> dict[str, Any]:
    """Write ``documents.jsonl``, ``contexts.jsonl``, ``requests.jsonl`` and, last, ``recipe.json`` into a folder.

    A folder that holds the requests of the same recipe is left as it is.

    Args:
        source: as ``read_corpus`` takes it.
        out: the folder.
        recipe: what to ask.
        tokenizer: of ``token_counter``, or a function that counts.
        fitness: which texts are fit.
        exclude: folders of other stages, none of whose texts is taken again.
        embed: gives vectors for the clusters.
        tokenizer_name: what ``assemble`` will take it from again.

    Raises:
        ValueError: the folder holds another recipe's requests, or too few texts are fit.
        OSError: something cannot be read or written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     book = Path(folder, "book.txt")
    ...     _ = book.write_text("Call me Ishmael.")
    ...     report = prepare(book, folder, Recipe("multi", questions=2), lambda text: len(text.split()))
    >>> report["documents"], report["requests"], report["context_tokens"]
    (1, 1, 3)
    """
    folder, fitness = Path(out), fitness or Fitness()
    used = sorted({row["digest"] for other in exclude for row in rows_of(Path(other) / "documents.jsonl")})
    settings: dict[str, Any] = {"source": os.fspath(source), "recipe": asdict(recipe), "fitness": asdict(fitness)}
    settings |= {"tokenizer": tokenizer_name, "excluded": len(used)}
    done = folder / "recipe.json"
    if done.exists():
        report = json.loads(done.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if report.get(name) != value]
        if changed:
            raise ValueError(
                f"{folder} holds the requests of another {changed[0]}: choose another folder, or delete it"
            )
        return dict(report)
    originals, others = sift(
        lambda: read_corpus(source), lambda text: count_tokens(tokenizer, text), fitness,
        take=recipe.take, seed=recipe.seed, exclude=set(used),
    )  # fmt: skip
    drawn = [SourceText(text.name, abstract_first(text.text)) for text in originals] if recipe.abstract else originals
    folder.mkdir(parents=True, exist_ok=True)
    found = list(contexts(drawn, recipe, tokenizer, embed))
    # The digest is the original's, by which another stage knows it.
    documents = (
        {"name": text.name, "digest": original.digest, "text": text.text}
        for text, original in zip(drawn, originals, strict=True)
    )
    write_rows(folder / "documents.jsonl", documents)
    write_rows(folder / "contexts.jsonl", map(asdict, found))
    write_rows(folder / "requests.jsonl", (_line(recipe, context, drawn) for context in found))
    counts = {"documents": len(drawn), "left_out": dict(others), "requests": len(found)}
    report = {**settings, **counts, "context_tokens": sum(context.tokens for context in found)}
    write_whole(done, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _line(recipe: Recipe, context: Context, texts: Sequence[SourceText]) -> dict[str, Any]:
    """Return the line of a request."""
    asks = body(recipe, context.of(texts))
    if recipe.service:
        return {"custom_id": context.custom_id, "method": "POST", "url": _SERVICE, "body": asks}
    return {"custom_id": context.custom_id, **asks}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that a stage has written whole.

    Raises:
        FileNotFoundError: the stage was not run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: longscope synth requests writes it")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON Lines, the whole file or nothing; return how many."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in rows:
            count += 1
            yield json.dumps(row, ensure_ascii=False) + "\n"

    write_whole(path, lines())
    return count


def write_whole(path: Path, pieces: Iterable[str]) -> None:
    """Write a file such that nobody ever sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
