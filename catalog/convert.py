"""GGUF -> Hugging Face folder (safetensors), once. The only file here that needs torch and transformers."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

VERSION = 2
"""Raised when the output changes, so that folders converted earlier are converted again."""


def gguf_to_folder(source: Path, folder: Path) -> None:
    """Convert the GGUF file in ``source`` into ``folder``; other files, such as the licence, move along.

    Writes float32 safetensors (the only dtype that holds every de-quantised value exactly), config,
    generation config and tokenizer with its chat template.

    Raises:
        OSError: no GGUF file, or the disk is full.
    """
    files = sorted(source.glob("*.gguf"))
    if len(files) != 1:
        raise OSError(f"expected one GGUF file to convert, found {len(files)}")
    folder.mkdir()
    for file in source.iterdir():
        if file not in files:
            file.rename(folder / file.name)
    model, tokenizer = _load(files[0])
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except _safetensors_error() as error:
        # The safetensors library reports a full disk as an error of its own.
        code = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
        raise OSError(code, os.strerror(code), str(folder)) from error


def _load(file: Path) -> tuple[Any, Any]:
    """Return a GGUF file's model, such that it can be saved, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _repair_pre_tokenizer(tokenizer, _metadata(file, "tokenizer.ggml.pre"))

    # A model loaded from GGUF refuses to be saved; one of the same configuration, with its tensors, does not.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    # A chat model ends its turn with the tokenizer's end token, which need not be the configuration's.
    ends = sorted({end for end in (config.eos_token_id, tokenizer.eos_token_id) if end is not None})
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def _metadata(file: Path, key: str) -> Any:
    """Return one metadata value of a GGUF file, or None."""
    from gguf import GGUFReader

    entry = GGUFReader(file).get_field(key)
    return None if entry is None else entry.contents()


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _repair_pre_tokenizer(tokenizer: Any, pre: str | None) -> None:
    """Install the pre-tokeniser that the GGUF file names where transformers does not.

    transformers reads vocabulary and merges but gives every ``gpt2`` tokeniser the GPT-2 splitting rule.
    SmolLM's cuts at each digit first: two line ends before a digit are one token, not two.
    """
    if pre != "smollm":
        return
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
