"""Beacon checkpoints: the released layout in both directions, beacons alone, low rank, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import beacon
from beacon.checkpoint import beacons_of

CONFIG = beacon.BeaconConfig(window=8, stride=8, ratio=(2, 4), ratio_mix="adapt-4", param=("q", "k", "v"))
IDS = torch.arange(5, 42)[None]


def marked(model: Any, config: beacon.BeaconConfig = CONFIG, rank: int = 0) -> beacon.BeaconWeights:
    """Return beacons unlike the base model's."""
    weights = beacon.BeaconWeights.initialised(model, config, rank).requires_grad_(False)
    for parameter in weights.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return weights


def logits(model: Any, weights: beacon.BeaconWeights) -> torch.Tensor:
    with beacon.installed(model, weights.config, weights), torch.no_grad():
        return model(IDS).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return everything that the safetensors files of a folder hold."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def released(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint in the layout of the released Qwen2 one: 28 layers, biases, untied head, several shards."""
    sizes = {"num_hidden_layers": 28, "tie_word_embeddings": False, "hidden_size": 16, "intermediate_size": 8}
    model = build("qwen2", **sizes, num_attention_heads=2, num_key_value_heads=1, eos_token_id=2)
    weights = marked(model)
    folder = tmp_path_factory.mktemp("released")
    beacon.save_released(folder, model, weights, max_shard_size="100KB")
    return folder, model, weights


@pytest.fixture(scope="module")
def qwen(build: Any) -> Any:
    """A tiny model with an end-of-sequence token; not to be changed."""
    return build("qwen2", eos_token_id=2)


def test_the_released_layout_has_508_tensors_under_the_released_names(released: Any) -> None:
    folder, model, _ = released
    found = tensors_of(folder)
    own = {name for name in found if "beacon_" in name}
    layer = "model.layers.27.self_attn.beacon_{}_proj.{}"
    assert (len(found), len(own)) == (508, 28 * 6 + 1)
    assert own >= {layer.format(name, kind) for name in "qkv" for kind in ("weight", "bias")}
    assert found["model.beacon_embed_tokens.weight"].shape == (1, 16)
    assert found[layer.format("k", "weight")].shape == model.model.layers[0].self_attn.k_proj.weight.shape
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert len(set(index["weight_map"].values())) > 1
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["Qwen2ForCausalLM"]
    assert {name: settings[name] for name in CONFIG.to_hf()} == CONFIG.to_hf()


def test_a_released_checkpoint_loads_with_nothing_missing_or_left_and_saves_back_identically(
    released: Any, tmp_path: Path
) -> None:
    folder, model, weights = released
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    beacons = beacon.load_beacons(folder, loaded)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) <= set(beacons.released())
    assert beacons.config == CONFIG
    assert torch.equal(logits(loaded.eval(), beacons), logits(model, weights))
    beacon.save_released(tmp_path, loaded, beacons, max_shard_size="100KB")
    before, after = tensors_of(folder), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_a_tied_head_is_not_written_twice(build: Any, tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True, eos_token_id=2)
    weights = marked(model)
    beacon.save_released(tmp_path, model, weights)
    assert "lm_head.weight" not in tensors_of(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, beacon.load_beacons(tmp_path, loaded)), logits(model, weights))


@pytest.mark.parametrize("rank", [0, 3])
def test_beacons_alone_come_back(rank: int, qwen: Any, tmp_path: Path) -> None:
    model = qwen
    weights = marked(model, rank=rank)
    beacon.save_beacons(tmp_path, model, weights, steps=10)
    back = beacon.load_beacons(tmp_path, model)
    assert (back.rank, back.config) == (rank, CONFIG)
    assert torch.equal(logits(model, back), logits(model, weights))
    assert set(tensors_of(tmp_path)) == set(weights.released())


def test_low_rank_beacons_start_as_the_base_and_widen_to_full_ones(qwen: Any) -> None:
    model = qwen
    plain = beacon.BeaconWeights.initialised(model, CONFIG)
    thin = beacon.BeaconWeights.initialised(model, CONFIG, rank=2)
    assert torch.equal(logits(model, thin), logits(model, plain))
    changed = marked(model, rank=2)
    assert sum(x.numel() for x in changed.parameters()) < sum(x.numel() for x in plain.parameters()) / 3
    torch.testing.assert_close(logits(model, changed.widened(model)), logits(model, changed), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model, changed), logits(model, plain), atol=1e-2)


def test_the_reference_initialisation_is_the_eos_row_and_the_base_projections(build: Any) -> None:
    model = build("qwen2", eos_token_id=[7, 9], bos_token_id=3)
    weights = beacon.BeaconWeights.initialised(model, CONFIG)
    assert torch.equal(weights.embed_tokens[0], model.model.embed_tokens.weight[7])
    base = model.model.layers[1].self_attn
    own = weights.released()
    for name in "qkv":
        prefix = f"model.layers.1.self_attn.beacon_{name}_proj"
        assert torch.equal(own[f"{prefix}.weight"], getattr(base, f"{name}_proj").weight)
        assert torch.equal(own[f"{prefix}.bias"], getattr(base, f"{name}_proj").bias)
    other = beacon.BeaconWeights.initialised(model, beacon.BeaconConfig(embed_init="bos"))
    assert torch.equal(other.embed_tokens[0], model.model.embed_tokens.weight[3])
    assert list(other.released()) == ["model.beacon_embed_tokens.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("model.layers.0.self_attn.beacon_k_proj.bias"), "lacks 1 beacon tensors"),
        (lambda held: held.update({"model.layers.9.self_attn.beacon_k_proj.weight": torch.ones(1)}), "unexpected 1"),
        (lambda held: held.update({"model.beacon_embed_tokens.weight": torch.ones(2, 32)}), "another shape of 1"),
    ],
)
def test_beacons_that_do_not_fit_are_refused_by_name(change: Any, message: str, qwen: Any, tmp_path: Path) -> None:
    model = qwen
    beacon.save_beacons(tmp_path, model, marked(model))
    held = tensors_of(tmp_path)
    change(held)
    save_file(held, tmp_path / "beacons.safetensors")
    with pytest.raises(ValueError, match=message):
        beacon.load_beacons(tmp_path, model)


def test_a_folder_without_beacons_and_a_damaged_file_are_refused(qwen: Any, tmp_path: Path) -> None:
    model = qwen
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="no Activation Beacon checkpoint"):
        beacon.load_beacons(tmp_path, model)
    beacon.save_beacons(tmp_path, model, marked(model))
    (tmp_path / "beacons.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"beacons\.safetensors is damaged"):
        beacon.load_beacons(tmp_path, model)
    with pytest.raises(ValueError, match="no low-rank beacons"):
        beacon.save_released(tmp_path, model, marked(model, rank=2))


def test_a_model_brings_its_own_beacons_or_gets_untrained_ones(build: Any, tmp_path: Path) -> None:
    model = build("qwen2", eos_token_id=2)
    _, trained = beacons_of(model, 32)
    assert not trained
    assert "untrained" in beacon.method("beacon").warning(model)
    weights = marked(model)
    beacon.save_released(tmp_path, model, weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    own, trained = beacons_of(loaded, 32)
    assert (trained, own.config, own.fingerprint()) == (True, CONFIG, weights.fingerprint())
    assert beacon.method("beacon").warning(loaded) is None
