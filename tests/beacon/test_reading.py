"""Reading in chunks with questions in mind: they steer what is kept and leave nothing behind; the ledger is true."""

import json

import pytest
import torch

import beacon
import longllm

KINDS = ["llama", "gemma3_text"]
QUESTIONS = [[7, 8, 9], [21, 22], [33]]


def text(length):
    return torch.randint(1, 200, (length,)).tolist()


def tensors(cache):
    """Return the keys and values that the layers hold."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["streaming", "knorm", "keydiff"])
def test_nothing_of_a_question_stays(name, kind, positions, loaded, compressed, kept):
    # These methods rank by the text alone, so that reading with and without questions must end in the same cache.
    model, ids = loaded(kind), text(50)
    caches = [compressed(model.model, name, slots=16, positions=positions) for _ in range(2)]
    for cache, questions in zip(caches, (QUESTIONS, ()), strict=True):
        prefix = beacon.read(model, ids, cache, questions=questions, chunk=12)
        assert prefix.cache is cache
        assert prefix.ids == tuple(ids)
        assert prefix.seconds > 0
    assert kept(caches[0]) == kept(caches[1])
    assert vars(caches[0].schedule) == vars(caches[1].schedule)
    assert (caches[0].seen, caches[0].get_seq_length(), caches[0].probes) == ([50], 50, ())
    for asked, plain in zip(*map(tensors, caches), strict=True):
        torch.testing.assert_close(asked, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_fits_is_not_changed_by_questions(kind, loaded, compressed):
    model, ids = loaded(kind), text(30)
    caches = [compressed(model.model, "snapkv", ratio=1) for _ in range(2)]
    for cache, questions in zip(caches, (QUESTIONS, ()), strict=True):
        beacon.read(model, ids, cache, questions=questions, chunk=7)
    for asked, plain in zip(*map(tensors, caches), strict=True):
        torch.testing.assert_close(asked, plain, atol=1e-5, rtol=1e-4)


def attended(model, ids, questions):
    """Return the attention [layer][kv_head, n] that each question gives to the text, each token's best question."""
    best = []
    for question in questions:
        tokens = torch.tensor([[*ids, *question]])
        with torch.no_grad():
            weights = model(tokens, output_attentions=True).attentions
        mass = [w[0, :, len(ids) :, : len(ids)].mean(1).unflatten(0, (2, 2)).mean(1) for w in weights]
        best.append(torch.stack(mass))
    return torch.stack(best).amax(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_what_a_question_attends_to_is_kept(name, kind, loaded, compressed, kept):
    model, ids = loaded(kind), text(40)
    cache = compressed(model.model, name, slots=16)
    beacon.read(model, ids, cache, questions=QUESTIONS[:1], chunk=40)
    mass = attended(model.model, ids, QUESTIONS[:1])
    sink, recent = cache.method.sink, cache.method.recent
    for place, index in enumerate(cache.full):
        worth = mass[index]
        if name == "tova":
            # TOVA asks the newest token only, or the question: here as a whole, over all heads.
            worth = worth.mean(0, keepdim=True).expand(2, -1)
        else:
            worth = torch.nn.functional.max_pool1d(worth[None], 3, stride=1, padding=1)[0]
        for head in range(2):
            middle = sorted(range(sink, 40 - recent), key=lambda at, own=worth[head]: -float(own[at]))
            best = sorted(middle[: 14 - sink - recent])
            assert kept(cache)[0][place][head] == [*range(sink), *best, *range(40 - recent, 40)]


@pytest.mark.parametrize("name", [name for name in beacon.METHODS if beacon.method(name).ranks])
def test_only_steerable_methods_look_at_questions(name, loaded, compressed, kept):
    model, ids = loaded("llama"), text(60)
    outcomes = []
    for questions in ((), QUESTIONS[:1], QUESTIONS[2:]):
        cache = compressed(model.model, name, **({"ratio": 1} if name == "full" else {"slots": 16}))
        beacon.read(model, ids, cache, questions=questions, chunk=30)
        outcomes.append(kept(cache))
    differ = sum(outcome != outcomes[0] for outcome in outcomes)
    assert differ == (2 if beacon.method(name).steerable else 0)


def test_every_one_of_several_questions_gets_what_it_needs(loaded, compressed, kept):
    model, ids = loaded("llama"), text(40)
    wanted = [attended(model.model, ids, [question])[0].mean(0)[:39].argmax() for question in QUESTIONS]
    cache = compressed(model.model, "tova", slots=30)
    beacon.read(model, ids, cache, questions=QUESTIONS, chunk=40)
    assert {int(at) for at in wanted} <= set(kept(cache)[0][0][0])


@pytest.mark.parametrize("questions", [[[]], [[], [7, 8]], [[7, 8], []]])
def test_a_question_without_tokens_asks_nothing(questions, loaded, compressed, kept):
    model, ids = loaded("llama"), text(40)
    asked, plain = (compressed(model.model, "snapkv", slots=16) for _ in range(2))
    beacon.read(model, ids, asked, questions=questions, chunk=20)
    beacon.read(model, ids, plain, questions=[question for question in questions if question], chunk=20)
    assert kept(asked) == kept(plain)


def test_a_reading_that_was_refused_leaves_no_question_behind(loaded, compressed):
    model, ids = loaded("llama"), text(40)
    cache = beacon.CompressedCache(model.model, beacon.method("snapkv"), beacon.Budget(slots=16))
    with pytest.raises(ValueError, match="never drops 36"):
        beacon.read(model, ids, cache, questions=QUESTIONS)
    assert cache.probes == ()


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_from_what_was_read(kind, positions, loaded, compressed):
    model, ids, question = loaded(kind), text(45), [5, 6, 7, 8]
    cache = compressed(model.model, "snapkv", slots=16, positions=positions)
    prefix = beacon.read(model, ids, cache, chunk=20)
    answers = []
    with beacon.compressing(model.model):
        for _ in range(2):
            stream = longllm.stream(model, [*ids, *question], longllm.Decoding(max_new_tokens=6), prefix=prefix)
            answers.append(stream.result.text)
        # By hand, on the cache itself.
        with torch.inference_mode():
            token, found = question, []
            for _ in range(6):
                logits = model.model(torch.tensor([token]), past_key_values=cache).logits
                token = [int(logits[0, -1].argmax())]
                found += token
    assert answers[0] == answers[1] == model.tokenizer.decode(found, skip_special_tokens=True)
    assert stream.result.tokens_seen == 49
    assert stream.result.kv_bytes < prefix.cache.ledger().full_bytes
    assert cache.seen == [54]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_can_be_generated_from(kind, loaded, compressed):
    model, ids = loaded(kind), text(45)
    whole = torch.tensor([[*ids, 5, 6, 7]])
    answers = []
    for copied in (True, False):
        cache = compressed(model.model, "snapkv", slots=16)
        prefix = beacon.read(model, ids, cache, chunk=20)
        with beacon.compressing(model.model):
            used = prefix.cache.fork() if copied else prefix.cache
            answers.append(model.model.generate(whole, past_key_values=used, max_new_tokens=8))
    assert torch.equal(*answers)


@pytest.mark.parametrize("stop", [15, 30])
def test_a_reading_that_was_stopped_goes_on_where_it_was(stop, loaded, compressed):
    model, ids, calls = loaded("gemma3_text"), text(50), []

    def interrupt(cache):
        calls.append(cache.seen[0])
        if cache.seen[0] == stop:
            raise InterruptedError

    caches = [compressed(model.model, "snapkv", slots=16) for _ in range(2)]
    beacon.read(model, ids, caches[0], questions=QUESTIONS, chunk=15)
    with pytest.raises(InterruptedError):
        beacon.read(model, ids, caches[1], questions=QUESTIONS, chunk=15, after_chunk=interrupt)
    beacon.read(model, ids, caches[1], questions=QUESTIONS, chunk=15, after_chunk=lambda c: calls.append(c.seen[0]))
    assert calls == [15, 30, 45, 50]
    assert all(torch.equal(one, other) for one, other in zip(*map(tensors, caches), strict=True))


def test_what_cannot_be_read_is_refused(loaded, compressed):
    model, ids = loaded("llama"), text(20)
    cache = compressed(model.model, slots=16)
    for nothing, chunk in (([], 5), (ids, 0)):
        with pytest.raises(ValueError, match="at least one token and a chunk of at least 1, got"):
            beacon.read(model, nothing, cache, chunk=chunk)
    beacon.read(model, ids, cache)
    with pytest.raises(ValueError, match=r"has seen \[20\] tokens, the text has 10: they do not belong together"):
        beacon.read(model, ids[:10], cache)
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="do not belong together"):
        beacon.read(model, ids, cache)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_counts_what_is_in_memory(kind, loaded, compressed, kept, in_memory):
    model, ids = loaded(kind), text(60)
    cache = compressed(model.model, "snapkv", slots=16)
    beacon.read(model, ids, cache, chunk=20)
    ledger = cache.ledger()
    assert isinstance(ledger, beacon.Ledger)
    token, full = 2 * 2 * 8 * 4, len(cache.full)
    windows = len(cache.layers) - full
    assert ledger.nbytes + ledger.index_bytes == in_memory(cache)
    assert ledger.nbytes == sum(layer.nbytes for layer in ledger.layers)
    assert ledger.full_bytes == token * (60 * full + 8 * windows)
    assert ledger.ratio == ledger.full_bytes / ledger.nbytes > 2
    assert ledger.tokens_seen == (60,)
    assert [layer.kind for layer in ledger.layers] == ["sliding"] * windows + ["full"] * full
    slots = [len(layer[0]) for layer in kept(cache)[0]]
    assert [layer.slots for layer in ledger.layers[windows:]] == [(count,) for count in slots]
    assert all(layer.span == (0, 59) for layer in ledger.layers[windows:])
    everywhere = [at for layer in kept(cache)[0] for head in layer for at in head]
    shares = [sum(at // 6 == part for at in everywhere) / len(everywhere) for part in range(10)]
    assert ledger.coverage == pytest.approx(shares, abs=1e-4)
    assert sum(ledger.coverage) == pytest.approx(1, abs=1e-3)
    record = json.loads(json.dumps(ledger.record()))
    assert record["nbytes"] == ledger.nbytes
    assert record["layers"][-1]["span"] == [0, 59]
    words = str(ledger)
    assert f"{ledger.nbytes:,} of {ledger.full_bytes:,}: {ledger.ratio:.1f} times smaller" in words
    assert "0 to 59" in words.splitlines()[-1]


def test_the_peak_is_one_layers_chunk_above_what_is_held(loaded, compressed):
    # Three layers of 14 slots in room for 16, and 24 new tokens joined to the 14 of one layer at a time.
    token, model, ids = 2 * 2 * 8 * 4, loaded("llama"), text(72)
    cache = compressed(model.model, slots=16)
    beacon.read(model, ids, cache, chunk=24)
    assert cache.schedule.slots == [[14]] * 3
    assert cache.ledger().peak_bytes == token * (3 * 16 + 14 + 24)
    # Far from the 72 tokens of the full cache.
    assert cache.ledger().peak_bytes < cache.ledger().full_bytes / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_ledger_before_reading_and_after_forgetting_is_empty(kind, loaded, compressed):
    model = loaded(kind)
    cache = compressed(model.model, slots=16)
    assert (cache.ledger().nbytes, cache.ledger().full_bytes, cache.ledger().ratio) == (0, 0, 1.0)
    beacon.read(model, text(40), cache)
    cache.forget()
    ledger = cache.ledger()
    assert (ledger.nbytes, ledger.index_bytes, sum(ledger.coverage)) == (0, 0, 0)
    assert ledger.full_bytes > 0
    assert all(layer.span is None for layer in ledger.layers)
    assert str(ledger)
