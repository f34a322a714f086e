"""Sampling: every step against a plain re-telling of its definition, and what it refuses."""

import math
from collections import deque
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from edgellama.errors import NonFiniteError, ParameterError
from edgellama.sampling import Sampler, Sampling, candidates, draw, largest_ids, uniform

VOCAB = 50
PLAIN = Sampling(temperature=1, top_k=0, top_p=1, min_p=0, seed=1)

whole = st.integers(-8, 8).map(float)  # many ties
finite = st.floats(-(2.0**100), 2.0**100, width=32)
logit_arrays = st.lists(whole | finite, min_size=1, max_size=60).map(
    lambda values: np.array(values, np.float32)
)


def logits_of(seed, size=VOCAB):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3


def tokens_of(sampling, logits, count, recent=()):
    sampler = Sampler(sampling, len(logits))
    return [sampler.sample(logits, recent, position)[0] for position in range(count)]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())


@given(logit_arrays, st.integers(0, 70))
def test_top_k_keeps_the_largest_and_the_lowest_ids_of_ties(logits, k):
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert list(largest_ids(logits, k)) == sorted(ranked[: k or None])


@pytest.mark.parametrize("size", [1, 2, 39, 40, 41, 160, 319, 320, 321, 1000, 49152])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_top_k_of_any_size(size, k):
    for logits in (logits_of(size, size), np.zeros(size, np.float32), logits_of(1, size).round()):
        ranked = np.lexsort((np.arange(size), -logits))[:k]
        assert list(largest_ids(logits, k)) == sorted(ranked)


def naive_candidates(logits, top_k, top_p, min_p):
    """The three cuts in the documented order, each told as its definition says."""
    logits = logits.astype(np.float64)
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    odds = np.exp(logits[kept] - logits[kept[0]])
    if top_p < 1:
        reached, count, mass = 0.0, 0, odds.sum()
        while reached < top_p * mass and count < len(odds):
            reached += odds[count]
            count += 1
        kept, odds = kept[:count], odds[:count]
    return {i for i, value in zip(kept, odds, strict=True) if value >= min_p}


cuts = st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.95, 0.999])


@given(logit_arrays, st.sampled_from([0, 1, 5, 40]), cuts | st.just(1.0), cuts | st.just(0.0))
def test_the_cuts_are_the_ones_defined(logits, top_k, top_p, min_p):
    logits = np.clip(logits, -60, 60) + np.float32(0.01) * np.arange(len(logits), dtype=np.float32)
    ids, odds = candidates(logits, top_k, top_p, min_p)
    assert set(ids.tolist()) == naive_candidates(logits, top_k, top_p, min_p)
    assert np.allclose(odds, logits[ids].astype(np.float64) - logits.max())


@given(
    logit_arrays,
    st.integers(0, 70),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
    st.floats(0, 100),
    st.integers(0, 2**64 - 1),
)
def test_any_setting_draws_a_candidate(logits, top_k, top_p, min_p, temperature, seed):
    sampling = Sampling(temperature, top_k, top_p, min_p, seed=seed)
    token, logprob = Sampler(sampling, len(logits)).sample(logits, [], 3)
    ids, odds = candidates(logits, top_k, top_p, min_p)
    assert len(ids) >= 1 and odds.max() == 0
    assert token in ids
    assert logprob == pytest.approx(log_softmax(logits)[token], rel=1e-5, abs=1e-5)


def test_draws_follow_the_probabilities():
    logits = logits_of(3, 8)
    for temperature in (0.5, 1.0, 2.0):
        drawn = tokens_of(replace(PLAIN, temperature=temperature), logits, 4000)
        shares = np.bincount(drawn, minlength=8) / len(drawn)
        expected = np.exp(log_softmax(logits / np.float32(temperature)))
        assert np.abs(shares - expected).max() < 0.04  # five standard deviations


@given(st.lists(st.floats(-800, 0), min_size=1, max_size=30), st.floats(1e-300, 100))
def test_a_larger_number_draws_a_later_candidate_and_never_an_impossible_one(odds, temperature):
    odds = np.array([0.0, *odds, -math.inf])
    last = -1
    for number in (0.0, 0.3, 0.7, 1 - 2**-53):
        index = draw(odds, temperature, number)
        assert index >= last and math.exp(odds[index] / temperature) > 0
        last = index


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-30, 1e-6])
def test_cold_is_greedy_and_ties_go_to_the_lowest_id_when_greedy(temperature):
    logits = logits_of(4)
    assert set(tokens_of(Sampling(temperature), logits, 20)) == {int(logits.argmax())}
    assert tokens_of(Sampling(0), np.zeros(9, np.float32), 3) == [0, 0, 0]


@pytest.mark.parametrize(
    "logits",
    [
        [3e38, -3e38, 3e38],
        [-3.4e38, 3.4e38],
        [0.0] * 1000,
        [-3e38] * 5,
        [7.0],
    ],
)
def test_extreme_logits(logits):
    logits = np.array(logits, np.float32)
    for sampling in (Sampling(seed=2), PLAIN, Sampling(0), Sampling(repetition_penalty=0.01)):
        token, logprob = Sampler(sampling, len(logits)).sample(logits, [0], 0)
        assert logits[token] == logits.max() and math.isfinite(logprob)
        assert logprob == pytest.approx(-math.log((logits == logits.max()).sum()), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    logits = logits_of(5)
    logits[17] = bad
    with pytest.raises(NonFiniteError, match=f"the logit of token 17 is {bad}"):
        Sampler(Sampling(temperature), VOCAB).sample(logits, [], 0)


def test_a_draw_depends_on_seed_and_position_alone():
    sampler, logits = Sampler(replace(PLAIN, seed=7), VOCAB), np.zeros(VOCAB, np.float32)
    forward = [sampler.sample(logits, [], position)[0] for position in range(30)]
    backward = [sampler.sample(logits, [], position)[0] for position in reversed(range(30))]
    assert forward == backward[::-1] and len(set(forward)) > 10
    assert forward != tokens_of(replace(PLAIN, seed=8), logits, 30)
    numbers = [uniform(2**64 - 1, 2**24 + position) for position in range(1000)]
    assert 0.45 < np.mean(numbers) < 0.55 and min(numbers) >= 0 and max(numbers) < 1


def test_known_draws_stay_the_same():
    """A seed in a bug report must mean the same in every version and on every machine."""
    assert [uniform(1, 0), uniform(1, 1), uniform(2, 0)] == [
        0.3035680343067586,
        0.9002684531124185,
        0.48891550429583774,
    ]


def test_a_fresh_seed_is_reported():
    seeds = {Sampler(Sampling(), VOCAB).seed for _ in range(5)}
    assert len(seeds) > 1
    (logits,) = (np.zeros(VOCAB, np.float32),)
    sampler = Sampler(replace(PLAIN, seed=None), VOCAB)
    drawn = [sampler.sample(logits, [], position)[0] for position in range(20)]
    assert tokens_of(replace(PLAIN, seed=sampler.seed), logits, 20) == drawn


def test_penalties_are_the_documented_ones():
    logits = np.array([4.0, -1.0, 3.9, -9.0], np.float32)
    greedy = Sampling(0)

    def chosen(recent, **penalties):
        return Sampler(replace(greedy, **penalties), 4).sample(logits, recent, 0)[0]

    assert chosen([0]) == 0
    assert chosen([0], repetition_penalty=1.02) == 0  # 3.92
    assert chosen([0], repetition_penalty=1.03) == 2  # 3.88
    assert chosen([0], presence_penalty=0.05) == 0
    assert chosen([0, 0, 0], presence_penalty=0.09) == 0  # once, however often
    assert chosen([0, 0, 0], frequency_penalty=0.04) == 2  # three times
    assert chosen(deque([0, 1, 1, 1]), presence_penalty=9, penalty_window=3) == 0
    assert chosen([0], presence_penalty=9, penalty_window=0) == 0
    # a negative logit is multiplied, so it falls too: -1 to -10, below -9
    below = np.array([-1.0, -9.0], np.float32)
    assert Sampler(Sampling(0, repetition_penalty=10), 2).sample(below, [0], 0)[0] == 1
    assert logits.tolist() == [4.0, -1.0, np.float32(3.9), -9.0]  # left as they were


def test_logprob_is_of_the_raw_logits():
    logits = logits_of(6)
    sampling = Sampling(0.5, logit_bias={3: 100.0}, repetition_penalty=2, seed=1)
    token, logprob = Sampler(sampling, VOCAB).sample(logits, [1, 2], 0)
    assert token == 3 and logprob == pytest.approx(log_softmax(logits)[3], abs=1e-5)


def test_banned_tokens_are_never_drawn():
    logits = np.zeros(6, np.float32)
    banned = {0: -math.inf, 1: -math.inf, 5: -math.inf}
    for sampling in (Sampling(100, 0, 1, 0), Sampling(0), Sampling(1, 40, 0.9, 0.5)):
        drawn = tokens_of(replace(sampling, logit_bias=banned, seed=1), logits, 200)
        assert set(drawn) <= {2, 3, 4}
    with pytest.raises(ParameterError, match="bans every token"):
        Sampler(Sampling(logit_bias=dict.fromkeys(range(6), -math.inf)), 6)
    with pytest.raises(ParameterError, match=r"logit_bias id is 6; expected an integer 0\.\.5"):
        Sampler(Sampling(logit_bias={6: 1.0}), 6)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [math.nan, math.inf, -1, -1e-9, 100.1, "hot", True, None, 1j],
        "top_k": [-5, 2**40, 1.0, True, "4", None, 10**400],
        "top_p": [0, 1.1, math.nan, -3, True, "1", None],
        "min_p": [-0.1, 1.1, math.nan, False, None],
        "repetition_penalty": [0, -1, math.nan, math.inf, True, None],
        "presence_penalty": [math.nan, 101, -math.inf, True],
        "frequency_penalty": [math.nan, -101, math.inf, "x"],
        "penalty_window": [-1, 2**40, 1.5, True, None],
        "seed": [-1, 2**64, 1.0, True, "1"],
        "logit_bias": [[], None, {"a": 1.0}, {1.0: 1.0}, {-1: 1.0}, {True: 1.0}, {2**40: 1.0}]
        + [{1: value} for value in (math.nan, math.inf, 1e7, "1", True, None)],
    }.items(),
)
def test_values_out_of_range_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ParameterError) as caught:
            Sampling(**{name: value})
        assert str(caught.value).startswith(name) and "; expected " in str(caught.value)
        assert caught.value.field.startswith(name) and caught.value.allowed


def test_unknown_samplers_are_refused():
    with pytest.raises(TypeError, match="typical_p"):
        Sampling(typical_p=0.9)


def test_numbers_of_numpy_are_taken_and_kept_plain():
    sampling = Sampling(np.float32(0.5), np.int64(5), logit_bias={np.int32(3): np.float64(1)})
    plain = Sampling(0.5, 5, logit_bias={3: 1.0})
    assert sampling == plain and hash(sampling) == hash(plain)
    assert type(sampling.temperature) is float and type(sampling.top_k) is int
    assert asdict(sampling)["logit_bias"] == {3: 1.0}


def test_settings_cannot_change_afterwards():
    bias = {1: 2.0}
    sampling = Sampling(logit_bias=bias)
    bias[2] = 5.0
    assert sampling.logit_bias == {1: 2.0}
    with pytest.raises(AttributeError):
        sampling.temperature = 2.0


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_a_full_vocabulary_gives_the_defined_candidates(seed):
    logits = logits_of(seed, 3000)
    for top_k, top_p, min_p in ((40, 0.95, 0.05), (0, 0.9, 0.0), (0, 1.0, 0.01), (3, 0.5, 0.5)):
        ids, _ = candidates(logits, top_k, top_p, min_p)
        assert set(ids.tolist()) == naive_candidates(logits, top_k, top_p, min_p)
