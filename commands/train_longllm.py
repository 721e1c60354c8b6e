"""``longscope train longllm``: extend a model's context by LoRA or QLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands.trained import trained
from longllm.recipe import Base, Data, Extension
from training.adapters import LoraSettings
from training.settings import Keeping, Optimisation


def train_longllm(
    *,
    out: str,
    base: Base = Base(),  # noqa: B008
    extension: Extension = Extension(),  # noqa: B008
    data: Data = Data(),  # noqa: B008
    lora: LoraSettings = LoraSettings(),  # noqa: B008
    optimisation: Optimisation = Optimisation(),  # noqa: B008
    keeping: Keeping = Keeping(),  # noqa: B008
) -> Iterator[str | dict[str, Any]]:
    """Extend a model's context: raise its RoPE base and train an adapter on long question answering.

    The settings come from a YAML file, and the command line overrides them:

        longscope train longllm --config longllm/recipes/smollm2-135m-32k.yaml --out out/smollm2-32k
        longscope train longllm --config longllm/recipes/llama-3-8b-80k.yaml --out out/llama-80k
        accelerate launch --num_processes 8 -m longscope train longllm --config ... --out out/llama-80k

    The result is out/adapter: an adapter with its RoPE settings, which ``longscope chat``, ``ask``, ``eval`` and
    ``merge`` take as --model. A run that was interrupted goes on when the same command is given again.

    Args:
        out: folder of the run: adapter, metrics, checkpoints, record
        base: the model that learns, and how it is held in memory
        extension: the RoPE settings it is trained under
        data: what it learns from
        lora: which weights learn
        optimisation: learning rate, schedule, size and number of steps
        keeping: when to log, evaluate and save, when to stop early
    """
    folder = Path(out).expanduser()
    from longllm.train import Recipe, extend_context

    recipe = Recipe(base, extension, data, lora, optimisation, keeping)
    yield from trained(f"{base.model} in {folder}", lambda: extend_context(recipe, folder, progress=True), "adapter")
