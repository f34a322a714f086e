"""How the next token is to be chosen: the settings, and what they may be.

Knows nothing about logits or models; `sampler.py` follows these settings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from edgellama.config import MOST_CONTEXT, MOST_VOCAB
from edgellama.errors import ParameterError, as_integer, shown

MOST_BIAS = 1e6
LARGEST_SEED = 2**64 - 1
MOST_BREAKERS, LONGEST_BREAKER = 64, 64  # breakers, and characters of one
COLDEST = 1e-30  # what is below is 0: no two logits are so close that both could still be drawn

# The steps in the order of llama.cpp's command line, and the settings at which each does nothing.
STEPS: dict[str, dict[str, float]] = {
    "penalties": {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0},
    "dry": {"dry_multiplier": 0},
    "top_n_sigma": {"top_n_sigma": 0},
    "top_k": {"top_k": 0},
    "typical_p": {"typical_p": 1},
    "top_p": {"top_p": 1},
    "min_p": {"min_p": 0},
    "xtc": {"xtc_probability": 0},
    "temperature": {"temperature": 1},
}
ORDER = tuple(STEPS)

_ABOVE = object()  # the lower end itself is excluded
_NUMBERS: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 100),
    "top_p": (0, 1, _ABOVE),
    "min_p": (0, 1),
    "typical_p": (0, 1, _ABOVE),
    "repetition_penalty": (0, 100, _ABOVE),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "top_n_sigma": (0, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1, _ABOVE),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 1),
}
_INTEGERS = {
    "top_k": (0, MOST_VOCAB),
    "penalty_window": (0, MOST_CONTEXT),
    "dry_allowed_length": (1, MOST_CONTEXT),
    "dry_window": (0, MOST_CONTEXT),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; checked when made, ParameterError names what is wrong.

    `logit_bias` adds to the logits of ids, before all else; -inf bans an id. Then come the steps
    of `order`, by default llama.cpp's; what `order` leaves out is not done:

    - "penalties" look at the last `penalty_window` tokens, the prompt's included: a token's logit
      is divided by `repetition_penalty` if above 0, else multiplied (arXiv:1909.05858), then
      lowered by `presence_penalty`, and by `frequency_penalty` for each occurrence.
    - "dry" lowers the tokens that would continue a repetition: where the last n tokens,
      `dry_allowed_length` or more, stood before within the last `dry_window`, the token that came
      next there loses `dry_multiplier` * `dry_base` ** (n - dry_allowed_length); 0 is off. A text
      of `dry_breakers` ends what counts as repeated, and tokens that hold one are spared.
    - "top_n_sigma" keeps the logits within that many standard deviations of the largest
      (arXiv:2411.07641); 0 is off.
    - "top_k" keeps the k likeliest tokens; 0 is off. Ties go to the lowest ids.
    - "typical_p" keeps the fewest tokens, those first whose surprise is nearest to the entropy,
      whose probabilities reach p (arXiv:2202.00666); 1 is off.
    - "top_p" keeps the fewest likeliest tokens whose probabilities reach p (arXiv:1904.09751).
    - "min_p" keeps those at least that fraction as likely as the likeliest (arXiv:2407.01082).
    - "xtc" drops, with `xtc_probability`, all tokens of at least `xtc_threshold` but the least
      likely of them; 0 is off.
    - "temperature" divides the logits; probabilities are those of what the steps before left. 0
      takes the likeliest token after penalties and DRY, whatever the other steps say; ties go to
      the lowest id.

    `mirostat=2` is version 2 of arXiv:2007.14966, which holds a reply's surprise near
    `mirostat_tau` bits, correcting itself by `mirostat_eta` of the error. It takes the place of
    all steps but penalties, DRY and temperature. Its state goes from token to token: `mirostat_mu`
    continues from the one that the last chunk's usage reports; None is a fresh one, 2 * tau.

    The same `seed` gives the same reply to the same prompt, and its rest to a prompt that holds
    its beginning; None draws a fresh one, which the last chunk's usage reports.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = 64
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    mirostat_mu: float | None = None
    order: tuple[str, ...] = ORDER

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, bounds in _NUMBERS.items():
            keep(name, _number(name, getattr(self, name), *bounds))
        for name, (low, high) in _INTEGERS.items():
            keep(name, checked_integer(name, getattr(self, name), low, high))
        keep("logit_bias", _bias(self.logit_bias))
        keep("dry_breakers", _breakers(self.dry_breakers))
        if checked_integer("mirostat", self.mirostat, 0, 2) == 1:
            raise refused("mirostat", 1, "0 (off) or 2 (its second version)")
        keep("mirostat", int(self.mirostat))
        if self.mirostat_mu is not None:
            keep("mirostat_mu", _number("mirostat_mu", self.mirostat_mu, -1e9, 1e9))
        if self.seed is not None:
            keep("seed", checked_integer("seed", self.seed, 0, LARGEST_SEED))
        keep("order", _order(self.order))
        self._check_left_out()

    def _check_left_out(self) -> None:
        """A setting that was made, and that `order` would leave without any effect."""
        defaults = {each.name: each.default for each in fields(self)}
        for step in ORDER:
            for name, off in STEPS[step].items():
                value = getattr(self, name)
                if step not in self.order and value not in (off, defaults[name]):
                    problem = f"{name} is {value:g}, but order leaves out {step}"
                    allowed = f"{off:g}, or an order with {step}"
                    raise ParameterError(problem, field=name, value=value, allowed=allowed)

    def does(self, step: str) -> bool:
        """Whether this step of `order` changes anything."""
        windows = {"penalties": self.penalty_window, "dry": self.dry_window}
        idle = all(getattr(self, name) == off for name, off in STEPS[step].items())
        return step in self.order and not idle and windows.get(step, 1) > 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < COLDEST

    @property
    def window(self) -> int:
        """How many of the tokens before have a say."""
        penalties = self.penalty_window if self.does("penalties") else 0
        return max(penalties, self.dry_window if self.does("dry") else 0)


def refused(name: str, value: object, allowed: str) -> ParameterError:
    problem = f"{name} is {shown(value)}; expected {allowed}"
    return ParameterError(problem, field=name, value=value, allowed=allowed)


def _number(name: str, value: Any, low: float, high: float, above: object = None) -> float:
    """A finite float in low..high, `low` itself excluded with _ABOVE."""
    exclusive = above is _ABOVE
    start = f"a number {'above ' if exclusive else ''}{low:g}"
    allowed = f"{start}{', up to ' if exclusive else '..'}{high:g}"
    try:
        real = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if real else math.nan
    except OverflowError:
        number = math.nan
    if not low <= number <= high or (exclusive and number == low):  # NaN fails the first test
        raise refused(name, value, allowed)
    return number


def checked_integer(name: str, value: Any, low: int, high: int) -> int:
    allowed = f"an integer {low}..{high}"
    whole = as_integer(value)
    if whole is None or not low <= whole <= high:
        raise refused(name, value, allowed)
    return whole


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


def _breakers(breakers: Any) -> tuple[str, ...]:
    allowed = f"up to {MOST_BREAKERS} texts of 1..{LONGEST_BREAKER} characters"
    if not isinstance(breakers, (tuple, list)) or len(breakers) > MOST_BREAKERS:
        raise refused("dry_breakers", breakers, allowed)
    for text in breakers:
        if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_BREAKER:
            raise refused("dry_breakers", text, allowed)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise refused("dry_breakers", text, "valid Unicode")
    return tuple(breakers)


def _order(order: Any) -> tuple[str, ...]:
    allowed = f"each at most once of {', '.join(ORDER)}"
    if not isinstance(order, (tuple, list)):
        raise refused("order", order, allowed)
    for step in order:
        if not isinstance(step, str) or step not in STEPS or order.count(step) > 1:
            raise refused("order", step, allowed)
    return tuple(order)
