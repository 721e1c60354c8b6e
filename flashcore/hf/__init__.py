"""flashcore for transformers: ``register()`` once, then load any model with ``attn_implementation="flashcore"``."""

from __future__ import annotations

from .attention import register
from .cache import GrowingCache, cache_bytes

__all__ = ["GrowingCache", "cache_bytes", "register"]
