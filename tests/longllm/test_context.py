"""RoPE settings: put on a configuration, in force in the model, kept beside an adapter."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from longllm import Context
from longllm.context import context_from, parse_rope

NATIVE, THETA, HEAD = 512, 10000.0, 8


def natural(theta: float = THETA, head: int = HEAD) -> torch.Tensor:
    """theta^(-2i/d), in double precision."""
    return torch.tensor([theta ** (-2 * i / head) for i in range(head // 2)], dtype=torch.float64)


def yarn(factor: float) -> torch.Tensor:
    """Arxiv 2309.00071, section 3.2: a ramp over the turns that a channel makes within the native length."""

    def channel(turns: float) -> float:
        return HEAD * math.log(NATIVE / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), HEAD - 1)
    ramp = ((torch.arange(HEAD // 2).double() - low) / (high - low)).clamp(0, 1)
    return natural() * (1 - ramp) + natural() / factor * ramp


def llama3(factor: float) -> torch.Tensor:
    """Llama 3.1: long waves are stretched, short ones are not, with a ramp from 1 to 4 turns in the native length."""
    turns = NATIVE * natural() / (2 * math.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    return (1 - smooth) * natural() / factor + smooth * natural()


#: kind -> (options, length, speeds as they are at first, attention factor)
KINDS: dict[str, tuple[dict[str, float], int, torch.Tensor, float]] = {
    "default": ({"theta": 2.5e5}, 2048, natural(2.5e5), 1.0),
    "linear": ({}, 2048, natural() / 4, 1.0),
    "dynamic": ({"factor": 4}, 2048, natural(), 1.0),
    "yarn": ({"factor": 4}, 2048, yarn(4), 0.1 * math.log(4) + 1),
    "llama3": ({}, 2048, llama3(4), 1.0),
    "longrope": ({}, 2048, natural(), math.sqrt(1 + math.log(4) / math.log(NATIVE))),
}


@pytest.fixture
def config(tiny_chat: ModuleType) -> LlamaConfig:
    return tiny_chat.config(300)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_rotates_as_the_settings_say(config: LlamaConfig, kind: str, tmp_path: Path) -> None:
    options, length, speeds, factor = KINDS[kind]
    context = context_from(config, kind, length=length, base="tiny", **options)
    context.save(tmp_path)
    restored = Context.read(tmp_path)
    assert restored == context
    restored.apply(config)
    model = LlamaForCausalLM(config)
    rotary = model.model.rotary_emb
    assert torch.allclose(rotary.inv_freq.double(), speeds, rtol=1e-5)
    assert rotary.attention_scaling == pytest.approx(factor, abs=1e-6)
    context.check(model)
    assert config.max_position_embeddings == (NATIVE if kind == "dynamic" else length)
    if kind in ("dynamic", "longrope"):
        model(torch.zeros(1, 2, dtype=torch.long), position_ids=torch.tensor([[0, length - 1]]))
        slower = rotary.inv_freq.double()
        base = THETA * (4 * length / NATIVE - 3) ** (HEAD / (HEAD - 2))
        assert torch.allclose(slower, natural(base) if kind == "dynamic" else natural() / 4, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dynamic", "longrope")])
def test_settings_put_on_too_late_are_caught(config: LlamaConfig, kind: str) -> None:
    options, length, _, _ = KINDS[kind]
    model = LlamaForCausalLM(config)
    context = context_from(config, kind, length=length, **options)
    with pytest.raises(ValueError, match="should be"):
        context.check(model)
    context.apply(model.config)
    with pytest.raises(ValueError, match=r"does not follow|scales attention by"):
        context.check(model)


def test_the_second_speed_of_the_80k_recipe() -> None:
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, max_position_embeddings=8192, rope_theta=5e5)
    context = context_from(config, length=81920, theta=200e6)
    assert float(natural(5e5, 128)[1]) == pytest.approx(0.8146, abs=1e-4)
    context.apply(config)
    from longllm.context import speeds

    assert float(speeds(config)[1]) == pytest.approx(0.7418, abs=1e-4)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (81920, 200e6)


def test_a_scaling_that_is_replaced_leaves_nothing_behind(config: LlamaConfig) -> None:
    context_from(config, "yarn", length=2048).apply(config)
    plain = context_from(config, length=4096, theta=1e6)
    plain.apply(config)
    assert dict(config.rope_parameters) == {"rope_type": "default", "rope_theta": 1e6}
    plain.check(LlamaForCausalLM(config))
    assert context_from(config, "linear", length=8192).rope_parameters["factor"] == 2


def test_words_of_a_command_line(config: LlamaConfig) -> None:
    assert parse_rope("theta:2.5e6", config, 4096).rope_parameters == {"rope_type": "default", "rope_theta": 2.5e6}
    assert parse_rope("theta:2.5e6", config).max_position_embeddings == NATIVE
    found = parse_rope("yarn:8", config, base="tiny")
    assert (found.rope_parameters["factor"], found.max_position_embeddings, found.base) == (8, 8 * NATIVE, "tiny")
    for words in ("yarn", "yarn:x", "yarn:-1", "ntk:4", "default:4", ""):
        with pytest.raises(ValueError, match="rope must be KIND:NUMBER with a kind of theta, linear"):
            parse_rope(words, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "rope_type must be one of default, linear"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta must be a number above 1, got None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": math.inf}}, "rope_theta must be a number above 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 8}
    Context(**good)
    with pytest.raises(ValueError, match=message):
        Context(**{**good, **changes})


def test_what_a_model_cannot_do_is_refused(config: LlamaConfig) -> None:
    context = context_from(config, length=1024, theta=1e6)
    with pytest.raises(ValueError, match="a gpt2 model has no rotary positions"):
        context.apply(GPT2Config())
    with pytest.raises(ValueError, match="RoPE settings per kind of layer"):
        context.apply(Gemma3TextConfig())
    lacking = Context({"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}, 1024)
    with pytest.raises(ValueError, match=r"transformers refuses the RoPE settings .*longrope"):
        lacking.apply(config)
    with pytest.raises(ValueError, match="length must be at least the model's own 512 tokens, got 100"):
        context_from(config, "yarn", length=100)
    with pytest.raises(ValueError, match=r"factor must be at least 1, got 0\.5"):
        context_from(config, "yarn", length=1000, factor=0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{", "does not describe a context"),
        ("[1]", "does not describe a context"),
        (json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}), "does not describe a context"),
        (json.dumps({"rope_parameters": {}, "max_position_embeddings": 8, "theta": 1}), "unknown key 'theta'"),
        (
            json.dumps({"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}, "max_position_embeddings": 8}),
            "rope_type must be one of",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, words: str, message: str) -> None:
    (tmp_path / "context.json").write_text(words)
    with pytest.raises(ValueError, match=rf"context\.json does not describe a context: .*{message}|{message}"):
        Context.read(tmp_path)


def test_no_file_is_no_context(tmp_path: Path) -> None:
    assert Context.read(tmp_path) is None
