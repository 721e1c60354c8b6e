"""Compressed documents on disk: what was read once answers later as it would have at once."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import beacon
from beacon import fingerprint

KINDS = ["llama", "gemma3_text"]
POSITIONS = ["original", "compact"]


def text(length):
    return tuple(torch.randint(1, 200, (length,)).tolist())


def continued(model, cache, steps=8):
    """Return the logits of tokens that follow, one by one."""
    tokens = torch.randint(1, 200, (steps, 1, 1), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode(), beacon.compressing(model):
        return torch.stack([model(token, past_key_values=cache).logits for token in tokens])


@pytest.fixture
def saved(tmp_path, loaded, compressed):
    """Return a function that reads a text into a cache and saves it; it gives file, ids and cache."""

    def save(kind="llama", name="snapkv", length=50, limits=None, file="cache.safetensors", **options):
        model, ids = loaded(kind), text(length)
        cache = compressed(model.model, name, **(limits or {"slots": 16}), **options)
        beacon.read(model, ids, cache, chunk=20)
        beacon.save_cache(tmp_path / file, model, ids, cache, document="a.txt", questions=["who?"])
        return tmp_path / file, ids, cache

    return save


@pytest.mark.parametrize("limits", [{"slots": 16}, {"ratio": 3, "expected": 60}, {"ratio": 1}])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_goes_on_as_the_one_in_memory(kind, positions, limits, saved, loaded, kept):
    expected = {key: value for key, value in limits.items() if key == "expected"}
    limits = {key: value for key, value in limits.items() if key != "expected"}
    path, ids, cache = saved(kind, limits=limits, positions=positions, **expected)
    back = beacon.load_cache(path, loaded(kind))
    assert isinstance(back, beacon.SavedCache)
    assert (back.ids, back.complete, back.notes) == (ids, True, {"document": "a.txt", "questions": ["who?"]})
    assert (back.cache.method, back.cache.budget, back.cache.positions) == (cache.method, cache.budget, positions)
    assert kept(back.cache) == kept(cache)
    assert vars(back.cache.schedule) == vars(cache.schedule)
    assert back.cache.ledger().peak_bytes == cache.ledger().peak_bytes
    for index in range(len(cache.layers)):
        assert back.cache.get_mask_sizes(3, index) == cache.get_mask_sizes(3, index)
    assert torch.equal(continued(loaded(kind).model, back.cache), continued(loaded(kind).model, cache))
    assert kept(back.cache) == kept(cache)


@pytest.mark.parametrize("name", [name for name in beacon.METHODS if name not in ("full", "beacon")])
def test_a_cache_of_any_method_comes_back_with_its_settings(name, saved, loaded, kept):
    path, _, cache = saved(name=name)
    back = beacon.load_cache(path, loaded("llama")).cache
    assert (back.method, kept(back)) == (cache.method, kept(cache))


def test_a_saved_cache_is_as_small_as_the_ledger_says(saved):
    path, _, cache = saved("llama", length=80)
    token, slots = 2 * 2 * 8 * 4 + 2 * 4, 14
    content = 3 * slots * token + 80 * 4
    assert content <= path.stat().st_size <= content + 4000
    assert path.stat().st_size < cache.ledger().full_bytes / 2


@pytest.mark.parametrize("change", [{"seed": 1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}])
def test_a_cache_of_another_model_is_refused_and_both_are_named(change, saved, loaded, build):
    path, _, _ = saved()
    other = loaded("llama", build("llama", **change), name="other")
    mine = fingerprint(loaded("llama").model)
    with pytest.raises(ValueError, match=f"made by tiny .fingerprint {mine}., not by other .* choose --model tiny"):
        beacon.load_cache(path, other)


def test_a_model_is_known_by_its_weights_and_not_by_its_name(saved, loaded, build):
    path, ids, _ = saved()
    assert beacon.load_cache(path, loaded("llama", build("llama"), name="renamed")).ids == ids


def test_a_cache_in_another_dtype_is_refused(saved, loaded, build):
    # The same weights: bf16 values survive in fp32.
    half = build("llama", dtype=torch.bfloat16)
    path, whole = saved()[0], loaded("llama", half.float())
    half = loaded("llama", build("llama", dtype=torch.bfloat16))
    assert fingerprint(half.model) == fingerprint(whole.model)
    cache = beacon.CompressedCache(half.model, beacon.method("streaming"), beacon.Budget(slots=16))
    beacon.read(half, text(30), cache)
    beacon.save_cache(path, half, text(30), cache)
    with pytest.raises(ValueError, match="made in bfloat16, the model computes in float32: choose the same --dtype"):
        beacon.load_cache(path, whole)
    assert beacon.load_cache(path, half).cache.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_cut_off_file_is_refused(size, saved, loaded):
    path = saved()[0]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"damaged or no cache file .*; read the document again"):
        beacon.load_cache(path, loaded("llama"))


def test_what_is_no_cache_file_is_refused(tmp_path, loaded):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no cache file .*; --save-cache writes one"):
        beacon.load_cache(path, loaded("llama"))
    with pytest.raises(FileNotFoundError, match="no cache file"):
        beacon.load_cache(tmp_path, loaded("llama"))
    path.write_text("Call me Ishmael. " * 100)
    with pytest.raises(ValueError, match="damaged or no cache file"):
        beacon.load_cache(path, loaded("llama"))
    for header, words in ((None, "some other"), ({"format": "pt"}, "'pt'")):
        save_file({"weight": torch.ones(2)}, path, metadata=header)
        with pytest.raises(ValueError, match=f"is no 'longscope compressed cache 1' file but .*{words}"):
            beacon.load_cache(path, loaded("llama"))


@pytest.mark.parametrize("missing", ["ids", "keys.1"])
def test_a_file_that_lacks_a_part_is_refused(missing, saved, loaded):
    path = saved()[0]
    with safe_open(path, framework="pt") as file:
        header, names = file.metadata(), set(file.keys())
        parts = {name: file.get_tensor(name) for name in names - {missing}}
    save_file(parts, path, metadata=header)
    with pytest.raises(ValueError, match="damaged or no cache file"):
        beacon.load_cache(path, loaded("llama"))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_no_litter(error, saved, loaded, monkeypatch):
    path, ids, _ = saved()
    old = path.read_bytes()

    def fail(*_):
        raise error("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(error, match="no space left"):
            saved(length=30)
    assert path.read_bytes() == old
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert beacon.load_cache(path, loaded("llama")).ids == ids
    (path.parent / "link").hardlink_to(path)
    saved(length=30)
    # Replaced as a whole, not written over: whoever has the old file open keeps it.
    assert (path.parent / "link").read_bytes() == old
    assert len(beacon.load_cache(path, loaded("llama")).ids) == 30


def test_what_cannot_be_written_is_an_error_of_the_system(saved, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        saved(file="file/cache.safetensors")
    assert saved(file="new/folder/cache.safetensors")[0].is_file()


def test_only_a_cache_of_one_row_that_has_read_something_is_saved(tmp_path, loaded, compressed):
    model = loaded("llama")
    cache = compressed(model.model, slots=16)
    with pytest.raises(ValueError, match="has one row and has read something, this one has 0 rows"):
        beacon.save_cache(tmp_path / "x", model, text(5), cache)
    beacon.read(model, text(20), cache)
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="this one has 2 rows"):
        beacon.save_cache(tmp_path / "x", model, text(5), cache)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_reading_saved_half_way_is_resumed_to_the_same_end(kind, positions, tmp_path, loaded, compressed, kept):
    model, ids, path = loaded(kind), text(70), tmp_path / "half"
    straight, half = (compressed(model.model, "snapkv", slots=16, positions=positions) for _ in range(2))
    options = {"questions": [[3, 4]], "chunk": 20}
    beacon.read(model, ids, straight, **options)
    beacon.read(model, ids[:40], half, **options)
    beacon.save_cache(path, model, ids, half)
    back = beacon.load_cache(path, model)
    assert not back.complete
    assert (back.cache.seen, back.ids) == ([40], ids)
    prefix = beacon.read(model, back.ids, back.cache, **options)
    assert prefix.ids == ids
    assert back.complete
    assert kept(back.cache) == kept(straight)
    assert torch.equal(continued(model.model, back.cache), continued(model.model, straight))


@pytest.mark.parametrize("kind", KINDS)
def test_forks_of_a_loaded_cache_are_independent(kind, saved, loaded, kept):
    path, _, cache = saved(kind, positions="compact")
    back = beacon.load_cache(path, loaded(kind)).cache
    forks = [back.fork() for _ in range(2)]
    wanted = continued(loaded(kind).model, cache)
    before = kept(back)
    assert torch.equal(continued(loaded(kind).model, forks[0]), wanted)
    assert (kept(back), kept(forks[1]), back.seen) == (before, before, [50])
    assert torch.equal(continued(loaded(kind).model, forks[1]), wanted)
    assert torch.equal(continued(loaded(kind).model, back), wanted)


def test_a_forgotten_cache_can_be_saved(tmp_path, loaded, compressed):
    model = loaded("gemma3_text")
    cache = compressed(model.model, slots=16)
    beacon.read(model, text(30), cache)
    cache.forget()
    beacon.save_cache(tmp_path / "x", model, text(30), cache)
    back = beacon.load_cache(tmp_path / "x", model).cache
    assert torch.equal(continued(model.model, back), continued(model.model, cache))


def test_the_facts_in_the_file_are_readable_by_other_programs(saved):
    path = saved()[0]
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["method"] == {"name": "snapkv", "sink": 2, "recent": 5, "kernel": 3}
    assert facts["budget"] == {"ratio": None, "slots": 16, "nbytes": None}
    assert facts["books"]["seen"] == [50]
