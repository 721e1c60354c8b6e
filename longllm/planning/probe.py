"""Real training steps at small lengths, by the code that trains: what a plan is calibrated with and checked against."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from longllm.planning.memory import Setting
from longllm.planning.sizes import read_sizes
from longllm.planning.work import Speed, step_work
from longllm.positions import Spread
from training.settings import Keeping

if TYPE_CHECKING:
    from longllm.train import Recipe

#: lengths of the two steps that a machine's speed is fitted to
SHORT, LONG = 128, 384
#: of a matrix product's speed, what a whole training step is expected to reach
EFFICIENCY = 0.5


def probe(recipe: Recipe, length: int, steps: int = 1) -> list[float]:
    """Make a few steps of a run on rows of exactly ``length`` tokens; return the seconds of each.

    The model is loaded and trained as the recipe says, in a folder that is deleted afterwards.

    Raises:
        ValueError, OSError, ImportError: as ``longllm.train.extend_context``.
    """
    from longllm.train import extend_context

    rows = recipe.optimisation.batch_size * recipe.optimisation.accumulation
    with tempfile.TemporaryDirectory(prefix="longscope-probe-") as scratch:
        file = Path(scratch) / "rows.jsonl"
        # At least one token a number; what is too long is cut.
        text = " ".join(str(number % 1000) for number in range(length))
        file.write_text((json.dumps({"text": text}) + "\n") * rows, encoding="utf-8")
        data = replace(
            recipe.data, train=(str(file),), evaluate=(), max_length=length, min_length=0, pack=False, spread=Spread()
        )
        optimisation = replace(recipe.optimisation, max_steps=steps)
        keeping = Keeping(log_every=1, save_every=0)
        trial = replace(recipe, data=data, optimisation=optimisation, keeping=keeping)
        extend_context(trial, Path(scratch) / "run")
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["seconds_per_step"] for line in map(json.loads, lines) if "seconds_per_step" in line]


def calibrated(recipe: Recipe, setting: Setting) -> Speed:
    """Return the speed of this machine in a run, from two probe steps at small lengths.

    Raises:
        ValueError, OSError, ImportError: as ``probe``.
    """
    sizes = read_sizes(recipe.base.model)
    # The first step of a process is slower than those that follow.
    short, long = (
        (step_work(sizes, replace(setting, length=length)), min(probe(recipe, length, 2))) for length in (SHORT, LONG)
    )
    return Speed.fitted(short, long)


def measured_speed(device: str, half: bool, seconds: float = 0.3) -> Speed:
    """Return how fast this machine multiplies matrices, at half of which it is expected to train.

    Args:
        device: cpu or cuda.
        half: measure in bf16 instead of fp32.
        seconds: to measure for.

    Raises:
        ValueError: the device is not here.

    >>> measured_speed("cpu", half=False, seconds=0.01).per_second > 1e6
    True
    """
    import time

    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here to measure: give its speed, or plan without times")
    size = 1024 if device == "cpu" else 8192
    left = torch.ones(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    right, best = left.clone(), float("inf")
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or best == float("inf"):
        start = time.perf_counter()
        product = left @ right
        # Reading one number waits for the device.
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return Speed(EFFICIENCY * 2 * size**3 / best, 0.0, "a matrix product, of which training reaches about half")
