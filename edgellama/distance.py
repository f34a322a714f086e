"""How far apart two models or runtimes are: Kullback-Leibler divergence, agreement, perplexity.

Logits are (positions, vocab_size); everything is computed in float64. Knows nothing about models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def log_probabilities(logits: NDArray[np.float32]) -> Floats:
    """log softmax of each row."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    normed: Floats = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return normed


def divergence(p: Floats, q: Floats) -> Floats:
    """KL(p || q) in nats for each row; p, q are log-probabilities over the same tokens."""
    each: Floats = (np.exp(p) * (p - q)).sum(axis=-1)
    return each


def agreement(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float:
    """Share of rows whose likeliest token is the same."""
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())


def nmse(wanted: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Squared error over the wanted values' squares, all rows together."""
    exact = wanted.astype(np.float64)
    return float(((got - exact) ** 2).sum() / (exact**2).sum())


@dataclass(frozen=True)
class Distance:
    """Of one runtime's logits from those it is compared with."""

    mean: float  # of the rows' divergences, nats
    median: float
    largest: float
    top1: float  # share of equal likeliest tokens

    def __str__(self) -> str:
        return (
            f"KL mean {self.mean:.2e}, median {self.median:.2e}, max {self.largest:.2e}; "
            f"top-1 {self.top1:.2%}"
        )


def distance(p: Floats, q: Floats) -> Distance:
    """KL(p || q) and agreement of log-probabilities."""
    kl = divergence(p, q)
    return Distance(float(kl.mean()), float(np.median(kl)), float(kl.max()), agreement(p, q))


# --- what a token was worth, and statistics of many ----------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where there is none to state.

    Errors take tokens as independent, as llama.cpp does.
    """

    value: float
    error: float | None = None


def mean(x: NDArray[Any]) -> Estimate:
    """The mean; error None for a single value."""
    n = len(x)
    return Estimate(float(x.mean()), float(x.std() / (n - 1) ** 0.5) if n > 1 else None)


def quantile(x: NDArray[Any], share: float) -> Estimate:
    """The value that `share` of x lie below, interpolated.

    Its error comes from no assumption about the distribution: the ranks one binomial standard
    deviation to either side, and half the distance between the values there.
    """
    width = (share * (1 - share) / len(x)) ** 0.5
    low, value, high = np.quantile(x, np.clip([share - width, share, share + width], 0, 1))
    return Estimate(float(value), float(high - low) / 2)


def exp_mean(x: NDArray[Any]) -> Estimate:
    """e to the mean: perplexity, where x are negative log-likelihoods."""
    of_log = mean(x)
    value = float(np.exp(of_log.value))
    return Estimate(value, None if of_log.error is None else value * of_log.error)


def root_mean_square(x: NDArray[Any]) -> Estimate:
    square = mean(x**2)
    value = square.value**0.5
    if square.error is None or value == 0:
        return Estimate(value, square.error)
    return Estimate(value, square.error / 2 / value)


@dataclass(frozen=True)
class Figures:
    """What perplexity and distance come to over some tokens; the latter None without a base."""

    tokens: int
    perplexity: Estimate
    base_perplexity: Estimate | None = None
    ratio: Estimate | None = None  # of the perplexities; its error knows that they are of one text
    kl_mean: Estimate | None = None  # KL(base || model), nats
    kl_median: Estimate | None = None
    kl_p99: Estimate | None = None
    kl_max: Estimate | None = None
    same_top: Estimate | None = None  # share of positions where both find one token likeliest
    delta_p_mean: Estimate | None = None  # of the probability of the text's token, model - base
    delta_p_rms: Estimate | None = None


@dataclass(frozen=True)
class Scores:
    """Of a text's tokens, each array (tokens,); those against a base are empty without one."""

    nll: Floats  # negative log-likelihood, nats
    base_nll: Floats
    kl: Floats
    same: NDArray[np.bool_]

    @staticmethod
    def of(
        logits: NDArray[np.float32],
        targets: NDArray[np.int64],
        base: NDArray[np.float32] | None = None,
    ) -> "Scores":
        """Of logits (n, vocab_size) and the n tokens that came; `base` are another's logits."""
        rows = np.arange(len(targets))
        q, none = log_probabilities(logits), np.zeros(0)
        if base is None:
            return Scores(-q[rows, targets], none, none, none.astype(bool))
        p = log_probabilities(base)
        same = base.argmax(axis=-1) == logits.argmax(axis=-1)
        return Scores(-q[rows, targets], -p[rows, targets], divergence(p, q), same)

    @staticmethod
    def joined(parts: "Sequence[Scores]") -> "Scores":
        return Scores(
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.base_nll for part in parts]),
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.same for part in parts]),
        )

    def where(self, chosen: NDArray[np.bool_]) -> "Scores":
        """Those of the tokens chosen."""
        if not len(self.kl):
            return Scores(self.nll[chosen], self.base_nll, self.kl, self.same)
        return Scores(self.nll[chosen], self.base_nll[chosen], self.kl[chosen], self.same[chosen])

    def figures(self) -> Figures:
        if not len(self.kl):
            return Figures(len(self.nll), exp_mean(self.nll))
        delta = np.exp(-self.nll) - np.exp(-self.base_nll)
        return Figures(
            tokens=len(self.nll),
            perplexity=exp_mean(self.nll),
            base_perplexity=exp_mean(self.base_nll),
            ratio=exp_mean(self.nll - self.base_nll),
            kl_mean=mean(self.kl),
            kl_median=quantile(self.kl, 0.5),
            kl_p99=quantile(self.kl, 0.99),
            kl_max=Estimate(float(self.kl.max())),
            same_top=mean(self.same),
            delta_p_mean=mean(delta),
            delta_p_rms=root_mean_square(delta),
        )
