"""``longscope serve``: a model behind the OpenAI protocol, on this machine alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longllm import Attention, DType


def serve(
    *,
    model: str = "smollm2-135m-instruct",
    port: int = 8000,
    max_new_tokens: int = 512,
    dtype: DType = "auto",
    attention: Attention = "flashcore",
) -> Iterator[str | dict[str, Any]]:
    """Serve a model on 127.0.0.1 to programs that speak the OpenAI chat protocol, one answer at a time.

    For trying a pipeline without a server engine; it goes on until Ctrl-C:

        longscope serve --port 8000
        longscope synth run out/one --url http://127.0.0.1:8000/v1 --model smollm2-135m-instruct

    Args:
        model: a name from ``longscope models``, a folder, an adapter's folder or the name of a shipped adapter
        port: where to serve; 0 takes one that is free
        max_new_tokens: the longest answer, unless a request says otherwise
        dtype: what to compute in; auto is bf16 where the hardware is fast at it, else fp32
        attention: the attention path; sdpa and eager are transformers' own
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must lie between 0 and 65535, got {port}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    import longllm
    from longllm.serve import ModelServer

    server = ModelServer(
        longllm.load(model, dtype=dtype, attention=attention), port=port, max_new_tokens=max_new_tokens
    )
    yield f"{model} is served at {server.url} until Ctrl-C\n"
    try:
        server.serve()
    except KeyboardInterrupt:
        yield f"\n{server.answers} answers\n"
    finally:
        server.close()
    yield {"address": server.url, "model": model, "answers": server.answers}
