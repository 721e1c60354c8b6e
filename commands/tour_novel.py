"""The tour's chapter on a whole novel: read once into a cache of fixed size, asked for planted facts and its plot."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import catalog
from commands.tour_long_document import holds
from commands.tour_page import Answer, Chapter, Plot, Table

NOVEL = "moby-dick"
#: full attention is measured up to here; what it would need for the whole novel is computed from these runs
FULL_TOKENS = 16_384


@dataclass(frozen=True)
class Planted:
    """A sentence that is not in the novel, where it is put, and the question it answers."""

    sentence: str
    depth: int
    """per cent of the novel before it"""
    question: str
    fact: str


PLANTED = (
    Planted(
        "The pass key is 48213. Remember it. 48213 is the pass key.",
        10,
        "What are the digits of the pass key?",
        "48213",
    ),
    Planted(
        "Maria's favourite colour is turquoise, and she paints everything turquoise.",
        50,
        "What is Maria's favourite colour?",
        "turquoise",
    ),
    Planted(
        "The best thing to do in San Francisco is to eat a sandwich and sit in Dolores Park on a sunny day.",
        90,
        "What is the best thing to do in San Francisco?",
        "Dolores Park",
    ),
)


@dataclass(frozen=True)
class PlotQuestion:
    """A question of the plot, a word that a right answer must hold, and the novel's own words (spaces aside)."""

    question: str
    fact: str
    passage: str


PLOT = (
    PlotQuestion(
        "Who is the captain of the Pequod?",
        "Ahab",
        "Aye, aye, I thought so. Captain Ahab is the Captain of this ship.",
    ),
    PlotQuestion(
        "What does Ahab nail to the mast for the man who first sees the white whale?",
        "ounce|doubloon|gold|coin",
        "Look ye! d’ye see this Spanish ounce of gold?",
    ),
    PlotQuestion(
        "With whom does Ishmael share a bed at the Spouter-Inn?",
        "harpooneer|Queequeg",
        "you haint no objections to sharing a harpooneer’s blanket, have ye?",
    ),
)


def novel(loaded: Any, out: Path, tokens: int = 0) -> Generator[str, None, tuple[list[Chapter], list[dict[str, Any]]]]:
    """Read the novel or go on from the last run's cache, ask, and draw the plot into ``out``.

    Args:
        loaded: the model.
        out: where the cache and the plot are kept.
        tokens: read only so many tokens of the novel; 0 = all.

    Returns:
        Chapters and all runs as records.
    """
    import beacon
    import longllm
    from commands.ask_plan import Wish, decide
    from commands.reading import Keep, read_text

    ids, own = planted_novel(loaded.tokenizer, tokens)
    questions = [planted.question for planted in PLANTED] + [plot.question for plot in PLOT]
    asked = [longllm.question_ids(loaded.tokenizer, question) for question in questions]
    total = len(ids) + max(map(len, asked))
    plan = decide(Wish(), total, loaded.trained_length)
    title = catalog.read_document(NOVEL).title
    yield f"\nA whole novel\n  {title}, {own:,} tokens, {plan}\n"
    facts = {"document": NOVEL, "title": title, "document_tokens": own}
    reading = read_text(loaded, ids, plan, asked, Keep(str(out / "novel.kv")), facts, total)
    seconds = reading.notes["progress"][-1][1]
    account = reading.prefix.cache.ledger()
    before = "read in an earlier run" if reading.resumed == len(ids) else "read once for all questions"
    yield f"  {before}: {seconds:,.0f} s, {len(ids) / seconds:,.0f} tokens/s\n"
    yield "".join(f"  {line}\n" for line in str(account).splitlines())
    with beacon.compressing(loaded.model):
        chapter, runs = yield from _ask(loaded, ids, reading.prefix, asked)
    full = yield from _full_attention(loaded, ids)
    cost = _cost(out, reading.notes["progress"], full, account)
    lead = (
        f"{title}, {own:,} tokens of it, and three sentences that are not in the novel, planted at "
        f"{', '.join(str(planted.depth) for planted in PLANTED)} per cent. The model was trained on texts of up to "
        f"{loaded.trained_length:,} tokens. It read the novel once, in {seconds:,.0f} seconds, into a cache that "
        f"holds {max(account.layers[0].slots):,} slots a layer after each chunk ({plan}); the six questions "
        "below were held against every chunk and chose what stayed. The answers are shown as they came. Looking up "
        "a planted sentence "
        "is what compression must not break (the three were picked from six that the method was tried on in shorter "
        "texts); questions of plot need more understanding than a model of this size has."
    )
    chapter = Chapter("A whole novel", lead, chapter.blocks)
    summary = {"run": "reading the novel", "tokens_seen": len(ids), "seconds": seconds, "ledger": account.record()}
    summary |= {"progress": reading.notes["progress"], "full_attention": full}
    return [chapter, cost], [summary, *runs]


def planted_novel(tokenizer: Any, tokens: int = 0) -> tuple[tuple[int, ...], int]:
    """Return the prompt ids of the novel with the planted sentences, up to the question, and the novel's own length."""
    from longllm.prompts import AFTER_DOCUMENT, chat_frame, encode

    body = encode(tokenizer, catalog.read_document(NOVEL).text.strip())
    body = body[: tokens or None]
    head, _ = chat_frame(tokenizer)
    ids, done = list(head), 0
    for planted in PLANTED:
        place = len(body) * planted.depth // 100
        ids += body[done:place] + encode(tokenizer, f"\n\n{planted.sentence}\n\n")
        done = place
    return (*ids, *body[done:], *encode(tokenizer, AFTER_DOCUMENT)), len(body)


def _ask(
    loaded: Any, ids: tuple[int, ...], prefix: Any, asked: Sequence[list[int]]
) -> Generator[str, None, tuple[Chapter, list[dict[str, Any]]]]:
    """Ask the planted facts, then the plot, each on its own copy of the cache."""
    import longllm

    wanted = [(planted.question, planted.fact, planted.sentence, f"planted at {planted.depth}%") for planted in PLANTED]
    wanted += [(plot.question, plot.fact, plot.passage, "plot") for plot in PLOT]
    cards, runs = [], []
    for (question, fact, passage, kind), own in zip(wanted, asked, strict=True):
        yield f"\n  Q {question}\n  A "
        stream = longllm.stream(loaded, (*ids, *own), longllm.Decoding(max_new_tokens=48), prefix=prefix)
        yield from stream
        result = stream.result
        found = any(holds(result.text, word) for word in fact.split("|"))
        figures = f"{kind}, first token after {result.time_to_first_token:.2f} s"
        yield f"\n    {'found' if found else 'not found'} | {figures}\n"
        cards.append(Answer(question, result.text, passage, found, figures))
        record = asdict(result)
        runs.append(
            {"run": f"novel: {kind}", "question": question, "answer": record.pop("text"), "found": found, **record}
        )
    return Chapter("", "", cards), runs


def _full_attention(loaded: Any, ids: Sequence[int]) -> Generator[str, None, list[list[float]]]:
    """Read the beginning with full attention; return [tokens, seconds, KV bytes] after each chunk.

    The bytes are those in use: the cache reserves room for the whole at once.
    """
    import longllm
    from flashcore.hf import cache_bytes

    most = min(FULL_TOKENS, len(ids))
    yield f"\n  the same with full attention, up to {most:,} tokens\n"
    points: list[list[float]] = []
    begun = time.perf_counter()
    prefix = longllm.prefill(
        loaded,
        ids[:most],
        progress=True,
        after_chunk=lambda done: points.append([done, round(time.perf_counter() - begun, 3)]),
    )
    yield f"    {points[-1][1]:.1f} s, {cache_bytes(prefix.cache) / 1e6:,.1f} MB\n"
    per_token = cache_bytes(prefix.cache) / most
    return [[done, seconds, done * per_token] for done, seconds in points]


def _cost(out: Path, progress: Sequence[Sequence[float]], full: Sequence[Sequence[float]], account: Any) -> Chapter:
    """Return the chapter that compares time and memory with full attention."""
    from commands.tour_plot import curves

    tokens = account.tokens_seen[0]
    # Reading n tokens costs a n + b n^2 with full attention: two points give a and b.
    (n, t), (m, s) = (point[:2] for point in (full[len(full) // 2], full[-1]))
    square = max(0.0, (s / m - t / n) / (m - n)) if m > n else 0.0
    linear = s / m - square * m
    whole = linear * tokens + square * tokens**2
    per_token = account.full_bytes / tokens
    held = account.nbytes / 1e6
    ahead = [full[-1][0], *(point for point in (2**k for k in range(10, 20)) if full[-1][0] < point < tokens), tokens]
    panels = {
        "seconds of reading": {
            "compressed, measured": [(point[0], point[1]) for point in progress],
            "full attention, measured": [(point[0], point[1]) for point in full],
            "full attention, computed": [(n, linear * n + square * n * n) for n in ahead],
        },
        "KV cache, MB": {
            "compressed, measured": [(point[0], point[2] / 1e6) for point in progress],
            "full attention, measured": [(point[0], point[2] / 1e6) for point in full],
            "full attention, computed": [(n, n * per_token / 1e6) for n in ahead],
        },
    }
    svg = curves(panels, "tokens read", out / "novel")
    held_full = f"{account.full_bytes / 1e6:,.1f} MB"
    peak = f"{account.peak_bytes / 1e6:,.1f} MB"
    rows = [
        ("compressed, measured", f"{tokens:,}", f"{progress[-1][1]:,.0f} s", f"{held:,.1f} MB", peak),
        ("full attention, measured", f"{m:,}", f"{s:,.0f} s", f"{full[-1][2] / 1e6:,.1f} MB", "the same"),
        ("full attention, computed", f"{tokens:,}", f"{whole:,.0f} s", held_full, "the same"),
    ]
    lead = (
        "Full attention looks from every token at every earlier one and keeps them all: its time grows with the square "
        "of the length, its memory with the length. The compressed reading costs the same for every chunk. Full "
        f"attention was measured up to {full[-1][0]:,} tokens; what it would take for the novel is computed from that, "
        "and beyond the trained length its answers would be of no use anyway."
    )
    head = ("reading", "tokens", "time", "KV cache", "at most")
    plot = Plot("Time and memory of reading", svg, ("novel.png", "novel.svg"))
    return Chapter("What the novel cost", lead, [Table("Two ways to read", head, rows), plot])
