"""``longscope plan`` as a user meets it."""

import json
from pathlib import Path

import pytest

import longscope
from commands.plan import plan

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
RECIPE = """
base: {model: MODEL, dtype: fp32, recompute: "on"}
extension: {length: 2048, theta: 1.0e6}
data: {train: ["ROWS"], max_length: 256}
lora: {rank: 4, alpha: 8}
optimisation: {batch_size: 2, accumulation: 3, epochs: 2}
keeping: {log_every: 1}
"""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The configuration of Llama-3-8B, as a file."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    return file


def asked(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict:
    """Return the JSON record of one call of the front door."""
    assert longscope.main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_recipe_is_planned_as_it_is_trained(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, file = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text('{"text": "a"}\n' * 20 + "\n")
    file.write_text(RECIPE.replace("MODEL", str(tiny_folder)).replace("ROWS", str(rows)))
    found = asked(capsys, "--config", file, "--device", "cpu", "--tflops", "0.001")
    assert (found["length"], found["batch"], found["device"]) == (256, 2, "cpu")
    # 20 rows, six a step, twice.
    assert found["steps"] == 8
    assert found["seconds"] == pytest.approx(8 * found["seconds_per_step"])
    assert found["recomputed"] > 0
    assert sum(found["parts"].values()) == found["peak_bytes"] == max(found["moments"].values())
    longer = asked(capsys, "--config", file, "--device", "cpu", "--tflops", "0.001", "--length", "512")
    assert longer["peak_bytes"] > found["peak_bytes"]
    assert longer["seconds_per_step"] > 2 * found["seconds_per_step"]


def test_what_fits_names_the_cheapest_setting(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", llama, "--device", "cuda", "--length", "16384", "--base.head_chunk", "16384")
    words += ("--base.nf4", "true", "--base.recompute", "on", "--tflops", "300")
    found = asked(capsys, *words, "--fits", "24GB")
    assert not found["fits"]["fits"]
    assert found["fits"]["cheapest"] == "chunked loss (512 rows)"
    assert found["fits"]["longest"] < 16384 <= found["fits"]["longest_with_all_settings"]
    turned = asked(capsys, *words, "--base.head_chunk", "512", "--fits", "24GB")
    assert turned["fits"]["fits"]
    assert turned["fits"]["longest"] >= 16384
    assert longscope.main(["plan", *map(str, words), "--fits", "24GB"]) == 0
    told = capsys.readouterr().out
    assert "16,384 tokens do not fit; cheapest way to make them" in told
    assert "--base.head_chunk=512" in told
    assert longscope.main(["plan", *map(str, words), "--fits", "1GB"]) == 0
    assert "no setting makes them fit" in capsys.readouterr().out


def test_reading_is_planned_too(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", llama, "--device", "cuda", "--length", "81920", "--inference", "--base.nf4", "true")
    found = asked(capsys, *words, "--fits", "16GB")
    assert found["parts"]["keys and values"] == 10_737_418_240
    assert not found["fits"]["fits"]
    assert found["fits"]["cheapest"] == "a compressed cache, ratio 2"
    smaller = asked(capsys, *words, "--fits", "16GB", "--ratio", "2")
    assert smaller["fits"]["fits"]
    assert smaller["parts"]["keys and values"] < 0.52 * found["parts"]["keys and values"]
    assert longscope.main(["plan", *map(str, words), "--fits", "16GB"]) == 0
    assert "81,920 tokens do not fit; they do with a compressed cache, ratio 2" in capsys.readouterr().out


def test_a_machine_that_is_not_here_has_no_time(llama: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    record = list(plan(model=llama.read_text(), length=1024, device="cuda"))[-1]
    assert record["seconds_per_step"] is None
    assert record["operations"] > 1e13


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "bge-en-icl"], "planning downloads no weights"),
        (["--length", "-1", "--model", "{}"], "--length must be 0 or more, got -1"),
        (["--fits", "much"], "a size is a number"),
        (["--model", "{}"], "model_type must be one of"),
        (["--model", "{"], "is not JSON"),
        (["--tflops", "1", "--calibrate", "--device", "cpu"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line(words: list[str], told: str, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words if "--model" in words else ["--model", str(llama), *words]
    assert longscope.main(["plan", *given]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
