"""``longscope plan``: memory and time of a run before it starts, and what makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllm.config import Device
from longllm.recipe import Base, Data, Extension, source
from training.adapters import LoraSettings
from training.settings import Keeping, Optimisation

if TYPE_CHECKING:
    from longllm.planning import Advice, Memory, Setting, Sizes, Speed


def plan(
    *,
    model: str = "",
    length: int = 0,
    fits: str = "",
    device: Device = "auto",
    tflops: float = 0.0,
    calibrate: bool = False,
    inference: bool = False,
    ratio: float = 1.0,
    chunk: int = 1024,
    base: Base = Base(),  # noqa: B008
    extension: Extension = Extension(),  # noqa: B008
    data: Data = Data(),  # noqa: B008
    lora: LoraSettings = LoraSettings(),  # noqa: B008
    optimisation: Optimisation = Optimisation(),  # noqa: B008
    keeping: Keeping = Keeping(),  # noqa: B008
    out: str = "",
) -> Iterator[str | dict[str, Any]]:
    """Predict the memory and time of a training run before it starts, and say what makes it fit.

    It reads the same YAML files as ``longscope train longllm``, and builds no model:

        longscope plan --config longllm/recipes/smollm2-135m-32k.yaml
        longscope plan --model config.json --length 81920 --fits 80GB --device cuda --base.nf4 true
        longscope plan --model smollm2-135m-instruct --length 32768 --fits 4GB --inference

    With --fits it also tells the longest length that fits, and which settings make the wanted length fit at least cost
    in time. The memory of interpreter, libraries and CUDA context comes on top of what it tells.

    Args:
        model: instead of base.model: a catalog name, a folder, a config.json, or the JSON text of one
        length: instead of data.max_length: tokens of a row (of prompt and answer, with --inference)
        fits: memory there is, such as 24GB
        device: where it is to run; auto is the GPU if this machine has one
        tflops: speed in 10^12 floating-point operations a second, as training reaches it; 0 = measured where it is here
        calibrate: fit the speed to two steps of real training at small lengths, on this machine
        inference: plan reading and answering instead of training
        ratio: with --inference, tokens to one slot of a compressed cache
        chunk: with --inference, tokens of a prompt read at once
        base: the model that learns, and how it is held in memory
        extension: accepted, so that a recipe can be given as it is; costs nothing
        data: what is learned from; counts for length and number of steps
        lora: which weights learn
        optimisation: batch size, accumulation, number of steps
        keeping: accepted, so that a recipe can be given as it is
        out: accepted, so that a recipe can be given as it is
    """
    from beacon import parse_bytes
    from longllm.planning import Setting, read_sizes

    if length < 0 or tflops < 0:
        name, value = ("length", length) if length < 0 else ("tflops", tflops)
        raise ValueError(f"--{name} must be 0 or more, got {value}")
    base = replace(base, model=model or base.model)
    limit = parse_bytes(fits) if fits else 0
    sizes, place = read_sizes(base.model), _place(device)
    setting = Setting(
        length or data.max_length,
        base,
        lora,
        optimisation.batch_size,
        optimisation.accumulation,
        place,  # type: ignore[arg-type]
    )
    title = base.model if len(base.model) < 60 else f"a {sizes.kind} model"
    yield f"{title}: {sizes.parameters:,} weights; {setting.length:,} tokens, on {place}\n\n"
    if inference:
        yield from _inference(sizes, setting, ratio, chunk, limit)
        return
    yield from _training(sizes, setting, limit, _speed(setting, tflops, calibrate, optimisation), data, optimisation)


def _training(
    sizes: Sizes, setting: Setting, limit: int, speed: Speed | None, data: Data, optimisation: Optimisation
) -> Iterator[str | dict[str, Any]]:
    """Tell the plan of a training run."""
    from longllm.planning import advise, longest, roomiest, step_work, training_memory

    memory, work = training_memory(sizes, setting), step_work(sizes, setting)
    yield _table(memory)
    step = speed.seconds(work) if speed else None
    steps = _steps(data, optimisation)
    record: dict[str, Any] = {
        **_figures(sizes, setting, memory),
        "trainable": sizes.trainable(setting.lora),
        "operations": work.operations,
        "recomputed": work.recomputed,
        "speed": asdict(speed) if speed else None,
        "seconds_per_step": step,
        "steps": steps,
        "seconds": step * steps if step and steps else None,
    }
    yield f"\n{record['trainable']:,} weights learn; {work.operations / 1e12:,.2f} x 10^12 operations a step"
    if speed and step:
        yield f", {_duration(step)} ({speed.source}: {speed.per_second / 1e12:.3g} x 10^12 a second)"
        yield f"; {steps:,} steps: {_duration(step * steps)}" if steps else ""
    yield "\n"
    if limit:

        def holds(one: Setting, tokens: int) -> bool:
            return training_memory(sizes, replace(one, length=tokens)).peak <= limit

        far = roomiest(sizes, setting)
        found = advise(sizes, setting, limit)
        ends = longest(lambda tokens: holds(setting, tokens)), longest(lambda tokens: holds(far, tokens))
        record["fits"] = {"limit_bytes": limit, "longest": ends[0], "longest_with_all_settings": ends[1]}
        record["fits"] |= {"fits": found.fits, "time": found.time, "possible": found.setting is not None}
        record["fits"]["cheapest"] = " + ".join(change.words for change in found.changes)
        record["fits"] |= {kind: [asdict(one) for one in getattr(found, kind)] for kind in ("changes", "alone")}
        yield _advice(found, setting, limit, ends)
    yield record


def _inference(sizes: Sizes, setting: Setting, ratio: float, chunk: int, limit: int) -> Iterator[str | dict[str, Any]]:
    """Tell the plan of reading and answering."""
    from longllm.planning import advise_inference, inference_memory, longest

    options: dict[str, Any] = {"number": setting.number, "nf4": setting.base.nf4, "batch": setting.batch}
    options |= {"chunk": chunk, "ratio": ratio, "device": setting.device}

    def peak(tokens: int, **changes: Any) -> int:
        return inference_memory(sizes, tokens, **{**options, **changes}).peak

    memory = inference_memory(sizes, setting.length, **options)
    yield _table(memory)
    record: dict[str, Any] = {**_figures(sizes, setting, memory), "ratio": ratio, "chunk": chunk}
    if limit:
        end = longest(lambda tokens: peak(tokens) <= limit)
        words, changes = advise_inference(lambda **changes: peak(setting.length, **changes) <= limit, options)
        record["fits"] = {"limit_bytes": limit, "longest": end, "fits": memory.peak <= limit}
        record["fits"] |= {"cheapest": words, "changes": changes}
        yield f"\nlongest that fits in {_size(limit)}: {end:,} tokens\n"
        if memory.peak <= limit:
            yield f"{setting.length:,} tokens fit\n"
        else:
            yield f"{setting.length:,} tokens do not fit; " + (f"they do with {words}\n" if words else _NOTHING)
    yield record


_NOTHING = "no setting makes them fit: choose a smaller model or a larger machine\n"


def _place(device: Device) -> str:
    """Return cpu or cuda."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _speed(setting: Setting, tflops: float, calibrate: bool, optimisation: Optimisation) -> Speed | None:
    """Return the speed to reckon with: given, fitted or measured; None for a machine that is not here."""
    from longllm.planning import Speed, calibrated, measured_speed

    if tflops and calibrate:
        raise ValueError("--tflops and --calibrate exclude each other: give the speed or have it measured")
    if tflops:
        return Speed(tflops * 1e12)
    if calibrate:
        from longllm.train import Recipe

        if setting.device != _place("auto"):
            raise ValueError(f"--calibrate measures this machine, which has no {setting.device}: give --tflops")
        return calibrated(Recipe(setting.base, lora=setting.lora, optimisation=optimisation), setting)
    if setting.device == "cuda" and _place("auto") != "cuda":
        return None
    return measured_speed(setting.device, half=setting.number == 2)


def _steps(data: Data, optimisation: Optimisation) -> int:
    """Return the steps of the whole run; 0 if nobody can tell before the data is there."""
    if optimisation.max_steps:
        return optimisation.max_steps
    rows = 0
    for words in data.train:
        name, taken = source(words)
        file = Path(name).expanduser()
        if not taken and not file.is_file():
            return 0
        if file.is_file():
            with file.open("rb") as lines:
                there = sum(1 for line in lines if line.strip())
            taken = min(taken, there) if taken else there
        rows += taken
    per_step = optimisation.batch_size * optimisation.accumulation
    return optimisation.steps(-(-rows // per_step)) if rows else 0


def _figures(sizes: Sizes, setting: Setting, memory: Memory) -> dict[str, Any]:
    """Return the memory part of the record."""
    return {
        "model": setting.base.model,
        "device": setting.device,
        "parameters": sizes.parameters,
        "length": setting.length,
        "batch": setting.batch,
        "peak_bytes": memory.peak,
        "worst": memory.worst,
        "parts": memory.parts,
        "moments": {moment: memory.total(moment) for moment in memory.moments},
        "host_bytes": memory.host,
    }


def _table(memory: Memory) -> str:
    """Return the parts at the worst moment, and the other moments, as lines."""
    rows = [*memory.parts.items(), (f"peak ({memory.worst})", memory.peak)]
    width = max(len(part) for part, _ in rows)
    lines = [f"  {part:<{width}}  {_size(size):>9}" for part, size in rows]
    lines.insert(-1, "  " + "-" * (width + 11))
    others = [f"{moment} {_size(memory.total(moment))}" for moment in memory.moments if moment != memory.worst]
    told = [f"other moments: {', '.join(others)}"] if others else []
    if memory.host:
        told.append(f"in the host's memory: {_size(memory.host)} of layer inputs")
    return "\n".join([*lines, *told]) + "\n"


def _advice(found: Advice, setting: Setting, limit: int, ends: tuple[int, int]) -> str:
    """Return what fits, and what makes the wanted length fit, as lines."""
    lines = [
        f"\nlongest that fits in {_size(limit)}: {ends[0]:,} tokens as it is, {ends[1]:,} with every setting below"
    ]
    if found.fits:
        lines.append(f"{setting.length:,} tokens fit")
    elif found.setting is None:
        lines.append(f"{setting.length:,} tokens do not fit, and " + _NOTHING.rstrip())
    else:
        lines.append(f"{setting.length:,} tokens do not fit; cheapest way to make them, {_times(found.time)}:")
        for number, change in enumerate(found.changes, 1):
            lines.append(f"  {number}. {_told(change)}")
    if found.alone:
        lines += ["what each setting does alone, cheapest first:", *(f"  - {_told(one)}" for one in found.alone)]
    return "\n".join(lines) + "\n"


def _told(change: Any) -> str:
    """Return one change as a line."""
    learned = ", learns less" if change.alters else ""
    options = " ".join(f"--{option}" for option in change.options)
    return f"{change.words}: {_size(-change.nbytes)} less, {_times(change.time)}{learned}  ({options})"


def _times(time: float) -> str:
    """Return how much longer a step takes."""
    return f"{time:.2f} x the time"


def _size(nbytes: float) -> str:
    """Return bytes for people, in decimal units."""
    return f"{nbytes / 1e9:,.2f} GB" if abs(nbytes) >= 1e8 else f"{nbytes / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
