"""Where tokens stand: true positions are demanded, compact ones are exact, and a failed pass is not continued."""

import pytest
import torch
from transformers import DynamicCache

import beacon
from beacon.turns import Turns
from flashcore import rope

KINDS = ["llama", "gemma3_text"]
POSITIONS = ["original", "compact"]


def text(length, rows=1):
    return torch.randint(1, 200, (rows, length))


@torch.no_grad()
def read(model, ids, cache, chunk=8, **inputs):
    """Run ids through the model in chunks, inside ``compressing``; return the last logits."""
    with beacon.compressing(model):
        for part in ids.split(chunk, dim=1):
            logits = model(part, past_key_values=cache, **inputs).logits
    return logits


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_that_count_slots_instead_of_tokens_are_refused(positions, tiny, compressed):
    model, ids, more = tiny("llama"), text(40), text(3)
    cache = compressed(model, slots=16, positions=positions)
    read(model, ids, cache)
    held = cache.schedule.slots[0][0]
    assert held < 40
    wrong = torch.arange(held, held + 3)[None]
    with pytest.raises(ValueError, match=f"row 0 was given position {held} .* true position is 40: positions count"):
        read(model, more, cache, position_ids=wrong)
    # Being refused has changed nothing.
    other = compressed(model, slots=16, positions=positions)
    read(model, ids, other)
    right = read(model, more, cache, position_ids=torch.arange(40, 43)[None])
    assert torch.equal(right, read(model, more, other))


def test_a_cache_that_refused_its_first_pass_is_as_new(tiny, compressed):
    model, ids = tiny("llama"), text(10, rows=2)
    cache = compressed(model, slots=16)
    with pytest.raises(ValueError, match="row 0 was given position 3 for a token whose true position is 0"):
        read(model, ids, cache, chunk=10, position_ids=torch.arange(3, 13)[None])
    read(model, ids[:1], cache)
    assert cache.seen == [10]


def test_wrong_positions_of_one_padded_row_are_found(tiny, compressed, padded):
    model, batch = tiny("llama"), padded(12, 7)
    true = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs = {"chunk": 12, "attention_mask": batch["attention_mask"]}
    expected = read(model, batch["input_ids"], compressed(model, slots=8), **inputs)
    given = read(model, batch["input_ids"], compressed(model, slots=8), position_ids=true, **inputs)
    assert torch.equal(given, expected)
    with pytest.raises(ValueError, match="row 1 was given position 5 for a token whose true position is 0"):
        read(model, batch["input_ids"], compressed(model, slots=8), position_ids=torch.arange(12)[None], **inputs)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
def test_padding_on_the_right_and_holes_are_refused(mask, tiny, compressed):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"padded on the left only: set tokenizer.padding_side = 'left'"):
        read(model, text(5, rows=2), compressed(model, slots=8), attention_mask=torch.tensor([mask, [1] * 5]))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_after_the_first_tokens_is_refused(kind, tiny, compressed):
    model, cache = tiny(kind), compressed(tiny(kind), slots=8)
    read(model, text(5, rows=2), cache)
    late = torch.ones(2, 8, dtype=torch.long)
    late[1, 5] = 0
    with pytest.raises(ValueError, match="padded on the left only"):
        read(model, text(3, rows=2), cache, attention_mask=late)


@pytest.mark.parametrize("hidden", [[0], [2, 3], [0, 1, 2, 3, 4]])
def test_a_mask_that_hides_tokens_already_read_is_refused(hidden, tiny, compressed):
    # They are in the cache and would be attended: ignoring such a mask would be silent.
    model, cache = tiny("llama"), compressed(tiny("llama"), slots=8)
    read(model, text(5, rows=2), cache)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, hidden] = 0
    with pytest.raises(ValueError, match="mask"):
        read(model, text(1, rows=2), cache, attention_mask=mask)


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (2, 3)])
def test_a_mask_of_another_shape_is_refused(shape, tiny, compressed):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"must be \[rows, tokens seen and new\], got \["):
        read(model, text(5, rows=2), compressed(model, slots=8), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_works_only_inside_compressing(kind, tiny, compressed):
    model, cache = tiny(kind), compressed(tiny(kind), slots=8)
    with pytest.raises(ValueError, match=r"only inside beacon.compressing"), torch.no_grad():
        model(text(5), past_key_values=cache)
    read(model, text(12), cache)
    with pytest.raises(ValueError, match=r"only inside beacon.compressing"), torch.no_grad():
        model(text(1), past_key_values=cache)


def test_another_number_of_rows_is_refused(tiny, compressed):
    model, cache = tiny("llama"), compressed(tiny("llama"), slots=8)
    read(model, text(5, rows=2), cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, the model was given 3"):
        read(model, text(5, rows=3), cache)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [0, 20])
def test_a_cache_whose_pass_failed_half_way_is_not_used_again(error, first, build, compressed):
    model = build("llama")
    cache, ids = compressed(model, slots=12), text(30)
    if first:
        read(model, ids[:, :first], cache)
    fork = cache.fork()

    def fail(*_):
        raise error("pulled the plug")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="pulled the plug"):
        read(model, ids[:, first:], cache, chunk=30)
    hook.remove()
    with torch.no_grad(), beacon.compressing(model):
        inside = model(ids).logits
    torch.testing.assert_close(inside, model(ids).logits, atol=1e-4, rtol=1e-3)
    for _ in range(2):
        with pytest.raises(ValueError, match="failed half-way: start from a new cache or a fork"):
            read(model, ids[:, first:], cache)
    # A fork made before is untouched.
    whole = compressed(model, slots=12)
    if first:
        read(model, ids[:, :first], whole)
    assert torch.equal(read(model, ids[:, first:], fork), read(model, ids[:, first:], whole))
    cache.reset()
    assert read(model, ids, cache).isfinite().all()


def test_what_was_dropped_cannot_be_brought_back(tiny, compressed):
    cache = compressed(tiny("llama"), slots=8)
    with pytest.raises(ValueError, match="cannot be cropped; fork"):
        cache.crop(-1)


@pytest.mark.parametrize("options", [{"positions": "relative"}, {"expected": -1}])
def test_unknown_options_of_a_cache_are_refused(options, tiny, compressed):
    with pytest.raises(ValueError, match=r"positions must be one of original, compact|cannot be negative"):
        compressed(tiny("llama"), slots=8, **options)


def test_models_without_anything_to_compress_or_turn_are_refused(build, compressed):
    sliding = build("gemma3_text", layer_types=["sliding_attention"] * 3)
    with pytest.raises(ValueError, match="every layer has a sliding window"):
        compressed(sliding, slots=8)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = build("llama", rope_parameters=scaling)
    with pytest.raises(ValueError, match=r"compact positions need one fixed RoPE .* use positions='original'"):
        compressed(dynamic, slots=8, positions="compact")
    assert compressed(dynamic, slots=8).turns == {}


def first_layer_keys(model, ids):
    """Return the keys of the first layer before RoPE, [kv_heads, n, d]: they depend on the tokens alone."""
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    return layer.self_attn.k_proj(hidden)[0].unflatten(-1, (2, 8)).transpose(0, 1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("name", ["streaming", "tova", "keydiff"])
def test_compact_keys_stay_those_of_their_tokens_at_their_places(name, dtype, bound, build, compressed):
    model, ids = build("llama", dtype=dtype, num_hidden_layers=1), text(110)
    cache = compressed(model, name, slots=20, positions="compact")
    read(model, ids[:, :30], cache)
    read(model, ids[:, 30:], cache, chunk=1)
    speeds = rope.inverse_frequencies(8)
    plain = first_layer_keys(model.double(), ids)
    for head, positions in enumerate(cache.true_positions(0)[0].long()):
        places = torch.arange(len(positions)) + cache.schedule.next_position[0] - len(positions)
        assert places[0] == 0
        wanted = rope.rotate(plain[head, positions], *rope.tables(places, speeds))
        got = cache.layers[0].keys[0, head].double()
        assert (got - wanted).norm() <= bound * wanted.norm()
    assert max(cache.schedule.next_position) <= 20


def test_turning_keys_three_hundred_times_is_turning_them_once():
    speeds, keys = rope.inverse_frequencies(64), torch.randn(1, 2, 40, 64)
    turns, moved = Turns(speeds), keys
    for step in range(300):
        moved = turns(moved, torch.full((1, 2, 40), -1 - step % 3))
    wanted = rope.rotate(keys.double(), *rope.tables(torch.tensor(-600), speeds.double()))
    assert (moved.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_three_hundred_evictions_leave_every_key_near_its_place(dtype, bound):
    # What a cache of 64 slots does in some 2,700 tokens: nine new ones, and nine of all but the oldest four dropped.
    # Each turn rounds, and in bf16 turns of slow channels that are smaller than the rounding are lost.
    speeds, kept, keys = rope.inverse_frequencies(64), torch.empty(0, 64), torch.empty(1, 1, 0, 64, dtype=dtype)
    turns = Turns(speeds)
    for _ in range(300):
        fresh, places = torch.randn(64 - len(kept), 64), torch.arange(len(kept), 64)
        placed = rope.rotate(fresh, *rope.tables(places, speeds)).to(dtype)
        staying = torch.cat((torch.arange(4), 4 + torch.randperm(60)[:51])).sort().values
        keys = turns(torch.cat((keys, placed[None, None]), 2)[:, :, staying], (torch.arange(55) - staying)[None, None])
        kept = torch.cat((kept, fresh))[staying]
    wanted = rope.rotate(kept, *rope.tables(torch.arange(55), speeds))
    assert ((keys[0, 0].float() - wanted).norm(dim=1) <= bound * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_suffix_after_a_forgotten_prefix_is_the_suffix_alone(kind, positions, tiny, compressed, padded):
    model, batch, suffix = tiny(kind), padded(12, 7), text(6, rows=2)
    cache = compressed(model, slots=8, positions=positions)
    read(model, batch["input_ids"], cache, chunk=12, attention_mask=batch["attention_mask"])
    cache.forget()
    assert cache.seen == [12, 7]
    assert not cache.true_positions(cache.full[0]).numel()
    fork = cache.fork()
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    for after in (cache, fork):
        got = read(model, suffix, after, attention_mask=mask)
        for row, seen in enumerate((12, 7)):
            first = 0 if positions == "compact" else seen
            alone = torch.arange(first, first + 6)[None]
            with torch.no_grad():
                wanted = model(
                    suffix[row : row + 1], position_ids=alone, past_key_values=DynamicCache(config=model.config)
                )
            torch.testing.assert_close(got[row], wanted.logits[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_compact_positions_of_a_cache_that_drops_nothing_are_the_plain_model(kind, tiny, compressed, padded):
    model, batch = tiny(kind), padded(30, 22)
    plain = model.generate(**batch, max_new_tokens=10)
    with beacon.compressing(model):
        cache = compressed(model, slots=64, positions="compact")
        ours = model.generate(**batch, past_key_values=cache, max_new_tokens=10)
    assert torch.equal(ours, plain)
    assert cache.schedule.next_position == cache.seen == [39, 31]


def test_compact_positions_do_not_grow_with_the_text(tiny, compressed, watched):
    model, places = tiny("gemma3_text"), []
    cache = compressed(model, "snapkv", slots=12, positions="compact")
    hook = model.model.rotary_emb.register_forward_pre_hook(lambda _, args: places.append(int(args[1].max())))
    try:
        with watched(model, cache, lambda cache: cache.schedule.next_position[0]) as after:
            model.generate(text(20), past_key_values=cache, max_new_tokens=60)
    finally:
        hook.remove()
    assert cache.seen == [79]
    assert max(after) <= 12
    assert max(places[2:]) <= 12
