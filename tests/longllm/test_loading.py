"""Loading: what is chosen, and what is refused before it can go wrong silently."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import longllm


def edit(file: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path | str, **options: str) -> str:
    """Return why a model is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        longllm.load(folder, **{"attention": "sdpa", **options})
    return str(caught.value)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_asked_dtype_is_what_the_weights_have(tiny_folder: Path, dtype: str, expected: torch.dtype) -> None:
    loaded = longllm.load(tiny_folder, dtype=dtype, attention="sdpa", device="cpu")
    assert loaded.dtype == expected
    assert {weight.dtype for weight in loaded.model.parameters()} == {expected}


def test_a_cpu_never_computes_in_fp16(tiny_folder: Path) -> None:
    loaded = longllm.load(tiny_folder, dtype="fp16", attention="sdpa", device="cpu")
    assert loaded.dtype in (torch.bfloat16, torch.float32)
    assert loaded.model.dtype == loaded.dtype


@pytest.mark.parametrize("attention", ["flashcore", "eager"])
def test_every_attention_path_gives_the_same_answer(
    tiny: longllm.LoadedModel, tiny_folder: Path, prompt_ids: list[int], attention: str
) -> None:
    other = longllm.load(tiny_folder, dtype="fp32", attention=attention, device="cpu")
    decoding = longllm.Decoding(max_new_tokens=30)
    texts = {longllm.stream(loaded, prompt_ids, decoding, chunk=20).result.text for loaded in (tiny, other)}
    assert len(texts) == 1
    assert other.model.config._attn_implementation == attention


def test_loading_keeps_transformers_settings(tiny_folder: Path) -> None:
    usual = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        longllm.load(tiny_folder, dtype="fp32", attention="sdpa")
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(usual)


@pytest.mark.parametrize("option", ["dtype", "attention", "device"])
def test_an_unknown_option_lists_the_known_ones(tiny_folder: Path, option: str) -> None:
    reason = refusal(tiny_folder, **{option: "int3"})
    assert reason.startswith(f"{option} must be one of ")
    assert "int3" in reason


def test_unknown_names_and_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    assert "no-such-model" in refusal("no-such-model")
    assert "no config.json" in refusal(tmp_path)


def test_a_model_without_chat_template_is_refused(spoiled: Path) -> None:
    (spoiled / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(spoiled)


def test_a_model_that_would_never_stop_is_refused(spoiled: Path) -> None:
    edit(spoiled / "config.json", eos_token_id=None)
    edit(spoiled / "generation_config.json", eos_token_id=None)
    edit(spoiled / "tokenizer_config.json", eos_token=None)
    assert "no end-of-answer token" in refusal(spoiled)


def test_a_tokeniser_larger_than_the_model_is_refused(spoiled: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(spoiled)
    words.add_tokens(["<|another|>"])
    words.save_pretrained(spoiled)
    assert "do not belong together" in refusal(spoiled)


def test_missing_weights_are_refused(spoiled: Path) -> None:
    (spoiled / "model.safetensors").unlink()
    assert "no weights" in refusal(spoiled)


def test_weights_cut_short_are_refused(spoiled: Path) -> None:
    file = spoiled / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "damaged" in refusal(spoiled)


@pytest.mark.parametrize(("fault", "said"), [("absent", "1 missing"), ("wrong shape", "1 mismatched")])
def test_weights_that_do_not_fill_the_model_are_refused(spoiled: Path, fault: str, said: str) -> None:
    weights = load_file(spoiled / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:5].clone()
    if fault == "absent":
        del weights[name]
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    reason = refusal(spoiled)
    assert said in reason
    assert name in reason


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 4096),
        # Llama-3.1: the released weights were trained with the scaling.
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}, 4096),
        # YaRN, put on after training.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 4096),
    ],
)
def test_trained_length_leaves_out_what_scaling_claims(rope: dict, expected: int) -> None:
    config = transformers.LlamaConfig(max_position_embeddings=4096)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert longllm.trained_length(config) == expected


def test_trained_length_reads_settings_kept_per_kind_of_layer() -> None:
    config = transformers.Gemma3TextConfig(max_position_embeddings=4096, num_hidden_layers=2)
    assert longllm.trained_length(config) == 4096
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 512}
    config.rope_parameters = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": yarn}
    assert longllm.trained_length(config) == 512


def test_stop_ids_are_those_of_model_tokeniser_and_template(spoiled: Path) -> None:
    # As in Llama-3: the model names the end of the text, the chat template ends a turn with another token.
    edit(spoiled / "config.json", eos_token_id=0)
    edit(spoiled / "generation_config.json", eos_token_id=[0, 7])
    edit(spoiled / "tokenizer_config.json", eos_token="<|endoftext|>")
    loaded = longllm.load(spoiled, dtype="fp32", attention="sdpa")
    assert loaded.stop_ids == {0, 7, loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert longllm.stop_ids(loaded.model, loaded.tokenizer) == loaded.stop_ids
