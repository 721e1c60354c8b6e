"""Activation Beacon against full attention: time and memory of reading and of answering, over length and ratio.

    python -m bench.beacon                        4K to 32K tokens, ratios 2 to 16; about an hour on two cores
    python -m bench.beacon --budget-minutes 30    leave out what would not be done in time; run again to go on
    python -m bench.beacon --quick                1K tokens, window 256, ratio 8, to see that it works
    python -m bench.beacon --profile              where the time of one reading goes, 8K tokens at ratio 8

The peer has the same weights and dtype under transformers' SDPA attention and ``DynamicCache``, and reads the text in
one forward pass with ``logits_to_keep=1`` (in chunks, as ``prefill_chunk_size`` does, where that would take more than
half of the free memory). Both run on the CPU. Beacons have untrained projections of their own, q, k and v: no answer is
looked at, so the text is random, and a length beyond the trained one changes nothing. Every cell (ratio or full
attention, and length) is a process of its own, in which both sides alternate: three rounds up to 8K tokens, one beyond.
The limit is what ``bench.flops`` counts; a share above 1 is the kernel's doing, and the last layer's, which runs for
one token only. KV bytes are those held, room to grow included. Cells that are done are kept in
``out/bench/beacon.jsonl``; a summary (``beacon.json``) and plots are written beside it.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

import beacon
import longllm
from bench import flops, hotspots
from bench.cells import WARM, Row, command_line, digest, left_out_lines, measure_in, peak_memory, run
from bench.timing import duel, environment, seconds
from flashcore.hf import cache_bytes

LENGTHS = [4096, 8192, 16384, 32768]
RATIOS = [2, 4, 8, 16]
QUICK: dict[str, Any] = {"lengths": [1024], "ratios": [8], "window": 256}
PROFILED = (8192, 8)
#: alternated readings, up to this length and beyond
ROUNDS, LONG = (3, 1), 8192
#: tokens of one decoding run: whole periods of every usual ratio, because only some steps carry a beacon
DECODED, DECODE_RUNS = 16, 5
#: tokens per forward pass where the peer cannot read the text in one
PEER_CHUNK = 4096


@dataclass(frozen=True)
class Settings:
    """What all cells of a run share."""

    model: str = "smollm2-135m-instruct"
    dtype: Any = "auto"
    window: int = 1024
    seed: int = 123

    def fingerprint(self) -> str:
        """Return a hash of everything that a figure depends on besides ratio and length."""
        return digest(asdict(self), environment(), ROUNDS, LONG, DECODED, DECODE_RUNS)

    def config(self, ratio: int) -> beacon.BeaconConfig:
        """Return the beacons of a ratio.

        Raises:
            ValueError: a ratio below 1, or one that does not fit the window.
        """
        if ratio < 1:
            raise ValueError(f"a ratio counts tokens per beacon and must be at least 1, got {ratio}")
        return beacon.BeaconConfig(window=self.window, stride=self.window, ratio=(ratio,), param=("q", "k", "v"))


class Sides:
    """Both ways to read one text on the same weights, and the cache that each has filled last."""

    def __init__(self, settings: Settings, length: int) -> None:
        self.loaded = longllm.load(settings.model, dtype=settings.dtype, device="cpu")
        self.model: Any = self.loaded.model
        # Another module tree over the same tensors, so that beacons can stay installed while the peer runs.
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        self.peer: Any = copy.deepcopy(self.model, shared)
        self.peer.set_attn_implementation("sdpa")
        draws = torch.Generator().manual_seed(settings.seed + length)
        self.ids = torch.randint(self.model.config.vocab_size, (length,), generator=draws).tolist()
        self.chunk = max(settings.window, beacon.CHUNK // settings.window * settings.window)
        self.peer_chunk = peer_chunk(self.model, length, free_memory())
        self.caches: dict[str, Any] = {}

    def read(self, config: beacon.BeaconConfig, tokens: int | None = None) -> float:
        """Read the text, or its beginning, into beacons; return the seconds."""
        self.caches.pop("ours", None)  # two of them at once would count twice
        self.caches["ours"] = cache = beacon.BeaconCache(self.model, config)
        return beacon.read(self.loaded, self.ids[:tokens], cache, chunk=self.chunk).seconds

    def read_plainly(self, tokens: int | None = None) -> None:
        """Read the text, or its beginning, as a user of transformers would."""
        self.caches.pop("theirs", None)
        self.caches["theirs"] = cache = DynamicCache(config=self.peer.config)
        for part in torch.tensor([self.ids[:tokens]]).split(self.peer_chunk, dim=1):
            self.peer(part, past_key_values=cache, logits_to_keep=1)

    def decode(self, side: str, tokens: int) -> None:
        """Run ``tokens`` tokens after what a side has read, one by one."""
        model, cache = (self.model if side == "ours" else self.peer), self.caches[side]
        token = torch.full((1, 1), 7)
        for _ in range(tokens):
            position = torch.tensor([[cache.get_seq_length()]])
            model(token, past_key_values=cache, position_ids=position, logits_to_keep=1)

    def warm(self, config: beacon.BeaconConfig | None = None) -> None:
        """Read and decode a little with beacons, or plainly, so that everything is loaded that will be used."""
        if config is None:
            self.read_plainly(WARM)
        else:
            self.read(replace(config, window=WARM // 2, stride=WARM // 2), WARM)
        self.decode("theirs" if config is None else "ours", 2)


def free_memory() -> int:
    """Return the bytes that the system could still give out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def peer_chunk(model: Any, tokens: int, free: int) -> int:
    """Return the tokens of one forward pass of the peer: all of them, if that leaves half of the ``free`` bytes."""
    config = model.config.get_text_config(decoder=True)
    # What one layer holds at once: states and their norm, queries, keys, values, the MLP's three products.
    numbers = 8 * config.hidden_size + 3 * config.intermediate_size
    slot = 2 * config.num_key_value_heads * flops.head_dim(config) * config.num_hidden_layers
    return tokens if tokens * (numbers + slot) * model.dtype.itemsize <= free / 2 else PEER_CHUNK


def measure(settings: Settings, method: str, length: int) -> Row:
    """Measure one cell in this process: ``full``, or a ratio such as ``x8``."""
    sides = Sides(settings, length)
    dtype = str(sides.loaded.dtype).removeprefix("torch.")
    row = {"dtype": dtype, "window": settings.window, "peer_tokens_per_pass": min(length, sides.peer_chunk)}
    if method == "full":
        return row | measure_full(sides)
    config = settings.config(int(method.removeprefix("x")))
    weights = beacon.BeaconWeights.initialised(sides.model, config).requires_grad_(False)
    with beacon.installed(sides.model, config, weights), torch.inference_mode():
        return row | measure_beacons(sides, config)


@torch.inference_mode()
def measure_full(sides: Sides) -> Row:
    """Measure full attention alone: peak memory, and reading with flashcore in place of SDPA."""
    sides.warm()
    before = peak_memory(reset=True)
    read = seconds(sides.read_plainly, 1)
    after, held = peak_memory(), cache_bytes(sides.caches["theirs"])
    sides.decode("theirs", 2)
    decode = statistics.median(seconds(lambda: sides.decode("theirs", DECODED), 1) for _ in range(DECODE_RUNS))
    sides.caches.clear()
    return {
        "prefill_seconds": round(read, 3),
        "flashcore_prefill_seconds": round(longllm.prefill(sides.loaded, sides.ids).seconds, 3),
        "decode_ms": round(1e3 * decode / DECODED, 3),
        "kv_bytes": held,
        "peak_bytes": after - before,
    }


def measure_beacons(sides: Sides, config: beacon.BeaconConfig) -> Row:
    """Measure one ratio, with beacons installed, beside the peer."""
    length, ratio = len(sides.ids), config.ratio[0]
    sides.warm(config)
    before = peak_memory(reset=True)
    sides.read(config)
    after, cache = peak_memory(), sides.caches["ours"]
    row: Row = {"ratio": ratio, "windows": cache.plans[0].windows, "slots": cache.held[0]}
    row["kv_bytes"] = cache_bytes(cache)
    sides.warm()
    rounds = ROUNDS[length > LONG]
    prefill = duel(lambda: sides.read(config), sides.read_plainly, rounds, 0)
    expected = (length // ratio + config.window) * cache.token_bytes * len(cache.layers)
    full = cache_bytes(sides.caches["theirs"])
    # As many at once as a beacon stands for, so that every run has its share of beacons.
    tokens = max(DECODED, ratio)
    decode = duel(lambda: sides.decode("ours", tokens), lambda: sides.decode("theirs", tokens), DECODE_RUNS, 1)
    limit = flops.limit(flops.Shape.of(sides.model), config, length)
    return row | {
        "speedup": round(1 / prefill.ratio, 3),
        "speedup_quartiles": [round(1 / quartile, 3) for quartile in reversed(prefill.quartiles)],
        "rounds": rounds,
        "flop_limit": round(limit, 3),
        "share": round(1 / prefill.ratio / limit, 3),
        "prefill_seconds": round(prefill.ours, 3),
        "peer_prefill_seconds": round(prefill.theirs, 3),
        "decode_ms": round(1e3 * decode.ours / tokens, 3),
        "peer_decode_ms": round(1e3 * decode.theirs / tokens, 3),
        "decode_slots": (row["slots"] + sides.caches["ours"].held[0]) // 2,
        "kv_bytes_expected": expected,
        "kv_bytes_full": full,
        "peak_bytes": after - before,
    }


def measure_apart(settings: Settings, method: str, length: int) -> Row:
    """Measure one cell in a fresh process, so that its peak memory is its own."""
    return measure_in("bench.beacon", settings, method, length)


#: what the time of a token is made of
PARTS = ("ms", "ms_per_beacon", "ms_per_1k_slots", "ms_per_window")


def joined(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of ratios, each with what full attention took alone at its length, and for a token at 4K."""
    full = {row["length"]: row for row in rows if row["method"] == "full" and not row.get("error")}
    taken = ("peak_bytes", "peer_peak_bytes"), ("flashcore_prefill_seconds", "flashcore_prefill_seconds")
    found = []
    for row in rows:
        if row["method"] != "full":
            beside = {ours: full.get(row["length"], {}).get(theirs) for theirs, ours in taken}
            beside["peer_decode_ms_4k"] = full.get(4096, {}).get("decode_ms")
            found.append({"ratio": int(row["method"].removeprefix("x")), **row, **beside})
    return found


def decoding(rows: Sequence[Row]) -> Row:
    """Say what the time of a token depends on: beacons run beside it, slots attended, windows compressed before it.

    The last must cost nothing. Least squares over all rows says so, where there are enough of them, and so do rows of
    equal slots, though one with a smaller ratio runs more beacons.
    """
    good = [row for row in rows if not row.get("error")]
    known = np.array([[1, 1 / row["ratio"], row["decode_slots"] / 1000, row["windows"]] for row in good])
    took = np.array([row["decode_ms"] for row in good])
    line: Row = {}
    if len(good) > len(PARTS) == np.linalg.matrix_rank(known):
        found = np.linalg.lstsq(known, took)[0]
        off = float(abs(known @ found / took - 1).max())
        line = {name: round(float(part), 4) for name, part in zip(PARTS, found, strict=True)}
        line["largest_deviation"] = round(off, 3)
    alike = []
    for held in sorted({row["slots"] for row in good}):
        group = [row for row in good if row["slots"] == held]
        times, windows = [row["decode_ms"] for row in group], [row["windows"] for row in group]
        if len(group) > 1:
            spread = round(max(times) / min(times) - 1, 3)
            alike.append({"slots": held, "windows": windows, "decode_ms": times, "spread": spread})
    return {"line": line, "equal_slots": alike}


COLUMNS = (
    "tokens | ratio | reading s | peer s | times as fast | FLOPs allow | share | ms a token | peer ms | slots | "
    "KV MB | n/ratio + window | peer KV MB | peak MB | peer peak MB"
)


def table(rows: Sequence[Row]) -> str:
    """Return the rows of ratios as a markdown table."""
    lines = [COLUMNS.split(" | "), ["---:"] * (COLUMNS.count("|") + 1)]
    for row in rows:
        cells = [f"{row['length']:,}", str(row["ratio"])]
        if row.get("error"):
            lines.append([*cells, f"error: {row['error']}".replace("|", "/"), *["-"] * (len(lines[0]) - 3)])
            continue
        cells += [f"{row['prefill_seconds']:.1f}", f"{row['peer_prefill_seconds']:.1f}", f"{row['speedup']:.2f}"]
        cells += [f"{row['flop_limit']:.2f}", f"{100 * row['share']:.0f} %", f"{row['decode_ms']:.1f}"]
        cells += [f"{row['peer_decode_ms']:.1f}", f"{row['decode_slots']:,}"]
        sizes = ("kv_bytes", "kv_bytes_expected", "kv_bytes_full", "peak_bytes", "peer_peak_bytes")
        cells += ["-" if row.get(name) is None else f"{row[name] / 1e6:.1f}" for name in sizes]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tell(row: Row) -> str:
    """Return one finished cell as a line."""
    if row["method"] != "full":
        return table(joined([row])).splitlines()[-1]
    begin = f"full attention alone, {row['length']:,} tokens: "
    if row.get("error"):
        return begin + f"error: {row['error']}"
    return begin + (
        f"SDPA reads in {row['prefill_seconds']:.1f} s, flashcore in {row['flashcore_prefill_seconds']:.1f} s; "
        f"{row['decode_ms']:.1f} ms a token; KV {row['kv_bytes'] / 1e6:.1f} MB, peak {row['peak_bytes'] / 1e6:.1f} MB"
    )


TOLD = (
    "a token takes {ms:.1f} ms, {ms_per_beacon:.1f} ms for a beacon beside it, {ms_per_1k_slots:.2f} ms for 1,000 "
    "slots attended and {ms_per_window:.3f} ms for each window compressed before; no row is off by more than "
    "{largest_deviation:.1%}"
)


def told_of_decoding(found: Row) -> list[str]:
    """Return what ``decoding`` found as lines."""
    line, lines = found["line"], []
    if line:
        lines.append(TOLD.format(**line))
    for group in found["equal_slots"]:
        pairs = zip(group["windows"], group["decode_ms"], strict=True)
        times = ", ".join(f"{took:.1f} ms after {windows} windows" for windows, took in pairs)
        lines.append(f"{group['slots']:,} slots: {times}; spread {100 * group['spread']:.0f} %")
    return lines


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw seconds of reading and KV bytes over length, a line per ratio and one of full attention, to PNG and SVG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    good = sorted((row for row in rows if not row.get("error")), key=lambda row: row["length"])
    if not good:  # no logarithm to draw
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    lengths = sorted({row["length"] for row in good})
    panels = (
        ("seconds to read", "prefill_seconds", "peer_prefill_seconds", 1),
        ("KV MB", "kv_bytes", "kv_bytes_full", 1e6),
    )
    for axis, (title, own, peer, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        alone = [statistics.median(row[peer] for row in good if row["length"] == length) / unit for length in lengths]
        axis.plot(lengths, alone, marker="s", color="black", label="full attention, transformers")
        for ratio in sorted({row["ratio"] for row in good}):
            line = [(row["length"], row[own] / unit) for row in good if row["ratio"] == ratio]
            axis.plot(*zip(*line, strict=True), marker="o", label=f"beacons, ratio {ratio}")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title, xticks=lengths)
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    for ending in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{ending}"), dpi=120)


def profiled(settings: Settings, length: int, ratio: int) -> str:
    """Return where the time of one reading goes, as lines of text."""
    import beacon.windows

    sides, config = Sides(settings, length), settings.config(ratio)
    weights = beacon.BeaconWeights.initialised(sides.model, config).requires_grad_(False)
    with beacon.installed(sides.model, config, weights):
        sides.read(config, WARM)
        plain = sides.read(config)
        with hotspots.marked(beacon.windows):
            shares, took = hotspots.shares(lambda: sides.read(config))
    return hotspots.summary(shares, took, plain)


def main() -> None:
    """Measure the cells that are missing and write what is known."""
    parser = command_line(__doc__, Settings.model, LENGTHS)
    parser.add_argument("--ratios", nargs="+", type=int, default=RATIOS)
    parser.add_argument("--window", type=int, default=Settings.window)
    parser.add_argument("--profile", action="store_true", help="where the time of one reading goes; measures no cells")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    chosen = parser.parse_args()
    if chosen.cell:
        cell = json.loads(chosen.cell)
        print(json.dumps(measure(Settings(**cell["settings"]), cell["method"], cell["length"])))
        return
    if chosen.quick:
        vars(chosen).update(QUICK)
    settings = Settings(chosen.model, chosen.dtype, chosen.window)
    try:
        for ratio in chosen.ratios:
            settings.config(ratio)
        if min(chosen.lengths) < 1:
            raise ValueError(f"a length must be at least 1, got {min(chosen.lengths)}")
    except ValueError as error:
        parser.error(str(error))
    if chosen.profile:
        print(profiled(settings, *((QUICK["lengths"][0], QUICK["ratios"][0]) if chosen.quick else PROFILED)))
        return
    # Lengths outermost: all ratios of a length are measured close together and share the machine's noise.
    cells = [(method, length) for length in chosen.lengths for method in ["full", *(f"x{r}" for r in chosen.ratios)]]
    file, report = run("beacon", chosen, cells, settings, measure_apart, tell)
    full = [row for row in report["rows"] if row["method"] == "full"]
    rows = joined(report["rows"])
    report |= {"rows": rows, "full": full, "decoding": decoding(rows)}
    file.with_suffix(".json").write_text(json.dumps(report, indent=1))
    plot(rows, file)
    if chosen.json:
        print(json.dumps(report))
    else:
        print(table(rows), *map(tell, full), *told_of_decoding(report["decoding"]), *left_out_lines(report), sep="\n")


if __name__ == "__main__":
    main()
