"""The real small models and data sets, downloaded on first use."""

import json
from pathlib import Path
from typing import Any

import pytest

import catalog

pytestmark = pytest.mark.real
SMOLLM = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    """Return the converted chat model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = catalog.path(SMOLLM)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_every_default_is_verified_in_full() -> None:
    for row in catalog.rows():
        if row.default:
            assert catalog.fetch(row.name) == catalog.path(row.name)
            assert catalog.verify(row.name) >= 3


def test_smollm_has_the_settings_of_its_gguf_file() -> None:
    folder = catalog.path(SMOLLM)
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    assert config["tie_word_embeddings"] is True
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_smollm_computes_what_its_gguf_file_does(smollm: tuple[Any, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from catalog import sources

    row = catalog.row(SMOLLM)
    sources.obtain(row, tmp_path / "work", tmp_path / "gguf", fresh=False)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours, tokenizer = smollm
    ids = tokenizer("The pass key is 48213.\n\n1999 was a year of", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_smollm_answers_and_ends_its_turn(smollm: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = smollm
    talk = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), "it stopped by itself"


def test_smollm_s_tokenizer_cuts_at_every_digit(smollm: tuple[Any, Any]) -> None:
    tokenizer = smollm[1]
    assert tokenizer.tokenize("key\n\n1999") == ["key", "ĊĊ", "1", "9", "9", "9"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer("hello").input_ids[0] != tokenizer.bos_token_id, "the file says that no start token is added"


def test_minilm_tells_related_sentences_from_unrelated_ones() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")

    model = sentence_transformers.SentenceTransformer(str(catalog.path("minilm-l6")), device="cpu")
    vectors = model.encode(["A whale was seen.", "Sailors spotted a large sea animal.", "Taxes will rise."])
    assert vectors.shape == (3, 384)
    near, far = model.similarity(vectors, vectors)[0, 1:].tolist()
    assert near > far + 0.2


def test_the_novel_and_the_addresses_are_whole() -> None:
    novel = catalog.read_document("moby-dick")
    assert novel.text.startswith("CHAPTER 1. Loomings.")
    assert len(novel.text) == 1_190_317
    names = catalog.documents("sotu")
    assert (len(names), len(set(names))) == (233, 233)
    assert names[0] == "sotu/1790-washington"
    address = catalog.read_document("sotu/1963")
    assert (address.name, address.title) == ("sotu/1963-kennedy", "State of the Union 1963, John F Kennedy")
    with pytest.raises(ValueError, match="sotu/1961-eisenhower, sotu/1961-kennedy"):
        catalog.read_document("sotu/1961")
    assert all(len(catalog.read_document(name).text) > 4000 for name in names)
