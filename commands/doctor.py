"""``longscope doctor``: what this machine can do, what is installed, and whether a model is fit for use."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Iterator
from typing import Any

import catalog

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf")


def doctor(*, model: str = "") -> Iterator[str | dict[str, Any]]:
    """Show versions, processor features, attention paths, installed extras and where downloads are kept.

    With a model, also load it and show what it was trained for: the RoPE speeds really in force, trained and claimed
    length, stop tokens, chat template, and the adapter if it is one.

    Args:
        model: a name from ``longscope models``, a folder in Hugging Face layout, or an adapter, to examine
    """
    record: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "machine": machine(),
        "attention": _attention(),
        "extras": _extras(),
        "catalog": _catalog(),
    }
    if model:
        # An unknown name is a mistake of the command line; a model that does not load is a finding.
        from longllm.adapter import find

        find(model)
        record["model"] = _model(model)
    for title, findings in record.items():
        yield _section(title, findings)
    yield record


def _section(title: str, findings: dict[str, Any]) -> str:
    """Return a title and aligned lines below it.

    >>> print(_section("machine", {"cpus": 2, "vector_units": ["AVX2", "AMX"]}), end="")
    machine
      cpus          2
      vector units  AVX2, AMX
    """
    width = max(map(len, findings), default=0)
    lines = [title]
    for key, value in findings.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {fact}" for name, fact in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        lines.append(f"  {key.replace('_', ' '):<{width}}  {'none' if value in ('', None) else value}")
    return "\n".join(lines) + "\n"


def _version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return processor and accelerator facts that decide speed.

    >>> machine()["threads"] >= 1
    True
    """
    import torch

    import flashcore

    units = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX512": torch.cpu._is_avx512_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_units": [name for name, there in units.items() if there],
        "cpu_dtype": str(flashcore.cpu_dtype()).removeprefix("torch."),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _attention() -> dict[str, str]:
    """Return "ok" or the reason why not, for each attention backend."""
    from flashcore import backends

    return backends.available()


def _extras() -> dict[str, str]:
    """Return for each extra of this distribution "installed" or what is missing or too old."""
    # A dependency of transformers, so it is there.
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata("longscope")
    except importlib.metadata.PackageNotFoundError:
        return {"longscope": "not installed as a distribution: pip install -e . in its folder"}
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist") or ()]
    report = {}
    for extra in metadata.get_all("Provides-Extra") or ():
        problems = []
        for need in wanted:
            chosen = need.marker and need.marker.evaluate({"extra": extra}) and need.name != "longscope"
            if not chosen:
                continue
            found = _version(need.name)
            if found is None:
                problems.append(f"{need.name} is missing")
            elif not need.specifier.contains(found, prereleases=True):
                problems.append(f"{need.name} is {found}, needs {need.specifier}")
        report[extra] = "; ".join(problems) or "installed"
    return report


def _catalog() -> dict[str, Any]:
    """Return the catalog's folder and which rows are in it."""
    here = [row.name for row in catalog.rows() if catalog.local(row.name)]
    return {"folder": str(catalog.home()), "installed": here}


def _model(name: str) -> dict[str, Any]:
    """Load a model and return what it was trained for, or why it cannot be used."""
    import longllm
    from longllm.loading import claimed_length

    try:
        loaded = longllm.load(name)
    except (ValueError, OSError, ImportError) as error:
        return {"name": name, "usable": f"no: {' '.join(str(error).split())}"}
    network: Any = loaded.model
    config = network.config.get_text_config(decoder=True)
    names = loaded.tokenizer.convert_ids_to_tokens(sorted(loaded.stop_ids))
    return {
        "name": name,
        "usable": "yes",
        "adapter": loaded.adapter.record() if loaded.adapter is not None else None,
        "architecture": type(network).__name__,
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "trained_length": loaded.trained_length,
        "claimed_length": claimed_length(network.config),
        "rope": getattr(config, "rope_parameters", None),
        "effective_rope": _rope(network, loaded.trained_length),
        "stop_tokens": dict(zip(names, sorted(loaded.stop_ids), strict=True)),
        "chat_template": "yes",
    }


def _rope(network: Any, trained_length: int) -> dict[str, str]:
    """Describe the rotary frequencies that the loaded model really uses."""
    report = {}
    for name, frequencies in network.named_buffers():
        if not name.endswith("inv_freq") or "original" in name:
            continue
        speeds = frequencies.double()
        turns = 2 * math.pi / speeds
        # Unscaled, the second of n speeds is theta ** (-1 / n) and the last theta ** (1 / n - 1): both name theta.
        count = len(speeds)
        by_second, by_last = float(speeds[1]) ** -count, float(speeds[-1]) ** (count / (1 - count))
        unscaled = math.isclose(by_second, by_last, rel_tol=1e-3)
        report[name.rpartition(".")[2]] = (
            f"{count} frequencies, one turn per {turns.min():.1f} to {turns.max():,.0f} tokens; "
            f"{int((turns <= trained_length).sum())} complete a turn in the trained length; the second is "
            f"{float(speeds[1]):.4f}, "
            + (f"that of theta {float(f'{by_last:.5g}'):,.0f}" if unscaled else "and they are scaled")
        )
    return report
