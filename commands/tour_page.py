"""The tour's page: chapters of answers, tables and plots as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Answer:
    """A question, what the model answered, and what it should have found."""

    question: str
    answer: str
    passage: str
    """the sentence of the document that holds the answer"""
    found: bool
    figures: str


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: str = ""
    """the head of a column that holds sentences: set left and broken into lines"""


@dataclass(frozen=True)
class Plot:
    """A plot as SVG text, and the files beside the page that hold it and its numbers."""

    caption: str
    svg: str
    files: Sequence[str]


@dataclass(frozen=True)
class Chapter:
    """One part of the tour: what was done, and what came out."""

    title: str
    lead: str
    blocks: Sequence[Answer | Table | Plot]


STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #5b6577; --line: #d9dee7; --page: #fbfbfd; --card: #fff;
  --good: #17703f; --bad: #a8321f; --mark: #2457c5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf1; --dim: #9aa5b8; --line: #323a49; --page: #12161e;
  --card: #1a202b; --good: #6fd39a; --bad: #ff9b88; --mark: #8fb2ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 50rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0 .3rem; } h2 { font-size: 1.35rem; margin: 2.8rem 0 .4rem; }
p { margin: .5rem 0; } a { color: var(--mark); } .dim, figcaption, caption { color: var(--dim); font-size: .9rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem;
  margin: 1rem 0; } article h3 { font-size: 1rem; margin: 0 0 .3rem; } article p.answer { font-size: 1.1rem; }
blockquote { margin: .6rem 0; padding-left: .8rem; border-left: 3px solid var(--line); color: var(--dim); }
.good, .bad { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; padding-bottom: .4rem; } td, th { padding: .35rem .7rem .35rem 0; text-align: right;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, .prose { text-align: left; }
td.prose { white-space: normal; min-width: 13rem; } thead th { color: var(--dim); font-weight: 600; }
figure { margin: 1.2rem 0; } figure svg { display: block; width: 100%;
  min-width: 36rem; height: auto; color: var(--ink); }
pre, code { font-family: ui-monospace, monospace; font-size: .88rem; } dd { margin: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem;
  overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .92rem; }
dt { color: var(--dim); }
"""


def render(title: str, lead: str, facts: dict[str, str], chapters: Sequence[Chapter], commands: Sequence[str]) -> str:
    """Return the page as one HTML document without anything to load.

    Args:
        title: the heading.
        lead: one paragraph under it.
        facts: what was run where, shown as a list.
        chapters: the parts, in order.
        commands: command lines for the reader to try next.

    >>> "<h2>Reading</h2>" in render("Tour", "", {}, [Chapter("Reading", "We read.", [])], [])
    True
    """
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p><dl>{listed}</dl></header><main>",
        *(_chapter(chapter) for chapter in chapters),
        "<section><h2>Your turn</h2><pre>",
        escape("\n".join(commands)),
        "</pre></section></main>",
        '<footer class="dim"><p>Every number of this page is in <a href="tour.json">tour.json</a>.</p></footer>',
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _chapter(chapter: Chapter) -> str:
    """Return a chapter as a section."""
    show = {Answer: _answer, Table: _table, Plot: _plot}
    blocks = "\n".join(show[type(block)](block) for block in chapter.blocks)  # type: ignore[operator]
    return f"<section><h2>{escape(chapter.title)}</h2><p>{escape(chapter.lead)}</p>\n{blocks}</section>"


def _answer(block: Answer) -> str:
    """Return an answer as a card: question, answer, what the document says, figures."""
    mark = '<span class="good">found</span>' if block.found else '<span class="bad">not found</span>'
    return (
        f'<article><h3>{escape(block.question)}</h3><p class="answer">{escape(block.answer)}</p>'
        f"<blockquote>The document says: {escape(block.passage)}</blockquote>"
        f'<p class="dim">{mark} | {escape(block.figures)}</p></article>'
    )


def _table(block: Table) -> str:
    """Return a table; cells that say found or not found are coloured."""
    verdicts = {"found": ' class="good"', "not found": ' class="bad"'}
    looks = [' class="prose"' if name == block.prose else "" for name in block.head]
    head = "".join(f'<th scope="col"{look}>{escape(name)}</th>' for name, look in zip(block.head, looks, strict=True))
    rows = []
    for first, *others in block.rows:
        pairs = zip(others, looks[1:], strict=True)
        cells = "".join(f"<td{verdicts.get(cell, look)}>{escape(cell)}</td>" for cell, look in pairs)
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0"><table><caption>{escape(block.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _plot(block: Plot) -> str:
    """Return a plot drawn in place, with links to its files."""
    links = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in block.files)
    caption = f"<figcaption>{escape(block.caption)} ({links})</figcaption>"
    return f'<figure><div class="wide" tabindex="0">{block.svg}</div>{caption}</figure>'
