"""The bench of compression methods plants what it says, goes on where it stopped, and keeps to its time."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

import longllm
from bench import methods as bench
from longllm.prompts import chat_frame

DEPTHS = (10.0, 50.0, 90.0)
SETTINGS = bench.Settings(haystack="noise", depths=DEPTHS, answer_tokens=4, chunk=64)
CELLS = [(method, length) for length in (100, 200) for method in ("full", "snapkv")]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny chat model as a folder."""
    place = Path(__file__).parents[1] / "longllm" / "tiny_chat.py"
    spec = importlib.util.spec_from_file_location("tiny_chat", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture(scope="module")
def loaded(tiny_folder) -> longllm.LoadedModel:
    return longllm.load(tiny_folder, dtype="fp32", device="cpu")


class Ruler:
    """Stands in for the measuring: gives every cell the same row, and remembers which cells were asked for."""

    def __init__(self, **row):
        self.cells = []
        depth = {"depth": 50.0, "door": "red", "key": "12345", "answer": "12345", "found": True, "any": True}
        figures = {"kv_bytes": 5_000_000, "ratio": 8.1, "prefill_seconds": 1.5, "peak_rss_bytes": 7_000_000}
        counts = {"found": 1, "any": 1, "depths": [depth], "decode_tokens_per_second": None}
        self.row = row or {"positions": "original", **figures, **counts}

    def __call__(self, settings, method, length):
        self.cells.append((method, length))
        return dict(self.row)


def finished(method, length, seconds):
    """Return a row of a cell that took so many seconds."""
    return {"method": method, "length": length, "cell_seconds": seconds}


def test_each_key_stands_at_its_depth_and_the_longest_prompt_has_the_length(loaded):
    planted = bench.plant(loaded.tokenizer, 900, SETTINGS)
    decode, named = loaded.tokenizer.decode, list(zip(bench.DOORS, planted.keys, strict=False))
    head, tail = chat_frame(loaded.tokenizer)
    assert len(planted.ids) + max(map(len, planted.questions)) == 900
    assert list(planted.ids[: len(head)]) == head

    def noise(ids):
        """What a depth is a part of: the text without what was planted."""
        text = decode(ids).removeprefix(bench.INSTRUCTION)
        for door, key in named:
            text = text.replace(bench.NEEDLE.format(door=door, key=key), "")
        return text

    whole = noise(planted.ids[len(head) :])
    assert "pass key" not in whole
    for depth, (door, key), start in zip(DEPTHS, named, planted.starts, strict=True):
        assert decode(planted.ids[start:]).startswith(f"\n\nThe pass key of the {door} door is {key}. Remember it.")
        before = noise(planted.ids[len(head) : start])
        assert whole.startswith(before)
        assert len(before) / len(whole) == pytest.approx(depth / 100, abs=0.02)
    for (door, _), question in zip(named, planted.questions, strict=True):
        assert list(question[-len(tail) :]) == tail
        assert f"pass key of the {door} door?" in decode(question)


def test_a_length_without_room_and_depths_out_of_order_are_refused(loaded):
    with pytest.raises(ValueError, match=r"3 keys need .* the length is 100"):
        bench.plant(loaded.tokenizer, 100, SETTINGS)
    with pytest.raises(ValueError, match="ascending"):
        bench.Settings(depths=(50.0, 10.0))
    with pytest.raises(ValueError, match="at least 1"):
        bench.Settings(ratio=0.5)


def test_the_right_key_and_any_planted_key_are_counted_apart():
    planted = bench.Planted((), (), ("11111", "22222", "33333"), ())
    rows = bench.scored(planted, DEPTHS, ["It is 11111.", "It is 11111.", "It is 44444, not 33333."])
    assert [(row["found"], row["any"]) for row in rows] == [(True, True), (False, True), (False, False)]


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    file, first, second = tmp_path / "rows.jsonl", Ruler(), Ruler()
    rows, _ = bench.collect(CELLS[:3], SETTINGS, file, measure=first)
    again, left_out = bench.collect(CELLS, SETTINGS, file, measure=second)
    assert first.cells == CELLS[:3]
    assert second.cells == CELLS[3:]
    assert again[:3] == rows
    assert [(row["method"], row["length"]) for row in again] == CELLS
    assert left_out == []


@pytest.mark.parametrize("change", [{"ratio": 4.0}, {"nbytes": 10**6}, {"dtype": "bf16"}, {"haystack": "moby-dick"}])
def test_a_changed_setting_measures_everything_and_keeps_the_old_rows(tmp_path, change):
    file, changed, original = tmp_path / "rows.jsonl", Ruler(), Ruler()
    bench.collect(CELLS, SETTINGS, file, measure=Ruler())
    bench.collect(CELLS, bench.Settings(**{**vars(SETTINGS), **change}), file, measure=changed)
    bench.collect(CELLS, SETTINGS, file, measure=original)
    assert changed.cells == CELLS
    assert original.cells == []


def test_a_failed_cell_becomes_a_row_and_is_tried_again(tmp_path):
    file, second = tmp_path / "rows.jsonl", Ruler()
    rows, _ = bench.collect(CELLS[:2], SETTINGS, file, measure=Ruler(error="MemoryError"))
    assert [row["error"] for row in rows] == ["MemoryError"] * 2
    rows, _ = bench.collect(CELLS[:2], SETTINGS, file, measure=second)
    assert second.cells == CELLS[:2]
    assert not any("error" in row for row in rows)


def test_a_line_cut_off_half_way_costs_one_cell_only(tmp_path):
    file, second = tmp_path / "rows.jsonl", Ruler()
    bench.collect(CELLS[:3], SETTINGS, file, measure=Ruler())
    file.write_bytes(file.read_bytes()[:-20])
    bench.collect(CELLS, SETTINGS, file, measure=second)
    assert second.cells == CELLS[2:]
    assert len(bench.read_rows(file)) == len(CELLS)


def test_measuring_again_loses_no_row_that_has_no_successor(tmp_path):
    file = tmp_path / "rows.jsonl"
    bench.collect(CELLS, SETTINGS, file, measure=Ruler())
    before = bench.read_rows(file)

    def interrupted(settings, method, length):
        if (method, length) == CELLS[2]:
            raise KeyboardInterrupt
        return {"error": "no memory"} if (method, length) == CELLS[1] else {"prefill_seconds": -1.0}

    with pytest.raises(KeyboardInterrupt):
        bench.collect(CELLS, SETTINGS, file, measure=interrupted, fresh=True)
    after, keys = bench.read_rows(file), list(before)
    assert after[keys[0]]["prefill_seconds"] == -1.0
    assert {key: after[key] for key in keys[1:]} == {key: before[key] for key in keys[1:]}
    again = Ruler()
    bench.collect(CELLS, SETTINGS, file, measure=again, fresh=True)
    assert again.cells == CELLS


def test_no_cell_is_started_that_would_end_after_the_time_allowed(tmp_path):
    file, shared = tmp_path / "rows.jsonl", SETTINGS.fingerprint()
    for method, seconds in (("full", 50.0), ("snapkv", 20.0)):
        row = {**Ruler().row, **finished(method, 100, seconds), "key": f"{shared}/{method}/100", "settings": shared}
        bench.append_row(file, row)
    ruler = Ruler()
    # 200 tokens: full attention is predicted to take 4 x 50 s, snapkv 2 x 20 s; a minute is allowed.
    rows, left_out = bench.collect(CELLS, SETTINGS, file, minutes=1, measure=ruler)
    assert ruler.cells == [("snapkv", 200)]
    assert left_out == [("full", 200)]
    assert len(rows) == 3


def test_time_is_predicted_from_the_method_itself_and_else_from_the_others():
    predict = bench.predicted_seconds
    full = [finished("full", 1000, 10.0)]
    assert predict([], "full", 1000) == 0
    assert predict([{**full[0], "error": "killed"}], "full", 1000) == 0
    assert predict(full, "full", 2000) == pytest.approx(40)
    assert predict(full, "full", 500) == pytest.approx(5)
    assert predict(full, "tova", 1000) == pytest.approx(10)
    assert predict([*full, finished("tova", 1000, 3.0)], "tova", 4000) == pytest.approx(12)
    grown = [finished("tova", 1000, 2.0), finished("tova", 2000, 2.0 * 2**1.5)]
    assert predict([*full, *grown], "tova", 4000) == pytest.approx(2.0 * 4**1.5)
    assert math.isfinite(predict([finished("tova", 1000, 0.0), finished("tova", 2000, 0.0)], "tova", 4000))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("raise SystemExit(3)", "no message"),
    ],
)
def test_a_process_that_dies_becomes_an_error(code, message):
    assert message in bench.from_process([sys.executable, "-c", code])["error"]


def test_the_last_line_of_a_process_is_its_row():
    assert bench.from_process([sys.executable, "-c", "print('reading'); print('{\"found\": 3}')"]) == {"found": 3}


def test_the_table_has_a_line_per_row_and_as_many_fields_in_each():
    good = {**Ruler().row, **finished("tova", 32768, 9.0)}
    good["depths"] = [{"found": True, "any": True}, {"found": False, "any": True}, {"found": False, "any": False}]
    lines = bench.table([good, {**finished("full", 4096, 9.0), "error": "a | b"}]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {12}
    assert "| tova | 32,768 | original | 5.0 | 8.10 | 1.5 | - | 7 | 1/3 | 1/3 | ●○· |" in lines
    assert "error: a / b" in lines[3]


@pytest.mark.parametrize("method", bench.METHODS)
def test_a_cell_keeps_to_the_budget_and_says_what_it_found(tiny_folder, method):
    settings = bench.Settings(**{**vars(SETTINGS), "model": str(tiny_folder), "ratio": 4.0, "dtype": "fp32"})
    row = bench.measure(settings, method, 450)
    tokens = 450 - max(map(len, bench.plant(longllm.load(tiny_folder).tokenizer, 450, settings).questions))
    # Two layers, two key heads of eight channels, keys and values, four bytes each.
    assert row["kv_bytes_full"] == tokens * 2 * 2 * 8 * 2 * 4
    if method == "full":
        assert row["kv_bytes"] == row["kv_bytes_full"]
    else:
        assert row["kv_bytes"] + row["index_bytes"] <= row["budget_bytes"] == row["kv_bytes_full"] // 4
        assert row["ratio"] > 4
    assert row["positions"] == ("compact" if method == "beacon" else "original")
    assert row["prefill_seconds"] > 0
    assert 0 <= row["peak_rss_bytes"] <= row["peak_rss_absolute_bytes"]
    assert [depth["depth"] for depth in row["depths"]] == list(DEPTHS)
    assert row["found"] <= row["any"] <= len(DEPTHS)
    json.dumps(row)


@pytest.mark.parametrize(("method", "positions"), [("full", "original"), ("tova", "compact")])
def test_beyond_the_trained_length_compressed_caches_number_their_slots_anew(tiny_folder, method, positions):
    settings = bench.Settings(**{**vars(SETTINGS), "model": str(tiny_folder), "depths": (50.0,), "nbytes": 40_000})
    row = bench.measure(settings, method, 600)
    assert row["positions"] == positions
    assert (row["kv_bytes"] < 40_000) == (method == "tova")


def test_the_whole_run_writes_rows_a_summary_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_apart", Ruler())
    monkeypatch.setattr(sys, "argv", ["methods", "--quick", "--out", str(tmp_path / "out"), "--budget", "1MB"])
    bench.main()
    report = json.loads((tmp_path / "out" / "methods-quick.json").read_text())
    assert report["settings"]["nbytes"] == 10**6
    assert report["environment"]["torch"]
    assert [row["method"] for row in report["rows"]] == ["full", "streaming", "snapkv"]
    assert capsys.readouterr().out.count("| 1,024 |") >= 3
    for ending in ("png", "svg"):
        assert (tmp_path / "out" / f"methods-quick.{ending}").stat().st_size > 1000
