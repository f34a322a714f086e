"""Choosing the next token from a model's logits.

Knows nothing about models, text or sessions: logits and recent ids in, one id and its log
probability out. The order of the steps is llama.cpp's: logit bias, penalties, top_k, top_p, min_p,
temperature, draw.
"""

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from edgellama.config import MOST_CONTEXT, MOST_VOCAB
from edgellama.errors import NonFiniteError, ParameterError, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Odds = NDArray[np.float64]
    Ids = NDArray[np.intp]

MOST_BIAS = 1e6
LARGEST_SEED = 2**64 - 1
STRIPES = 4  # top_k looks at vocab_size / (STRIPES * k) logits at a time


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; checked when made, ParameterError names what is wrong.

    `temperature` 0 takes the likeliest token, whatever the limits below say; ties go to the lowest
    id. `top_k` keeps the k likeliest tokens (0: all), `top_p` the fewest of those whose
    probabilities reach p (arXiv:1904.09751), `min_p` those at least that fraction as likely as the
    likeliest (arXiv:2407.01082).

    The penalties look at the last `penalty_window` tokens, the prompt's included: a token's logit
    is divided by `repetition_penalty` if above 0, else multiplied (arXiv:1909.05858), then lowered
    by `presence_penalty`, and by `frequency_penalty` for each occurrence.

    `logit_bias` adds to the logits of ids; -inf bans an id. The same `seed` gives the same reply
    to the same prompt; None draws a fresh one, which the last chunk's usage reports.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        keep("temperature", _number("temperature", self.temperature, 0, 100))
        keep("top_k", checked_integer("top_k", self.top_k, 0, MOST_VOCAB))
        keep("top_p", _number("top_p", self.top_p, 0, 1, above=True))
        keep("min_p", _number("min_p", self.min_p, 0, 1))
        penalty = _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        keep("repetition_penalty", penalty)
        keep("presence_penalty", _number("presence_penalty", self.presence_penalty, -100, 100))
        keep("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -100, 100))
        keep(
            "penalty_window",
            checked_integer("penalty_window", self.penalty_window, 0, MOST_CONTEXT),
        )
        keep("logit_bias", _bias(self.logit_bias))
        if self.seed is not None:
            keep("seed", checked_integer("seed", self.seed, 0, LARGEST_SEED))

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens matter at all."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.penalty_window > 0 and penalties != (1.0, 0.0, 0.0)


def refused(name: str, value: object, allowed: str) -> ParameterError:
    problem = f"{name} is {shown(value)}; expected {allowed}"
    return ParameterError(problem, field=name, value=value, allowed=allowed)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """A finite float in low..high, `low` itself excluded with `above`."""
    allowed = f"a number {'above ' if above else ''}{low:g}{', up to ' if above else '..'}{high:g}"
    try:
        real = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if real else math.nan
    except OverflowError:
        number = math.nan
    if not low <= number <= high or (above and number == low):  # NaN fails the first test
        raise refused(name, value, allowed)
    return number


def checked_integer(name: str, value: Any, low: int, high: int) -> int:
    allowed = f"an integer {low}..{high}"
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:
        raise refused(name, value, allowed)
    return int(value)


def _bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise refused("logit_bias", bias, "a mapping from token id to number")
    checked = {}
    for token, value in bias.items():
        token = checked_integer("logit_bias id", token, 0, MOST_VOCAB - 1)
        name = f"logit_bias[{token}]"
        banned = isinstance(value, Real) and value == -math.inf
        checked[token] = -math.inf if banned else _number(name, value, -MOST_BIAS, MOST_BIAS)
    return checked


class Sampler:
    """Draws tokens as one `Sampling` says, for one vocabulary.

    A draw depends on the logits, the recent tokens, `seed` and the position alone, not on earlier
    draws: a reply that is cut and continued goes on as if it had not been cut.
    """

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        """Raises ParameterError for a biased id outside the vocabulary or if all are banned."""
        self.sampling, self.vocab_size = sampling, vocab_size
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        for token in sampling.logit_bias:
            checked_integer("logit_bias id", token, 0, vocab_size - 1)
        if list(sampling.logit_bias.values()).count(-math.inf) == vocab_size:
            raise ParameterError("logit_bias bans every token", field="logit_bias")

    def sample(self, logits: "Floats", recent: Sequence[int], position: int) -> tuple[int, float]:
        """One token, and the natural logarithm of its probability under the raw logits.

        `logits` is float32 (vocab_size,), left unchanged; `recent` holds the ids before this
        token, oldest first; `position` is the token's own. Raises NonFiniteError.
        """
        assert logits.shape == (self.vocab_size,)
        sampling = self.sampling
        largest, spread = normalizer(logits)
        scores: Floats = logits
        if sampling.logit_bias:
            scores = biased(scores, sampling.logit_bias)
        if sampling.penalized:
            window = islice(reversed(recent), sampling.penalty_window)
            scores = penalized(scores, window, sampling)
        token = self._choose(scores, position)
        return token, float(logits[token]) - largest - spread

    def _choose(self, scores: "Floats", position: int) -> int:
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(scores.argmax())
        ids, odds = candidates(scores, sampling.top_k, sampling.top_p, sampling.min_p)
        return int(ids[draw(odds, sampling.temperature, uniform(self.seed, position))])


def normalizer(logits: "Floats") -> tuple[float, float]:
    """The largest logit, and the log of the sum of exp(logit - largest); their sum normalizes.

    Apart, because adding them up would lose the second next to a huge first. Raises NonFiniteError
    unless all logits are finite.
    """
    import numpy as np

    largest, smallest = float(logits.max()), float(logits.min())  # NaN shows up in both
    if not (math.isfinite(largest) and math.isfinite(smallest)):
        at = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise NonFiniteError(
            f"the logit of token {at} is {logits[at]}",
            field="logits",
            value=float(logits[at]),
            hint="The weights are damaged or the model overflows in this precision",
        )
    if math.isinf(largest - smallest) or largest - smallest > 3e38:  # past float32
        return largest, math.log(float(np.exp(logits.astype(np.float64) - largest).sum()))
    shifted = np.exp(logits - logits.dtype.type(largest))
    return largest, math.log(float(shifted.sum()))


def biased(logits: "Floats", bias: Mapping[int, float]) -> "Floats":
    """A copy of the logits with `bias` added; -inf bans."""
    import numpy as np

    ids = np.fromiter(bias, np.intp, len(bias))
    added = np.fromiter(bias.values(), np.float64, len(bias))
    return _replaced(logits, ids, logits[ids].astype(np.float64) + added)


def penalized(logits: "Floats", recent: Iterable[int], sampling: Sampling) -> "Floats":
    """A copy of the logits with the three penalties taken off the tokens in `recent`."""
    import numpy as np

    counts = Counter(recent)
    ids = np.fromiter(counts, np.intp, len(counts))
    times = np.fromiter(counts.values(), np.float64, len(counts))
    seen, repetition = logits[ids].astype(np.float64), sampling.repetition_penalty
    seen = np.where(seen > 0, seen / repetition, seen * repetition)
    lowered = seen - sampling.presence_penalty - sampling.frequency_penalty * times
    return _replaced(logits, ids, lowered)


def _replaced(logits: "Floats", ids: "Ids", values: "NDArray[np.float64]") -> "Floats":
    """A copy with `values` at `ids`, kept within float32; -inf stays."""
    import numpy as np

    most = float(np.finfo(np.float32).max)
    copy = logits.copy()
    copy[ids] = np.where(np.isneginf(values), values, values.clip(-most, most))
    return copy


def candidates(scores: "Floats", top_k: int, top_p: float, min_p: float) -> tuple["Ids", "Odds"]:
    """What top_k, top_p and min_p leave: ids, and log(p / p of the likeliest) of each.

    Likeliest first, ties by id, if top_p is below 1; else by id. top_p and min_p each cut off an
    end of the same descending list, so min_p may go first: what is left is the same.
    """
    import numpy as np

    ids = largest_ids(scores, top_k)
    odds = scores[ids].astype(np.float64) - float(scores.max())
    if top_p == 1:
        return above(ids, odds, min_p)
    mass = float(np.exp(odds).sum())
    # All tokens less likely than this together weigh less than 1 - top_p: none is needed.
    needless = 0.5 * (1 - top_p) * mass / len(ids)
    ids, odds = above(ids, odds, max(min_p, needless))
    order = np.argsort(-odds, kind="stable")
    ids, odds = ids[order], odds[order]
    count = int(np.searchsorted(np.exp(odds).cumsum(), top_p * mass)) + 1
    return ids[:count], odds[:count]


def above(ids: "Ids", odds: "Odds", min_p: float) -> tuple["Ids", "Odds"]:
    """The tokens at least `min_p` times as likely as the likeliest, whose log odds are 0."""
    if min_p == 0:
        return ids, odds
    likely = odds >= math.log(min_p)
    return ids[likely], odds[likely]


def largest_ids(scores: "Floats", k: int) -> "Ids":
    """The ids of the `k` largest scores, ascending; all for k = 0. Ties go to the lowest ids.

    The k-th largest of any stripes' maxima is no larger than the k-th largest score, so only
    the few scores from there up need to be ordered.
    """
    import numpy as np

    if k == 0 or k >= len(scores):
        return np.arange(len(scores))
    width = len(scores) // (STRIPES * k)
    floor = scores[:k].min()
    if width > 1:
        stripes = scores[: width * STRIPES * k].reshape(width, STRIPES * k)
        floor = np.partition(stripes.max(axis=0), -k)[-k]
    ids = np.flatnonzero(scores >= floor)
    order = np.argsort(-scores[ids], kind="stable")
    kept: Ids = np.sort(ids[order[:k]])
    return kept


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on `seed` and `position` alone.

    Philox is a counter-based generator (Salmon et al., SC 2011): any position at the same cost.
    """
    from numpy.random import Generator, Philox

    return float(Generator(Philox(key=seed, counter=position)).random())


def draw(odds: "Odds", temperature: float, number: float) -> int:
    """The index that `number` in [0, 1) chooses, given log odds of which the largest is 0."""
    import numpy as np

    with np.errstate(over="ignore"):  # a tiny temperature: -inf, so only the likeliest are left
        reach = np.exp(odds / temperature).cumsum()
    last = int(np.searchsorted(reach, reach[-1]))  # what follows has no probability
    return min(int(np.searchsorted(reach, number * reach[-1], side="right")), last)
