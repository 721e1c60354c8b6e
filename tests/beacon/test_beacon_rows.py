"""Rows of unequal length, padded on the left: each gives what it gives alone, in prefill and in decoding."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)

EXPANSION = {"pos": "append", "attn": "step-expansion"}
CASES = {
    "interleave": ({}, {}),
    "carry": ({"ratio": (3,), "sink_size": 1}, {}),
    "above-window": ({"ratio": (11,), "sink_size": 3}, {}),
    "each-token": ({"ratio": (1,)}, {}),
    "in-turn": ({"ratio": (2, 0, 8), "sink_size": 1}, {}),
    "append": ({"pos": "append", "ratio": (2,)}, {}),
    "append-in-turn": ({"pos": "append", "ratio": (4, 0, 2), "sink_size": 1}, {}),
    "expansion": ({**EXPANSION, "ratio": (2,), "param": ("q", "k", "v", "o")}, {}),
    "expansion-in-turn": ({**EXPANSION, "ratio": (4, 2), "sink_size": 3}, {}),
    "expansion-alone": ({**EXPANSION, "attend_prev": False, "ratio": (4, 0, 1)}, {}),
    "lossless": ({"ratio": (3,)}, {"lossless": True}),
    "lossless-append": ({"pos": "append", "ratio": (4, 2)}, {"lossless": True}),
    "recent": ({"ratio": (2, 0, 4), "sink_size": 1}, {"keep_recent": 3}),
    "recent-expansion": ({**EXPANSION, "ratio": (4, 0)}, {"keep_recent": 8}),
}
KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def engine_of(name):
    changes, options = CASES[name]
    given = {{"lossless": "lossless_short"}.get(key, key): value for key, value in options.items()}
    model = slow.stock(KINDS[list(CASES).index(name) % 4])
    return slow.Engine(model, slow.settings(**changes), **given), options


def rows_of(*lengths, more=0):
    columns = max(lengths) + more
    mask = (torch.arange(columns) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 97, (len(lengths), columns)) * mask, mask


def check_rows(engine, options, ids, mask, pieces, **tolerance):
    """Compare every real token's logits with those of its row alone, given in the same calls."""
    skip = options.get("skip", (0, None))
    cache = engine.cache(skip_first=skip[0], skip_last=skip[1])
    logits = engine.read(ids, cache=cache, mask=mask, pieces=pieces)
    begins = [sum(pieces[:index]) for index in range(len(pieces) + 1)]
    for row, length in enumerate(mask.sum(1).tolist()):
        naive, first = engine.naive(**options), mask.shape[1] - length
        calls = [ids[row, max(first, begin) : end] for begin, end in itertools.pairwise(begins)]
        expected = torch.cat([naive.read(call) for call in calls if len(call)])
        torch.testing.assert_close(logits[row, first:], expected, **(tolerance or {"rtol": 0, "atol": 1e-9}))
        assert (cache.seen[row], cache.held[row]) == (length, len(naive.slots))


@pytest.mark.parametrize("name", CASES)
def test_unequal_rows_are_each_as_alone(name):
    # Prompts shorter than a window, equal to it and above it; then windows fill at different steps.
    engine, options = engine_of(name)
    ids, mask = rows_of(5, 19, 16, 1, more=12)
    # Moving raw keys is one more rotation, in fp32.
    rounding = {"rtol": 0, "atol": 2e-5} if "keep_recent" in options else {}
    check_rows(engine, options, ids, mask, [19] + [1] * 12, **rounding)


@pytest.mark.parametrize("name", ["interleave", "append-in-turn", "expansion", "lossless"])
def test_unequal_rows_in_pieces(name):
    # Pieces in which a row has nothing but padding, ends its window, or gets several tokens after decoding.
    engine, options = engine_of(name)
    ids, mask = rows_of(3, 14, 10, more=10)
    check_rows(engine, options, ids, mask, [4, 9, 1, 1, 1, 8])


def test_skipped_tokens_of_unequal_rows_are_each_row_s_own():
    engine, _ = engine_of("carry")
    engine.config = slow.settings(ratio=(3,))
    ids, mask = rows_of(2, 19, 10, more=16)
    check_rows(engine, {"skip": (5, 21)}, ids, mask, [19] + [1] * 16)


def test_rows_of_one_length_that_are_not_neighbours():
    engine, options = engine_of("carry")
    ids, mask = rows_of(9, 4, 9, 9, 4, more=9)
    check_rows(engine, options, ids, mask, [9] + [1] * 9)


def test_a_row_alone_in_padding():
    engine, options = engine_of("carry")
    ids, mask = rows_of(11, 30, more=4)
    for pieces in ([30, 1, 1, 1, 1], [10, 10, 10, 4]):  # the first piece may be nothing but padding
        check_rows(engine, options, ids[:1], mask[:1], pieces)


def test_last_logits_of_unequal_rows():
    engine = engine_of("carry")[0]
    ids, mask = rows_of(5, 19, 2)
    with engine.installed(), torch.no_grad():
        every = engine.model(ids, attention_mask=mask).logits
        for keep in (1, 4):
            some = engine.model(ids, attention_mask=mask, logits_to_keep=keep).logits
            real = mask[:, -keep:].bool()
            torch.testing.assert_close(some[real], every[:, -keep:][real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["recent", "lossless"])
def test_rows_can_be_chosen_repeated_and_reordered(name):
    # The last token completes the first row's first window.
    engine, _ = engine_of(name)
    ids, mask = rows_of(5, 19, 12, more=3)
    cache = engine.cache()
    engine.read(ids[:, :-1], mask=mask[:, :-1], cache=cache)
    order = torch.tensor([2, 0, 0, 1])
    expected = engine.read(ids[order], mask=mask[order], pieces=[21, 1])[:, -1]
    cache.reorder_cache(order)
    assert cache.seen == [mask[row, :-1].sum() for row in order.tolist()]
    torch.testing.assert_close(
        engine.read(ids[order, -1:], mask=mask[order], cache=cache)[:, 0], expected, rtol=0, atol=2e-5
    )
