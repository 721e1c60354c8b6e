"""Which settings make a length fit, the cheapest in time first; and the longest length that fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longllm.planning.memory import Memory, Setting, training_memory
from longllm.planning.sizes import Sizes
from longllm.planning.work import step_work

#: lengths are told in multiples of this
BLOCK = 128
#: no length beyond this is looked for
FARTHEST = 1 << 24
#: tokens at which settings are compared for how far they reach
FAR = 1 << 20
#: rows of logits worth trying
CHUNKS = (512, 128)
#: ratios of a compressed cache worth trying
RATIOS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Change:
    """One setting turned, and what that does to memory and time.

    >>> Change("recompute: on", ("base.recompute=on",), -3_000_000_000, 1.31).options
    ('base.recompute=on',)
    """

    words: str
    """what is changed, for people"""
    options: tuple[str, ...]
    """the settings as a command line names them"""
    nbytes: int
    """bytes more (less, if negative) at the peak"""
    time: float
    """how many times as long a step takes"""
    alters: bool = False
    """whether something else is learned"""


@dataclass(frozen=True)
class Advice:
    """How a length fits into a limit.

    >>> Advice(True, (), None).fits
    True
    """

    fits: bool
    """whether it fits as it is"""
    changes: tuple[Change, ...]
    """the cheapest settings that make it fit, each with its effect after those before; nothing if none is needed, or if
    none is enough"""
    setting: Setting | None
    """the run with these changes; None if it does not fit whatever is changed"""
    alone: tuple[Change, ...] = ()
    """what each setting does by itself, cheapest first"""

    @property
    def time(self) -> float:
        """How many times as long a step takes with all the changes."""
        return self.changes[-1].time if self.changes else 1.0


@dataclass(frozen=True)
class _Turn:
    """A setting that can be turned: its words, options, and the run that results."""

    words: str
    options: tuple[str, ...]
    apply: Callable[[Setting], Setting]
    alters: bool = False


def longest(fits: Callable[[int], bool], block: int = BLOCK) -> int:
    """Return the longest length, a multiple of ``block`` tokens, that fits; 0 if none does.

    Args:
        fits: whether a length fits; if one does, so does every shorter one.
        block: tokens.

    >>> longest(lambda length: length <= 1000)
    896
    """
    low, high = 0, 1
    while high * block <= FARTHEST and fits(high * block):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if middle * block <= FARTHEST and fits(middle * block):
            low = middle
        else:
            high = middle
    return low * block


def advise(sizes: Sizes, setting: Setting, limit: int) -> Advice:
    """Say whether a run fits into ``limit`` bytes, and if not, which settings make it fit at least cost in time.

    All combinations are tried; only if none is enough, those that change what is learned as well.

    Raises:
        ValueError: as ``training_memory``.

    >>> from longllm.recipe import Base
    >>> llama = Sizes("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> whole = Setting(32768, Base(dtype="bf16", nf4=True, recompute="on", head_chunk=32768), device="cuda")
    >>> [change.words for change in advise(llama, whole, 32_000_000_000).changes]
    ['chunked loss (512 rows)']
    """
    own = training_memory(sizes, setting)
    axes = list(_axes(setting))
    alone = [_change(sizes, setting, setting, turn, own) for axis in axes for turn in axis]
    alone.sort(key=lambda change: (change.alters, change.time, change.nbytes))
    saving = tuple(change for change in alone if change.nbytes < 0)
    if own.peak <= limit:
        return Advice(True, (), setting, saving)
    gentle = [axis for axis in axes if not any(turn.alters for turn in axis)]
    for allowed in (gentle, axes):
        found = _cheapest(sizes, setting, limit, allowed)
        if found is not None:
            return Advice(False, _told(sizes, setting, found), _applied(setting, found), saving)
    return Advice(False, (), None, saving)


def roomiest(sizes: Sizes, setting: Setting) -> Setting:
    """Return the run with every setting that lets it go far, as long as nothing else is learned by it.

    >>> roomiest(Sizes("llama", 576, 1536, 30, 9, 3, 64, 49152), Setting(512)).base.recompute
    'on'
    """
    own, setting = setting.length, replace(setting, length=max(setting.length, FAR))
    for axis in _axes(setting):
        tried = [setting, *(turn.apply(setting) for turn in axis if not turn.alters)]
        setting = min(tried, key=lambda one: training_memory(sizes, one).peak)
    return replace(setting, length=own)


def advise_inference(fits: Callable[..., bool], options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the cheapest change that makes a prompt fit: its words and the options it changes; nothing if none does.

    Args:
        fits: whether the prompt fits with changed options of ``inference_memory``.
        options: what it is read with now.

    >>> advise_inference(lambda **changes: changes.get("ratio", 1) >= 4, {"ratio": 1.0, "nf4": False, "chunk": 1024})
    ('a compressed cache, ratio 4', {'ratio': 4.0})
    """
    tried: list[tuple[str, dict[str, Any]]] = []
    if options["chunk"] > 256:
        tried.append(("chunks of 256 tokens", {"chunk": 256}))
    if not options["nf4"]:
        tried.append(("NF4 weights", {"nf4": True}))
    ratios = [
        (f"a compressed cache, ratio {most}", {"ratio": float(most)}) for most in RATIOS if most > options["ratio"]
    ]
    tried += ratios
    if not options["nf4"]:
        tried += [(f"NF4 weights and {words}", {"nf4": True, **change}) for words, change in ratios]
    return next(((words, change) for words, change in tried if fits(**change)), ("", {}))


def _axes(setting: Setting) -> Iterator[list[_Turn]]:
    """Yield the settings that can still be turned towards less memory, those of one kind together."""
    base, lora = setting.base, setting.lora
    chunks = [rows for rows in CHUNKS if rows < min(base.head_chunk, setting.tokens)]
    yield [_of_base(f"chunked loss ({rows} rows)", head_chunk=rows) for rows in chunks]
    if setting.batch > 1:
        options = ("optimisation.batch_size=1", f"optimisation.accumulation={setting.batch * setting.accumulation}")
        yield [_Turn("one row at a time, accumulated", options, _one_row)]
    # Recomputing fewer layers costs less and saves less; every layer, or with offloading, is the far end.
    shares = (4, 3, 2, 1) if base.recompute == "off" else range(base.recompute_every - 1, 0, -1)
    kinds = [] if base.recompute == "offload" else [("on", every) for every in shares]
    if setting.device == "cuda" and base.recompute != "offload":
        kinds.append(("offload", 1))
    yield [_of_base(_recompute_words(how, every), recompute=how, recompute_every=every) for how, every in kinds]
    yield [_of_base("NF4 weights", nf4=True)] if lora.rank and not base.nf4 else []
    if lora.rank and lora.whole:
        drop = _Turn("no modules learned as a whole", ("lora.whole=[]",), _no_whole, True)
        yield [drop]
    if lora.rank > 8:
        yield [_Turn("rank 8", ("lora.rank=8",), _rank_8, True)]


def _of_base(words: str, **values: Any) -> _Turn:
    """Return the turn that changes fields of ``base``."""
    options = tuple(f"base.{name}={str(value).lower()}" for name, value in values.items())
    return _Turn(words, options, lambda setting: replace(setting, base=replace(setting.base, **values)))


def _recompute_words(how: str, every: int) -> str:
    """Name a way to recompute."""
    if how == "offload":
        return "activation checkpointing, layer inputs in host memory"
    return "activation checkpointing" + (f" of one layer in {every}" if every > 1 else "")


def _one_row(setting: Setting) -> Setting:
    """Return the same step in passes of one row."""
    return replace(setting, batch=1, accumulation=setting.batch * setting.accumulation)


def _no_whole(setting: Setting) -> Setting:
    """Return the run without modules that learn as a whole."""
    return replace(setting, lora=replace(setting.lora, whole=()))


def _rank_8(setting: Setting) -> Setting:
    """Return the run with a lower rank."""
    return replace(setting, lora=replace(setting.lora, rank=8))


def _cheapest(sizes: Sizes, setting: Setting, limit: int, axes: list[list[_Turn]]) -> list[_Turn] | None:
    """Return the turns that fit and take least time; of equal ones the fewest, then the least memory."""
    best: tuple[tuple[bool, float, int, int], list[_Turn]] | None = None
    for choice in itertools.product(*([None, *axis] for axis in axes)):
        turns = [turn for turn in choice if turn is not None]
        tried = _applied(setting, turns)
        peak = training_memory(sizes, tried).peak
        if peak > limit:
            continue
        cost = sum(turn.alters for turn in turns) > 0, step_work(sizes, tried).total, len(turns), peak
        if best is None or cost < best[0]:
            best = cost, turns
    return None if best is None else best[1]


def _applied(setting: Setting, turns: list[_Turn]) -> Setting:
    """Return a run with some settings turned."""
    for turn in turns:
        setting = turn.apply(setting)
    return setting


def _told(sizes: Sizes, setting: Setting, turns: list[_Turn]) -> tuple[Change, ...]:
    """Return the turns with their effects, each after those before it, the cheapest first."""
    told, now, memory = [], setting, training_memory(sizes, setting)
    turns = sorted(turns, key=lambda turn: (turn.alters, step_work(sizes, turn.apply(setting)).total))
    for turn in turns:
        told.append(_change(sizes, setting, now, turn, memory))
        now = turn.apply(now)
        memory = training_memory(sizes, now)
    return tuple(told)


def _change(sizes: Sizes, first: Setting, now: Setting, turn: _Turn, memory: Memory) -> Change:
    """Return what one turn does to the peak of ``now``, and to the time of ``first``."""
    then = turn.apply(now)
    saved = training_memory(sizes, then).peak - memory.peak
    time = step_work(sizes, then).total / step_work(sizes, first).total
    return Change(turn.words, turn.options, saved, time, turn.alters)
