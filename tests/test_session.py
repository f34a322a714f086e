"""Sessions of a loaded model: the cache, its limits, threads, cancelling and closing."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import Cancelled, CancelToken, ContextOverflow, Model, ParameterError

CONTEXT = 100
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 288, 90)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("session") / "tiny.gguf", types="Q4_1")


@pytest.fixture(scope="module", params=["cpu", "reference"])
def model(path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    cpu = request.param == "cpu"
    options: dict[str, Any] = {"threads": 3, "deterministic": True} if cpu else {}
    with edgellama.load(path, runtime=request.param, context=CONTEXT, **options) as loaded:
        yield loaded


def same(a: Any, b: Any, model: Model) -> bool:
    """Equal: to the bit, but for NumPy's products, whose rounding depends on how many there are."""
    if model.device["runtime"] == "cpu":
        return np.array_equal(a.view(np.uint32), b.view(np.uint32))
    return np.allclose(a, b, rtol=0, atol=1e-4)


def test_logits_of_the_last_token_or_of_all(model: Model) -> None:
    session = model.session()
    every = session.forward(IDS, all_logits=True)
    assert every.shape == (90, 288) and every.dtype == np.float32
    assert np.all(np.isfinite(every))
    last = model.session().forward(IDS)
    assert last.shape == (288,) and last.dtype == np.float32
    assert same(last, every[-1], model)


def test_position_and_ids_follow_the_cache(model: Model) -> None:
    session = model.session()
    assert session.position == 0 and session.ids == ()
    session.forward(IDS[:5])
    session.forward(np.array(IDS[5:7]))
    assert session.position == 7 and session.ids == tuple(IDS[:7])
    session.truncate(3)
    assert session.position == 3 and session.ids == tuple(IDS[:3])


def test_truncating_forgets_what_came_after(model: Model) -> None:
    session = model.session()
    first = session.forward(IDS[:70])
    session.forward([5, 6, 7])
    session.truncate(20)
    session.forward([9] * 60)
    session.truncate(20)
    assert same(session.forward(IDS[20:70]), first, model)
    session.truncate(70)
    assert session.position == 70
    session.truncate(0)
    assert same(session.forward(IDS[:70]), first, model)


def test_results_are_the_caller_s_own(model: Model) -> None:
    session = model.session()
    first = session.forward([1])
    kept = first.copy()
    session.forward([2])
    assert np.array_equal(first, kept)
    first[:] = 0  # and may be written to
    session.truncate(0)
    assert same(session.forward([1]), kept, model)


@pytest.mark.parametrize("n", [-1, 8, 2**40, 1.0, True, "1", None])
def test_truncating_to_a_wrong_length_is_refused(model: Model, n: Any) -> None:
    session = model.session()
    session.forward(IDS[:7])
    with pytest.raises(ParameterError, match=r"allowed: an integer 0\.\.7"):
        session.truncate(n)
    assert session.position == 7


def test_the_context_is_a_limit(model: Model) -> None:
    session = model.session()
    with pytest.raises(ContextOverflow) as caught:
        session.forward([1] * 101)
    assert (caught.value.need, caught.value.have) == (101, CONTEXT)
    assert session.position == 0
    session.forward([1] * 100)
    with pytest.raises(ContextOverflow):
        session.forward([1])
    assert session.position == 100
    session.truncate(99)
    session.forward([1])


@pytest.mark.parametrize(
    "ids", [[], [288], [-1], [2**40], [1, 2**63], [1.0], ["1"], [True], [None], [[1]], "ab"]
)
def test_wrong_ids_are_refused(model: Model, ids: Any) -> None:
    session = model.session()
    with pytest.raises(ParameterError, match="ids"):
        session.forward(ids)
    assert session.position == 0


def test_numpy_ids_of_any_integer_type(model: Model) -> None:
    wanted = model.session().forward([3, 4])
    for dtype in (np.int32, np.int64, np.uint16):
        assert same(model.session().forward(np.array([3, 4], dtype)), wanted, model)


@pytest.mark.parametrize("known", [3, 9])
def test_a_signal_between_two_steps_leaves_what_both_know(model: Model, known: int) -> None:
    """Ctrl-C may come once the cache has grown or shrunk, and before the ids have."""
    session = model.session()
    wanted = session.forward(IDS[:7])
    session.truncate(0)
    session.forward(IDS[:5])
    if known == 9:
        session._runtime_session.forward(IDS[5:known])
    else:
        session._runtime_session.truncate(known)
    rest = IDS[min(known, 5) : 7]
    assert same(session.forward(rest), wanted, model)
    assert session.position == 7 and session.ids == tuple(IDS[:7])


# --- threads -------------------------------------------------------------------------------------


def test_concurrent_sessions_answer_as_if_alone(model: Model) -> None:
    def steps(seed: int) -> list[Any]:
        rng, session = np.random.default_rng(seed), model.session()
        answers = []
        for _ in range(12):
            ids = rng.integers(0, 288, int(rng.integers(1, 9)))
            if session.position + len(ids) > CONTEXT or rng.random() < 0.2:
                session.truncate(session.position // 2)
            answers.append(session.forward(ids))
        return answers

    alone = [steps(seed) for seed in range(4)]
    together: dict[int, list[Any]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: steps(seed)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed in range(4):
        for a, b in zip(alone[seed], together[seed], strict=True):
            assert np.array_equal(a, b)


def test_one_session_used_by_several_threads_takes_turns(model: Model) -> None:
    session = model.session()
    threads = [threading.Thread(target=session.forward, args=([i] * 5,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert session.position == 40
    groups = [session.ids[i : i + 5] for i in range(0, 40, 5)]
    assert sorted(groups) == [(i,) * 5 for i in range(8)]
    fresh = model.session()
    fresh.forward(session.ids)
    assert same(fresh.forward([1]), session.forward([1]), model)


# --- cancelling ----------------------------------------------------------------------------------


def test_a_token_set_before(model: Model) -> None:
    session, token = model.session(), CancelToken()
    session.forward(IDS[:5])
    token.cancel()
    with pytest.raises(Cancelled):
        session.forward(IDS[5:], cancel=token)
    assert session.position == 5 and session.ids == tuple(IDS[:5])
    wanted = model.session().forward(IDS)
    assert same(session.forward(IDS[5:]), wanted, model)


@pytest.fixture(scope="module")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(n_layers=8, dim=256, ffn_dim=1024, context_length=4096)
    return write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", config, "Q4_1")


@pytest.mark.parametrize("runtime", ["cpu", "reference"])
def test_a_token_set_during(long_path: Path, runtime: Any) -> None:
    """It may come at any time: either nothing happened, or all of it."""
    with edgellama.load(long_path, runtime=runtime, context=4096) as model:
        session = model.session()
        ids = IDS * 40
        cancelled = 0
        for seconds in (0.002, 0.05):
            token = CancelToken()
            timer = threading.Timer(seconds, token.cancel)
            timer.start()
            try:
                session.forward(ids, cancel=token)
                assert session.position == len(ids)
            except Cancelled:
                cancelled += 1
                assert session.position == 0 and session.ids == ()
            timer.join()
            session.truncate(0)
            assert same(session.forward(IDS[:9]), model.session().forward(IDS[:9]), model)
            session.truncate(0)
        assert cancelled > 0


# --- closing -------------------------------------------------------------------------------------


def test_closing_a_session_twice(model: Model) -> None:
    session, other = model.session(), model.session()
    session.forward([1, 2])
    session.close()
    session.close()
    with pytest.raises(ParameterError, match="closed"):
        session.forward([3])
    with pytest.raises(ParameterError, match="closed"):
        session.truncate(0)
    assert other.forward([1]).shape == (288,)


@pytest.mark.parametrize("runtime", ["cpu", "reference"])
def test_closing_a_model_twice(path: Path, runtime: Any) -> None:
    threads = threading.active_count()
    model = edgellama.load(path, runtime=runtime, threads=3)
    session = model.session()
    session.forward([1])
    model.close()
    model.close()
    assert threading.active_count() == threads
    with pytest.raises(ParameterError, match="closed"):
        session.forward([1])
    with pytest.raises(ParameterError, match="closed"):
        model.session()
    session.close()


def test_closing_a_model_while_it_works(path: Path) -> None:
    """Every call that was on its way ends well or with ParameterError."""
    for wait in (0.0, 0.002, 0.01):
        model = edgellama.load(path, threads=3)
        sessions = [model.session() for _ in range(3)]
        wrong: list[BaseException] = []

        def work(session: edgellama.Session, wrong: list[BaseException] = wrong) -> None:
            try:
                while True:
                    session.forward(IDS)
                    session.truncate(0)
            except ParameterError:
                pass
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(s,)) for s in sessions]
        for thread in threads:
            thread.start()
        threading.Event().wait(wait)
        model.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert wrong == []


def test_a_dropped_model_leaves_no_threads(path: Path) -> None:
    """Without close(): memory and threads go with the last reference."""
    import gc

    before = threading.active_count()
    model = edgellama.load(path, threads=3)
    model.session().forward([1])
    assert threading.active_count() == before + 2
    del model
    gc.collect()
    for _ in range(100):
        if threading.active_count() == before:
            break
        threading.Event().wait(0.05)
    assert threading.active_count() == before


def test_a_session_of_another_model_is_refused(model: Model, path: Path) -> None:
    with edgellama.load(path, runtime="reference", context=CONTEXT) as other:
        for call in (model.generate, model.chat):
            with pytest.raises(ParameterError, match="another model"):
                call([1, 2], session=other.session())


def test_prompts_up_to_the_context(model: Model) -> None:
    """A2: one token fewer leaves room for a token; as many leave none; one more is refused."""
    for size, reply in ((CONTEXT - 1, 1), (CONTEXT, 0)):
        chunks = list(model.generate(([1, 5] * CONTEXT)[:size]))
        assert len([c for c in chunks if c.token is not None]) == reply
        assert chunks[-1].finish_reason in ("context", "stop")
    for size in (CONTEXT + 1, 10 * CONTEXT):
        with pytest.raises(ContextOverflow, match=f"{size} tokens do not fit the context of 100"):
            model.generate(([1, 5] * 10 * CONTEXT)[:size])


def test_an_empty_prompt_is_bos_or_refused(model: Model, tmp_path: Path) -> None:
    """A1 of the catalogue of bad inputs."""
    last = list(model.generate("", max_tokens=1))[-1]
    assert last.usage is not None and last.usage.prompt_tokens == 1
    with pytest.raises(ParameterError, match="at least one token"):
        model.generate([])
    path = write_tiny(tmp_path / "a.gguf", metadata={"tokenizer.ggml.add_bos_token": False})
    with (
        edgellama.load(path, threads=1) as without,
        pytest.raises(ParameterError, match="at least one token"),
    ):
        without.generate("")


def test_leaving_a_session_closes_it(model: Model) -> None:
    with model.session() as session:
        session.forward([1])
    with pytest.raises(ParameterError, match="closed"):
        session.forward([1])
    assert session.position == 0


@pytest.mark.parametrize("prompt", [None, b"abc", 5])
def test_a_prompt_is_text_or_ids(model: Model, prompt: Any) -> None:
    with pytest.raises(ParameterError, match="expected text or token ids"):
        model.generate(prompt)
