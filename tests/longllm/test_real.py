"""SmolLM2 itself: it finds a passkey at three depths."""

import pytest

import longllm
from longllm.evals import Cell, passkey_cells, passkey_prompt, passkey_score


@pytest.fixture(scope="module")
def smollm2() -> longllm.LoadedModel:
    """The default model, on flashcore."""
    return longllm.load("smollm2-135m-instruct")


@pytest.mark.real
@pytest.mark.parametrize("cell", list(passkey_cells([1500], [10, 50, 90])), ids=lambda cell: f"{cell.depth}%")
def test_smollm2_finds_a_passkey_in_1500_tokens(smollm2: longllm.LoadedModel, cell: Cell) -> None:
    prompt = passkey_prompt(smollm2.tokenizer, cell)
    ids = longllm.chat_prompt(smollm2.tokenizer, prompt.ids)
    result = longllm.stream(smollm2, ids, longllm.Decoding(max_new_tokens=16)).result
    assert passkey_score(result.text, cell.key).correct, result.text
    config = smollm2.model.config
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * smollm2.dtype.itemsize
    assert result.kv_bytes == len(ids) * per_token
