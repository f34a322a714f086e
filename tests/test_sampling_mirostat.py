"""Mirostat: each step against the paper's, and its state, which goes on where a reply was cut."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from samplinghelp import chain, log_softmax, logits_of, resumed, tokens_of

from edgellama.noise import uniform
from edgellama.sampler import Sampler
from edgellama.sampling import Sampling

VOCAB = 50
MIROSTAT = Sampling(1.0, mirostat=2, mirostat_tau=3.0, seed=11)


def mirostat_twin(logits, mu, tau, eta, number):
    """One step of arXiv:2007.14966's second version: the token, and mu for the next."""
    odds = [math.exp(float(one) - float(max(logits))) for one in logits]
    kept = {i: one for i, one in enumerate(odds) if -math.log2(one / sum(odds)) <= mu}
    kept = kept or {int(np.argmax(logits)): 1.0}
    left = number * sum(kept.values())
    for token in kept:
        left -= kept[token]
        if left < 0:
            break
    return token, mu - eta * (-math.log2(kept[token] / sum(kept.values())) - tau)


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 1.0, 3.0, 5.0]), st.sampled_from([0.0, 0.1, 1.0]))
def test_mirostat_is_the_papers(seed, tau, eta):
    sampler = Sampler(replace(MIROSTAT, mirostat_tau=tau, mirostat_eta=eta), VOCAB)
    mu = 2 * tau
    for position in range(8):
        logits = logits_of(1000 * seed + position)
        wanted, mu = mirostat_twin(logits, mu, tau, eta, uniform(11, position))
        assert sampler.sample(logits, [], position)[0] == wanted
        assert sampler.mu == pytest.approx(mu, abs=1e-9)


def test_mirostat_holds_the_surprise_near_its_target():
    logits = logits_of(2, 2000) / 2
    for tau in (2.0, 4.0, 6.0):
        sampler = Sampler(replace(MIROSTAT, mirostat_tau=tau), 2000)
        mus = []
        for position in range(300):
            sampler.sample(logits, [], position)
            mus.append(sampler.mu)
        shares = np.exp(log_softmax(logits))
        kept = shares[-np.log2(shares) <= np.mean(mus[100:])]
        entropy = -(kept / kept.sum() * np.log2(kept / kept.sum())).sum()
        assert entropy == pytest.approx(tau, abs=0.5)


def test_mirostat_goes_on_from_the_state_that_was_reported():
    logits = logits_of(8)
    whole, end = chain(MIROSTAT, logits, 40)
    for cut in (0, 1, 17):
        tokens, sampler = chain(MIROSTAT, logits, cut)
        assert tokens == whole[:cut]
        onward = replace(MIROSTAT, mirostat_mu=sampler.mu)
        rest, last = resumed(onward, logits, tokens, 40)
        assert rest == whole and last.mu == end.mu
    assert Sampler(Sampling(), VOCAB).mu is None


def test_mirostat_takes_the_place_of_the_cuts_alone():
    logits = logits_of(8)
    bare = replace(MIROSTAT, order=("penalties", "dry", "temperature"))
    assert chain(MIROSTAT, logits, 30)[0] == chain(bare, logits, 30)[0]
    greedy = replace(MIROSTAT, temperature=0.0)
    assert set(tokens_of(greedy, logits, 9)) == {int(logits.argmax())}
    recent = [int(logits.argmax())] * 9
    away = replace(MIROSTAT, mirostat_tau=0.0, frequency_penalty=9.0)
    assert tokens_of(away, logits, 9, recent) == [int(np.argsort(logits)[-2])] * 9
