"""Where the time of a call goes, by kinds of work: linear layers, attention, elementwise arithmetic, copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

#: what flashcore's attention is recorded as: torch does not see inside its compiled kernel
MARK = "flashcore.attention"
#: kind of work -> torch's names; what an operation calls itself counts as the operation's if it is one of the first two
KINDS = {
    "attention": {MARK, "scaled_dot_product_attention"},
    "linear": {"linear", "matmul", "mm", "addmm", "bmm"},
    "copies": {"copy_", "cat", "clone", "contiguous", "to", "_to_copy", "index", "index_select", "index_put_"}
    | {"embedding", "stack", "pad", "constant_pad_nd", "fill_"},
    "views": {"view", "reshape", "transpose", "t", "slice", "narrow", "as_strided", "unflatten", "flatten", "select"}
    | {"unsqueeze", "squeeze", "expand", "permute", "_unsafe_view", "detach", "empty", "empty_strided", "empty_like"}
    | {"new_empty", "split", "chunk", "split_with_sizes", "resolve_conj", "resolve_neg", "_reshape_alias", "resize_"},
}
ARITHMETIC = "norms and elementwise"
#: Python between the operations, and what profiling itself costs
REST = "rest"


@contextmanager
def marked(module: Any, name: str = "attention") -> Iterator[None]:
    """Record every call of a module's function ``name`` as attention; on leaving, the module is as it was."""
    function = getattr(module, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK):
            return function(*args, **kwargs)

    setattr(module, name, recorded)
    try:
        yield
    finally:
        setattr(module, name, function)


def kind(event: Any) -> str:
    """Return what kind of work an event of the profiler is, or is part of."""
    outer, found = event, None
    while outer is not None:
        name = outer.name.removeprefix("aten::")
        inside = next((kind for kind in ("attention", "linear") if name in KINDS[kind]), None)
        # The outermost counts: a product inside of attention is attention.
        found, outer = inside or found, outer.cpu_parent
    own = event.name.removeprefix("aten::")
    return found or next((kind for kind, names in KINDS.items() if own in names), ARITHMETIC)


def shares(function: Callable[[], float]) -> tuple[dict[str, float], float]:
    """Return which share of a call's seconds each kind of work takes, largest first, and the seconds.

    Args:
        function: runs once and returns the seconds it took.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = function()
    spent: dict[str, float] = {}
    for event in profiler.events() or ():
        spent[kind(event)] = spent.get(kind(event), 0.0) + event.self_cpu_time_total / 1e6
    spent[REST] = max(0.0, seconds - sum(spent.values()))
    total = sum(spent.values())
    return {name: part / total for name, part in sorted(spent.items(), key=lambda item: -item[1])}, seconds


def summary(found: dict[str, float], seconds: float, plain: float) -> str:
    """Return the shares as lines of text; ``plain`` = seconds of the same call without the profiler."""
    lines = [f"{name:<22} {100 * share:5.1f} %" for name, share in found.items()]
    threads = torch.get_num_threads()
    return "\n".join([*lines, f"{seconds:.2f} s with the profiler, {plain:.2f} s without; threads: {threads}"])
