"""``longscope synth texts`` and ``longscope train beacon`` as a user meets them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import beacon
import longscope
from longllm.synthesis import Cut, text_rows, write_texts
from longllm.synthesis.offline_texts import Corpus, Text
from longllm.synthesis.offline_words import Words

RECIPES = Path(__file__).parents[2] / "beacon" / "recipes"


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "The sea is wide. " * 12}) + "\n") * 5)
    recipe = {
        "base": {"model": str(tiny_folder), "dtype": "fp32"},
        "beacons": {"window": 16, "ratio": [2, 4], "rank": 2},
        "data": {"train": [str(tmp_path / "rows.jsonl")], "evaluate": [str(tmp_path / "rows.jsonl")]},
        "optimisation": {"learning_rate": 0.01, "max_steps": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


def test_a_recipe_is_trained_and_gone_on_with(config: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["train", "beacon", "--config", str(config), "--out", str(tmp_path / "out")]
    assert longscope.main([*words, "--keeping.minutes", "1e-9"]) == 0
    assert "give the same command again to go on" in capsys.readouterr().out
    assert longscope.main(words) == 0
    text = capsys.readouterr().out.rstrip()
    assert "went on from step 1" in text
    assert text.endswith(f"beacons: {tmp_path / 'out' / 'beacons'}")
    record = json.loads((tmp_path / "out" / "beacons" / "facts.json").read_text())
    assert record["steps"] == 4
    assert longscope.main([*words, "--base.recompute", "on", "--out", str(tmp_path / "again"), "--json"]) == 0
    recomputed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert recomputed["best"]["loss"] == pytest.approx(record["best"]["loss"], abs=1e-4)


def test_trained_beacons_are_named_for_asking_and_evaluating(
    config: Path, tiny_folder: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert longscope.main(["train", "beacon", "--config", str(config), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "text.txt").write_text("The captain sails to the island at dawn. " * 30)
    words = ["ask", "--doc", str(tmp_path / "text.txt"), "Who sails?", "--model", str(tiny_folder), "--dtype", "fp32"]
    words += ["--max_new_tokens", "2", "--method", "beacon", "--ratio", "4", "--json"]
    untrained = "no trained beacons are known"
    assert longscope.main(words) == 0
    assert untrained in caplog.text
    caplog.clear()
    beacons = ["--beacons", str(tmp_path / "out" / "beacons")]
    assert longscope.main([*words, *beacons]) == 0
    assert untrained not in caplog.text
    capsys.readouterr()
    grid = ["eval", "grid", "--model", str(tiny_folder), "--lengths", "600", "--depths", "50", "--texts", "1"]
    grid += ["--haystack", str(tmp_path / "text.txt"), "--out", str(tmp_path / "grid"), "--new_tokens", "2"]
    assert longscope.main([*grid, "--method", "beacon", "--ratio", "4", *beacons, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["beacons"] == beacons[1]
    assert untrained not in caplog.text
    for wrong, message in ((["--beacons", "nowhere"], "there are no beacons in nowhere"), (["--method", "tova"], "")):
        assert longscope.main([*words, *beacons, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert longscope.main([*grid, *beacons, "--method", "tova"]) == 2
    assert "are for method beacon, got tova" in capsys.readouterr().err
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert beacon.use_beacons(model, tmp_path / "out" / "beacons").rank == 2
    assert beacon.method("beacon").warning(model) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.train", "[nowhere.jsonl]"], "there is no file nowhere.jsonl"),
        (["--beacons.param", "[q,x]"], "beacon_param must list some of q, k, v and o"),
        (["--beacons.start", "nowhere"], "nowhere"),
        (["--beacons.window", "512"], "set data.min_length to 513, or objective.last_window to beacons"),
        (["--data.strict", "true", "--optimisation.batch_size", "9"], "no 9 of the 5 rows have the same length"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(
    config: Path, tmp_path: Path, capsys: Any, change: list[str], message: str
) -> None:
    assert longscope.main(["train", "beacon", "--config", str(config), "--out", str(tmp_path / "out"), *change]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("longscope: ")
    assert message in told


@pytest.mark.parametrize("name", sorted(file.name for file in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_is_read_and_holds_together(name: str) -> None:
    from beacon.recipe import Recipe

    _, given = longscope.parse("train beacon", ["--config", str(RECIPES / name), "--out", "out"])
    recipe = Recipe(**{field: given[field] for field in Recipe.__dataclass_fields__})
    assert recipe.data.train
    assert recipe.data.min_length > (recipe.beacons.window or 1024)


def test_the_full_size_recipes_are_the_paper_s() -> None:
    given = {}
    for stage in ("pretrain", "finetune"):
        _, given[stage] = longscope.parse(
            "train beacon", ["--config", str(RECIPES / f"qwen2-7b-{stage}.yaml"), "--out", "out"]
        )
    first, second = given["pretrain"], given["finetune"]
    assert (first["beacons"].ratio, second["beacons"].ratio) == ((2, 4, 8, 16, 32), (2, 4, 8))
    assert first["beacons"].window == 2048
    for options in (first, second):
        assert (options["beacons"].ratio_mix, options["beacons"].rank) == ("step-random", 0)
        assert options["optimisation"].schedule == "linear"
        assert (options["optimisation"].batch_size, options["optimisation"].warmup) == (1, 0)
        assert options["data"].max_length == 20000
        assert options["data"].strict
    assert (first["data"].min_length, second["data"].min_length) == (2400, 7200)
    assert (first["optimisation"].learning_rate, second["optimisation"].learning_rate) == (5e-5, 1e-5)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    texts = {"sotu/1801": 40, "sotu/1850": 7, "sotu/1902": 25}
    speeches = [
        Text.of(name, name, " ".join(f"Sentence {number} of {name} is this." for number in range(count)))
        for name, count in texts.items()
    ]
    return Corpus(speeches, None, Words(Words.shipped().lists, {}))


def test_rows_of_text_are_full_and_say_every_sentence_once(tiny_chat: Any, corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = tiny_chat.tokenizer()
    rows = list(text_rows(tokenizer, Cut(tokens=150), corpus))
    for row in rows:
        assert row["tokens"] >= 150
        counted = len(tokenizer(row["text"])["input_ids"])
        assert abs(counted - row["tokens"]) <= 5
        assert row["source"] in row["text"]
    said = [line for row in rows for line in row["text"].split(" is this.") if line.strip()]
    assert len({line.strip() for line in said}) == len(said) > 50
    assert any("\n\n" in row["text"] for row in rows), "a short text is followed by the next"
    assert list(text_rows(tokenizer, Cut(tokens=150), corpus)) == rows
    assert list(text_rows(tokenizer, Cut(tokens=150, rows=2), corpus)) == rows[:2]
    assert list(text_rows(tokenizer, Cut(tokens=150, seed=1), corpus)) != rows
    facts = write_texts(tokenizer, Cut(tokens=150), tmp_path / "made" / "rows.jsonl", corpus=corpus)
    written = [json.loads(line) for line in (tmp_path / "made" / "rows.jsonl").read_text().splitlines()]
    assert written == rows
    assert (facts["rows"], facts["tokens"]) == (len(rows), sum(row["tokens"] for row in rows))
    with pytest.raises(ValueError, match="fewer than a row of 99,999: lower tokens"):
        list(text_rows(tokenizer, Cut(tokens=99999), corpus))
