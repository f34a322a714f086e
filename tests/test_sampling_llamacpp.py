"""llama.cpp's own samplers, called on the same logits: what they leave and how likely it is."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from samplinghelp import log_softmax, logits_of
from tiny import write_tiny

from edgellama import cuts
from edgellama.gguf import open_gguf
from edgellama.repetition import Dry
from edgellama.sampler import Sampler
from edgellama.sampling import Sampling
from edgellama.tokenizer import tokenizer_from_gguf

llama: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed").llama_cpp

NEAR = 1e-5  # llama.cpp adds up probabilities in float32


class Peer:
    """A chain of llama.cpp's samplers."""

    def __init__(self, *samplers: Any) -> None:
        self.chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for sampler in samplers:
            llama.llama_sampler_chain_add(self.chain, sampler)

    def accept(self, ids: list[int]) -> None:
        for token in ids:
            llama.llama_sampler_accept(self.chain, token)

    def apply(self, logits: Any) -> tuple[dict[int, float], int]:
        """The logits of the tokens that are left (-inf left out), by id, and which was drawn."""
        size = len(logits)
        data = (llama.llama_token_data * size)()
        for token, value in enumerate(logits):
            data[token] = llama.llama_token_data(token, float(value), 0.0)
        array = llama.llama_token_data_array(data, size, -1, False)
        llama.llama_sampler_apply(self.chain, ctypes.byref(array))
        left = [(array.data[i].id, array.data[i].logit) for i in range(array.size)]
        drawn = array.data[array.selected].id if array.selected >= 0 else -1
        return {token: value for token, value in left if value > -np.inf}, drawn

    def close(self) -> None:
        llama.llama_sampler_free(self.chain)


def left_by(logits: Any, *samplers: Any, recent: list[int] | None = None) -> dict[int, float]:
    peer = Peer(*samplers)
    peer.accept(recent or [])
    left, _ = peer.apply(logits)
    peer.close()
    return left


Cut = tuple[Callable[[Any, float], Any], Callable[[float], Any], list[float]]
CUTS: dict[str, Cut] = {
    "top_k": (cuts.top_k, lambda k: llama.llama_sampler_init_top_k(int(k)), [1, 5, 40]),
    "top_p": (cuts.top_p, lambda p: llama.llama_sampler_init_top_p(p, 0), [0.1, 0.5, 0.95]),
    "min_p": (cuts.min_p, lambda p: llama.llama_sampler_init_min_p(p, 0), [0.01, 0.05, 0.5]),
    "typical_p": (
        cuts.typical_p,
        lambda p: llama.llama_sampler_init_typical(p, 0),
        [0.1, 0.5, 0.95],
    ),
    "top_n_sigma": (cuts.top_n_sigma, lambda n: llama.llama_sampler_init_top_n_sigma(n), [0.5, 2]),
    "xtc": (
        cuts.xtc,
        lambda t: llama.llama_sampler_init_xtc(1.0, t, 0, 1),
        [0.01, 0.1, 0.3, 0.5],
    ),
}


def settled(logits: Any, cut: Callable[[Any, float], Any], value: float) -> bool:
    """Whether a setting a little larger or smaller cuts alike: else float32 may decide."""
    wanted = cut(logits, value).tolist()
    if isinstance(value, int) or value >= 1:
        return True
    return all(cut(logits, value * by).tolist() == wanted for by in (1 - NEAR, 1 + NEAR))


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("size", [9, 300, 5000])
def test_each_cut_is_llama_cpps(name: str, size: int) -> None:
    cut, peer, values = CUTS[name]
    compared = 0
    for seed in range(12):
        logits = logits_of(seed, size) * np.float32(0.3 + seed / 6)
        for value in values:
            if settled(logits, cut, value):
                assert set(left_by(logits, peer(value))) == set(cut(logits, value).tolist())
                compared += 1
    assert compared >= 12 * len(values) * 0.9


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999),
    st.lists(st.integers(0, 19), max_size=40),
    st.sampled_from([0, 1, 8, 64]),
    st.sampled_from([1.0, 1.1, 1.5, 0.7]),
    st.sampled_from([0.0, 0.5, -0.5]),
    st.sampled_from([0.0, 0.3, -0.3]),
)
def test_penalties_are_llama_cpps(
    seed: int, recent: list[int], window: int, repeat: float, frequency: float, presence: float
) -> None:
    logits = logits_of(seed, 20)
    sampling = Sampling(
        repetition_penalty=repeat,
        frequency_penalty=frequency,
        presence_penalty=presence,
        penalty_window=window,
        order=("penalties",),
    )
    peer = llama.llama_sampler_init_penalties(20, window, repeat, frequency, presence)
    wanted = left_by(logits, peer, recent=recent)
    sampler = Sampler(sampling, 20)
    got = sampler._allowed(logits)
    for step in sampler._steps:
        got = sampler._after(step, got, recent, 0)
    assert [wanted[token] for token in range(20)] == pytest.approx(
        got.scores.tolist(),
        rel=1e-5,
        abs=1e-6,  # what is nearly 0 was the difference of two larger
    )


# --- DRY ------------------------------------------------------------------------------------------


class Vocabulary:
    """A tiny model's, as both know it."""

    def __init__(self, path: Any) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.vocab_only = True
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        self.peer = llama.llama_model_get_vocab(self.model)
        with open_gguf(path) as gguf:
            self.own = tokenizer_from_gguf(gguf.metadata)

    def dry(self, multiplier: float, base: float, allowed: int, window: int, breakers: Any) -> Any:
        texts = (ctypes.c_char_p * len(breakers))(*[text.encode() for text in breakers])
        return llama.llama_sampler_init_dry(
            self.peer, multiplier, base, allowed, window, texts, len(breakers)
        )


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocabulary]:
    vocabulary = Vocabulary(write_tiny(tmp_path_factory.mktemp("dry") / "tiny.gguf"))
    yield vocabulary
    llama.llama_model_free(vocabulary.model)


BREAKERS = ("\n", ":", '"', "*")


@pytest.mark.parametrize("breakers", [(), BREAKERS, ("\n", "r")])
@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_dry_is_llama_cpps(vocabulary: Vocabulary, allowed: int, breakers: tuple[str, ...]) -> None:
    """With breakers of one character: llama.cpp can miss longer ones that tokens cut in two."""
    tokenizer, size = vocabulary.own, vocabulary.own.vocab_size
    phrase = tokenizer.encode('the cat: "the hat"\nthe rat the bat the')
    rng = np.random.default_rng(allowed)
    lowered = 0
    for trial in range(20):
        recent = [int(token) for token in rng.choice(phrase, 40)] if trial % 2 else phrase * 3
        recent = recent[: 40 + trial]
        for window in (16, 64):
            wanted = left_by(
                np.zeros(size),
                vocabulary.dry(0.8, 1.75, allowed, window, breakers),
                recent=recent,
            )
            dry = Dry(0.8, 1.75, allowed, breakers, tokenizer.token_bytes)
            tokens, losses = dry.lowered(recent[-window:])
            got = dict(zip(tokens.tolist(), (-losses).tolist(), strict=True))
            assert {t: v for t, v in wanted.items() if v} == pytest.approx(got, rel=1e-5)
            lowered += len(got)
    assert lowered > 0


# --- the whole chain ------------------------------------------------------------------------------


GIVEN: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
    {"temperature": 0.5, "top_k": 0, "top_n_sigma": 1.5, "presence_penalty": 1.0},
    {"temperature": 2.0, "top_k": 100, "top_p": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.1},
    {"order": ("temperature", "min_p", "top_p"), "temperature": 3.0},
    {"order": ("top_p", "temperature", "top_k"), "top_p": 0.6, "temperature": 0.3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "top_k": 7},
]


def peers(sampling: Sampling, vocab_size: int) -> list[Any]:
    """llama.cpp's samplers with these settings in this order."""
    known = {
        "penalties": lambda: llama.llama_sampler_init_penalties(
            vocab_size,
            sampling.penalty_window,
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        ),
        "top_n_sigma": lambda: llama.llama_sampler_init_top_n_sigma(sampling.top_n_sigma),
        "top_k": lambda: llama.llama_sampler_init_top_k(sampling.top_k),
        "typical_p": lambda: llama.llama_sampler_init_typical(sampling.typical_p, 0),
        "top_p": lambda: llama.llama_sampler_init_top_p(sampling.top_p, 0),
        "min_p": lambda: llama.llama_sampler_init_min_p(sampling.min_p, 0),
        "xtc": lambda: llama.llama_sampler_init_xtc(
            sampling.xtc_probability, sampling.xtc_threshold, 0, 1
        ),
        "temperature": lambda: llama.llama_sampler_init_temp(sampling.temperature),
    }
    return [known[step]() for step in sampling.order if step != "dry"]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_chain_is_llama_cpps(given: dict[str, Any]) -> None:
    sampling = Sampling(**given)
    for seed in range(15):
        logits = logits_of(seed, 400)
        recent = [int(token) for token in np.argsort(logits)[-6:]] * 2
        wanted = left_by(logits, *peers(sampling, 400), recent=recent)
        sampler = Sampler(sampling, 400)
        got = sampler._allowed(logits)
        for step in sampler._steps:
            got = sampler._after(step, got, recent, 0)
        assert got.ids is not None and sorted(wanted) == got.ids.tolist()
        theirs = np.array([wanted[token] for token in sorted(wanted)])
        assert np.abs(np.exp(log_softmax(theirs)) - np.exp(log_softmax(got.scores))).max() < NEAR


@pytest.mark.parametrize("tau", [1.0, 3.0, 5.0])
def test_mirostat_is_llama_cpps(tau: float) -> None:
    """Its own draws, followed step by step: the same tokens are left each time."""
    peer = Peer(llama.llama_sampler_init_mirostat_v2(7, tau, 0.3))
    mu = 2 * tau
    for step in range(60):
        logits = logits_of(step, 300) / 2
        left, drawn = peer.apply(logits)
        kept = cuts.surprising_at_most(logits, mu)
        assert sorted(left) == kept.tolist() and drawn in left
        surprise = -log_softmax(logits[kept])[kept.tolist().index(drawn)] / np.log(2)
        mu -= 0.3 * (surprise - tau)
    peer.close()


def test_logit_bias_is_llama_cpps() -> None:
    bias = {3: 2.5, 7: -np.inf, 11: -4.0}
    logits = logits_of(1, 20)
    pairs = (llama.llama_logit_bias * 3)(*[llama.llama_logit_bias(*pair) for pair in bias.items()])
    wanted = left_by(logits, llama.llama_sampler_init_logit_bias(20, 3, pairs))
    got = Sampler(Sampling(logit_bias=bias), 20)._allowed(logits)
    assert got.ids is not None and sorted(wanted) == got.ids.tolist()
    assert [wanted[token] for token in sorted(wanted)] == pytest.approx(got.scores.tolist())
