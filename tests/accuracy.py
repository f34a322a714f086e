"""The fixed English text, and distributions kept in part."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellama.distance import Floats

TEXT = Path(__file__).parent / "data" / "english.txt"
POSITIONS = 256  # teacher-forced tokens of TEXT
REFERENCE_POSITIONS = slice(7, None, 8)  # of these, where the float64 reference is stored
TOP = 128  # likeliest tokens that a stored distribution keeps


def kept(p: Floats) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """(ids, log-probabilities) of each row's TOP likeliest tokens, the likeliest first."""
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :TOP]
    return ids.astype(np.uint32), np.take_along_axis(p, ids, axis=-1).astype(np.float32)


def bucketed(p: Floats, ids: NDArray[np.integer]) -> Floats:
    """Log-probabilities of each row's `ids`, then of all other tokens together.

    A divergence between two such rows is at most that between the whole ones.
    """
    listed = np.take_along_axis(p, ids.astype(np.int64), axis=-1)
    return with_rest(listed)


def with_rest(listed: NDArray[np.floating]) -> Floats:
    """Append the log-probability of everything that is not listed."""
    exact = listed.astype(np.float64)
    rest = np.maximum(1 - np.exp(exact).sum(axis=-1, keepdims=True), 1e-12)
    return np.concatenate([exact, np.log(rest)], axis=-1)
