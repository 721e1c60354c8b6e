"""Generation against transformers' own ``generate``, and the figures against what they should be."""

import dataclasses
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import transformers

import longllm
from flashcore.hf import cache_bytes
from longllm.generate import text_pieces


def reference(loaded: longllm.LoadedModel, ids: list[int], tokens: int) -> list[int]:
    """Return what transformers generates greedily after ``ids``."""
    given = torch.tensor([ids])
    out = loaded.model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=sorted(loaded.stop_ids),
        pad_token_id=2,
    )
    return out[0, len(ids) :].tolist()


@pytest.fixture
def windowed(tiny: longllm.LoadedModel, tiny_chat: ModuleType) -> longllm.LoadedModel:
    """A model whose layers see 16 tokens back, so that its cache forgets."""
    torch.manual_seed(1)
    sizes = tiny_chat.config(len(tiny.tokenizer)).to_diff_dict()
    kept = {key: value for key, value in sizes.items() if key not in ("model_type", "rope_parameters")}
    config = transformers.MistralConfig(**kept, sliding_window=16)
    return dataclasses.replace(tiny, model=transformers.MistralForCausalLM(config).eval())


def test_streamed_text_is_what_transformers_generates(tiny: longllm.LoadedModel, prompt_ids: list[int]) -> None:
    expected = reference(tiny, prompt_ids, 60)
    stream = longllm.stream(tiny, prompt_ids, longllm.Decoding(max_new_tokens=60))
    pieces = list(stream)
    text = tiny.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == text == stream.result.text
    assert len(pieces) > 10
    assert stream.result.new_tokens == len(expected) - stream.result.stopped


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_reading_in_chunks_leaves_the_cache_of_one_pass(
    tiny: longllm.LoadedModel, prompt_ids: list[int], chunk: int
) -> None:
    whole = tiny.model(torch.tensor([prompt_ids]), use_cache=True)
    prefix = longllm.prefill(tiny, prompt_ids, chunk=chunk)
    for ours, theirs in zip(prefix.cache.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    token = int(whole.logits[0, -1].argmax())
    first = longllm.stream(tiny, prompt_ids, longllm.Decoding(max_new_tokens=1), chunk=chunk)
    assert first.result.text == "".join(text_pieces(tiny.tokenizer.decode, iter([token])))


def test_kv_bytes_follow_from_the_models_shape(tiny: longllm.LoadedModel, prompt_ids: list[int]) -> None:
    config = tiny.model.config
    result: longllm.Result = longllm.stream(tiny, prompt_ids, longllm.Decoding(max_new_tokens=3), chunk=10).result
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert result.tokens_seen == len(prompt_ids)
    assert result.kv_bytes == per_token * len(prompt_ids)


@pytest.mark.parametrize("kind", ["tiny", "windowed"])
def test_questions_after_a_shared_prefix_get_the_answers_they_get_alone(
    kind: str, request: pytest.FixtureRequest, prompt_ids: list[int]
) -> None:
    loaded = request.getfixturevalue(kind)
    prefix: longllm.Prefix = longllm.prefill(loaded, prompt_ids[:50])
    before = [layer.keys.clone() for layer in prefix.cache.layers]
    for cut in (51, 70, len(prompt_ids)):
        alone = reference(loaded, prompt_ids[:cut], 20)
        result = longllm.stream(loaded, prompt_ids[:cut], longllm.Decoding(max_new_tokens=20), prefix=prefix).result
        assert result.text == loaded.tokenizer.decode(alone, skip_special_tokens=True)
        fresh = longllm.prefill(loaded, prompt_ids[:cut]).cache
        assert result.kv_bytes == cache_bytes(fresh) or kind == "windowed"
    for layer, keys in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_a_prompt_that_does_not_continue_the_prefix_is_refused(
    tiny: longllm.LoadedModel, prompt_ids: list[int]
) -> None:
    prefix = longllm.prefill(tiny, prompt_ids[:5])
    for wrong in ([*prompt_ids[1:5], 7, 8], prompt_ids[:5]):
        with pytest.raises(ValueError, match="does not begin with the prefix"):
            longllm.stream(tiny, wrong, prefix=prefix)


def test_every_stop_token_ends_the_answer_and_is_no_part_of_it(
    tiny: longllm.LoadedModel, prompt_ids: list[int]
) -> None:
    free = reference(tiny, prompt_ids, 30)
    stop = next(token for token in free if free.index(token) >= 3)
    stopping = dataclasses.replace(tiny, stop_ids=tiny.stop_ids | {stop})
    result = longllm.stream(stopping, prompt_ids, longllm.Decoding(max_new_tokens=30)).result
    assert result.stopped
    assert result.new_tokens == free.index(stop)
    assert result.text == tiny.tokenizer.decode(free[: free.index(stop)], skip_special_tokens=True)


def test_an_answer_that_stops_at_once_is_empty(tiny: longllm.LoadedModel, prompt_ids: list[int]) -> None:
    stopping = dataclasses.replace(tiny, stop_ids=frozenset(range(len(tiny.tokenizer))))
    result = longllm.stream(stopping, prompt_ids).result
    assert (result.text, result.new_tokens, result.stopped, result.tokens_per_second) == ("", 0, True, None)


def test_draws_depend_on_the_seed_alone(tiny: longllm.LoadedModel, prompt_ids: list[int]) -> None:
    def drawn(temperature: float, seed: int) -> str:
        torch.rand(1)  # draws elsewhere in the program do not count
        decoding = longllm.Decoding(max_new_tokens=12, temperature=temperature, seed=seed)
        return longllm.stream(tiny, prompt_ids, decoding).result.text

    assert drawn(2.0, 1) == drawn(2.0, 1)
    assert drawn(2.0, 1) != drawn(2.0, 2)
    assert drawn(1e-4, 3) == drawn(0.0, 0)


def test_the_times_add_up(tiny: longllm.LoadedModel, prompt_ids: list[int]) -> None:
    result = longllm.stream(tiny, prompt_ids, longllm.Decoding(max_new_tokens=20)).result
    assert 0 < result.prefill_seconds <= result.time_to_first_token < result.seconds
    chosen = result.new_tokens + result.stopped
    decoding_seconds = result.seconds - result.time_to_first_token
    assert result.tokens_per_second == pytest.approx((chosen - 1) / decoding_seconds)


def test_prompts_without_tokens_and_chunks_without_size_are_refused(tiny: longllm.LoadedModel) -> None:
    for call in (longllm.stream, longllm.prefill):
        with pytest.raises(ValueError, match="at least one token"):
            call(tiny, [])
        with pytest.raises(ValueError, match="chunk of at least 1"):
            call(tiny, [3, 4], chunk=0)


def test_a_stream_that_was_closed_has_no_result() -> None:
    def pieces() -> Iterator[str]:
        yield "a"
        yield "b"

    generator = pieces()
    stream = longllm.Stream(generator)
    assert next(stream) == "a"
    generator.close()
    with pytest.raises(ValueError, match="ended early"):
        _ = stream.result


@pytest.mark.parametrize("text", ["plain", "Größe, señor", "海と空 🐋🏴‍☠️ end", "\ufffd mark", ""])
def test_pieces_never_split_a_character(text: str) -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    pieces = list(text_pieces(decode, iter(text.encode())))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_pieces_of_broken_bytes_are_those_of_the_whole() -> None:
    broken = b"a\xe6\xb5 b\xff\xc3"
    pieces = text_pieces(lambda ids: bytes(ids).decode(errors="replace"), iter(broken))
    assert "".join(pieces) == broken.decode(errors="replace")


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("seed", -1)]
)
def test_decoding_names_the_field_it_refuses(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must"):
        longllm.Decoding(**{field: value})
