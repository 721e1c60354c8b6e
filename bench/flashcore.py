"""flashcore against what a user would run instead: torch's kernel, transformers' eager attention, a whole model.

    python -m bench.flashcore                    all three parts, about 15 minutes on two cores
    python -m bench.flashcore --parts kernel     one part: kernel, options or model
    python -m bench.flashcore --quick            short lengths and few runs, to see that it works

Writes ``out/bench/flashcore.json`` (rows, versions, processor) and plots beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from bench.timing import duel, environment, peak_bytes
from flashcore import AttentionSpec, attention
from flashcore.backends import available

#: SmolLM2-135M's attention: heads, kv heads, head dim
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, Any]
#: A prefill of 8K tokens takes both sides nearly a minute, and its times vary little.
PREFILL_PAIRS = 3


def tensors(n: int, m: int, dtype: torch.dtype, heads: int = HEADS, kv_heads: int = KV_HEADS, d: int = HEAD_DIM) -> Any:
    """Return random q [1, heads, n, d] and k, v [1, kv_heads, m, d]."""
    return [torch.randn(1, h, s, d).to(dtype) for h, s in ((heads, n), (kv_heads, m), (kv_heads, m))]


def kernel(lengths: list[int], runs: int) -> Iterator[Row]:
    """Compare with ``scaled_dot_product_attention`` where torch's kernel has the option: causal, full, one query."""
    for name, dtype in DTYPES.items():
        for n in lengths:
            q, k, v = tensors(n, n, dtype)
            kinds = {"causal": AttentionSpec(causal=True), "full": AttentionSpec()}
            if n > 8192:
                kinds.pop("full")  # minutes of measuring for what 8K shows as well
            for kind, spec in kinds.items():
                causal = spec.causal
                result = duel(
                    lambda: attention(q, k, v, spec),  # noqa: B023
                    lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),  # noqa: B023
                    runs,
                )
                yield {"part": "kernel", "kind": kind, "dtype": name, "length": n, **result.row()}
            one = q[:, :, -1:].contiguous()
            packed = one.view(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
            result = duel(
                lambda: attention(one, k, v, AttentionSpec(causal=True)),  # noqa: B023
                lambda: scaled_dot_product_attention(packed, k, v),  # noqa: B023
                2 * runs,
            )
            yield {"part": "kernel", "kind": "one query", "dtype": name, "length": n, **result.row()}


OPTIONS: dict[str, dict[str, Any]] = {"softcap 50": {"softcap": 50.0}, "window 1024": {"window": 1024}}

MEMORY = """
import torch
from bench.flashcore import eager_call, our_call, tensors
q, k, v = tensors({n}, {n}, torch.float32, 4, 1, 64)
few = [x[:, :, :64] for x in (q, k, v)]
our_call(*few, {options})(), eager_call(*few, {options})()  # both have loaded their libraries
mark()
{side}(q, k, v, {options})()
"""


def our_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Callable[[], Any]:
    """Return our side of an options row."""
    spec = AttentionSpec(causal=True, **options)
    return lambda: attention(q, k, v, spec)


def eager_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Callable[[], Any]:
    """Return transformers' eager attention (Gemma 2's, which has the softcap) with the float mask it is given."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    n, window = q.shape[2], options.get("window", q.shape[2])
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    seen = (distance >= 0) & (distance < window)
    mask = torch.zeros(1, 1, n, n, dtype=q.dtype).masked_fill_(~seen, torch.finfo(q.dtype).min)
    module: Any = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    softcap = options.get("softcap")
    return lambda: eager_attention_forward(module, q, k, v, mask, scaling=q.shape[3] ** -0.5, softcap=softcap)


def options(lengths: list[int], runs: int) -> Iterator[Row]:
    """Compare with transformers' eager attention for softcap and windows: time and peak memory (fp32, 4/1 heads)."""
    for kind, chosen in OPTIONS.items():
        for n in lengths:
            row: Row = {"part": "options", "kind": kind, "dtype": "fp32", "length": n}
            q, k, v = tensors(n, n, torch.float32, 4, 1, 64)
            row |= duel(our_call(q, k, v, chosen), eager_call(q, k, v, chosen), runs if n <= 4096 else 3, 1).row()
            for side in ("our_call", "eager_call"):
                peak = peak_bytes(MEMORY.format(n=n, options=chosen, side=side))
                row["peak_mib" if side == "our_call" else "eager_peak_mib"] = round(peak / 2**20, 1)
            yield row


def model(lengths: list[int], runs: int) -> Iterator[Row]:
    """Compare whole SmolLM2-135M: our attention and cache against transformers' SDPA and DynamicCache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    import catalog
    from flashcore.hf import GrowingCache, register

    register()
    folder = catalog.path("smollm2-135m-instruct")
    for name, dtype in DTYPES.items():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kind).eval()
            for kind in ("flashcore", "sdpa")
        )
        for n in lengths:
            ids = torch.randint(0, 49000, (1, n), generator=torch.Generator().manual_seed(n))
            base = {"part": "model", "dtype": name, "length": n}
            with torch.inference_mode():
                caches: dict[str, Any] = {}

                def prefill(side: str) -> Any:
                    loaded = ours if side == "ours" else theirs  # noqa: B023
                    config = loaded.config
                    caches[side] = GrowingCache(config, n + 64) if side == "ours" else DynamicCache(config=config)  # noqa: B023
                    return loaded(ids, past_key_values=caches[side], logits_to_keep=1).logits  # noqa: B023

                def step(side: str) -> Any:
                    loaded, cache = (ours if side == "ours" else theirs), caches[side]  # noqa: B023
                    token = torch.full((1, 1), 7)
                    position = torch.tensor([[cache.get_seq_length()]])
                    return loaded(token, past_key_values=cache, position_ids=position).logits

                difference = (prefill("ours").float() - prefill("theirs").float()).abs().max()
                result = duel(lambda: prefill("ours"), lambda: prefill("theirs"), PREFILL_PAIRS, 0)
                yield {**base, "kind": "prefill", **result.row(), "max_logit_difference": round(float(difference), 4)}
                result = duel(lambda: step("ours"), lambda: step("theirs"), 2 * runs)
                yield {**base, "kind": "decode", **result.row()}


PARTS = {"kernel": kernel, "options": options, "model": model}
LENGTHS = {
    "kernel": [1024, 2048, 4096, 8192, 16384],
    "options": [1024, 2048, 4096, 8192, 16384],
    "model": [2048, 4096, 8192],
}


def show(row: Row) -> str:
    """Return one row as a line of text."""
    low, high = row["ratio_quartiles"]
    memory = f"  peak {row['peak_mib']:>7} / {row['eager_peak_mib']:>8} MiB" if "peak_mib" in row else ""
    return (
        f"{row['part']:>8} {row['kind']:<12} {row['dtype']} {row['length']:>6}  ours {row['ours_ms']:>10.2f} ms  "
        f"theirs {row['theirs_ms']:>10.2f} ms  ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}] n={row['runs']}{memory}"
    )


def plot(rows: list[Row], folder: Path) -> None:
    """Draw the speed-up over length, one panel per part, to PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(5 * len(parts), 4), squeeze=False, layout="constrained")
    for axis, part in zip(axes[0], parts, strict=True):
        for kind, dtype in sorted({(row["kind"], row["dtype"]) for row in rows if row["part"] == part}):
            line = [row for row in rows if (row["part"], row["kind"], row["dtype"]) == (part, kind, dtype)]
            axis.plot([r["length"] for r in line], [r["speedup"] for r in line], marker="o", label=f"{kind}, {dtype}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", ylabel="times as fast as the peer", title=part)
        axis.set_xticks([row["length"] for row in rows if row["part"] == part])
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    for ending in ("png", "svg"):
        figure.savefig(folder / f"flashcore.{ending}", dpi=120)


def main() -> None:
    """Run the chosen parts and write what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=20, help="alternated pairs per row")
    parser.add_argument("--quick", action="store_true", help="1K and 2K tokens only, three pairs")
    parser.add_argument("--lengths", nargs="+", type=int, help="these numbers of tokens instead of the usual ones")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    chosen = parser.parse_args()
    rows: list[Row] = []
    # Gradients are not wanted, and autograd would make some kernels keep what they need for them.
    with torch.no_grad():
        for part in chosen.parts:
            lengths = [n for n in chosen.lengths or LENGTHS[part] if not chosen.quick or n <= 2048]
            for row in tqdm(PARTS[part](lengths, 3 if chosen.quick else chosen.runs), desc=part, unit="row"):
                rows.append(row)
                tqdm.write(show(row))
    chosen.out.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(), "backends": available(), "rows": rows}
    (chosen.out / "flashcore.json").write_text(json.dumps(report, indent=1))
    plot(rows, chosen.out)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
