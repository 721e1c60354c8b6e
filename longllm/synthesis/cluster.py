"""Texts of one kind put side by side: a corpus is clustered, and each context holds several texts of one cluster."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

#: texts -> their vectors [texts, dimensions], numpy
Embed = Callable[[list[str]], Any]


def clusters(texts: Sequence[str], number: int, embed: Embed | None = None, seed: int = 2024) -> list[int]:
    """Return the cluster of each text, found by k-means on its vector.

    Args:
        texts: the corpus.
        number: of clusters, at most as many as there are texts.
        embed: gives the vectors; None weighs the words of each text (TF-IDF).
        seed: of the first centres.

    Raises:
        ValueError: fewer than one cluster, more than texts, or vectors that do not fit the texts.
        ImportError: scikit-learn (``longscope[synth]``) is not installed.

    >>> found = clusters(["whale sea ship", "sea ship sailor", "tax law congress", "congress law vote"], 2)
    >>> found[0] == found[1], found[2] == found[3], found[0] == found[2]
    (True, True, False)
    """
    if not 1 <= number <= len(texts):
        raise ValueError(f"the number of clusters must lie between 1 and {len(texts)} (the texts), got {number}")
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("clustering texts needs scikit-learn: pip install 'longscope[synth]'") from error
    if embed is not None:
        vectors = embed(list(texts))
        if len(vectors) != len(texts):
            raise ValueError(f"the embedder gave {len(vectors)} vectors for {len(texts)} texts")
    else:
        # Words of a single text say nothing about which texts belong together; they are the greater part.
        rare = 2 if len(texts) > 10 else 1
        weights = TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=rare, max_features=50_000)
        vectors = weights.fit_transform(texts)
    return [int(label) for label in KMeans(number, n_init=4, random_state=seed).fit_predict(vectors)]


def side_groups(
    labels: Sequence[int], lengths: Sequence[int], target: int, seed: int = 2024, least: int = 2
) -> list[list[int]]:
    """Return groups of texts of one cluster whose lengths add up to at most ``target``; no text is in two groups.

    Args:
        labels: cluster of each text.
        lengths: tokens of each text.
        target: most tokens of a group.
        seed: of the order in which a cluster's texts are taken.
        least: texts of a group; a smaller rest is left out.

    >>> side_groups([0, 0, 1, 0, 1], [5, 5, 5, 5, 5], target=10)
    [[0, 3], [2, 4]]
    """
    draws = random.Random(seed)
    groups: list[list[int]] = []
    for label in sorted(set(labels)):
        members = [number for number, own in enumerate(labels) if own == label and lengths[number] <= target]
        draws.shuffle(members)
        group: list[int] = []
        room = target
        for number in members:
            if lengths[number] > room:
                groups.append(sorted(group))
                group, room = [], target
            group.append(number)
            room -= lengths[number]
        groups.append(sorted(group))
    return sorted(group for group in groups if len(group) >= least)
