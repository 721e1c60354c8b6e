"""Which dtype to compute in: bf16 where it pays, fp32 elsewhere, never fp16 on a CPU."""

from __future__ import annotations

import functools
import time

import torch

#: Names a user may write for a dtype; ``auto`` is resolved per device.
NAMES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def cpu_dtype(requested: torch.dtype | str | None = None) -> torch.dtype:
    """Return the dtype to compute in on this CPU.

    Args:
        requested: a dtype or its name; None or "auto" lets the processor decide. fp16 is hopelessly slow on CPUs:
            asking for it (as ``use_fp16=True`` does) means "half precision if that is any good here".

    Raises:
        ValueError: for an unknown name.

    >>> cpu_dtype("fp32"), cpu_dtype(torch.float16) in (torch.bfloat16, torch.float32)
    (torch.float32, True)
    """
    if isinstance(requested, str) and requested != "auto":
        if requested not in NAMES:
            raise ValueError(f"unknown dtype {requested!r}; choose auto or one of {', '.join(NAMES)}")
        requested = NAMES[requested]
    if isinstance(requested, torch.dtype) and requested is not torch.float16:
        return requested
    return torch.bfloat16 if has_fast_bf16() else torch.float32


@functools.cache
def has_fast_bf16() -> bool:
    """Say whether this processor's bf16 units beat its fp32 ones.

    The instruction set alone does not tell: AVX512-BF16 quadruples fp32 on some processors and halves it on others
    (Xeons whose AMX tiles a virtual machine hides), so two small products are timed once per process.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    fastest = gemm_seconds()
    return fastest[torch.bfloat16] < 0.8 * fastest[torch.float32]


@functools.cache
def gemm_seconds(size: int = 256, repeats: int = 20) -> dict[torch.dtype, float]:
    """Return the best time of a ``size``-cubed matrix product per dtype, the two alternating, on one thread.

    One thread and the best of many short runs: the answer must not depend on what else the machine is doing.
    """
    fastest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    operands = {dtype: torch.ones(size, size, dtype=dtype) for dtype in fastest}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            for dtype, operand in operands.items():
                start = time.perf_counter()
                operand @ operand
                fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return fastest
