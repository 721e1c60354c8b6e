"""Extending the context of the tiny chat model, from a recipe to a folder that restores it without a flag."""

import json
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import longllm
from longllm.batches import Collator, batch_loss, headless
from longllm.positions import Spread
from longllm.recipe import Base, Data, Extension
from longllm.samples import load_samples
from longllm.train import Recipe, extend_context, save_adapter
from training import Keeping, LoraSettings, Optimisation, Processes

SECTIONS = {"base": Base, "extension": Extension, "data": Data, "lora": LoraSettings}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to learn and rows to be judged by."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 6), ("held", 2)):
        talks = [(f"The key is {row}{name}. What is it?", f"It is {row}{name}.") for row in range(count)]
        rows = [zip(("user", "assistant"), talk, strict=True) for talk in talks]
        turns = [{"conversations": [{"role": role, "content": words} for role, words in row]} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    return folder


@pytest.fixture
def recipe(tiny_folder: Path, files: Path) -> Any:
    """Make a recipe of the tiny model; sections are given as dicts of what changes."""

    def make(**changes: dict[str, Any]) -> Recipe:
        plain: dict[str, dict[str, Any]] = {
            "base": {"model": str(tiny_folder), "dtype": "fp32", "attention": "sdpa"},
            "extension": {"length": 1024, "theta": 1e6},
            "data": {"train": (str(files / "train.jsonl"),), "max_length": 96},
            "lora": {"rank": 4, "alpha": 8},
            "optimisation": {"learning_rate": 0.02, "batch_size": 2, "max_steps": 4},
            "keeping": {"log_every": 1},
        }
        kinds = {**SECTIONS, "optimisation": Optimisation, "keeping": Keeping}
        return Recipe(**{name: kinds[name](**{**plain[name], **changes.get(name, {})}) for name in kinds})

    return make


def judged(files: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": (str(files / "train.jsonl"),),
            "evaluate": (str(files / "held.jsonl"),),
            "max_length": 96,
            **changes,
        }
    }


def held_out_loss(loaded: longllm.LoadedModel, file: Path) -> float:
    """Return the loss that a loaded model has on the rows of a file."""
    samples = load_samples(loaded.tokenizer, [str(file)], max_length=96)
    collator = Collator(samples)
    with headless(loaded.model) as loss:
        return batch_loss(loss, loaded.model, (collator([row], ["a"]) for row in range(len(samples))))


def reloaded(folder: Path, **options: Any) -> longllm.LoadedModel:
    return longllm.load(folder, **{"dtype": "fp32", "attention": "sdpa", "device": "cpu", **options})


def test_a_run_ends_in_an_adapter_that_brings_its_context(recipe: Any, files: Path, tmp_path: Path, capfd: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        facts = extend_context(recipe(base={"recompute": "on"}, **judged(files)), tmp_path, progress=True)
    assert capfd.readouterr().out == ""
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "context.json", "README.md", "facts.json")
    }
    assert not list(tmp_path.rglob(".*")), "nothing half-written is left"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert lines[3]["loss"] < lines[0]["loss"]
    loaded = reloaded(tmp_path / "adapter")
    assert loaded.trained_length == 1024
    assert loaded.model.model.rotary_emb.inv_freq.tolist() == pytest.approx([1e6 ** (-i / 4) for i in range(4)])
    assert held_out_loss(loaded, files / "held.jsonl") == pytest.approx(facts["best"]["loss"], abs=1e-5)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["extension"]["theta"] == 1e6
    assert record["settings"]["context"]["trained"] is True
    assert len(record["data"]) == 2
    assert record["outcome"] == {**facts, "seconds": record["outcome"]["seconds"]}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        recipe().base.model
    )
    assert "restored from `context.json`" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_every_kind_of_rope_is_restored_without_a_flag(recipe: Any, tmp_path: Path, kind: str) -> None:
    extend_context(recipe(extension={"rope": kind, "theta": 0.0}, optimisation={"max_steps": 1}), tmp_path)
    loaded = reloaded(tmp_path / "adapter")
    settings = loaded.model.config.rope_parameters
    assert (settings["rope_type"], settings["factor"]) == (kind, 2.0)
    longllm.Context.read(tmp_path / "adapter").check(loaded.model)


@pytest.mark.parametrize(
    "lora",
    [{"whole": ("embed_tokens",)}, {"whole": ("embed_tokens", "norm")}, {"whole": ("lm_head",)}, {"tokens": (5, 9)}],
    ids=str,
)
def test_what_learns_beside_the_adapter_is_saved_with_it(recipe: Any, files: Path, tmp_path: Path, lora: Any) -> None:
    facts = extend_context(recipe(lora={"rank": 4, **lora}, **judged(files)), tmp_path)
    loaded = reloaded(tmp_path / "adapter")
    assert held_out_loss(loaded, files / "held.jsonl") == pytest.approx(facts["best"]["loss"], abs=1e-5)


def test_a_4_bit_base_is_trained_and_reloaded(recipe: Any, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    facts = extend_context(recipe(base={"nf4": True}, **judged(files)), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[3]["loss"] < lines[0]["loss"]
    four_bit = reloaded(tmp_path / "adapter", quantised=True)
    assert held_out_loss(four_bit, files / "held.jsonl") == pytest.approx(facts["best"]["loss"], abs=1e-4)
    assert reloaded(tmp_path / "adapter").model.config.rope_parameters["rope_theta"] == 1e6


def test_rank_0_trains_everything_and_saves_a_model(recipe: Any, files: Path, tmp_path: Path) -> None:
    lora = {"rank": 0}
    facts = extend_context(recipe(base={"dtype": "auto"}, lora=lora, **judged(files)), tmp_path)
    loaded = reloaded(tmp_path / "adapter")
    assert facts["trainable"] == sum(weight.numel() for weight in loaded.model.parameters())
    assert (loaded.trained_length, loaded.model.config.rope_parameters["rope_theta"]) == (1024, 1e6)
    assert held_out_loss(loaded, files / "held.jsonl") == pytest.approx(facts["best"]["loss"], abs=1e-5)


def test_packing_recomputing_and_accumulating_change_nothing(recipe: Any, tmp_path: Path) -> None:
    one, packs = {"optimisation": {"batch_size": 1}}, {"data": {"pack": True, "max_length": 500}}
    weights = []
    for place, changes in enumerate(
        (
            {"optimisation": {"batch_size": 6}},
            {"optimisation": {"batch_size": 1, "accumulation": 6}, "base": {"recompute": "on", "head_chunk": 3}},
            {**one, **packs},
            {**one, **packs, "base": {"attention": "flashcore"}},
        )
    ):
        extend_context(recipe(**changes), tmp_path / str(place))
        weights.append(load_file(tmp_path / str(place) / "adapter" / "adapter_model.safetensors"))
    for other in weights[1:]:
        assert all(torch.allclose(weight, other[name], atol=1e-5) for name, weight in weights[0].items())


def test_spread_positions_are_judged_at_both(recipe: Any, files: Path, tmp_path: Path) -> None:
    facts = extend_context(recipe(**judged(files, spread=Spread(length=1000, pieces=3))), tmp_path)
    assert facts["best"].keys() == {"step", "loss", "natural_loss"}
    assert facts["best"]["loss"] != pytest.approx(facts["best"]["natural_loss"])
    loaded = reloaded(tmp_path / "adapter")
    assert held_out_loss(loaded, files / "held.jsonl") == pytest.approx(facts["best"]["natural_loss"], abs=1e-5)


def test_rows_to_judge_by_may_be_a_sample(recipe: Any, files: Path, tmp_path: Path) -> None:
    data = judged(files, evaluate=(f"{files / 'held.jsonl'}[1]",))
    extend_context(recipe(**data), tmp_path)
    assert str(files / "held.jsonl") in json.loads((tmp_path / "run.json").read_text())["data"]


def test_a_finished_run_given_again_keeps_its_card(recipe: Any, tmp_path: Path) -> None:
    first = extend_context(recipe(), tmp_path)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    again = extend_context(recipe(), tmp_path)
    assert again == {**first, "resumed": 4, "seconds": again["seconds"]}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_another_recipe_s_folder_is_refused_by_name_before_anything_is_written(recipe: Any, tmp_path: Path) -> None:
    extend_context(recipe(), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for changes, told in (
        ({"lora": {"rank": 8}}, "recipe.lora.rank 4 there and 8 here"),
        ({"data": {"evaluate": recipe().data.train}}, "data|evaluate"),
        ({"keeping": {"resume": "never"}}, "holds a run up to step 4"),
    ):
        with pytest.raises(ValueError, match=told):
            extend_context(recipe(**changes), tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_adapter_that_cannot_be_written_leaves_the_last_one(
    recipe: Any, tiny_chat: ModuleType, tiny_folder: Path, tmp_path: Path
) -> None:
    extend_context(recipe(), tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    loaded = reloaded(tiny_folder)
    model = longllm.train.add_lora(loaded.model, LoraSettings(rank=16))
    context = longllm.Context.read(tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "facts.json").read_text())
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("hardship", Path(__file__).parents[1] / "training" / "hardship.py")
    spec.loader.exec_module(hardship := module_from_spec(spec))
    with hardship.full_disk(2000), pytest.raises(OSError, match=r"is the disk full\?.*nothing is lost: make room"):
        save_adapter(model, context, tmp_path / "adapter", facts, loaded.tokenizer)
    assert {file: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before
    assert not list(tmp_path.glob(".adapter*"))
    save_adapter(model, context, tmp_path / "adapter", facts, loaded.tokenizer)
    assert reloaded(tmp_path / "adapter").adapter.rank == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}, "base": {"nf4": True}}, "lora.rank 0 lets every weight learn, which base.nf4 cannot"),
        ({"lora": {"rank": 0}, "base": {"dtype": "bf16"}}, "base.dtype must be fp32, got bf16: small updates"),
        ({"base": {"dtype": "fp16"}}, "base.dtype must be bf16 or fp32 in training, got fp16"),
        ({"data": {"pack": True}}, "optimisation.batch_size must be 1 with data.pack, got 2"),
        ({"keeping": {"eval_every": 5}}, r"keeping.eval_every \(5\) needs data.evaluate"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(recipe: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Base, {"model": ""}, "model must name a model"),
        (Base, {"recompute_every": 0}, "recompute_every must be at least 1"),
        (Extension, {"length": -1}, "length must be 0 or a number of tokens"),
        (Extension, {"theta": 0.5}, "theta must be above 1"),
        (Extension, {"rope": "yarn", "factor": 0.5}, "factor must be at least 1"),
        (Extension, {"factor": 4}, "rope default changes theta alone"),
        (Data, {"max_length": 1}, "max_length must be at least 2"),
        (Data, {"min_length": 5000}, r"min_length must lie between 0 and max_length \(4096\)"),
        (Data, {"pack": True, "spread": Spread(length=9999)}, "pack and spread exclude each other"),
        (Data, {"spread": Spread(length=100)}, r"spread.length must be at least max_length \(4096\)"),
    ],
)
def test_settings_of_a_recipe_that_mean_nothing_are_refused(kind: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_what_cannot_be_trained_is_refused(recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"data.train must name at least one file"):
        extend_context(recipe(data={"train": ()}), tmp_path)
    with pytest.raises(ValueError, match=r"the data reaches position 2,000, but extension.length is 1,024"):
        extend_context(recipe(data={"spread": Spread(length=2000)}), tmp_path)
    with pytest.raises(ValueError, match="no row passes the filters"):
        extend_context(recipe(data={"max_length": 10}), tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file nowhere"):
        extend_context(recipe(data={"train": ("nowhere",)}), tmp_path)
    shared = SimpleNamespace(sharing=2, leads=True)
    monkeypatch.setattr(Processes, "started", lambda: shared)
    with pytest.raises(ValueError, match=r"context parallelism needs base.attention sdpa, got flashcore"):
        extend_context(recipe(base={"attention": "flashcore"}), tmp_path)
    assert not list(tmp_path.iterdir())
