"""Choosing among the likeliest tokens alone: what all logits would give, or nothing."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from samplinghelp import logits_of

from edgellama.runtimes.base import Likeliest
from edgellama.sampler import Sampler, normalizer
from edgellama.sampling import ORDER, Sampling

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "default": {},
    "one": {"top_k": 1},
    "few": {"top_k": 5},
    "hot": {"top_k": 15, "temperature": 3.0, "top_p": 1.0},
    "typical": {"top_k": 12, "typical_p": 0.6},
    "xtc": {"top_k": 12, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    "min_p": {"top_k": 0, "top_p": 1.0, "min_p": 0.2},
    "low min_p": {"top_k": 0, "top_p": 1.0, "min_p": 1e-4},
    "turned": {"top_k": 9, "order": ("top_k", "temperature", "top_p", "min_p")},
    "late penalty": {"top_k": 9, "presence_penalty": 1.0, "order": ("top_k", "penalties")},
}


def likeliest(logits: np.ndarray, count: int, ties: np.random.Generator) -> Likeliest:
    """As a device gives them: which of equal tokens come, and in which order, is up to it."""
    order = np.lexsort((ties.permutation(len(logits)), -logits))[:count]
    largest, spread = normalizer(logits)
    log_p = float(logits[order[0]]) - largest - spread
    return Likeliest(order.astype(np.int64), logits[order], log_p)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 9999),
    st.sampled_from([20, 300, 5000]),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([0, 1, 8]),  # levels in a unit, so that there are ties
    st.sampled_from(list(SETTINGS)),
    st.lists(st.integers(0, 19), max_size=8),
)
def test_same_token_as_of_all_logits(
    seed: int, size: int, count: int, levels: int, name: str, recent: Sequence[int]
) -> None:
    logits, count = logits_of(seed, size), min(count, size)
    if levels:
        logits = np.round(logits * levels) / np.float32(levels)
    sampler = Sampler(Sampling(seed=seed, **SETTINGS[name]), size)
    few = likeliest(logits, count, np.random.default_rng(seed))
    if not sampler.takes(count):
        return
    for position in range(5):
        found = sampler.sample_few(few, recent, position)
        token, logprob = sampler.sample(logits, recent, position)
        if found is not None:
            assert found[0] == token and found[1] == pytest.approx(logprob, abs=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_they_do_decide(name: str) -> None:
    """The test above would hold too if nothing were ever decided."""
    sampler, decided = Sampler(Sampling(seed=3, **SETTINGS[name]), 5000), 0
    for seed in range(10):
        few = likeliest(logits_of(seed, 5000), 64, np.random.default_rng(seed))
        assert sampler.takes(64)
        decided += sampler.sample_few(few, [], seed) is not None
    assert decided == (0 if name == "low min_p" else 10)


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": {3: 1.0}},
        {"logit_bias": {3: 1.0}, "temperature": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5, "temperature": 0},
        {"dry_multiplier": 0.8},
        {"dry_multiplier": 0.8, "temperature": 0},
        {"top_k": 0},
        {"top_k": 64},
        {"top_k": 0, "min_p": 0.0},
        {"top_n_sigma": 1.0},
        {"mirostat": 2},
        {"order": tuple(reversed(ORDER))},
        {"order": ()},
    ],
)
def test_what_needs_all_logits(given: dict[str, Any]) -> None:
    assert not Sampler(Sampling(**given), 300).takes(64)


def test_ties_at_the_edge_are_not_decided() -> None:
    logits = np.zeros(100, np.float32)
    logits[:4] = 3
    ties = np.random.default_rng(0)
    greedy, four, five = (
        Sampler(Sampling(**{"seed": 1, "top_p": 1.0, "min_p": 0.0} | more), 100)
        for more in ({"temperature": 0}, {"top_k": 4}, {"top_k": 5})
    )
    assert greedy.sample_few(likeliest(logits, 4, ties), [], 0) is None
    found = greedy.sample_few(likeliest(logits, 6, ties), [], 0)
    assert found is not None and found[0] == 0
    assert four.sample_few(likeliest(logits, 6, ties), [], 0) is not None
    assert five.sample_few(likeliest(logits, 6, ties), [], 0) is None


@pytest.mark.parametrize("log_p", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_to_all_logits(log_p: float) -> None:
    few = Likeliest(np.arange(4), np.array([4, 3, 2, 1], np.float32), log_p)
    assert Sampler(Sampling(temperature=0), 9).sample_few(few, [], 0) is None
    impossible = Likeliest(np.arange(4), np.array([4, 3, -np.inf, -np.inf], np.float32), -0.1)
    assert Sampler(Sampling(top_k=3), 9).sample_few(impossible, [], 0) is None
