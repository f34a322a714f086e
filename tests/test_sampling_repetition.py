"""Penalties and DRY: the formulas against plain Python, and the limits of what counts."""

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from edgellama.repetition import Dry, continuations
from edgellama.sampler import Sampler
from edgellama.sampling import Sampling

GREEDY = Sampling(0)
few_ids = st.lists(st.integers(0, 3), max_size=30)
TEXTS = [b"a", b"b", b" c", b"d:", b"<", b"br", b">", b"\xe2\x80", b"\x94", b""]


def moved(sampling, logits, recent, pieces=None):
    """The scores that the steps of `sampling` give to each token."""
    sampler = Sampler(sampling, len(logits), pieces)
    candidates = sampler._allowed(np.asarray(logits, np.float32))
    for step in sampler._steps:
        candidates = sampler._after(step, candidates, recent, 0)
    assert candidates.ids is None
    return candidates.scores


# --- penalties ------------------------------------------------------------------------------------


def penalties_twin(logits, recent, sampling):
    scores = [float(one) for one in logits]
    window = recent[-sampling.penalty_window :] if sampling.penalty_window else []
    for token in set(window):
        score = scores[token]
        divided = score / sampling.repetition_penalty
        score = divided if score > 0 else score * sampling.repetition_penalty
        score -= sampling.presence_penalty
        score -= sampling.frequency_penalty * window.count(token)
        scores[token] = score
    return scores


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4),
    few_ids,
    st.sampled_from([0.5, 1.0, 1.3]),
    st.sampled_from([-1.0, 0.0, 0.4]),
    st.sampled_from([-1.0, 0.0, 0.3]),
    st.sampled_from([0, 1, 5, 64]),
)
def test_penalties_are_the_formulas(logits, recent, repetition, presence, frequency, window):
    sampling = Sampling(
        0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        penalty_window=window,
    )
    got = moved(sampling, logits, recent)
    assert got == pytest.approx(penalties_twin(logits, recent, sampling), rel=1e-6, abs=1e-6)


def test_penalties_are_the_documented_ones():
    logits = np.array([4.0, -1.0, 3.9, -9.0], np.float32)

    def chosen(recent, **penalties):
        return Sampler(replace(GREEDY, **penalties), 4).sample(logits, recent, 0)[0]

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


def test_penalties_after_a_cut_touch_only_what_it_left():
    logits = np.array([5.0, 4.0, 3.0, 2.0], np.float32)
    late = Sampling(
        1.0, 2, 1.0, 0.0, presence_penalty=50.0, order=("top_k", "penalties", "temperature"), seed=1
    )
    sampler = Sampler(late, 4)
    drawn = [sampler.sample(logits, [0, 3], position)[0] for position in range(50)]
    assert set(drawn) == {1}  # with the penalties first, 2 would be kept beside it
    assert set(
        Sampler(replace(late, order=("penalties", "top_k", "temperature")), 4).sample(
            logits, [0, 3], position
        )[0]
        for position in range(50)
    ) == {1, 2}


def test_penalties_stay_within_float32():
    logits = np.array([3e38, -3e38, 1.0], np.float32)
    for penalty in (0.001, 100.0):
        got = moved(Sampling(0, repetition_penalty=penalty), logits, [0, 1, 2])
        assert np.isfinite(got).all()


# --- DRY ------------------------------------------------------------------------------------------


def repeats_twin(ids, longest):
    """By token: the most last tokens, `longest` at most, that it came after somewhere before."""
    found = {}
    for end in range(len(ids) - 1):
        length = 0
        while length < longest and end - length >= 0 and ids[end - length] == ids[-1 - length]:
            length += 1
        if length:
            found[ids[end + 1]] = max(length, found.get(ids[end + 1], 0))
    return found


@given(few_ids.filter(bool), st.integers(1, 6), st.integers(1, 12))
def test_continuations_are_found_with_the_longest_repetition(ids, shortest, longest):
    tokens, lengths = continuations(np.array(ids), shortest, longest)
    got = dict(zip(tokens.tolist(), lengths.tolist(), strict=True))
    wanted = repeats_twin(ids, longest)
    assert got == {token: n for token, n in wanted.items() if n >= shortest}


def dry_twin(recent, sampling, texts):
    """By token, what it loses."""
    window = list(recent)[-sampling.dry_window :] if sampling.dry_window else []
    breakers = [one.encode() for one in sampling.dry_breakers]
    text = b"".join(texts[token] for token in window)
    ends = [i + len(b) for b in breakers for i in range(len(text)) if text[i:].startswith(b)]
    unbroken, stop = 0, len(text)
    for token in reversed(window):
        start = stop - len(texts[token])
        if any(start < end <= stop for end in ends):
            break
        unbroken, stop = unbroken + 1, start
    losses = {}
    for token, length in repeats_twin(window, unbroken).items() if window else ():
        spared = any(breaker in texts[token] for breaker in breakers)
        if length >= sampling.dry_allowed_length and len(window) > sampling.dry_allowed_length:
            power = sampling.dry_base ** (length - sampling.dry_allowed_length)
            losses[token] = 0.0 if spared else sampling.dry_multiplier * power
    return losses


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), max_size=30),
    st.sampled_from([0, 3, 12, 64]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(), (":",), ("<br>", "\u2014"), (":", "b", "rest")]),
)
def test_dry_is_the_formula(recent, window, allowed, breakers):
    sampling = Sampling(
        0,
        dry_multiplier=0.7,
        dry_base=1.5,
        dry_allowed_length=allowed,
        dry_window=window,
        dry_breakers=breakers,
    )
    got = moved(sampling, np.zeros(len(TEXTS)), deque(recent), TEXTS.__getitem__)
    losses = dry_twin(recent, sampling, TEXTS)
    wanted = [-losses.get(token, 0.0) for token in range(len(TEXTS))]
    assert got == pytest.approx(wanted, rel=1e-6)


def test_dry_by_example():
    """After a b c, seen before with d next: d has come after three repeated tokens."""
    dry = Dry(0.8, 1.75, 2, (), lambda token: b"")
    tokens, losses = dry.lowered([1, 2, 3, 4, 9, 1, 2, 3])
    assert tokens.tolist() == [4] and losses == pytest.approx([0.8 * 1.75])
    assert dry.lowered([1, 2, 3, 4, 9, 8, 3])[0].tolist() == []  # one token is no repetition
    assert dry.lowered([])[0].tolist() == dry.lowered([5, 5])[0].tolist() == []
    tokens, losses = dry.lowered([5] * 7)  # six tokens repeat, overlapping
    assert tokens.tolist() == [5] and losses == pytest.approx([0.8 * 1.75**4])


def test_dry_ends_a_loop():
    """A model that would say the same four tokens for ever is led away from them."""
    vocab = 12
    table = np.zeros((vocab, vocab), np.float32)
    for token in range(4):
        table[token, (token + 1) % 4] = 8.0
    for multiplier in (0.0, 0.8):
        sampler = Sampler(Sampling(0, dry_multiplier=multiplier), vocab)
        ids = [0]
        while len(ids) < 40:
            ids.append(sampler.sample(table[ids[-1]], ids, len(ids))[0])
        assert (ids == [n % 4 for n in range(40)]) is (multiplier == 0)


def test_breakers_stop_the_counting_and_are_spared():
    texts = {1: b"a", 2: b"b", 3: b"\n", 4: b"c"}.__getitem__
    ids = [1, 3, 2, 4, 1, 3, 2]
    assert Dry(1, 2, 1, (), texts).lowered(ids)[1] == pytest.approx([2.0**2])
    assert Dry(1, 2, 1, ("\n",), texts).lowered(ids)[1] == pytest.approx([1.0])
    assert Dry(1, 2, 2, ("\n",), texts).lowered(ids)[0].tolist() == []
    assert Dry(1, 2, 1, ("\n",), texts).lowered([1, 3, 2, 1])[0].tolist() == []  # 3 is spared
    assert Dry(1, 2, 1, ("zzz",), texts).lowered([1, 3, 2, 1])[0].tolist() == [3]


@pytest.mark.parametrize("base", [1.0, 1.0000001, 1.001, 1.75, 100.0])
def test_long_repetitions_cost_no_more_than_float32_holds(base):
    dry = Dry(1.0, base, 2, (), lambda token: b"")
    tokens, losses = dry.lowered([7] * 3000)
    assert tokens.tolist() == [7] and 1 <= losses[0] <= 3.41e38
    got = moved(
        Sampling(0, dry_multiplier=100.0, dry_base=base, dry_window=3000), [0] * 8, [7] * 99
    )
    assert np.isfinite(got).all() and got.argmin() == 7 and math.isfinite(got[7])


def test_the_window_is_the_larger_of_those_in_use():
    assert Sampling().window == 0
    assert Sampling(presence_penalty=1.0, penalty_window=9).window == 9
    assert Sampling(dry_multiplier=1.0, dry_window=90, penalty_window=99).window == 90
    assert Sampling(dry_multiplier=1.0, dry_window=9, presence_penalty=1.0).window == 64
