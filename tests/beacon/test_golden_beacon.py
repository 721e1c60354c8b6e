"""Activation Beacon against the reference implementation's numbers (tests/golden/beacon/README.md describes them)."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import beacon
from beacon.beacon_contract import verify_beacons
from beacon.plan import RowPlan
from beacon.ratios import Ratios, positions_known
from beacon.scoring import losses, score
from flashcore import rope

GOLDEN_SYSTEM = "beacon"
TOLERANCE = 1e-5


def read_case(path: Path) -> SimpleNamespace:
    """Return the stock model of a case, its beacons, inputs and outputs."""
    with safe_open(path, framework="pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    settings, how = json.loads(facts["config"]), json.loads(facts["procedure"])
    config = beacon.BeaconConfig.from_hf(settings)
    foreign = ("beacon_", "torch_dtype", "architectures", "pretraining_tp", "model_type")
    own = {name: value for name, value in settings.items() if not name.startswith(foreign)}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings["model_type"], **own))
    weights = {name: value for name, value in tensors.items() if not name.startswith(("in.", "out."))}
    added = {name: value for name, value in weights.items() if "beacon" in name}
    missing, unexpected = model.load_state_dict({k: v for k, v in weights.items() if k not in added}, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if settings["tie_word_embeddings"] else set())
    model.tie_weights()
    beacons = beacon.BeaconWeights(model, config)
    beacons.load_released(added)
    inputs = {name.removeprefix("in."): value for name, value in tensors.items() if name.startswith("in.")}
    wanted = {name.removeprefix("out."): value for name, value in tensors.items() if name.startswith("out.")}
    return SimpleNamespace(
        config=config, model=model.train(how["training"]), beacons=beacons, ids=inputs["input_ids"],
        labels=inputs.get("labels"), wanted=wanted, how=how, trace=json.loads(facts["trace"]),
    )  # fmt: skip


@pytest.fixture
def case(golden_file: Path) -> SimpleNamespace:
    return read_case(golden_file) if golden_file.suffix == ".safetensors" else SimpleNamespace(path=golden_file)


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got.detach(), wanted, atol=tolerance, rtol=0)


def check_logits(case: SimpleNamespace) -> beacon.BeaconCache:
    """Run the calls of a case and its decoding; compare what each returns."""
    cache, calls, chosen, at = beacon.BeaconCache(case.model, case.config), [], [], 0
    for number, size in enumerate(case.how["splits"]):
        logits = case.model(case.ids[:, at : at + size], past_key_values=cache).logits
        calls.append(logits)
        at += size
        if f"call.{number}.logits" in case.wanted:
            close(logits[:, -case.wanted[f"call.{number}.logits"].shape[1] :], case.wanted[f"call.{number}.logits"])
    close(calls[-1][:, -case.wanted["logits"].shape[1] :], case.wanted["logits"])
    last = calls[-1]
    for number in range(case.how["max_new_tokens"]):
        close(last[:, -1], case.wanted["decode_logits"][:, number])
        chosen.append(last[:, -1:].argmax(-1))
        if number + 1 < case.how["max_new_tokens"]:
            last = case.model(chosen[-1], past_key_values=cache).logits
            calls.append(last)
    if chosen:
        assert torch.equal(torch.cat(chosen, 1), case.wanted["generated"])
    close(torch.cat(calls, 1), case.wanted["all_logits"])
    return cache


def check_memory(case: SimpleNamespace, cache: beacon.BeaconCache) -> None:
    """Compare what every layer holds; the reference's keys are from before RoPE."""
    plan = cache.plans[0]
    borders = {"sink": (0, plan.sink), "memory": (plan.sink, plan.sink + plan.memory)}
    borders["raw"] = (plan.sink + plan.memory, plan.held)
    for name, (begin, end) in borders.items():
        assert end - begin == int(case.wanted[f"{name}_len"])
    places = torch.arange(plan.held)
    for number, layer in enumerate(cache.layers):
        rows = [layer.view(row, plan) for row in range(len(cache.plans))]
        keys, values = (torch.cat(parts) for parts in zip(*rows, strict=True))
        keys = rope.rerotate(keys, places, torch.zeros_like(places), cache.rotary.inv_freq)
        for name, (begin, end) in borders.items():
            if end > begin:
                close(keys[:, :, begin:end], case.wanted[f"{name}_key.{number}"])
                close(values[:, :, begin:end], case.wanted[f"{name}_value.{number}"])


def check_loss(case: SimpleNamespace) -> None:
    """Compare losses, and gradients where the case trains; the last layer's unused ones are zero."""
    found = losses(case.model, case.ids, case.labels, case.config)
    close(found.mean, case.wanted["loss"].squeeze())
    close(found.rows, case.wanted["batch_loss"])
    assert found.counted.tolist() == case.wanted["valid_token_num"].tolist()
    gradients = {name.removeprefix("grad."): value for name, value in case.wanted.items() if name.startswith("grad.")}
    assert bool(gradients) == case.how["training"]
    if gradients:
        found.mean.backward()
        own = case.beacons.released_parameters()
        assert gradients.keys() == own.keys()
        for name, parameter in own.items():
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            close(got, gradients[name], 1e-6)


def check_trace(case: SimpleNamespace) -> None:
    """Compare the plan of every forward pass with the one that the reference made."""
    plan = RowPlan(case.config, ratios=Ratios(case.config, positions_known(case.model.config)))
    made, sizes = [], []
    for pending in [*case.how["splits"], *[1] * max(0, case.how["max_new_tokens"] - 1)]:
        left = pending
        while left:
            taken = plan.ratios.taken
            step = plan.plan(left, case.how["training"])
            left -= step.raw
            plan.commit(step)
            chosen = [step.ratio] if plan.ratios.taken > taken else []
            made.append({"flags": step.flags, "key_len": step.start + step.slots, "query_positions": step.positions,
                         "ratio_chosen": chosen})  # fmt: skip
            sizes.append(-1 if step.ratio == 0 else step.beacons)
    if case.config.parallel_window == 1:  # joint windows are run one by one here
        assert made == case.trace
        assert sizes == case.wanted["beacon_sizes"].tolist()


def check_contract(case: SimpleNamespace) -> None:
    """Hold every invariant of the contract with the windows and the beacons of the case."""
    case.model.eval()
    ids = torch.randint(3, case.model.config.vocab_size, (75,)).tolist()
    # Windows that 75 tokens fill several times, whatever the case has.
    window = max(min(case.config.window, 16), case.config.sink_size + 1)

    def make(ratio: int) -> beacon.BeaconCache:
        config = dataclasses.replace(case.config, ratio=(ratio,), window=window, stride=window)
        return beacon.BeaconCache(case.model, config)

    assert len(verify_beacons(case.model, case.beacons, ids, make)) == 6


def check_scoring(case: SimpleNamespace) -> None:
    """Get the same logits window by window."""
    case.model.eval()
    size = case.ids.shape[1]
    cache = beacon.BeaconCache(case.model, case.config, expected=size)
    parts = list(score(case.model, case.ids, cache))
    assert [part.shape[1] for part in parts[:-1]] == [case.config.window] * (len(parts) - 1)
    if not case.how["training"]:
        close(torch.cat(parts, 1), case.wanted["all_logits"][:, :size])


def check_policy(path: Path) -> None:
    """Compare the choice of ratios, where no model is involved."""
    facts = json.loads(path.read_text())
    for row in facts["adapt"]:
        fields = {name.removeprefix("beacon_"): value for name, value in row.items() if name.startswith("beacon_")}
        config = beacon.BeaconConfig(**fields, stride=row["beacon_window"], ratio_mix=f"adapt-{row['adapt']}")
        shape = SimpleNamespace(
            max_position_embeddings=row["max_position_embeddings"], rope_scaling=row["rope_scaling"]
        )
        for length, ratio in row["table"]:
            assert Ratios(config, positions_known(shape)).choose(length, 0) == ratio
    for row in facts["step_random"]:
        own = {"window": row["beacon_window"], "stride": row["beacon_window"], "ratio": row["beacon_ratio"]}
        if row.get("error"):
            with pytest.raises(ValueError, match="nothing to choose from"):
                beacon.BeaconConfig(**own)
            continue
        ratios = Ratios(beacon.BeaconConfig(**own), 1e9)
        assert [ratios.choose(10**6, 0) for _ in row["draws"]] == row["draws"]
    for row in facts["schedules"]:
        fields = {name.removeprefix("beacon_"): value for name, value in row.items() if name.startswith("beacon_")}
        ratios = Ratios(beacon.BeaconConfig(**fields, stride=row["beacon_window"]), 1e9)
        for sequence in row["sequences"]:
            check_schedule(ratios, sequence, row["training"])


def check_schedule(ratios: Ratios, sequence: dict[str, Any], training: bool) -> None:
    """Read one text after another with one generator, as the reference does."""
    ratios.restart()
    plan, left, chosen, sizes = RowPlan(ratios.config, ratios=ratios), sequence["length"], [], []
    while left:
        taken = ratios.taken
        step = plan.plan(left, training)
        left -= step.raw
        plan.commit(step)
        chosen.append(step.ratio if ratios.taken > taken else None)
        sizes.append(-1 if step.ratio == 0 else step.beacons)
    assert (chosen, sizes) == (sequence["ratios"], sequence["beacons"])


def test_equals_the_reference(case: SimpleNamespace) -> None:
    if not hasattr(case, "model"):
        check_policy(case.path)
        return
    with beacon.installed(case.model, case.config, case.beacons):
        with torch.set_grad_enabled(case.how["training"]):
            cache = check_logits(case)
            check_memory(case, cache)
            if case.labels is not None:
                check_loss(case)
        check_trace(case)
        with torch.no_grad():
            check_scoring(case)
            check_contract(case)
    if "base_logits" in case.wanted:
        close(case.model(case.ids).logits, case.wanted["base_logits"])
