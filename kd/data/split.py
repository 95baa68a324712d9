"""Which images are train, validation and test: by a seed, balanced over the classes, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch

from kd import keyed


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """All places of labels (N,) as int64 (N,), so that every prefix is as class-balanced as it can be; random within a
    class by seed."""
    shuffled = keyed.permutation(keyed.key(seed), len(labels)).numpy()
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - np.repeat(starts, counts)  # how many of its class stand before it
    tie = keyed.keys(keyed.key(seed, keyed.Purpose.SPLIT_ORDER), torch.from_numpy(by_class)).numpy()
    return by_class[np.lexsort((tie, rank))]


def carve(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split places into (rest, carved): `fraction` of every class (rounded) is carved; both ascending."""
    shuffled = keyed.permutation(keyed.key(seed, keyed.Purpose.CARVED), len(labels)).numpy()
    by_class = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
    carved = np.sort(np.concatenate([places[: round(fraction * len(places))] for places in by_class]))
    return np.setdiff1d(np.arange(len(labels)), carved), carved
