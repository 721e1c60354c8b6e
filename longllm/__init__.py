"""Language models with a long context: loading, prompts, streaming generation; evaluations in ``longllm.evals``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longllm.config import Attention, Decoding, Device, DType

if TYPE_CHECKING:
    from longllm.chat import ChatSession as ChatSession
    from longllm.context import Context as Context
    from longllm.context import context_from as context_from
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
    from longllm.train import Recipe as Recipe
    from longllm.train import extend_context as extend_context

# Public name -> its module. Modules that need torch are imported when a name is first used.
_HOME = {
    "ChatSession": "chat",
    "Context": "context",
    "Excerpt": "spans",
    "LoadedModel": "loading",
    "Prefix": "generate",
    "Prompt": "prompts",
    "Recipe": "train",
    "Result": "generate",
    "Stream": "generate",
    "chat_prompt": "prompts",
    "context_from": "context",
    "document_prompt": "prompts",
    "extend_context": "train",
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
