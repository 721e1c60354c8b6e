"""The one training loop. Loss, batches and evaluation are arguments; new recipes are new arguments, not new loops."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training import checkpoint
from training.order import Order
from training.processes import Processes, whole
from training.settings import Keeping, Optimisation

#: a batch: what the loss takes, and under "weight" how many targets it has (tokens, rows …)
Batch = Mapping[str, Any]
#: (model, batch) -> the loss SUMMED over the batch's targets, or several parts of that sum, one after the other, each
#: of which is back-propagated before the next is asked for, so that only one graph is alive
Loss = Callable[[Any, Batch], "torch.Tensor | Iterator[torch.Tensor]"]
#: model -> figures of an evaluation
Evaluation = Callable[[Any], Mapping[str, float]]
#: (indices of rows, for each a seed of whatever is drawn for it) -> batch
Collate = Callable[[Sequence[int], Sequence[str]], Batch]


@dataclass
class Outcome:
    """What a run did.

    >>> Outcome(steps=40, planned=400, resumed=0, loss=1.2, stopped="minutes").finished
    False
    """

    steps: int
    """steps done in all, those before a resume included"""
    planned: int
    """steps the settings ask for"""
    resumed: int
    """step it went on from; 0 = from the beginning"""
    loss: float
    """mean training loss per target over the last logged steps; nan if none was made"""
    best: dict[str, float] = field(default_factory=dict)
    """figures of the best evaluation, with its ``step``"""
    seconds: float = 0.0
    """of training in all, those before a resume included"""
    stopped: str = ""
    """why it ended before its time: patience or minutes"""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.steps >= self.planned or self.stopped == "patience"


def train(
    model: torch.nn.Module,
    collate: Collate,
    loss: Loss,
    order: Order,
    *,
    out: Path,
    optimisation: Optimisation,
    keeping: Keeping,
    evaluate: Evaluation | None = None,
    identity: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    progress: bool = False,
) -> Outcome:
    """Train the parameters of ``model`` that ask for gradients; leave the best of them in the model.

    A step's gradient is that of the loss per target over all its rows, however they are split into passes and
    processes. ``out`` gets metrics.jsonl, checkpoints/ and best/; a run that was killed goes on from its last
    checkpoint and ends with the same weights as one that was not.

    Args:
        model: its trainable parameters should be fp32.
        collate: makes the batch of some rows.
        loss: summed over a batch's targets.
        order: which rows make up a step.
        out: folder of the run.
        optimisation: learning rate, schedule, number of steps.
        keeping: logging, evaluation, checkpoints, resume.
        evaluate: figures that decide what is best; None = the last weights are kept.
        identity: what must be the same when a run is resumed.
        processes: this process among others; None = alone. Where FSDP shards, ``evaluate`` is called on all of them.
        progress: show a bar on stderr.

    Raises:
        ValueError: nothing is trainable, the folder holds another run, or the loss is no longer a number.
        OSError: a checkpoint cannot be written.

    >>> import tempfile
    >>> line, inputs = torch.nn.Linear(1, 1), torch.arange(4.0)[:, None]
    >>> collate = lambda rows, seeds: {"x": inputs[list(rows)], "weight": len(rows)}
    >>> squared = lambda model, batch: (model(batch["x"]) - 3 * batch["x"]).square().sum()
    >>> settings = Optimisation(learning_rate=0.1, epochs=80)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train(line, collate, squared, Order(4), out=Path(folder), optimisation=settings, keeping=Keeping()).finished
    True
    >>> round(float(line.weight.detach()), 1)
    3.0
    """
    run = _Run(model, collate, loss, order, Path(out), optimisation, keeping, evaluate, identity or {}, processes)
    return run.go(progress)


class _Run:
    """A run under way."""

    def __init__(
        self,
        model: torch.nn.Module,
        collate: Collate,
        loss: Loss,
        order: Order,
        out: Path,
        optimisation: Optimisation,
        keeping: Keeping,
        evaluate: Evaluation | None,
        identity: Mapping[str, Any],
        processes: Processes | None,
    ) -> None:
        self.plain, self.collate, self.loss, self.order, self.out = model, collate, loss, order, out
        self.optimisation, self.keeping, self.evaluate = optimisation, keeping, evaluate
        # As JSON has it: a tuple comes back as a list.
        self.identity = json.loads(json.dumps(identity))
        self.processes = processes or Processes()
        if order.processes != self.processes.readers:
            raise ValueError(f"order is for {order.processes} processes, but {self.processes.readers} read rows")
        weights = checkpoint.trainable(model).values()
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": optimisation.weight_decay},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        rate = optimisation.learning_rate
        plain = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, foreach=False)
        self.model, self.optimizer = self.processes.prepare(model, plain)
        # FSDP puts sharded parameters in the place of the model's own.
        self.weights = list(checkpoint.trainable(model).values())
        self.planned = optimisation.steps(order.steps_per_epoch)
        self.step, self.waited, self.loss_then, self.seconds = 0, 0, math.nan, 0.0
        self.best: dict[str, float] = {}
        self.pending: list[tuple[float, float]] = []
        """(summed loss, targets) of the steps since the last line of metrics"""

    def go(self, progress: bool) -> Outcome:
        """Run to the end, or until time or patience is up."""
        begun = time.monotonic()
        resumed = self._resume()
        before, since, keeping = self.seconds, begun, self.keeping
        # A run that has lost its patience has not found it again because it is started once more.
        stopped = "patience" if keeping.patience and self.waited >= keeping.patience else ""
        # disable=None: no bar where stderr is not a terminal.
        hidden = None if progress and self.processes.leads else True
        bar = tqdm(total=self.planned, initial=self.step, desc="training", unit="step", disable=hidden, file=sys.stderr)
        with bar:
            while self.step < self.planned and not stopped:
                self.model.train()
                norm = self._advance()
                bar.update()
                last = self.step == self.planned
                if self.step % keeping.log_every == 0 or last:
                    self._log(norm, time.monotonic() - since)
                    bar.set_postfix_str(f"loss {self.loss_then:.4f}")
                    since = time.monotonic()
                due = keeping.eval_every and self.step % keeping.eval_every == 0
                if self.evaluate is not None and (due or last):
                    stopped = self._evaluated()
                    since = time.monotonic()
                self.seconds = before + time.monotonic() - begun
                if keeping.minutes and self.processes.total(time.monotonic() - begun > 60 * keeping.minutes):
                    stopped = stopped or ("" if last else "minutes")
                every = keeping.save_every and self.step % keeping.save_every == 0
                if every or last or stopped or self.best.get("step") == self.step:
                    self._save()
        if self.best and self.best["step"] != self.step:
            checkpoint.load_best(self.out / "best", self.plain)
        self.model.eval()
        return Outcome(self.step, self.planned, resumed, self.loss_then, self.best, self.seconds, stopped)

    def _advance(self) -> float:
        """Make one step; return the norm of its gradient."""
        processes = self.processes
        # Dropout is a function of the step, and not the same in every process.
        words = f"{self.optimisation.seed}/{self.step}/{processes.index}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))
        batches = self._batches()
        targets = processes.total(sum(count * float(batch["weight"]) for batch, count in batches)) / processes.sharing
        total = 0.0
        for place, (batch, count) in enumerate(batches):
            with processes.exchanging(self.model, place + 1 == len(batches)), processes.splitting(batch):
                total += self._back(batch, count / max(targets, 1.0)) * count
        total = processes.total(total)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.optimisation.clip or math.inf)
        length = float(whole(norm))
        if not (math.isfinite(total) and math.isfinite(length)):
            raise ValueError(
                f"the loss of step {self.step + 1} is {total} and its gradient's norm {length}: lower learning_rate "
                f"(now {self.optimisation.learning_rate:g}); the last checkpoint is intact"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimisation.rate(self.step / self.planned)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pending.append((total, targets))
        return length

    def _batches(self) -> list[tuple[Batch, int]]:
        """Return this process's batches of the step, each with 1, or with 0 if it is only there to take part."""
        reader, readers = self.processes.reader, self.processes.readers
        # Whatever is drawn for a row depends on its place in the step, not on the pass and process it falls to.
        seeds = (
            f"{self.optimisation.seed}/{self.step}/0/{place}" for place in range(reader, self.order.per_step, readers)
        )
        passes = self.order.step(self.step, reader)
        return [(self.collate(rows or [0], [next(seeds) for _ in rows or [0]]), int(bool(rows))) for rows in passes]

    def _back(self, batch: Batch, scale: float) -> float:
        """Add a batch's gradient, scaled; return its summed loss."""
        parts = self.loss(self.model, batch)
        total = 0.0
        for part in [parts] if isinstance(parts, torch.Tensor) else parts:
            total += float(part.detach())
            self.processes.backward(part * scale)
        return total

    def _log(self, norm: float, seconds: float) -> None:
        """Write a line of metrics."""
        total, targets = (sum(column) for column in zip(*self.pending, strict=True))
        steps, self.loss_then = len(self.pending), total / max(targets, 1.0)
        self.pending.clear()
        rate = self.optimisation.rate((self.step - 1) / self.planned)
        figures = {"loss": self.loss_then, "learning_rate": rate, "gradient_norm": norm, "targets": targets}
        self._write({"step": self.step, **figures, "seconds_per_step": seconds / steps})

    def _evaluated(self) -> str:
        """Evaluate, keep what is best; return ``patience`` if it has run out."""
        self.model.eval()
        # A run with evaluations must go on as one without.
        state = checkpoint.random_state()
        with torch.no_grad():
            figures = dict(self.evaluate(self.plain)) if self.evaluate else {}
        checkpoint.set_random_state(state)
        self.processes.settle(self.plain)
        figures = self.processes.first(figures)
        if self.keeping.metric not in figures:
            raise ValueError(f"metric must be one of {', '.join(figures)}, got {self.keeping.metric!r}")
        self._write({"step": self.step, **{f"eval_{name}": value for name, value in figures.items()}})
        if self.keeping.better(figures[self.keeping.metric], self.best.get(self.keeping.metric)):
            self.best, self.waited = {"step": self.step, **figures}, 0
            weights = checkpoint.whole_weights(self.plain)
            if self.processes.leads:
                checkpoint.keep_best(self.out / "best", weights, self.step)
        else:
            self.waited += 1
        return "patience" if self.keeping.patience and self.waited >= self.keeping.patience else ""

    def _save(self) -> None:
        """Write a checkpoint."""
        facts = {"best": self.best, "waited": self.waited, "identity": self.identity, "planned": self.planned}
        facts |= {"pending": self.pending, "loss": self.loss_then, "seconds": self.seconds}
        facts["processes"] = self.order.processes
        weights, state = checkpoint.whole_weights(self.plain), checkpoint.whole_state(self.optimizer)
        if self.processes.leads:
            checkpoint.save(self.out / "checkpoints", self.step, weights, state, facts, self.keeping.keep)
            checkpoint.settle_best(self.out / "best", facts["best"].get("step"))
        self.processes.wait()

    def _resume(self) -> int:
        """Go on from the last checkpoint, if there is one; return its step."""
        last = claim(self.out, self.keeping, self.identity, self.planned, self.order.processes)
        self.processes.wait()
        if last is None:
            if self.processes.leads:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / "metrics.jsonl").write_text("", encoding="utf-8")
            return 0
        checkpoint.restore(last, self.plain, self.optimizer)
        facts = last.facts
        self.step, self.best, self.waited = last.step, dict(facts["best"]), int(facts["waited"])
        self.pending = [(total, targets) for total, targets in facts.get("pending", [])]
        self.loss_then, self.seconds = float(facts.get("loss", math.nan)), float(facts.get("seconds", 0.0))
        if self.processes.leads:
            checkpoint.settle_best(self.out / "best", facts["best"].get("step"))
            _forget_after(self.out / "metrics.jsonl", self.step)
        self.processes.wait()
        return self.step

    def _write(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self.processes.leads:
            told = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in line.items()
            }
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")


def claim(
    out: Path, keeping: Keeping, identity: Mapping[str, Any], planned: int, processes: int = 1
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that a run in ``out`` goes on from, or None if there is none yet.

    Raises:
        ValueError: it is of another run (what differs is named), damaged, or keeping.resume says never.
    """
    found = checkpoint.checkpoints(out / "checkpoints")
    if not found:
        return None
    last = found[-1]
    if keeping.resume == "never":
        raise ValueError(f"{out} holds a run up to step {last.step}: choose another folder, or resume it")
    mine = {**json.loads(json.dumps(identity)), "steps": planned, "processes": processes}
    facts = last.facts
    theirs = {**facts.get("identity", {}), "steps": facts.get("planned"), "processes": facts.get("processes", 1)}
    if other := difference(theirs, mine):
        raise ValueError(f"{out} holds another run, with {other}: choose another folder, or delete it")
    return last


def difference(there: Any, here: Any, path: str = "") -> str:
    """Say where two JSON values first differ; empty if they do not.

    >>> difference({"lora": {"rank": 8}}, {"lora": {"rank": 16}})
    'lora.rank 8 there and 16 here'
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted(there.keys() | here.keys()):
            inner = f"{path}.{name}" if path else str(name)
            if name not in there or name not in here:
                return f"{inner} {'here' if name in here else 'there'} only"
            if found := difference(there[name], here[name], inner):
                return found
        return ""
    return "" if there == here else f"{path} {json.dumps(there)} there and {json.dumps(here)} here"


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of metrics that a killed run wrote after its last checkpoint, and one that was cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
