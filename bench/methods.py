"""KV compression methods at equal bytes: what each still finds in a long text, how fast, and in how much memory.

    python -m bench.methods                        4K to 32K tokens, ten rows each; about an hour on two cores
    python -m bench.methods --budget-minutes 60    leave out what would not be done in an hour; run again to go on
    python -m bench.methods --quick                1K tokens, three methods, to see that it works

Labelled pass keys ("the red door") stand at several depths of one text, which is read once; each question is asked on a
copy of the cache. A small model confuses the labels even when it sees everything, so the right key and any planted key
count apart. Every cell (method and length) is a process of its own; those that are done are kept in
``out/bench/methods.jsonl`` and not measured again. A summary (``methods.json``) and plots are written beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import beacon
import catalog
import longllm
from bench.cells import WARM, Row, command_line, digest, left_out_lines, measure_in, peak_memory, run
from bench.cells import append_row as append_row
from bench.cells import collect as collect
from bench.cells import from_process as from_process
from bench.cells import predicted_seconds as predicted_seconds
from bench.cells import read_rows as read_rows
from bench.timing import environment
from flashcore.hf import cache_bytes
from longllm.evals import passkey_cells, passkey_score
from longllm.evals.passkey import NOISE
from longllm.prompts import chat_frame, encode

#: row of the table -> method, and whether it is told the questions beforehand; beacons, which need a whole window and
#: training, have a bench of their own
METHODS = {name: (name, False) for name in beacon.METHODS}
METHODS |= {f"{name}, question known": (name, True) for name in ("snapkv", "spotlight")}
LENGTHS = [4096, 8192, 16384, 32768]
QUICK = (["full", "streaming", "snapkv"], [1024])
DOORS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink")
INSTRUCTION = "Pass keys of several doors are hidden in the text below. Remember them: you will be asked for one.\n\n"
NEEDLE = "\n\nThe pass key of the {door} door is {key}. Remember it. {key} is the pass key of the {door} door.\n\n"
QUESTION = "\n\nWhat are the digits of the pass key of the {door} door?"


@dataclass(frozen=True)
class Settings:
    """What all cells of a run share.

    Raises:
        ValueError: depths that are not ascending per cents, or more of them than there are doors.
    """

    model: str = "smollm2-135m-instruct"
    dtype: Any = "auto"
    haystack: str = "moby-dick"
    """noise, or what ``catalog.read_document`` takes"""
    ratio: float = 8.0
    """the budget of every method but full is the full cache's bytes divided by this"""
    nbytes: int | None = None
    """the budget itself, instead of a ratio"""
    depths: tuple[float, ...] = (10.0, 30.0, 50.0, 70.0, 90.0)
    """per cent of the text that stand before each key"""
    answer_tokens: int = 24
    chunk: int = beacon.CHUNK
    seed: int = 123

    def __post_init__(self) -> None:
        """Refuse settings that no cell can follow."""
        ascending = sorted({depth for depth in self.depths if 0 <= depth <= 100})
        if list(self.depths) != ascending or not 1 <= len(ascending) <= len(DOORS):
            raise ValueError(f"depths must be 1 to {len(DOORS)} ascending per cents, 0 to 100, got {self.depths}")
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio must be a number of at least 1, got {self.ratio}")

    def fingerprint(self) -> str:
        """Return a hash of everything that a figure depends on besides method and length."""
        return digest(asdict(self), environment(), NEEDLE, QUESTION, INSTRUCTION)


@dataclass(frozen=True)
class Planted:
    """A text with keys in it and the questions that follow it, as token ids of one chat."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    """index in ``ids`` of the first token of each sentence that states a key"""
    keys: tuple[str, ...]
    questions: tuple[tuple[int, ...], ...]
    """the end of the chat for each key, up to where the model answers"""


def plant(tokenizer: Any, length: int, settings: Settings) -> Planted:
    """Hide one key per depth; text and longest question together have exactly ``length`` tokens.

    Raises:
        ValueError: a length too small, or a haystack too short.
    """
    head, tail = chat_frame(tokenizer)
    cells = passkey_cells([length], settings.depths, seed=settings.seed + length)
    named = [(door, cell.key) for door, cell in zip(DOORS, cells, strict=False)]
    needles = [encode(tokenizer, NEEDLE.format(door=door, key=key)) for door, key in named]
    questions = tuple((*encode(tokenizer, QUESTION.format(door=door)), *tail) for door, _ in named)
    ids = head + encode(tokenizer, INSTRUCTION)
    room = length - len(ids) - sum(map(len, needles)) - max(map(len, questions))
    if room < len(needles):
        raise ValueError(f"{len(needles)} keys need {length - room + len(needles):,} tokens, the length is {length:,}")
    # Eight characters a token are more than enough, and tokenising a whole book would take seconds.
    text = NOISE * room if settings.haystack == "noise" else catalog.read_document(settings.haystack).text
    hay = encode(tokenizer, text[: 8 * room])
    if len(hay) < room:
        raise ValueError(f"the haystack {settings.haystack} has {len(hay):,} tokens, {room:,} are needed")
    starts, places = [], [round((room - 1) * depth / 100) for depth in settings.depths]
    for begin, end, needle in zip([0, *places], places, needles, strict=False):
        ids += hay[begin:end]
        starts.append(len(ids))
        ids += needle
    return Planted(tuple(ids + hay[places[-1] : room]), tuple(starts), tuple(key for _, key in named), questions)


def full_cache_bytes(model: Any, tokens: int) -> int:
    """Return the bytes of an uncompressed cache after ``tokens`` tokens; a sliding layer holds its window less one."""
    cache = beacon.CompressedCache(model, beacon.method("full"))
    held = [min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens for layer in cache.layers]
    return sum(held) * cache.token_bytes


def ask(loaded: Any, prefix: Any, question: Sequence[int], tokens: int) -> tuple[str, float | None]:
    """Answer a question on a copy of the prefix; return the text and tokens per second.

    The speed is that of the median token: a single one in which the cache grows or evicts does not decide.
    """
    answer = longllm.stream(loaded, (*prefix.ids, *question), longllm.Decoding(tokens), prefix=prefix)
    times = [time.perf_counter() for _ in answer]
    waits = [after - before for before, after in itertools.pairwise(times)]
    return answer.result.text, 1 / statistics.median(waits) if waits else None


def scored(planted: Planted, depths: Sequence[float], answers: Sequence[str]) -> list[Row]:
    """Return, per depth, whether the answer names the right key, and whether it names any that was planted."""
    rows = []
    for depth, door, key, answer in zip(depths, DOORS, planted.keys, answers, strict=False):
        named = {other for other in planted.keys if passkey_score(answer, other).correct}
        score = {"found": key in named, "any": bool(named)}
        rows.append({"depth": depth, "door": door, "key": key, "answer": answer, **score})
    return rows


def measure(settings: Settings, row_name: str, length: int) -> Row:
    """Measure one cell in this process: load, warm up, read the text once, ask for each key."""
    name, known = METHODS[row_name]
    loaded = longllm.load(settings.model, dtype=settings.dtype)
    planted = plant(loaded.tokenizer, length, settings)
    method = beacon.method(name)
    beyond = name != "full" and length > loaded.trained_length
    positions: Any = "compact" if beyond or method.compact_only else "original"
    full_bytes = full_cache_bytes(loaded.model, len(planted.ids))
    budget = settings.nbytes or int(full_bytes / settings.ratio)

    def read(ids: Sequence[int], limit: beacon.Budget) -> longllm.Prefix:
        if name == "full":
            return longllm.prefill(loaded, ids, chunk=settings.chunk)
        cache = method.new_cache(loaded.model, limit, positions=positions, expected=len(ids))
        return beacon.read(loaded, ids, cache, questions=planted.questions if known else (), chunk=settings.chunk)

    with method.running(loaded.model) if name != "full" else contextlib.nullcontext():
        ask(loaded, read(planted.ids[:WARM], beacon.Budget(slots=WARM // 2)), planted.questions[0], 2)
        before = peak_memory(reset=True)
        prefix = read(planted.ids, beacon.Budget(nbytes=budget))
        after = peak_memory()
        answers = [ask(loaded, prefix, question, settings.answer_tokens) for question in planted.questions]
    ledger = prefix.cache.ledger() if name != "full" else None
    held = cache_bytes(prefix.cache)
    depths = scored(planted, settings.depths, [text for text, _ in answers])
    speeds = [speed for _, speed in answers if speed is not None]
    return {
        "positions": positions,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "budget_bytes": budget if ledger else None,
        "kv_bytes": held,
        "index_bytes": ledger.index_bytes if ledger else 0,
        "kv_bytes_peak": ledger.peak_bytes if ledger else held,
        "kv_bytes_full": full_bytes,
        "ratio": round(full_bytes / held, 3),
        "prefill_seconds": round(prefix.seconds, 3),
        "decode_tokens_per_second": round(statistics.median(speeds), 2) if speeds else None,
        # Of reading. The copies that the questions are asked on are the bench's own doing, so they count apart.
        "peak_rss_bytes": after - before,
        "peak_rss_absolute_bytes": after,
        "peak_rss_with_copies_bytes": peak_memory(),
        "found": sum(row["found"] for row in depths),
        "any": sum(row["any"] for row in depths),
        "depths": depths,
    }


def measure_apart(settings: Settings, method: str, length: int) -> Row:
    """Measure one cell in a fresh process, so that its peak memory is its own."""
    return measure_in("bench.methods", settings, method, length)


COLUMNS = "method | tokens | positions | KV MB | ratio | reading s | tokens/s | peak MB | right | any | by depth"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a markdown table; by depth, ● is the right key, ○ another that was planted, · none."""
    lines = [COLUMNS.split(" | "), ["---"] * 3 + ["---:"] * 7 + ["---"]]
    for row in rows:
        cells = [row["method"], f"{row['length']:,}"]
        if row.get("error"):
            lines.append([*cells, *["-"] * 8, f"error: {row['error']}".replace("|", "/")])
            continue
        speed, of = row["decode_tokens_per_second"], len(row["depths"])
        marks = ["●" if depth["found"] else "○" if depth["any"] else "·" for depth in row["depths"]]
        cells += [row["positions"], f"{row['kv_bytes'] / 1e6:.1f}", f"{row['ratio']:.2f}"]
        cells += [f"{row['prefill_seconds']:.1f}", "-" if speed is None else f"{speed:.1f}"]
        cells += [f"{row['peak_rss_bytes'] / 1e6:.0f}", f"{row['found']}/{of}", f"{row['any']}/{of}", "".join(marks)]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw time, memory and what was found over length, one line per method, to PNG and SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    good = sorted((row for row in rows if not row.get("error")), key=lambda row: row["length"])
    panels = {"seconds to read": ("prefill_seconds", 1), "KV MB": ("kv_bytes", 1e6), "right keys found": ("found", 1)}
    for axis, (title, (field, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            line = [(row["length"], row[field] / unit) for row in good if row["method"] == method]
            axis.plot([x for x, _ in line], [y for _, y in line], marker="o", label=method, alpha=0.8)
        axis.set(xscale="log", xlabel="tokens", title=title, xticks=sorted({row["length"] for row in good}))
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=8)
    for ending in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{ending}"), dpi=120)


def options() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = command_line(__doc__, Settings.model, LENGTHS)
    parser.add_argument("--haystack", default=Settings.haystack, help="noise, moby-dick, or another document")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--ratio", type=float, default=Settings.ratio, help="full cache's bytes / budget, per length")
    limit.add_argument("--budget", metavar="SIZE", help="the same bytes for all lengths, such as 64MB")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    return parser


def main() -> None:
    """Measure the cells that are missing and write what is known."""
    parser = options()
    chosen = parser.parse_args()
    if chosen.cell:
        cell = json.loads(chosen.cell)
        print(json.dumps(measure(Settings(**cell["settings"]), cell["method"], cell["length"])))
        return
    try:
        nbytes = beacon.parse_bytes(chosen.budget) if chosen.budget else None
        settings = Settings(chosen.model, chosen.dtype, chosen.haystack, chosen.ratio, nbytes)
    except ValueError as error:
        parser.error(str(error))
    methods, lengths = QUICK if chosen.quick else (chosen.methods, chosen.lengths)
    # Lengths outermost: all methods of a length are measured close together and share the machine's noise.
    cells = [(method, length) for length in lengths for method in methods]
    file, report = run("methods", chosen, cells, settings, measure_apart, lambda row: table([row]).splitlines()[-1])
    file.with_suffix(".json").write_text(json.dumps(report, indent=1))
    plot(report["rows"], file)
    print(table(report["rows"]), *left_out_lines(report), sep="\n")


if __name__ == "__main__":
    main()
