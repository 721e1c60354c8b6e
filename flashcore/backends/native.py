"""A kernel in C for CPUs, compiled for this very processor on first use: forward only, fp32 and bf16.

torch's own CPU kernel leaves much of the machine idle: grouped heads are expanded, few queries use one core, and bf16
products are slower than fp32 ones where the processor's bf16 units are slow. ``flashcore/native`` holds the source;
this module builds, loads and calls it.
"""

from __future__ import annotations

import array
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from ..checks import wants_gradients
from ..spec import AttentionSpec
from ..varlen import segments

SOURCES = Path(__file__).parent.parent / "native"
FLAGS = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
#: How compilers are told to use all this processor has: x86 and newer ARM compilers, other ARM compilers.
TARGETS = ("-march=native", "-mcpu=native")
INSTALL = "install a C compiler (for instance `apt install gcc`) or choose backend='sdpa'"
#: Kinds of numbers in tile.h: fp32, bf16 widened to fp32, bf16 multiplied in pairs.
FP32, BF16, PAIRS = 0, 1, 2
#: ``Call`` in attention.c. One packed record costs far less than two dozen ctypes arguments.
RECORD = struct.Struct("6Q11q12q2d")
#: What ``flashcore_attention`` returns when it has computed nothing.
NO_MEMORY, OUTSIDE = 1, 2

_building = threading.Lock()


def available() -> str | None:
    """Return None if the kernel can be used here, else why not. Builds it if nobody has yet (about 3 s, once)."""
    if os.environ.get("LONGSCOPE_NATIVE") == "0":
        return "switched off by LONGSCOPE_NATIVE=0"
    with _building:
        loaded = _load()
    return loaded if isinstance(loaded, str) else None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Compute attention with the compiled kernel.

    Args and result as in ``backends.reference.attend``, but nothing is differentiable.

    Raises:
        NotImplementedError: for what the kernel lacks: index-function masks, other devices, dtypes and value sizes.
        ImportError: if it cannot be built here.
    """
    if wants_gradients(q, k, v):
        raise NotImplementedError("the native backend has no backward pass; use backend='sdpa'")
    return _call(q, k, v, spec, None)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``attend`` returns and the natural log-sum-exp of the scaled, capped scores.

    Returns:
        out [batch, heads, n, d]; lse [batch, heads, n] fp32, -inf for rows that see nothing.
    """
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    return _call(q, k, v, spec, lse), lse


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, lse: torch.Tensor | None
) -> torch.Tensor:
    dtype = q.dtype
    if spec.mask is not None:
        raise NotImplementedError("the native backend has no index-function masks; use backend='sdpa'")
    if not q.is_cpu:
        raise NotImplementedError(f"the native backend runs on CPUs, received tensors on {q.device}")
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        raise NotImplementedError(f"the native backend computes fp32 and bf16, received {dtype}")
    shape, key_shape, value_shape = q.shape, k.shape, v.shape
    (batch, heads, n, d), (_, kv_heads, m, _) = shape, key_shape
    if value_shape[3] != d:
        raise NotImplementedError(f"the native backend needs values of {d} numbers, received {value_shape[3]}")
    # The C code trusts these: a mismatch that slips past ``checks`` must not become a read outside the tensors.
    if key_shape != value_shape or key_shape[3] != d or key_shape[0] != batch or heads % kv_heads:
        raise ValueError(f"q, k, v do not fit together: {list(shape)}, {list(key_shape)}, {list(value_shape)}")
    if k.dtype is not dtype or v.dtype is not dtype or not (k.is_cpu and v.is_cpu):
        raise TypeError(f"q, k, v must share dtype and device, received {dtype}, {k.dtype}, {v.dtype}")
    attention = _attention()
    q, q_step = _rows(q)
    k, k_step = _rows(k)
    v, v_step = _rows(v)
    # The layout of q is kept: what comes out of a transposed view goes back into one without a copy.
    out = torch.empty_like(q)
    out_step = out.stride()
    if out_step[3] != 1:
        out = q.new_empty(shape)
        out_step = out.stride()
    if out.numel() == 0:
        return out
    where, count, parts = 0, 0, None
    if spec.lengths is not None or spec.cu_seqlens is not None:
        parts = array.array("q", [number for part in segments(spec, batch, n, m) or () for number in part])
        where, count = parts.buffer_info()[0], len(parts) // 5
        out.zero_()
    left, right = spec.limits()
    record = RECORD.pack(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), where),
        *(count, batch, heads, kv_heads, n, m, d),
        FP32 if dtype is torch.float32 else _half_kind() if d % 2 == 0 else BF16,
        torch.get_num_threads(),
        -1 if left is None else left,
        -1 if right is None else right,
        *(*q_step[:3], *k_step[:3], *v_step[:3], *out_step[:3]),
        spec.resolved_scale(d),
        spec.softcap or 0.0,
    )
    outcome = attention(record)
    if outcome == NO_MEMORY:
        raise MemoryError(f"no memory to pack {m} keys of {kv_heads} heads; use backend='sdpa'")
    if outcome == OUTSIDE:
        raise ValueError(f"lengths reach outside the tensors, which have {n} queries and {m} keys: {list(parts or ())}")
    return out


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return ``x`` with contiguous rows, and its strides."""
    step = x.stride()
    if step[3] != 1:
        x = x.contiguous()
        step = x.stride()
    return x, step


def _attention() -> ctypes._NamedFuncPointer:
    loaded = _load()
    if isinstance(loaded, str):
        raise ImportError(f"the native backend is not usable here: {loaded}; {INSTALL}")
    return loaded.flashcore_attention


@functools.cache
def _half_kind() -> int:
    """Return how to multiply bf16: LONGSCOPE_NATIVE_DOT (fma or bf16), else whichever a short trial shows faster."""
    library = _load()
    pairs = 0 if isinstance(library, str) else library.flashcore_pairs_speedup()
    wanted = os.environ.get("LONGSCOPE_NATIVE_DOT", "")
    if wanted not in ("", "fma", "bf16"):
        raise ValueError(f"LONGSCOPE_NATIVE_DOT must be fma or bf16, received {wanted!r}")
    if wanted == "bf16" and not pairs:
        raise ValueError("LONGSCOPE_NATIVE_DOT=bf16, but this processor has no AVX512-BF16; unset it or use fma")
    # Pairs round the weights to bf16 as well, so a small gain is not worth them.
    return PAIRS if wanted == "bf16" or (not wanted and pairs > 1.2) else BF16


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Return the library, built if this source, compiler and processor have no build in the cache; or why not."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return "no C compiler found (cc, gcc or clang)"
    if os.environ.get("LONGSCOPE_NATIVE") == "0":
        return "switched off by LONGSCOPE_NATIVE=0"
    try:
        file = _folder() / f"attention-{_fingerprint(compiler)}.so"
        if file.exists():
            return _open(file)
        with tempfile.TemporaryDirectory(prefix="longscope-native-") as scratch:
            built = _compile(compiler, Path(scratch))
            return _open(_install(built, file))
    except (OSError, subprocess.SubprocessError) as error:
        return str(error).strip().splitlines()[-1]


def _open(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    library.flashcore_attention.argtypes = [ctypes.c_char_p]
    library.flashcore_attention.restype = ctypes.c_int
    library.flashcore_pairs_speedup.restype = ctypes.c_double
    return library


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LONGSCOPE_HOME") or os.path.join(base, "longscope")).expanduser() / "native"


def _sources() -> list[Path]:
    return sorted(file for file in SOURCES.iterdir() if file.suffix in (".c", ".h"))


def _fingerprint(compiler: str) -> str:
    """Hash all that decides whether a build may run here: a home folder can be mounted on unlike machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, " ".join(FLAGS + TARGETS), _processor(), os.path.basename(_openmp() or "")]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in _sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Return the processor's model and instruction sets."""
    told = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    lines = [line for line in first.splitlines() if line.startswith(told)]
    return "\n".join([platform.machine(), platform.processor(), platform.system(), *lines])


def _openmp() -> str | None:
    """Return the file of the OpenMP runtime torch has loaded: a second one would fight it for the cores."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return None
    runtimes = sorted(path for path in mapped if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")))
    torch_home = os.path.dirname(torch.__file__)
    return next((path for path in runtimes if path.startswith(torch_home)), runtimes[0] if runtimes else None)


def _compile(compiler: str, scratch: Path) -> Path:
    """Compile into ``scratch``: with OpenMP if it can be had, and for this processor if the compiler knows how."""
    runtime = _openmp()
    error = ""
    for openmp in ([("-fopenmp", runtime)] if runtime else []) + [("-fno-openmp", None)]:
        for target in TARGETS:
            piece, library = str(scratch / "attention.o"), scratch / "attention.so"
            source = str(SOURCES / "attention.c")
            steps = (
                [compiler, *FLAGS, target, openmp[0], "-c", source, "-o", piece],
                # Linked by its path and not by -fopenmp, which would bring the compiler's own runtime.
                [compiler, "-shared", piece, *filter(None, openmp[1:]), "-lm", "-o", str(library)],
            )
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True, timeout=120, check=False)
                if done.returncode:
                    error = error or next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
                    break
            else:
                return library
    raise OSError(f"{compiler} could not compile {source}: {error.strip()}")


def _install(built: Path, file: Path) -> Path:
    """Move a build into the cache whole; where the cache cannot be written the build is loaded from where it is."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        shutil.copy(built, partial)
        os.replace(partial, file)
    except OSError:
        return built
    return file
