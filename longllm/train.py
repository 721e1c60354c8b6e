"""Extending a model's context by (Q)LoRA: from a recipe to an adapter folder that restores its own RoPE settings.

The recipe of "Extending Llama-3's Context Ten-Fold Overnight" (arXiv 2404.19553): raise the RoPE base, train LoRA (and,
at choice, the embeddings) on long question answering. Position-skipping training (arXiv 2309.10400) makes it fit
machines that cannot hold the long samples.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import catalog
from longllm.batches import CausalLoss, Collator, batch_loss, headless
from longllm.context import Context, context_from
from longllm.loading import load
from longllm.recipe import Base, Data, Extension
from longllm.samples import Samples, load_samples
from training import Keeping, LoraSettings, Optimisation, Order, Outcome, add_lora, model_card, run_record, train
from training.record import plain, write_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of.

    >>> Recipe().base.model
    'smollm2-135m-instruct'
    """

    base: Base = field(default_factory=Base)
    extension: Extension = field(default_factory=Extension)
    data: Data = field(default_factory=Data)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimisation: Optimisation = field(default_factory=Optimisation)
    keeping: Keeping = field(default_factory=Keeping)


def extend_context(recipe: Recipe, out: Path, *, progress: bool = False) -> dict[str, Any]:
    """Train as the recipe says; write the adapter to ``out/adapter``; return what was done, as JSON values.

    ``out`` also gets run.json (resolved settings, versions, data hashes), metrics.jsonl and checkpoints. The same call
    goes on from the last checkpoint if it was interrupted.

    Raises:
        ValueError: a setting, a row or a model that does not fit, or another run's folder.
        ImportError: peft, accelerate or bitsandbytes is missing.
        OSError: something cannot be read or written.
    """
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    context = _context(recipe)
    accelerator = _accelerator(recipe.optimisation)
    loaded = load(
        recipe.base.model,
        dtype=recipe.base.dtype,
        attention=recipe.base.attention,
        context=context,
        quantised=recipe.base.nf4,
    )
    samples = _samples(loaded.tokenizer, recipe, recipe.data.train, out, progress)
    # An evaluation asks for the same rows whatever is trained on, so nothing of them is packed or drawn.
    held_out = _samples(loaded.tokenizer, recipe, recipe.data.evaluate, out, progress) if recipe.data.evaluate else None
    model: Any = loaded.model
    _recompute(model, recipe.base)
    if recipe.lora.rank:
        model = add_lora(model, recipe.lora, checkpointing=recipe.base.recompute != "off")
    context.check(model)
    room = recipe.data.max_length if recipe.data.pack else 0
    options = {"pad_id": loaded.tokenizer.pad_token_id or 0, "device": loaded.device}
    collator = Collator.of(samples, room=room, spread=recipe.data.spread, **options)
    settings = recipe.optimisation
    order = Order(
        len(collator.lengths),
        settings.batch_size,
        settings.accumulation,
        settings.seed,
        accelerator.num_processes if accelerator else 1,
        collator.lengths if settings.group_by_length else None,
    )
    files = [path for path, _ in recipe.data.sources]
    record = run_record({**plain(recipe), "context": plain(context)}, [*files, *recipe.data.evaluate])
    record["rows"] = samples.report
    write_record(out / "run.json", record)
    identity = {"recipe": _identity(recipe), "data": record["data"]}
    with headless(model, recipe.base.head_chunk) as loss:
        outcome = train(
            model,
            collator,
            loss,
            order,
            out=out,
            optimisation=settings,
            keeping=recipe.keeping,
            evaluate=_evaluation(loss, held_out, recipe, options) if held_out else None,
            identity=identity,
            accelerator=accelerator,
            progress=progress,
        )
    facts = _facts(recipe, context, samples, outcome, model, time.monotonic() - begun)
    if accelerator is None or accelerator.is_main_process:
        facts["adapter"] = str(save_adapter(model, context, out / "adapter", facts))
        write_record(out / "run.json", {**record, "outcome": facts})
    return facts


def save_adapter(model: Any, context: Context, folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write adapter, context and card as a whole folder or not at all; return the folder."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial, save_embedding_layers=False) if hasattr(
            model, "peft_config"
        ) else model.save_pretrained(partial)
        _name_base(partial / "adapter_config.json", context.base)
        context.save(partial)
        (partial / "README.md").write_text(_card(context, facts), encoding="utf-8")
        (partial / "facts.json").write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the adapter could not be written to {folder} ({error}); nothing is lost: make room and run the same "
            "command again, it goes on from the last checkpoint"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def _context(recipe: Recipe) -> Context:
    """Return the RoPE settings that the recipe trains under."""
    import dataclasses

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(catalog.path(recipe.base.model))
    wanted = recipe.extension
    length = wanted.length or int(config.get_text_config(decoder=True).max_position_embeddings)
    context = context_from(
        config, wanted.rope, length=length, theta=wanted.theta, factor=wanted.factor, base=recipe.base.model
    )
    reach = max(recipe.data.spread.length, recipe.data.max_length)
    if reach > length:
        raise ValueError(
            f"the data reaches position {reach:,}, but extension.length is {length:,}: raise it, or lower "
            "data.max_length or data.spread.length"
        )
    return dataclasses.replace(context, trained=True)


def _samples(tokenizer: Any, recipe: Recipe, files: tuple[str, ...], out: Path, progress: bool) -> Samples:
    """Tokenise the rows of some files, or map what an earlier run has tokenised."""
    data = recipe.data
    return load_samples(
        tokenizer,
        files,
        max_length=data.max_length,
        min_length=data.min_length,
        seed=data.seed,
        cache=out / "tokens",
        progress=progress,
    )


def _recompute(model: Any, base: Base) -> None:
    """Switch activation checkpointing on, as transformers has it."""
    if base.recompute == "off":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if base.recompute == "offload":
        options["offload"] = True
    if base.recompute_every > 1:
        options["every_n_layers"] = base.recompute_every
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _accelerator(settings: Optimisation) -> Any:
    """Return accelerate's view of this process if it was started as one of several, else None."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("training in several processes needs accelerate: pip install 'longscope[train]'") from error
    return Accelerator(gradient_accumulation_steps=1)


def _evaluation(loss: CausalLoss, held_out: Samples, recipe: Recipe, options: Mapping[str, Any]) -> Any:
    """Return the evaluation on held-out rows: at spread positions as trained, and at their natural ones."""
    spread = Collator(held_out, recipe.data.spread, **options)
    natural = Collator(held_out, **options)

    def evaluate(model: Any) -> dict[str, float]:
        rows = range(len(held_out))
        found = {"loss": batch_loss(loss, model, [spread([row], f"evaluate/{row}") for row in rows])}
        if recipe.data.spread.length:
            found["natural_loss"] = batch_loss(loss, model, [natural([row], "") for row in rows])
        return found

    return evaluate


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Return what must be the same when a run is resumed: all but how often something is logged or kept."""
    return {name: value for name, value in plain(recipe).items() if name != "keeping"}


def _facts(
    recipe: Recipe, context: Context, samples: Samples, outcome: Outcome, model: Any, seconds: float
) -> dict[str, Any]:
    """Return what a run did, as JSON values."""
    weights = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {
        "base": recipe.base.model,
        "length": context.max_position_embeddings,
        "rope": dict(context.rope_parameters),
        "trainable": weights,
        "rows": len(samples),
        "tokens": int(samples.offsets[-1]),
        "steps": outcome.steps,
        "planned": outcome.planned,
        "resumed": outcome.resumed,
        "loss": outcome.loss,
        "best": outcome.best,
        "stopped": outcome.stopped,
        "finished": outcome.finished,
        "seconds": seconds,
    }


def _name_base(path: Path, base: str) -> None:
    """Let the adapter's own file name the base model as the recipe did, not by a folder of this machine."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**settings, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")


def _card(context: Context, facts: Mapping[str, Any]) -> str:
    """Return the adapter's card."""
    best = facts.get("best") or {}
    told = {
        "base model": f"`{context.base}`",
        "context": f"{context.max_position_embeddings:,} tokens; RoPE {dict(context.rope_parameters)}, restored from "
        "`context.json` when the adapter is loaded",
        "data": f"{facts['rows']:,} rows, {facts['tokens']:,} tokens",
        "training": f"{facts['steps']:,} steps; loss {facts['loss']:.4f}"
        + (f"; best held-out {best} " if best else ""),
        "use": "`longscope chat --model FOLDER`, `longllm.load(FOLDER)`",
    }
    title = f"{context.base}, extended to {context.max_position_embeddings:,} tokens"
    return model_card(title, "A context-extension adapter, trained by `longscope train longllm`.", facts=told)
