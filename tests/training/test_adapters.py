"""LoRA and NF4 on the tiny chat model: what learns, in which precision, and what is refused."""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training import LoraSettings, add_lora, nf4
from training.adapters import recompute

SMALL = {"rank": 4, "alpha": 8}


@pytest.fixture
def base(tiny_chat: ModuleType) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_chat.config(300))


def learning(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in learning(model).items()}


def test_a_fresh_adapter_changes_nothing_and_learns_alone(base: LlamaForCausalLM) -> None:
    ids = torch.arange(20)[None]
    before = base(ids).logits
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = add_lora(base, LoraSettings(**SMALL))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(ids).logits, before)
    assert len(learning(model)) == 2 * 4 * 2
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in learning(model).items())


def test_an_adapter_is_drawn_from_its_own_seed(tiny_chat: ModuleType) -> None:
    drawn = []
    for seed, outside in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(outside)
        model = add_lora(LlamaForCausalLM(tiny_chat.config(300)), LoraSettings(seed=seed, **SMALL))
        drawn.append(next(weight for name, weight in learning(model).items() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("settings", "more"),
    # peft takes "norm" for the end of a name: the norms of both layers learn too, as in LongLoRA.
    [({"whole": ("embed_tokens", "norm")}, 6), ({"tokens": (3, 5)}, 1), ({"whole": ("lm_head",)}, 1)],
)
def test_a_bf16_base_with_modules_that_learn_in_fp32_computes(
    base: LlamaForCausalLM, settings: dict[str, Any], more: int
) -> None:
    model = add_lora(base.to(torch.bfloat16), LoraSettings(**SMALL, **settings))
    assert {weight.dtype for weight in learning(model).values()} == {torch.float32}
    seen = set()
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda part, given, out: seen.add(out.dtype))
    found = gradients(model, torch.arange(12)[None])
    assert seen == {torch.bfloat16}, "the residual stream stays in the model's precision"
    extra = {name: slope for name, slope in found.items() if "lora_" not in name}
    assert len(extra) == more
    assert all(slope.dtype == torch.float32 and float(slope.norm()) > 0 for slope in extra.values())


def test_a_4_bit_base_learns_through_frozen_weights_that_stay_as_they_are(
    tiny_chat: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny_chat.build(tmp_path_factory.mktemp("four"))
    options = {"quantization_config": nf4(torch.float32), "device_map": {"": torch.device("cpu")}}
    model = add_lora(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options),
        LoraSettings(**SMALL, whole=("embed_tokens",)),
    )
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    assert {type(weight).__name__ for name, weight in frozen.items() if "base_layer" in name} == {"Params4bit"}
    assert {frozen[name].dtype for name in frozen if "norm" in name or "lm_head" in name} == {torch.bfloat16}
    before = {name: weight.clone() for name, weight in frozen.items()}
    found = gradients(model, torch.arange(12)[None])
    assert all(torch.isfinite(slope).all() for slope in found.values())
    assert float(found["base_model.model.model.embed_tokens.modules_to_save.default.weight"].norm()) > 0
    torch.optim.AdamW(learning(model).values(), lr=0.1).step()
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.items())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("adapter", [True, False])
def test_recomputing_gives_the_same_gradients(base: LlamaForCausalLM, adapter: bool, every: int) -> None:
    model: Any = add_lora(base, LoraSettings(**SMALL)) if adapter else base
    for name, weight in learning(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(300, (2, 30))
    plain = gradients(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute(model, every=every)
    calls = []
    for layer in base.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *call: calls.append(1))
    again = gradients(model, ids)
    assert len(calls) == (4 if every == 1 else 3), "two layers, both or every second computed twice"
    assert all(torch.allclose(again[name], slope, atol=1e-6) for name, slope in plain.items())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_offloading_without_an_accelerator_is_refused(base: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"offload moves activations from an accelerator .*set recompute to on"):
        recompute(base, offload=True)


def test_an_older_transformers_recomputes_every_layer_or_says_what_it_lacks(base: LlamaForCausalLM) -> None:
    class Older:
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
            self.asked = gradient_checkpointing_kwargs

    older = Older()
    recompute(older)
    assert older.asked == {"use_reentrant": False}
    with pytest.raises(ValueError, match=r"need transformers 5\.16 or newer"):
        recompute(older, every=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank must be 0 or more"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"dropout": 1}, "dropout must lie between 0 and 1"),
        ({"targets": ()}, "targets must name at least one layer"),
        ({"tokens": (1,), "whole": ("embed_tokens",)}, "tokens and whole embed_tokens exclude each other"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_layers_and_tokens_that_the_model_lacks_are_refused(base: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"no layer called 'qkv': its layers are down_proj, .*q_proj"):
        add_lora(base, LoraSettings(targets=("qkv",)))
    with pytest.raises(ValueError, match="no layer called 'wte'"):
        add_lora(base, LoraSettings(whole=("wte",)))
    with pytest.raises(ValueError, match="tokens must lie between 0 and 299, got 300"):
        add_lora(base, LoraSettings(tokens=(1, 300)))


def test_the_80k_recipe_trains_552_6_million_parameters_of_llama_3_8b() -> None:
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))
        model = add_lora(model, LoraSettings(rank=32, alpha=16, whole=("embed_tokens",)))
    counts = {name: weight.numel() for name, weight in learning(model).items()}
    assert sum(count for name, count in counts.items() if "lora_" in name) == 27_262_976
    assert sum(counts.values()) == 27_262_976 + 525_336_576


def test_an_adapter_goes_on_from_one_that_is_there(tiny_chat: ModuleType, tmp_path: Path) -> None:
    ids = torch.arange(20)[None]

    def fresh() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_chat.config(300))

    first = add_lora(fresh(), LoraSettings(**SMALL))
    for weight in learning(first).values():
        torch.nn.init.normal_(weight.data, std=0.2)
    first.save_pretrained(tmp_path)
    second = add_lora(fresh(), LoraSettings(**SMALL, start=str(tmp_path)))
    assert learning(second).keys() == learning(first).keys()
    torch.testing.assert_close(second.eval()(ids).logits, first.eval()(ids).logits, rtol=0, atol=0)
    for settings, message in (
        ({"rank": 2}, "of another rank"),
        ({"targets": ("q_proj", "k_proj")}, "has other targets than the one that is to learn"),
        ({"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")}, "has other targets"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(fresh(), LoraSettings(**{**SMALL, **settings, "start": str(tmp_path)}))
    with pytest.raises(FileNotFoundError, match="there is no adapter to start from"):
        add_lora(fresh(), LoraSettings(**SMALL, start="nowhere"))
    with pytest.raises(ValueError, match=r"start .* is an adapter"):
        LoraSettings(rank=0, start="x")
