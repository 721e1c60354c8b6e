"""Language models with a long context: loading, prompts, streaming generation; evaluations in ``longllm.evals``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longllm.config import Attention, Decoding, Device, DType

if TYPE_CHECKING:
    from longllm.chat import ChatSession as ChatSession
    from longllm.generate import Prefix as Prefix
    from longllm.generate import Result as Result
    from longllm.generate import Stream as Stream
    from longllm.generate import prefill as prefill
    from longllm.generate import stream as stream
    from longllm.loading import LoadedModel as LoadedModel
    from longllm.loading import load as load
    from longllm.loading import stop_ids as stop_ids
    from longllm.loading import trained_length as trained_length
    from longllm.prompts import Prompt as Prompt
    from longllm.prompts import chat_prompt as chat_prompt
    from longllm.prompts import document_prompt as document_prompt
    from longllm.prompts import length_warning as length_warning
    from longllm.prompts import question_ids as question_ids
    from longllm.spans import Excerpt as Excerpt
    from longllm.spans import retrieve as retrieve

# Public name -> its module. Modules that need torch are imported when a name is first used.
_HOME = {
    "ChatSession": "chat",
    "Excerpt": "spans",
    "LoadedModel": "loading",
    "Prefix": "generate",
    "Prompt": "prompts",
    "Result": "generate",
    "Stream": "generate",
    "chat_prompt": "prompts",
    "document_prompt": "prompts",
    "length_warning": "prompts",
    "load": "loading",
    "prefill": "generate",
    "question_ids": "prompts",
    "retrieve": "spans",
    "stop_ids": "loading",
    "stream": "generate",
    "trained_length": "loading",
}
__all__ = ["Attention", "DType", "Decoding", "Device", *_HOME]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'longllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longllm.{_HOME[name]}"), name)
