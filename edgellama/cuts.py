"""Which tokens stay in the draw: top-n-sigma, top-k, typical, top-p, min-p, XTC, mirostat.

Each function takes the scores (logits, perhaps penalized or divided by a temperature) of the
tokens still in the draw, by ascending id, all finite, and returns the ascending indices of those
that stay: at least one, ties by id. Knows nothing about settings, ids or random numbers.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]
Indices = NDArray[np.intp]

STRIPES = 4  # top_k looks at n / (STRIPES * k) scores at a time
MANY = 4096  # scores from which speed counts: float32, no full sort
WIDE = 1e18  # a spread of scores whose squares float32 cannot hold
BINS, REACH = 4096, 64.0  # of `fewest`; what is 64 nats less likely weighs nothing
BLOCK, PIECE = 1024, 8192  # scores that `draw` and `fewest` add up at a time


def below_largest(scores: Scores) -> Scores:
    """Score - the largest score: float64, or float32 where they are many and it can hold them."""
    largest = float(scores.max())
    if len(scores) <= MANY or largest - float(scores.min()) > WIDE:
        return scores.astype(np.float64) - largest
    return (scores - scores.dtype.type(largest)).astype(np.float32, copy=False)


def weights(scores: Scores) -> Scores:
    """exp(score - the largest score): in proportion to the probabilities, and never overflowing."""
    return np.exp(below_largest(scores))


def warmed(scores: Scores, temperature: float) -> Scores:
    """The scores divided by a temperature of 1e-30 or more: float32 as `below_largest` has it."""
    largest = max(float(scores.max()), -float(scores.min()))
    if len(scores) <= MANY or largest > WIDE * temperature:
        return scores.astype(np.float64) / temperature
    return scores / scores.dtype.type(temperature)


def top_k(scores: Scores, k: int) -> Indices:
    """The `k` largest scores.

    The k-th largest of any stripes' maxima is no larger than the k-th largest score, so only
    the few scores from there up need to be ordered.
    """
    if k >= len(scores):
        return np.arange(len(scores))
    width = len(scores) // (STRIPES * k)
    floor = scores[:k].min()
    if width > 1:
        stripes = scores[: width * STRIPES * k].reshape(width, STRIPES * k)
        floor = np.partition(stripes.max(axis=0), -k)[-k]
    found = np.flatnonzero(scores >= floor)
    ranked = np.argsort(-scores[found], kind="stable")
    kept: Indices = np.sort(found[ranked[:k]])
    return kept


def top_p(scores: Scores, p: float) -> Indices:
    """The fewest largest scores whose probabilities reach `p`."""
    return fewest(-scores, weights(scores), p)


def min_p(scores: Scores, p: float) -> Indices:
    """Those at least `p` times as likely as the likeliest; p above 0."""
    return np.flatnonzero(scores >= float(scores.max()) + math.log(p))


def typical_p(scores: Scores, p: float) -> Indices:
    """The fewest whose probabilities reach `p`, starting where the surprise is most typical."""
    below = below_largest(scores)
    surprise = math.log(float(np.exp(below).sum(dtype=np.float64))) - below
    shares = np.exp(-surprise)
    entropy = float((shares * surprise).sum(dtype=np.float64))
    return fewest(np.abs(surprise - entropy), shares, p)


def top_n_sigma(scores: Scores, n: float) -> Indices:
    """Those within `n` standard deviations, taken over all scores here, of the largest."""
    below = below_largest(scores)
    return np.flatnonzero(below >= -n * float(below.std()))


def xtc(scores: Scores, threshold: float) -> Indices:
    """All but the top choices: of those at least `threshold` likely, only the least likely stays.

    Of several that are least likely, that with the highest id.
    """
    odds = weights(scores)
    choices = np.flatnonzero(odds >= threshold * float(odds.sum(dtype=np.float64)))
    if not len(choices):
        return np.arange(len(scores))
    last = choices[len(choices) - 1 - int(scores[choices][::-1].argmin())]
    dropped = np.zeros(len(scores), np.bool_)
    dropped[choices] = True
    dropped[last] = False
    return np.flatnonzero(~dropped)


def surprising_at_most(scores: Scores, bits: float) -> Indices:
    """Those whose surprise, -log2 of the probability, is at most `bits`; else the likeliest."""
    odds = weights(scores)
    least = math.log2(float(odds.sum(dtype=np.float64))) - bits  # of log2(odds)
    kept = np.flatnonzero(scores >= float(scores.max()) + least * math.log(2))
    return kept if len(kept) else np.array([scores.argmax()])


def fewest(keys: Scores, masses: Scores, share: float) -> Indices:
    """The fewest, smallest keys first, whose masses reach `share` of all mass; ties by index.

    Of many, a histogram finds the bin in which the share is reached; only that one is sorted.
    """
    goal = share * float(masses.sum(dtype=np.float64))
    if len(keys) > MANY:
        bins, reached = _histogram(keys, masses)
        at = min(int(np.searchsorted(reached, goal)), BINS - 1)
        kept, unsure = bins < at, np.flatnonzero(bins == at)
        before = float(reached[at - 1]) if at else 0.0
    else:
        kept, unsure, before = np.zeros(len(keys), np.bool_), np.arange(len(keys)), 0.0
    ranked = unsure[np.argsort(keys[unsure], kind="stable")]
    mass = before + masses[ranked].cumsum(dtype=np.float64)
    count = int(np.searchsorted(mass, goal)) + 1
    kept[ranked[:count]] = True
    return np.flatnonzero(kept)


def _histogram(keys: Scores, masses: Scores) -> tuple[NDArray[np.uint16], Scores]:
    """Each key's bin, in the order of the keys, and the mass up to the end of each bin.

    What is REACH and more above the smallest key is in the last. In pieces: arrays of a megabyte
    come fresh from the system each time, which takes longer than the work on them.
    """
    with np.errstate(over="ignore"):  # keys further apart than their type reaches
        scaled = (keys - keys.min()) * keys.dtype.type(BINS / REACH)
    bins = np.minimum(scaled, BINS - 1, out=scaled).astype(np.uint16)
    mass = np.zeros(BINS)
    for start in range(0, len(keys), PIECE):
        piece = slice(start, start + PIECE)
        mass += np.bincount(bins[piece], masses[piece], BINS)
    return bins, mass.cumsum()


def draw(scores: Scores, number: float) -> int:
    """The index that `number` in [0, 1) chooses, each by its probability."""
    odds = weights(scores)
    whole = len(odds) // BLOCK * BLOCK
    blocks = odds[:whole].reshape(-1, BLOCK).sum(axis=1, dtype=np.float64)
    sums = np.append(blocks, odds[whole:].sum(dtype=np.float64))
    goal = number * float(sums.cumsum()[-1])
    block = _reaching(sums, goal)
    start = block * BLOCK
    goal -= float(sums[:block].cumsum()[-1]) if block else 0.0
    return start + _reaching(odds[start : start + BLOCK], goal)


def _reaching(masses: Scores, goal: float) -> int:
    """The first index up to which there is more than `goal`, else the last that has any mass."""
    reach = masses.cumsum(dtype=np.float64)
    last = int(np.searchsorted(reach, reach[-1]))
    return min(int(np.searchsorted(reach, goal, side="right")), last)
