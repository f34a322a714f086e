"""Choosing the next token from a model's logits, as a `Sampling` says.

Knows nothing about models, text or sessions: logits and recent ids in, one id and its log
probability out.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama import cuts
from edgellama.errors import NonFiniteError, ParameterError
from edgellama.noise import CHANCE, uniform
from edgellama.repetition import Dry, counted, penalized
from edgellama.runtimes.base import Likeliest
from edgellama.sampling import Sampling, checked_integer

Floats = NDArray[np.float32]
Scores = NDArray[np.floating[Any]]
Ids = NDArray[np.intp]

CUTS: dict[str, Callable[[Scores, Sampling], Ids]] = {
    "top_n_sigma": lambda scores, given: cuts.top_n_sigma(scores, given.top_n_sigma),
    "top_k": lambda scores, given: cuts.top_k(scores, given.top_k),
    "typical_p": lambda scores, given: cuts.typical_p(scores, given.typical_p),
    "top_p": lambda scores, given: cuts.top_p(scores, given.top_p),
    "min_p": lambda scores, given: cuts.min_p(scores, given.min_p),
    "xtc": lambda scores, given: cuts.xtc(scores, given.xtc_threshold),
}


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens still in the draw, and their scores: float32 until a temperature."""

    scores: Scores
    ids: Ids | None = None  # ascending; None: all

    def kept(self, which: Ids) -> "Candidates":
        """Only those at the ascending indices `which`."""
        if len(which) == len(self.scores):
            return self
        ids = which if self.ids is None else self.ids[which]
        return Candidates(self.scores[which], ids)

    def changed(self, ids: Ids, change: Callable[[Scores, Ids], Scores]) -> "Candidates":
        """With change(scores, which) for those of `ids` that are here; `which` indexes ids."""
        here, which = self._find(ids)
        if not len(here):
            return self
        new = change(self.scores[here].astype(np.float64), which)
        most = float(np.finfo(self.scores.dtype).max)
        scores = self.scores.copy()
        scores[here] = np.where(np.isneginf(new), new, new.clip(-most, most))
        return Candidates(scores, self.ids)

    def _find(self, ids: Ids) -> tuple[Ids, Ids]:
        """Where in `scores` each of `ids` is, and which of them are here."""
        if self.ids is None:
            return ids, np.arange(len(ids))
        at = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        which = np.flatnonzero(self.ids[at] == ids)
        return at[which], which

    def id(self, index: int) -> int:
        return index if self.ids is None else int(self.ids[index])


class Sampler:
    """Draws tokens as one `Sampling` says, for one vocabulary.

    A draw depends on the logits, the recent tokens, `seed` and the position alone, not on earlier
    draws: a reply that is cut and continued goes on as if it had not been cut. With mirostat it
    depends on `mu` too, which every draw changes.
    """

    def __init__(
        self, sampling: Sampling, vocab_size: int, pieces: Callable[[int], bytes] | None = None
    ) -> None:
        """`pieces` gives a token's bytes, in which DRY looks for its breakers; None: no breakers.

        Raises ParameterError for a biased id outside the vocabulary or if all are banned.
        """
        self.sampling, self.vocab_size = sampling, vocab_size
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.mu: float | None = None
        if sampling.mirostat:
            fresh = 2 * sampling.mirostat_tau
            self.mu = fresh if sampling.mirostat_mu is None else sampling.mirostat_mu
        for token in sampling.logit_bias:
            checked_integer("logit_bias id", token, 0, vocab_size - 1)
        if list(sampling.logit_bias.values()).count(-math.inf) == vocab_size:
            raise ParameterError(
                "logit_bias bans every token",
                field="logit_bias",
                value=sampling.logit_bias,
                allowed="at least one token above -inf",
            )
        self._dry = Dry(
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            sampling.dry_breakers if pieces else (),
            pieces or (lambda token: b""),
        )
        self._steps = [step for step in sampling.order if self._takes(step)]

    def _takes(self, step: str) -> bool:
        if step == "temperature":
            return self.sampling.does(step) and not self.sampling.greedy
        drawn = not self.sampling.greedy and not self.sampling.mirostat
        return self.sampling.does(step) and (drawn or step not in CUTS)

    @np.errstate(all="ignore")  # of the host's settings, some would raise; what is odd, we test
    def sample(self, logits: Floats, recent: Sequence[int], position: int) -> tuple[int, float]:
        """One token, and the natural logarithm of its probability under the raw logits.

        `logits` is float32 (vocab_size,), left unchanged; -inf among them is a token that cannot
        come. `recent` holds the ids before this token, oldest first; `position` is the token's
        own. Raises NonFiniteError for NaN or inf, or if no token is left that can come.
        """
        assert logits.shape == (self.vocab_size,)
        largest, spread = normalizer(logits)
        candidates = self._allowed(logits)
        for step in self._steps:
            candidates = self._after(step, candidates, recent, position)
        token = self._choose(candidates, position)
        return token, float(logits[token]) - largest - spread

    def takes(self, count: int) -> bool:
        """Whether the `count` likeliest tokens can be enough: nothing but a cut comes first."""
        given = self.sampling
        if given.logit_bias:
            return False
        if given.greedy:
            return not self._steps
        cut = {"min_p": True, "top_k": given.top_k < count}
        return bool(self._steps) and cut.get(self._steps[0], False)

    @np.errstate(all="ignore")
    def sample_few(
        self, few: Likeliest, recent: Sequence[int], position: int
    ) -> tuple[int, float] | None:
        """What `sample` gives for all logits, where `takes` holds; None if these do not decide it.

        They do if what the first cut keeps lies above the least of them: no token that is not
        here can be among it, and ties are where all of them can be seen.
        """
        if not math.isfinite(few.log_p):
            return None
        order, least = np.argsort(few.ids), float(few.logits.min())
        candidates = Candidates(few.logits[order], few.ids[order].astype(np.intp))
        kept = candidates.scores.max() if self.sampling.greedy else None
        for step in self._steps:
            candidates = self._after(step, candidates, recent, position)
            kept = candidates.scores.min() if kept is None else kept
        if kept is None or not float(kept) > least:
            return None
        token = self._choose(candidates, position)
        logit = float(few.logits[np.flatnonzero(few.ids == token)[0]])
        return token, few.log_p + logit - float(few.logits[0])

    def _allowed(self, logits: Floats) -> Candidates:
        """All tokens that can come, biased."""
        candidates = Candidates(logits)
        bias = self.sampling.logit_bias
        if bias:
            ids = np.fromiter(bias, np.intp, len(bias))
            added = np.fromiter(bias.values(), np.float64, len(bias))
            candidates = candidates.changed(ids, lambda scores, which: scores + added[which])
        if candidates.scores.min() > -math.inf:
            return candidates
        possible = np.flatnonzero(candidates.scores > -math.inf)
        if not len(possible):
            problem = "no token can come: the logits and logit_bias rule out every one"
            raise NonFiniteError(problem, field="logits", value=-math.inf)
        return candidates.kept(possible)

    def _after(
        self, step: str, candidates: Candidates, recent: Sequence[int], position: int
    ) -> Candidates:
        given = self.sampling
        if step == "penalties":
            return self._penalized(candidates, newest(recent, given.penalty_window))
        if step == "dry":
            ids, losses = self._dry.lowered(newest(recent, given.dry_window)[::-1])
            return candidates.changed(ids, lambda scores, which: scores - losses[which])
        if step == "temperature":
            return Candidates(cuts.warmed(candidates.scores, given.temperature), candidates.ids)
        if step == "xtc" and uniform(self.seed, position, CHANCE) >= given.xtc_probability:
            return candidates
        return candidates.kept(CUTS[step](candidates.scores, given))

    def _penalized(self, candidates: Candidates, recent: list[int]) -> Candidates:
        given = self.sampling
        ids, times = counted(recent)
        return candidates.changed(
            ids,
            lambda scores, which: penalized(
                scores,
                times[which],
                given.repetition_penalty,
                given.presence_penalty,
                given.frequency_penalty,
            ),
        )

    def _choose(self, candidates: Candidates, position: int) -> int:
        if self.sampling.greedy:
            return candidates.id(int(candidates.scores.argmax()))
        number = uniform(self.seed, position)
        if self.mu is None:
            return candidates.id(cuts.draw(candidates.scores, number))
        candidates = candidates.kept(cuts.surprising_at_most(candidates.scores, self.mu))
        index = cuts.draw(candidates.scores, number)
        odds = cuts.weights(candidates.scores)
        surprise = math.log2(float(odds.sum(dtype=np.float64)) / float(odds[index]))
        self.mu -= self.sampling.mirostat_eta * (surprise - self.sampling.mirostat_tau)
        return candidates.id(index)


def newest(recent: Sequence[int], count: int) -> list[int]:
    """The last `count` ids, newest first."""
    return list(islice(reversed(recent), count))


@np.errstate(all="ignore")  # logits further apart than float32 reaches: -inf, weight 0
def normalizer(logits: Floats) -> tuple[float, float]:
    """The largest logit, and the log of the sum of exp(logit - largest); their sum normalizes.

    Apart, because adding them up would lose the second next to a huge first. Raises NonFiniteError
    for NaN or inf, or if all are -inf.
    """
    largest = float(logits.max())  # NaN shows up in it
    if not math.isfinite(largest):
        worst = np.flatnonzero(~(logits < math.inf))
        at = int(worst[0]) if len(worst) else 0
        raise NonFiniteError(
            f"the logit of token {at} is {logits[at]}",
            field="logits",
            value=float(logits[at]),
            hint="The weights are damaged or the model overflows in this precision",
        )
    shifted = np.exp(logits - logits.dtype.type(largest))
    return largest, math.log(float(shifted.sum()))
