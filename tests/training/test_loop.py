"""The training loop: steps, metrics, best and last weights, going on after an interruption."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training import Keeping, Optimisation, Order, Processes, train


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


def saved(out: Path, step: int) -> torch.Tensor:
    tensors = load_file(out / "checkpoints" / f"step-{step:07d}" / "trainable.safetensors")
    return torch.cat([tensors[name].flatten() for name in ("head.weight", "head.bias")])


def test_a_step_is_adamw_on_the_mean_loss_of_its_rows(toy: SimpleNamespace, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "max_steps": 7, "weight_decay": 0.1, "clip": 0.5, "warmup": 0.3, "schedule": "cosine"}
    model, outcome = toy.run(tmp_path, log_every=1, **settings)
    plain, order = toy.Toy(), Order(toy.rows, 4)
    optimizer = torch.optim.AdamW(
        [{"params": [plain.head.weight], "weight_decay": 0.1}, {"params": [plain.head.bias], "weight_decay": 0}]
    )
    told = toy.metrics(tmp_path)
    for step in range(7):
        share = step / 7
        rate = 0.05 * (share / 0.3 if share < 0.3 else (1 + math.cos(math.pi * (share - 0.3) / 0.7)) / 2)
        (rows,) = order.step(step)
        batch = toy.collate(rows, rows)
        loss = toy.squared(plain, batch) / len(rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        wanted = {"step": step + 1, "loss": loss.item(), "learning_rate": rate, "gradient_norm": float(norm)}
        assert told[step] == pytest.approx({**wanted, "targets": len(rows)}, abs=1e-6)
    assert torch.allclose(weights(model), weights(plain), atol=1e-6)
    assert (outcome.steps, outcome.finished, outcome.stopped) == (7, True, "")
    assert outcome.loss == pytest.approx(told[-1]["loss"])


def test_accumulating_and_yielding_parts_change_nothing(toy: SimpleNamespace, tmp_path: Path) -> None:
    def in_parts(model: Any, batch: dict[str, Any]) -> Any:
        for row in range(len(batch["wanted"])):
            yield toy.squared(model, {name: batch[name][row : row + 1] for name in ("inputs", "wanted")})

    whole, _ = toy.run(tmp_path / "whole", batch_size=4)
    split, _ = toy.run(tmp_path / "split", accumulation=4)
    parts, _ = toy.run(tmp_path / "parts", batch_size=2, accumulation=2, loss=in_parts)
    assert torch.allclose(weights(whole), weights(split), atol=1e-6)
    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)
    assert not torch.allclose(weights(whole), weights(toy.Toy()), atol=1e-2)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(toy: SimpleNamespace, tmp_path: Path) -> None:
    settings = {"batch_size": 2, "max_steps": 20, "save_every": 6, "log_every": 5, "eval_every": 4}
    whole, size = tmp_path / "whole", lambda model: {"loss": float(weights(model).norm())}
    straight, _ = toy.run(whole, toy.Toy(0.4), evaluate=size, **settings)
    calls = iter([5, 8, 7, 10**6])
    for _ in range(4):
        left = [next(calls)]

        def until(model: Any, batch: dict[str, Any], left: list[int] = left) -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return toy.squared(model, batch)

        model = toy.Toy(0.4)
        try:
            _, outcome = toy.run(tmp_path / "cut", model, until, size, **settings)
        except KeyboardInterrupt:
            torch.manual_seed(99)  # another process starts with another random state
    assert outcome.resumed == 18
    assert torch.equal(weights(model), weights(straight))
    assert torch.equal(saved(tmp_path / "cut", 20), saved(whole, 20))
    assert toy.metrics(tmp_path / "cut") == toy.metrics(whole)


def test_lines_after_the_last_checkpoint_are_dropped_when_a_run_goes_on(toy: SimpleNamespace, tmp_path: Path) -> None:
    toy.run(tmp_path / "whole", log_every=1)
    toy.run(tmp_path / "cut", log_every=1, minutes=1e-9)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 7}\n{"step": 3, "lo')
    _, outcome = toy.run(tmp_path / "cut", log_every=1)
    assert outcome.resumed == 1
    assert toy.metrics(tmp_path / "cut") == toy.metrics(tmp_path / "whole")


def test_evaluations_leave_no_trace_in_the_training(toy: SimpleNamespace, tmp_path: Path) -> None:
    def draws(model: Any) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"loss": float(torch.rand(1)) + random.random() + float(np.random.rand())}  # noqa: NPY002

    def drawing(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        assert model.training
        noise = random.random() + float(np.random.rand()) + float(torch.rand(1))  # noqa: NPY002
        return toy.squared(model, batch) * (1 + noise)

    for name, evaluate, every in (("without", None, 0), ("with", draws, 3)):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        toy.run(tmp_path / name, toy.Toy(0.3), drawing, evaluate, eval_every=every)
    assert torch.equal(saved(tmp_path / "with", 12), saved(tmp_path / "without", 12))
    told = [line for line in toy.metrics(tmp_path / "with") if "loss" in line]
    assert told == toy.metrics(tmp_path / "without")


def test_the_best_weights_are_in_the_model_at_the_end(toy: SimpleNamespace, tmp_path: Path) -> None:
    figures = iter([3.0, 1.0, float("nan"), 2.0])
    settings = {"eval_every": 3, "save_every": 3, "keep": 9, "metric": "score"}
    model, outcome = toy.run(tmp_path, evaluate=lambda model: {"score": next(figures)}, **settings)
    assert outcome.best == {"step": 6, "score": 1.0}
    assert torch.equal(weights(model), saved(tmp_path, 6))
    told = [line["eval_score"] for line in toy.metrics(tmp_path) if "eval_score" in line]
    assert told == [3.0, 1.0, None, 2.0], "what is no number is null in JSON"
    again, outcome = toy.run(tmp_path, **settings)
    assert (outcome.resumed, outcome.best["step"]) == (12, 6)
    assert torch.equal(weights(again), saved(tmp_path, 6))


def test_higher_may_be_better(toy: SimpleNamespace, tmp_path: Path) -> None:
    figures = iter([3.0, 5.0, 4.0])
    _, outcome = toy.run(tmp_path, evaluate=lambda model: {"loss": next(figures)}, eval_every=4, higher_is_better=True)
    assert outcome.best == {"step": 8, "loss": 5.0}


def test_patience_ends_a_run_for_good(toy: SimpleNamespace, tmp_path: Path) -> None:
    figures = iter([3.0, 1.0, 2.0, 2.0])
    settings = {"eval_every": 2, "patience": 2, "save_every": 0}
    model, outcome = toy.run(tmp_path, evaluate=lambda model: {"loss": next(figures)}, **settings)
    assert (outcome.steps, outcome.stopped, outcome.finished) == (8, "patience", True)
    again, outcome = toy.run(tmp_path, evaluate=lambda model: pytest.fail("nothing is left to do"), **settings)
    assert (outcome.resumed, outcome.steps, outcome.stopped) == (8, 8, "patience")
    assert torch.equal(weights(again), weights(model))


def test_a_limit_in_minutes_saves_and_the_same_call_goes_on(toy: SimpleNamespace, tmp_path: Path) -> None:
    whole, _ = toy.run(tmp_path / "whole", toy.Toy(0.2))
    _, outcome = toy.run(tmp_path / "cut", toy.Toy(0.2), minutes=1e-9)
    assert (outcome.steps, outcome.stopped, outcome.finished) == (1, "minutes", False)
    model, outcome = toy.run(tmp_path / "cut", toy.Toy(0.2))
    assert (outcome.resumed, outcome.finished) == (1, True)
    assert torch.equal(weights(model), weights(whole))


def test_a_finished_run_started_again_tells_the_same(toy: SimpleNamespace, tmp_path: Path) -> None:
    model, outcome = toy.run(tmp_path)
    again, repeated = toy.run(tmp_path, loss=lambda model, batch: pytest.fail("nothing is left to do"))
    assert torch.equal(weights(again), weights(model))
    assert (repeated.resumed, repeated.loss) == (12, outcome.loss)
    assert repeated.seconds >= outcome.seconds > 0


def test_checkpoints_are_few_and_whole(toy: SimpleNamespace, tmp_path: Path) -> None:
    toy.run(tmp_path, save_every=2, keep=3)
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == [f"step-{n:07d}" for n in (8, 10, 12)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": "never"}, "holds a run up to step 12: choose another folder, or resume it"),
        ({"max_steps": 13}, "holds another run, with steps 12 there and 13 here"),
        ({"identity": {"recipe": {"lora": {"rank": 8}, "dtype": "fp32"}}}, "recipe.lora.rank 4 there and 8 here"),
        ({"identity": {"recipe": {"lora": {"rank": 4}}}}, "recipe.dtype there only"),
    ],
)
def test_another_run_s_folder_is_refused_and_left_alone(
    toy: SimpleNamespace, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    toy.run(tmp_path, identity={"recipe": {"lora": {"rank": 4}, "dtype": "fp32"}})
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=message):
        toy.run(tmp_path, **{"identity": {"recipe": {"lora": {"rank": 4}, "dtype": "fp32"}}, **changes})
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_it_spoils_the_weights(
    toy: SimpleNamespace, tmp_path: Path, bad: float
) -> None:
    model, calls = toy.Toy(), iter(range(100))

    def spoilt(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return toy.squared(model, batch) * (bad if next(calls) == 7 else 1)

    with pytest.raises(ValueError, match=r"the loss of step 8 is (nan|inf) .*lower learning_rate \(now 0.05\)"):
        toy.run(tmp_path, model, spoilt, save_every=7)
    assert torch.equal(weights(model), saved(tmp_path, 7))


def test_a_gradient_that_is_no_number_is_caught_too(toy: SimpleNamespace, tmp_path: Path) -> None:
    # The root of nothing is nothing, its slope is infinite.
    with pytest.raises(ValueError, match=r"gradient's norm (nan|inf)"):
        toy.run(tmp_path, loss=lambda model, batch: (toy.squared(model, batch) * 0).sqrt())


def test_what_cannot_be_trained_or_judged_is_refused(toy: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        toy.run(tmp_path, toy.Toy().requires_grad_(False))
    with pytest.raises(ValueError, match="metric must be one of loss, f1, got 'accuracy'"):
        toy.run(tmp_path, evaluate=lambda model: {"loss": 1, "f1": 2}, metric="accuracy")
    order, settings = Order(4, processes=2), {"optimisation": Optimisation(), "keeping": Keeping()}
    with pytest.raises(ValueError, match="order is for 2 processes, but 1 read rows"):
        train(toy.Toy(), toy.collate, toy.squared, order, out=tmp_path, processes=Processes(), **settings)


def test_a_full_disk_is_told_and_the_earlier_checkpoint_stays(toy: SimpleNamespace, tmp_path: Path) -> None:
    whole, _ = toy.run(tmp_path / "whole")
    toy.run(tmp_path / "cut", minutes=1e-9)
    with toy.full_disk(1500), pytest.raises(OSError, match=r"step 12 .*is the disk full\?.*step-0000001 is intact"):
        toy.run(tmp_path / "cut")
    assert [file.name for file in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-0000001"]
    model, outcome = toy.run(tmp_path / "cut")
    assert outcome.resumed == 1
    assert torch.equal(weights(model), weights(whole))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": math.nan}, "learning_rate must be a positive number"),
        ({"epochs": 0}, "epochs must be a positive number"),
        ({"clip": -1}, "clip must be 0 or a positive number"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"schedule": "step"}, "schedule must be linear, cosine or constant"),
        ({"warmup": 1}, "warmup must lie between 0 and 1"),
        ({"max_steps": -1}, "max_steps must be 0 or a number of steps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimisation(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_every": -1}, "eval_every must be 0 or more"),
        ({"minutes": math.nan}, "minutes must be 0 or more"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"resume": "always"}, "resume must be auto or never"),
        ({"patience": 2}, r"patience \(2\) needs evaluations on the way: set eval_every"),
    ],
)
def test_settings_of_what_to_keep_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Keeping(**settings)


def test_steps_follow_from_epochs_unless_they_are_given() -> None:
    assert [Optimisation(epochs=epochs).steps(10) for epochs in (1, 0.25, 2)] == [10, 3, 20]
    assert Optimisation(max_steps=7).steps(10) == 7
    assert json.dumps([Optimisation(schedule="constant").rate(share) for share in (0, 0.9)]) == "[5e-05, 5e-05]"
