"""Every compression method, in generation on unequal rows, against a slow second writing of it."""

import math

import pytest
import torch

import beacon
from beacon.methods.base import LayerView, Method

KINDS = ["llama", "qwen2", "gemma3_text"]
EVICTING = [name for name in beacon.METHODS if name not in ("full", "beacon")]
#: a kind of budget and the positions it is tried with
LIMITS = [("ratio", "original"), ("slots", "compact"), ("nbytes", "compact")]
#: the second row begins with a chunk of padding and one token of it in the next
LENGTHS = (38, 21)
CHUNK = 16
VALUES = {"ratio": 2.5, "slots": 16}


def fixed_bytes(cache):
    """Return the bytes of one row's sliding layers, and of one slot in every full layer of one row."""
    token = 2 * 2 * 8 * 4  # keys and values, key heads, width, fp32
    windows = (len(cache.layers) - len(cache.full)) * 8 * token
    # beside them, each head keeps the position of the slot, and its score if the method remembers
    return windows, len(cache.full) * (token + 2 * (8 if cache.method.remembers else 4))


def budget_of(model, name, kind, rows, compressed):
    """Return the budget of a kind: some 16 slots a layer by the end."""
    if kind != "nbytes":
        return {kind: VALUES[kind]}
    windows, slot = fixed_bytes(compressed(model, name, ratio=1))
    return {kind: rows * (windows + 16 * slot) + 77}


def capacity(cache, seen):
    """Return how many slots a layer may hold on average, by the definition of each budget."""
    if cache.budget.ratio:
        return math.ceil(seen / cache.budget.ratio)
    return cache.budget.slots or 16


def check_counts(cache, before):
    """Check the number of slots of each row against the rules, for methods that treat layers alike."""
    minimum = cache.method.sink + cache.method.recent
    for row, seen in enumerate(cache.seen):
        old, old_seen = (0, 0) if before is None else (len(before[0][row][0][0]), before[1][row])
        most = max(capacity(cache, seen), min(minimum, seen))
        grown = old + seen - old_seen
        left = max(capacity(cache, seen) - capacity(cache, seen) // 8, min(minimum, seen))
        expected = grown if grown <= most else min(grown, left)
        assert [layer[row] for layer in cache.schedule.slots] == [expected] * len(cache.full)


def check_rows(cache, kept):
    """Check that what is held is rising, seen, and has the first and the newest tokens."""
    for row, seen in enumerate(cache.seen):
        average = sum(len(layer[0]) for layer in kept[row]) / len(cache.full)
        assert average <= max(capacity(cache, seen), min(cache.method.minimum, seen))
        for layer, slots in zip(kept[row], cache.schedule.slots, strict=True):
            for head in layer:
                assert len(head) == slots[row]
                assert head == sorted(set(head))
                assert all(0 <= at < seen for at in head)
                sacred = {*range(cache.method.sink), *range(seen - cache.method.recent, seen)}
                assert {at for at in sacred if 0 <= at < seen} <= set(head)


@pytest.mark.parametrize(("limit", "positions"), LIMITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVICTING)
def test_generation_within_a_budget_equals_the_method_written_out_slowly(
    name, kind, limit, positions, tiny, compressed, padded, watched, kept, in_memory, naive
):
    model, batch = tiny(kind), padded(*LENGTHS)
    budget = budget_of(model, name, limit, len(LENGTHS), compressed)
    cache = compressed(model, name, positions=positions, **budget)

    def look(cache):
        held = kept(cache)
        check_rows(cache, held)
        if name != "pyramidkv":
            check_counts(cache, passes[-1] if passes else None)
        assert limit != "nbytes" or in_memory(cache) <= budget["nbytes"]
        return held, cache.seen

    options = {"max_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
    with watched(model, cache, look) as passes:
        out = model.generate(**batch, past_key_values=cache, prefill_chunk_size=CHUNK, **options)
    assert len(passes) == math.ceil(LENGTHS[0] / CHUNK) + 8
    assert cache.get_seq_length() == LENGTHS[0] + 8
    assert any(len(layer[0]) < cache.seen[0] for layer in passes[-1][0][0])
    slow = naive.Naive(model, cache.method, positions == "compact")
    for row, length in enumerate(LENGTHS):
        text = out.sequences[row, LENGTHS[0] - length : -1]
        # A pass in which the row had only padding is no pass of the row alone.
        own = [(seen[row], held[row]) for held, seen in passes if seen[row]]
        logits = slow(text, [seen for seen, _ in own], [held for _, held in own])
        got = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(got, logits[length - 1 :], atol=5e-4, rtol=1e-3)


def pooled_over_three(mass):
    """Return the maximum of each value and its two neighbours."""
    worth = torch.stack([mass, mass.roll(1), mass.roll(-1)])
    worth[1, 0] = worth[2, -1] = 0
    return worth.amax(0)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("name", EVICTING)
def test_one_pass_keeps_what_the_weights_of_eager_attention_rank_highest(name, kind, tiny, compressed, kept):
    model, ids, length = tiny(kind), torch.randint(1, 200, (1, 48)), 48
    cache = compressed(model, name, slots=16)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
        plain = model(ids, use_cache=True).past_key_values
        with beacon.compressing(model):
            model(ids, past_key_values=cache)
    (held,), sink, recent = kept(cache), cache.method.sink, cache.method.recent
    # 16 slots, of which two are left free for decoding.
    count = len(cache.full) * 14
    if name == "pyramidkv":
        sizes = [len(layer[0]) for layer in held]
        assert sum(sizes) == count
        low, high = sizes[-1] - sink - recent, sizes[0] - sink - recent
        assert abs(low - 7 / 20) <= 1
        assert abs(high - 7 * (2 - 1 / 20)) <= 1
    for place, index in enumerate(cache.full):
        for head in range(2):
            keys = plain.layers[index].keys[0, head]
            group = weights[index][0, 2 * head : 2 * head + 2]
            if name == "streaming":
                worth = torch.arange(48.0)
            elif name == "knorm":
                worth = -keys.norm(dim=1)
            elif name == "keydiff":
                unit = keys / keys.norm(dim=1, keepdim=True)
                worth = -torch.cosine_similarity(keys, unit.mean(0)[None])
            elif name == "tova":
                worth = weights[index][0, :, -1].mean(0)
            elif name == "spotlight":
                every = [weights[layer][0, 2 * one : 2 * one + 2] for layer in cache.full for one in range(2)]
                looks = [pooled_over_three(two[:, -recent:].amax((0, 1))) for two in every]
                worth = torch.stack(looks).topk(3, dim=0).values.mean(0)
            else:
                worth = pooled_over_three(group[:, -recent:].mean((0, 1)))
            middle = range(sink, length - recent)
            size = len(held[place][head]) - sink - recent
            best = sorted(middle, key=lambda at, worth=worth: -float(worth[at]))[:size]
            assert held[place][head] == [*range(sink), *sorted(best), *range(length - recent, length)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["full", *EVICTING])
def test_ratio_1_is_the_plain_model(name, kind, tiny, compressed, padded):
    model, batch = tiny(kind), padded(30, 19)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**batch, **options)
    for positions in ("original", "compact"):
        cache = compressed(model, name, ratio=1, positions=positions)
        with beacon.compressing(model):
            ours = model.generate(**batch, past_key_values=cache, prefill_chunk_size=11, **options)
        assert torch.equal(ours.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)
        assert cache.ledger().ratio <= 1


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 20}, {"num_beams": 2}, {"num_return_sequences": 2}])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_sampling_and_beams_at_ratio_1_give_the_plain_models_tokens(kind, options, tiny, compressed, padded):
    model, batch = tiny(kind), padded(20, 13)
    options = {"do_sample": "num_return_sequences" in options, "max_new_tokens": 9, **options}
    torch.manual_seed(3)
    plain = model.generate(**batch, **options)
    torch.manual_seed(3)
    with beacon.compressing(model):
        ours = model.generate(**batch, past_key_values=compressed(model, "snapkv", ratio=1), **options)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_beam_search_within_a_budget_scores_each_answer_as_it_scores_alone(
    kind, positions, tiny, compressed, padded, watched, kept, in_memory
):
    model, batch, new = tiny(kind), padded(26, 26), 12
    windows, slot = fixed_bytes(compressed(model, ratio=1))
    nbytes = 6 * (windows + 16 * slot)
    cache = compressed(model, "snapkv", nbytes=nbytes, positions=positions)

    def look(cache):
        check_rows(cache, kept(cache))
        assert in_memory(cache) <= nbytes

    with watched(model, cache, look) as passes:
        out = model.generate(
            **batch, past_key_values=cache, max_new_tokens=new, num_beams=3, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert len(passes) == new
        for row, answer in enumerate(out.sequences):
            alone = compressed(model, "snapkv", slots=16, positions=positions)
            parts = [answer[None, :26], *answer[None, 26:-1].split(1, dim=1)]
            with torch.no_grad():
                logits = torch.stack([model(part, past_key_values=alone).logits[0, -1] for part in parts])
            total = logits.log_softmax(-1).gather(1, answer[26:, None]).sum()
            torch.testing.assert_close(out.sequences_scores[row] * new, total, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("lengths", [(10,), (10, 7), (3, 2)])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_padding_that_all_rows_share_changes_nothing(kind, lengths, tiny, compressed, padded):
    model, tight, wide = tiny(kind), padded(*lengths), padded(*lengths, columns=16)
    for row, length in enumerate(lengths):
        wide["input_ids"][row, 16 - length :] = tight["input_ids"][row, max(lengths) - length :]
    answers = []
    for batch in (tight, wide):
        cache = compressed(model, "snapkv", slots=8)
        with beacon.compressing(model):
            sequences = model.generate(**batch, past_key_values=cache, max_new_tokens=12, prefill_chunk_size=64)
        answers.append(sequences[:, batch["input_ids"].shape[1] :])
    assert torch.equal(*answers)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_chunk_of_nothing_but_padding_is_read_as_nothing(kind, tiny, compressed, padded, kept):
    model, batch = tiny(kind), padded(7, 5, columns=12)
    cache = compressed(model, slots=16)
    with torch.no_grad(), beacon.compressing(model):
        for begin, end in ((0, 4), (4, 12)):
            mask = batch["attention_mask"][:, :end]
            last = model(batch["input_ids"][:, begin:end], attention_mask=mask, past_key_values=cache).logits[:, -1]
        assert cache.seen == [7, 5]
        assert kept(cache) == [[[[*range(count)]] * 2] * len(cache.full) for count in (7, 5)]
        whole = model(**batch, past_key_values=compressed(model, slots=16)).logits[:, -1]
    torch.testing.assert_close(last, whole, atol=1e-4, rtol=1e-3)


def test_rows_can_be_repeated_and_chosen(tiny, compressed, padded, kept):
    model, batch = tiny("gemma3_text"), padded(30, 18)
    cache = compressed(model, "snapkv", slots=12)
    with torch.no_grad(), beacon.compressing(model):
        model(**batch, past_key_values=cache)
        before, fork = kept(cache), cache.fork()
        cache.batch_repeat_interleave(2)
        assert kept(cache) == [before[0], before[0], before[1], before[1]]
        cache.batch_select_indices(torch.tensor([3, 0]))
        assert kept(cache) == [before[1], before[0]]
        assert cache.seen == [18, 30]
        more = torch.randint(1, 200, (2, 3))
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
        swapped = model(more.flip(0), attention_mask=mask.flip(0), past_key_values=cache).logits
        straight = model(more, attention_mask=mask, past_key_values=fork).logits
    torch.testing.assert_close(swapped.flip(0), straight, atol=1e-4, rtol=1e-3)


def test_a_model_that_tracks_gradients_keeps_the_same_slots(build, compressed, kept):
    model, ids = build("llama").requires_grad_(True), torch.randint(1, 200, (1, 40))
    caches = [compressed(model, "snapkv", slots=12, positions="compact") for _ in range(2)]
    for cache, tracked in zip(caches, (True, False), strict=True):
        with beacon.compressing(model), torch.set_grad_enabled(tracked):
            for part in ids.split(9, dim=1):
                model(part, past_key_values=cache)
    assert caches[0].layers[0].keys.requires_grad
    assert kept(caches[0]) == kept(caches[1])


def test_the_newest_tokens_and_sinks_are_kept_by_default_and_settings_are_checked():
    assert [beacon.method(name).minimum for name in ["full", *EVICTING]] == [36, 5, 36, 36, 1, 36, 36, 36]
    for name, wrong, words in [
        ("h2o", {}, "unknown compression method 'h2o'; choose one of full, streaming"),
        ("snapkv", {"window": 3}, "no setting window; its settings are sink, recent, kernel"),
        ("snapkv", {"kernel": 4}, "kernel must be a positive odd number, got 4"),
        ("pyramidkv", {"kernel": -1}, "kernel must be a positive odd number"),
        ("pyramidkv", {"steepness": 0.5}, "steepness must be a number of at least 1, got 0.5"),
        ("spotlight", {"kernel": 2}, "kernel must be a positive odd number, got 2"),
        ("spotlight", {"recent": 0}, "recent must be at least 1, got 0"),
        ("spotlight", {"looks": 0}, "looks must be at least 1, got 0"),
        ("tova", {"recent": 0}, "recent must be at least 1, got 0"),
        ("knorm", {"sink": -1}, "sink must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            beacon.method(name, **wrong)


def test_full_ranks_nothing_and_takes_no_budget(tiny, compressed):
    with pytest.raises(ValueError, match="with a budget of ratio 2 choose another"):
        compressed(tiny("llama"), "full", ratio=2)
    with pytest.raises(ValueError, match="use it with Budget"):
        beacon.method("full").scores(None)


def test_a_method_of_ones_own_ranks_what_it_is_shown(tiny, kept):
    views: list[LayerView] = []

    class Oldest(Method):
        name = "oldest"

        def scores(self, view):
            views.append(view)
            return -view.positions.float()

    model, ids = tiny("llama"), torch.randint(1, 200, (1, 20))
    cache = beacon.CompressedCache(model, Oldest(sink=0, recent=3), beacon.Budget(slots=10))
    with torch.no_grad(), beacon.compressing(model):
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, 8:], past_key_values=cache)
    assert kept(cache)[0] == [[[0, 1, 2, 3, 4, 5, 17, 18, 19]] * 2] * 3
    assert [(view.layer, view.layers) for view in views] == [(0, 3), (1, 3), (2, 3)]
    assert all((view.slots, view.valid) == (20, (20,)) for view in views)
    assert all(view.queries.shape == (1, 4, 12, 8) for view in views)
