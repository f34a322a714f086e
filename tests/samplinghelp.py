"""What the tests of sampling share: logits, and tokens drawn from them one after the other."""

import math

import numpy as np

from edgellama.sampler import Sampler


def logits_of(seed, size=50):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3


def tokens_of(sampling, logits, count, recent=()):
    sampler = Sampler(sampling, len(logits))
    return [sampler.sample(logits, recent, position)[0] for position in range(count)]


def chain(sampling, logits, count):
    """A reply of `count` tokens, whose logits depend on the token before; and the last sampler."""
    return resumed(sampling, logits, [], count)


def resumed(sampling, logits, tokens, count):
    """The same, going on from its first `tokens`."""
    sampler, tokens = Sampler(sampling, len(logits)), list(tokens)
    while len(tokens) < count:
        row = np.roll(logits, tokens[-1] if tokens else 0)
        tokens.append(sampler.sample(row, tokens, len(tokens))[0])
    return tokens, sampler


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
