"""flashcore: the one attention core. ``attention(q, k, v, AttentionSpec(...))``; needs torch only.

``flashcore.hf`` offers it to transformers, ``flashcore.masks`` and ``flashcore.rope`` are the tools around it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import attention
    from .dtype import cpu_dtype
    from .mass import attention_mass
    from .spec import AttentionSpec

#: public name -> module that holds it, imported when the name is first used
_HOME = {"AttentionSpec": "spec", "attention": "api", "attention_mass": "mass", "cpu_dtype": "dtype"}

__all__ = ["AttentionSpec", "attention", "attention_mass", "cpu_dtype"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
