"""The retrieval commands on the tiny model: files, pictures, parts, judge, and refusals before a model is loaded."""

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commands.eval_grid import compare, grid
from commands.eval_needle import needle
from commands.eval_numbers import numbers
from commands.eval_passkey import passkey
from commands.eval_ruler import ruler
from commands.eval_topic import topic

ROOT = Path(__file__).parents[2]
ChatServer = runpy.run_path(str(ROOT / "tests" / "longllm" / "chat_server.py"))["ChatServer"]
Options = dict[str, Any]


def heard(pieces: Iterator[str | dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """What a command says, and its record."""
    words, record = "", {}
    for piece in pieces:
        if isinstance(piece, dict):
            record = piece
        else:
            words += piece
    return words, record


@pytest.fixture
def options(tiny_folder: Path, tmp_path: Path) -> Options:
    """The tiny model, a haystack of its own, and a folder for results."""
    text = " ".join(f"On day {n} the log speaks of the sea, of whale {n * 7} and of many ships." for n in range(300))
    (tmp_path / "hay.txt").write_text(text, encoding="utf-8")
    return {"model": str(tiny_folder), "haystack": str(tmp_path / "hay.txt"), "out": str(tmp_path / "out")}


def written(out: str, name: str, *endings: str) -> bool:
    return all((Path(out) / f"{name}.{ending}").stat().st_size > 50 for ending in endings)


def test_passkey_says_its_figures_and_draws_them(options: Options) -> None:
    said, record = heard(passkey(lengths="200,600", depths="0-100:3", **options))
    assert [(cell["length"], cell["depth"]) for cell in record["cells"]] == [
        (n, d) for n in (200, 600) for d in (0, 50, 100)
    ]
    assert record["by_length"]["600"]["n"] == 3
    assert "600 tokens: right 0.00 [0.00, 0.56] (n = 3)" in said
    assert "88 more than the 512 the model was trained for" in said
    assert written(options["out"], "passkey", "jsonl", "json", "png", "svg")


def test_parts_of_a_run_are_put_together_by_the_last(options: Options) -> None:
    shared = {"lengths": "200", "depths": "0,50,100", **options}
    said, record = heard(passkey(part=1, parts=2, **shared))
    assert record["missing_parts"] is True
    assert "part 1 of 2 is done" in said
    _, record = heard(passkey(part=0, parts=2, **shared))
    assert record["n"] == 3
    assert written(options["out"], "passkey", "json", "png")


def test_a_judge_marks_the_needle(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rouge")
    pytest.importorskip("openai")
    own = {"needle": "The cat sleeps on the piano.", "question": "Where does the cat sleep?"}
    with ChatServer(lambda body, before: "Nothing of it is right. Rating: [[1]]") as server:
        _, record = heard(needle(lengths="300", depths="50", judge=server.url, **own, **options))
        asked = [body["messages"][-1]["content"] for body in server.bodies]
    assert record["cells"] == [{"length": 300, "depth": 50, "n": 1, "judge": 1.0}]
    assert len(asked) == 1
    assert all(words in asked[0] for words in own.values())
    with pytest.raises(ValueError, match="another judge"):
        heard(needle(lengths="300", depths="50", **own, **options))


def test_topics_come_from_text_or_from_rows(options: Options, tmp_path: Path) -> None:
    said, record = heard(topic(counts="1,2", cases=1, **options))
    assert [found["num_topics"] for found in record["by_tokens"].values()] == [1, 2]
    assert "(2 topics): right 0.00" in said
    row = {"context": "USER: tea", "question": "Which?", "topics": ["tea"], "num_topics": 5}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    there = {**options, "out": str(tmp_path / "rows")}
    assert heard(topic(data=str(tmp_path / "rows.jsonl"), counts="5", **there))[1]["n"] == 1
    with pytest.raises(ValueError, match="has no rows with 7 topics"):
        heard(topic(data=str(tmp_path / "rows.jsonl"), counts="7", **there))


def test_ruler_averages_its_kinds(options: Options) -> None:
    _, record = heard(ruler(kinds="vt,niah_single_2", lengths="500", count=1, **options))
    assert list(record["kinds"]) == ["vt", "niah_single_2"]
    assert record["average"] == {"500": {"n": 2, "match": 0.0}}
    assert json.loads((Path(options["out"]) / "ruler.json").read_text(encoding="utf-8"))["average"] == record["average"]
    assert written(options["out"], "ruler-vt", "jsonl", "json")


def test_grids_of_a_stretched_and_a_plain_model_are_compared(options: Options, tmp_path: Path) -> None:
    asked = {"lengths": "700", "depths": "0,100", "texts": "1", "new_tokens": 2, "dtype": "fp32"}
    for name, rope in (("plain", ""), ("stretched", "dynamic:4")):
        said, record = heard(grid(rope=rope, label=name, **asked, **{**options, "out": str(tmp_path / name)}))
        assert record["lengths"]["700"]["needle"]["n"] == 2
        assert f"| {name} | passkey |" in said
    assert record["rope_parameters"]["rope_type"] == "dynamic"
    said, record = heard(compare([str(tmp_path / "plain"), str(tmp_path / "stretched")], out=str(tmp_path / "both")))
    assert record["differ_in"] == []
    assert written(str(tmp_path / "both"), "compare", "md", "json", "png", "svg")


def test_a_grid_is_read_into_a_compressed_memory(options: Options) -> None:
    asked = {"lengths": "600", "depths": "0,100", "texts": "1", "new_tokens": 2, "dtype": "fp32"}
    said, record = heard(grid(**asked, **options, method="streaming", slots=96))
    assert "streaming, 96 slots" in said
    assert record["lengths"]["600"]["needle"]["n"] == 2
    assert "streaming" in json.loads(Path(options["out"], "grid.jsonl").read_text().splitlines()[0])["run"]["answerer"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("4K", (4096,)),
        ("1k, 300", (1024, 300)),
        ("8192-131072:20", tuple(int(8192 + n * (131072 - 8192) / 19 + 1e-9) for n in range(20))),
        ("0-100:10", (0, 11, 22, 33, 44, 55, 66, 77, 88, 100)),
        ("5-9:1", (5,)),
    ],
)
def test_numbers_are_lists_or_evenly_spaced(words: str, expected: tuple[int, ...]) -> None:
    assert numbers(words, "lengths") == expected


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: numbers("", "lengths"), "lengths must be whole numbers"),
        (lambda: numbers("4Q", "lengths"), "got '4Q'"),
        (lambda: numbers("1-2", "depths"), "depths must be"),
        (lambda: numbers("1-9:0", "depths"), "depths must be"),
        (lambda: heard(passkey(model="no-such-model", part=3)), "part must be one of"),
        (lambda: heard(needle(model="no-such-model", needle="A cat.")), "go together"),
        (lambda: heard(ruler(model="no-such-model", kinds="vt,nonsense", haystack=__file__)), "kind must be one of"),
        (lambda: heard(grid(model="no-such-model", depths="1,1")), "depths must differ"),
        (lambda: heard(grid(model="no-such-model", max_length=9)), "leave max_length out"),
        (lambda: heard(grid(endpoint="http://127.0.0.1:1", endpoint_model="x")), "use eval needle"),
    ],
)
def test_nonsense_is_refused_before_a_model_is_loaded(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()
