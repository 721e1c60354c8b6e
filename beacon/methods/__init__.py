"""KV-cache compression methods, one file each, behind ``Method``."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beacon.methods.base import LayerView as LayerView
    from beacon.methods.base import Method as Method

#: name on command lines -> module:class, best known first
METHODS = {
    "full": "full:Full",
    "streaming": "streaming:Streaming",
    "snapkv": "snapkv:SnapKV",
    "pyramidkv": "pyramidkv:PyramidKV",
    "tova": "tova:Tova",
    "knorm": "knorm:Knorm",
    "keydiff": "keydiff:KeyDiff",
    "spotlight": "spotlight:Spotlight",
    "beacon": "activation_beacon:ActivationBeacon",
}
__all__ = ["METHODS", "LayerView", "Method", "method"]


def __getattr__(name: str) -> Any:
    if name not in ("LayerView", "Method"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("beacon.methods.base"), name)


def method(name: str, **settings: Any) -> Method:
    """Return a method by its name, with its settings.

    Raises:
        ValueError: an unknown name or setting, or a value out of range.

    >>> method("snapkv", recent=16)
    SnapKV(sink=4, recent=16, kernel=7)
    """
    if name not in METHODS:
        raise ValueError(f"unknown compression method {name!r}; choose one of {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    cls = getattr(importlib.import_module(f"beacon.methods.{module}"), attribute)
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; its settings are {', '.join(known)}")
    made: Method = cls(**settings)
    return made
