"""The tour's chapter on long documents: three questions about a speech, and passkeys hidden in 4,000 tokens."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import catalog
from commands.tour_page import Answer, Chapter, Plot, Table

SPEECH = "sotu/1963-kennedy"
DEPTHS = (10, 50, 90)
PASSKEY_TOKENS = 4096


@dataclass(frozen=True)
class Question:
    """A question, the word a right answer must hold, and the sentence of the speech that holds it."""

    text: str
    fact: str
    passage: str


QUESTIONS = (
    Question(
        "How many months of uninterrupted economic recovery has America enjoyed?",
        "22",
        "America has enjoyed 22 months of uninterrupted economic recovery.",
    ),
    Question(
        "Who gave his life over the island of Cuba?",
        "Rudolf Anderson",
        "We are proud, for example, of Major Rudolf Anderson who gave his life over the island of Cuba.",
    ),
    Question(
        "Whose words does the President quote about leaving fear astern?",
        "Thomas Jefferson",
        'We steer our ship with hope, as Thomas Jefferson said, "leaving Fear astern."',
    ),
)


def long_document(loaded: Any, out: Path) -> Generator[str, None, tuple[list[Chapter], list[dict[str, Any]]]]:
    """Ask, search, and write the plot into ``out``; yield what happens, return chapters and all runs as records."""
    from commands.tour_plot import bars

    asked, answers = yield from ask_speech(loaded)
    hidden, table = yield from find_passkeys(loaded)
    runs = [*asked, *hidden]
    shown = [
        (
            run["run"],
            f"{run['tokens_seen']:,}",
            f"{run['tokens_read_now']:,}",
            f"{run['time_to_first_token']:.2f} s",
            "-" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:.1f}",
            f"{run['kv_bytes'] / 1e6:.1f} MB",
        )
        for run in runs
    ]
    head = ("run", "tokens seen", "read now", "first token", "tokens/s", "KV cache")
    panels = {
        "seconds to the first token": [run["time_to_first_token"] for run in runs],
        "KV cache, MB": [run["kv_bytes"] / 1e6 for run in runs],
    }
    plot = bars([run["run"] for run in runs], panels, out / "runs")
    figures = Chapter(
        "What it cost",
        "Reading is the expensive part: it takes the same time whatever is asked, and the keys and values it leaves "
        "behind (the KV cache) grow with every token. Both are what this project is about.",
        [Table("Every run of this chapter", head, shown), Plot("The same runs", plot, ("runs.png", "runs.svg"))],
    )
    return [answers, table, figures], runs


def ask_speech(loaded: Any) -> Generator[str, None, tuple[list[dict[str, Any]], Chapter]]:
    """Read the speech once and ask the three questions; return the runs and the chapter."""
    import longllm
    from flashcore.hf import cache_bytes

    document = catalog.read_document(SPEECH)
    prompts = [longllm.document_prompt(loaded.tokenizer, document.text, question.text) for question in QUESTIONS]
    first = prompts[0]
    yield f"\nThree questions about a speech\n  {document.title} ({SPEECH}), {first.document_tokens:,} tokens\n"
    speech = longllm.prefill(loaded, first.ids[: first.shared], progress=True)
    rate = len(speech.ids) / speech.seconds
    yield f"  read once for all three questions: {speech.seconds:.1f} s, {rate:,.0f} tokens/s\n"
    reading = {
        "run": "reading the speech",
        "tokens_seen": len(speech.ids),
        "tokens_read_now": len(speech.ids),
        "time_to_first_token": speech.seconds,
        "tokens_per_second": None,
        "kv_bytes": cache_bytes(speech.cache),
    }
    runs, cards = [reading], []
    for number, (question, prompt) in enumerate(zip(QUESTIONS, prompts, strict=True), 1):
        yield f"\n  Q {question.text}\n  A "
        stream = longllm.stream(loaded, prompt.ids, longllm.Decoding(max_new_tokens=64), prefix=speech)
        yield from stream
        result = stream.result
        found = holds(result.text, question.fact)
        figures = _figures(result)
        yield f"\n    {'found' if found else 'not found'} | {figures}\n    the speech says: {question.passage}\n"
        cards.append(Answer(question.text, result.text, question.passage, found, figures))
        read_now = result.tokens_seen - len(speech.ids)
        runs.append(_record(f"question {number}", result, read_now, question=question.text, found=found))
    lead = (
        f"{document.title}: {first.document_tokens:,} tokens. The model read the speech once, in "
        f"{speech.seconds:.1f} seconds; each question went on from a copy of what it had kept of it, so that only the "
        "question itself was read. The answers are shown as they came. The model is a very small one: it looks facts "
        "up, and sometimes embroiders them; these three questions were picked from thirteen because it finds them, "
        "and most of the others, which need understanding, are beyond it."
    )
    return runs, Chapter("Three questions about a speech", lead, cards)


def find_passkeys(loaded: Any) -> Generator[str, None, tuple[list[dict[str, Any]], Chapter]]:
    """Hide a number at three depths in two kinds of text and ask for it; return the runs and the chapter."""
    import longllm
    from longllm.evals import passkey_cells, passkey_prompt, passkey_score

    length = min(PASSKEY_TOKENS, loaded.trained_length // 2)
    speech = catalog.read_document(SPEECH).text
    texts = {"noise": None, "speech": speech}
    yield f"\nA passkey hidden in {length:,} tokens\n"
    yield f"  {'hidden in':<10} {'depth':>6}  {'key':<6} {'':<10} answer\n"
    runs, rows = [], []
    cells = list(passkey_cells([length] * len(texts), DEPTHS))
    for (name, haystack), cell in zip([text for text in texts.items() for _ in DEPTHS], cells, strict=True):
        prompt = passkey_prompt(loaded.tokenizer, cell, haystack)
        ids = longllm.chat_prompt(loaded.tokenizer, prompt.ids)
        yield f"  {name:<10} {cell.depth:>5.0f}%  {cell.key:<6} "
        result = longllm.stream(loaded, ids, longllm.Decoding(max_new_tokens=24), progress=True).result
        found = passkey_score(result.text, cell.key).correct
        verdict = "found" if found else "not found"
        answer = " ".join(result.text.split())
        yield f"{verdict:<10} {answer}\n"
        rows.append((name, f"{cell.depth:.0f}%", cell.key, verdict, answer))
        title = f"passkey in {name}, {cell.depth:.0f}%"
        runs.append(_record(title, result, result.tokens_seen, key=cell.key, depth=cell.depth, found=found))
    lead = (
        f"A five-digit number is stated twice in a row in {length:,} tokens of text, at 10, 50 and 90 per cent of the "
        "way: once among noise sentences repeated without end, once in the middle of the speech. Then the model is "
        "asked for it. Full attention keeps everything, so what is missed here is missed by the model, not by its "
        "memory; the speech is the harder text, for it has numbers of its own. The wording of the question is the "
        "best of nine that were tried on such texts."
    )
    head = ("hidden in", "depth", "key", "verdict", "answer")
    return runs, Chapter("A passkey hidden at three depths", lead, [Table("Six passkeys", head, rows, prose="answer")])


def holds(answer: str, fact: str) -> bool:
    """Tell whether an answer states a fact, as whole words.

    >>> holds("It was 22 months.", "22"), holds("It was 1922.", "22")
    (True, False)
    """
    return re.search(rf"\b{re.escape(fact)}\b", answer, re.IGNORECASE) is not None


def _figures(result: Any) -> str:
    """Return the speed of one answer in words."""
    speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s"
    return f"first token after {result.time_to_first_token:.2f} s{speed}"


def _record(run: str, result: Any, read_now: int, **facts: Any) -> dict[str, Any]:
    """Return everything known about one run."""
    figures = asdict(result)
    return {"run": run, **facts, "answer": figures.pop("text"), "tokens_read_now": read_now, **figures}
