"""A reply that was stopped, continued from its tokens: the same as one that was not stopped."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import CancelToken, Model, Sampling

LENGTH = 30
SETTINGS = {
    "default": Sampling(temperature=1.5, seed=11),
    "all": Sampling(
        temperature=3.0,
        top_k=100,
        typical_p=0.95,
        top_n_sigma=3.0,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        dry_multiplier=0.8,
        xtc_probability=0.5,
        xtc_threshold=0.02,
        penalty_window=20,
        seed=11,
    ),
    "mirostat": Sampling(1.5, mirostat=2, mirostat_tau=3.0, presence_penalty=0.2, seed=11),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(path, tiny_config(context_length=256))
    with edgellama.load(path, runtime="reference") as model:
        yield model


def endless(model: Model, params: Sampling) -> Sampling:
    """The same, and the turn never ends: it holds letters alone, no special token or half one."""
    banned = [
        i for i in range(model.tokenizer.vocab_size) if len(model.tokenizer.token_text(i)) > 2
    ]
    return replace(params, logit_bias=dict.fromkeys(banned, -math.inf))


def stopped_after(
    model: Model, prompt: list[int], params: Sampling, count: int
) -> tuple[list[int], edgellama.Usage]:
    """The tokens of a reply that is cancelled once it has `count`, and its usage."""
    cancel, tokens = CancelToken(), []
    for chunk in model.generate(prompt, endless(model, params), max_tokens=LENGTH, cancel=cancel):
        if chunk.token is not None:
            tokens.append(chunk.token)
        if len(tokens) == count:
            cancel.cancel()
    assert chunk.usage is not None
    return tokens, chunk.usage


@pytest.mark.parametrize("name", SETTINGS)
def test_a_cancelled_reply_goes_on_as_if_it_had_not_been(model: Model, name: str) -> None:
    prompt = model.tokenizer.encode("the cat and the hat")
    whole, usage = stopped_after(model, prompt, SETTINGS[name], LENGTH)
    assert usage.seed == 11 and len(whole) == LENGTH and len(set(whole)) > 5
    for count in (1, 7, 20):
        begun, so_far = stopped_after(model, prompt, SETTINGS[name], count)
        assert begun == whole[:count]
        onward = replace(SETTINGS[name], mirostat_mu=so_far.mirostat_mu)
        rest, end = stopped_after(model, [*prompt, *begun], onward, LENGTH - count)
        assert begun + rest == whole
        assert (end.mirostat_mu is None) is (name != "mirostat")


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_cache_holds_makes_no_difference(model: Model, name: str) -> None:
    """A prompt read at once, or in parts by a session that goes on, or after another reply."""
    params = replace(SETTINGS[name], seed=5)
    prompt = model.tokenizer.encode("the cat and the hat")
    fresh, _ = stopped_after(model, prompt, params, LENGTH)
    for already in (prompt[:2], prompt, [*prompt, *fresh[:9]], [*prompt[:3], 77, 78]):
        session = model.session()
        session.forward(already)
        chunks = list(
            model.generate(prompt, endless(model, params), max_tokens=LENGTH, session=session)
        )
        assert [chunk.token for chunk in chunks] == fresh


def test_dry_knows_the_text_of_the_models_tokens(model: Model) -> None:
    prompt, texts = model.tokenizer.encode("the cat and the hat"), {}
    free = Sampling(0, repetition_penalty=0.7)  # fond of what it has said
    plain, _ = stopped_after(model, prompt, free, LENGTH)
    letters = tuple({letter for letter in model.tokenizer.decode([*prompt, *plain])})
    for name, breakers in {"none": (), "all": letters}.items():
        dry = replace(free, dry_multiplier=50.0, dry_allowed_length=1, dry_breakers=breakers)
        texts[name], _ = stopped_after(model, prompt, dry, LENGTH)
    assert texts["all"] == plain != texts["none"]
