"""The ``beacon_*`` fields of a config.json: what is read, written, filled in and refused."""

import dataclasses
import json

import pytest
from transformers import LlamaConfig

from beacon import BeaconConfig, MemoryOptions, RowPlan

#: the fields of the format and their defaults
DEFAULTS = {
    "beacon_window": 1024,
    "beacon_stride": 1024,
    "beacon_attn": "full-coverage",
    "beacon_ratio": [2, 4, 8, 16, 32],
    "beacon_ratio_mix": "step-random",
    "beacon_param": [],
    "beacon_embed_init": "eos",
    "beacon_sink_size": 0,
    "beacon_attend_prev": True,
    "beacon_pos": "interleave",
    "beacon_parallel_window": 1,
}
#: none of them as by default: what an older checkpoint says
OLDER = {
    "beacon_window": 2048,
    "beacon_stride": 2048,
    "beacon_attn": "step-expansion",
    "beacon_ratio": [0, 2, 128],
    "beacon_ratio_mix": "adapt-1024",
    "beacon_param": ["q", "k", "v", "o"],
    "beacon_embed_init": "bos",
    "beacon_sink_size": 1,
    "beacon_attend_prev": False,
    "beacon_pos": "append",
    "beacon_parallel_window": 4,
}


def small(**changes):
    return BeaconConfig(**{"window": 8, "stride": 8, "ratio": (2,)} | changes)


@pytest.mark.parametrize("fields", [DEFAULTS, OLDER])
def test_what_is_read_is_written_again(fields):
    config = BeaconConfig.from_hf(json.loads(json.dumps(fields)))
    assert json.loads(json.dumps(config.to_hf())) == fields
    # The same from the config of a model, among fields of other meaning.
    assert BeaconConfig.from_hf(LlamaConfig(vocab_size=9, **fields)) == config
    assert BeaconConfig.from_hf({"vocab_size": 9, "architectures": ["LlamaForCausalLM"], **fields}) == config
    for name, value in fields.items():
        held = getattr(config, name.removeprefix("beacon_"))
        assert held == (tuple(value) if isinstance(value, list) else value)
    assert hash(config) == hash(BeaconConfig.from_hf(fields))


def test_nothing_of_the_older_checkpoint_is_as_by_default():
    assert DEFAULTS.keys() == OLDER.keys() == {f"beacon_{field.name}" for field in dataclasses.fields(BeaconConfig)}
    assert not [name for name in DEFAULTS if DEFAULTS[name] == OLDER[name]]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_missing_field_is_filled_in(name):
    # Window and stride go together, and only ``append`` may have another scheme of attention.
    together = {name} | ({"beacon_window", "beacon_stride"} if name in ("beacon_window", "beacon_stride") else set())
    together |= {"beacon_attn"} if name == "beacon_pos" else set()
    given = {other: value for other, value in OLDER.items() if other not in together}
    assert BeaconConfig.from_hf(given).to_hf() == OLDER | {other: DEFAULTS[other] for other in together}


def test_fields_of_no_version_are_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown fields beacon_ratios, beacon_strides$"):
        BeaconConfig.from_hf({**DEFAULTS, "beacon_strides": 3, "beacon_ratios": [2]})


@pytest.mark.parametrize("empty", [{}, {"vocab_size": 9}, LlamaConfig(vocab_size=9)])
def test_a_config_without_any_field_is_no_checkpoint(empty):
    with pytest.raises(ValueError, match=r"no beacon_\* fields: this is no Activation Beacon checkpoint"):
        BeaconConfig.from_hf(empty)


@pytest.mark.parametrize(("name", "least"), [("window", 1), ("stride", 1), ("parallel_window", 1), ("sink_size", 0)])
def test_numbers_that_are_no_counts_are_refused(name, least):
    for value in (least - 1, -7, 2.0, True, "8", None):
        with pytest.raises(
            ValueError, match=f"beacon_{name} must be a whole number of at least {least}, got {value!r}$"
        ):
            small(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 4}, r"beacon_stride must equal beacon_window \(8\), got 4: windows that overlap"),
        ({"stride": 16}, r"beacon_stride must equal beacon_window \(8\), got 16"),
        ({"attn": "segmentation"}, "segmentation never worked in the reference: choose full-coverage"),
        ({"attn": "segmentation", "pos": "append"}, "segmentation never worked"),
        ({"attn": "full"}, "beacon_attn must be one of full-coverage, step-expansion, got 'full'"),
        ({"attn": "step-expansion"}, "step-expansion needs beacon_pos append"),
        ({"pos": "prepend"}, "beacon_pos must be one of interleave, append, got 'prepend'"),
        ({"embed_init": "pad"}, "beacon_embed_init must be one of eos, bos, got 'pad'"),
        ({"embed_init": None}, "beacon_embed_init must be one of eos, bos, got None"),
        ({"ratio": (2, -1)}, r"beacon_ratio must hold whole numbers of at least 0, got \[2, -1\]"),
        ({"ratio": (2.0,)}, r"beacon_ratio must hold whole numbers of at least 0, got \[2.0\]"),
        ({"ratio": (True, 2)}, r"beacon_ratio must hold whole numbers of at least 0, got \[True, 2\]"),
        ({"ratio": "8"}, r"beacon_ratio must hold whole numbers of at least 0, got \['8'\]"),
        ({"ratio": None}, r"beacon_ratio must hold whole numbers of at least 0, got \[None\]"),
        ({"ratio": ()}, r"beacon_ratio \[\] has nothing to choose from"),
        (
            {"ratio": (3, 5, 16)},
            r"\[3, 5, 16\] has nothing to choose from: .* above the stride of 8 or not dividing it",
        ),
        ({"param": ("q", "x")}, r"beacon_param must list some of q, k, v and o, each once, got \['q', 'x'\]"),
        ({"param": ("q", "k", "q")}, r"each once, got \['q', 'k', 'q'\]"),
        ({"sink_size": 8}, r"beacon_sink_size must be below beacon_window \(8\), got 8"),
        (
            {"ratio_mix": "random"},
            "must be step-random, instance-random, sequence or adapt- and a number, got 'random'",
        ),
        ({"ratio_mix": "adapt-"}, "got 'adapt-'"),
        ({"ratio_mix": "adapt-many"}, "got 'adapt-many'"),
        ({"ratio_mix": "step-random "}, "got 'step-random '"),
    ],
)
def test_what_cannot_run_is_refused_with_what_to_choose_instead(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
    # From a file it is the same.
    fields = {"beacon_window": 8, "beacon_stride": 8, "beacon_ratio": [2]}
    with pytest.raises(ValueError, match=message):
        BeaconConfig.from_hf(fields | {f"beacon_{name}": value for name, value in changes.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {"pos": "append", "attn": "step-expansion", "attend_prev": True},
        {"pos": "append", "attn": "step-expansion", "attend_prev": False},
        {"pos": "append", "attn": "full-coverage", "attend_prev": False},
        {"pos": "interleave", "attend_prev": False},
        {"sink_size": 7},
        {"param": "qkvo"},
        {"param": ["o"]},
        {"ratio": (0, 3)},
        {"ratio": (5, 8)},
        {"parallel_window": 2, "ratio": (0, 2)},
    ],
)
def test_what_can_run_is_accepted(changes):
    assert BeaconConfig.from_hf(small(**changes).to_hf()) == small(**changes)


def test_of_several_ratios_those_that_divide_the_window_may_be_chosen():
    assert small(ratio=(16, 8, 0, 3, 2, 1, 5)).valid_ratios == (8, 0, 2, 1)
    assert small(ratio=(3, 2, 2)).valid_ratios == (2, 2)
    # A single one is used whatever it is.
    for only in (0, 1, 3, 8, 99):
        assert small(ratio=only).valid_ratios == small(ratio=[only]).valid_ratios == (only,)


@pytest.mark.parametrize(
    ("mix", "tokens"),
    [("step-random", None), ("sequence", None), ("adapt-0", 0), ("adapt-1024", 1024), ("eval-adapt-12-x", 12)],
)
def test_room_to_adapt_for_is_read_from_the_mix(mix, tokens):
    assert small(ratio_mix=mix).adapt == tokens


def test_a_config_cannot_be_changed():
    config = small(ratio=[2, 4], param=["q"])
    assert (config.ratio, config.param) == ((2, 4), ("q",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 9
    with pytest.raises(ValueError, match="beacon_stride must equal beacon_window"):
        dataclasses.replace(config, window=16)


def test_the_memory_is_the_references_unless_told_otherwise():
    assert MemoryOptions() == MemoryOptions(lossless_short=False, keep_recent=0, int8=False)
    assert MemoryOptions(keep_recent=3).keep_recent == 3
    with pytest.raises(ValueError, match="keep_recent must be a whole number of tokens of at least 0, got -1"):
        MemoryOptions(keep_recent=-1)
    with pytest.raises(ValueError, match=r"got 2\.5"):
        MemoryOptions(keep_recent=2.5)


@pytest.mark.parametrize(
    ("changes", "options", "skips", "message"),
    [
        ({}, {}, {"skip_first": -1}, "skip_first -1 and skip_last None must be 0 <= first <= last"),
        ({}, {}, {"skip_first": 5, "skip_last": 4}, "skip_first 5 and skip_last 4 must be 0 <= first <= last"),
        ({}, {}, {"skip_last": -4}, "skip_first 0 and skip_last -4 must be 0 <= first <= last"),
        ({"sink_size": 1}, {}, {"skip_first": 2}, "need beacon_sink_size 0, it is 1"),
        ({"sink_size": 2}, {}, {"skip_last": 0}, "need beacon_sink_size 0, it is 2"),
        ({}, {}, {"skip_first": 3, "skip_last": 8}, r"whole windows of 4 after skip_first \(3\), got 8"),
        ({}, {"keep_recent": 5}, {}, r"keep_recent must not exceed beacon_window \(4\), got 5"),
    ],
)
def test_what_does_not_fit_the_windows_is_refused(changes, options, skips, message):
    config = BeaconConfig(window=4, stride=4, ratio=(2,), **changes)
    with pytest.raises(ValueError, match=message):
        RowPlan(config, MemoryOptions(**options), **skips)
    # What just fits is accepted.
    for fitting in ({"skip_first": 3, "skip_last": 3}, {"skip_first": 3, "skip_last": 11}, {"skip_last": 0}):
        assert RowPlan(dataclasses.replace(config, sink_size=0), MemoryOptions(keep_recent=4), **fitting).held == 0
