"""Ratios that a question steers: windows that have to do with it keep more beacons, at the same number of bytes.

Compression itself is done without a question in mind. Where one is known, an embedder or a word search says which
windows matter, and a multiple-choice knapsack (Kellerer et al. 2004, chapter 11) gives each its ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from beacon.config import BeaconConfig

#: (question, passages) -> how much each passage has to do with the question; only differences count
Scorer = Callable[[str, Sequence[str]], Sequence[float]]


def steer(weights: Sequence[float], ratios: Sequence[int], window: int, slots: int) -> tuple[int, ...]:
    """Return the ratio of each window that makes the most of a number of slots.

    What is made the most of is ``sum of weight * log(slots of the window)``: without other limits a window would get
    slots in proportion to its weight.

    Args:
        weights: of each window, at least 0.
        ratios: to choose from; 0 keeps a window whole.
        window: raw tokens of each window.
        slots: all windows together may keep.

    Raises:
        ValueError: weights below 0, or fewer slots than the largest ratio takes everywhere.

    >>> steer([1, 1, 9, 1], ratios=(2, 4, 8, 16), window=64, slots=32)
    (16, 16, 4, 8)
    """
    if not len(weights) or min(weights) < 0:
        raise ValueError(f"weights must be given for at least one window and be 0 or more, got {list(weights)}")
    ratios = sorted(set(ratios), key=lambda ratio: ratio or 0.5)
    kept = [window // ratio if ratio else window for ratio in ratios]
    unit = math.gcd(*kept)
    most = slots // unit
    if not min(kept) or min(kept) * len(weights) > slots:
        raise ValueError(
            f"{slots:,} slots are too few for {len(weights):,} windows of {window:,} tokens at the largest ratio, "
            f"{max(ratios)}: they take {min(kept) * len(weights):,}"
        )
    # Exact: best[c] is the most that the windows so far are worth in c units.
    best = np.zeros(most + 1)
    choices = np.zeros((len(weights), most + 1), np.int16)
    for place, weight in enumerate(weights):
        options = np.full((len(kept), most + 1), -np.inf)
        for number, size in enumerate(kept):
            units = size // unit
            if units <= most:
                options[number, units:] = best[: most + 1 - units] + weight * math.log(size)
        choices[place] = options.argmax(0)
        best = options.max(0)
    left, chosen = most, []
    for place in reversed(range(len(weights))):
        number = int(choices[place, left])
        chosen.append(ratios[number])
        left -= kept[number] // unit
    return tuple(reversed(chosen))


def window_weights(scores: Sequence[Sequence[float]], sharpness: float = 1.0) -> list[float]:
    """Return the share of each window in what matters, given its scores [questions][windows].

    Scores of each question count by how far they stand out (in standard deviations, softmax); of several questions the
    one that a window serves best counts.

    Args:
        scores: of any scale.
        sharpness: 0 = all windows alike; above 1 = more to the best.

    >>> [round(weight, 2) for weight in window_weights([[0.0, 0.0, 3.0, 0.0]])]
    [0.08, 0.08, 0.77, 0.08]
    """
    shares = []
    for row in scores:
        values = np.asarray(row, np.float64)
        spread = values.std()
        lifted = np.exp(sharpness * (values - values.max()) / spread) if spread else np.ones_like(values)
        shares.append(lifted / lifted.sum())
    together = np.max(shares, axis=0)
    return [float(weight) for weight in together / together.sum()]


def steered_ratios(
    tokenizer: Any,
    ids: Sequence[int],
    questions: Sequence[str],
    scorer: Scorer,
    config: BeaconConfig,
    slots: int,
    sharpness: float = 1.0,
) -> tuple[int, ...]:
    """Return the ratios of the complete windows of a text, for ``BeaconCache(…, ratios=…)``.

    Args:
        tokenizer: turns windows back to text for the scorer.
        ids: the text's tokens, as they will be read.
        questions: questions or sub-topics; each is scored on its own.
        scorer: such as ``longllm.spans.bm25_scores``, or cosine similarities of an embedder.
        config: window and ratios to choose from.
        slots: what all complete windows together may keep (bytes / (bytes of a token * layers)).
        sharpness: as ``window_weights``.

    Raises:
        ValueError: no question, a scorer that does not score every window, or too few slots.

    >>> class Letters:
    ...     def decode(self, ids):
    ...         return "".join(map(chr, ids))
    >>> ids = list(b"the sea is wide and the captain is ill")[:36]
    >>> count = lambda question, windows: [window.count("captain") for window in windows]
    >>> steered_ratios(Letters(), ids, ["Who is ill?"], count, BeaconConfig(12, 12, ratio=(2, 6)), slots=10)
    (6, 6, 2)
    """
    if not questions:
        raise ValueError("give at least one question (or sub-topic) to steer by")
    whole = len(ids) // config.window * config.window
    windows = [tokenizer.decode(ids[at : at + config.window]) for at in range(0, whole, config.window)]
    if not windows:
        return ()
    scores = [list(scorer(question, windows)) for question in questions]
    if wrong := [len(row) for row in scores if len(row) != len(windows)]:
        raise ValueError(f"the scorer gave {wrong[0]} scores for {len(windows)} windows")
    return steer(window_weights(scores, sharpness), config.valid_ratios, config.window, slots)
