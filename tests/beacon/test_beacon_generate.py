"""``generate`` of transformers over a beacon cache: every way of decoding gives what single passes give."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import GenerationMixin, TextIteratorStreamer

import beacon

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)

CASES = {
    "interleave": ({"ratio": (3,), "sink_size": 1}, {}),
    "in-turn": ({"ratio": (2, 0, 4)}, {}),
    "append": ({"pos": "append", "ratio": (2,)}, {}),
    "expansion": ({"pos": "append", "attn": "step-expansion", "ratio": (4,), "param": ("q", "k", "v", "o")}, {}),
    "lossless": ({}, {"lossless_short": True}),
    "recent": ({"ratio": (4,)}, {"keep_recent": 2}),
}


def text(length, rows=1):
    return torch.randint(1, 97, (rows, length))


def engine_of(name, kind="llama"):
    changes, options = CASES[name]
    return slow.Engine(slow.stock(kind), slow.settings(**changes), **options)


def naive_of(engine):
    return engine.naive(keep_recent=engine.options.keep_recent, lossless=engine.options.lossless_short)


def generate(engine, ids, new=14, **settings):
    """Generate ``new`` tokens, greedily unless told otherwise; return all that generate returns."""
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), "output_logits": True, **settings}
    with engine.installed() as model:
        return model.generate(ids, max_new_tokens=new, return_dict_in_generate=True, pad_token_id=0, **settings)


def check_greedy(engine, sequence, prompt):
    """Check a sequence [n] against the slow writing, fed one token at a time after the prompt."""
    naive = naive_of(engine)
    chosen, logits = sequence[prompt:].tolist(), [naive.read(sequence[:prompt])[-1]]
    for token in sequence[prompt:-1]:
        logits.append(naive.read(token[None])[-1])
    assert [int(row.argmax()) for row in logits] == chosen
    return torch.stack(logits)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [3, 13])
def test_greedy_is_the_loop_by_hand(name, length):
    engine, ids = engine_of(name), text(length)
    given = generate(engine, ids, past_key_values=engine.cache())
    logits = check_greedy(engine, given.sequences[0], length)
    torch.testing.assert_close(torch.cat(given.logits), logits.float(), rtol=0, atol=2e-5)
    made = generate(engine, ids)
    assert torch.equal(made.sequences, given.sequences)
    for cache in (made.past_key_values, given.past_key_values):
        assert isinstance(cache, beacon.BeaconCache)
        assert cache.seen == [length + 13]


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_every_backbone_generates(kind):
    engine = engine_of("interleave", kind)
    check_greedy(engine, generate(engine, text(13)).sequences[0], 13)


@pytest.mark.parametrize("name", CASES)
def test_prompts_of_unequal_length_are_answered_as_alone(name):
    engine, lengths = engine_of(name), [5, 18, 11]
    ids = text(18, rows=3)
    mask = (torch.arange(18) >= 18 - torch.tensor(lengths)[:, None]).long()
    together = generate(engine, ids * mask, attention_mask=mask).sequences
    for row, length in enumerate(lengths):
        check_greedy(engine, together[row, 18 - length :], length)


@pytest.mark.parametrize("name", ["interleave", "lossless"])
@pytest.mark.parametrize("way", ["embeddings", "chunks", "no-cache", "cached-chunks"])
def test_other_ways_to_hand_over_the_prompt(name, way):
    engine, ids = engine_of(name), text(13, rows=2)
    expected = generate(engine, ids).sequences
    if way == "embeddings":
        given = engine.model.get_input_embeddings()(ids)
        with engine.installed() as model:
            tokens = model.generate(inputs_embeds=given, max_new_tokens=14, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, expected[:, 13:])
    else:
        more = {"chunks": {"prefill_chunk_size": 5}, "no-cache": {"use_cache": False}}.get(way)
        more = more or {"prefill_chunk_size": 3, "past_key_values": engine.cache()}
        assert torch.equal(generate(engine, ids, **more).sequences, expected)


def beams_by_hand(engine, prompt, beams, steps):
    """Return the best continuations and their log-probabilities, each hypothesis read anew from its first token."""
    found = [(0.0, prompt)]
    for _ in range(steps):
        grown = []
        for score, ids in found:
            best = naive_of(engine).read(ids)[-1].log_softmax(-1).topk(beams)
            for value, token in zip(*best, strict=True):
                grown.append((score + float(value), torch.cat((ids, token[None]))))
        found = sorted(grown, key=lambda pair: -pair[0])[:beams]
    return [ids for _, ids in found], torch.tensor([score for score, _ in found])


@pytest.mark.parametrize(
    ("name", "given"), [("interleave", True), ("append", True), ("in-turn", False), ("recent", False)]
)
def test_beam_search_is_the_one_by_hand(name, given):
    # Two prompts: their windows fill at different steps, three beams each.
    engine, lengths, steps = engine_of(name), [13, 6], 9
    ids, mask = text(13, rows=2), torch.ones(2, 13, dtype=torch.long)
    mask[1, :7] = 0
    more = {"past_key_values": engine.cache()} if given else {}
    output = generate(
        engine, ids * mask, steps, attention_mask=mask, num_beams=3, num_return_sequences=3, output_scores=True, **more
    )
    for row, length in enumerate(lengths):
        sequences, scores = beams_by_hand(engine, ids[row, 13 - length :], 3, steps)
        assert torch.equal(output.sequences[3 * row : 3 * row + 3, 13 - length :], torch.stack(sequences))
        torch.testing.assert_close(output.sequences_scores[3 * row : 3 * row + 3], scores.float() / steps)


def test_beams_change_places():
    # Otherwise a cache that is never reordered would pass.
    engine, ids = engine_of("interleave"), text(13)
    output = generate(engine, ids, 9, num_beams=3, output_scores=True)
    moved = output.beam_indices[0, :9]
    assert len(set(moved.tolist())) > 1


@pytest.mark.parametrize("name", ["interleave", "append"])
def test_samples_are_reproducible_and_each_has_its_own_memory(name):
    engine, ids = engine_of(name), text(13, rows=2)
    settings = {"do_sample": True, "top_k": 0, "temperature": 1.5, "num_return_sequences": 3}
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(generate(engine, ids, **settings))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert not torch.equal(outputs[0].sequences, outputs[2].sequences)
    sequences, logits = outputs[0].sequences, torch.stack(outputs[0].logits, dim=1)
    assert len({tuple(row) for row in sequences.tolist()}) == 6
    for row in (0, 4):
        expected = naive_of(engine).read(sequences[row, :-1])[12:]
        torch.testing.assert_close(logits[row], expected.float(), rtol=0, atol=2e-5)


def test_tokens_arrive_one_by_one(words):
    engine, ids = engine_of("interleave"), text(13)
    arrived = []

    class Noting(TextIteratorStreamer):
        def put(self, value):
            arrived.append(value.flatten().tolist())
            super().put(value)

    streamer = Noting(words, skip_prompt=True, timeout=5)
    output = generate(engine, ids, streamer=streamer)
    assert arrived == [ids[0].tolist(), *([token] for token in output.sequences[0, 13:].tolist())]
    assert "".join(streamer) == words.decode(output.sequences[0, 13:])


def test_a_row_that_has_ended_does_not_disturb_the_others():
    engine, ids = engine_of("interleave"), text(13, rows=2)
    free = generate(engine, ids).sequences
    first, second = free[:, 13:].tolist()
    stop, at = next((token, at) for at, token in enumerate(first) if token not in second)
    ended = generate(engine, ids, eos_token_id=stop).sequences
    assert at < 13
    assert ended[0, 13:].tolist() == first[: at + 1] + [0] * (13 - at)
    assert ended[1, 13:].tolist() == second


@pytest.mark.parametrize("name", ["in-turn", "expansion", "lossless"])
def test_a_conversation_goes_on_in_the_same_cache(name):
    # The whole history is sent again; transformers cuts it by the tokens that the cache has seen.
    engine, cache, history = engine_of(name), engine_of(name).cache(), text(11)
    for turn in (9, 5, 12):
        answered = generate(engine, history, 7, past_key_values=cache).sequences
        assert torch.equal(answered, generate(engine, history, 7).sequences)
        assert cache.seen == [answered.shape[1] - 1]
        history = torch.cat((answered, text(turn)), dim=1)


def test_many_questions_follow_one_document():
    engine, document = engine_of("interleave"), text(29)
    cache = engine.cache()
    engine.read(document, cache=cache)
    for question in (text(1), text(4), text(15)):
        whole = torch.cat((document, question), dim=1)
        answer = generate(engine, whole, past_key_values=cache.fork()).sequences
        assert torch.equal(answer, generate(engine, whole).sequences)
    assert cache.seen == [29]


def test_a_cache_is_repeated_for_several_answers():
    engine, ids = engine_of("in-turn"), text(21, rows=2)
    cache = engine.cache()
    engine.read(ids[:, :20], cache=cache)
    cache.batch_repeat_interleave(3)
    repeated = ids.repeat_interleave(3, dim=0)
    assert cache.seen == [20] * 6
    torch.testing.assert_close(
        engine.read(repeated[:, 20:], cache=cache), engine.read(repeated)[:, 20:], rtol=0, atol=1e-9
    )


def test_decoding_that_takes_tokens_back_is_refused():
    engine = engine_of("interleave")
    cache = engine.cache()
    engine.read(text(20), cache=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)
    repeating = torch.tensor([[5, 6, 7, 8] * 5])
    with pytest.raises(ValueError, match=r"cropped|assisted|BeaconCache"):
        generate(engine, repeating, prompt_lookup_num_tokens=3, past_key_values=engine.cache())


def test_generate_is_transformers_own():
    model = slow.stock("llama")
    with beacon.installed(model, slow.settings(embed_init="bos")):
        assert model.generate.__func__ is GenerationMixin.generate
