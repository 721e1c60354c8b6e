"""What an Activation Beacon model is: the ``beacon_*`` fields of its config.json, checked against each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Placement = Literal["interleave", "append"]
Scheme = Literal["full-coverage", "step-expansion"]
_PROJECTIONS = "qkvo"


@dataclass(frozen=True)
class BeaconConfig:
    """Windows, ratios and beacons (arXiv 2401.03462 v3, section 3); fields are config.json's without ``beacon_``.

    Raises:
        ValueError: a value or a combination that cannot run, with what to choose instead.

    >>> config = BeaconConfig(window=8, stride=8, ratio=(2, 4))
    >>> config.valid_ratios, config.adapt
    ((2, 4), None)
    """

    window: int = 1024
    """raw tokens that are read together"""
    stride: int = 1024
    """raw tokens after which the next window begins; always the window (an overlap never worked in the reference)"""
    attn: Scheme = "full-coverage"
    """what a beacon sees of its own window: everything before it, or (step-expansion) its share of the raw tokens"""
    ratio: tuple[int, ...] = (2, 4, 8, 16, 32)
    """raw tokens per beacon, to choose from for each window; 0 = keep the window as it is"""
    ratio_mix: str = "step-random"
    """how a window's ratio is chosen: step-random, instance-random, sequence or adapt-N (the smallest that leaves room
    for N more tokens)"""
    param: tuple[str, ...] = ()
    """projections that beacons have of their own, of q, k, v and o"""
    embed_init: Literal["eos", "bos"] = "eos"
    """token whose embedding a new beacon starts from"""
    sink_size: int = 0
    """first slots of the text that are always kept"""
    attend_prev: bool = True
    """step-expansion: whether a beacon sees the earlier beacons of its window"""
    pos: Placement = "interleave"
    """interleave = a beacon after every ``ratio`` raw tokens; append = all of them at the end of a complete window"""
    parallel_window: int = 1
    """windows that the reference runs in one forward pass; read and written, but windows run one by one here: the
    result is the same, joint windows save no work and need a dense mask"""

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        for name in ("ratio", "param"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, Sequence) else (value,))
        for name, least in (("window", 1), ("stride", 1), ("sink_size", 0), ("parallel_window", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"beacon_{name} must be a whole number of at least {least}, got {value!r}")
        if self.stride != self.window:
            raise ValueError(
                f"beacon_stride must equal beacon_window ({self.window}), got {self.stride}: "
                "windows that overlap are not supported (and crash in the reference)"
            )
        if self.attn == "segmentation":
            raise ValueError("beacon_attn segmentation never worked in the reference: choose full-coverage")
        for name, kind in (("attn", Scheme), ("pos", Placement), ("embed_init", Literal["eos", "bos"])):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"beacon_{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}"
                )
        if self.attn == "step-expansion" and self.pos != "append":
            raise ValueError("beacon_attn step-expansion needs beacon_pos append: interleaved, its mask is undefined")
        if not isinstance(self.attend_prev, bool):
            raise ValueError(f"beacon_attend_prev must be true or false, got {self.attend_prev!r}")
        if any(not isinstance(ratio, int) or isinstance(ratio, bool) or ratio < 0 for ratio in self.ratio):
            raise ValueError(f"beacon_ratio must hold whole numbers of at least 0, got {list(self.ratio)}")
        if not self.valid_ratios:
            raise ValueError(
                f"beacon_ratio {list(self.ratio)} has nothing to choose from: of several ratios, those above the "
                f"stride of {self.stride} or not dividing it are left out"
            )
        if any(name not in list(_PROJECTIONS) for name in self.param) or len(set(self.param)) < len(self.param):
            raise ValueError(f"beacon_param must list some of q, k, v and o, each once, got {list(self.param)}")
        if self.sink_size >= self.window:
            raise ValueError(f"beacon_sink_size must be below beacon_window ({self.window}), got {self.sink_size}")
        if not isinstance(self.ratio_mix, str) or not re.fullmatch(
            r"step-random|instance-random|sequence|.*adapt-\d+.*", self.ratio_mix
        ):
            raise ValueError(
                "beacon_ratio_mix must be step-random, instance-random, sequence or adapt- and a number, "
                f"got {self.ratio_mix!r}"
            )

    @property
    def valid_ratios(self) -> tuple[int, ...]:
        """Return what a window may choose from: of several, those that divide the stride (a single one always may)."""
        if len(self.ratio) == 1:
            return self.ratio
        return tuple(ratio for ratio in self.ratio if ratio <= self.stride and (not ratio or self.stride % ratio == 0))

    @property
    def adapt(self) -> int | None:
        """Return the N of adapt-N, or None."""
        found = re.search(r"adapt-(\d+)", self.ratio_mix)
        return int(found.group(1)) if found else None

    @classmethod
    def from_hf(cls, config: Any) -> BeaconConfig:
        """Read the ``beacon_*`` fields of a model's config, or of the mapping that its config.json holds.

        Raises:
            ValueError: there is none, or one that no version of the format has.

        >>> BeaconConfig.from_hf({"beacon_window": 64, "beacon_stride": 64, "vocab_size": 9}).window
        64
        """
        values = config if isinstance(config, Mapping) else vars(config)
        given = {name.removeprefix("beacon_"): value for name, value in values.items() if name.startswith("beacon_")}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"config.json has unknown fields {', '.join(f'beacon_{name}' for name in unknown)}")
        if not given:
            raise ValueError("config.json has no beacon_* fields: this is no Activation Beacon checkpoint")
        return cls(**given)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``beacon_*`` fields as config.json holds them.

        >>> BeaconConfig.from_hf(BeaconConfig(param=("q", "k")).to_hf()) == BeaconConfig(param=("q", "k"))
        True
        """
        values = {f"beacon_{field.name}": getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class MemoryOptions:
    """What our memory can do beyond the reference; every default is the reference's behaviour.

    Raises:
        ValueError: a value out of range.

    >>> MemoryOptions(lossless_short=True, keep_recent=64).int8
    False
    """

    lossless_short: bool = False
    """put no beacons in the first window until it is complete, so that a short prompt gets the base model's answer;
    the completed window is then read once more, with beacons, and all is as without the option"""
    keep_recent: int = 0
    """raw tokens of a completed window that stay beside its beacons until the next one is complete, so that text
    right after a border has local context"""
    int8: bool = False
    """hold memory as 8-bit integers with one scale per key and value; the open window stays as computed"""

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        if not isinstance(self.keep_recent, int) or self.keep_recent < 0:
            raise ValueError(f"keep_recent must be a whole number of tokens of at least 0, got {self.keep_recent!r}")
