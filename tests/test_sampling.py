"""Sampling: what the settings may be, and that a sampler does what they say, in their order."""

import math
from collections import deque
from dataclasses import asdict, fields, replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from samplinghelp import chain, log_softmax, logits_of, resumed, tokens_of

from edgellama import cuts
from edgellama.errors import NonFiniteError, ParameterError
from edgellama.sampler import Sampler
from edgellama.sampling import ORDER, STEPS, Sampling

VOCAB = 50
OFF = {name: off for step in STEPS.values() for name, off in step.items()}
PLAIN = Sampling(**OFF, seed=1)
ALL = Sampling(
    top_n_sigma=2.0,
    typical_p=0.9,
    xtc_probability=0.5,
    xtc_threshold=0.05,
    dry_multiplier=0.8,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={2: 1.0, 3: -math.inf},
    seed=5,
)

whole = st.integers(-8, 8).map(float)  # many ties
finite = st.floats(-(2.0**100), 2.0**100, width=32)
logit_arrays = (
    st.lists(whole | finite | st.just(-math.inf), min_size=1, max_size=60)
    .filter(lambda values: max(values) > -math.inf)
    .map(lambda values: np.array(values, np.float32))
)


# --- the whole chain ------------------------------------------------------------------------------


SWITCHED = {
    "top_k": st.sampled_from([0, 1, 5, 40]),
    "top_p": st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "typical_p": st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    "top_n_sigma": st.sampled_from([0.0, 0.1, 1.0]),
    "xtc_probability": st.sampled_from([0.0, 0.5, 1.0]),
    "xtc_threshold": st.sampled_from([1e-9, 0.1, 0.5]),
    "temperature": st.sampled_from([0.0, 1e-30, 0.5, 1.0, 100.0]),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 2.0]),
    "dry_multiplier": st.sampled_from([0.0, 1.0, 100.0]),
    "mirostat": st.sampled_from([0, 0, 2]),
    "seed": st.integers(0, 2**64 - 1),
    "order": st.permutations(ORDER),
}


@given(logit_arrays, st.fixed_dictionaries(SWITCHED), st.lists(st.integers(0, 3), max_size=20))
def test_any_setting_draws_a_token_that_can_come(logits, given, recent):
    recent = [token % len(logits) for token in recent]
    before = logits.copy()
    sampler = Sampler(Sampling(**given), len(logits))
    token, logprob = sampler.sample(logits, recent, 3)
    assert logits[token] > -math.inf
    assert logprob == pytest.approx(log_softmax(logits)[token], rel=1e-5, abs=1e-5)
    assert logits.tolist() == before.tolist()
    again = Sampler(Sampling(**given), len(logits)).sample(logits, deque(recent), 3)
    assert again == (token, logprob)


def by_hand(logits, sampling):
    """What the cuts leave, done one after the other in the order given: ids."""
    ids = np.arange(len(logits))
    for step in sampling.order:
        scores = logits[ids]
        if step == "temperature":
            logits = logits / np.float64(sampling.temperature)
        elif step == "xtc":
            ids = ids[cuts.xtc(scores, sampling.xtc_threshold)]
        elif sampling.does(step):
            ids = ids[getattr(cuts, step)(scores, getattr(sampling, step))]
    return set(ids.tolist())


@pytest.mark.parametrize("first", ["temperature", "top_p", "min_p", "xtc", "typical_p"])
def test_steps_are_taken_in_the_order_given(first):
    rest = [step for step in ORDER if step != first]
    sampling = Sampling(
        2.0, 12, 0.8, 0.1, 0.9, top_n_sigma=2.0, xtc_probability=1.0, order=(first, *rest), seed=1
    )
    logits = logits_of(3)
    wanted = by_hand(logits.astype(np.float64), sampling)
    assert set(tokens_of(sampling, logits, 600)) == wanted


def test_the_order_makes_a_difference():
    """Hot logits are flat: cut before, few tokens stay; cut after, many."""
    logits = logits_of(3)
    cut = replace(PLAIN, temperature=50.0, top_p=0.5)
    early = set(tokens_of(cut, logits, 400))
    late = set(tokens_of(replace(cut, order=("temperature", "top_p")), logits, 400))
    assert len(early) < 6 < 15 < len(late)


def test_steps_that_do_nothing_may_stand_anywhere_or_nowhere():
    logits = logits_of(4)
    wanted = tokens_of(replace(PLAIN, top_k=5), logits, 50)
    for order in permutations(("top_k", "dry", "min_p", "xtc")):
        assert tokens_of(replace(PLAIN, top_k=5, order=order), logits, 50) == wanted
    assert tokens_of(replace(PLAIN, top_k=5, order=("top_k",)), logits, 50) == wanted


def test_a_step_left_out_is_not_done():
    logits = logits_of(4)
    assert len(set(tokens_of(Sampling(1.0, 2, 1.0, 0.0, seed=1), logits, 300))) == 2
    bare = Sampling(order=(), seed=1)  # the defaults of top_k and others have no effect
    assert tokens_of(bare, logits, 300) == tokens_of(PLAIN, logits, 300)
    with pytest.raises(ParameterError, match=r"^top_k is 2, but order leaves out top_k$"):
        Sampling(top_k=2, order=("top_p", "temperature"))
    with pytest.raises(ParameterError, match=r"^frequency_penalty is 0\.5, but"):
        Sampling(frequency_penalty=0.5, order=("top_p", "temperature"))


# --- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature):
    """Chi-square of 7 degrees of freedom: 24.3 is passed once in a thousand; the seed is fixed."""
    logits = logits_of(3, 8)
    drawn = tokens_of(replace(PLAIN, temperature=temperature), logits, 4000)
    expected = 4000 * np.exp(log_softmax(logits / np.float32(temperature)))
    counts = np.bincount(drawn, minlength=8)
    rare = expected < 5  # together, or one draw too many would count too much
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    assert ((counts - expected) ** 2 / np.maximum(expected, 1)).sum() < 24.3


def test_xtc_is_done_as_often_as_asked():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    often = replace(PLAIN, xtc_probability=0.25, xtc_threshold=0.1)
    counts = np.bincount(tokens_of(often, logits, 4000), minlength=4) / 4000
    kept = np.array([0.0, 0.0, 0.75, 0.25])
    wanted = 0.75 * np.array([0.5, 0.3, 0.15, 0.05]) + 0.25 * kept
    assert np.abs(counts - wanted).max() < 0.035  # four standard deviations


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    logits = logits_of(5)
    logits[3], logits[17] = -math.inf, bad
    with pytest.raises(NonFiniteError, match=f"the logit of token 17 is {abs(bad)}"):
        Sampler(Sampling(temperature), VOCAB).sample(logits, [], 0)


def test_logits_of_minus_infinity_are_tokens_that_cannot_come():
    logits = np.full(VOCAB, -math.inf, np.float32)
    logits[[4, 9]] = 1.0
    for sampling in (PLAIN, Sampling(0), ALL, Sampling(mirostat=2), Sampling(logit_bias={5: 9.0})):
        token, logprob = Sampler(sampling, VOCAB).sample(logits, [4, 5, 4, 5, 4], 1)
        assert token in (4, 9) and logprob == pytest.approx(-math.log(2))
    with pytest.raises(NonFiniteError, match="the logit of token 0 is -inf"):
        Sampler(PLAIN, VOCAB).sample(np.full(VOCAB, -math.inf, np.float32), [], 0)
    banned = Sampling(logit_bias={4: -math.inf, 9: -math.inf})
    with pytest.raises(NonFiniteError, match="rule out every one"):
        Sampler(banned, VOCAB).sample(logits, [], 0)


def test_a_draw_depends_on_seed_and_position_alone():
    sampler, logits = Sampler(replace(PLAIN, seed=7), VOCAB), np.zeros(VOCAB, np.float32)
    forward = [sampler.sample(logits, [], position)[0] for position in range(30)]
    backward = [sampler.sample(logits, [], position)[0] for position in reversed(range(30))]
    assert forward == backward[::-1] and len(set(forward)) > 10
    assert forward != tokens_of(replace(PLAIN, seed=8), logits, 30)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.sampled_from([PLAIN, Sampling(seed=3), ALL, replace(ALL, top_k=0)]))
def test_a_reply_that_was_cut_goes_on_as_if_it_had_not_been(cut, sampling):
    logits = logits_of(8)
    tokens, _ = chain(sampling, logits, 30)
    assert resumed(sampling, logits, tokens[:cut], 30)[0] == tokens


def test_a_fresh_seed_is_reported():
    seeds = {Sampler(Sampling(), VOCAB).seed for _ in range(5)}
    assert len(seeds) > 1
    (logits,) = (np.zeros(VOCAB, np.float32),)
    sampler = Sampler(replace(PLAIN, seed=None), VOCAB)
    drawn = [sampler.sample(logits, [], position)[0] for position in range(20)]
    assert tokens_of(replace(PLAIN, seed=sampler.seed), logits, 20) == drawn


# --- logit bias and log probabilities -------------------------------------------------------------


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


@given(st.dictionaries(st.integers(0, 5), st.floats(-50, 50), max_size=6), st.integers(0, 99))
def test_logit_bias_is_added(bias, seed):
    logits = logits_of(seed, 6)
    moved = [float(one) + np.float64(bias.get(i, 0)) for i, one in enumerate(logits)]
    moved = [float(np.float32(one)) for one in moved]
    assert tokens_of(Sampling(0, logit_bias=bias), logits, 1) == [moved.index(max(moved))]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [math.nan, math.inf, -1, -1e-9, 100.1, "hot", True, None, 1j],
        "top_k": [-5, 2**40, 1.0, True, "4", None, 10**400],
        "top_p": [0, 1.1, math.nan, -3, True, "1", None],
        "min_p": [-0.1, 1.1, math.nan, False, None],
        "typical_p": [0, 1.1, math.nan, -1, True, "1", None],
        "top_n_sigma": [-1, math.nan, math.inf, True, None],
        "xtc_probability": [-0.1, 1.1, math.nan, True, None],
        "xtc_threshold": [0, 1.1, math.nan, True, None],
        "dry_multiplier": [-1, 101, math.nan, True, None],
        "dry_base": [0.9, 101, math.inf, math.nan, True],
        "dry_allowed_length": [0, -1, 2**40, 1.5, True],
        "dry_window": [-1, 2**40, 1.5, True],
        "dry_breakers": ["\n", None, [""], ["x" * 65], ["a"] * 65, [b"a"], [1], ["\ud800"]],
        "mirostat": [1, 3, -1, 2.0, True, None],
        "mirostat_tau": [-1, 101, math.nan, True],
        "mirostat_eta": [-0.1, 1.1, math.nan, True],
        "mirostat_mu": [math.nan, math.inf, 1e10, True, "1"],
        "order": ["top_k", None, ("top_q",), ("top_k", "top_k"), (1,), ("logit_bias",), {"top_k"}],
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
    """A4, A5 and A7 of the catalogue of bad inputs."""
    for value in values:
        with pytest.raises(ParameterError) as caught:
            Sampling(**{name: value})
        assert str(caught.value).startswith(name) and "; expected " in str(caught.value)
        assert caught.value.field.startswith(name) and caught.value.allowed


def test_unknown_samplers_are_refused():
    with pytest.raises(TypeError, match="tfs_z"):
        Sampling(tfs_z=0.9)


def test_defaults_are_the_documented_ones():
    """llama.cpp's own, and each new sampler off."""
    defaults = asdict(Sampling())
    assert [each.name for each in fields(Sampling)][:11] == [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "penalty_window",
        "logit_bias",
        "seed",
    ]
    on = {name: defaults[name] for name in OFF if defaults[name] != OFF[name]}
    assert on == {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    assert defaults["mirostat"] == 0 and defaults["penalty_window"] == 64
    assert " ".join(ORDER) == (
        "penalties dry top_n_sigma top_k typical_p top_p min_p xtc temperature"
    )


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
