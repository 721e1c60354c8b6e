"""The bench of beacons counts what runs, compares equal weights, and reports what it measured."""

import json
import runpy
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import beacon
import beacon.windows
from bench import beacon as bench
from bench import flops, hotspots
from bench.timing import Duel

#: window, ratio, tokens: dividing or not, an open window, a beacon beside the last token, fewer tokens than a window
WORK = [(8, 2, 40), (8, 4, 43), (8, 3, 29), (8, 16, 40), (8, 8, 5), (4, 1, 9)]
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 50, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def windows(window, ratio):
    return beacon.BeaconConfig(window=window, stride=window, ratio=(ratio,), param=("q", "k", "v"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> bench.Settings:
    """Small windows on the tiny chat model."""
    build = runpy.run_path(str(Path(__file__).parents[1] / "longllm" / "tiny_chat.py"))["build"]
    return bench.Settings(str(build(tmp_path_factory.mktemp("tiny-chat"))), "fp32", window=32)


@pytest.fixture(params=[(LlamaForCausalLM, LlamaConfig, {"head_dim": 12}), (Qwen2ForCausalLM, Qwen2Config, {})])
def model(request):
    """Tiny models: one whose heads are wider than the states divided by them, one with biases."""
    kind, config, changes = request.param
    return kind(config(**SIZES, **HEADS, **changes)).eval().requires_grad_(False)


def counted(modules, skip=()):
    """Let every linear layer note its multiply-adds; return the list they go to."""
    work: list[int] = []
    for layer in modules:
        if isinstance(layer, torch.nn.Linear) and layer not in skip:
            layer.register_forward_hook(
                lambda layer, args, out: work.append(layer.weight.numel() * out[..., 0].numel())
            )
    return work


@pytest.mark.parametrize(("window", "ratio", "tokens"), WORK)
def test_the_window_plan_s_work_is_what_counting_token_by_token_gives(window, ratio, tokens):
    slots = pairs = memory = since = 0
    for begin in range(0, tokens, window):
        held, beacons = memory, 0
        for _ in range(begin, min(begin + window, tokens)):
            since += 1
            for is_beacon in (False, True)[: 1 + (since == ratio)]:
                held, slots = held + 1, slots + 1
                pairs += held
                beacons += is_beacon
            since %= ratio
        memory += beacons
    assert flops.window_work(windows(window, ratio), tokens) == (slots, pairs)


def test_pairs_are_the_cells_below_the_diagonal():
    for queries, before in ((1, 0), (7, 0), (7, 5), (1, 9)):
        seen = torch.ones(queries, before + queries).tril(before)
        assert flops.pairs_seen(queries, before) == int(seen.sum())


def test_without_beacons_nothing_is_gained_and_blind_ones_are_refused():
    shape = flops.Shape(linear=100, pair=7, head=30)
    one_window = beacon.BeaconConfig(window=64, stride=64, ratio=(64,))
    assert flops.limit(shape, one_window, 63) == 1
    assert flops.limit(shape, one_window, 64 * 9) > 1
    with pytest.raises(ValueError, match="step-expansion"):
        flops.window_work(beacon.BeaconConfig(attn="step-expansion", pos="append"), 9)


def test_full_attention_costs_what_the_model_s_layers_do(model):
    shape, work = flops.Shape.of(model), counted(model.modules())
    model(torch.ones(1, 9, dtype=torch.long), logits_to_keep=1)
    assert sum(work) == shape.cost(9, 0)
    # Scores and weighted values: every channel of every query head meets every key seen.
    assert shape.pair == 3 * 2 * model.model.layers[0].self_attn.q_proj.out_features


def test_the_engine_runs_the_work_that_is_counted(model, monkeypatch):
    config, tokens, seen = windows(8, 4), 43, []
    weights = beacon.BeaconWeights.initialised(model, config)
    # The last layer is left out: the engine runs it for one token, and the count for all.
    skipped = [*model.model.layers[-1].modules(), *weights.layers[-1].modules()]
    work = counted([*model.model.modules(), *weights.modules()], skipped)
    attention = beacon.windows.attention

    def watched(queries, keys, values, spec):
        seen.append(sum(range(keys.shape[2] - queries.shape[2] + 1, keys.shape[2] + 1)))
        return attention(queries, keys, values, spec)

    monkeypatch.setattr(beacon.windows, "attention", watched)
    with beacon.installed(model, config, weights), torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    slots, pairs = flops.window_work(config, tokens)
    assert 3 * sum(work) == 2 * flops.Shape.of(model).linear * slots
    assert sum(seen[:-1]) == 2 * pairs  # the last call is the last layer's, for one query
    assert len(seen) == 2 * 6 + 1


def test_both_sides_share_weights_and_neither_disturbs_the_other(settings):
    sides, config = bench.Sides(settings, 100), settings.config(4)
    before = sides.model(torch.tensor([sides.ids])).logits
    with beacon.installed(sides.model, config), torch.inference_mode():
        assert sides.read(config) > 0
        sides.read_plainly()
        kinds = {side: type(cache).__name__ for side, cache in sides.caches.items()}
        for side in sides.caches:
            sides.decode(side, 3)
        assert kinds == {"ours": "BeaconCache", "theirs": "DynamicCache"}
        assert [cache.get_seq_length() for cache in sides.caches.values()] == [103, 103]
        # Three windows of eight beacons, four raw tokens and a beacon, then three raw tokens.
        assert sides.caches["ours"].held == [24 + 5 + 3]
        plain = sides.peer(torch.tensor([sides.ids])).logits
    torch.testing.assert_close(plain, before, rtol=0, atol=1e-4)
    pairs = zip(sides.model.parameters(), sides.peer.parameters(), strict=True)
    assert all(own.data_ptr() == other.data_ptr() for own, other in pairs)
    assert sides.peer.config._attn_implementation == "sdpa"


def test_a_peer_short_of_memory_reads_in_chunks_to_the_same_cache(settings):
    sides = bench.Sides(settings, 100)
    assert sides.peer_chunk == 100
    # Keys and values of two layers, two heads of eight; eight states of 32 numbers and three of 64; four bytes each.
    need = 100 * 4 * (2 * 2 * 2 * 8 + 8 * 32 + 3 * 64)
    assert bench.peer_chunk(sides.model, 100, 2 * need) == 100
    assert bench.peer_chunk(sides.model, 100, 2 * need - 2) == bench.PEER_CHUNK
    caches, parts = [], []
    sides.peer.register_forward_pre_hook(lambda model, args: parts.append(args[0].shape[1]))
    for chunk in (100, 30):
        sides.peer_chunk = chunk
        with torch.inference_mode():
            sides.read_plainly()
        caches.append(sides.caches["theirs"])
    assert parts == [100, 30, 30, 30, 10]
    for whole, pieces in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(pieces.keys, whole.keys)


@pytest.mark.parametrize("ratio", [2, 16])
def test_a_cell_reports_bytes_slots_and_times_of_its_ratio(settings, ratio):
    row = bench.measure(settings, f"x{ratio}", 128)
    slot = 2 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, channels, bytes
    assert (row["ratio"], row["windows"], row["slots"], row["rounds"]) == (ratio, 4, 128 // ratio, 3)
    assert row["kv_bytes"] == row["kv_bytes_expected"] == (128 // ratio + 32) * slot
    assert row["kv_bytes_full"] == 128 * slot
    assert row["share"] == pytest.approx(row["speedup"] / row["flop_limit"], abs=0.002)
    # Two runs of 16 tokens come before those that count; each completes windows of 32 as it goes.
    completed, open_raw = divmod(128 + 16 * (2 + bench.DECODE_RUNS), 32)
    held = completed * 32 // ratio + open_raw + open_raw // ratio
    assert row["decode_slots"] == (row["slots"] + held) // 2
    assert min(row[name] for name in ("prefill_seconds", "peer_prefill_seconds", "decode_ms", "peer_decode_ms")) > 0
    assert row["peak_bytes"] >= 0
    json.dumps(row)


@pytest.mark.parametrize(("ratio", "tokens"), [(4, 16), (32, 32)])
def test_times_are_given_per_token_and_as_times_as_fast(settings, ratio, tokens, monkeypatch):
    def stopwatch(ours, theirs, runs, warmup):
        ours(), theirs()
        return Duel(0.32, 0.64, 0.5, (0.4, 0.8), runs)

    monkeypatch.setattr(bench, "duel", stopwatch)
    row = bench.measure(settings, f"x{ratio}", 128)
    assert (row["prefill_seconds"], row["peer_prefill_seconds"]) == (0.32, 0.64)
    assert (row["speedup"], row["speedup_quartiles"]) == (2, [1.25, 2.5])
    # A whole period of beacons is decoded at once.
    assert (row["decode_ms"], row["peer_decode_ms"]) == (320 / tokens, 640 / tokens)


def test_the_command_of_a_cell_prints_its_row(settings, monkeypatch, capsys):
    cell = json.dumps({"settings": vars(settings), "method": "full", "length": 64})
    monkeypatch.setattr(sys, "argv", ["beacon", "--cell", cell])
    bench.main()
    row = json.loads(capsys.readouterr().out)
    assert row["kv_bytes"] == 64 * 2 * 2 * 2 * 8 * 4
    assert row["peer_tokens_per_pass"] == 64
    assert min(row["prefill_seconds"], row["flashcore_prefill_seconds"], row["decode_ms"]) > 0


def figures(method, length, decode_ms=None):
    """Return a row as a cell would give it, whose tokens take 20 ms, 3 for a beacon and 2 for 1,000 slots."""
    base = {"method": method, "length": length, "cell_seconds": 1.0, "peak_bytes": 9e6, "kv_bytes": 5e6}
    if method == "full":
        return {**base, "prefill_seconds": 4.0, "flashcore_prefill_seconds": 3.5, "decode_ms": length / 100}
    ratio = int(method[1:])
    slots = length // ratio
    row = {"ratio": ratio, "windows": length // 1024, "slots": slots, "decode_slots": slots}
    row |= {"decode_ms": decode_ms or 20 + 3 / ratio + 2 * slots / 1000, "peer_decode_ms": 40.0}
    row |= {"prefill_seconds": 2.0, "peer_prefill_seconds": 4.0, "speedup": 2.0, "flop_limit": 2.5, "share": 0.8}
    return {**base, **row, "kv_bytes_expected": 4e6, "kv_bytes_full": 4e7}


GRID = [figures(f"x{ratio}", length) for length in (4096, 8192, 16384) for ratio in (2, 4, 8)]


def test_what_a_token_costs_is_taken_apart():
    found = bench.decoding(GRID)
    parts = [found["line"][name] for name in bench.PARTS]
    assert parts == pytest.approx([20, 3, 2, 0], abs=1e-3)
    assert found["line"]["largest_deviation"] == 0
    assert [(group["slots"], group["windows"]) for group in found["equal_slots"]] == [
        (1024, [4, 8]),
        (2048, [4, 8, 16]),
        (4096, [8, 16]),
    ]
    # What grows with the windows compressed is seen as that, and not as attention.
    slower = [{**row, "decode_ms": row["decode_ms"] + row["windows"] / 2} for row in GRID]
    assert bench.decoding(slower)["line"]["ms_per_window"] == pytest.approx(0.5, abs=1e-3)
    assert bench.decoding(slower)["equal_slots"][1]["spread"] > 0.1
    assert bench.decoding([*GRID[:8], {**GRID[8], "decode_ms": 60.0}])["line"]["largest_deviation"] > 0.1


def test_too_few_rows_say_nothing_of_a_token_and_failed_ones_are_left_out():
    failed = {"method": "x4", "ratio": 4, "length": 4096, "error": "SIGKILL"}
    assert bench.decoding([GRID[0], failed, GRID[3], GRID[6]]) == {"line": {}, "equal_slots": []}


def test_rows_are_joined_with_full_attention_alone_and_shown():
    rows = [figures("full", 4096), figures("x8", 4096), figures("x8", 8192)]
    failed = {"method": "x2", "length": 8192, "cell_seconds": 1.0, "error": "a | b"}
    first, second, third = bench.joined([*rows, failed])
    assert (first["peer_peak_bytes"], first["flashcore_prefill_seconds"]) == (9e6, 3.5)
    assert second["peer_peak_bytes"] is None
    assert first["peer_decode_ms_4k"] == second["peer_decode_ms_4k"] == 40.96
    assert third["ratio"] == 2
    lines = bench.table([first, second, third]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 4,096 | 8 | 2.0 | 4.0 | 2.00 | 2.50 | 80 % | 21.4 | 40.0 | 512 | 5.0 | 4.0 | 40.0 | 9.0 | 9.0 |" in lines
    assert "error: a / b" in lines[-1]
    assert bench.tell(failed) == lines[-1]
    assert "flashcore in 3.5 s; 41.0 ms a token" in bench.tell(rows[0])
    assert "error: killed" in bench.tell({**rows[0], "error": "killed"})


def test_the_whole_run_prints_one_line_of_json_and_measures_nothing_twice(tmp_path, monkeypatch, capsys):
    asked = []

    def ruler(settings, method, length):
        asked.append((method, length, settings.window))
        return figures(method, length)

    monkeypatch.setattr(bench, "measure_apart", ruler)
    for options in ([], [], ["--fresh"]):
        monkeypatch.setattr(sys, "argv", ["beacon", "--quick", "--json", "--out", str(tmp_path), *options])
        bench.main()
        (line,) = capsys.readouterr().out.splitlines()
    assert asked == [("full", 1024, 256), ("x8", 1024, 256)] * 2
    report = json.loads(line)
    (row,) = report["rows"]
    assert (row["length"], row["ratio"], row["speedup"], row["flop_limit"], row["share"]) == (1024, 8, 2.0, 2.5, 0.8)
    assert report["environment"]["torch"]
    assert json.loads((tmp_path / "beacon-quick.json").read_text()) == report
    for ending in ("png", "svg"):
        assert (tmp_path / f"beacon-quick.{ending}").stat().st_size > 1000


def test_all_lengths_and_ratios_are_drawn_and_rows_that_failed_are_not(tmp_path):
    bench.plot([*GRID, {"method": "x4", "ratio": 4, "length": 99, "error": "SIGKILL"}], tmp_path / "good.png")
    bench.plot([{"method": "x4", "ratio": 4, "length": 99, "error": "SIGKILL"}], tmp_path / "none.png")
    drawn = (tmp_path / "good.svg").read_text()
    # Text is drawn as outlines, but each stands in a comment.
    assert all(f"<!-- {text} -->" in drawn for text in ("beacons, ratio 2", "beacons, ratio 8", "4K", "16K", "KV MB"))
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("options", [["--ratios", "0"], ["--ratios", "4", "-1"], ["--lengths", "0"], ["--window", "0"]])
def test_what_cannot_be_measured_is_refused_at_once(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["beacon", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_the_profile_names_what_time_goes_to_and_puts_the_module_back():
    place = types.SimpleNamespace(attention=lambda x: (time.sleep(0.05), x @ x)[1])
    own, x = place.attention, torch.randn(300, 300)

    def work():
        begun = time.perf_counter()
        place.attention(x)
        torch.nn.functional.linear(x, x)
        torch.cat([x, x]).exp()
        time.sleep(0.02)
        return time.perf_counter() - begun

    with hotspots.marked(place):
        found, seconds = hotspots.shares(work)
    assert place.attention is own
    assert sum(found.values()) == pytest.approx(1)
    assert found["attention"] * seconds > 0.045  # what sleeps in it has no operation of torch
    assert found["rest"] * seconds > 0.015
    assert all(found[kind] > 0 for kind in ("linear", "copies", hotspots.ARITHMETIC))
    assert list(found) == sorted(found, key=lambda kind: -found[kind])
    assert "attention" in hotspots.summary(found, seconds, seconds).splitlines()[0]


def test_work_within_attention_is_attention_and_a_copy_within_a_linear_layer_is_linear():
    def event(name, parent=None):
        return types.SimpleNamespace(name=name, cpu_parent=parent)

    inner = event("aten::linear", event(hotspots.MARK, event("outside")))
    assert hotspots.kind(event("aten::mm", inner)) == "attention"
    assert hotspots.kind(event("aten::copy_", event("aten::linear"))) == "linear"
    assert hotspots.kind(event("aten::copy_", event("aten::cat", event("outside")))) == "copies"
    assert hotspots.kind(event("aten::slice")) == "views"
    assert hotspots.kind(event("aten::silu")) == hotspots.ARITHMETIC


def test_a_reading_is_profiled_down_to_its_attention(settings):
    lines = bench.profiled(settings, 128, 4).splitlines()
    named = {line[:22].strip(): float(line[22:].split("%")[0]) for line in lines[:-1]}
    assert set(named) == {"attention", "linear", "copies", "views", hotspots.ARITHMETIC, hotspots.REST}
    assert sum(named.values()) == pytest.approx(100, abs=0.5)
    assert named["attention"] > 0
    assert named["linear"] > 0
    assert not hasattr(beacon.windows.attention, "__wrapped__")
    assert beacon.windows.attention.__module__.startswith("flashcore")
