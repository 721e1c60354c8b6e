"""Plans against what they plan for: weights, saved activations, caches and operations of real tiny models."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import longllm
from flashcore.hf import cache_bytes, register
from longllm.batches import headless
from longllm.planning import (
    Setting,
    Sizes,
    Speed,
    advise,
    calibrated,
    inference_memory,
    longest,
    probe,
    read_sizes,
    roomiest,
    step_work,
    training_memory,
)
from longllm.planning.activations import backward_bytes, kept_bytes, position_bytes, saved_bytes
from longllm.planning.memory import nf4_bytes
from longllm.recipe import Base
from longllm.train import Recipe
from training import LoraSettings, Optimisation, add_lora
from training.adapters import recompute

LLAMA = Sizes("llama", 4096, 14336, 32, 32, 8, 128, 128256)
SMOL = Sizes("llama", 576, 1536, 30, 9, 3, 64, 49152, tied=True, stored=4.0)
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}
QKVO = LoraSettings(rank=3)
GIGA = 10**9


def built(kind: str = "llama", dtype: str = "fp32", attention: str = "flashcore", **more: Any) -> Any:
    """Return a tiny model of random weights, in training mode."""
    register()
    config = transformers.AutoConfig.for_model(kind, **TINY, **more)
    options = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], "attn_implementation": attention}
    model: Any = transformers.AutoModelForCausalLM.from_config(config, **options)
    return model.train()


def prepared(model: Any, setting: Setting) -> Any:
    """Return a model with what a setting asks for."""
    model = add_lora(model, setting.lora) if setting.lora.rank else model.requires_grad_(True)
    if setting.base.recompute != "off":
        recompute(model, every=setting.base.recompute_every)
    return model.train()


def batch_of(setting: Setting) -> dict[str, torch.Tensor]:
    """Return a batch in which every token is a target."""
    ids = torch.randint(3, 60, (setting.batch, setting.length))
    positions = torch.arange(setting.length).expand_as(ids).clone()
    return {"input_ids": ids, "position_ids": positions, "targets": ids, "attention_mask": torch.ones_like(ids)}


def counted(model: Any, setting: Setting) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage once and weights not at all."""
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with headless(model) as loss, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, batch_of(setting))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_weights_are_those_of_the_model(kind: str, more: dict[str, Any]) -> None:
    model = built(kind, **more)
    sizes = Sizes.of(json.loads(model.config.to_json_string(use_diff=False)))
    assert sizes.parameters == sum(weight.numel() for weight in model.parameters())
    for lora in (QKVO, LoraSettings(rank=2, targets=("q_proj", "down_proj"), whole=("embed_tokens", "norm"))):
        tuned = add_lora(built(kind, **more), lora)
        assert sizes.trainable(lora) == sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)


CASES: dict[str, tuple[LoraSettings, dict[str, Any]]] = {
    "plain": (QKVO, {}),
    "whole embedding": (replace(QKVO, whole=("embed_tokens",)), {}),
    "recompute": (QKVO, {"recompute": "on"}),
    "recompute one in two": (QKVO, {"recompute": "on", "recompute_every": 2}),
    "transformers' sdpa": (QKVO, {"attention": "sdpa"}),
    "eager": (QKVO, {"attention": "eager"}),
    "mlp": (replace(QKVO, targets=("q_proj", "gate_proj", "up_proj", "down_proj")), {}),
    "all projections": (replace(QKVO, targets=tuple(LLAMA.linear)), {}),
    "down alone": (replace(QKVO, targets=("v_proj", "down_proj")), {}),
    "dropout": (replace(QKVO, dropout=0.1), {}),
    "everything learns": (LoraSettings(rank=0), {}),
}


# Where everything learns, it learns in fp32.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in ("fp32", "bf16") if CASES[case][0].rank or dtype == "fp32"],
)
def test_saved_activations_are_what_autograd_saves(case: str, dtype: str) -> None:
    lora, changes = CASES[case]
    setting = Setting(24, Base("-", dtype, **changes), lora, batch=2)  # type: ignore[arg-type]
    model = prepared(built("llama", dtype, setting.base.attention), setting)
    sizes = Sizes.of(model.config.to_dict())
    expected = saved_bytes(sizes, setting)
    if all(setting.recomputed(layer) for layer in range(sizes.layers)):
        # Then cosines and sines are arguments that the recomputation holds, not tensors that autograd saves.
        expected -= setting.tokens * position_bytes(sizes, setting.number)
    if not lora.rank or "embed_tokens" in lora.whole:
        expected += setting.tokens * 8  # the embedding saves its ids
    assert counted(model, setting) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norms_of_queries_and_keys_save_too(dtype: str) -> None:
    setting = Setting(24, Base("-", dtype), QKVO)  # type: ignore[arg-type]
    model = prepared(built("qwen3", dtype), setting)
    sizes = Sizes.of(model.config.to_dict())
    assert counted(model, setting) == saved_bytes(sizes, setting)


def test_four_bits_save_the_same_and_weigh_what_bitsandbytes_holds(tiny_folder: Path) -> None:
    setting = Setting(24, Base("-", "fp32", nf4=True), QKVO)
    loaded = longllm.load(tiny_folder, dtype="fp32", device="cpu", quantised=True)
    assert counted(prepared(loaded.model, setting), setting) == saved_bytes(read_sizes(tiny_folder), setting)
    import bitsandbytes

    weight = bitsandbytes.nn.Params4bit(torch.randn(256, 512), quant_type="nf4", compress_statistics=True).to("cpu")
    state = weight.quant_state
    assert nf4_bytes(256 * 512) == weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


def test_operations_are_those_that_torch_counts() -> None:
    setting = Setting(40, Base("-", "fp32", attention="eager", recompute="on"), QKVO, batch=2)
    model = prepared(built(attention="eager"), setting)
    sizes, batch = Sizes.of(model.config.to_dict()), batch_of(setting)
    with FlopCounterMode(display=False) as counter, headless(model) as loss:
        loss(model, batch).backward()
    # Eager attention computes the whole square, and 2 + 4 products where the fused one makes 2 + 5 (+ 2 again).
    square = 2 * sizes.heads * sizes.head_dim * setting.length * sizes.layers * setting.tokens
    assert counter.get_total_flops() == step_work(sizes, setting).operations + square * (2 + 4 + 2 - (2 + 5 + 2) / 2)


def test_keys_and_values_are_those_of_a_real_cache(tiny: longllm.LoadedModel, tiny_folder: Path) -> None:
    ids = list(range(3, 203))
    cache = longllm.prefill(tiny, ids, chunk=64).cache
    planned = inference_memory(read_sizes(tiny_folder), len(ids), number=4, device="cpu")
    assert planned.parts["keys and values"] == cache_bytes(cache)


def test_the_80k_run_of_llama_3_agrees_with_its_report() -> None:
    lora = LoraSettings(rank=32, whole=("embed_tokens",))
    base = Base("-", "bf16", nf4=True, recompute="on")
    setting = Setting(81920, base, lora, device="cuda")
    billions = lambda size: round(size / GIGA, 1)  # noqa: E731
    assert LLAMA.trainable(lora) == 27_262_976 + 525_336_576
    assert (
        billions(training_memory(LLAMA, replace(setting, base=replace(base, head_chunk=81920))).parts["logits"]) == 84.1
    )
    assert billions(sum(kept_bytes(LLAMA, setting, layer) for layer in range(32))) == 21.5
    unpacked = 2 * 4096 * 14336
    assert round((backward_bytes(LLAMA, setting) - unpacked) / 3 / GIGA, 2) == 2.35
    parts = training_memory(LLAMA, setting).moments["loading"]
    assert billions(sum(parts.values())) == 5.7
    assert billions(inference_memory(LLAMA, 81920).parts["keys and values"]) == 10.7
    offloaded = training_memory(LLAMA, replace(setting, base=replace(base, recompute="offload")))
    assert billions(offloaded.host) == 21.5
    assert offloaded.peak < training_memory(LLAMA, setting).peak - 20 * GIGA


BASES = [
    Base("-", "fp32", nf4=nf4, recompute=how, head_chunk=chunk)  # type: ignore[arg-type]
    for nf4, how, chunk in itertools.product((False, True), ("off", "on"), (512, 1 << 20))
]


@pytest.mark.parametrize("base", BASES, ids=lambda base: f"{base.nf4}-{base.recompute}-{base.head_chunk}")
def test_more_tokens_never_take_less_and_parts_add_up(base: Base) -> None:
    peaks = []
    for length, batch in ((128, 1), (512, 1), (512, 2), (4096, 2), (8192, 4)):
        memory = training_memory(SMOL, Setting(length, base, batch=batch))
        assert sum(memory.parts.values()) == memory.peak == max(map(memory.total, memory.moments))
        peaks.append(memory.peak)
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_a_setting_lowers_what_it_is_for_and_nothing_else() -> None:
    def moments(**changes: Any) -> dict[str, dict[str, int]]:
        base = Base("-", "bf16", head_chunk=1 << 20)
        return training_memory(SMOL, Setting(4096, replace(base, **changes), device="cuda")).moments

    plain = moments()
    for changes, lowered in (
        ({"head_chunk": 512}, {"logits"}),
        ({"recompute": "on"}, {"activations"}),
        ({"nf4": True}, {"weights: layers"}),
    ):
        turned = moments(**changes)["loss"]
        assert {part for part, size in turned.items() if size != plain["loss"][part]} == lowered
        assert all(turned[part] < plain["loss"][part] for part in lowered)


@pytest.mark.parametrize("limit", [GIGA, 3 * GIGA, 8 * GIGA])
def test_the_longest_length_fits_and_one_block_more_does_not(limit: int) -> None:
    def peak(length: int) -> int:
        return training_memory(SMOL, Setting(length, Base("-", "fp32"))).peak

    found = longest(lambda length: peak(length) <= limit)
    assert found % 128 == 0
    assert not found or peak(found) <= limit
    assert peak(found + 128) > limit
    assert longest(lambda length: False) == 0


def test_advice_fits_and_nothing_tried_that_is_cheaper_does() -> None:
    setting = Setting(4096, Base("-", "fp32", head_chunk=1 << 20), LoraSettings(rank=16))
    assert advise(SMOL, setting, 10 * GIGA).fits
    found = advise(SMOL, setting, 2 * GIGA)
    assert not found.fits
    assert found.setting is not None
    assert training_memory(SMOL, found.setting).peak <= 2 * GIGA
    assert sum(change.nbytes for change in found.changes) + training_memory(SMOL, setting).peak <= 2 * GIGA
    assert found.changes[0].words.startswith("chunked loss")
    times = [(change.alters, change.time) for change in found.alone]
    assert times == sorted(times)
    every = found.setting.base.recompute_every
    cheaper = replace(found.setting, base=replace(found.setting.base, recompute_every=every + 1))
    assert training_memory(SMOL, cheaper).peak > 2 * GIGA
    assert advise(SMOL, setting, GIGA // 10).setting is None


def test_what_is_learned_changes_only_if_nothing_else_helps() -> None:
    lora = LoraSettings(rank=32, whole=("embed_tokens",))
    setting = Setting(2048, Base("-", "bf16", nf4=True, recompute="offload"), lora, device="cuda")
    floor = training_memory(LLAMA, roomiest(LLAMA, setting)).peak
    assert not any(change.alters for change in advise(LLAMA, setting, floor).changes)
    assert any(change.alters for change in advise(LLAMA, setting, floor // 2).changes)


def test_rows_one_at_a_time_keep_the_step() -> None:
    setting = Setting(2048, Base("-", "fp32", recompute="on", head_chunk=128), batch=8)
    found = advise(SMOL, setting, training_memory(SMOL, replace(setting, batch=1, accumulation=8)).peak).setting
    assert found is not None
    assert (found.batch, found.accumulation) == (1, 8)


def test_speed_is_found_again() -> None:
    true = Speed(5e10, 0.25)
    steps = [step_work(SMOL, Setting(length)) for length in (128, 512)]
    found = Speed.fitted(*((work, true.seconds(work)) for work in steps))
    assert (found.per_second, found.overhead) == (pytest.approx(5e10), pytest.approx(0.25))
    assert Speed.fitted((steps[0], 9.0), (steps[1], 3.0)).per_second == pytest.approx(steps[1].total / 3)


def test_probe_steps_are_real_steps(tiny_folder: Path) -> None:
    recipe = Recipe(Base(str(tiny_folder), "fp32"), lora=QKVO, optimisation=Optimisation(batch_size=2, accumulation=2))
    seconds = probe(recipe, 16, 2)
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert calibrated(recipe, Setting(16, recipe.base, QKVO, batch=2, accumulation=2)).source == "two probe steps"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "model_type must be one of llama"),
        ({"model_type": "llama", "hidden_size": 8}, "must give intermediate_size"),
        ({**TINY, "model_type": "llama", "num_key_value_heads": 3}, "multiple of kv_heads"),
    ],
)
def test_configurations_that_cannot_be_planned_for_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_sizes(json.dumps(config))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Setting(0)
    with pytest.raises(ValueError, match="offload"):
        Setting(8, Base(recompute="offload"))
    with pytest.raises(ValueError, match="targets must be among"):
        training_memory(SMOL, Setting(8, lora=LoraSettings(targets=("wq",))))
    with pytest.raises(ValueError, match="no layer is called 'wte'"):
        training_memory(SMOL, Setting(8, lora=LoraSettings(whole=("wte",))))
    with pytest.raises(ValueError, match="not here"):
        read_sizes("beacon-qwen-2-7b-instruct")
