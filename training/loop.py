"""The one training loop. Loss, batches and evaluation are arguments; new recipes are new arguments, not new loops."""

from __future__ import annotations

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
from training.settings import Keeping, Optimisation

#: a batch: what the loss takes, and under "weight" how many targets it has (tokens, rows …)
Batch = Mapping[str, Any]
#: (model, batch) -> the loss SUMMED over the batch's targets, or several parts of that sum, one after the other, each
#: of which is back-propagated before the next is asked for, so that only one graph is alive
Loss = Callable[[Any, Batch], "torch.Tensor | Iterator[torch.Tensor]"]
#: model -> figures of an evaluation
Evaluation = Callable[[Any], Mapping[str, float]]
#: (indices of rows, seed of whatever is drawn for them) -> batch
Collate = Callable[[Sequence[int], str], Batch]


@dataclass
class Outcome:
    """What a run did."""

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
    """of this process"""
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
    accelerator: Any = None,
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
        accelerator: of the package accelerate, for several processes; None = this one alone.
        progress: show a bar on stderr.

    Raises:
        ValueError: nothing is trainable, the folder holds another run, or the loss is no longer a number.
        OSError: a checkpoint cannot be written.
    """
    return _Run(model, collate, loss, order, out, optimisation, keeping, evaluate, identity or {}, accelerator).go(
        progress
    )


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
        accelerator: Any,
    ) -> None:
        self.plain, self.collate, self.loss, self.order, self.out = model, collate, loss, order, Path(out)
        self.optimisation, self.keeping, self.evaluate = optimisation, keeping, evaluate
        self.identity, self.accelerator = dict(identity), accelerator
        self.weights = list(checkpoint.trainable(model).values())
        decayed = [weight for weight in self.weights if weight.ndim > 1]
        plain = [weight for weight in self.weights if weight.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": optimisation.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        rate = optimisation.learning_rate
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, foreach=False)
        self.model: Any = model
        if accelerator is not None:
            self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.planned = optimisation.max_steps or math.ceil(optimisation.epochs * order.steps_per_epoch)
        self.step, self.waited = 0, 0
        self.best: dict[str, float] = {}
        self.pending: list[tuple[float, float]] = []
        """(summed loss, targets) of the steps since the last line of metrics"""

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def go(self, progress: bool) -> Outcome:
        """Run to the end, or until time or patience is up."""
        begun = time.monotonic()
        resumed = self._resume()
        mean, stopped, since = float("nan"), "", time.monotonic()
        # disable=None: no bar where stderr is not a terminal.
        hidden = None if progress and self.leads else True
        bar = tqdm(total=self.planned, initial=self.step, desc="training", unit="step", disable=hidden, file=sys.stderr)
        saved = self.step
        with bar:
            while self.step < self.planned and not stopped:
                self.model.train()
                norm = self._advance()
                bar.update()
                if self.step % self.keeping.log_every == 0 or self.step == self.planned:
                    mean = self._log(norm, time.monotonic() - since)
                    bar.set_postfix_str(f"loss {mean:.4f}")
                    since = time.monotonic()
                due = self.keeping.eval_every and self.step % self.keeping.eval_every == 0
                if self.evaluate is not None and (due or self.step == self.planned):
                    stopped = self._evaluated()
                    since = time.monotonic()
                if self.keeping.minutes and time.monotonic() - begun > 60 * self.keeping.minutes:
                    stopped = stopped or "minutes"
                every = self.keeping.save_every
                if (every and self.step % every == 0) or self.step == self.planned or stopped:
                    self._save()
                    saved = self.step
        if saved != self.step:
            self._save()
        self._take_best()
        self.model.eval()
        return Outcome(self.step, self.planned, resumed, mean, self.best, time.monotonic() - begun, stopped)

    def _advance(self) -> float:
        """Make one step; return the norm of its gradient."""
        process = self.accelerator.process_index if self.accelerator is not None else 0
        passes = self.order.step(self.step, process)
        batches = [
            self.collate(rows, f"{self.optimisation.seed}/{self.step}/{process}/{place}")
            for place, rows in enumerate(passes)
        ]
        targets = self._over_all(sum(float(batch["weight"]) for batch in batches))
        total = 0.0
        for place, batch in enumerate(batches):
            with self._synchronised(place + 1 == len(batches)):
                total += self._back(batch, targets)
        total = self._over_all(total)
        if not math.isfinite(total):
            raise ValueError(
                f"the loss of step {self.step + 1} is {total}: lower learning_rate (now "
                f"{self.optimisation.learning_rate:g}); the last checkpoint is intact"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.optimisation.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimisation.rate(self.step / self.planned)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pending.append((total, targets))
        return float(norm)

    def _back(self, batch: Batch, targets: float) -> float:
        """Add a batch's gradient; return its summed loss."""
        parts = self.loss(self.model, batch)
        total = 0.0
        # Data parallelism averages over processes, where a sum is meant.
        scale = (1 if self.accelerator is None else self.accelerator.num_processes) / max(targets, 1.0)
        for part in [parts] if isinstance(parts, torch.Tensor) else parts:
            total += float(part.detach())
            if self.accelerator is not None:
                self.accelerator.backward(part * scale)
            else:
                (part * scale).backward()
        return total

    def _over_all(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(number, reduction="sum")[0])

    def _synchronised(self, last: bool) -> Any:
        """Let processes exchange gradients in the last pass of a step only."""
        from contextlib import nullcontext

        return nullcontext() if last or self.accelerator is None else self.accelerator.no_sync(self.model)

    def _log(self, norm: float, seconds: float) -> float:
        """Write a line of metrics; return the mean loss since the last."""
        total, targets = (sum(column) for column in zip(*self.pending, strict=True))
        steps, mean = len(self.pending), total / max(targets, 1.0)
        self.pending.clear()
        rate = self.optimisation.rate((self.step - 1) / self.planned)
        figures = {"loss": mean, "learning_rate": rate, "gradient_norm": norm, "targets": targets}
        self._write({"step": self.step, **figures, "seconds_per_step": seconds / steps})
        return mean

    def _evaluated(self) -> str:
        """Evaluate, keep what is best; return ``patience`` if it has run out."""
        self.model.eval()
        with torch.no_grad():
            figures = dict(self.evaluate(self.plain)) if self.evaluate else {}
        if self.keeping.metric not in figures:
            raise ValueError(f"metric must be one of {', '.join(figures)}, got {self.keeping.metric!r}")
        self._write({"step": self.step, **{f"eval_{name}": value for name, value in figures.items()}})
        if self.keeping.better(figures[self.keeping.metric], self.best.get(self.keeping.metric)):
            self.best, self.waited = {"step": self.step, **figures}, 0
            if self.leads:
                folder = self.out / "best"
                folder.mkdir(parents=True, exist_ok=True)
                checkpoint.save_weights(self.plain, folder / ".partial")
                (folder / ".partial").replace(folder / "trainable.safetensors")
        else:
            self.waited += 1
        return "patience" if self.keeping.patience and self.waited >= self.keeping.patience else ""

    def _save(self) -> None:
        """Write a checkpoint."""
        if self.leads:
            facts = {"best": self.best, "waited": self.waited, "identity": self.identity, "planned": self.planned}
            checkpoint.save(self.out / "checkpoints", self.step, self.plain, self.optimizer, facts, self.keeping.keep)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Go on from the last checkpoint, if there is one; return its step."""
        found = checkpoint.checkpoints(self.out / "checkpoints")
        if not found:
            torch.manual_seed(self.optimisation.seed)
            if self.leads:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / "metrics.jsonl").write_text("", encoding="utf-8")
            return 0
        if self.keeping.resume == "never":
            raise ValueError(f"{self.out} holds a run up to step {found[-1].step}: choose another folder, or resume it")
        last = found[-1]
        # As JSON has it: a tuple comes back as a list.
        mine, theirs = json.loads(json.dumps(self.identity)), last.facts.get("identity", {})
        changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if last.facts.get("planned") != self.planned:
            changed.append("number of steps")
        if changed:
            raise ValueError(f"{self.out} holds a run with another {changed[0]}: choose another folder, or delete it")
        checkpoint.restore(last, self.plain, self.optimizer)
        self.step, self.best, self.waited = last.step, dict(last.facts["best"]), int(last.facts["waited"])
        if self.leads:
            _forget_after(self.out / "metrics.jsonl", self.step)
        return self.step

    def _take_best(self) -> None:
        """Put the best weights into the model, if an evaluation has chosen some."""
        if self.best and self.best["step"] != self.step:
            checkpoint.load_weights(self.plain, self.out / "best" / "trainable.safetensors")

    def _write(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self.leads:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of metrics that a killed run wrote after its last checkpoint, and one that was cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
