"""Adapters: loaded in the layouts that exist, with their context in force, or refused with the reason."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import longllm
from longllm import shipped
from longllm.context import Context
from longllm.merge import merge

THETA = 2e8
EMBED = "base_model.model.model.embed_tokens"
PROBE = torch.arange(3, 43).unsqueeze(0)


def extended(base: Path | str, trained: bool = True, **rope: object) -> Context:
    """Return a context of 4,096 tokens for the tiny model."""
    return Context({"rope_type": "default", "rope_theta": THETA, **rope}, 4096, str(base), trained)


def load(model: Path | str, **options: object) -> longllm.LoadedModel:
    """Load in fp32 on the CPU."""
    return longllm.load(model, **{"dtype": "fp32", "attention": "sdpa", "device": "cpu", **options})


def refusal(model: Path | str, **options: object) -> str:
    """Return why a model is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(model, **options)
    return str(caught.value)


def logits(loaded: longllm.LoadedModel) -> torch.Tensor:
    """Return the logits [40, vocab] of a probe."""
    with torch.inference_mode():
        return loaded.model(input_ids=PROBE).logits[0]


def by_hand(base: Path, adapter: Path, theta: float) -> torch.Tensor:
    """Return the logits of base and adapter by the formula W + alpha / r B A, without peft."""
    config = transformers.AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    config.tie_word_embeddings = False
    model = transformers.LlamaForCausalLM(config).eval()
    weights, tuned = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for name, down in tuned.items():
        if name.endswith("lora_A.weight"):
            up = tuned[name.replace("lora_A", "lora_B")]
            place = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[place] = weights[place] + settings["lora_alpha"] / settings["r"] * up @ down
    if f"{EMBED}.weight" in tuned:
        weights["model.embed_tokens.weight"] = tuned[f"{EMBED}.weight"]
    if (rows := tuned.get(f"{EMBED}.token_adapter.trainable_tokens_delta")) is not None:
        tied = transformers.AutoConfig.from_pretrained(base).tie_word_embeddings
        for matrix in ["model.embed_tokens.weight", *["lm_head.weight"] * tied]:
            weights[matrix] = weights[matrix].clone()
            weights[matrix][settings["trainable_token_indices"]] = rows
    model.load_state_dict(weights)
    with torch.inference_mode():
        return model(input_ids=PROBE).logits[0]


@pytest.fixture(scope="module")
def bases(tiny_chat: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The tiny model with a head of its own and with the head tied to the embedding, logits of ordinary size."""
    root = tmp_path_factory.mktemp("bases")
    return {
        tied: tiny_chat.build(root / f"tied-{tied}", tie_word_embeddings=tied, initializer_range=0.2)
        for tied in (False, True)
    }


@pytest.fixture(scope="module")
def trained(tiny_chat: ModuleType, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with its context, for the tiny model."""
    return tiny_chat.adapter(tmp_path_factory.mktemp("adapter") / "whale", tiny_folder, extended(tiny_folder))


@pytest.fixture
def broken(trained: Path, tmp_path: Path) -> Path:
    """A copy of that adapter, to be spoiled."""
    return Path(shutil.copytree(trained, tmp_path / "broken"))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1, 2, 70]}])
def test_lora_with_an_embedding_loads_as_the_released_adapter_is_laid_out(
    tiny_chat: ModuleType, bases: dict[bool, Path], tmp_path: Path, tied: bool, merge: bool, part: dict
) -> None:
    # namespace-Pt/Llama-3-8B-Instruct-80K-QLoRA: LoRA on q, k, v, o, the whole embedding, and no word about theta.
    adapter = tiny_chat.adapter(tmp_path / "adapter", bases[tied], **part)
    names = {name.removeprefix("base_model.model.") for name in load_file(adapter / "adapter_model.safetensors")}
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert any(name.startswith("model.embed_tokens") for name in names)
    loaded = load(adapter, merge=merge, context=extended(bases[tied]))
    torch.testing.assert_close(logits(loaded), by_hand(bases[tied], adapter, THETA), rtol=1e-4, atol=2e-5)
    assert type(loaded.model) is transformers.LlamaForCausalLM
    assert loaded.trained_length == 4096


def test_an_adapter_brings_its_context(trained: Path, tiny_folder: Path) -> None:
    before = (tiny_folder / "config.json").read_bytes()
    model, tokenizer = loaded = load(trained)
    assert loaded.name == str(trained)
    assert (model, tokenizer) == (loaded.model, loaded.tokenizer)
    # Heads of 8: four speeds, the second theta ** (-2 / 8).
    assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(THETA**-0.25)
    assert (model.config.max_position_embeddings, loaded.trained_length) == (4096, 4096)
    assert (tiny_folder / "config.json").read_bytes() == before
    torch.testing.assert_close(logits(loaded), by_hand(tiny_folder, trained, THETA), rtol=1e-4, atol=1e-3)


def test_sharpened_attention_is_restored_merged_and_flashcores_alone(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "sharpened"))
    context = Context.read(folder)
    assert context is not None
    dataclasses.replace(context, log_origin=8).save(folder)
    assert "only flashcore does" in refusal(folder)
    sharpened, plain = load(folder, attention="flashcore"), load(trained, attention="flashcore")
    assert (logits(sharpened) - logits(plain))[9:].abs().max() > 1e-3
    torch.testing.assert_close(logits(sharpened)[:8], logits(plain)[:8])
    merge(folder, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged", attention="flashcore")), logits(sharpened))
    assert "only flashcore does" in refusal(tmp_path / "merged")


def test_an_adapter_without_a_context_says_that_the_base_keeps_its_own(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (broken / "context.json").unlink()
    loaded = load(broken)
    assert "has no context.json" in caplog.text
    assert "10000.0" in caplog.text
    assert loaded.trained_length == 512
    caplog.clear()
    assert load(broken, context=extended("")).trained_length == 4096
    assert not caplog.text


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "rope_theta": 1e4},
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 8.0},
    ],
)
def test_a_context_put_on_afterwards_claims_a_length_that_was_not_trained(tiny_folder: Path, rope: dict) -> None:
    loaded = load(tiny_folder, context=extended(tiny_folder, trained=False, **rope))
    assert loaded.model.config.max_position_embeddings == 4096
    assert loaded.trained_length == 512


def test_a_context_over_that_of_an_adapter_leaves_what_was_trained(trained: Path, tiny_folder: Path) -> None:
    further = Context({"rope_type": "default", "rope_theta": 1e9}, 9000, str(tiny_folder))
    loaded = load(trained, context=further)
    assert loaded.model.config.max_position_embeddings == 9000
    assert loaded.model.model.rotary_emb.inv_freq[1].item() == pytest.approx(1e9**-0.25)
    assert loaded.trained_length == 4096


@pytest.mark.parametrize("merge", [True, False])
def test_merged_or_beside_the_weights_have_the_asked_dtype(trained: Path, merge: bool) -> None:
    loaded = load(trained, dtype="bf16", merge=merge)
    own = {weight.dtype for name, weight in loaded.model.named_parameters() if "lora_" not in name}
    assert own == {torch.bfloat16}
    # The speeds must not be rounded with the weights.
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert loaded.model.model.rotary_emb.inv_freq[1].item() == pytest.approx(THETA**-0.25)


def test_four_bit_weights_keep_the_adapter_beside_them(trained: Path, tiny_folder: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    loaded = load(trained, quantised=True)
    assert loaded.quantised
    layer = loaded.model.model.layers[1].self_attn.v_proj
    weight = layer.base_layer.weight
    assert weight.dtype == torch.uint8
    assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
    plain = load(trained)
    whole = {name.replace(".base_layer", ""): value for name, value in loaded.model.named_parameters()}
    for name, value in plain.model.named_parameters():
        value.data = whole[name].data
        if whole[name].dtype == torch.uint8:
            value.data = functional.dequantize_4bit(whole[name], whole[name].quant_state).float()
    tuned = load_file(trained / "adapter_model.safetensors")
    for name, down in tuned.items():
        if name.endswith("lora_A.weight"):
            place = plain.model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
            place.data += 0.5 * tuned[name.replace("lora_A", "lora_B")] @ down
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-3, atol=1e-2)
    assert "round the adapter away" in refusal(trained, quantised=True, merge=True)


def test_a_model_and_an_adapter_can_be_given_apart(
    trained: Path, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(tiny_folder, adapter=trained)
    torch.testing.assert_close(logits(loaded), logits(load(trained)))
    assert not caplog.text
    renamed = Path(shutil.copytree(tiny_folder, tmp_path / "other-name"))
    load(renamed, adapter=trained)
    assert "is that the same model" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 48}, "has other shapes for"),
        ({"num_hidden_layers": 1}, "the model has no place for 8 tensors, such as model.layers.1.self_attn"),
        ({"num_hidden_layers": 3}, "the adapter lacks 8 tensors, such as model.layers.2.self_attn"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_name(
    tiny_chat: ModuleType, trained: Path, tmp_path: Path, changes: dict, said: str
) -> None:
    other = tiny_chat.build(tmp_path / "other", **changes)
    reason = refusal(other, adapter=trained)
    assert said in reason
    assert str(trained) in reason
    assert "other" in reason


def test_an_adapter_for_another_architecture_is_refused(trained: Path, broken: Path) -> None:
    settings = json.loads((broken / "adapter_config.json").read_text())
    settings["target_modules"] = ["query_key_value"]
    (broken / "adapter_config.json").write_text(json.dumps(settings))
    reason = refusal(broken)
    assert "does not fit" in reason
    assert "query_key_value" in reason


def test_an_embedding_for_another_vocabulary_is_refused(
    tiny_chat: ModuleType, tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = tiny_chat.adapter(tmp_path / "adapter", tiny_folder, modules_to_save=["embed_tokens"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    rows = len(tensors[f"{EMBED}.weight"])
    save_file({**tensors, f"{EMBED}.weight": tensors[f"{EMBED}.weight"][:-5].clone()}, file)
    reason = refusal(adapter)
    assert f"model.embed_tokens.weight ([{rows - 5}, 32] in the adapter, [{rows}, 32] in the model)" in reason


def test_missing_and_damaged_weights_are_refused(broken: Path) -> None:
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in refusal(broken)
    file.unlink()
    assert "holds no adapter_model.safetensors" in refusal(broken)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('{"peft_type": "IA3", "r": 1, "lora_alpha": 1, "target_modules": []}', "type IA3"),
        ('{"peft_type": "LORA"}', "no configuration of a LoRA adapter"),
        ("[]", "no configuration of a LoRA adapter"),
        ("{", "no configuration of a LoRA adapter"),
    ],
)
def test_a_configuration_that_is_not_loras_is_refused(broken: Path, settings: str, said: str) -> None:
    (broken / "adapter_config.json").write_text(settings)
    assert said in refusal(broken)


def test_an_unknown_kind_of_rope_in_the_context_is_refused(broken: Path) -> None:
    record = json.loads((broken / "context.json").read_text())
    record["rope_parameters"]["rope_type"] = "spiral"
    (broken / "context.json").write_text(json.dumps(record))
    reason = refusal(broken)
    assert "context.json" in reason
    assert "'spiral'" in reason


def test_a_base_that_is_unnamed_or_absent_is_asked_for(broken: Path, trained: Path) -> None:
    settings = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    record = json.loads((broken / "context.json").read_text())
    (broken / "context.json").write_text(json.dumps({**record, "base": ""}))
    assert "names no base model" in refusal(broken)
    (broken / "context.json").write_text(json.dumps({**record, "base": "./gone"}))
    reason = refusal(broken)
    assert "'./gone'" in reason
    assert "give a model and the adapter apart" in reason
    assert "is an adapter itself" in refusal(trained, adapter=trained)


def test_a_base_that_cannot_chat_or_stop_is_refused(broken: Path, spoiled: Path) -> None:
    record = json.loads((broken / "context.json").read_text())
    (broken / "context.json").write_text(json.dumps({**record, "base": str(spoiled)}))
    template = (spoiled / "chat_template.jinja").read_text()
    (spoiled / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    assert "does not carry the user's message" in refusal(broken)
    (spoiled / "chat_template.jinja").write_text(template)
    for file, key in (
        ("config", "eos_token_id"),
        ("generation_config", "eos_token_id"),
        ("tokenizer_config", "eos_token"),
    ):
        path = spoiled / f"{file}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    assert "no end-of-answer token" in refusal(broken)


def test_without_peft_the_extra_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"longscope\[train\]"):
        load(trained)


def test_a_shipped_adapter_is_found_by_its_exact_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(shipped, "_WEIGHTS", tmp_path)
    assert shipped.names() == ()
    shutil.copytree(trained, tmp_path / "tiny-4k")
    (tmp_path / "notes").mkdir()
    assert shipped.names() == ("tiny-4k",)
    assert load("tiny-4k").trained_length == 4096
    assert "shipped adapters: tiny-4k" in refusal("tiny-4")
    with pytest.raises(ValueError, match="there are: tiny-4k"):
        shipped.folder("tiny-4K")
