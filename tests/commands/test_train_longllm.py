"""``longscope train longllm`` as a user meets it: killed, interrupted, resumed, refused, in two processes."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import longscope

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "longllm" / "recipes"


@pytest.fixture(scope="module")
def hardship() -> ModuleType:
    """A full disk, and two processes."""
    spec = importlib.util.spec_from_file_location("hardship", ROOT / "tests" / "training" / "hardship.py")
    spec.loader.exec_module(found := importlib.util.module_from_spec(spec))
    return found


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe of the tiny model with dropout and spread positions, as a YAML file."""
    talks = [[("user", f"The key is {row}. What is it?"), ("assistant", f"It is {row}.")] for row in range(7)]
    rows = [{"conversations": [{"role": role, "content": words} for role, words in talk]} for talk in talks]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base": {"model": str(tiny_folder), "dtype": "fp32", "attention": "sdpa"},
        "extension": {"length": 2048, "theta": 1e6},
        "data": {"train": [str(tmp_path / "rows.jsonl")], "max_length": 64, "spread": {"length": 2048, "share": 0.8}},
        "lora": {"rank": 4, "dropout": 0.3},
        "optimisation": {"learning_rate": 0.01, "max_steps": 81},
        "keeping": {"log_every": 3, "save_every": 7},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


def command(config: Path, out: Path, *more: str) -> list[str]:
    return ["train", "longllm", "--config", str(config), "--out", str(out), *more]


def wait_for(out: Path, step: int) -> None:
    """Return as soon as the metrics of a run name a step from ``step`` on."""
    file, limit = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < limit:
        lines = file.read_text().splitlines() if file.exists() else []
        if any(line.endswith("}") and json.loads(line)["step"] >= step for line in lines):
            return
        time.sleep(0.002)


def result(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]
    return load_file(out / "adapter" / "adapter_model.safetensors"), told


def test_a_run_that_is_killed_and_one_that_is_interrupted_go_on_to_the_same_end(
    config: Path, tmp_path: Path, capfd: Any, hardship: ModuleType
) -> None:
    out = tmp_path / "cut"
    last = 4
    for sign, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        capfd.readouterr()
        started = hardship.forked(longscope.main, command(config, out))
        # Further than the run before it, whose lines are still there.
        wait_for(out, last + 6)
        os.kill(started, sign)
        _, status = os.waitpid(started, 0)
        told = capfd.readouterr().err
        assert os.waitstatus_to_exitcode(status) == code, told
        assert not (out / "adapter").exists()
        told_last = [line for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")][-1]
        last = json.loads(told_last)["step"]
    assert told.strip().splitlines()[-1] == "longscope: interrupted"
    assert longscope.main(command(config, out)) == 0
    assert longscope.main(command(config, tmp_path / "straight", "--json")) == 0
    text, _, record = capfd.readouterr().out.rstrip().rpartition("\n")
    assert "went on from step" in text
    assert text.endswith(f"adapter: {out / 'adapter'}")
    assert json.loads(record)["steps"] == 81
    (cut, lines), (straight, whole) = result(out), result(tmp_path / "straight")
    assert cut.keys() == straight.keys()
    assert all(torch.allclose(cut[name], weight, atol=1e-6) for name, weight in straight.items())
    assert len(lines) == len(whole) == 27
    assert all(mine == pytest.approx(theirs, abs=1e-6) for mine, theirs in zip(lines, whole, strict=True))


def test_two_processes_train_as_one_with_twice_the_batch(config: Path, tmp_path: Path, hardship: ModuleType) -> None:
    few = ["--optimisation.max_steps", "6", "--lora.dropout", "0"]
    assert longscope.main(command(config, tmp_path / "one", "--optimisation.batch_size", "2", *few)) == 0
    codes = hardship.run_pair(longscope.main, command(config, tmp_path / "two", *few))
    assert codes == [0, 0]
    (one, _), (two, lines) = result(tmp_path / "one"), result(tmp_path / "two")
    assert all(torch.allclose(one[name], weight, atol=1e-5) for name, weight in two.items())
    assert [line["step"] for line in lines] == [3, 6]
    assert not list((tmp_path / "two").rglob(".*")), "the second process writes nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--extension.rope", "ntk"], "extension.rope"),
        (["--data.train", "[nowhere.jsonl]"], "there is no file nowhere.jsonl"),
        (["--data.train", "[]"], "data.train must name at least one file of training rows"),
        (["--data.max_length", "8", "--data.spread.length", "0"], "no row passes the filters (0 to 8 tokens)"),
        (["--lora.targets", "[qkv]"], "the model has no layer called 'qkv'"),
        (["--lora.rank", "-1"], "rank must be 0 or more, got -1"),
        (["--base.recompute", "offload"], "offload moves activations from an accelerator to the host"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(
    config: Path, tmp_path: Path, capsys: Any, change: list[str], message: str
) -> None:
    if "offload" in change and torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert longscope.main(command(config, tmp_path / "out", *change)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("longscope: ")
    assert message in told[-1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"conversations": [{"role": "user", "content": "q"}]}', "conversations must hold an answer of the assistant"),
        ('{"text": 5}', "text must be str, got int"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(
    config: Path, tmp_path: Path, capsys: Any, row: str, message: str
) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(row + "\n")
    assert longscope.main(command(config, tmp_path / "out")) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"rows.jsonl, line 8: {message}" in told


def test_a_model_without_template_or_end_is_refused(
    config: Path, tmp_path: Path, tiny_folder: Path, capsys: Any
) -> None:
    for name, change in (
        ("template", lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n")),
        ("end", without_end),
    ):
        folder = Path(shutil.copytree(tiny_folder, tmp_path / name))
        change(folder)
        assert longscope.main(command(config, tmp_path / "out", "--base.model", str(folder))) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "the chat template" in told[-2]
    assert "no end-of-answer token (eos_token_id): it would never stop" in told[-1]


def without_end(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists():
            # Null, not absent: configurations of some architectures fill an absent one in.
            settings = {
                key: None if key.startswith("eos_token") else value
                for key, value in json.loads(file.read_text()).items()
            }
            file.write_text(json.dumps(settings))


def test_a_full_disk_at_a_checkpoint_is_one_line_and_nothing_is_lost(
    config: Path, tmp_path: Path, hardship: ModuleType, capsys: Any
) -> None:
    few = ["--optimisation.max_steps", "8", "--keeping.save_every", "4"]
    assert longscope.main(command(config, tmp_path / "out", *few, "--keeping.minutes", "1e-9")) == 0
    with hardship.full_disk(6000):
        assert longscope.main(command(config, tmp_path / "out", *few)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "could not be written" in told
    assert "step-0000001 is intact: run the same command again" in told
    assert longscope.main(command(config, tmp_path / "out", *few)) == 0
    assert longscope.main(command(config, tmp_path / "straight", *few)) == 0
    (cut, _), (straight, _) = result(tmp_path / "out"), result(tmp_path / "straight")
    assert all(torch.equal(cut[name], weight) for name, weight in straight.items())


def parsed(name: str) -> dict[str, Any]:
    _, options = longscope.parse("train longllm", command(RECIPES / name, Path("out"))[2:])
    return options


def test_the_80k_recipe_is_the_paper_s_field_by_field() -> None:
    given = parsed("llama-3-8b-80k.yaml")
    base, extension, data = given["base"], given["extension"], given["data"]
    lora, optimisation, keeping = given["lora"], given["optimisation"], given["keeping"]
    assert (base.nf4, base.dtype, base.attention, base.recompute) == (True, "bf16", "flashcore", "offload")
    assert (extension.rope, extension.theta, extension.length, extension.factor) == ("default", 200e6, 81920, 0)
    assert [Path(path).name.removesuffix(".json") for path, _ in data.sources] == [
        *("one_detail_book.train.64K", "one_detail_paper.train.64K", "multi_detail_book.train"),
        *("multi_detail_paper_short.train", "multi_detail_paper_long.train", "bio_book.train", "train", "train"),
    ]
    assert [take for _, take in data.sources] == [0] * 7 + [5000]
    assert (data.max_length, data.min_length, data.seed, data.pack, data.spread.length) == (81920, 0, 42, False, 0)
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.seed) == (32, 16, 0, False, 3407)
    assert (lora.targets, lora.whole, lora.tokens) == (("q_proj", "k_proj", "v_proj", "o_proj"), ("embed_tokens",), ())
    assert (optimisation.learning_rate, optimisation.schedule, optimisation.warmup) == (5e-5, "linear", 0)
    assert (optimisation.batch_size, optimisation.accumulation, optimisation.epochs) == (1, 1, 1)
    assert (optimisation.clip, optimisation.weight_decay, optimisation.group_by_length) == (1.0, 0, True)
    assert optimisation.max_steps == 0
    assert keeping.log_every == 5


@pytest.mark.parametrize("name", sorted(file.name for file in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_is_read_and_holds_together(name: str) -> None:
    from longllm.train import Recipe

    given = parsed(name)
    recipe = Recipe(**{field: given[field] for field in Recipe.__dataclass_fields__})
    assert recipe.data.train
    assert recipe.extension.length >= max(recipe.data.max_length, recipe.data.spread.length)


def test_help_names_every_section_at_once() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import longscope; "
    done = subprocess.run(
        [sys.executable, "-c", blocked + "longscope.main(['train', 'longllm', '--help'])"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=60,
    )
    for word in ("--base.nf4", "--extension.theta", "--data.spread.pieces", "--lora.whole", "--keeping.patience"):
        assert word in done.stdout
