"""GGUF to safetensors on a tiny Llama of our own, quantised to Q4_1 like the real one."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from catalog import convert

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 64, 2, 4, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("4", "2"), ("t", "h"), ("th", "e")]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def byte_letters() -> list[str]:
    """Return the printable stand-ins of the 256 bytes that GPT-2 style vocabularies use."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [byte for byte in range(256) if byte not in plain]
    return [chr(code) for code in plain] + [chr(256 + number) for number in range(len(odd))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """Write a GGUF file whose tokenizer has the given pre-tokeniser; return its folder and what it holds."""
    import gguf

    generator = np.random.default_rng(0)
    tokens = SPECIAL + byte_letters() + ["".join(pair) for pair in MERGES]

    def write(pre: str) -> tuple[Path, dict[str, np.ndarray]]:
        folder = tmp_path_factory.mktemp("gguf")
        writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(100000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(len(tokens))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
        for add, value in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
            add(value)
        writer.add_chat_template(TEMPLATE)
        head = HIDDEN // HEADS
        shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
        for number in range(LAYERS):
            block = f"blk.{number}."
            shapes |= {f"{block}attn_q": (HIDDEN, HIDDEN), f"{block}attn_output": (HIDDEN, HIDDEN)}
            shapes |= {f"{block}attn_{part}": (KV_HEADS * head, HIDDEN) for part in "kv"}
            shapes |= {f"{block}ffn_{part}": (MLP, HIDDEN) for part in ("gate", "up")}
            shapes |= {f"{block}ffn_down": (HIDDEN, MLP), f"{block}attn_norm": (HIDDEN,), f"{block}ffn_norm": (HIDDEN,)}
        held = {}
        kind = gguf.GGMLQuantizationType.Q4_1
        for name, shape in shapes.items():
            values = generator.normal(size=shape).astype(np.float32)
            if len(shape) == 1:
                held[name] = values
                writer.add_tensor(f"{name}.weight", values)
            else:
                packed = gguf.quants.quantize(values, kind)
                held[name] = gguf.quants.dequantize(packed, kind)
                writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (folder / "LICENSE").write_text("MIT")
        return folder, held

    return write


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """Return the converted folder, a copy of the GGUF folder, and the file's own tensors."""
    source, held = tiny("smollm")
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert.gguf_to_folder(source, folder)
    return folder, source, held


def test_the_folder_is_complete_and_in_float32(converted) -> None:
    from safetensors import safe_open

    folder, _, _ = converted
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert wanted | {"tokenizer_config.json", "chat_template.jinja"} == names
    with safe_open(folder / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys(), "tied to the embeddings"  # noqa: SIM118


def test_the_configuration_is_the_file_s_own(converted) -> None:
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    generation = json.loads((converted[0] / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


def test_every_weight_is_exactly_the_de_quantised_one(converted) -> None:
    from safetensors.numpy import load_file

    folder, _, held = converted
    saved = load_file(folder / "model.safetensors")
    parts = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    parts |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    parts |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    pairs = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
    for number in range(LAYERS):
        pairs |= {f"blk.{number}.{ours}": f"model.layers.{number}.{theirs}.weight" for ours, theirs in parts.items()}
    for ours, theirs in pairs.items():
        assert np.array_equal(held[ours], saved[theirs]), theirs
    # GGUF stores the halves of each rotary pair interleaved.
    head = HIDDEN // HEADS
    for ours, theirs, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)):
        rows = held[f"blk.0.{ours}"].reshape(heads, head // 2, 2, HIDDEN).swapaxes(1, 2).reshape(-1, HIDDEN)
        assert np.array_equal(rows, saved[f"model.layers.0.self_attn.{theirs}.weight"])


def test_the_saved_model_computes_what_the_file_does(converted) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder, source, _ = converted
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(3, 60).unsqueeze(0)
    assert ours.dtype == torch.float32
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_the_tokenizer_cuts_at_digits_as_the_file_says(converted, tiny, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert tokenizer.tokenize("the\n\n42  42") == ["the", "ĊĊ", "4", "2", "ĠĠ", "4", "2"]
    assert tokenizer.decode(tokenizer("the\n\n42  42").input_ids) == "the\n\n42  42"
    assert tokenizer.model_max_length == 128
    source, _ = tiny("gpt-2")
    convert.gguf_to_folder(source, tmp_path / "plain")
    plain = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert plain.tokenize("the\n\n42") == ["the", "Ċ", "Ċ", "42"]


def test_the_chat_template_and_its_end_token_are_kept(converted) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert text == "<|im_start|>the<|im_end|>"
    assert tokenizer(text).input_ids[-1] == tokenizer.eos_token_id == 2


def test_a_disk_that_fills_up_while_saving_is_an_error_of_the_disk(converted, tiny_disk) -> None:
    place = tiny_disk("300k")
    shutil.copytree(converted[1], place / "source")
    with pytest.raises(OSError, match="No space left") as caught:
        convert.gguf_to_folder(place / "source", place / "out")
    assert caught.value.errno == errno.ENOSPC


def test_a_folder_without_a_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="one GGUF file to convert, found 0"):
        convert.gguf_to_folder(tmp_path, tmp_path / "out")
