"""Training data for long contexts, written by any OpenAI-compatible endpoint, or without a model (``offline``).

A corpus becomes a folder of requests (``prepare``), ``longllm.batch`` has them answered, and the answers become
conversations (``assemble``). See arXiv 2404.19553.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longllm.synthesis.chunk import chunks as chunks
    from longllm.synthesis.chunk import token_counter as token_counter
    from longllm.synthesis.cluster import clusters as clusters
    from longllm.synthesis.cluster import side_groups as side_groups
    from longllm.synthesis.corpus import Fitness as Fitness
    from longllm.synthesis.corpus import SourceText as SourceText
    from longllm.synthesis.corpus import abstract_first as abstract_first
    from longllm.synthesis.corpus import chapters as chapters
    from longllm.synthesis.corpus import read_corpus as read_corpus
    from longllm.synthesis.corpus import sift as sift
    from longllm.synthesis.dialogues import Assembly as Assembly
    from longllm.synthesis.dialogues import conversation as conversation
    from longllm.synthesis.dialogues import regroup as regroup
    from longllm.synthesis.offline import Mixture as Mixture
    from longllm.synthesis.offline import synthesise as synthesise
    from longllm.synthesis.parse import Parsed as Parsed
    from longllm.synthesis.parse import parse_pairs as parse_pairs
    from longllm.synthesis.pipeline import assemble as assemble
    from longllm.synthesis.prompts import prompt as prompt
    from longllm.synthesis.requests import Recipe as Recipe
    from longllm.synthesis.requests import prepare as prepare
    from longllm.synthesis.texts import Cut as Cut
    from longllm.synthesis.texts import text_rows as text_rows
    from longllm.synthesis.texts import write_texts as write_texts

# Public name -> its module, imported when the name is first used.
_HOME = {
    "Assembly": "dialogues",
    "Cut": "texts",
    "Fitness": "corpus",
    "Mixture": "offline",
    "Parsed": "parse",
    "Recipe": "requests",
    "SourceText": "corpus",
    "abstract_first": "corpus",
    "assemble": "pipeline",
    "chapters": "corpus",
    "chunks": "chunk",
    "clusters": "cluster",
    "conversation": "dialogues",
    "parse_pairs": "parse",
    "prepare": "requests",
    "prompt": "prompts",
    "read_corpus": "corpus",
    "regroup": "dialogues",
    "side_groups": "cluster",
    "sift": "corpus",
    "synthesise": "offline",
    "text_rows": "texts",
    "token_counter": "chunk",
    "write_texts": "texts",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'longllm.synthesis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longllm.synthesis.{_HOME[name]}"), name)
