"""Extending a model's context by (Q)LoRA: from a recipe to an adapter folder that restores its own RoPE settings.

The recipe of "Extending Llama-3's Context Ten-Fold Overnight" (arXiv 2404.19553): raise the RoPE base, train LoRA (and,
at choice, the embeddings) on long question answering. Position-skipping training (arXiv 2309.10400) makes it fit
machines that cannot hold the long samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import catalog
from longllm.batches import NATURAL, CausalLoss, Collator, batch_loss, headless
from longllm.context import Context, context_from
from longllm.loading import load
from longllm.recipe import Base, Data, Extension, source
from longllm.samples import Samples, load_samples
from training import (
    Keeping,
    LoraSettings,
    Optimisation,
    Order,
    Outcome,
    Processes,
    add_lora,
    checkpoint,
    model_card,
    run_record,
    train,
)
from training.adapters import recompute
from training.loop import claim
from training.processes import whole
from training.record import plain, write_record


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

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, before anything is loaded."""
        base, whole_model = self.base, not self.lora.rank
        if whole_model and base.nf4:
            raise ValueError("lora.rank 0 lets every weight learn, which base.nf4 cannot: choose a rank, or nf4 off")
        if whole_model and base.dtype in ("bf16", "fp16"):
            raise ValueError(
                f"lora.rank 0 lets every weight learn, for which base.dtype must be fp32, got {base.dtype}: small "
                "updates would be rounded away"
            )
        if self.data.pack and self.optimisation.batch_size > 1:
            raise ValueError(
                f"optimisation.batch_size must be 1 with data.pack, got {self.optimisation.batch_size}: a packed row "
                "is a batch by itself; raise optimisation.accumulation instead"
            )
        if self.data.pack and self.extension.log_origin:
            raise ValueError(
                "data.pack and extension.log_origin exclude each other: the keys of all packed rows would be counted"
            )
        self.keeping.check(self.data.evaluate)


def extend_context(recipe: Recipe, out: Path, *, progress: bool = False) -> dict[str, Any]:
    """Train as the recipe says; write the adapter to ``out/adapter``; return what was done, as JSON values.

    ``out`` also gets run.json (resolved settings, versions, data hashes), metrics.jsonl and checkpoints. The same call
    goes on from the last checkpoint if it was interrupted. With rank 0, without an adapter, ``out/adapter`` is a whole
    model.

    Raises:
        ValueError: a setting, a row or a model that does not fit, or another run's folder.
        ImportError: peft, accelerate or bitsandbytes is missing.
        OSError: something cannot be read or written.
    """
    if not recipe.data.train:
        raise ValueError("data.train must name at least one file of training rows (see longscope synth --help)")
    processes = Processes.started()
    progress = progress and processes.leads
    context = _context(recipe)
    if processes.sharing > 1 and recipe.base.attention != "sdpa":
        raise ValueError(f"context parallelism needs base.attention sdpa, got {recipe.base.attention}")
    # In turn: the first process downloads, tokenises and writes what the others then find.
    with processes.in_turn():
        loaded = load(
            recipe.base.model,
            dtype="fp32" if recipe.base.dtype == "auto" and not recipe.lora.rank else recipe.base.dtype,
            attention=recipe.base.attention,
            device=processes.place,  # type: ignore[arg-type]
            context=context,
            quantised=recipe.base.nf4,
        )
        samples = _samples(loaded.tokenizer, recipe, recipe.data.train, out, progress)
        # An evaluation asks for the same rows whatever is trained on, so nothing of them is packed or drawn.
        judging = recipe.data.evaluate
        held_out = _samples(loaded.tokenizer, recipe, judging, out, progress) if judging else None
    model: Any = _prepared(loaded.model, recipe)
    context.check(model)
    options = {
        "pad_id": loaded.tokenizer.pad_token_id or 0,
        "device": loaded.device,
        "spread": recipe.data.spread,
        # torch gives each process a piece from both ends of the row.
        "multiple": 2 * processes.sharing if processes.sharing > 1 else 1,
    }
    collator = Collator.of(samples, room=recipe.data.max_length if recipe.data.pack else 0, **options)
    order = _order(recipe, collator.lengths, processes)
    record, identity = _record(recipe, context, samples)
    claim(out, recipe.keeping, identity, recipe.optimisation.steps(order.steps_per_epoch), processes.readers)
    if processes.leads:
        write_record(out / "run.json", record)
    with headless(model, recipe.base.head_chunk) as loss:
        outcome = train(
            model,
            collator,
            loss,
            order,
            out=out,
            optimisation=recipe.optimisation,
            keeping=recipe.keeping,
            evaluate=_evaluation(loss, held_out, recipe, options) if held_out else None,
            identity=identity,
            processes=processes,
            progress=progress,
        )
    facts = _facts(recipe, context, samples, outcome, model)
    state = _gathered(model)
    if processes.leads:
        facts["adapter"] = str(out / "adapter")
        save_adapter(model, context, out / "adapter", facts, loaded.tokenizer, state)
        write_record(out / "run.json", {**record, "outcome": facts})
    processes.wait()
    return facts


def save_adapter(
    model: Any, context: Context, folder: Path, facts: Mapping[str, Any], tokenizer: Any, state: Any = None
) -> Path:
    """Write adapter (or whole model), context and card as a whole folder or not at all; return the folder.

    Args:
        model: wrapped by peft, or a whole model, which gets its tokeniser beside it.
        context: what it was trained for.
        folder: to write; what is there is replaced.
        facts: for the card.
        tokenizer: the model's.
        state: the weights by name, where the model's own are sharded; None = as they are.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    with checkpoint.whole_folder(folder, "the adapter") as partial:
        if hasattr(model, "peft_config"):
            model.save_pretrained(partial, save_embedding_layers=False, state_dict=state)
        else:
            model.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)
        _name_base(partial / "adapter_config.json", context.base)
        context.save(partial)
        (partial / "README.md").write_text(_card(context, facts), encoding="utf-8")
        (partial / "facts.json").write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
    return folder


def _prepared(model: Any, recipe: Recipe) -> Any:
    """Return the model with its adapter, if it gets one, and activation checkpointing as the recipe has it."""
    if recipe.lora.rank:
        model = add_lora(model, recipe.lora)
    else:
        model.requires_grad_(True)
    if recipe.base.recompute != "off":
        recompute(model, offload=recipe.base.recompute == "offload", every=recipe.base.recompute_every)
    return model


def _order(recipe: Recipe, lengths: list[int], processes: Processes) -> Order:
    """Return which rows make up which step."""
    settings = recipe.optimisation
    sizes = (settings.batch_size, settings.accumulation, settings.seed, processes.readers)
    return Order(len(lengths), *sizes, lengths if settings.group_by_length else None)


def _record(recipe: Recipe, context: Context, samples: Samples) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record of the run, and what of it must be the same when it is resumed."""
    files = [source(words)[0] for words in (*recipe.data.train, *recipe.data.evaluate)]
    record = run_record({**plain(recipe), "context": plain(context)}, files)
    record["rows"] = samples.report
    # Anything may change but how often something is logged or kept.
    own = {name: value for name, value in plain(recipe).items() if name != "keeping"}
    return record, {"recipe": own, "data": record["data"]}


def _gathered(model: Any) -> dict[str, Any] | None:
    """Return whole weights by name if FSDP shards the model's own, else None; all processes call this together."""
    state = model.state_dict()
    if not any(hasattr(weight, "full_tensor") for weight in state.values()):
        return None
    learning = checkpoint.trainable(model) if hasattr(model, "peft_config") else state
    return {name: whole(state[name]) for name in learning}


def _context(recipe: Recipe) -> Context:
    """Return the RoPE settings that the recipe trains under."""
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
    return dataclasses.replace(context, trained=True, log_origin=wanted.log_origin)


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


def _evaluation(loss: CausalLoss, held_out: Samples, recipe: Recipe, options: Mapping[str, Any]) -> Any:
    """Return the evaluation on held-out rows: at spread positions as trained, and at their natural ones."""
    spread, natural = Collator(held_out, **options), Collator(held_out, **{**options, "spread": NATURAL})

    def evaluate(model: Any) -> dict[str, float]:
        rows = range(len(held_out))
        found = {"loss": batch_loss(loss, model, (spread([row], [f"evaluate/{row}"]) for row in rows))}
        if recipe.data.spread.length:
            found["natural_loss"] = batch_loss(loss, model, (natural([row], [""]) for row in rows))
        return found

    return evaluate


def _facts(recipe: Recipe, context: Context, samples: Samples, outcome: Outcome, model: Any) -> dict[str, Any]:
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
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
        "best": outcome.best,
        "stopped": outcome.stopped,
        "finished": outcome.finished,
        "seconds": outcome.seconds,
    }


def _name_base(path: Path, base: str) -> None:
    """Let the adapter's own file name the base model as the recipe did, not by a folder of this machine."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**settings, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")


def _card(context: Context, facts: Mapping[str, Any]) -> str:
    """Return the adapter's card."""
    best, loss = facts.get("best") or {}, facts["loss"]
    told = {
        "base model": f"`{context.base}`",
        "context": f"{context.max_position_embeddings:,} tokens; RoPE {dict(context.rope_parameters)}, restored from "
        "`context.json` when the adapter is loaded",
        "data": f"{facts['rows']:,} rows, {facts['tokens']:,} tokens",
        "training": f"{facts['steps']:,} of {facts['planned']:,} steps"
        + (f"; loss {loss:.4f}" if loss is not None else "")
        + (f"; best held-out {best}" if best else ""),
        "use": "`longscope chat --model FOLDER`, `longllm.load(FOLDER)`",
    }
    title = f"{context.base}, extended to {context.max_position_embeddings:,} tokens"
    return model_card(title, "Its context was extended by `longscope train longllm`.", facts=told)
