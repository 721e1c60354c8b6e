"""``longscope merge``: an adapter and its base model become one ordinary model folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal


def merge(
    *,
    adapter: str,
    out: str,
    base: str = "",
    dtype: Literal["base", "bf16", "fp32", "fp16"] = "base",
    max_shard_size: str = "4GB",
    rope: str = "",
    length: int = 0,
    force: bool = False,
) -> Iterator[str | dict[str, Any]]:
    """Merge a LoRA adapter into its base model and save safetensors, configuration, context and tokeniser.

    The folder that comes out is loaded by any library or serving engine, without this program and without flags: RoPE
    settings, length and stop tokens are in its configuration.

        longscope merge --adapter runs/mine --out merged
        longscope merge --adapter runs/mine --out merged-bf16 --dtype bf16 --force

    Args:
        adapter: the adapter's folder, or the name of a shipped one
        out: the folder to write; it appears only when it is complete
        base: the base model, if the one that the adapter names has another name or place here
        dtype: of the weights; base = as the base model is stored
        max_shard_size: weights are split into files of at most this size, such as 500MB
        rope: RoPE settings for an adapter that does not bring them, such as theta:2e8 or yarn:4
        length: tokens that these settings are for
        force: replace the folder if it is there
    """
    from longllm.loading import worded_context
    from longllm.merge import merge as merged

    context = worded_context(rope, length, base or adapter, adapter if base else "")
    done = merged(adapter, out, base=base, context=context, dtype=dtype, max_shard_size=max_shard_size, force=force)
    weights = [name for name in done.files if name.endswith(".safetensors")]
    yield f"merged {done.adapter} into {done.base}: {done.parameters:,} parameters, {done.dtype}\n"
    yield f"wrote  {done.folder}: {done.bytes / 1e6:,.1f} MB, {len(weights)} weight files, {done.seconds:.1f} s\n"
    yield (
        f"context {done.max_position_embeddings:,} tokens, trained on up to {done.trained_length:,}; "
        f"RoPE {done.rope_parameters}\n"
    )
    yield {**asdict(done), "folder": str(done.folder), "files": list(done.files)}
